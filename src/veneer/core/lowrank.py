"""The one product that everything here turns on, as a single autograd function.

    forward    h = x A^T              (tokens, r)        saved: x, h
               y = x W^T + bias + s h B^T                the add happens inside the second matrix product, in place

    backward   d = g B                (tokens, r)        computed once, used twice
               dA = s d^T x,  dB = s g^T h,  dx = g W + s d A      again added inside the product

Written out by hand with autograd, the same layer makes four more passes over arrays of the output's size and keeps
what it does not need. W is frozen, so it gets no gradient and x is kept for A alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["add_product_", "low_rank_linear", "reference", "shaped"]

SMALL = 1 << 15  # outputs below this size: Python's share of an autograd function costs more than it saves


def reference(
    x: Float[Tensor, "*t n"],
    w: Float[Tensor, "out n"],
    bias: Float[Tensor, " out"] | None,
    a: Float[Tensor, "r n"],
    b: Float[Tensor, "out r"],
    s: float,
) -> Float[Tensor, "*t out"]:
    """The specification of `low_rank_linear` in one line."""
    return F.linear(x, w, bias) + F.linear(F.linear(x, a), b) * s


SCHEMA = "(Tensor(a!) y, Tensor left, Tensor right, float s) -> ()"


@torch.library.custom_op("veneer::add_product_", mutates_args=("y",), schema=SCHEMA)
def _compiled_add_product_(y: Tensor, left: Tensor, right: Tensor, s: float) -> None:
    y.addmm_(left, right, alpha=s)


def add_product_(y: Tensor, left: Tensor, right: Tensor, s: float) -> None:
    """y += s left right, in y's own memory.

    A compiler takes in-place products apart into new arrays; as an operator of our own this one stays in place.
    """
    if torch.compiler.is_compiling():
        _compiled_add_product_(y, left, right, s)
    else:
        y.addmm_(left, right, alpha=s)


def shaped(y: Tensor, *shape: int) -> Tensor:
    """y, which nobody else holds, in another shape: what a function gives so may be written into by whoever gets it
    (`out += residual`, an activation in place). Of a view that was made inside a function autograd refuses that."""
    return torch.ops.aten._unsafe_view.default(y, shape)


class LowRankLinear(torch.autograd.Function):
    """`reference` with the backward pass written above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        h = rows @ a.T  # (tokens, r)
        y = F.linear(rows, w, bias)  # (tokens, out)
        add_product_(y, h, b.T, s)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, w, a, b, h)  # a frozen A needs no x (LoRA-FA)
        ctx.s = s
        return shaped(y, *x.shape[:-1], w.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b, h = ctx.saved_tensors
        need_x, _, _, need_a, need_b, _ = ctx.needs_input_grad
        g_rows = g.reshape(-1, g.shape[-1])
        d = g_rows @ b  # (tokens, r)
        dx = None
        if need_x:
            dx = g_rows @ w
            add_product_(dx, d, a, ctx.s)
            dx = dx.view(*g.shape[:-1], w.shape[1])
        da = (d * ctx.s).T @ x.reshape(-1, x.shape[-1]) if need_a else None  # scaled while it is r wide
        db = g_rows.T @ (h * ctx.s) if need_b else None
        return dx, None, None, da, db, None


def low_rank_linear(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> Tensor:
    """x W^T + bias + s (x A^T) B^T for a frozen W; the quickest of three equal ways for this call.

    Adapters kept in a wider type than the activations are rounded to the activations' type first: they are small, and
    widening x instead would keep a second copy of it for the backward pass.
    """
    if a.dtype != x.dtype:
        a, b = a.to(x.dtype), b.to(x.dtype)
    if not torch.is_grad_enabled():
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])  # two axes: the product's memory is then its own
        y = F.linear(rows, w, bias).addmm_(F.linear(rows, a), b.T, alpha=s)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], w.shape[0])
    if x.numel() // x.shape[-1] * w.shape[0] < SMALL:
        h = F.linear(x, a)
        y = F.linear(x, w, bias)
        if y.ndim == 2:
            return torch.addmm(y, h, b.T, alpha=s)
        return y + F.linear(h, b) * s
    return LowRankLinear.apply(x, w, bias, a, b, s)
