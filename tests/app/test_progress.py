"""What the displays show, from the events alone."""

from __future__ import annotations

import io
import json
import time
import warnings
from typing import Any

import pytest

from veneer.app.output import Output
from veneer.app.progress import Lines, Plain, Progress, Terminal, display, lines_of
from veneer.app.text import ASCII, UNICODE, spark

START = [
    {"event": "start", "run": "runs/a", "resumed": False},
    {"event": "note", "text": "'lora_r' is called 'r' here"},
    {"event": "data", "text": "d.jsonl: 60 rows of messages", "rows": 60},
    {"event": "data", "text": "57 rows to train, 3 to validate", "rows": 57, "val_rows": 3},
    {"event": "tokenising", "what": "train", "done": 57, "total": 57},
    {"event": "data", "text": "train: 57 samples", "lengths": {}, "trained_share": 0.4},
    {"event": "model", "text": "Llama: 16,384 trained"},
    {"event": "plan", "text": "3 steps", "steps": 3},
    {"event": "probe", "memory_bytes": 2.1e9, "total_memory_bytes": 24e9, "micro_batch": 4, "longest_tokens": 124},
]


def step(number: int, loss: float, steps: int = 3) -> dict[str, Any]:
    return {
        "event": "step", "step": number, "steps": steps, "loss": loss, "lr": 1e-3, "gnorm": 0.5, "seconds": 2.0,
        "tokens": 200 * number, "trained_tokens": 80 * number, "memory_bytes": 2.2e9,
    }  # fmt: skip


TRAINING = [
    {"event": "eval", "step": 0, "val_loss": 3.64, "best": False},
    step(1, 3.5),
    step(2, 3.0),
    {"event": "warning", "text": "the held-out loss has risen"},
    step(3, 2.5),
    {"event": "eval", "step": 3, "val_loss": 2.31, "best": True},
    {"event": "samples", "samples": []},
]
END = [
    {"event": "proof", "passed": True, "text": "reloaded \u00b7 7/7 proofs hold"},
    {"event": "done", "status": "done", "folder": "runs/a"},
]
EVENTS = START + TRAINING + END


def shown(kind: type, **options: Any) -> str:
    out = Output("train", stdout=io.StringIO(), stderr=io.StringIO())
    with kind(out, **options) as show:
        for event in EVENTS:
            show(event)
    return out.stdout.getvalue()  # type: ignore[attr-defined]


def test_a_log_has_every_fact_once_and_no_control_codes() -> None:
    text = shown(Plain)
    assert "\x1b" not in text and "\r" not in text
    lines = text.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("ok")] == [
        "data", "split", "tokens", "model", "plan", "memory", "proof",
    ]  # fmt: skip
    assert "- 'lora_r' is called 'r' here" in lines and "! the held-out loss has risen" in lines
    assert "ok memory   2.1 GB of 24.0 GB in use with the longest batch (4 rows, to 124 tokens)" in lines
    assert [line.partition("  ")[0] for line in lines if line.startswith("step")] == [
        "step 1/3 (33.3 %)",
        "step 3/3 (100 %)",
    ]
    assert "val 2.310 v best" in lines[-2] and "100 tok/s (40 trained)" in text


def test_a_log_says_a_line_every_few_seconds_only() -> None:
    def steps(every: float) -> int:
        out = Output("train", stdout=io.StringIO(), stderr=io.StringIO())
        with Plain(out, every=every) as show:
            for event in START + [step(number, 3.0, steps=400) for number in range(1, 300)]:
                show(event)
        return sum(line.startswith("step") for line in out.stdout.getvalue().splitlines())  # type: ignore[attr-defined]

    assert steps(every=0.0) == 299
    assert steps(every=3600.0) == 1


def test_a_wait_is_named_when_it_lasts() -> None:
    out = Output("train", stdout=io.StringIO(), stderr=io.StringIO())
    with Plain(out, patience=0.05) as show:
        show(START[0])
        time.sleep(0.3)
        show(START[2])
    assert out.stdout.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "reading the data ...",
        "ok data     d.jsonl: 60 rows of messages",
    ]


def test_lines_are_the_events_themselves() -> None:
    lines = [json.loads(line) for line in shown(Lines).splitlines()]
    assert [line["event"] for line in lines] == [event["event"] for event in EVENTS]


@pytest.mark.parametrize("json_", [False, True])
def test_what_a_library_warns_of_is_a_line_of_the_display(json_: bool) -> None:
    """And not its place in somebody's source in the midst of a moving bar."""
    out = Output("train", json=json_, stdout=io.StringIO(), stderr=io.StringIO())
    with out.guarded():
        warnings.simplefilter("always")
        with display(out):
            warnings.warn("no fp8\n  here", stacklevel=1)
        warnings.warn("and afterwards", stacklevel=1)
    said = out.stdout.getvalue()  # type: ignore[attr-defined]
    assert json.loads(said) == {"event": "warning", "text": "no fp8 here"} if json_ else said == "! no fp8 here\n"
    assert out.stderr.getvalue() == "! and afterwards\n"  # type: ignore[attr-defined]


def test_quiet_keeps_warnings() -> None:
    out = Output("train", stdout=io.StringIO(), stderr=io.StringIO(), quiet=True)
    with Plain(out) as show:
        for event in EVENTS:
            show(event)
    assert out.stdout.getvalue().splitlines() == ["! the held-out loss has risen"]  # type: ignore[attr-defined]


class Tty(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_and_marks_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "150")
    out = Output("train", stdout=Tty(), stderr=Tty())
    screens = []
    with display(out) as show:
        assert isinstance(show, Terminal)
        for event in EVENTS:
            show(event)
            with out.console.capture() as captured:
                out.console.print(show._moving())
            screens.append(captured.get())
    at = {event["step"]: screen for event, screen in zip(EVENTS, screens, strict=True) if event["event"] == "step"}
    assert "training" in at[2] and "67 %" in at[2] and "step 2/3" in at[2] and "2.0 s left" in at[2]
    assert "loss 3.000" in at[2] and "gnorm 0.500" in at[2] and "2.2 GB/24.0 GB" in at[2]
    assert "reading the data" in screens[0] and "trying the longest batch" in screens[7]
    text = out.stdout.getvalue()  # type: ignore[attr-defined]
    assert "\u2713 training 3 steps   loss 3.500 \u2192 2.500" in text.replace("\x1b[32m", "").replace("\x1b[0m", "")


def test_an_evaluation_on_the_way_is_part_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "150")
    out = Output("train", stdout=Tty(), stderr=Tty())
    looking = {"event": "doing", "text": "held-out loss of 48 rows"}
    with display(out) as show:
        for event in [*START, step(1, 3.0), looking]:
            show(event)
        with out.console.capture() as captured:
            out.console.print(show._moving())
        assert "step 1/3" in captured.get() and "held-out loss of 48 rows" in captured.get()
        show({"event": "eval", "step": 1, "val_loss": 2.0, "best": True})
        assert show.progress.doing == "training"
        for event in [step(2, 2.5), looking, step(3, 2.0), looking, *END]:
            show(event)
    assert out.stdout.getvalue().count("training 3 steps") == 1  # type: ignore[attr-defined]


def test_a_log_names_an_evaluation_once(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Output("train", stdout=io.StringIO(), stderr=io.StringIO())
    with Plain(out, patience=0.05) as show:
        for event in [*START, step(1, 3.0), {"event": "doing", "text": "held-out loss"}]:
            show(event)
        time.sleep(0.2)
        for event in [{"event": "eval", "step": 1, "val_loss": 2.0, "best": True}, {"event": "save", "step": 1}]:
            show(event)
            time.sleep(0.2)
    assert out.stdout.getvalue().count("held-out loss ...") == 1  # type: ignore[attr-defined]


def test_a_log_names_a_wait_once_whatever_is_noted_in_between() -> None:
    out = Output("train", stdout=io.StringIO(), stderr=io.StringIO())
    with Plain(out, patience=0.05) as show:
        for event in [START[7], *({"event": "note", "text": text} for text in ("fused: 2 blocks", "recompute none"))]:
            show(event)
            time.sleep(0.2)
        for event in [START[8], {"event": "doing", "text": "held-out loss"}, START[7]]:
            show(event)
            time.sleep(0.2)
    said = [line for line in out.stdout.getvalue().splitlines() if line.endswith(" ...")]  # type: ignore[attr-defined]
    assert said == [
        "trying the longest batch ...", "answering a few rows as the base does ...", "held-out loss ...",
        "trying the longest batch ...",
    ]  # fmt: skip


def test_a_key_is_an_answer_given_once() -> None:
    out = Output("train", stdout=Tty(), stderr=Tty())
    terminal = Terminal(out)
    terminal.keys._wish = "save"
    with terminal:
        assert terminal(step(1, 3.0)) == "save" and terminal(step(2, 3.0)) is None


@pytest.mark.parametrize("tty, as_json, kind", [(False, False, Plain), (True, True, Lines), (True, False, Terminal)])
def test_the_display_fits_who_is_looking(tty: bool, as_json: bool, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Output("train", json=as_json, stdout=Tty() if tty else io.StringIO(), stderr=io.StringIO())
    with display(out) as show:
        assert isinstance(show, kind)


def test_a_failed_proof_is_marked_as_such() -> None:
    [(style, line)] = lines_of({"event": "proof", "passed": False, "text": "P3 failed: off"}, ASCII)
    assert style == "fail" and line == "x proof    P3 failed: off"


def test_time_left_is_a_mean_and_nothing_divides_by_zero() -> None:
    progress = Progress()
    assert progress.line(UNICODE) == "step 0/0 (0 %)" and progress.details(UNICODE) == ""
    for number in range(1, 5):
        progress.take({**step(number, 1.0, steps=10), "seconds": 1.0 if number % 2 else 3.0})
    assert progress.left() == "12 s left"
    progress.take({"event": "eval", "val_loss": None})
    assert progress.held_out(UNICODE) == ""


def test_sparks() -> None:
    assert spark([], 5) == "" and spark([float("nan")]) == "" and spark([2, 2, 2], 3) == "\u2581" * 3
    assert len(spark(list(range(1000)), 10)) == 10 and spark([1, 2]) == "\u2581\u2588"
