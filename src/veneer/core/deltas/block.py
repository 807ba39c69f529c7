"""Block-diagonal factors: every block of inputs feeds its own block of outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.delta import DELTAS, Delta
from veneer.core.init import Site, Start, unset
from veneer.errors import ConfigError

__all__ = ["BlockLora"]


@DELTAS.register("block")
class BlockLora(Delta):
    """dW = s diag(B1 A1, ..., Bk Ak): k blocks of rank r/k. A split of the layer over k devices needs no exchange."""

    saved: ClassVar[dict[str, str]] = {"A": "block_A", "B": "block_B"}
    options: ClassVar[dict[str, object]] = {"blocks": 2}

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__(scale, dropout)
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)  # (k, r/k, in/k), (k, out/k, r/k)

    @classmethod
    def create(cls, site: Site, init: Callable[[Site], Start], dropout: float) -> Delta:
        k, (out, n) = int(site.options["blocks"]), site.shape
        if any(size % k for size in (out, n, site.rank)):
            raise ConfigError(
                f"{k} blocks do not divide a {out} x {n} layer at rank {site.rank}", where=site.name, fix="options"
            )
        a, b = (
            torch.empty(k, rows, columns, dtype=site.dtype, device=site.device)
            for rows, columns in ((site.rank // k, n // k), (out // k, site.rank // k))
        )
        if init is not unset:
            bound = (n // k) ** -0.5
            a.uniform_(-bound, bound)
            b.zero_()
        return cls(a, b, site.scale, dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        return torch.block_diag(*self.A), torch.block_diag(*self.B)
