"""Chosen rows of an embedding: train the tokens that are new and leave all others as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veneer.core.delta import DELTAS, DenseDelta
from veneer.core.init import Site, Start
from veneer.core.op import Op
from veneer.errors import ConfigError

__all__ = ["TokenRows"]


@DELTAS.register("tokens")
class TokenRows(DenseDelta):
    """dW is zero but for the rows of `options["rows"]`, each with a change of its own of the embedding's width.

    On an embedding these are rows of the stored weight; on a head (a Linear from hidden states to the vocabulary) they
    are the outputs of the same tokens.
    """

    saved: ClassVar[dict[str, str]] = {"change": "token_adapter.trainable_tokens_delta"}
    options: ClassVar[dict[str, object]] = {"rows": ()}

    def __init__(self, rows: Tensor, change: Tensor, size: int, dropout: float = 0.0) -> None:
        super().__init__(1.0, 0.0)
        self.register_buffer("rows", rows, persistent=False)
        self.change = nn.Parameter(change)  # (rows, width)
        self.size = size

    @classmethod
    def create(cls, site: Site, init: Callable[[Site], Start], dropout: float) -> TokenRows:
        out, n = site.shape
        vocabulary, width = (n, out) if site.op.looks_up else (out, n)
        rows = sorted(set(site.options["rows"]))
        if not rows or rows[0] < 0 or rows[-1] >= vocabulary:
            raise ConfigError(
                f"options['rows'] must name tokens from 0 to {vocabulary - 1}, got {rows[:3]}...{rows[-1:]}",
                where=site.name,
            )
        change = torch.zeros(len(rows), width, dtype=site.dtype, device=site.device)
        delta = cls(torch.tensor(rows, device=site.device), change, vocabulary)
        delta.looks_up = site.op.looks_up
        return delta

    looks_up = True

    @property
    def rank(self) -> int:
        return self.change.shape[0]

    def matrix(self) -> Float[Tensor, "out in"]:
        full = self.change.new_zeros(self.size, self.change.shape[1]).index_copy(0, self.rows, self.change)
        return full.T if self.looks_up else full

    def factors(self) -> tuple[Tensor, Tensor]:
        pick = self.change.new_zeros(self.rank, self.size)
        pick[torch.arange(self.rank), self.rows] = 1
        return (pick, self.change.T) if self.looks_up else (self.change, pick.T)

    def forward(self, host: nn.Module, op: Op, x: Tensor) -> Tensor:
        """A look-up in a table of the chosen rows and one row of zeros; nothing of the vocabulary's size is made."""
        if not op.looks_up:
            return super(DenseDelta, self).forward(host, op, x)
        place = torch.searchsorted(self.rows, x).clamp_max(self.rank - 1)
        chosen = (self.rows[place] == x)[..., None]
        return op._scaled(host, self.change[place] * chosen)  # type: ignore[attr-defined]
