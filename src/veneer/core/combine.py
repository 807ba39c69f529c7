"""How the base and the delta become one layer.

    add     W + dW                                   LoRA (arXiv:2106.09685, eq. 3)
    dora    m (W + dW) / |W + dW|_row                DoRA (arXiv:2402.09353, eq. 5), m learned, one value an output row

A rule says two things: how it changes an output (`change`) and what the weight becomes (`weight`). The law test holds
the two together for every layer kind and every delta, so neither is written a second time anywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veneer.core.delta import Delta, wide
from veneer.core.init import Site
from veneer.core.leaf import own_parameters
from veneer.core.op import Op
from veneer.core.registry import Registry
from veneer.core.weight import read_weight

__all__ = ["COMBINES", "Add", "Combine", "Dora"]

COMBINES: Registry[type[Combine]] = Registry("combine rule")


class Combine(nn.Module, ABC):
    """A rule for joining the base's weight and a delta."""

    saved: ClassVar[dict[str, str]] = {}

    def __init__(self, site: Site, delta: Delta) -> None:
        super().__init__()

    @abstractmethod
    def change(self, host: nn.Module, op: Op, delta: Delta, x: Tensor, y: Tensor) -> Tensor:
        """What to add to the base's output y. Zero, bit for bit, as long as the rule leaves the weight as it is."""

    @abstractmethod
    def weight(self, w: Float[Tensor, "*e out in"], delta: Delta) -> Float[Tensor, "*e out in"]:
        """The combined weight matrix, in w's type (fp32 or wider when merging)."""

    def forward(self, host: nn.Module, op: Op, delta: Delta, x: Tensor, y: Tensor) -> Tensor:
        return y + self.change(host, op, delta, x, y)


@COMBINES.register("add")
class Add(Combine):
    def change(self, host: nn.Module, op: Op, delta: Delta, x: Tensor, y: Tensor) -> Tensor:
        return delta(host, op, x).to(y.dtype)

    def weight(self, w: Tensor, delta: Delta) -> Tensor:
        return w + delta.weight().to(w.dtype)


@COMBINES.register("dora")
class Dora(Combine):
    """Direction and magnitude apart. The norm is a constant of the backward pass (the paper's section 4.3).

    The norm needs neither dW nor a dense copy of W:

        |W + s B A|^2 = |W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>          row by row

    |W|^2 never changes and is kept; W A^T is r columns. For frozen factors the whole norm is kept, so that
    generating a token does not pay for it again.
    """

    saved: ClassVar[dict[str, str]] = {"magnitude": "lora_magnitude_vector"}

    def __init__(self, site: Site, delta: Delta) -> None:
        super().__init__(site, delta)
        like = next(delta.parameters())
        self._base: tuple[object, Tensor] | None = None  # |W|^2 by row, for the weight with this identity
        self._norm: tuple[object, Tensor] | None = None  # |W + dW| by row, for these values of the factors
        self.magnitude = nn.Parameter(self.norm(site.host, site.op, delta).to(like.dtype))

    def change(self, host: nn.Module, op: Op, delta: Delta, x: Tensor, y: Tensor) -> Tensor:
        gain = op.per_channel(host, self.gain(host, op, delta).to(y.dtype))
        bias = getattr(host, "bias", None)
        direction = y if bias is None else y - op.per_channel(host, bias).to(y.dtype)
        return (gain - 1) * direction + gain * delta(host, op, x).to(y.dtype)  # (gain - 1): exact at the start

    def weight(self, w: Tensor, delta: Delta) -> Tensor:
        direction = w + delta.weight().to(w.dtype)
        gain = self.magnitude.to(w.dtype) / direction.detach().norm(dim=-1).clamp_min(torch.finfo(w.dtype).tiny)
        return gain[..., None] * direction

    def gain(self, host: nn.Module, op: Op, delta: Delta) -> Float[Tensor, " out"]:
        """m / |W + dW|, differentiable in m alone. The norm is kept only for frozen factors: trained ones may be
        written through `.data` (averaging does), which leaves no trace to notice."""
        if torch.compiler.is_compiling() or any(p.requires_grad for p in delta.parameters()):
            self._norm = None
            return self.magnitude / self.norm(host, op, delta).to(self.magnitude.dtype)
        state = identity(host), *((p.data_ptr(), p._version) for p in delta.parameters())
        if self._norm is None or self._norm[0] != state:
            self._norm = state, self.norm(host, op, delta).to(self.magnitude.dtype)
        return self.magnitude / self._norm[1]

    @torch.no_grad()
    def norm(self, host: nn.Module, op: Op, delta: Delta) -> Float[Tensor, "*e out"]:
        """|W + dW| for each row, in fp32 or wider, without forming dW."""
        w = op.to_matrix(host, read_weight(host))
        if self._base is None or not (torch.compiler.is_compiling() or self._base[0] == identity(host)):
            self._base = identity(host), wide(w).square().sum(-1)
        squared = delta.row_squares(w, self._base[1])
        return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()


def identity(host: nn.Module) -> tuple[object, ...]:
    """Changes whenever the frozen weight of `host` is written, replaced or moved."""
    return tuple((p.data_ptr(), p._version, p.device) for p in own_parameters(host).values() if p is not None)
