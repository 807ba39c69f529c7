"""The product with a packed matrix, as one autograd function.

    forward    y = x W^T + bias + s (x A^T) B^T        saved: the packed parts; x and h = x A^T only where A is trained
    backward   dx = g W + s (g B) A,  dA and dB as in core/lowrank.py

No dense copy of W outlives a product: what is saved is what lies in the layer anyway, and where only dx is wanted
nothing of x. Without the function autograd would keep the unpacked matrix of every layer from the forward pass to the
backward pass, and the base in 4 bits would need more memory than one in 16.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.core.lowrank import add_product_, shaped
from veneer.quant.storage import Parts, Recipe, storage_of

__all__ = ["packed_linear"]


class PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        s: float,
        shape: tuple[int, int],
        recipe: tuple[Any, ...],
        *parts: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = storage_of(Recipe(*recipe)).product(rows, parts, shape, Recipe(*recipe))  # (tokens, out)
        if bias is not None:
            y += bias
        h = None
        if a is not None and b is not None:
            h = rows @ a.T  # (tokens, r)
            add_product_(y, h, b.T, s)
        ctx.save_for_backward(x if a is not None else None, a, b, h, *parts)
        ctx.s, ctx.shape, ctx.recipe, ctx.x_shape = s, shape, recipe, x.shape
        return shaped(y, *x.shape[:-1], shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, a, b, h, *parts = ctx.saved_tensors
        need_x, _, need_a, need_b, *_ = ctx.needs_input_grad
        rows = g.reshape(-1, g.shape[-1])
        d = rows @ b if b is not None else None  # (tokens, r)
        dx = None
        if need_x:
            recipe = Recipe(*ctx.recipe)
            dx = storage_of(recipe).product_back(rows, tuple(parts), ctx.shape, recipe)
            if d is not None:
                add_product_(dx, d, a, ctx.s)
            dx = dx.view(ctx.x_shape)
        da = (d * ctx.s).T @ x.reshape(-1, x.shape[-1]) if need_a and d is not None else None
        db = rows.T @ (h * ctx.s) if need_b else None
        return dx, None, da, db, None, None, None, *[None] * len(parts)


def packed_linear(
    x: Float[Tensor, "*t cols"],
    parts: Parts,
    shape: tuple[int, int],
    recipe: Recipe,
    bias: Float[Tensor, " rows"] | None = None,
    factors: tuple[Tensor, Tensor, float] | None = None,
) -> Float[Tensor, "*t rows"]:
    """x W^T + bias, and s (x A^T) B^T on top where factors (A, B, s) are given. W and the bias are frozen."""
    a, b, s = factors if factors is not None else (None, None, 0.0)
    if a is not None and b is not None and a.dtype != x.dtype:
        a, b = a.to(x.dtype), b.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return PackedLinear.apply(x, bias, a, b, s, shape, tuple(recipe), *parts)
