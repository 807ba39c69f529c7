"""What is learned: dW, and how an input meets it without dW ever being formed.

A delta needs one method, `factors`, which gives A (r, in) and B (out, r) such that dW = s B A. How it runs, merges, is
measured and saved follows from that. A delta that is no product of two thin factors is a `DenseDelta` and needs one
method too, `matrix`, which gives dW / s. The variants stand one to a file in `deltas/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from veneer.core.init import Site, Start
from veneer.core.op import Op
from veneer.core.registry import Registry

__all__ = ["DELTAS", "Delta", "DenseDelta", "Lora", "Mirror", "wide"]

DELTAS: Registry[type[Delta]] = Registry("delta")


def wide(t: Tensor) -> Tensor:
    """In fp32, or fp64 if it is that already: what sums and norms are formed in."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class Delta(nn.Module, ABC):
    """A learned change of one weight matrix: dW = s B A, with s fixed by alpha, the rank and the scaling rule."""

    saved: ClassVar[dict[str, str]] = {}  # our names -> the names in PEFT's files, so formats need no list of variants
    options: ClassVar[dict[str, object]] = {}  # what LoRA(options=...) may set, with the defaults
    takes_init: ClassVar[bool] = False  # whether A and B come from the init that was asked for
    takes_stacks: ClassVar[bool] = False  # whether it can hold a stack of matrices, one for each expert
    has_rank: ClassVar[bool] = True  # whether the rank that was asked for means anything to it

    def __init__(self, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout

    @classmethod
    def share(cls, sites: Sequence[Site]) -> None:
        """Called once with all sites of an adapter: put what they have in common into `site.shared`."""

    @classmethod
    def create(cls, site: Site, init: Callable[[Site], Start], dropout: float) -> Delta:
        """Build the delta for a site; `init` is only called when the delta starts from A and B."""
        start = init(site)
        return cls(start, site.scale, dropout)  # type: ignore[arg-type]

    @abstractmethod
    def factors(self) -> tuple[Float[Tensor, "*e r in"], Float[Tensor, "*e out r"]]:
        """A and B with dW = s B A, differentiable with respect to what is trained."""

    def mirrored(self, turned: bool) -> Delta:
        """This very change for another layer that shares the weight; `turned` where that reads it transposed."""
        return Mirror(self, turned)

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
        a, b = (wide(f) for f in self.factors())
        return (b @ a) * self.scale

    def row_squares(self, w: Float[Tensor, "*e out in"], base: Float[Tensor, "*e out"]) -> Float[Tensor, "*e out"]:
        """|W + dW|^2 for each row, in fp32 or wider, given |W|^2: the sum needs W A^T and no dW (see combine.Dora)."""
        a, b = (wide(f.detach()) for f in self.factors())
        cross = (wide(w @ a.to(w.dtype).mT) * b).sum(-1)
        return base + 2 * self.scale * cross + self.scale**2 * ((b @ (a @ a.mT)) * b).sum(-1)

    def norm(self) -> float:
        """|dW| (Frobenius) from the factors alone: |BA|^2 = <B^T B, A A^T>, r x r work instead of out x in."""
        a, b = (f.detach().double() for f in self.factors())
        squared = ((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0)
        return float(squared.sqrt()) * abs(self.scale)


class DenseDelta(Delta):
    """A change with structure but without two thin factors: dW = s M."""

    @abstractmethod
    def matrix(self) -> Float[Tensor, "*e out in"]:
        """M, differentiable with respect to what is trained."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """M = I M: exact, for whatever wants factors, though not thin."""
        m = self.matrix()
        return m, torch.eye(m.shape[-2], dtype=m.dtype, device=m.device).expand(*m.shape[:-1], m.shape[-2])

    def forward(self, host: nn.Module, op: Op, x: Tensor) -> Tensor:
        if self.dropout and self.training and not op.looks_up:
            x = F.dropout(x, self.dropout)
        return op.product(host, x, self.matrix() * self.scale)

    def weight(self) -> Tensor:
        return wide(self.matrix()) * self.scale

    def row_squares(self, w: Tensor, base: Tensor) -> Tensor:
        return (wide(w) + self.weight().detach()).square().sum(-1)

    def norm(self) -> float:
        return float(self.weight().detach().double().norm())


class Mirror(Delta):
    """The same change of the same weight, seen from another layer that shares it: a head tied to an embedding.

    The embedding's matrix is the head's turned, and dW with it: s B A on the one side, s A^T B^T on the other. A mirror
    owns nothing: what it shows is trained, counted and saved at its source.
    """

    source: Delta

    def __init__(self, source: Delta, turned: bool) -> None:
        super().__init__(source.scale, source.dropout)
        self.__dict__["source"] = source  # not a child: its parameters are counted once
        self.turned = turned

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = self.source.factors()
        return (b.mT, a.mT) if self.turned else (a, b)

    @property
    def rank(self) -> int:
        return self.source.rank


@DELTAS.register("lora")
class Lora(Delta):
    """dW = s B A with both factors learned (LoRA, arXiv:2106.09685, section 4.1).

    Inits that take the adapter's start out of the base (PiSSA, OLoRA) leave the base alone here. The start stays
    beside it as frozen A0 and B0, and dW = s (B A - B0 A0): the same function and the same gradients, but the base is
    still the base, other adapters may sit beside this one, and the pair [A; A0], [B, -B0] is a plain LoRA of rank 2r.
    """

    saved: ClassVar[dict[str, str]] = {"A": "lora_A", "B": "lora_B"}
    takes_init: ClassVar[bool] = True
    takes_stacks: ClassVar[bool] = True

    def __init__(self, start: Start, scale: float, dropout: float = 0.0) -> None:
        super().__init__(scale, dropout)
        self.A = nn.Parameter(start.a)
        self.B = nn.Parameter(start.b)
        self.shifted = False
        if start.shifted:
            self.begin_here()

    def begin_here(self) -> None:
        """Count dW from the factors as they are now: A0 = A, B0 = B."""
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())
        self.shifted = True

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.shifted:
            return torch.cat([self.A, self.A0], dim=-2), torch.cat([self.B, -self.B0], dim=-1)
        return self.A, self.B

    @property
    def rank(self) -> int:
        return self.A.shape[-2]
