"""VeRA: one pair of random matrices for all layers, and two learned vectors for each (arXiv:2310.11454)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.delta import DELTAS, Delta
from veneer.core.init import Site, Start

__all__ = ["Vera"]


@DELTAS.register("vera")
class Vera(Delta):
    """dW = diag(b) B diag(d) A (eq. 2) with A and B random, frozen and shared, d and b learned; b starts at zero.

    The matrices are drawn once, as large as the largest layer needs, and every layer uses the corner that fits it.
    They come from `seed` alone, but a file may bring its own: another version of torch may draw other numbers
    (options["save_projection"], as PEFT does it). alpha has no part in the paper's rule and none here.
    """

    saved: ClassVar[dict[str, str]] = {"d": "vera_lambda_d", "b": "vera_lambda_b"}
    options: ClassVar[dict[str, object]] = {"seed": 0, "d_initial": 0.1, "save_projection": True}
    has_rank: ClassVar[bool] = False  # it may well be above a small layer's own

    def __init__(self, a: Tensor, b: Tensor, d_initial: float, dropout: float = 0.0) -> None:
        super().__init__(1.0, dropout)
        self.register_buffer("A", a, persistent=False)
        self.register_buffer("B", b, persistent=False)
        self.d = nn.Parameter(a.new_full(a.shape[:1], d_initial))
        self.b = nn.Parameter(b.new_zeros(b.shape[0]))

    @classmethod
    def share(cls, sites: Sequence[Site]) -> None:
        for key in {(s.rank, s.dtype, s.device, s.options["seed"]) for s in sites}:
            group = [s for s in sites if (s.rank, s.dtype, s.device, s.options["seed"]) == key]
            shared = cls._draw(*key, max(s.shape[1] for s in group), max(s.shape[0] for s in group))
            for site in group:
                site.shared = shared

    @staticmethod
    def _draw(
        rank: int, dtype: torch.dtype, device: torch.device, seed: int, n: int, out: int
    ) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        pair = []
        for shape, fan_in in (((rank, n), n), ((out, rank), rank)):
            bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(fan_in)  # kaiming_uniform_ with its default gain
            pair.append(torch.empty(shape).uniform_(-bound, bound, generator=generator).to(device, dtype))
        return pair[0], pair[1]

    @classmethod
    def create(cls, site: Site, init: Callable[[Site], Start], dropout: float) -> Delta:
        (a, b), (out, n) = site.shared, site.shape
        return cls(a[:, :n], b[:out], site.options["d_initial"], dropout)

    def project(self, a: Tensor, b: Tensor) -> None:
        """Use these random matrices, or the corner of them that fits this layer, instead of the drawn ones."""
        self.A = a[: self.A.shape[0], : self.A.shape[1]].to(self.A)
        self.B = b[: self.B.shape[0], : self.B.shape[1]].to(self.B)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.d[:, None] * self.A, self.b[:, None] * self.B
