"""What is trained, to be looked at: the one picture that shows a wrong mask at a glance.

Terminals get colour: trained tokens stand out, context is dim. Elsewhere trained stretches stand in [brackets].
Line ends are shown, since a mask that is one newline off is just what one is looking for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from veneer.data.types import IGNORE, Encoded, Tokenizer

__all__ = ["Run", "preview", "runs"]

TRAINED, CONTEXT, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
NEWLINE = "\u23ce"  # the sign on the return key


class Run(NamedTuple):
    """A stretch of tokens that are all trained, or all not."""

    text: str
    is_trained: bool
    tokens: int


def runs(sample: Encoded, tokenizer: Tokenizer) -> list[Run]:
    """The sample's text in stretches: what a page or a report colours."""
    found = []
    place = 0
    for is_trained, group in groupby(label != IGNORE for label in sample.labels):
        size = sum(1 for _ in group)
        text = tokenizer.decode(list(sample.input_ids[place : place + size]), skip_special_tokens=False)
        found.append(Run(str(text), is_trained, size))
        place += size
    return found


def preview(
    samples: Sequence[Encoded], tokenizer: Tokenizer, *, colour: bool = False, count: int = 1, width: int = 600
) -> str:
    """The first `count` samples with their trained tokens marked and counted, each cut to `width` characters."""
    return "\n\n".join(_shown(sample, tokenizer, colour, width) for sample in samples[:count])


def _shown(sample: Encoded, tokenizer: Tokenizer, colour: bool, width: int) -> str:
    if sample.layout != "token":
        ends = [f"{tokenizer.decode(list(sample.input_ids))}", f"[{_target(sample, tokenizer)}]"]
        return f"{sample.where}: {len(sample):,} tokens\n{' -> '.join(ends)}"
    share = sample.trained_tokens / len(sample)
    head = f"{sample.where}: {sample.trained_tokens:,} of {len(sample):,} tokens trained ({share:.1%})"
    return "\n".join([head, "".join(_marked(_cut(runs(sample, tokenizer), width), colour))])


def _target(sample: Encoded, tokenizer: Tokenizer) -> str:
    if sample.layout == "target":
        return str(tokenizer.decode([int(label) for label in sample.labels]))
    return ", ".join(f"{label:g}" for label in sample.labels)


def _cut(found: list[Run], width: int) -> list[Run]:
    """Shorten the longest stretches, so that every change from context to trained stays to be seen."""
    most = max(width // max(len(found), 1), 24)
    return [run._replace(text=_shortened(run.text, most)) for run in found]


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[len(text) - most // 2 :]}"


def _marked(found: list[Run], colour: bool) -> Iterator[str]:
    for run in found:
        text = run.text.replace("\n", NEWLINE + "\n" if colour else NEWLINE)
        if colour:
            yield (TRAINED if run.is_trained else CONTEXT) + text + PLAIN
        else:
            yield f"[{text}]" if run.is_trained else text
