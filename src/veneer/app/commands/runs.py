"""veneer runs: what was trained here, told from the run folders alone. A dead process is shown as a dead run."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.app.output import Output, plain
from veneer.app.tables import table
from veneer.app.text import bytes_, duration, number, plural, spark
from veneer.errors import CheckpointError, ConfigError, StateError
from veneer.train.run import ACTIVE, Run
from veneer.train.settings import KEYS

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = """  veneer runs
  veneer runs compare support-0917-a1 support-0917-a2
  veneer runs rm support-0917-a1"""

STYLES = {"done": "green", "dead": "red", "failed": "red", "broken": "red", "stopped": "yellow"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", default="list", choices=["list", "compare", "rm"], help="[list]")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names or folders")
    parser.add_argument("--root", default="runs", help="the folder that holds the runs [runs]")
    parser.add_argument("--yes", "-y", action="store_true", help="rm: do not ask")


def run(args: argparse.Namespace, out: Output) -> int:
    return {"list": list_runs, "compare": compare_runs, "rm": remove_runs}[args.action](args, out)


# ------------------------------------------------------------------ list


def list_runs(args: argparse.Namespace, out: Output) -> int:
    if args.runs:
        raise ConfigError(f"list takes no names, got {args.runs[0]!r}", "command line", "veneer runs compare RUN RUN")
    found = sorted((described(folder) for folder in folders(args.root)), key=lambda row: -row["started"])
    out.result({"runs": found}, lambda console: _print_list(console, found, args.root, out))
    return 0


def folders(root: str) -> list[Path]:
    return [file.parent for file in Path(root).glob("*/run.json")]


def described(folder: Path) -> dict[str, Any]:
    """One run as plain values. A run whose files cannot be read is listed as broken, never left out."""
    try:
        run = Run(folder)
        info, settings = run.info, run.config().settings
        losses, held_out = curve(run, "loss"), curve(run, "val_loss")
    except (CheckpointError, OSError, ValueError, KeyError) as error:
        return {"name": folder.name, "folder": folder, "status": "broken", "error": str(error), "started": 0.0}
    return {
        "name": run.name,
        "folder": folder,
        "status": run.status,
        "error": info.get("error"),
        "started": info["started"],
        "seconds": (info.get("ended") or info["heartbeat"]) - info["started"],
        "model": settings.model,
        "data": settings.data,
        "step": len(losses),
        "loss": losses,
        "val_loss": held_out,
        "best_val_loss": min((v for v in held_out if v is not None), default=None),
        "proved": (run.proof or {}).get("passed"),
        "result": run.result,
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()),
    }


def curve(run: Run, kind: str) -> list[float | None]:
    return [row.get(kind) for row in run.metrics(kind)]


def _print_list(console: Console, found: Sequence[dict[str, Any]], root: str, out: Output) -> None:
    if not found:
        console.print(f"no runs in {root}/; `veneer train MODEL DATA` makes one", markup=False)
        return
    columns = ["run", "status", "model", ">steps", "loss", ">", "val", ">time", ">ago", ">size"]
    console.print(table(columns, (_row(row, out) for row in found)))
    for row in found:
        if row["status"] in ("failed", "broken", "dead") and row.get("error"):
            console.print(f"{row['name']}: {' '.join(str(row['error']).split())}", markup=False, style="dim")


def _row(row: dict[str, Any], out: Output) -> list[object]:
    from rich.text import Text

    status = Text(row["status"], style=STYLES.get(row["status"], "cyan"))
    if row["status"] == "broken":
        return [row["name"], status, "", "", "", "", "", "", "", ""]
    losses, held_out = row["loss"], [v for v in row["val_loss"] if v is not None]
    ago = time.time() - row["started"]
    return [
        row["name"],
        status,
        Path(str(row["model"])).name,
        row["step"],
        spark(losses, 10, out.signs),
        number(losses[-1]) if losses else "-",
        f"{number(held_out[0])} {out.signs.arrow} {number(min(held_out))}" if held_out else "-",
        duration(row["seconds"]),
        f"{ago / 86400:.0f} d" if ago > 86400 else duration(ago),
        bytes_(row["bytes"]),
    ]


# ------------------------------------------------------------------ compare


def compare_runs(args: argparse.Namespace, out: Output) -> int:
    if len(args.runs) < 2:
        raise ConfigError("compare takes two runs or more", "command line", "veneer runs compare RUN RUN")
    opened = [Run.open(name, root=args.root) for name in args.runs]
    rows, settings = [described(run.folder) for run in opened], dict(differences(opened))
    out.result({"runs": rows, "settings": settings}, lambda console: _print_comparison(console, rows, settings, out))
    return 0


def differences(runs: Sequence[Run]) -> Iterator[tuple[str, list[Any]]]:
    """The settings in which the runs differ, names and folders left aside."""
    configs = [run.config().settings for run in runs]
    for name in KEYS:
        values = [getattr(config, name) for config in configs]
        if name not in ("name", "out", "resume", "yes") and any(value != values[0] for value in values):
            yield name, values


def _print_comparison(console: Console, rows: Sequence[dict[str, Any]], settings: dict[str, Any], out: Output) -> None:
    def line(label: str, key: Any) -> list[object]:
        return [label, *(key(row) if row["status"] != "broken" else "-" for row in rows)]

    losses = {row["name"]: row.get("loss", []) for row in rows}
    shown = [
        line("status", lambda row: row["status"]),
        line("steps", lambda row: row["step"]),
        line("time", lambda row: duration(row["seconds"])),
        line("loss", lambda row: spark(losses[row["name"]], 20, out.signs)),
        line("last loss", lambda row: number(losses[row["name"]][-1]) if losses[row["name"]] else "-"),
        line("val", lambda row: spark([v for v in row["val_loss"] if v is not None], 20, out.signs)),
        line("best val", lambda row: number(row["best_val_loss"])),
        line("proved", lambda row: {True: "yes", False: "no", None: "-"}[row["proved"]]),
    ]
    console.print(table(["", *(f"+{row['name']}" for row in rows)], shown))
    if settings:
        made = ([name, *(str(plain(value)) for value in values)] for name, values in settings.items())
        console.print(table(["\nsettings that differ", *(f"+{row['name']}" for row in rows)], made))
    else:
        console.print("\nthe settings are the same", markup=False)


# ------------------------------------------------------------------ rm


def remove_runs(args: argparse.Namespace, out: Output) -> int:
    if not args.runs:
        raise ConfigError("rm takes the names of runs", "command line", "`veneer runs` lists them")
    opened = [Run.open(name, root=args.root) for name in args.runs]
    going = [run.name for run in opened if run.status in ACTIVE]
    if going:
        raise StateError(f"still going: {', '.join(going)}", args.root, "stop them first (Ctrl-C, or kill PID)")
    size = sum(described(run.folder).get("bytes", 0) for run in opened)
    if not args.yes and not _agreed(f"remove {plural(len(opened), 'run')}, {bytes_(size)}?", out):
        return 0
    for run in opened:
        shutil.rmtree(run.folder)
    value = {"removed": [str(run.folder) for run in opened], "bytes": size}
    out.result(value, lambda console: console.print(f"removed {plural(len(opened), 'run')}, {bytes_(size)}"))
    return 0


def _agreed(question: str, out: Output) -> bool:
    import sys

    if out.json or not sys.stdin.isatty():
        raise ConfigError("nobody is there to be asked", "command line", "add --yes")
    out.errors.print(f"{question} [y/N] ", end="", markup=False)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
