"""P1: every sample teaches something, and teaches where to stop.

A sample without a trained token costs time and says nothing; one whose answer has no trained end teaches the model to
go on for ever. Both look right in a loss curve. So all samples are looked at, not a few: their labels are laid end to
end, a million at a time, and the spans of trained tokens are found in whole arrays.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from veneer.data.types import IGNORE, Encoded
from veneer.prove.proof import Check

__all__ = ["every_sample_teaches"]

TITLE = "Loss mask"
AT_ONCE = 1 << 20  # labels
SHOWN = 3


def every_sample_teaches(samples: Iterable[Encoded], ends: Collection[int] = (), *, may_be_cut: bool = False) -> Check:
    """`ends`: the ids that end an answer; none where the task has no answers (labels per text or per word).
    `may_be_cut`: over-long samples were cut, so an answer that reaches the sample's end may lack its own."""
    count = spans = trained = tokens = 0
    empty: list[str] = []
    endless: list[str] = []
    for group in _groups(samples):
        count += sum(len(sample.segments) for sample in group)
        found = _look(group, ends, may_be_cut)
        empty += [_place(group, k) for k in found.empty]
        endless += [_place(group, k) for k in found.endless]
        spans, trained, tokens = spans + found.spans, trained + found.trained, tokens + found.tokens
    share = trained / tokens if tokens else 0.0
    return Check(
        "P1", TITLE, bool(count) and not empty and not endless, _statement(count, spans, share, empty, endless, ends),
        {"samples": count, "answers": spans, "tokens": tokens, "trained_tokens": trained, "trained_share": share,
         "without_trained_token": len(empty), "without_end": len(endless), "where": (empty + endless)[:20],
         "ends_checked": bool(ends)},
    )  # fmt: skip


def _statement(
    count: int, spans: int, share: float, empty: Sequence[str], endless: Sequence[str], ends: Collection[int]
) -> str:
    wrong = []
    if empty:
        wrong.append(f"{len(empty)} of {count} samples train no token: {_few(empty)}")
    if endless:
        wrong.append(f"{len(endless)} answers are trained without their end: {_few(endless)}")
    if wrong or not count:
        return "; ".join(wrong or ["There are no samples"]) + "."
    tail = f", and each of {spans:,} answers ends inside the mask" if ends else ""
    return f"All {count:,} samples train at least one token ({100 * share:.1f} % of all tokens){tail}."


def _few(places: Sequence[str]) -> str:
    more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return ", ".join(places[:SHOWN]) + more


def _groups(samples: Iterable[Encoded]) -> Iterator[list[Encoded]]:
    group: list[Encoded] = []
    held = 0
    for sample in samples:
        group.append(sample)
        held += len(sample.labels)
        if held >= AT_ONCE:
            yield group
            group, held = [], 0
    if group:
        yield group


class Found:
    """What one group showed; samples are numbered through, packed ones each by themselves."""

    def __init__(self, empty: Sequence[int], endless: Sequence[int], spans: int, trained: int, tokens: int) -> None:
        self.empty, self.endless = list(empty), sorted(set(endless))
        self.spans, self.trained, self.tokens = spans, trained, tokens


def _look(group: Sequence[Encoded], ends: Collection[int], may_be_cut: bool) -> Found:
    if group[0].layout == "row":
        bad = [k for k, sample in enumerate(group) if not _is_label(sample.labels)]
        return Found(bad, [], 0, len(group) - len(bad), len(group))
    if group[0].layout == "boxes":  # a picture without any teaches that there may be none
        bad = [k for k, sample in enumerate(group) if any(label < 0 for label in sample.labels)]
        return Found(bad, [], 0, len(group) - len(bad), len(group))
    labels, last, owner = _laid_out(group)
    trained = labels != IGNORE
    begins, stops = _edges(trained)
    has_end = _counts(torch.isin(labels, torch.tensor(sorted(ends), dtype=labels.dtype)), begins, stops) > 0
    excused = torch.isin(stops, last) if may_be_cut else torch.zeros_like(stops, dtype=torch.bool)
    lacking = ~(has_end | excused) if ends else torch.zeros_like(has_end)
    full = torch.zeros(len(last), dtype=torch.bool)
    full[owner[begins]] = True
    tokens = sum(sum(sample.segments) if sample.layout == "token" else len(sample.labels) for sample in group)
    return Found(
        (~full).nonzero().flatten().tolist(), owner[begins][lacking].tolist(), len(begins), int(trained.sum()), tokens
    )


def _laid_out(group: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """All labels with one IGNORE before each sample; the last position of each; and whose each position is."""
    flat, lengths = array("i"), []
    for sample in group:
        start = 0
        sizes = sample.segments if sample.layout == "token" else (len(sample.labels),)
        for size in sizes:
            flat.append(IGNORE)
            flat.extend(array("i", sample.labels[start : start + size]))  # type: ignore[arg-type]
            lengths.append(size + 1)
            start += size
    sizes_ = torch.tensor(lengths)
    return torch.tensor(flat), sizes_.cumsum(0) - 1, torch.arange(len(lengths)).repeat_interleave(sizes_)


def _edges(trained: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last position of every run of trained tokens."""
    padded = torch.cat([trained.new_zeros(1), trained, trained.new_zeros(1)]).to(torch.int8)
    steps = padded.diff()
    return (steps == 1).nonzero().flatten(), (steps == -1).nonzero().flatten() - 1


def _counts(marked: Tensor, begins: Tensor, stops: Tensor) -> Tensor:
    """How many marked positions lie in each run."""
    sums = torch.cat([torch.zeros(1, dtype=torch.int64), marked.cumsum(0)])
    return sums[stops + 1] - sums[begins]


def _is_label(labels: Sequence[float] | Sequence[int]) -> bool:
    return all(math.isfinite(label) for label in labels) and any(label != IGNORE for label in labels)


def _place(group: Sequence[Encoded], index: int) -> str:
    for sample in group:
        parts = len(sample.segments) if sample.layout == "token" else 1
        if index < parts:
            return sample.where or sample.id or "a sample without a place"
        index -= parts
    raise AssertionError("a sample outside its group")
