"""AdaLoRA: an SVD-shaped change whose singular values can be switched off one by one (arXiv:2303.10512)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veneer.core.delta import DELTAS, Delta
from veneer.core.init import Site, Start

__all__ = ["AdaLora"]


@DELTAS.register("adalora")
class AdaLora(Delta):
    """dW = s P diag(E) Q (eq. 3), written here as B diag(E) A.

    A and B start normal with deviation 0.02 and E at zero, so the start is the base. Which entries of E stay is
    decided during training by `veneer.core.allocate`; an entry set to zero costs nothing in a saved file, because
    only the others are written.
    """

    saved: ClassVar[dict[str, str]] = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}
    options: ClassVar[dict[str, Any]] = {  # how `veneer.core.allocate` is to share the ranks out; None: by rule
        "target_rank": None,
        "warmup": 0.1,
        "final": 0.3,
        "every": None,
        "beta1": 0.85,
        "beta2": 0.85,
        "orthogonality": 0.5,
    }

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__(scale, dropout)
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)
        self.E = nn.Parameter(a.new_zeros(a.shape[0], 1))

    @classmethod
    def create(cls, site: Site, init: Callable[[Site], Start], dropout: float) -> Delta:
        a, b = site.empty()
        return cls(a.normal_(std=0.02), b.normal_(std=0.02), site.scale, dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.E * self.A, self.B

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def real_rank(self) -> int:
        """How many singular values are still switched on."""
        return int(self.E.count_nonzero())

    def orthogonality(self) -> Float[Tensor, ""]:
        """|A A^T - I|^2 + |B^T B - I|^2 (eq. 4): keeps the entries of E comparable."""
        eye = torch.eye(self.rank, dtype=self.A.dtype, device=self.A.device)
        return (self.A @ self.A.T - eye).square().sum() + (self.B.T @ self.B - eye).square().sum()
