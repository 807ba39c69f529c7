"""Parts of a fused matrix: q and v inside one q-k-v weight, each with factors of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.delta import DELTAS, Delta
from veneer.core.init import Site, Start, unset
from veneer.errors import ConfigError

__all__ = ["FusedLora"]


@DELTAS.register("fused")
class FusedLora(Delta):
    """dW holds s B_i A_i in the output rows of part i and zero in all others.

    options["parts"] lists the parts, each as (start, stop) rows or as several such ranges where a part is scattered
    (heads that interleave q, k and v). The parts have factors of their own, as if q and v were separate layers; in a
    file they are one plain LoRA whose rank is the sum, with zeros in B.
    """

    saved: ClassVar[dict[str, str]] = {"A": "lora_A", "B": "lora_B"}
    options: ClassVar[dict[str, object]] = {"parts": ()}

    def __init__(self, a: Tensor, b: Tensor, rows: Tensor, sizes: Sequence[int], out: int, scale: float, p: float):
        super().__init__(scale, p)
        self.A = nn.Parameter(a)  # (parts * r, in)
        self.B = nn.Parameter(b)  # (rows of all parts, r)
        self.register_buffer("rows", rows, persistent=False)  # which output each row of B belongs to
        self.sizes, self.out = tuple(sizes), out

    @classmethod
    def create(cls, site: Site, init: Callable[[Site], Start], dropout: float) -> Delta:
        out, n = site.shape
        parts = [_rows(part, out, site.name) for part in site.options["parts"]]
        if not parts:
            raise ConfigError("delta 'fused' needs options={'parts': [(start, stop), ...]}", where=site.name)
        rows = torch.cat(parts).to(site.device)
        if len(rows.unique()) < len(rows):
            raise ConfigError("two parts of a fused layer share an output row", where=site.name)
        like = {"dtype": site.dtype, "device": site.device}
        a, b = torch.empty(len(parts) * site.rank, n, **like), torch.empty(len(rows), site.rank, **like)
        if init is not unset:
            a.uniform_(-(n**-0.5), n**-0.5)
            b.zero_()
        return cls(a, b, rows, [len(p) for p in parts], out, site.scale, dropout)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        blocks = torch.block_diag(*self.B.split(self.sizes))  # (rows of all parts, parts * r)
        return self.A, blocks.new_zeros(self.out, self.rank).index_copy(0, self.rows, blocks)


def _rows(part: Sequence[int] | Sequence[Sequence[int]], out: int, where: str) -> Tensor:
    ranges = [part] if isinstance(part[0], int) else part
    picked = torch.cat([torch.arange(start, stop) for start, stop in ranges])  # type: ignore[misc]
    if not len(picked) or int(picked.min()) < 0 or int(picked.max()) >= out:
        raise ConfigError(f"part {part} does not lie within the {out} outputs", where=where)
    return picked
