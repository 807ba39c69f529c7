"""A run is a folder, and the folder is the only state.

    runs/<name>/
      run.json        status, pid, heartbeat, versions, git, device, argv, and the outcome
      config.yaml     every setting with its origin; may be given to `train` again as it is
      metrics.jsonl   one line per optimiser step, evaluation or measurement of the adapters
      events.jsonl    warnings, samples, saves, proofs: what happened besides
      data.json       hashes, counts, lengths and which rows were held out
      checkpoints/    best/ and last/: the adapter in PEFT's layout, the tokenizer, state.pt to go on from
      adapter -> checkpoints/best
      proof.json  README.md  run.log

Whoever watches a run - the command line, a page in a browser, a second process - reads these files and nothing else, so
closing the watcher loses nothing and a process that died is seen to be dead. Small files are replaced in one step;
the two logs only grow, and a resumed run cuts metrics.jsonl back to where its checkpoint was made.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from veneer.ckpt.atomic import atomic_write, recover
from veneer.errors import CheckpointError, ConfigError
from veneer.train.settings import KEYS, Origin, Resolved, Settings

__all__ = ["ACTIVE", "Run"]

ACTIVE = ("preparing", "training", "proving")  # a process should be behind these; the others: done, stopped, failed
BEAT_SECONDS = 5.0
SILENT_SECONDS = 900.0  # a run elsewhere, whose process cannot be looked up, is dead after this much silence
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


class Run:
    """Reads and writes one run directory. Reading never changes it."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._logs: dict[str, IO[bytes]] = {}
        self._beaten = 0.0

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    # ---------------------------------------------------------------- making and finding

    @classmethod
    def create(
        cls,
        resolved: Resolved,
        *,
        out: str | None = None,
        name: str | None = None,
        root: str | os.PathLike[str] = "runs",
    ) -> Run:
        """A new folder for a run with these settings: `out`, else root/name, else a name from the data and the day.

        Never touches an existing run.
        """
        run = cls(_new_folder(out, name, resolved.settings.data, Path(root)))
        (run.folder / "checkpoints").mkdir()
        run.write_config(resolved)  # before run.json: whoever finds that finds a run that can be gone on with
        now = time.time()
        run._write_info(
            {
                "name": run.name, "status": "preparing", **_process(), "started": now, "heartbeat": now, "ended": None,
                "argv": sys.argv, "versions": _versions(), "git": _git(), "device": None,
                "sessions": 1, "error": None, "result": {},
            }
        )  # fmt: skip
        return run

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, root: str | os.PathLike[str] = "runs") -> Run:
        """The run in `folder`, or the one of that name under `root`; "last" is the youngest."""
        found = cls(_find(str(folder), Path(root)))
        recover(found.best)
        recover(found.last)
        return found

    def take_over(self) -> None:
        """This process goes on with the run."""
        if self.status in ACTIVE and self.info["pid"] != os.getpid():
            raise ConfigError(
                f"the run is still going, in process {self.info['pid']}",
                str(self.folder),
                "wait for it, or stop it first",
            )
        for left in self.path("checkpoints").glob(".*"):  # what a killed process was writing
            shutil.rmtree(left, ignore_errors=True)
        self.update(status="preparing", **_process(), error=None, ended=None, sessions=self.info.get("sessions", 1) + 1)

    # ---------------------------------------------------------------- where things are

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def best(self) -> Path:
        return self.folder / "checkpoints" / "best"

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last"

    @property
    def learned(self) -> Path:
        """The checkpoint that counts: the best one, or the last where nothing was held out to judge by."""
        return self.best if self.best.is_dir() else self.last

    @property
    def adapter(self) -> Path:
        """What the run learned: the best checkpoint."""
        return self.folder / "adapter"

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def link_adapter(self) -> None:
        """adapter -> checkpoints/best (last while there is no best), relative, so that a moved run still finds it.

        Where the disk knows no links it is a copy.
        """
        target = "checkpoints/best" if self.best.exists() else "checkpoints/last"
        if self.adapter.is_symlink() and os.readlink(self.adapter) == target:
            return
        if self.adapter.is_symlink():
            self.adapter.unlink()
        elif (
            self.adapter.exists()
        ):  # a copy: of an earlier best, or of a link that was followed when the run was copied
            shutil.rmtree(self.adapter)
        try:
            self.adapter.symlink_to(target, target_is_directory=True)
        except OSError:
            shutil.copytree(self.path(target), self.adapter, ignore=shutil.ignore_patterns("state.pt"))

    # ---------------------------------------------------------------- run.json

    @property
    def info(self) -> dict[str, Any]:
        return self._read_json("run.json")

    @property
    def status(self) -> str:
        """preparing, training, proving, done, stopped, failed - or dead: it says it runs, but nothing is behind it."""
        info = self.info
        return "dead" if info["status"] in ACTIVE and not _is_alive(info) else info["status"]

    @property
    def result(self) -> dict[str, Any]:
        return self.info.get("result", {})

    def update(self, **fields: Any) -> None:
        """Set fields of run.json; `result` is merged, the others are replaced."""
        info = self.info
        if "result" in fields:
            fields["result"] = {**info.get("result", {}), **fields["result"]}
        self._write_info({**info, **fields, "heartbeat": time.time()})

    def beat(self) -> None:
        """A sign of life, at most every few seconds."""
        if time.monotonic() - self._beaten > BEAT_SECONDS:
            self.update()

    def _write_info(self, info: Mapping[str, Any]) -> None:
        self._beaten = time.monotonic()
        atomic_write(self.path("run.json"), json.dumps(info, indent=1, default=str) + "\n", fsync=False)

    # ---------------------------------------------------------------- config.yaml

    def write_config(self, resolved: Resolved) -> None:
        lines = [f"# {self.name}: every setting, and where its value came from"]
        for name, key in KEYS.items():
            if name == "resume":  # belongs to the command, not to the run
                continue
            value = getattr(resolved.settings, name)
            lines.append(f"{key.name}: {json.dumps(value, default=str)}  # {_one_line(str(resolved.origins[name]))}")
        atomic_write(self.path("config.yaml"), "\n".join(lines) + "\n")

    def config(self) -> Resolved:
        """The settings of the run and the origin of each, as `write_config` left them."""
        values: dict[str, Any] = {}
        origins = {name: Origin("default") for name in KEYS}
        for number, line in enumerate(self.path("config.yaml").read_text().splitlines(), 1):
            if line.strip() and not line.startswith("#"):
                name, value, origin = _config_line(line, f"{self.path('config.yaml')}:{number}")
                values[name], origins[name] = value, origin
        return Resolved(Settings(**values), origins, [])

    # ---------------------------------------------------------------- the logs

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        self._append("metrics.jsonl", row)

    def log_event(self, event: Mapping[str, Any]) -> None:
        self._append("events.jsonl", {"time": round(time.time(), 3), **event})

    def log_text(self, text: str) -> None:
        with self.path("run.log").open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text.rstrip()}\n")

    def metrics(self, *kinds: str) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, or those that have one of `kinds` among their fields: loss, val_loss, dw."""
        rows = list(_rows(self.path("metrics.jsonl")))
        return [row for row in rows if not kinds or any(kind in row for kind in kinds)]

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return [row for row in _rows(self.path("events.jsonl")) if not kinds or row.get("event") in kinds]

    def metrics_position(self) -> int:
        """Bytes of metrics.jsonl so far: where a resumed run goes on writing."""
        if "metrics.jsonl" in self._logs:
            self._logs["metrics.jsonl"].flush()
        path = self.path("metrics.jsonl")
        return path.stat().st_size if path.exists() else 0

    def cut_metrics(self, position: int) -> None:
        """Forget what was measured after `position`: those steps will be run again."""
        self.close()
        path = self.path("metrics.jsonl")
        if path.exists() and path.stat().st_size > position:
            os.truncate(path, position)

    def close(self) -> None:
        for file in self._logs.values():
            file.close()
        self._logs.clear()

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if name not in self._logs:
            self._logs[name] = self.path(name).open("ab")
        self._logs[name].write(json.dumps(_plain(row), default=str).encode() + b"\n")
        self._logs[name].flush()

    # ---------------------------------------------------------------- other files

    @property
    def data(self) -> dict[str, Any]:
        return self._read_json("data.json")

    @property
    def proof(self) -> dict[str, Any] | None:
        return self._read_json("proof.json") if self.path("proof.json").exists() else None

    def write_json(self, name: str, value: Any) -> None:
        atomic_write(self.path(name), json.dumps(_plain(value), indent=1, default=str) + "\n")

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads(self.path(name).read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{name} is missing", str(self.folder), "is this the folder of a run?") from None
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{name} is not valid JSON: {error}", str(self.path(name))) from None


# ------------------------------------------------------------------ names


def _new_folder(out: str | None, name: str | None, data: Any, root: Path) -> Path:
    """Make and return the folder: `out`, runs/<name>, or runs/<data>-<month><day>-<letter><number>."""
    if out or name:
        folder = Path(out) if out else root / str(name)
        if folder.exists() and any(folder.iterdir()):
            holds = "is a run" if (folder / "run.json").exists() else "are files"
            raise ConfigError(
                f"there {holds} here already, and nothing is ever overwritten", str(folder),
                f"go on with the run (--resume {folder}), or choose another --out or --name",
            )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    first = data if isinstance(data, str) else (data or ("run",))[0]
    stem = re.sub(r"[^a-z0-9]+", "-", Path(str(first)).stem.lower()).strip("-")[:32] or "run"
    day = f"{datetime.now():%m%d}"
    for letter in "abcdefghijklmnopqrstuvwxyz":
        for number in range(1, 10):
            folder = root / f"{stem}-{day}-{letter}{number}"
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder
    raise ConfigError(f"all names {stem}-{day}-a1 to z9 are taken", str(root), "give the run a --name")


def _find(wanted: str, root: Path) -> Path:
    if wanted == "last":
        made = [folder.parent for folder in root.glob("*/run.json")]
        if not made:
            raise ConfigError("there is no run to go on with", str(root.resolve()))
        return max(made, key=lambda folder: json.loads((folder / "run.json").read_text()).get("started", 0))
    for folder in (Path(wanted), root / wanted):
        if (folder / "run.json").exists():
            return folder
    raise ConfigError(f"no run at {wanted!r}", str(Path(wanted).resolve()), f"`veneer runs` lists those in {root}/")


# ------------------------------------------------------------------ processes and versions


def _process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "process_start": _start_of(os.getpid())}


def _start_of(pid: int) -> str | None:
    """When a process began, in the kernel's ticks: tells it from a later one with the same number. None off Linux."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_alive(info: Mapping[str, Any]) -> bool:
    if info.get("host") != socket.gethostname():
        return time.time() - info.get("heartbeat", 0) < SILENT_SECONDS
    try:
        os.kill(info["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return info.get("process_start") in (None, _start_of(info["pid"]))


def _versions() -> dict[str, str]:
    from veneer import __version__

    found = {"veneer": __version__, "python": platform.python_version()}
    found["system"] = f"{platform.system()} {platform.release()}"
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _git() -> str | None:
    """The commit that the working directory is at, with a + when files differ from it."""
    with suppress(OSError, subprocess.SubprocessError):
        ask = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        done = subprocess.run(ask, capture_output=True, text=True, timeout=2)
        return done.stdout.strip() or None
    return None


# ------------------------------------------------------------------ lines


def _config_line(line: str, where: str) -> tuple[str, Any, Origin]:
    name, _, rest = line.partition(": ")
    try:
        value, end = json.JSONDecoder().raw_decode(rest)
        value = KEYS[name].read(value)
    except (ValueError, KeyError):
        fix = "undo the change; new settings belong to a new run"
        raise CheckpointError("this line is not as the run wrote it", where, fix) from None
    how, _, note = rest[end:].partition("#")[2].strip().partition(": ")
    return name, value, Origin(how or "default", note)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log. One that a dying process left half-written is passed over."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _plain(value: Any) -> Any:
    """JSON has no NaN; readers in other languages choke on Python's. Dataclasses and paths become what they hold."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return (
        _plain(dataclasses.asdict(value)) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    )
