"""FP8: each row of W as e4m3 floats with one fp32 scale, multiplied as such (Hopper, Ada and later).

The layout of the two products is INT8's: x is rounded row by row as it comes, and in the backward pass the scales of
W's rows are folded into g before that is rounded. e4m3 keeps three bits after the leading one at every size, where
INT8 keeps a fixed step; a row with a few large values suffers less.

The instruction wants its right matrix by columns. W^T is, by nature; W itself is turned for each backward pass, which
costs about a fiftieth of a step and saves a second copy of the codes.

The codes are kept as bytes. As a floating-point type they would be taken for ordinary weights by whoever asks a model
for its type, turns it to another one, or pickles it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.quant.eight import multiplies, quantize_rows, turned
from veneer.quant.storage import STORAGES, Parts, Recipe, Storage

__all__ = ["Fp8"]

E4M3 = torch.float8_e4m3fn


class Fp8(Storage):
    names = ("weight_scale",)

    def pack(self, w: Tensor, recipe: Recipe) -> Parts:
        codes, scale = quantize_rows(w, E4M3)
        return codes.view(torch.uint8), scale

    def unpack(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype, recipe: Recipe) -> Tensor:
        return (parts[0].view(E4M3).to(torch.float32) * parts[1][:, None]).to(dtype)

    def rows(
        self, parts: Parts, shape: tuple[int, int], index: Int[Tensor, " n"], dtype: torch.dtype, recipe: Recipe
    ) -> Tensor:
        return self.unpack((parts[0][index], parts[1][index]), (len(index), shape[1]), dtype, recipe)

    def product(self, x: Float[Tensor, "t cols"], parts: Parts, shape: tuple[int, int], recipe: Recipe) -> Tensor:
        codes, scale = parts
        if not multiplies(x, shape, "fp8", recipe):
            return super().product(x, parts, shape, recipe)
        x_q, s = quantize_rows(x, E4M3)
        return _product(x_q, s, codes.view(E4M3).t(), scale, x.dtype)

    def product_back(self, g: Float[Tensor, "t rows"], parts: Parts, shape: tuple[int, int], recipe: Recipe) -> Tensor:
        codes, scale = parts
        if not multiplies(g, shape, "fp8", recipe):
            return super().product_back(g, parts, shape, recipe)
        g_q, s = quantize_rows(g, E4M3, scale)
        return _product(g_q, s, turned(codes).view(E4M3).t(), scale.new_ones(shape[1]), g.dtype)


STORAGES["fp8"] = Fp8()


def _product(a: Tensor, rows: Tensor, b: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch._scaled_mm(a, b, rows[:, None], columns[None, :], out_dtype=torch.bfloat16, use_fast_accum=True)
    return out.to(dtype)
