"""Losses, answers and choices of an evaluation against what they are by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from veneer.core.model import activate, disabled
from veneer.data.types import Chat, Completion, Text
from veneer.errors import ConfigError, DataError
from veneer.infer.evaluate import evaluate, likelihoods, question_of
from veneer.infer.load import Ready, load, source_of_folder
from veneer.infer.sampling import Sampling

ROWS = [Completion("say one", "one it is"), Completion("say two", "two"), Completion("and three", "three, then")]


@pytest.fixture
def one(make_adapter: Callable[..., Path]) -> Ready:
    return load([source_of_folder(str(make_adapter("a")))], say=lambda line: None)


def by_hand(ready: Ready) -> float:
    """The mean loss over completion and EOS tokens, row by row."""
    total = count = 0.0
    for row in ROWS:
        prompt, answer = ready.prompt(row.prompt), ready.tokenizer(row.completion + "<|im_end|>")["input_ids"]
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logits = ready.model(ids).logits[0, len(prompt) - 1 : -1]
        total += float(F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))
        count += len(answer)
    return total / count


def test_before_and_after_are_the_losses_of_base_and_adapter(one: Ready) -> None:
    found = evaluate(one, ROWS, answer=0, batch_size=2).metrics
    activate(one.model, "a")
    assert found["after"]["loss"] == pytest.approx(by_hand(one), rel=1e-5)
    with disabled(one.model):
        assert found["before"]["loss"] == pytest.approx(by_hand(one), rel=1e-5)


def test_answers_are_those_of_the_engine_and_are_scored(one: Ready) -> None:
    found = evaluate(one, ROWS, answer=2, sampling=Sampling(max_tokens=5), pattern=".")
    assert found.answered == 2 and found.samples == 3
    for row, example in zip(found.rows, ROWS, strict=False):
        for side, name in (("before", None), ("after", "a")):
            [alone] = one.engine.generate([one.prompt(example.prompt)], Sampling(max_tokens=5), [name])
            assert row.answers[side] == alone.text
    assert set(found.metrics["after"]) == {"loss", "exact_match", "rouge_l", "matches"}
    assert [name for name, *_ in found.table()] == ["loss", "exact_match", "rouge_l", "matches"]


def test_likelihoods_are_sums_of_log_probabilities(one: Ready) -> None:
    activate(one.model, "a")
    prompt = one.prompt("is it so? ")
    choices = ["yes", "no", "perhaps not"]
    for choice, found in zip(choices, likelihoods(one, prompt, choices), strict=True):
        tail = one.tokenizer(choice)["input_ids"]
        with torch.no_grad():
            scores = one.model(torch.tensor([[*prompt, *tail]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert found == pytest.approx(float(scores[range(len(tail)), tail].sum()), rel=1e-4)


def test_questions_are_the_last_answer_of_a_row() -> None:
    said = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}) * 2
    found = question_of(Chat(said))
    assert found is not None and (len(found.prompt), found.wanted, found.text) == (3, "b", "a")
    assert question_of(Text("no question")) is None
    assert question_of(Chat(({"role": "assistant", "content": "b"},))) is None


def test_what_cannot_be_judged(one: Ready) -> None:
    with pytest.raises(DataError, match="no answer to ask for"):
        evaluate(one, [Text("only text, and enough of it")], pattern="x")
    with pytest.raises(DataError, match="not among the choices: 'one it is'"):
        evaluate(one, ROWS, choices=["two", "three, then"])
    with pytest.raises(ConfigError, match="not a regular expression"):
        evaluate(one, ROWS, pattern="(")
