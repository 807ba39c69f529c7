"""veneer chat from a script: answers of runs, adapters and bases, side by side, and nothing but JSON with --json."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from veneer.app.commands import chat as command
from veneer.ckpt.peft import save
from veneer.core.model import attach, parameters
from veneer.core.spec import LoRA
from veneer.train.run import Run
from veneer.train.settings import resolve


def make_run(base: Path, name: str, seed: int = 0, **settings: Any) -> Run:
    """A finished run without its training: an adapter that changes what the model says."""
    run = Run.create(resolve(mapping={"model": str(base), "data": "d.jsonl", **settings}), name=name)
    model = AutoModelForCausalLM.from_pretrained(base)
    attach(model, LoRA(rank=4, alpha=8))
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=dice) * 0.3)
    save(model, run.best)
    run.link_adapter()
    run.update(status="done")
    return run


@pytest.fixture
def run(tiny_folder: Path, own_folder: Path) -> Run:
    return make_run(tiny_folder, "sql")


def test_one_question_one_bare_answer(run: Run, veneer: Callable[..., Any]) -> None:
    said = veneer("chat", "sql", "--prompt", "hello", "--max-tokens", 6)
    assert said.code == 0 and said.out.strip() and "[" not in said.out.split()[0]
    assert "it changes the base's logits" in said.err


def test_side_by_side_as_json(run: Run, tiny_folder: Path, veneer: Callable[..., Any]) -> None:
    make_run(tiny_folder, "tone", seed=3)
    words = ("chat", "sql", "--vs", "base", "--vs", "tone", "-p", "hello", "-p", "again", "--max_tokens", 5, "--json")
    answers = veneer(*words).json["answers"]
    assert [(a["prompt"], a["speaker"]) for a in answers] == [
        (prompt, speaker) for prompt in ("hello", "again") for speaker in ("sql", "base", "tone")
    ]
    assert len({a["text"] for a in answers[:3]}) == 3 and all(a["tokens"] <= 5 for a in answers)
    alone = veneer("chat", tiny_folder, "-p", "hello", "--max-tokens", 5, "--json").json["answers"][0]
    assert alone["text"] == answers[1]["text"]  # the base beside an adapter is the base


def test_runs_with_other_templates_are_each_asked_in_their_own_way(
    run: Run, tiny_folder: Path, veneer: Callable[..., Any]
) -> None:
    make_run(tiny_folder, "brief", seed=3, system="Be brief.")
    both = veneer("chat", "sql", "--vs", "brief", "-p", "hello", "--max-tokens", 5, "--json").json["answers"]
    alone = [
        veneer("chat", name, "-p", "hello", "--max-tokens", 5, "--json").json["answers"][0] for name in ("sql", "brief")
    ]
    assert both == alone and both[0]["prompt_tokens"] < both[1]["prompt_tokens"]


def test_an_adapter_folder_and_last_are_runs_too(run: Run, veneer: Callable[..., Any]) -> None:
    texts = {
        veneer("chat", word, "-p", "hello", "--max-tokens", 5, "--json").json["answers"][0]["text"]
        for word in ("sql", "last", run.folder, run.adapter, "runs/sql/adapter")
    }
    assert len(texts) == 1


def test_questions_may_come_through_a_pipe(
    run: Run, veneer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert [a["prompt"] for a in veneer("chat", "sql", "--max-tokens", 3, "--json").json["answers"]] == ["one", "two"]


def test_the_runs_own_system_prompt_is_used(tiny_folder: Path, veneer: Callable[..., Any]) -> None:
    make_run(tiny_folder, "brief", system="Be brief.")
    tokens = veneer("chat", "brief", "-p", "hello", "--max-tokens", 3, "--json").json["answers"][0]["prompt_tokens"]
    more = veneer("chat", "brief", "-p", "hello", "--system", "Be very brief, please.", "--max-tokens", 3, "--json")
    assert more.json["answers"][0]["prompt_tokens"] > tokens > 12


@pytest.mark.parametrize(
    "words, says, code",
    [
        (["nowhere"], "there is no such model: nowhere", 2),
        (["sql", "--vs", "nothing"], "no such model: nothing", 2),
        (["sql", "--temperature", "-1"], "temperature must be 0 or more", 2),
        (["sql", "--top-p", "x"], "invalid float value", 2),
    ],
)
def test_what_cannot_be_asked(words: list[str], says: str, code: int, run: Run, veneer: Callable[..., Any]) -> None:
    said = veneer("chat", *words, "-p", "hello")
    assert says in said.err and said.code == code


def test_a_base_has_no_base(tiny_folder: Path, veneer: Callable[..., Any]) -> None:
    assert "it is its own base" in veneer("chat", tiny_folder, "--vs", "base", "-p", "x").err


def test_a_run_that_died_early_says_so(tiny_folder: Path, veneer: Callable[..., Any]) -> None:
    Run.create(resolve(mapping={"model": str(tiny_folder), "data": "d"}), name="early").update(status="failed")
    said = veneer("chat", "early", "-p", "x")
    assert said.code == 2 and "the run early (failed) has no checkpoint" in said.err and "--resume" in said.err


def test_a_dead_adapter_is_refused_with_exit_1(run: Run, veneer: Callable[..., Any], tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    attach(model, LoRA(rank=4))
    save(model, run.best)
    said = veneer("chat", "sql", "-p", "x")
    assert said.code == 1 and "changes nothing" in said.err


def test_a_conversation_at_a_terminal(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The talk itself, with the keyboard replaced."""
    from veneer.app.cli import main

    typed = iter(["hello", "/adapter 2 base", "/help", "", "/nonsense", "/quit"])
    monkeypatch.setattr(command, "_ask", lambda: next(typed))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(["chat", "sql", "--vs", "base", "--max-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "sql" in out and "answers now come from base" in out and "no command /nonsense" in out
