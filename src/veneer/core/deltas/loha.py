"""LoHa: the elementwise product of two low-rank matrices (FedPara, arXiv:2108.06098, proposition 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veneer.core.delta import DELTAS, DenseDelta
from veneer.core.init import Site, Start

__all__ = ["LoHa"]


@DELTAS.register("loha")
class LoHa(DenseDelta):
    """dW = s (P1 Q1) * (P2 Q2), of rank up to r^2 for the price of two pairs of rank r.

    P2 starts at zero, the others normal (deviations 1, 1 and 0.1), as in LyCORIS.
    """

    saved: ClassVar[dict[str, str]] = {
        "P1": "hada_w1_a",
        "Q1": "hada_w1_b",
        "P2": "hada_w2_a",
        "Q2": "hada_w2_b",
    }

    def __init__(self, p1: Tensor, q1: Tensor, p2: Tensor, q2: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__(scale, dropout)
        self.P1, self.Q1, self.P2, self.Q2 = (nn.Parameter(t) for t in (p1, q1, p2, q2))

    @classmethod
    def create(cls, site: Site, init: Callable[[Site], Start], dropout: float) -> LoHa:
        (q1, p1), (q2, p2) = site.empty(), site.empty()
        return cls(p1.normal_(std=0.1), q1.normal_(), p2.zero_(), q2.normal_(), site.scale, dropout)

    @property
    def rank(self) -> int:
        return self.Q1.shape[0]

    def matrix(self) -> Float[Tensor, "out in"]:
        return (self.P1 @ self.Q1) * (self.P2 @ self.Q2)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Row by row and column by column, the products of all pairs: rank r^2, where that is the thinner form."""
        if self.rank**2 >= min(self.P1.shape[0], self.Q1.shape[1]):
            return super().factors()
        a = torch.einsum("in,jn->ijn", self.Q1, self.Q2).flatten(0, 1)  # (r^2, in)
        b = torch.einsum("oi,oj->oij", self.P1, self.P2).flatten(1)  # (out, r^2)
        return a, b
