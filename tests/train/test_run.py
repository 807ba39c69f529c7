"""The run directory: what is written can be read, by anybody, at any time, also after the worst."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from train_runs import Heard, figures

from veneer.errors import CheckpointError, ConfigError
from veneer.train.run import Run
from veneer.train.settings import KEYS, resolve

Runs = Callable[..., tuple[Run, Heard, nn.Module]]


def fresh(folder: Path, **settings: Any) -> Run:
    return Run.create(resolve(mapping=settings), out=str(folder))


# ---------------------------------------------------------------- names and folders


def test_a_run_never_overwrites(tmp_path: Path) -> None:
    fresh(tmp_path / "a")
    with pytest.raises(ConfigError, match="is a run here already, and nothing is ever overwritten") as caught:
        fresh(tmp_path / "a")
    assert "--resume" in str(caught.value)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="are files here already"):
        fresh(tmp_path / "b")


def test_names_come_from_the_data_and_the_day(tmp_path: Path) -> None:
    asked = resolve(mapping={"data": "My Rows (v2).jsonl"})
    names = [Run.create(asked, root=tmp_path).name for _ in range(2)]
    assert names[0].startswith("my-rows-v2-") and names[0].endswith("-a1") and names[1].endswith("-a2")
    assert Run.create(asked, name="mine", root=tmp_path).folder == tmp_path / "mine"


def test_runs_are_found_by_folder_by_name_and_as_the_last(tmp_path: Path) -> None:
    one = Run.create(resolve(), name="one", root=tmp_path)
    time.sleep(0.01)
    two = Run.create(resolve(), name="two", root=tmp_path)
    assert Run.open(one.folder).folder == Run.open("one", root=tmp_path).folder == one.folder
    assert Run.open("last", root=tmp_path).folder == two.folder
    for wanted, root in [("three", tmp_path), ("last", tmp_path / "nowhere")]:
        with pytest.raises(ConfigError, match="no run"):
            Run.open(wanted, root=root)


# ---------------------------------------------------------------- config.yaml


def test_config_is_read_as_it_was_written(tmp_path: Path) -> None:
    given = {
        "model": "a #b: c", "data": ["x.jsonl", "y.jsonl"], "targets": r"layers\.\d+\.(q|v)_proj", "layers": "0-3",
        "overrides": {"q_proj": {"rank": 4, "alpha": 8}}, "columns": {"prompt": "Frage"}, "val": 0.1, "lr": 1e-5,
        "system": "Say # and: \"quote\"\n\u00e4",
    }  # fmt: skip
    resolved = resolve(mapping=given, flags={"r": "8"}).settled("steps", 7, "3 epochs: 7 steps # so")
    read = Run.create(resolved, out=str(tmp_path / "a")).config()
    assert read.settings == resolved.settings and read.origins == resolved.origins


def test_config_is_a_settings_file(tmp_path: Path) -> None:
    """The very file can be given to `train` again, and means the same."""
    resolved = resolve(mapping={"lr": 1e-5, "targets": ["q_proj"], "steps": 5, "method": "lora", "layers": [1, 2]})
    run = Run.create(resolved, out=str(tmp_path / "a"))
    assert resolve(run.path("config.yaml")).settings == resolved.settings


def test_a_config_changed_by_hand_is_noticed(tmp_path: Path) -> None:
    run = fresh(tmp_path / "a")
    path = run.path("config.yaml")
    for line in ("lr: fast  # call", "rank: 3  # call"):
        path.write_text(line + "\n")
        with pytest.raises(CheckpointError, match="not as the run wrote it") as caught:
            run.config()
        assert "config.yaml:1" in str(caught.value)


# ---------------------------------------------------------------- status


def test_a_live_run_a_finished_one_and_a_dead_one(tmp_path: Path) -> None:
    run = fresh(tmp_path / "a")
    assert run.status == "preparing"
    run.update(status="training", result={"a": 1})
    run.update(result={"b": 2})
    assert Run.open(run.folder).status == "training" and run.result == {"a": 1, "b": 2}
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run.update(pid=gone.pid, process_start="1")
    assert run.status == "dead"
    run.update(status="done")
    assert run.status == "done"


def test_another_process_with_the_same_number_is_not_ours(tmp_path: Path) -> None:
    run = fresh(tmp_path / "a")
    run.update(process_start="1")
    assert run.status == "dead"


def test_a_run_on_another_machine_lives_by_its_heartbeat(tmp_path: Path) -> None:
    run = fresh(tmp_path / "a")
    run.update(host="elsewhere")
    assert run.status == "preparing"
    run._write_info({**run.info, "heartbeat": time.time() - 3600})
    assert run.status == "dead"


def test_a_run_that_is_still_going_is_not_taken_over(tmp_path: Path) -> None:
    run = fresh(tmp_path / "a")
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        run.update(pid=other.pid, process_start=None)
        with pytest.raises(ConfigError, match=f"still going, in process {other.pid}"):
            run.take_over()
    finally:
        other.communicate(b"\n")
    run.take_over()
    assert run.info["pid"] == os.getpid() and run.info["sessions"] == 2


# ---------------------------------------------------------------- logs


def test_logs_grow_and_are_cut_back(tmp_path: Path) -> None:
    run = fresh(tmp_path / "a")
    run.log_metrics({"step": 1, "loss": math.nan})
    at = run.metrics_position()
    run.log_metrics({"step": 2, "dw": {"x": 1.0}})
    with run.path("metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "lo')  # a process that died while it wrote
    assert [row["step"] for row in run.metrics()] == [1, 2] and run.metrics("dw")[0]["step"] == 2
    assert run.metrics()[0]["loss"] is None and "NaN" not in run.path("metrics.jsonl").read_text()
    run.cut_metrics(at)
    run.log_metrics({"step": 2})
    assert [row["step"] for row in run.metrics()] == [1, 2]
    run.close()


def test_what_is_missing_or_broken_is_said(tmp_path: Path) -> None:
    run = fresh(tmp_path / "a")
    assert run.proof is None and run.metrics() == [] and run.events() == []
    with pytest.raises(CheckpointError, match=r"data\.json is missing"):
        _ = run.data
    run.path("data.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        _ = run.data


# ---------------------------------------------------------------- after a training


@pytest.fixture
def done(run_tiny: Runs) -> Run:
    return run_tiny()[0]


def test_the_folder_holds_what_it_should(done: Run) -> None:
    names = {path.relative_to(done.folder).as_posix() for path in done.folder.rglob("*") if path.is_file()}
    checkpoint = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "task.json",
        "state.pt",
    }
    assert names >= {f"checkpoints/{which}/{name}" for which in ("best", "last") for name in checkpoint}
    assert names >= {
        "run.json", "config.yaml", "metrics.jsonl", "events.jsonl", "data.json", "proof.json", "README.md", "run.log",
        "samples/samples.json",
    }  # fmt: skip
    assert not [name for name in names if "/." in name or name.startswith(".")]  # no leftovers


def test_every_step_is_measured(done: Run) -> None:
    rows = done.metrics("loss")
    assert [row["step"] for row in rows] == list(range(1, 9))
    wanted = {
        "loss",
        "lr",
        "gnorm",
        "tokens",
        "trained_tokens",
        "tokens_per_second",
        "trained_tokens_per_second",
        "memory_bytes",
    }
    assert all(wanted <= set(row) and row["gnorm"] > 0 for row in rows)
    assert rows[-1]["tokens"] > rows[-1]["trained_tokens"] > rows[0]["trained_tokens"] > 0
    movement = done.metrics("dw")
    assert movement[-1]["step"] == 8 and len(movement[-1]["dw"]) == 14 and min(movement[-1]["dw"].values()) > 0
    assert movement[-1]["dw"] == movement[-1]["dw_change"]  # a fresh adapter starts from nothing
    assert [row["step"] for row in done.metrics("val_loss")] == [0, 4, 8]


def test_run_json_says_who_what_and_where(done: Run) -> None:
    info = done.info
    assert info["status"] == "done" and info["ended"] >= info["started"] and info["total_steps"] == 8
    assert {"torch", "transformers", "python", "veneer"} <= set(info["versions"]) and info["device"].startswith("cpu")
    assert info["result"]["val_after"] < info["result"]["val_before"] and info["base"] == "LlamaForCausalLM"


def test_data_json_tells_what_was_held_out(done: Run) -> None:
    data = done.data
    assert len(data["split"]["validation_ids"]) == 2 and len(data["split"]["train_ids"]) == 10
    assert data["train"]["trained_tokens"] > 0 and data["train"]["lengths"]["histogram"]


def test_a_copied_run_is_a_whole_run(done: Run, tmp_path: Path) -> None:
    assert os.readlink(done.adapter) == "checkpoints/best"
    for symlinks in (True, False):
        copy = Run.open(shutil.copytree(done.folder, tmp_path / f"copy{symlinks}", symlinks=symlinks))
        assert (copy.adapter / "adapter_model.safetensors").exists() and figures(copy) == figures(done)
        copy.link_adapter()
        assert copy.adapter.resolve() == copy.best.resolve()


def test_where_links_are_not_allowed_the_adapter_is_a_copy(done: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    done.adapter.unlink()
    done.link_adapter()
    assert not done.adapter.is_symlink() and (done.adapter / "adapter_model.safetensors").exists()
    assert not (done.adapter / "state.pt").exists()


def test_the_card_says_what_it_is(done: Run) -> None:
    for place in (done.folder, done.best):
        text = (place / "README.md").read_text()
        assert (
            "LlamaForCausalLM" in text and "r 2, alpha 4" in text and "7/7 proofs hold" in text and "lr: 0.005" in text
        )


def test_settings_in_a_config_of_a_run_are_those_that_were_used(done: Run) -> None:
    settings, origins, _ = done.config()
    assert all(getattr(settings, name) is not None for name in ("lr", "steps", "alpha", "save_every", "precision"))
    assert settings.precision == "fp32" and origins["precision"].how == "rule"
    assert {name for name, origin in origins.items() if origin.how == "call"} == {
        "r", "lr", "batch_size", "val", "steps", "eval_every", "save_every", "out"
    }  # fmt: skip
    assert set(origins) == set(KEYS)


def test_samples_are_written_before_and_after(done: Run) -> None:
    samples = json.loads(done.path("samples", "samples.json").read_text())
    assert len(samples) == 2 and all(set(each) == {"prompt", "expected", "before", "after"} for each in samples)
    assert samples[0]["prompt"].startswith("say ")
