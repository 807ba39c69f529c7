"""INT8: each row of W as whole numbers from -127 to 127 with one fp32 scale, multiplied as whole numbers.

Products of whole numbers are exact in 32 bits; all that is lost is in the rounding of W, of x and of g. Columns of x
that are far larger than the rest would cost the others their digits. `rotate` (eight.py) spreads them and is the
default; with `outliers` they are multiplied apart instead, in x's own type (LLM.int8(), arXiv:2208.07339, section 3.2).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.quant.eight import RowScaled
from veneer.quant.storage import STORAGES, Parts, Recipe, use_kernels

__all__ = ["Int8"]


class Int8(RowScaled):
    kind, code, held = "int8", torch.int8, torch.int8
    rotates = True

    def multiply(self, a: Tensor, rows: Tensor, b: Tensor, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
        return _scaled(int_product(a, b), rows, columns, dtype)

    def width(self, cols: int, recipe: Recipe) -> int:
        return super().width(cols, recipe) if recipe.outliers is None else 1

    def product(self, x: Float[Tensor, "t cols"], parts: Parts, shape: tuple[int, int], recipe: Recipe) -> Tensor:
        if recipe.outliers is None or self._way(x, shape, recipe) is None:
            return super().product(x, parts, shape, recipe)
        large = (x.abs() >= recipe.outliers).any(dim=0).nonzero()[:, 0]
        if not len(large):
            return super().product(x, parts, shape, recipe)
        codes, scale = parts
        y = super().product(x.index_fill(1, large, 0), parts, shape, recipe)
        apart = self.unpack((codes[:, large], scale), (shape[0], len(large)), x.dtype, recipe)
        return y.addmm_(x[:, large], apart.T)


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
