"""INT8: each row of W as whole numbers from -127 to 127 with one fp32 scale, multiplied as whole numbers.

Products of whole numbers are exact in 32 bits; all that is lost is in the rounding of W, of x and of g. Columns of x
that are far larger than the rest would cost the others their digits, so `rotate` (eight.py) is the default.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from veneer.quant.eight import RowScaled
from veneer.quant.storage import STORAGES, use_kernels

__all__ = ["Int8"]


class Int8(RowScaled):
    kind, code, held = "int8", torch.int8, torch.int8
    rotates = True

    def step(self, q: Tensor, scale: Tensor) -> Tensor:
        return scale / 2

    def multiply(self, a: Tensor, rows: Tensor, b: Tensor, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
        return _scaled(int_product(a, b), rows, columns, dtype)


STORAGES["int8"] = Int8()


def _scaled(whole: Tensor, rows: Tensor, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
    if not torch.compiler.is_compiling() and use_kernels(whole):
        from veneer.quant.cuda import rescale

        return rescale(whole, rows, columns, dtype)
    y = whole * rows[:, None]
    return (y if columns is None else y * columns).to(dtype)


def int_product(a: Int[Tensor, "t n"], b: Int[Tensor, "n m"]) -> Int[Tensor, "t m"]:
    """Whole numbers, exactly. A GPU wants more than 16 rows."""
    if a.is_cuda and a.shape[0] <= 16:
        more = torch.nn.functional.pad(a, (0, 0, 0, 32 - a.shape[0]))
        return torch._int_mm(more, b)[: a.shape[0]]
    return torch._int_mm(a, b)
