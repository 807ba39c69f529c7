"""What is learned: dW, and how an input meets it without dW ever being formed.

A delta needs one method, `factors`, which gives A (r, in) and B (out, r) such that dW = s B A. How it runs, merges, is
measured and saved follows from that; a delta that is not a product of two factors overrides `forward` and `weight`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from veneer.core.init import Site, Start
from veneer.core.op import Op
from veneer.core.registry import Registry

__all__ = ["DELTAS", "Delta", "Lora"]

DELTAS: Registry[type["Delta"]] = Registry("delta")


class Delta(nn.Module, ABC):
    """A learned change of one weight matrix: dW = s B A, with s fixed by alpha, the rank and the scaling rule."""

    saved: ClassVar[dict[str, str]] = {}  # our names -> the names in PEFT's files, so formats need no list of variants

    def __init__(self, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout

    @classmethod
    def create(cls, site: Site, init: Callable[[Site], Start], dropout: float) -> Delta:
        """Build the delta for a site; `init` is only called when the delta starts from A and B."""
        start = init(site)
        return cls(start, site.scale, dropout)  # type: ignore[arg-type]

    @abstractmethod
    def factors(self) -> tuple[Float[Tensor, "*e r in"], Float[Tensor, "*e out r"]]:
        """A and B with dW = s B A, differentiable with respect to what is trained."""

    @property
    def rank(self) -> int:
        return self.factors()[0].shape[-2]

    def forward(self, host: nn.Module, op: Op, x: Tensor) -> Tensor:
        """dW x in the layer's output shape. Dropout acts on x, so it never touches the frozen path."""
        a, b = self.factors()
        if self.dropout and self.training and not op.looks_up:
            x = F.dropout(x, self.dropout)
        return op.up(host, op.down(host, x, a) * self.scale, b)  # scaled while it is r wide

    def weight(self) -> Float[Tensor, "*e out in"]:
        """dW itself, in fp32 or wider: for merging, norms and tests."""
        a, b = (f.to(torch.promote_types(f.dtype, torch.float32)) for f in self.factors())
        return (b @ a) * self.scale

    def norm(self) -> float:
        """|dW| (Frobenius) from the factors alone: |BA|^2 = <B^T B, A A^T>, r x r work instead of out x in."""
        a, b = (f.detach().double() for f in self.factors())
        squared = ((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0)
        return float(squared.sqrt()) * abs(self.scale)


@DELTAS.register("lora")
class Lora(Delta):
    """dW = s B A with both factors learned (LoRA, arXiv:2106.09685, section 4.1).

    Inits that take the adapter's start out of the base (PiSSA, OLoRA) leave the base alone here. The start stays
    beside it as frozen A0 and B0, and dW = s (B A - B0 A0): the same function and the same gradients, but the base is
    still the base, other adapters may sit beside this one, and the pair [A; A0], [B, -B0] is a plain LoRA of rank 2r.
    """

    saved: ClassVar[dict[str, str]] = {"A": "lora_A", "B": "lora_B"}

    def __init__(self, start: Start, scale: float, dropout: float = 0.0) -> None:
        super().__init__(scale, dropout)
        self.A = nn.Parameter(start.a)
        self.B = nn.Parameter(start.b)
        if start.shifted:
            self.register_buffer("A0", start.a.detach().clone())
            self.register_buffer("B0", start.b.detach().clone())
        self.shifted = start.shifted

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.shifted:
            return torch.cat([self.A, self.A0], dim=-2), torch.cat([self.B, -self.B0], dim=-1)
        return self.A, self.B

    @property
    def rank(self) -> int:
        return self.A.shape[-2]
