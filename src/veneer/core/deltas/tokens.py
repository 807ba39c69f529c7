"""Chosen rows of an embedding: train the tokens that are new and leave all others as they are.

What is learned is one change for each row; the table itself, of the vocabulary's size, is never copied and gets no
gradient. `LoRA(token_rows=...)` puts this on the input embedding, beside a LoRA on other layers. A head that is tied to
the embedding shows the same rows (`mirrored`), so that a new token can be read and be said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from veneer.core.delta import DELTAS, Delta, DenseDelta
from veneer.core.init import Site, Start
from veneer.core.op import LinearOp, Op
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
    has_rank: ClassVar[bool] = False

    rows: Tensor
    change: Tensor

    def __init__(self, rows: Tensor, change: Tensor, size: int, looks_up: bool = True) -> None:
        super().__init__(1.0, 0.0)
        self.register_buffer("rows", rows, persistent=False)
        self.change = nn.Parameter(change)  # (rows, width)
        self.size, self.looks_up = size, looks_up

    @classmethod
    def create(cls, site: Site, init: Callable[[Site], Start], dropout: float) -> TokenRows:
        out, n = site.shape
        vocabulary, width = (n, out) if site.op.looks_up else (out, n)
        rows = sorted(set(site.options["rows"]))
        if not rows or rows[0] < 0 or rows[-1] >= vocabulary:
            shown = ", ".join(map(str, rows[-3:])) or "none"
            raise ConfigError(
                f"token rows go from 0 to {vocabulary - 1} here, and {shown} cannot be trained",
                where=site.name,
                fix="name tokens of this vocabulary; for new ones call model.resize_token_embeddings(n) first",
            )
        change = torch.zeros(len(rows), width, dtype=site.dtype, device=site.device)
        return cls(torch.tensor(rows, device=site.device), change, vocabulary, site.op.looks_up)

    def mirrored(self, turned: bool) -> Delta:
        return MirroredRows(self, turned)

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
        """A look-up in a table of the chosen rows and one row of zeros, or a product with the chosen rows alone; no
        matrix of the vocabulary's size is made."""
        if op.looks_up:
            place = torch.searchsorted(self.rows, x).clamp_max(self.rank - 1)
            chosen = (self.rows[place] == x)[..., None] * self.scale
            return op._scaled(host, self.change[place] * chosen)  # type: ignore[attr-defined]
        if not isinstance(op, LinearOp):
            return super(DenseDelta, self).forward(host, op, x)
        h = F.linear(x, self.change.to(x.dtype)) * self.scale  # (..., rows)
        return h.new_zeros(*h.shape[:-1], self.size).index_copy(-1, self.rows, h)


class MirroredRows(TokenRows):
    """The same rows, seen from a layer that shares the weight. It owns nothing, as any Mirror."""

    source: TokenRows

    def __init__(self, source: TokenRows, turned: bool) -> None:
        Delta.__init__(self, source.scale)
        self.__dict__["source"] = source
        self.size, self.looks_up = source.size, source.looks_up != turned

    @property
    def change(self) -> Tensor:  # type: ignore[override]
        return self.source.change

    @property
    def rows(self) -> Tensor:  # type: ignore[override]
        return self.source.rows
