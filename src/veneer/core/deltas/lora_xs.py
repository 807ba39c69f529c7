"""LoRA-XS: an r x r matrix between frozen factors (arXiv:2405.17604)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.delta import DELTAS, Delta
from veneer.core.init import Site, Start, unset

__all__ = ["LoraXS"]


@DELTAS.register("lora_xs")
class LoraXS(Delta):
    """dW = s B R A with A and B from the top r singular directions of W, frozen, and only R (r, r) learned.

    B = U S and A = V^T (section 3). R starts at zero where the paper draws it very small: its gradient does not
    vanish there, since A and B do not, and the start is then exactly the base.
    """

    saved: ClassVar[dict[str, str]] = {"A": "lora_A", "B": "lora_B", "R": "lora_R"}

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__(scale, dropout)
        self.register_buffer("A", a)
        self.register_buffer("B", b)
        self.R = nn.Parameter(a.new_zeros(a.shape[0], a.shape[0]))

    @classmethod
    def create(cls, site: Site, init: Callable[[Site], Start], dropout: float) -> Delta:
        if init is unset:
            return cls(*site.empty(), site.scale, dropout)
        u, s, vh = torch.linalg.svd(site.matrix(), full_matrices=False)
        a, b = vh[: site.rank], u[:, : site.rank] * s[: site.rank]
        return cls(a.to(site.dtype).contiguous(), b.to(site.dtype).contiguous(), site.scale, dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.R @ self.A, self.B
