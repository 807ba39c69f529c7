"""LoHa: the elementwise product of two low-rank matrices (FedPara, arXiv:2108.06098, propositions 1 and 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from veneer.core.delta import DELTAS, DenseDelta
from veneer.core.init import Site, Start

__all__ = ["LoHa", "kernel_values", "spread_over_kernel"]


def kernel_values(site: Site) -> int:
    """How many values a kernel of this layer has that a core tensor could hold; 0 where there is nothing to share."""
    kernel = getattr(site.host, "kernel_size", ())
    values = math.prod(kernel) if site.options.get("effective_conv") else 0
    return values if values > 1 else 0


def spread_over_kernel(core: Float[Tensor, "r j k"], q: Float[Tensor, "j c"]) -> Float[Tensor, "r in"]:
    """The inputs' factor of a convolution: `core` says how r channels are spread over the kernel's k places."""
    return torch.einsum("rjk,jc->rck", core, q).flatten(1)


class Hadamard(torch.autograd.Function):
    """(P1 Q1) * (P2 Q2), kept for the backward pass as four thin factors: each of the two products is as large as W."""

    @staticmethod
    def forward(ctx: Any, p1: Tensor, q1: Tensor, p2: Tensor, q2: Tensor) -> Tensor:
        ctx.save_for_backward(p1, q1, p2, q2)
        return (p1 @ q1) * (p2 @ q2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        p1, q1, p2, q2 = ctx.saved_tensors
        g1, g2 = g * (p2 @ q2), g * (p1 @ q1)
        return g1 @ q1.mT, p1.mT @ g1, g2 @ q2.mT, p2.mT @ g2


@DELTAS.register("loha")
class LoHa(DenseDelta):
    """dW = s (P1 Q1) * (P2 Q2), of rank up to r^2 for the price of two pairs of rank r.

    P2 starts at zero, the others normal (deviations 1, 1 and 0.1), as in LyCORIS. With options["effective_conv"] a
    convolution's kernel is shared through two cores of r x r x kernel, and Q1, Q2 see channels only (proposition 3).
    """

    saved: ClassVar[dict[str, str]] = {
        "P1": "hada_w1_a",
        "Q1": "hada_w1_b",
        "P2": "hada_w2_a",
        "Q2": "hada_w2_b",
        "T1": "hada_t1",
        "T2": "hada_t2",
    }
    options: ClassVar[dict[str, object]] = {"effective_conv": False}

    def __init__(
        self,
        pairs: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
        scale: float,
        dropout: float = 0.0,
        cores: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(scale, dropout)
        (p1, q1), (p2, q2) = pairs
        self.P1, self.Q1, self.P2, self.Q2 = (nn.Parameter(t) for t in (p1, q1, p2, q2))
        self.T1, self.T2 = (nn.Parameter(t) for t in cores) if cores is not None else (None, None)

    @classmethod
    def create(cls, site: Site, init: Callable[[Site], Start], dropout: float) -> LoHa:
        (q1, p1), (q2, p2) = site.empty(), site.empty()
        values, cores = kernel_values(site), None
        if values:
            q1, q2 = (q[:, : q.shape[1] // values].contiguous() for q in (q1, q2))
            shape = site.rank, site.rank, values
            bound = (site.rank * values) ** -0.5
            cores = tuple(q1.new_empty(shape).uniform_(-bound, bound) for _ in range(2))
        pairs = (p1.normal_(std=0.1), q1.normal_()), (p2.zero_(), q2.normal_())
        return cls(pairs, site.scale, dropout, cores)  # type: ignore[arg-type]

    @property
    def rank(self) -> int:
        return self.Q1.shape[0]

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Q1 and Q2 over all of the layer's inputs."""
        if self.T1 is None or self.T2 is None:
            return self.Q1, self.Q2
        return spread_over_kernel(self.T1, self.Q1), spread_over_kernel(self.T2, self.Q2)

    def matrix(self) -> Float[Tensor, "out in"]:
        q1, q2 = self.inputs()
        return Hadamard.apply(self.P1, q1, self.P2, q2)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Row by row and column by column, the products of all pairs: rank r^2, where that is the thinner form."""
        q1, q2 = self.inputs()
        if self.rank**2 >= min(self.P1.shape[0], q1.shape[1]):
            return super().factors()
        a = torch.einsum("in,jn->ijn", q1, q2).flatten(0, 1)  # (r^2, in)
        b = torch.einsum("oi,oj->oij", self.P1, self.P2).flatten(1)  # (out, r^2)
        return a, b
