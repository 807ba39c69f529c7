"""LoKr: a Kronecker product, with the larger factor of low rank (arXiv:2309.14859, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veneer.core.delta import DELTAS, DenseDelta
from veneer.core.init import Site, Start

__all__ = ["LoKr", "split"]


def split(n: int, factor: int = -1) -> tuple[int, int]:
    """n as a product of two whole numbers, the smaller first and at most `factor`; as square as possible for -1.

    >>> split(768), split(768, 8), split(13)
    ((24, 32), (8, 96), (1, 13))
    """
    limit = math.isqrt(n) if factor <= 0 else min(factor, math.isqrt(n))
    small = max(d for d in range(1, limit + 1) if n % d == 0)
    return small, n // small


@DELTAS.register("lokr")
class LoKr(DenseDelta):
    """dW = s C (x) D with C (o1, i1) small and D (o2, i2) = D1 D2 of rank r, or whole where r saves nothing.

    C starts kaiming-uniform; D starts at zero through D1 (or whole), so the start is the base.
    """

    saved: ClassVar[dict[str, str]] = {"C": "lokr_w1", "D": "lokr_w2", "D1": "lokr_w2_a", "D2": "lokr_w2_b"}
    options: ClassVar[dict[str, object]] = {"factor": -1}

    def __init__(self, c: Tensor, d: Tensor | tuple[Tensor, Tensor], scale: float, dropout: float = 0.0) -> None:
        super().__init__(scale, dropout)
        self.C = nn.Parameter(c)
        if isinstance(d, Tensor):
            self.D = nn.Parameter(d)
        else:
            self.D1, self.D2 = (nn.Parameter(t) for t in d)
        self.whole = isinstance(d, Tensor)

    @classmethod
    def create(cls, site: Site, init: Callable[[Site], Start], dropout: float) -> LoKr:
        like = {"dtype": site.dtype, "device": site.device}
        (o1, o2), (i1, i2) = (split(n, site.options["factor"]) for n in site.shape)
        c = nn.init.kaiming_uniform_(torch.empty(o1, i1, **like), a=math.sqrt(5))
        if site.rank >= max(o2, i2) / 2:
            return cls(c, torch.zeros(o2, i2, **like), 1.0, dropout)  # nothing is low-rank here, so nothing to scale
        d2 = nn.init.kaiming_uniform_(torch.empty(site.rank, i2, **like), a=math.sqrt(5))
        return cls(c, (torch.zeros(o2, site.rank, **like), d2), site.scale, dropout)

    def large(self) -> Tensor:
        return self.D if self.whole else self.D1 @ self.D2

    def matrix(self) -> Float[Tensor, "out in"]:
        return torch.kron(self.C, self.large())
