"""How good is it, and how much better than its base: losses, scores of answers, and the answers themselves.

    loss        the task's own, over every trained token (or row) of the data, with the task's metrics
    answers     some rows are answered, the base's and the adapter's side by side in one batch, and scored:
                exact match, ROUGE-L, and the share that matches a pattern
    choices     among given texts, the one that the model finds likeliest after the prompt

The base is measured on the same rows in the same arithmetic, so "before" and "after" differ by the adapter alone. A
classifier has no before: its head did not exist.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from veneer.core.model import activate, adapters, disabled
from veneer.data.batch import batches, pad_id_of
from veneer.data.types import Chat, Completion, Encoded, Example, Message, Pair
from veneer.errors import ConfigError, DataError
from veneer.infer.load import Ready
from veneer.infer.sampling import Sampling
from veneer.tasks.metrics import exact_match, rouge_l

__all__ = ["Evaluation", "Judged", "Question", "evaluate", "question_of"]

BEFORE, AFTER = "before", "after"
Say = Callable[[str], object]


@dataclass(frozen=True)
class Question:
    """A row as something to be asked: a conversation or a text, and what was wanted."""

    prompt: tuple[Message, ...] | str
    wanted: str
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1].get("content", ""))


@dataclass(frozen=True)
class Judged:
    """One question with what was said before and after, and which choice each took (where there were choices)."""

    prompt: str
    wanted: str
    answers: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """`metrics`: for "before" (where there is one) and "after", name -> value. `rows` are those that were answered."""

    metrics: dict[str, dict[str, float]]
    rows: list[Judged]
    samples: int
    answered: int

    def table(self) -> list[tuple[str, float | None, float | None]]:
        """(metric, before, after)."""
        names = dict.fromkeys(name for side in self.metrics.values() for name in side)
        before, after = self.metrics.get(BEFORE, {}), self.metrics.get(AFTER, {})
        return [(name, before.get(name), after.get(name)) for name in names]


def evaluate(
    ready: Ready,
    examples: Sequence[Example],
    *,
    answer: int = 32,
    pattern: str | None = None,
    choices: Sequence[str] = (),
    sampling: Sampling | None = None,
    batch_size: int = 8,
    max_len: int | None = None,
    loss_on: str = "assistant",
    say: Say = lambda line: None,
) -> Evaluation:
    """Judge the first source of `ready` on these rows. `answer`: how many rows are also answered (0 for none)."""
    source = ready.sources[0]
    sides = _sides(ready, source.name)
    options = {"max_len": max_len or ready.engine.limit, "overlong": "truncate", "loss_on": loss_on}
    encoded = ready.task.encode(examples, **options)
    metrics = {side: _losses(ready, encoded.samples, name, batch_size, say, side) for side, name in sides.items()}
    questions = [question for example in examples if (question := question_of(example))] if ready.answers else []
    if (pattern or choices) and not questions:
        raise DataError("these rows have no answer to ask for", source.label, "give rows with a prompt and an answer")
    rows = [Judged(question.text, question.wanted) for question in questions]
    if choices:
        _choose(ready, questions, rows, sides, choices, say)
        for side in sides:
            right = sum(row.chosen[side] == row.wanted.strip() for row in rows)
            metrics[side]["choice_accuracy"] = right / len(rows)
    rows = rows[:answer]
    if rows:
        _answer(ready, questions[:answer], rows, sides, sampling or Sampling(max_tokens=64), batch_size, say)
        for side in sides:
            metrics[side] |= _scores(rows, side, pattern)
    return Evaluation(metrics, rows, len(encoded), len(rows))


def _sides(ready: Ready, name: str | None) -> dict[str, str | None]:
    """What is measured under which name: the base before and the adapter after; one side where there is no other."""
    if name is None:
        return {AFTER: None}
    return {AFTER: name} if ready.task.labelled else {BEFORE: None, AFTER: name}


@contextmanager
def _acting(ready: Ready, name: str | None) -> Iterator[None]:
    if name is not None:
        activate(ready.model, name)
        yield
    elif adapters(ready.model):
        with disabled(ready.model):
            yield
    else:
        yield


# ------------------------------------------------------------------ loss


def _losses(ready: Ready, samples: list[Encoded], name: str | None, rows: int, say: Say, side: str) -> dict[str, float]:
    """The task's loss and metrics; the longest rows first, so that what does not fit fails at once."""
    ordered = sorted(samples, key=len, reverse=True)
    device = next(ready.model.parameters()).device
    parts = [batch.to(device) for batch in batches(ordered, rows, pad_id_of(ready.tokenizer))]

    def told() -> Iterator[Any]:
        for number, batch in enumerate(parts):
            say(f"loss {side}: {number * rows:,} of {len(ordered):,} rows")
            yield batch

    with _acting(ready, name), torch.no_grad():
        ready.task.prepare(ready.model, parts[0])
        found = ready.task.evaluate(ready.model, told())
    return {"loss" if key == "val_loss" else key: value for key, value in found.items()}


# ------------------------------------------------------------------ answers


def question_of(example: Example) -> Question | None:
    """What to ask, for rows that have an answer: the last assistant turn, the completion, the target."""
    if isinstance(example, Completion):
        return Question(example.prompt, example.completion)
    if isinstance(example, Pair):
        return Question(example.source, example.target)
    if not isinstance(example, Chat):
        return None
    turns = [i for i, message in enumerate(example.messages) if message["role"] == "assistant" and i > 0]
    if not turns:
        return None
    return Question(example.messages[: turns[-1]], str(example.messages[turns[-1]].get("content", "")), example.tools)


def _prompt(ready: Ready, question: Question) -> list[int]:
    return ready.prompt(question.prompt, question.tools)


def _answer(
    ready: Ready,
    questions: Sequence[Question],
    rows: Sequence[Judged],
    sides: dict[str, str | None],
    sampling: Sampling,
    batch_size: int,
    say: Say,
) -> None:
    """All sides in one batch, so that the base and the adapter meet the same padding and the same clock."""
    routed = bool(adapters(ready.model))
    for start in range(0, len(questions), batch_size):
        say(f"answering: {start:,} of {len(questions):,} rows")
        part = questions[start : start + batch_size]
        prompts = [_prompt(ready, question) for question in part for _ in sides]
        by_row = [name for _ in part for name in sides.values()] if routed else None
        answers = iter(ready.engine.generate(prompts, sampling, by_row, batch_size=len(prompts)))
        for row in rows[start : start + batch_size]:
            row.answers.update({side: next(answers).text for side in sides})


def _scores(rows: Sequence[Judged], side: str, pattern: str | None) -> dict[str, float]:
    answers, wanted = [row.answers[side] for row in rows], [row.wanted for row in rows]
    found = {"exact_match": exact_match(answers, wanted), "rouge_l": rouge_l(answers, wanted)}
    if pattern:
        found["matches"] = sum(bool(_compiled(pattern).search(answer)) for answer in answers) / len(answers)
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"not a regular expression: {error}", "--regex", "escape it: \\( for (") from None


# ------------------------------------------------------------------ choices


def _choose(
    ready: Ready,
    questions: Sequence[Question],
    rows: Sequence[Judged],
    sides: dict[str, str | None],
    choices: Sequence[str],
    say: Say,
) -> None:
    """The likeliest of the choices, by the sum of its tokens' log-probabilities after the prompt."""
    unknown = sorted({q.wanted.strip() for q in questions} - {choice.strip() for choice in choices})
    if unknown:
        shown = ", ".join(repr(text[:40]) for text in unknown[:5])
        raise DataError(f"wanted answers are not among the choices: {shown}", "--choices", "list every answer there is")
    if getattr(ready.model.config, "is_encoder_decoder", False):
        raise ConfigError("choices are for models that continue a text", "--choices", "leave them out")
    for number, (question, row) in enumerate(zip(questions, rows, strict=True)):
        if number % 8 == 0:
            say(f"choosing: {number:,} of {len(questions):,} rows")
        for side, name in sides.items():
            with _acting(ready, name):
                scores = likelihoods(ready, _prompt(ready, question), [choice.strip() for choice in choices])
            row.chosen[side] = choices[max(range(len(scores)), key=scores.__getitem__)].strip()


@torch.no_grad()
def likelihoods(ready: Ready, prompt: list[int], choices: Sequence[str]) -> list[float]:
    """log p(choice | prompt) of each, all in one batch."""
    tails = [list(ready.tokenizer(choice, add_special_tokens=False)["input_ids"]) for choice in choices]
    width = len(prompt) + max(map(len, tails))
    device, pad = next(ready.model.parameters()).device, pad_id_of(ready.tokenizer)
    ids = [[*prompt, *tail, *[pad] * (width - len(prompt) - len(tail))] for tail in tails]
    mask = [[1] * (len(prompt) + len(tail)) + [0] * (width - len(prompt) - len(tail)) for tail in tails]
    was_training = ready.model.training
    ready.model.eval()
    out = ready.model(
        input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device), use_cache=False
    )
    ready.model.train(was_training)
    scores = out.logits[:, len(prompt) - 1 : -1].float().log_softmax(-1)  # (choices, longest, vocab)
    return [float(scores[i, range(len(tail)), tail].sum()) for i, tail in enumerate(tails)]
