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
from torch import nn

from veneer.core.model import activate, adapters, disabled
from veneer.data.batch import Batch, batches, collate, pad_id_of
from veneer.data.types import IGNORE, Chat, Completion, Encoded, Example, LossOn, Message, Pair
from veneer.errors import ConfigError, DataError
from veneer.infer.load import Ready
from veneer.infer.sampling import Sampling
from veneer.tasks.cross_entropy import evaluating
from veneer.tasks.metrics import exact_match, rouge_l

__all__ = ["Evaluation", "Judge", "Judged", "Question", "evaluate", "likelihoods", "question_of"]

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
    loss_on: LossOn = "assistant",
    say: Say = lambda line: None,
) -> Evaluation:
    """Judge the first source of `ready` on these rows. `answer`: how many rows are also answered (0 for none)."""
    found = compiled(pattern)
    judge = Judge(ready, _sides(ready), batch_size, say)
    overlong = "truncate" if ready.task.packs or not ready.task.renders else "drop"  # a picture cannot be cut
    encoded = ready.task.encode(examples, max_len=max_len or ready.engine.limit, overlong=overlong, loss_on=loss_on)
    questions = [each for example in examples if (each := question_of(example))] if ready.answers else []
    if (pattern or choices) and not questions:
        fix = "give rows with a prompt and an answer"
        raise DataError("these rows have no answer to ask for", ready.sources[0].label, fix)
    rows = [Judged(question.text, question.wanted) for question in questions]
    metrics = judge.losses(encoded.samples)
    if choices:
        judge.choose(questions, rows, [choice.strip() for choice in choices])
        for side in judge.sides:
            metrics[side]["choice_accuracy"] = sum(r.chosen[side] == r.wanted.strip() for r in rows) / len(rows)
    rows = rows[:answer]
    if rows:
        judge.answer(questions[:answer], rows, sampling or Sampling(max_tokens=64))
        for side in judge.sides:
            metrics[side] |= scores(rows, side, found)
    return Evaluation(metrics, rows, len(encoded), len(rows))


def _sides(ready: Ready) -> dict[str, str | None]:
    """What is measured under which name: the base before and the adapter after; one side where there is no other."""
    name = ready.sources[0].name
    if name is None or ready.task.labelled:
        return {AFTER: name}
    return {BEFORE: None, AFTER: name}


@dataclass(frozen=True)
class Judge:
    """A model, and the adapters under which it is measured. Each method fills one kind of finding in for all sides."""

    ready: Ready
    sides: dict[str, str | None]
    batch_size: int
    say: Say

    @contextmanager
    def acting(self, name: str | None) -> Iterator[nn.Module]:
        """The model with one adapter, or without any."""
        model = self.ready.model
        if name is not None:
            activate(model, name)
            yield model
        elif adapters(model):
            with disabled(model):
                yield model
        else:
            yield model

    # ------------------------------------------------------------------ loss

    def losses(self, samples: Sequence[Encoded]) -> dict[str, dict[str, float]]:
        """The task's loss and metrics; the longest rows first, so that what does not fit fails at once."""
        ordered = sorted(samples, key=len, reverse=True)
        return {side: self._loss(ordered, side, name) for side, name in self.sides.items()}

    def _loss(self, samples: Sequence[Encoded], side: str, name: str | None) -> dict[str, float]:
        task, device = self.ready.task, next(self.ready.model.parameters()).device

        def told() -> Iterator[Batch]:
            for number, batch in enumerate(batches(samples, self.batch_size, pad_id_of(task.tokenizer))):
                self.say(f"loss {side}: {number * self.batch_size:,} of {len(samples):,} rows")
                yield batch.to(device)

        with self.acting(name) as model, torch.no_grad():
            task.prepare(model, next(told()))
            found = task.evaluate(model, told())
        return {"loss" if key == "val_loss" else key: value for key, value in found.items()}

    # ------------------------------------------------------------------ answers

    def answer(self, questions: Sequence[Question], rows: Sequence[Judged], sampling: Sampling) -> None:
        """All sides in one batch, so that the base and the adapter meet the same padding."""
        routed = bool(adapters(self.ready.model))
        for start in range(0, len(questions), self.batch_size):
            self.say(f"answering: {start:,} of {len(questions):,} rows")
            part = questions[start : start + self.batch_size]
            prompts = [self.prompt(question) for question in part for _ in self.sides]
            names = [name for _ in part for name in self.sides.values()] if routed else None
            answers = iter(self.ready.engine.generate(prompts, sampling, names, batch_size=len(prompts)))
            for row in rows[start : start + self.batch_size]:
                row.answers.update({side: next(answers).text for side in self.sides})

    def prompt(self, question: Question) -> list[int]:
        return self.ready.prompt(question.prompt, question.tools)

    # ------------------------------------------------------------------ choices

    def choose(self, questions: Sequence[Question], rows: Sequence[Judged], choices: Sequence[str]) -> None:
        """The likeliest of the choices, by the sum of its tokens' log-probabilities after the prompt."""
        unknown = sorted({question.wanted.strip() for question in questions} - set(choices))
        if unknown:
            shown = ", ".join(repr(text[:40]) for text in unknown[:5])
            fix = "list every answer there is"
            raise DataError(f"wanted answers are not among the choices: {shown}", "--choices", fix)
        if getattr(self.ready.model.config, "is_encoder_decoder", False):
            raise ConfigError("choices are for models that continue a text", "--choices", "leave them out")
        for number, (question, row) in enumerate(zip(questions, rows, strict=True)):
            if number % 8 == 0:
                self.say(f"choosing: {number:,} of {len(questions):,} rows")
            for side, name in self.sides.items():
                with self.acting(name):
                    found = likelihoods(self.ready, self.prompt(question), choices)
                row.chosen[side] = choices[max(range(len(found)), key=found.__getitem__)]


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


def scores(rows: Sequence[Judged], side: str, pattern: re.Pattern[str] | None) -> dict[str, float]:
    answers, wanted = [row.answers[side] for row in rows], [row.wanted for row in rows]
    found = {"exact_match": exact_match(answers, wanted), "rouge_l": rouge_l(answers, wanted)}
    if pattern is not None:
        found["matches"] = sum(bool(pattern.search(answer)) for answer in answers) / len(answers)
    return found


def compiled(pattern: str | None) -> re.Pattern[str] | None:
    """Looked at before the model works for minutes."""
    try:
        return re.compile(pattern) if pattern else None
    except re.error as error:
        raise ConfigError(f"not a regular expression: {error}", "--regex", "escape it: \\( for (") from None


@torch.no_grad()
def likelihoods(ready: Ready, prompt: Sequence[int], choices: Sequence[str]) -> list[float]:
    """log p(choice | prompt) of each, all in one batch."""
    tails = [list(ready.tokenizer(choice, add_special_tokens=False)["input_ids"]) for choice in choices]
    samples = [Encoded([*prompt, *tail], [IGNORE] * len(prompt) + tail) for tail in tails]
    batch = collate(samples, pad_id_of(ready.tokenizer)).to(next(ready.model.parameters()).device)
    with evaluating(ready.model):
        logits = ready.model(**batch.inputs, use_cache=False).logits
    ahead = logits[:, len(prompt) - 1 : -1].float().log_softmax(-1)  # (choices, longest, vocab)
    return [float(ahead[i, range(len(tail)), tail].sum()) for i, tail in enumerate(tails)]
