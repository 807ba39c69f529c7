"""What lies between the products of a UNet or an image transformer, each piece as one or two passes over memory.

    piece         computes                                                 keeps for its backward
    layer_norm    (x - mean) / size * w + b over rows; w and b are one     x and two numbers a row
                  row, or a row for each picture
    group_norm    the same over groups of channels of an image, and SiLU   x and two numbers a group
    add_channels  y + x + a number for each channel, in y's memory         nothing
    convolved     a convolution by a frozen weight                         nothing; autograd keeps its input

Images are (batch, places, channels) here, channels last: what convolutions on a GPU read and write without turning
anything round, and what attention reads as it is. These functions are the specification; cuda_image.py does the same
on a GPU.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from veneer.kernels.pieces import _wide, kernels_for

__all__ = [
    "GroupStats",
    "add_channels",
    "convolved",
    "convolved_back",
    "group_norm",
    "group_norm_back",
    "image_kernels_for",
    "layer_norm",
    "layer_norm_back",
]

Stats = tuple[Tensor, Tensor]
"""Mean and 1 / size of each row."""


def image_kernels_for(x: Tensor) -> Any:
    """The module whose functions run for `x`: this one, or its twin for GPUs."""
    return _twin(kernels_for(x).__name__)


@cache
def _twin(name: str) -> Any:
    if not name.endswith(".cuda"):
        return sys.modules[__name__]
    from veneer.kernels import cuda_image

    return cuda_image


# ------------------------------------------------------------------ rows


def layer_norm(
    x: Float[Tensor, "t n"], w: Float[Tensor, "*p n"], b: Float[Tensor, "*p n"], eps: float, stats: Stats | None = None
) -> tuple[Float[Tensor, "t n"], Stats]:
    """The normed rows, and their means and sizes; `stats` where these are known already."""
    wide = _wide(x)
    if stats is None:
        mean = wide.mean(-1)
        stats = mean, torch.rsqrt((wide - mean[:, None]).square().mean(-1) + eps)
    normed = (wide - stats[0][:, None]) * stats[1][:, None]
    return (normed * _of_rows(w, x) + _of_rows(b, x)).to(x.dtype), stats


def _of_rows(w: Float[Tensor, "*p n"], x: Float[Tensor, "t n"]) -> Tensor:
    """A gain for each row of x: the same for all, or for all rows of a picture."""
    return _wide(w if w.ndim == 1 else w.repeat_interleave(len(x) // len(w), 0))


def layer_norm_back(
    g: Float[Tensor, "t n"],
    x: Float[Tensor, "t n"],
    stats: Stats,
    w: Float[Tensor, "*p n"],
    plus: Float[Tensor, "t n"] | None = None,
) -> Float[Tensor, "t n"]:
    """The gradient of x, and `plus` on top: what flows past the norm beside it."""
    mean, rstd = stats
    normed = (_wide(x) - mean[:, None]) * rstd[:, None]
    wg = _wide(g) * _of_rows(w, x)
    along = (wg * normed).mean(-1, keepdim=True)
    dx = rstd[:, None] * (wg - wg.mean(-1, keepdim=True) - normed * along)
    return (dx if plus is None else dx + _wide(plus)).to(x.dtype)


# ------------------------------------------------------------------ groups of channels


class GroupStats(NamedTuple):
    """For each channel the normed x is x rstd + still, and with gain and bias x scale + offset."""

    rstd: Float[Tensor, "n groups"]
    still: Float[Tensor, "n c"]  # (shift - mean) rstd
    scale: Float[Tensor, "n c"]
    offset: Float[Tensor, "n c"]


def group_norm(
    x: Float[Tensor, "n p c"],
    w: Float[Tensor, " c"],
    b: Float[Tensor, " c"],
    groups: int,
    eps: float,
    act: bool,
    shift: Float[Tensor, "n c"] | None = None,
    stats: GroupStats | None = None,
) -> tuple[Float[Tensor, "n p c"], GroupStats]:
    """GroupNorm of x + shift, through SiLU if `act`: the shift is a time embedding or a bias that nobody else needs."""
    wide = _wide(x)
    if stats is None:
        stats = _group_stats(wide, _wide(w), _wide(b), groups, eps, shift)
    y = wide * stats.scale[:, None] + stats.offset[:, None]
    return (F.silu(y) if act else y).to(x.dtype), stats


def _group_stats(x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float, shift: Tensor | None) -> GroupStats:
    shift = x.new_zeros(x.shape[0], x.shape[2]) if shift is None else shift.to(x.dtype)
    grouped = (x + shift[:, None]).unflatten(-1, (groups, -1))
    mean = grouped.mean((1, 3))
    rstd = torch.rsqrt((grouped - mean[:, None, :, None]).square().mean((1, 3)) + eps)
    size = x.shape[2] // groups
    each = rstd.repeat_interleave(size, 1)
    still = (shift - mean.repeat_interleave(size, 1)) * each
    return GroupStats(rstd, still, w * each, b + still * w)


def group_norm_back(
    g: Float[Tensor, "n p c"],
    x: Float[Tensor, "n p c"],
    w: Float[Tensor, " c"],
    groups: int,
    act: bool,
    stats: GroupStats,
    plus: Float[Tensor, "n p c"] | None = None,
) -> Float[Tensor, "n p c"]:
    """The gradient of x, which is also that of x + shift, and `plus` on top."""
    wide, g = _wide(x), _wide(g)
    y = wide * stats.scale[:, None] + stats.offset[:, None]
    if act:
        s = torch.sigmoid(y)
        g = g * s * (1 + y * (1 - s))
    normed = (wide * stats.rstd.repeat_interleave(len(w) // groups, 1)[:, None] + stats.still[:, None]).unflatten(
        -1, (groups, -1)
    )
    wg = (g * _wide(w)).unflatten(-1, (groups, -1))
    mean, along = wg.mean((1, 3), keepdim=True), (wg * normed).mean((1, 3), keepdim=True)
    dx = (stats.rstd[:, None, :, None] * (wg - mean - normed * along)).flatten(2)
    return (dx if plus is None else dx + _wide(plus)).to(x.dtype)


# ------------------------------------------------------------------ convolutions


def convolved(x: Float[Tensor, "n c h w"], conv: nn.Conv2d, bias: Tensor | None = None) -> Tensor:
    """x through the layer's frozen weight, in channels last."""
    weight = conv._parameters["weight"]
    assert weight is not None
    x = x.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation)  # type: ignore[arg-type]
    return y.contiguous(memory_format=torch.channels_last)


def convolved_back(g: Float[Tensor, "n o h w"], conv: nn.Conv2d, shape: torch.Size) -> Tensor:
    """The gradient of an input of this shape. Its numbers are not needed, so an empty tensor stands in for it."""
    weight = conv._parameters["weight"]
    assert weight is not None
    g = g.contiguous(memory_format=torch.channels_last)
    like = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=torch.channels_last)
    dx = torch.ops.aten.convolution_backward(
        g, like, weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], 1, [True, False, False]
    )[0]
    return dx.contiguous(memory_format=torch.channels_last)


def add_channels(
    y: Float[Tensor, "*n c"], x: Float[Tensor, "*n c"] | None, bias: Float[Tensor, " c"] | None
) -> Float[Tensor, "*n c"]:
    """y + x + bias in y's memory."""
    if bias is not None:
        y.add_(bias)
    return y if x is None else y.add_(x)
