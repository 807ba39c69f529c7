"""What lies between the matrix products of a decoder block, each piece as one pass over memory.

    piece          computes                                                  keeps for its backward
    rms_norm       x / sqrt(mean x^2 + eps) * (w + offset)                   x and one number a row
    glu            act(gate) * up                                            gate and up; the product is rebuilt
    activated      act(x), for units without a gate                          x
    rotate         rotary positions                                          nothing: back is the other way round
    add_product    c + h B^T for a thin B                                    nothing
    column_products  sum over tokens of g (y - bias): a gain's gradient      nothing
    token_losses_  cross entropy of logits, which become their gradient      nothing

These functions are the specification. On a GPU the kernels of cuda.py do the same without intermediate tensors in
memory; they are held to this file by tests. VENEER_KERNELS=plain keeps a GPU on these.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "Pair",
    "Rounding",
    "activated",
    "activated_back",
    "add_product",
    "column_products",
    "glu",
    "glu_back",
    "kernels_for",
    "rms_norm",
    "rms_norm_back",
    "rotate",
    "thin_glu",
    "thin_glu_back",
    "token_losses_",
]

Pair = tuple[Tensor, Tensor] | None
"""h (tokens, r) and B (out, r) of an adapter, where there is one."""

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def kernels_for(x: Tensor) -> Any:
    """The module whose functions run for `x`: this one, or its twin for GPUs."""
    return _gpu() if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32) else _plain()


def _plain() -> ModuleType:
    return sys.modules[__name__]


@cache
def _gpu() -> ModuleType:
    if os.environ.get("VENEER_KERNELS") == "plain" or find_spec("triton") is None:
        return _plain()
    from veneer.kernels import cuda

    return cuda


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


# ------------------------------------------------------------------ norms


def rms_norm(
    x: Float[Tensor, "t n"],
    w: Float[Tensor, " n"],
    eps: float,
    offset: float = 0.0,
    rstd: Tensor | None = None,
    rounded: torch.dtype | None = None,
    plus: Float[Tensor, "t n"] | None = None,
) -> tuple[Float[Tensor, "t n"], Float[Tensor, " t"]]:
    """The normed rows and 1 / their size; `rstd` where that is known already. `plus` is added to x first, in x's own
    memory. `rounded`: the 8-bit type to which the next product rounds the rows; a GPU does so in the same pass."""
    if plus is not None:
        x.add_(plus)
    wide = _wide(x)
    if rstd is None:
        rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    normed = wide * rstd[:, None]
    if offset:  # Gemma multiplies before it rounds, Llama after
        return (normed * (_wide(w) + offset)).to(x.dtype), rstd
    return normed.to(x.dtype) * w, rstd


def rms_norm_back(
    g: Float[Tensor, "t n"],
    x: Float[Tensor, "t n"],
    rstd: Float[Tensor, " t"],
    w: Float[Tensor, " n"],
    offset: float = 0.0,
    plus: Float[Tensor, "t n"] | None = None,
    out: Float[Tensor, "t n"] | None = None,
) -> Float[Tensor, "t n"]:
    """The gradient of x, and `plus` on top: what flows past the norm beside it; in `out`, where that is given."""
    normed = _wide(x) * rstd[:, None]
    wg = _wide(g) * (_wide(w) + offset)
    dx = rstd[:, None] * (wg - normed * (wg * normed).mean(-1, keepdim=True))
    dx = (dx if plus is None else dx + _wide(plus)).to(x.dtype)
    return dx if out is None else out.copy_(dx)


# ------------------------------------------------------------------ gated units


def _activate(x: Tensor, act: str) -> Tensor:
    if act == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[act](x)


def glu(gate: Float[Tensor, "t m"], up: Float[Tensor, "t m"], act: str) -> Float[Tensor, "t m"]:
    return _activate(gate, act) * up


def glu_back(
    g: Float[Tensor, "t m"],
    gate: Float[Tensor, "t m"],
    up: Float[Tensor, "t m"],
    act: str,
    d_gate: Tensor,
    d_up: Tensor,
) -> Float[Tensor, "t m"]:
    """Writes the two gradients where they are wanted and returns act(gate) * up, rebuilt. `d_gate` may be `g`."""
    wide, w = _wide(gate), _wide(g)
    y = _activate(wide, act)
    product, own = (y * up).to(gate.dtype), activated_back(w * up, wide, act)
    d_up.copy_(w.mul(y))  # before the gate's, which may take g's place
    d_gate.copy_(own)
    return product


def activated(x: Float[Tensor, "t m"], act: str) -> Float[Tensor, "t m"]:
    """A unit without a gate: its activation is one pass over memory wherever torch runs, forwards and backwards."""
    return _activate(x, act)


def activated_back(g: Float[Tensor, "t m"], x: Float[Tensor, "t m"], act: str) -> Float[Tensor, "t m"]:
    """The gradient of x."""
    if act == "silu":
        return torch.ops.aten.silu_backward(g, x)
    if act == "relu":
        return torch.ops.aten.threshold_backward(g, x, 0)
    return torch.ops.aten.gelu_backward(g, x, approximate="tanh" if act == "gelu_tanh" else "none")


def thin_glu(
    gate: Tensor, up: Tensor, act: str, gate_thin: Pair, up_thin: Pair,
    rounded: torch.dtype | None = None, a: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`glu` of gate + h B^T and up + h B^T: the adapters' share is added where it is used, and never written. Nor is it
    rounded there: most of a young adapter's would be lost.

    `rounded`: the 8-bit type to which the next product rounds the result, and `a` its layer's A. A GPU does both in one
    pass, and gives their product as well."""
    return glu(_with(gate, gate_thin), _with(up, up_thin), act).to(gate.dtype), None


class Rounding(NamedTuple):
    """How the gradients of gate and up are going to be rounded, and what else reads them."""

    dtype: torch.dtype
    columns: tuple[Tensor, ...]  # what they are multiplied by before, each column
    bs: tuple[Tensor | None, ...]  # each layer's B


def thin_glu_back(
    g: Tensor, gate: Tensor, up: Tensor, act: str, d_gate: Tensor, d_up: Tensor,
    gate_thin: Pair, up_thin: Pair, down: Pair, rounding: Rounding | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`glu_back` of the same, with g + d A for the gradient that arrives; `down` is (d, A). Instead of the product it
    returns what that is needed for: d^T product (r, m), and h^T d_gate and h^T d_up, transposed to (m, r).

    `rounding`: a GPU rounds d_gate and d_up in passing, and gives their products with the Bs, side by side."""
    g = g if down is None else _with(g, (down[0], down[1].T))
    product = glu_back(g, _with(gate, gate_thin), _with(up, up_thin), act, d_gate, d_up).to(gate.dtype)
    da = None if down is None else down[0].T @ product
    return da, *(None if t is None else d.T @ t[0] for t, d in ((gate_thin, d_gate), (up_thin, d_up))), None


def _with(y: Tensor, thin: Pair) -> Tensor:
    return y if thin is None else torch.addmm(_wide(y), _wide(thin[0]), _wide(thin[1]).T)


# ------------------------------------------------------------------ rotary positions


def rotate(
    x: Float[Tensor, "batch p heads d"],
    cos: Float[Tensor, "rows d"],
    sin: Float[Tensor, "rows d"],
    out: Float[Tensor, "batch p heads d"],
    back: bool = False,
    thin: Pair = None,
    pairs: bool = False,
) -> Tensor:
    """x cos + turned(x) sin, with `turned` (a, b) -> (-b, a) on halves, or on neighbours where `pairs` says so (FLUX);
    `back` is the transpose. `out` may be x.

    cos and sin hold a row for each position, or for each position of each row of the batch. `thin`: of x + h B^T.
    """
    if pairs:
        turned = rotate(_halved(x), _halved(cos), _halved(sin), torch.empty_like(x), back)
        return out.copy_(turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2))
    if thin is not None:
        x = _with(x.reshape(-1, thin[1].shape[0]), thin).view(x.shape)
    shape = (-1, x.shape[1], 1, x.shape[-1])
    half = x.shape[-1] // 2
    (c1, c2), (s1, s2) = (_wide(t).view(shape).split(half, -1) for t in (cos, sin))
    a, b = _wide(x[..., :half]), _wide(x[..., half:])
    if back:
        first, second = a * c1 + b * s2, b * c2 - a * s1
    else:
        first, second = a * c1 - b * s1, b * c2 + a * s2
    out[..., :half] = first.to(out.dtype)
    out[..., half:] = second.to(out.dtype)
    return out


def _halved(t: Tensor) -> Tensor:
    """Neighbours (a1, b1, a2, b2, ..) as halves (a1, a2, .., b1, b2, ..)."""
    return t.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


# ------------------------------------------------------------------ thin products


def add_product(
    c: Float[Tensor, "t out"] | None, h: Float[Tensor, "t r"], b: Float[Tensor, "out r"], y: Tensor | None = None
) -> Float[Tensor, "t out"]:
    """c + h B^T in fresh memory, or y + c + h B^T in y's; a y of another type is one that has not been rounded yet, and
    the sum is, in memory of its own."""
    if y is not None and y.dtype != h.dtype:
        total = torch.addmm(y, h.to(y.dtype), b.T.to(y.dtype))
        return (total if c is None else total.add_(c)).to(h.dtype)
    if y is None:
        assert c is not None
        return torch.addmm(c, h, b.T)
    return (y if c is None else y.add_(c)).addmm_(h, b.T)


def column_products(
    g: Float[Tensor, "t out"], y: Float[Tensor, "t out"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, " out"]:
    """The sum of g (y - bias) over the tokens, in fp32 or wider; a part of them at a time."""
    total = torch.zeros_like(g[:0].sum(0), dtype=torch.promote_types(g.dtype, torch.float32))
    for few, own in zip(g.split(1024), y.split(1024), strict=True):
        total += (_wide(few) * (_wide(own) if bias is None else _wide(own) - bias)).sum(0)
    return total


# ------------------------------------------------------------------ the loss


def token_losses_(logits: Float[Tensor, "t v"], labels: Int[Tensor, " t"]) -> Float[Tensor, " t"]:
    """Each row's cross entropy. The logits' memory then holds the gradient of the sum of these."""
    wide = _wide(logits)
    size = torch.logsumexp(wide, -1, keepdim=True)
    losses = size[:, 0] - wide.gather(1, labels[:, None])[:, 0]
    d = (wide - size).exp()
    d.scatter_add_(1, labels[:, None], -torch.ones_like(d[:, :1]))
    logits.copy_(d)
    return losses
