"""INT8: each row of W as whole numbers from -127 to 127 with one fp32 scale, multiplied as whole numbers.

    forward    y = (x_q W_q^T) s_x s_w        x_q: each row of x rounded to 8 bits as it comes
    backward   dx = ((g s_w)_q W_q) s_g       the scales of W's rows are folded into g, so the same codes serve

Products of whole numbers are exact in 32 bits; all that is lost is in the rounding of W, of x and of g. A few columns
of x may be a hundred times larger than the rest and cost the others their digits; with `outliers` they are multiplied
apart, in x's own type (LLM.int8(), arXiv:2208.07339, section 3.2).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.quant.eight import multiplies, quantize_rows, turned
from veneer.quant.storage import STORAGES, Parts, Recipe, Storage, use_kernels

__all__ = ["Int8"]


class Int8(Storage):
    names = ("weight_scale",)

    def pack(self, w: Tensor, recipe: Recipe) -> Parts:
        return quantize_rows(w, torch.int8)

    def unpack(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype, recipe: Recipe) -> Tensor:
        codes, scale = parts
        return (codes.to(torch.float32) * scale[:, None]).to(dtype)

    def rows(
        self, parts: Parts, shape: tuple[int, int], index: Int[Tensor, " n"], dtype: torch.dtype, recipe: Recipe
    ) -> Tensor:
        return self.unpack((parts[0][index], parts[1][index]), (len(index), shape[1]), dtype, recipe)

    def product(self, x: Float[Tensor, "t cols"], parts: Parts, shape: tuple[int, int], recipe: Recipe) -> Tensor:
        codes, scale = parts
        if not multiplies(x, shape, "int8", recipe):
            return super().product(x, parts, shape, recipe)
        large = None if recipe.outliers is None else (x.abs() >= recipe.outliers).any(dim=0).nonzero()[:, 0]
        if large is None or not len(large):
            x_q, s = quantize_rows(x, torch.int8)
            return _scaled(int_product(x_q, codes.T), s, scale, x.dtype)
        x_q, s = quantize_rows(x.index_fill(1, large, 0), torch.int8)
        y = _scaled(int_product(x_q, codes.T), s, scale, x.dtype)
        apart = self.unpack((codes[:, large], scale), (shape[0], len(large)), x.dtype, recipe)
        return y.addmm_(x[:, large], apart.T)

    def product_back(self, g: Float[Tensor, "t rows"], parts: Parts, shape: tuple[int, int], recipe: Recipe) -> Tensor:
        codes, scale = parts
        if not multiplies(g, shape, "int8", recipe):
            return super().product_back(g, parts, shape, recipe)
        g_q, s = quantize_rows(g, torch.int8, scale)
        return _scaled(int_product(g_q, turned(codes).T), s, None, g.dtype)


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
