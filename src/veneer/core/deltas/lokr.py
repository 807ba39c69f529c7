"""LoKr: a Kronecker product of a small and a larger factor, of low rank where that saves anything
(arXiv:2309.14859, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veneer.core.delta import DELTAS, DenseDelta
from veneer.core.deltas.loha import kernel_values, spread_over_kernel
from veneer.core.init import Site, Start

__all__ = ["LoKr", "split"]


def split(n: int, factor: int = -1) -> tuple[int, int]:
    """n as a product of two whole numbers: `factor` first if it divides n; else the smaller first, at most `factor`
    and as square as possible (LyCORIS's rule, which files depend on).

    >>> split(768), split(768, 8), split(13), split(768, 7), split(32, 8)
    ((24, 32), (8, 96), (1, 13), (6, 128), (8, 4))
    """
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    limit = math.isqrt(n) if factor <= 0 else min(factor, math.isqrt(n))
    small = max(d for d in range(1, limit + 1) if n % d == 0)
    return small, n // small


@DELTAS.register("lokr")
class LoKr(DenseDelta):
    """dW = s C (x) D with C (o1, i1) small and D (o2, i2) = D1 D2 of rank r, or whole where r saves nothing.

    C is whole, or C1 C2 with options["decompose_both"] where that saves something. In a convolution the channels are
    split and the kernel belongs to D; with options["effective_conv"] D's kernel is shared through a core of r x r x
    kernel, as in LoHa. C starts kaiming-uniform; D starts at zero through D1 (or whole), so the start is the base.
    """

    saved: ClassVar[dict[str, str]] = {
        "C": "lokr_w1",
        "C1": "lokr_w1_a",
        "C2": "lokr_w1_b",
        "D": "lokr_w2",
        "D1": "lokr_w2_a",
        "D2": "lokr_w2_b",
        "T": "lokr_t2",
    }
    options: ClassVar[dict[str, object]] = {"factor": -1, "decompose_both": False, "effective_conv": False}
    has_rank: ClassVar[bool] = False  # above the large factor's own, that is learned whole

    def __init__(
        self,
        c: tuple[Tensor, ...],
        d: tuple[Tensor, ...],
        scale: float,
        dropout: float = 0.0,
        core: Tensor | None = None,
    ) -> None:
        super().__init__(scale, dropout)
        for name, factor in (("C", c), ("D", d)):
            names = (name,) if len(factor) == 1 else (f"{name}1", f"{name}2")
            for key, value in zip(names, factor, strict=True):
                self.register_parameter(key, nn.Parameter(value))
        self.T = nn.Parameter(core) if core is not None else None

    @classmethod
    def create(cls, site: Site, init: Callable[[Site], Start], dropout: float) -> LoKr:
        like = {"dtype": site.dtype, "device": site.device}
        out, n = site.shape
        kernel, factor = math.prod(getattr(site.host, "kernel_size", ())), int(site.options["factor"])
        (o1, o2), (i1, i2) = split(out, factor), split(n // kernel, factor)  # the kernel is part of D

        def random(*shape: int) -> Tensor:
            return nn.init.kaiming_uniform_(torch.empty(*shape, **like), a=math.sqrt(5))

        r = site.rank
        saves = bool(site.options["decompose_both"]) and r < max(o1, i1) / 2
        c = (random(o1, r), random(r, i1)) if saves else (random(o1, i1),)
        if r >= max(o2, i2) / 2:
            return cls(c, (torch.zeros(o2, i2 * kernel, **like),), site.scale, dropout)
        values = kernel_values(site)
        d = (torch.zeros(o2, r, **like), random(r, i2 if values else i2 * kernel))
        return cls(c, d, site.scale, dropout, random(r, r, values) if values else None)

    @property
    def rank(self) -> int:
        thin = getattr(self, "D2", getattr(self, "C2", None))
        return min(self.matrix().shape) if thin is None else thin.shape[0]

    def small(self) -> Tensor:
        return self.C if hasattr(self, "C") else self.C1 @ self.C2

    def large(self) -> Tensor:
        if hasattr(self, "D"):
            return self.D
        return self.D1 @ (self.D2 if self.T is None else spread_over_kernel(self.T, self.D2))

    def matrix(self) -> Float[Tensor, "out in"]:
        return torch.kron(self.small(), self.large())
