"""How long the samples are: the figures and the histogram that `check`, data.json and the report show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = ["Lengths"]

BLOCKS = " .:-=+*#%@"


@dataclass(frozen=True)
class Lengths:
    """
    >>> lengths = Lengths([3, 5, 5, 40])
    >>> str(lengths), lengths.quantile(0.5), lengths.histogram(4)
    ('median 5, 99 % up to 40, longest 40 tokens', 5, [(1, 10, 3), (11, 20, 0), (21, 30, 0), (31, 40, 1)])
    """

    tokens: Sequence[int]

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def ordered(self) -> list[int]:
        return sorted(self.tokens)

    @property
    def longest(self) -> int:
        return self.ordered[-1] if self.ordered else 0

    def quantile(self, share: float) -> int:
        """The length that `share` of the samples do not exceed."""
        last = len(self.ordered) - 1
        return self.ordered[min(int(share * len(self.ordered)), last)] if self.ordered else 0

    def over(self, limit: int) -> int:
        """How many samples are longer."""
        return sum(length > limit for length in self.tokens)

    def histogram(self, bins: int = 20) -> list[tuple[int, int, int]]:
        """(shortest, longest, samples) of each bin, all of one width but perhaps the last."""
        width = max(-(-self.longest // bins), 1)
        held = [0] * bins
        for length in self.tokens:
            held[min(max(length - 1, 0) // width, bins - 1)] += 1
        return [(n * width + 1, (n + 1) * width, count) for n, count in enumerate(held) if n * width < self.longest]

    def sketch(self, bins: int = 20) -> str:
        """The histogram as one line of text.

        >>> Lengths([1, 2, 2, 3, 3, 3, 4, 4, 9]).sketch(9)
        '|-*@*    -| 1 to 9 tokens'
        """
        counts = [count for _, _, count in self.histogram(bins)]
        top = max(counts, default=1)
        return f"|{''.join(BLOCKS[-(-count * 9 // top)] for count in counts)}| 1 to {self.longest:,} tokens"

    def __str__(self) -> str:
        return f"median {self.quantile(0.5):,}, 99 % up to {self.quantile(0.99):,}, longest {self.longest:,} tokens"

    def facts(self) -> dict[str, Any]:
        marks = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
        quantiles = {name: self.quantile(share) for name, share in marks.items()}
        return {"longest": self.longest, **quantiles, "histogram": self.histogram()}
