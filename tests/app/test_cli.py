"""The frame: help without torch, exit codes, misspelt words, three lines for an error, nothing but JSON with --json."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.app import cli
from veneer.app.output import Output, plain
from veneer.errors import DataError, Diverged, DoesNotFit, ProofFailed, UserError

HEAVY = ("torch", "transformers", "rich", "numpy")


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_is_quick_and_loads_nothing_heavy(words: list[str]) -> None:
    """CPU time of the whole process, interpreter included: what else the machine does is not counted."""
    code = (
        "import sys, time\n"
        "from veneer.app.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit as end: assert end.code == 0, end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], time.process_time(), file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        loaded, spent = done.stderr.strip().splitlines()[-1].rsplit(" ", 1)
        assert loaded == "[]", f"veneer {' '.join(words)} imported {loaded}"
        seconds.append(float(spent))
        if min(seconds) < 0.3:
            break
    assert min(seconds) < 0.3, f"veneer {' '.join(words)} took {min(seconds):.2f} s"
    assert "veneer" in done.stdout and len(done.stdout.splitlines()) > 5


def test_help_of_train_names_every_key_once(veneer: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    from veneer.train.settings import KEYS

    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--help"])
    assert end.value.code == 0
    words = capsys.readouterr().out.split()
    assert [flag for flag in (key.flag for key in KEYS.values()) if words.count(flag) < 1] == []


def test_version_and_no_words_at_all(veneer: Callable[..., Any]) -> None:
    assert veneer("--version").out.startswith("veneer ")
    assert veneer().code == 0 and "veneer demo" in veneer().out


@pytest.mark.parametrize(
    "words, says",
    [
        (["trian", "m", "d"], "no command 'trian'. Did you mean 'train'?"),
        (["finetune", "m", "d"], "no command 'finetune'. Here it is `veneer train`."),
        (["fuse", "a"], "Here it is `veneer merge`"),
        (["--lr", "1", "train"], "--lr stands before the command"),
        (["runs", "--rot", "x"], "unknown flag --rot. Did you mean '--root'?"),
        (["runs", "lst"], "'lst' is not one of list, compare, rm. Did you mean 'list'?"),
        (["runs", "list", "extra"], "list takes no names"),
        (["train", "m", "d", "--learnin-rate", "1"], "unknown flag --learnin-rate. Did you mean '--learning-rate'?"),
        (["train", "m", "d", "--lr", "fast"], "expected a number"),
        (["train", "m", "d", "--lr"], "--lr needs a value"),
        (["train", "m", "d", "--rnak", "8", "--dropot", "0"], "--dropot"),
        (["train", "m", "d", "e"], "one word too many: 'e'"),
        (["train", "m", "d", "--model", "n"], "the model is said twice"),
        (["train", "m", "d", "--set", "lr"], "--set lr lacks its value"),
        (["train", "none.yaml"], "cannot read the settings"),
        (["train", "--explain", "learnin_rate"], "no setting named 'learnin_rate'"),
    ],
)
def test_wrong_words_are_answered_with_what_was_meant_and_exit_2(
    words: list[str], says: str, veneer: Callable[..., Any]
) -> None:
    said = veneer(*words)
    assert said.code == 2 and said.out == ""
    assert says in said.err
    assert said.err.startswith("error: ") and "Traceback" not in said.err


def test_explain_tells_all_about_a_key_under_any_of_its_names(veneer: Callable[..., Any]) -> None:
    said = veneer("train", "--explain", "learning_rate")
    assert said.code == 0 and said.out.startswith("lr: Peak learning rate.") and "unet_lr" in said.out
    assert veneer("train", "--explain", "lr", "--json").json["key"] == "lr"


@pytest.mark.parametrize(
    "error, code",
    [
        (DataError("x"), 2), (UserError("x"), 2), (FileNotFoundError(2, "gone", "f"), 2), (DoesNotFit("x"), 3),
        (Diverged("x"), 1), (ProofFailed("x"), 1), (RuntimeError("x"), 1), (KeyboardInterrupt(), 130),
    ],
)  # fmt: skip
def test_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, veneer: Callable[..., Any]
) -> None:
    def fails(*_: object) -> int:
        raise error

    monkeypatch.setattr("veneer.app.commands.runs.run", fails)
    assert veneer("runs").code == code
    answer = veneer("--json", "runs")
    assert answer.code == code and answer.json["exit"] == code and answer.json["ok"] is False


def test_an_error_is_three_lines_and_a_programs_error_has_the_same_fields(
    monkeypatch: pytest.MonkeyPatch, veneer: Callable[..., Any]
) -> None:
    def fails(*_: object) -> int:
        raise DataError("2 rows cannot be used", "d.jsonl", "mend them", ["d.jsonl:1: a [b]", "d.jsonl:7: c"])

    monkeypatch.setattr("veneer.app.commands.runs.run", fails)
    assert veneer("runs").err.splitlines() == [
        "error: 2 rows cannot be used", "    - d.jsonl:1: a [b]", "    - d.jsonl:7: c",
        "  at: d.jsonl", "  do: mend them",
    ]  # fmt: skip
    fields = veneer("runs", "--json").json["error"]
    assert fields == {
        "kind": "DataError", "what": "2 rows cannot be used", "where": "d.jsonl", "fix": "mend them",
        "problems": ["d.jsonl:1: a [b]", "d.jsonl:7: c"],
    }  # fmt: skip


def test_a_bug_shows_three_lines_and_its_traceback_is_kept(
    monkeypatch: pytest.MonkeyPatch, veneer: Callable[..., Any], own_folder: Path
) -> None:
    monkeypatch.setattr("veneer.app.commands.runs.folders", lambda root: 1 / 0)
    said = veneer("runs")
    log = own_folder / "state" / "veneer" / "error.log"
    assert said.code == 1
    first, where, fix = said.err.splitlines()
    assert first == "error: ZeroDivisionError: division by zero"
    assert "commands/runs.py:" in where and str(log) in fix
    assert "Traceback" in log.read_text() and "ZeroDivisionError" in log.read_text()


def test_what_libraries_print_never_reaches_stdout(monkeypatch: pytest.MonkeyPatch, veneer: Callable[..., Any]) -> None:
    def chatty(args: object, out: Output) -> int:
        print("Downloading shards: 100 %")
        out.result({"x": float("nan"), "at": Path("a/b"), "y": (1, 2)}, lambda console: None)
        return 0

    monkeypatch.setattr("veneer.app.commands.runs.run", chatty)
    said = veneer("runs", "--json")
    assert said.json == {"ok": True, "command": "runs", "x": None, "at": "a/b", "y": [1, 2]}
    assert "Downloading" in said.err


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    """veneer train --help | head -1"""
    code = "import sys; from veneer.app.cli import main; sys.exit(main(['runs']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=20)
    assert "Traceback" not in errors


def test_sigterm_stops_as_ctrl_c_does() -> None:
    code = (
        "import sys, time, argparse\nfrom veneer.app import cli\nfrom veneer.app.commands import runs\n"
        "def slow(args, out):\n    print('ready', file=out.stderr, flush=True)\n    time.sleep(20)\n"
        "runs.run = slow\nsys.exit(cli.main(['runs']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    start = time.monotonic()
    process.terminate()
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130 and time.monotonic() - start < 5
    assert "stopped" in errors and "Traceback" not in errors


def test_a_stream_that_knows_ascii_only_gets_ascii(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from veneer.app.cli import main; sys.exit(main(['doctor']))"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.stdout.isascii() and "ok self-test" in done.stdout and "Error" not in done.stderr


def test_plain_values_are_json_whatever_they_were() -> None:
    import torch

    assert plain({"a": torch.tensor(2.5), 1: {3}, "inf": float("inf"), "none": None, "yes": True}) == {
        "a": 2.5, "1": [3], "inf": None, "none": None, "yes": True,
    }  # fmt: skip
