"""Examples to token ids and labels, for causal language models. (labelled.py does it for the other tasks.)

Every row ends as samples that train something, or is counted as left out and why. Rows that cannot be rendered or hold
nothing to train are problems of the data and are raised together; rows that are only too long are the caller's choice:

| overlong | a sample of more than max_len tokens |
| --- | --- |
| drop | is left out |
| truncate | keeps its first max_len tokens (its last turn then has no end) |
| split | is cut into pieces of max_len tokens, each of which trains what falls into it |
| error | is a problem |
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from veneer.core.registry import Registry
from veneer.data.lengths import Lengths
from veneer.data.mask import Rendered, is_split_token, labels_for, rendered
from veneer.data.template import Renderer
from veneer.data.types import IGNORE, Chat, Completion, Encoded, Example, Ids, LossOn, Text, Tokens
from veneer.errors import DataError

__all__ = ["OVERLONG", "Encodings", "encode", "finished", "fit"]

CHUNK = 512  # rows tokenised in one call: the tokenizer works on them in parallel

# What became of rows, and how to say it: (key of `counts`, sentence with {n} and {max_len}).
NOTICES = {
    "dropped": "{n:,} over {max_len:,} tokens dropped ({share:.1%})",
    "truncated": "{n:,} over {max_len:,} tokens cut short ({share:.1%}); the ends of their answers are lost",
    "split": "{n:,} over {max_len:,} tokens split into pieces",
    "left with nothing": "{n:,} pieces held nothing to train and were left out",
    "bad": "{n:,} rows left out, with a problem each",
    "own samples": "{n:,} earlier turns trained in samples of their own, since the template rewrites them later",
    "altered": "in {n:,} the template leaves out part of a trained answer (reasoning that it strips?)",
    "split tokens": "in {n:,} a token joins the prompt's end and the answer's start; does the prompt end in a space?",
    "endless": "{n:,} end without EOS: the tokenizer has none",
    "grey": "{n:,} pictures have no colours and were given three equal channels",
    "inks": "{n:,} pictures have a palette or the colours of print and were turned to RGB",
    "see-through": "{n:,} pictures are partly transparent; what is behind was taken as black",
    "without boxes": "{n:,} pictures have no box: they teach that there may be nothing",
    "resized": "{n:,} pictures differ in size from the others; all are brought to the model's size",
    "enlarged": "{n:,} pictures are smaller than they are trained at, and were enlarged",
    "shapes": "trained in {n:,} shapes",
    "repeats": "{n:,} more in each epoch, for folders that say how often",
    "wordless": "{n:,} pictures have no words and are trained without",
    "foldernames": "{n:,} pictures are called what their folder is called",
}


SINGULAR = (
    ("pictures have", "picture has"), ("pictures are", "picture is"), ("pictures differ", "picture differs"),
    ("and were", "and was"), ("they are", "it is"), ("and are", "and is"), ("they teach", "it teaches"),
    ("rows left", "row left"),
)  # fmt: skip


def _of_one(sentence: str, count: int) -> str:
    """
    >>> _of_one("{n:,} pictures have no words and are trained without", 1)
    '{n:,} picture has no words and is trained without'
    """
    for many, one in SINGULAR if count == 1 else ():
        sentence = sentence.replace(many, one)
    return sentence


@dataclass(frozen=True)
class Encodings:
    """Samples that are ready to be packed or batched, and what became of the rows. `str()` is the sentence to print."""

    samples: list[Encoded]
    rows: int
    lengths: Lengths  # of all samples, before any was cut or left out
    counts: Counter[str] = field(default_factory=Counter)
    max_len: int | None = None
    problems: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def tokens(self) -> int:
        return sum(map(len, self.samples))

    @cached_property
    def trained_tokens(self) -> int:
        return sum(sample.trained_tokens for sample in self.samples)

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / max(self.tokens, 1)

    @property
    def lost_share(self) -> float:
        """The share of samples of which something is not trained for being too long."""
        return (self.counts["dropped"] + self.counts["truncated"]) / max(len(self.lengths), 1)

    @property
    def notices(self) -> list[str]:
        total = max(len(self.lengths), 1)
        return [
            _of_one(sentence, count).format(n=count, max_len=self.max_len, share=count / total)
            for key, sentence in NOTICES.items()
            if (count := self.counts[key])
        ]

    @property
    def has_tokens(self) -> bool:
        """Whether samples are made of tokens; a picture is one whole."""
        return self.tokens > len(self)

    def __str__(self) -> str:
        head = f"{self.rows:,} rows, {len(self):,} samples"
        if self.has_tokens:
            head += f", {self.tokens:,} tokens; {self.trained_share:.1%} of them trained"
        return "; ".join([head, *self.notices])

    def facts(self) -> dict[str, Any]:
        """What data.json records."""
        return {
            "rows": self.rows,
            "samples": len(self),
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "max_len": self.max_len,
            "counts": dict(self.counts),
            "problems": list(self.problems),
            "lengths": self.lengths.facts(),
        }


def encode(
    examples: Sequence[Example],
    renderer: Renderer,
    *,
    loss_on: LossOn = "assistant",
    max_len: int | None = None,
    overlong: str = "drop",
    skip_bad: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> Encodings:
    """Samples of at most `max_len` tokens. `report(done, total)` is called now and then, in rows."""
    counts: Counter[str] = Counter()
    problems: list[str] = []
    samples: list[Encoded] = []
    for start in range(0, len(examples), CHUNK):
        samples += _chunk(examples[start : start + CHUNK], renderer, loss_on, counts, problems)
        if report:
            report(min(start + CHUNK, len(examples)), len(examples))
    lengths = Lengths(array("i", map(len, samples)))
    kept = fit(samples, max_len, overlong, counts, problems)
    return finished(kept, len(examples), lengths, counts, problems, max_len, skip_bad)


def finished(
    kept: list[Encoded],
    rows: int,
    lengths: Lengths,
    counts: Counter[str],
    problems: list[str],
    max_len: int | None,
    skip_bad: bool,
) -> Encodings:
    """The result, or all problems at once."""
    if problems and not (skip_bad and kept):
        raise DataError(
            f"{len(problems):,} of {rows:,} rows cannot be trained on",
            fix="mend them, or leave them out with skip_bad",
            problems=problems,
        )
    counts["bad"] = len(problems)
    if not kept and rows:
        raise DataError(
            f"not one sample is left: all are over {max_len} tokens ({lengths})",
            where="max_len",
            fix="raise max_len, or choose overlong=truncate or overlong=split",
        )
    return Encodings(kept, rows, lengths, +counts, max_len, tuple(problems))


def _chunk(
    examples: Sequence[Example], renderer: Renderer, loss_on: LossOn, counts: Counter[str], problems: list[str]
) -> list[Encoded]:
    """The samples of some rows, in their order."""
    texts: list[Rendered | Encoded] = []
    for example in examples:
        try:
            made = _texts_of(example, renderer, loss_on)
        except DataError as error:
            problems.append(f"{example.where}: {error.what}" + (f" ({error.fix})" if error.fix else ""))
            continue
        counts["own samples"] += len(made) - 1
        counts["endless"] += renderer.eos is None and not isinstance(example, Chat | Tokens)
        texts += made
    tokenised = iter(_tokenise([text for text in texts if isinstance(text, Rendered)], renderer, counts, problems))
    done = [text if isinstance(text, Encoded) else next(tokenised) for text in texts]
    return [sample for sample in done if sample is not None]


def _texts_of(example: Example, renderer: Renderer, loss_on: LossOn) -> Sequence[Rendered | Encoded]:
    if isinstance(example, Tokens):
        return [_given(example, renderer, loss_on)]
    if isinstance(example, Chat | Completion | Text):
        return rendered(example, renderer, loss_on)
    raise DataError(f"a row of kind {type(example).__name__} is not for a causal language model", fix="check the task")


def _given(example: Tokens, renderer: Renderer, loss_on: LossOn) -> Encoded:
    """A row that was tokenised elsewhere: checked, and its first label unset."""
    size = renderer.vocabulary_size
    if (worst := max(example.input_ids)) >= size or min(example.input_ids) < 0:
        raise DataError(f"token id {worst} is outside the vocabulary of {size:,}: was another tokenizer used?")
    labels = array("i", example.input_ids if example.labels is None or loss_on == "all" else example.labels)
    labels[0] = IGNORE
    if all(label == IGNORE for label in labels):
        raise DataError("no token is trained: every label is -100")
    return Encoded(array("i", example.input_ids), labels, where=example.where, id=example.id)


def _tokenise(
    texts: list[Rendered], renderer: Renderer, counts: Counter[str], problems: list[str]
) -> Iterator[Encoded | None]:
    for text, (ids, offsets) in zip(texts, renderer.tokens(text.text for text in texts), strict=True):
        lead = renderer.lead(text.text) if text.is_plain else []
        ids, offsets = [*lead, *ids], [(0, 0)] * len(lead) + offsets
        labels = labels_for(ids, offsets, text.spans)
        counts["altered"] += text.is_altered
        counts["split tokens"] += is_split_token(offsets, text.spans)
        if all(label == IGNORE for label in labels):
            problems.append(f"{text.where}: no token is trained: the text is a single token, and nothing predicts it")
            yield None
        else:
            yield Encoded(array("i", ids), labels, where=text.where, id=text.id)


# Too long

Cut = Callable[[Encoded, int, "Counter[str]", "list[str]"], list[Encoded]]
OVERLONG: Registry[Cut] = Registry("way with overlong rows")


def fit(
    samples: list[Encoded], max_len: int | None, overlong: str, counts: Counter[str], problems: list[str]
) -> list[Encoded]:
    """The samples, each of at most `max_len` tokens."""
    cut = OVERLONG[overlong]
    kept: list[Encoded] = []
    for sample in samples:
        kept += [sample] if max_len is None or len(sample) <= max_len else cut(sample, max_len, counts, problems)
    return kept


@OVERLONG.register("drop")
def _drop(sample: Encoded, max_len: int, counts: Counter[str], problems: list[str]) -> list[Encoded]:
    counts["dropped"] += 1
    return []


@OVERLONG.register("truncate")
def _truncate(sample: Encoded, max_len: int, counts: Counter[str], problems: list[str]) -> list[Encoded]:
    counts["truncated"] += 1
    return _training([_part(sample, 0, max_len)], counts)


@OVERLONG.register("split")
def _split(sample: Encoded, max_len: int, counts: Counter[str], problems: list[str]) -> list[Encoded]:
    counts["split"] += 1
    return _training([_part(sample, start, max_len) for start in range(0, len(sample), max_len)], counts)


@OVERLONG.register("error")
def _error(sample: Encoded, max_len: int, counts: Counter[str], problems: list[str]) -> list[Encoded]:
    problems.append(f"{sample.where}: {len(sample):,} tokens, over max_len = {max_len:,}")
    return []


def _part(sample: Encoded, start: int, size: int) -> Encoded:
    labels: Ids = array("i", sample.labels[start : start + size])  # type: ignore[arg-type]
    labels[0] = IGNORE  # type: ignore[index]  # nothing before it predicts it
    return replace(sample, input_ids=sample.input_ids[start : start + size], labels=labels, segments=())


def _training(parts: list[Encoded], counts: Counter[str]) -> list[Encoded]:
    kept = [part for part in parts if part.trained_tokens]
    counts["left with nothing"] += len(parts) - len(kept)
    return kept
