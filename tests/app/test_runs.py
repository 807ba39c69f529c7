"""veneer runs tells what the folders hold: living, done and dead runs, and never touches a living one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.train.run import Run
from veneer.train.settings import resolve


def make(name: str, *, status: str = "done", steps: int = 12, **settings: Any) -> Run:
    run = Run.create(resolve(mapping={"model": "m/tiny", "data": "d.jsonl", **settings}), name=name)
    for step in range(1, steps + 1):
        run.log_metrics({"step": step, "loss": 3.0 - step / 10})
    for step in (steps // 2, steps):
        run.log_metrics({"step": step, "val_loss": 2.5 - step / 20})
    run.close()
    run.update(status=status)
    return run


def died(run: Run) -> None:
    """As a killed process leaves it: it says that it trains, and its pid is nobody's."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run.update(status="training", pid=gone.pid)


def test_no_runs_is_no_error(veneer: Callable[..., Any]) -> None:
    assert "no runs in runs/" in veneer("runs").out
    assert veneer("runs", "--json").json["runs"] == []


def test_the_list_shows_what_became_of_each(veneer: Callable[..., Any], own_folder: Path) -> None:
    make("good")
    died(make("killed"))
    make("going", status="training")  # this very process stands behind it
    (own_folder / "runs" / "bad").mkdir()
    (own_folder / "runs" / "bad" / "run.json").write_text("{")
    found = {row["name"]: row for row in veneer("runs", "--json").json["runs"]}
    assert {name: row["status"] for name, row in found.items()} == {
        "good": "done", "killed": "dead", "going": "training", "bad": "broken",
    }  # fmt: skip
    assert found["good"]["step"] == 12 and found["good"]["best_val_loss"] == pytest.approx(1.9)
    text = veneer("runs").out
    assert "\u2588" in text and "2.200 \u2192 1.900" in text and "\x1b" not in text
    assert "bad: run.json is not valid JSON" in text


def test_compare_shows_where_runs_differ_and_only_there(veneer: Callable[..., Any]) -> None:
    make("a", r=8)
    make("b", r=32, lr=1e-3)
    said = veneer("runs", "compare", "a", "runs/b", "--json").json
    assert said["settings"]["r"] == [8, 32] and said["settings"]["alpha"] == [16, 64] and "seed" not in said["settings"]
    text = veneer("runs", "compare", "a", "b").out
    assert "best val" in text and "settings that differ" in text and "alpha" in text
    assert veneer("runs", "compare", "a").code == 2
    assert "no run at 'c'" in veneer("runs", "compare", "a", "c").err


def test_rm_asks_refuses_the_living_and_removes_the_rest(veneer: Callable[..., Any], own_folder: Path) -> None:
    make("old")
    make("going", status="training")
    assert "nobody is there to be asked" in veneer("runs", "rm", "old").err
    assert (own_folder / "runs" / "old").exists()
    assert "still going: going" in veneer("runs", "rm", "old", "going", "--yes").err
    assert (own_folder / "runs" / "old").exists()
    assert veneer("runs", "rm", "old", "--yes", "--json").json["removed"] == ["runs/old"]
    assert not (own_folder / "runs" / "old").exists()


def test_the_list_loads_no_torch(own_folder: Path) -> None:
    make("a")
    code = "import sys; from veneer.app.cli import main; main(['runs']); print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=own_folder)
    assert done.stderr.strip() == "False" and "done" in done.stdout


def test_a_half_written_line_is_passed_over(veneer: Callable[..., Any]) -> None:
    run = make("a")
    with run.path("metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 13, "loss": 1.0})[:-4])
    assert veneer("runs", "--json").json["runs"][0]["step"] == 12
