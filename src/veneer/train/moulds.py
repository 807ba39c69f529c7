"""Which shape batches of words are brought to, so that a GPU can replay what it did for another, and whether that pays.

Blocks that are replayed never wait for Python, but all batches must be of one shape: samples that count for nothing
fill them up. Packed rows are nearly alike as they are. Others are not, and what the fillers cost depends on what the
card does meanwhile. Where it waits for Python they cost nothing, where it is busy they cost what tokens cost; which of
the two it is, card, host and model decide together. So two passes are timed as they are, over a batch of middling
length and over the longest, and for n tokens

    t(n)        = t(middling) + slope (n - middling)       slope: 0 where Python is waited for, t / n on a busy card
    as ever     the mean of t(n) over the batches
    filled up   the mean of t(M) for those that fit into M tokens, and of t(n) for the others, which are not replayed

A replayed pass takes less than t(M), by what the card waited: that is the gain, and it is not counted on. The largest M
is taken that costs next to nothing (COST); where there is none, blocks run as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

from veneer.data.loader import Loader
from veneer.data.types import Encoded

__all__ = ["Fit", "Timing", "fits", "micro_batches", "timing_of"]

SHARES = (1.0, 0.95, 0.9, 0.75)  # of all batches, that fit into a shape which is tried
FREE = 0.02  # fillers among the tokens that are not worth timing anything
COST = 0.05  # by how much longer passes may take for being filled up
LOOKED_AT = 500  # steps from whose batches it is told

Micro = list[Encoded]


class Timing(NamedTuple):
    """Seconds of two passes, over so many tokens each."""

    tokens: float
    seconds: float
    most: float
    most_seconds: float

    def at(self, tokens: float) -> float:
        slope = (self.most_seconds - self.seconds) / max(1.0, self.most - self.tokens)
        return max(0.0, self.seconds + max(0.0, slope) * (tokens - self.tokens))


class Fit(NamedTuple):
    """A shape of `tokens`: what share of the batches fits, how much of them is filler, how much longer passes take."""

    tokens: int
    share: float
    filling: float
    cost: float


def micro_batches(samples: Sequence[Encoded], global_batch: int, rows: int, seed: int) -> list[Micro]:
    """The batches of the first epoch, as the loop cuts them; of a long one its beginning."""
    steps = islice(Loader(samples, global_batch, seed=seed), LOOKED_AT)
    return [list(step.samples[at : at + rows]) for step in steps for at in range(0, len(step.samples), rows)]


def tokens_of(batch: Micro) -> int:
    return sum(map(len, batch))


def timing_of(batches: Sequence[Micro], seconds: Callable[[Micro], float]) -> Timing:
    """By passes over two of the batches. Each is timed twice, in turn, and the quicker time counts; what is compiled at
    a first use is no part of it."""
    mean = sum(map(tokens_of, batches)) / len(batches)
    pair = min(batches, key=lambda each: abs(tokens_of(each) - mean)), max(batches, key=tokens_of)
    for batch in pair:
        seconds(batch)
    (one, other), (again, another) = ([seconds(batch) for batch in pair] for _ in range(2))
    return Timing(tokens_of(pair[0]), min(one, again), tokens_of(pair[1]), min(other, another))


def fits(sizes: Sequence[int], timing: Timing | None = None) -> list[Fit]:
    """Shapes for batches of these sizes, the largest first. Without a timing fillers cost what tokens cost.

    >>> [(fit.tokens, round(fit.filling, 2), round(fit.cost, 2)) for fit in fits([100, 100, 100, 200])]
    [(200, 0.38, 0.6), (100, 0.0, 0.0)]
    """
    timing = timing or Timing(0, 0, 1, 1)
    ordered, mean = sorted(sizes), sum(map(timing.at, sizes)) / len(sizes)
    tried = dict.fromkeys(ordered[math.ceil(share * len(ordered)) - 1] for share in SHARES)
    found = []
    for most in tried:
        within = [n for n in ordered if n <= most]
        total = len(within) * timing.at(most) + sum(timing.at(n) for n in ordered[len(within) :])
        filling = 1 - sum(within) / (most * len(within))
        found.append(Fit(most, len(within) / len(ordered), filling, total / len(ordered) / mean - 1))
    return found
