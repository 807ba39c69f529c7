"""A run that was cut off anywhere and resumed ends as the one that was not: the same bytes, the same figures."""

from __future__ import annotations

import builtins
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from train_runs import ROWS, TINY, Heard, adapter_bytes, figures

from veneer.ckpt import atomic
from veneer.errors import CheckpointError, ConfigError, StateError, VeneerError
from veneer.tasks.causal_lm import CausalLM
from veneer.train import resume
from veneer.train.loop import Loop, train
from veneer.train.resume import random_state, restore_random, same_random
from veneer.train.run import Run
from veneer.train.stop import Stop

Runs = Callable[..., tuple[Run, Heard, nn.Module]]
HARD = {
    "dropout": 0.2,
    "eval_every": 3,
    "save_every": 2,
    "steps": 9,
    "batch_size": 2,
    "global_batch": 5,
    "lora_plus_ratio": 4,
}


def equal(one: Run, two: Run) -> None:
    assert figures(one) == figures(two)
    assert adapter_bytes(one) == adapter_bytes(two)
    assert one.status == two.status == "done" and one.result["val_after"] == two.result["val_after"]


# ---------------------------------------------------------------- stopping


@pytest.mark.parametrize("at", [1, 2, 3, 4, 8])
def test_half_and_half_is_the_whole(run_tiny: Runs, at: int) -> None:
    """Also at steps that are neither evaluated nor saved, with dropout, uneven batches and warm moments."""
    whole, *_ = run_tiny(**HARD)
    half, heard, _ = run_tiny(**HARD, heard=Heard({at: "stop"}))
    assert half.status == "stopped" and len(heard.losses) == at and heard.of("done")[0]["status"] == "stopped"
    rest, heard, _ = run_tiny(resume=str(half.folder))
    assert len(heard.losses) == 9 - at and heard.of("start")[0]["resumed"]
    equal(rest, whole)
    assert rest.info["sessions"] == 2 and rest.proof["passed"]


def test_three_sessions(run_tiny: Runs) -> None:
    whole, *_ = run_tiny(**HARD)
    run, *_ = run_tiny(**HARD, heard=Heard({2: "stop"}))
    run_tiny(resume=str(run.folder), heard=Heard({7: "stop"}))
    equal(run_tiny(resume=str(run.folder))[0], whole)


TRAINED: list[dict[str, Any]] = [
    {"combine": "dora"},
    {"init": "pissa"},
    {"delta": "adalora", "r": 3, "lr": 2e-2},
    {"modules_to_save": ["lm_head"]},
    {"method": "full", "r": ..., "lr": 1e-3},
    {"method": "freeze", "r": ..., "lr": 1e-3},
]


@pytest.mark.parametrize("settings", TRAINED, ids=str)
def test_what_is_trained_does_not_matter(run_tiny: Runs, settings: dict[str, Any]) -> None:
    (whole, _, one), (half, *_) = run_tiny(**settings), run_tiny(**settings, heard=Heard({3: "stop"}))
    rest, _, two = run_tiny(resume=str(half.folder))
    assert figures(whole) == figures(rest)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_listener_asks_for_a_save_and_an_evaluation(run_tiny: Runs) -> None:
    _, heard, _ = run_tiny(eval_every=0, save_every=100, heard=Heard({3: "save", 5: "eval"}))
    assert [e["step"] for e in heard.of("save")] == [0, 3, 5, 8] and [e["step"] for e in heard.of("eval")] == [0, 5, 8]


def test_stopped_in_the_middle_of_an_evaluation(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation is not half counted: the resumed run does it first."""
    whole, *_ = run_tiny(**HARD)
    evaluate = CausalLM.evaluate

    def cut_short(self: CausalLM, model: nn.Module, batches: Any, stop: Any) -> Any:
        if model_steps[-1:] == [3]:
            stop.request("test")
        return evaluate(self, model, batches, stop)

    model_steps: list[int] = []
    monkeypatch.setattr(CausalLM, "evaluate", cut_short)
    monkeypatch.setattr(Loop, "log_movement", lambda self: model_steps.append(self.progress.step))
    half, heard, _ = run_tiny(**HARD)
    monkeypatch.undo()
    assert half.status == "stopped" and [e["step"] for e in heard.of("eval")] == [0] and len(heard.losses) == 3
    rest, heard, _ = run_tiny(resume=str(half.folder))
    assert heard.of("eval")[0]["step"] == 3
    assert adapter_bytes(rest) == adapter_bytes(whole)


# ---------------------------------------------------------------- killing


@contextmanager
def child(work: Callable[[], Any]) -> Iterator[int]:
    """`work` in a process of its own; the process id. Nothing of it reaches this one."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except KeyboardInterrupt:
            os._exit(77)
        except BaseException as error:
            os.write(2, f"child: {error!r}\n".encode())
            os._exit(78)
        os._exit(0)
    yield pid


def killed_at(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die by SIGKILL at the `moment`-th thing that touches the disk or ends a step."""
    count = iter(range(10**9))

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if next(count) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return called

    for owner, name in MORTAL:
        monkeypatch.setattr(owner, name, mortal(getattr(owner, name)))


MORTAL = [
    *((atomic, name) for name in ("_take_name", "_fsync", "_remove")),
    *((os, name) for name in ("replace", "rename", "symlink")),
    (torch, "save"),
    (Run, "_append"),
    (Loop, "step"),
    (Loop, "evaluate"),
]
MOMENTS = int(os.environ.get("VENEER_KILLS", 8))


def moments_of(work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many such moments a whole run has."""
    count = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            return function(*args, **kwargs)

        return called

    with monkeypatch.context() as patch:
        for owner, name in MORTAL:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        work()
    return count[0]


def test_killed_at_any_moment(
    run_tiny: Runs,
    make_model: Callable[..., nn.Module],
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole: list[Run] = []
    total = moments_of(lambda: whole.append(run_tiny(**HARD)[0]), monkeypatch)
    assert total > 200
    settings = {"r": 2, "lr": 5e-3, "val": 2, **HARD}
    for moment in sorted(random.Random(7).sample(range(total), MOMENTS)):
        folder = tmp_path / f"killed{moment}"

        def work(folder: Path = folder, moment: int = moment) -> None:
            killed_at(moment, monkeypatch)
            train(make_model("llama"), ROWS, tokenizer=tiny_tokenizer, out=str(folder), **settings)

        with child(work) as pid:
            _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, moment
        if not (folder / "run.json").exists():
            continue  # killed before there was a run: nothing to go on with, and nothing in the way of a new one
        killed = Run(folder)
        assert killed.status in ("dead", "done"), moment  # done: it died saying so
        equal(killed if killed.status == "done" else run_tiny(resume=str(folder))[0], whole[0])
        assert not list((folder / "checkpoints").glob(".*")), moment


@pytest.mark.slow
def test_killed_from_outside(run_tiny: Runs, tiny_folder: Path, tmp_path: Path) -> None:
    """A process of its own, as people start it, killed twice when nobody expects it."""
    script = "import json, sys; from veneer.train.loop import train; train(**json.loads(sys.argv[1]))"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {"model": str(tiny_folder), "data": str(rows), **TINY, "steps": 60, "eval_every": 7, "dropout": 0.1}

    def started(**said: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", script, json.dumps(said)])

    whole = started(**settings, out=str(tmp_path / "whole"))
    assert whole.wait(120) == 0
    folder = tmp_path / "cut"
    cut = started(**settings, out=str(folder))
    for seconds in (0.7, 0.4):
        while not (folder / "metrics.jsonl").exists() or Run(folder).info["pid"] != cut.pid:
            time.sleep(0.02)
        time.sleep(seconds)
        cut.kill()
        cut.wait()
        cut = started(resume=str(folder))
    assert cut.wait(120) == 0
    equal(Run(folder), Run(tmp_path / "whole"))


# ---------------------------------------------------------------- Ctrl-C


def slow_steps(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Loop.step
    monkeypatch.setattr(Loop, "step", lambda self: (time.sleep(seconds), step(self))[1])


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_run_goes_on_later(
    run_tiny: Runs,
    make_model: Callable[..., nn.Module],
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    whole, *_ = run_tiny(**HARD)
    folder = tmp_path / "stopped"

    def work() -> None:
        slow_steps(0.05, monkeypatch)
        train(
            make_model("llama"),
            ROWS,
            tokenizer=tiny_tokenizer,
            out=str(folder),
            **{"r": 2, "lr": 5e-3, "val": 2, **HARD},
        )

    with child(work) as pid:
        wait_for(lambda: (folder / "metrics.jsonl").exists() and len(Run(folder).metrics("loss")) >= 2)
        os.kill(pid, number)
        _, status = os.waitpid(pid, 0)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    run = Run.open(folder)
    assert run.status == "stopped" and any("finishing the step" in e["text"] for e in run.events("stopping"))
    done = len(run.metrics("loss"))
    assert 2 <= done < 9 and resume.read(run.last)["progress"]["step"] == done  # nothing was lost
    equal(run_tiny(resume=str(folder))[0], whole)


def test_ctrl_c_twice_stops_at_once_and_keeps_the_last_checkpoint(
    run_tiny: Runs,
    make_model: Callable[..., nn.Module],
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, *_ = run_tiny(**HARD)
    folder = tmp_path / "stopped"

    def work() -> None:
        slow_steps(30, monkeypatch)
        train(
            make_model("llama"),
            ROWS,
            tokenizer=tiny_tokenizer,
            out=str(folder),
            **{"r": 2, "lr": 5e-3, "val": 2, **HARD},
        )

    with child(work) as pid:
        wait_for(lambda: (folder / "checkpoints" / "last" / "state.pt").exists() and Run(folder).status == "training")
        time.sleep(0.3)
        for _ in range(2):
            os.kill(pid, signal.SIGINT)
            time.sleep(0.3)
        _, status = os.waitpid(pid, 0)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 77  # KeyboardInterrupt
    assert Run(folder).status == "stopped" and resume.read(folder / "checkpoints" / "last")["progress"]["step"] == 0
    equal(run_tiny(resume=str(folder))[0], whole)


def test_signal_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Stop() as stop:
        assert signal.getsignal(signal.SIGINT) != before and not stop.requested
    assert signal.getsignal(signal.SIGINT) == before


def test_a_training_may_run_in_another_thread(run_tiny: Runs) -> None:
    found: list[Run] = []
    thread = threading.Thread(target=lambda: found.append(run_tiny()[0]))
    thread.start()
    thread.join()
    assert found[0].status == "done"


# ---------------------------------------------------------------- what cannot go on is said


@pytest.fixture
def half(run_tiny: Runs) -> Run:
    return run_tiny(heard=Heard({3: "stop"}))[0]


def test_other_settings_belong_to_another_run(run_tiny: Runs, half: Run) -> None:
    with pytest.raises(ConfigError, match="keeps its settings") as caught:
        run_tiny(resume=str(half.folder), r=8, lr=1.0, save_every=1)
    assert caught.value.problems == ["r: 2 in the run, 8 now", "lr: 0.005 in the run, 1.0 now"]
    for changed in ({"out": "elsewhere"}, {"name": "other"}):
        with pytest.raises(ConfigError, match=r"own folder|keeps its name"):
            run_tiny(resume=str(half.folder), **changed)
    run, *_ = run_tiny(resume=str(half.folder), r=2, save_every=1)  # said again, or only about keeping: fine
    assert run.status == "done"


def test_other_data(run_tiny: Runs, half: Run) -> None:
    with pytest.raises(StateError, match="the data does not go on as it was"):
        run_tiny(ROWS[:-1], resume=str(half.folder))


def test_another_model(run_tiny: Runs, make_model: Callable[..., nn.Module], half: Run) -> None:
    with pytest.raises(VeneerError) as caught:
        run_tiny(model=make_model("llama", num_hidden_layers=1), resume=str(half.folder))
    assert "layers.1" in str(caught.value) and "in the checkpoint, not in the model" in str(caught.value)


def test_a_done_run(run_tiny: Runs) -> None:
    run, *_ = run_tiny()
    with pytest.raises(ConfigError, match="this run is done"):
        run_tiny(resume=str(run.folder))


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_a_damaged_state(run_tiny: Runs, half: Run, damage: bytes | None) -> None:
    path = half.last / "state.pt"
    path.write_bytes(path.read_bytes()[:1000] if damage is None else damage)
    with pytest.raises(CheckpointError, match="cannot be read"):
        run_tiny(resume=str(half.folder))


def test_a_state_that_would_run_code_is_refused(half: Run) -> None:
    torch.save({"version": 1, "evil": builtins.print}, half.last / "state.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        resume.read(half.last)


def test_a_full_disk_leaves_the_last_checkpoint(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, *_ = run_tiny(**HARD)
    save, files = resume._File.write, iter(range(100))

    def full(file: Any, data: Any) -> int:
        if file.tell() == 0 and next(files) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(file, data)

    monkeypatch.setattr(resume._File, "write", full)
    heard = Heard()
    with pytest.raises(CheckpointError, match="The disk is full"):
        run_tiny(**HARD, heard=heard)
    run = Run.open(heard.of("start")[0]["run"])
    assert run.status == "failed" and "disk is full" in run.info["error"]
    monkeypatch.undo()
    equal(run_tiny(resume=str(run.folder))[0], whole)


# ---------------------------------------------------------------- random states


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_random_states_go_round() -> None:
    state = random_state()
    first = draws()
    restore_random(state)
    assert draws() == first


def test_a_seeded_stretch_leaves_no_trace() -> None:
    state = random_state()
    expected = draws()
    restore_random(state)
    with same_random(3):
        one = draws()
    with same_random(3):
        assert draws() == one
    assert draws() == expected


def test_a_copy_of_a_run_goes_on_too(run_tiny: Runs, half: Run, tmp_path: Path) -> None:
    copy = shutil.copytree(half.folder, tmp_path / "copy", symlinks=True)
    one, two = run_tiny(resume=str(half.folder))[0], run_tiny(resume=str(copy))[0]
    equal(one, two)
