"""The pieces of image_pieces.py for a GPU: rows in one pass, images in two.

An image's groups of channels are sums over all its places, so a norm reads the image twice: once for the sums - each
program takes some places and some channels and leaves its part, a second small kernel adds the parts up, always in
the same order - and once to write. What lies between is two numbers for each image and channel.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from veneer.kernels.cuda import _on, _warps
from veneer.kernels.image_pieces import GroupStats, Stats, convolved, convolved_back

__all__ = [
    "add_channels",
    "convolved",
    "convolved_back",
    "group_norm",
    "group_norm_back",
    "layer_norm",
    "layer_norm_back",
]

PLACES, CHANNELS = 32, 64  # of an image that one step of a program reads
PROGRAMS = 1056  # eight for each multiprocessor


# ------------------------------------------------------------------ rows


@triton.jit
def _layer_norm(
    x, w, b, y, mean, rstd, x_row, w_row, b_row, rows, n, eps, KNOWN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    raw = tl.load(x + row * x_row + at, mask=inside, other=0.0)
    wide = raw.to(tl.float32)
    if KNOWN:
        m = tl.load(mean + row)
        r = tl.load(rstd + row)
    else:
        m = tl.sum(wide, 0) / n
        apart = tl.where(inside, wide - m, 0.0)
        r = tl.rsqrt(tl.sum(apart * apart, 0) / n + eps)
        tl.store(mean + row, m)
        tl.store(rstd + row, r)
    picture = row // rows
    gain = tl.load(w + picture * w_row + at, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(b + picture * b_row + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * n + at, ((wide - m) * r * gain + bias).to(raw.dtype), mask=inside)


def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float, stats: Stats | None = None) -> tuple[Tensor, Stats]:
    t, n = x.shape
    y, known = torch.empty((t, n), dtype=x.dtype, device=x.device), stats is not None
    if stats is None:
        both = torch.empty((2, t), dtype=torch.float32, device=x.device)
        stats = both[0], both[1]
    if t:
        block = triton.next_power_of_2(n)
        with _on(x):
            _layer_norm[(t,)](
                x, w, b, y, *stats, x.stride(0), *_by_picture(w, b, t), n, eps, known, block, num_warps=_warps(block)
            )  # fmt: skip
    return y, stats


def _by_picture(w: Tensor, b: Tensor, t: int) -> tuple[int, int, int]:
    """How far apart the gains and biases of two pictures lie, and how many of t rows a picture has."""
    return (0, 0, t) if w.ndim == 1 else (w.stride(0), b.stride(0), t // len(w))


@triton.jit
def _layer_norm_back(g, x, mean, rstd, w, plus, dx, w_row, rows, n, PLUS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    r = tl.load(rstd + row)
    raw = tl.load(x + row * n + at, mask=inside, other=0.0)
    normed = (raw.to(tl.float32) - tl.load(mean + row)) * r
    gain = tl.load(w + (row // rows) * w_row + at, mask=inside, other=0.0).to(tl.float32)
    wg = tl.load(g + row * n + at, mask=inside, other=0.0).to(tl.float32) * gain
    out = r * (wg - tl.sum(wg, 0) / n - normed * (tl.sum(wg * normed, 0) / n))
    if PLUS:
        out += tl.load(plus + row * n + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * n + at, out.to(raw.dtype), mask=inside)


def layer_norm_back(g: Tensor, x: Tensor, stats: Stats, w: Tensor, plus: Tensor | None = None) -> Tensor:
    t, n = x.shape
    g, x = g.contiguous(), x.contiguous()
    plus = plus.contiguous() if plus is not None else None
    dx = torch.empty_like(x)
    if t:
        block = triton.next_power_of_2(n)
        with _on(x):
            w_row, _, rows = _by_picture(w, w, t)
            _layer_norm_back[(t,)](
                g, x, *stats, w, plus if plus is not None else x, dx, w_row, rows, n, plus is not None, block,
                num_warps=_warps(block),
            )  # fmt: skip
    return dx


# ------------------------------------------------------------------ groups of channels


@triton.jit
def _group_sums(
    x, g, scale, offset, into, p, c, parts, steps, BACK: tl.constexpr, ACT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of some places, for each channel: the sums of x and x^2; going back, of d and d x, where d reaches the norm."""
    image = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    one = tl.zeros((ROWS, COLUMNS), tl.float32)
    two = tl.zeros((ROWS, COLUMNS), tl.float32)
    if BACK:
        k = tl.load(scale + image * c + columns, mask=columns < c, other=0.0)[None, :]
        o = tl.load(offset + image * c + columns, mask=columns < c, other=0.0)[None, :]
    for step in range(steps):
        rows = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (rows[:, None] < p) & (columns[None, :] < c)
        at = (image * p + rows[:, None]) * c + columns[None, :]
        wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if BACK:
            d = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
            if ACT:
                u = wide * k + o
                s = tl.sigmoid(u)
                d *= s * (1 + u * (1 - s))
            one += d
            two += d * wide
        else:
            one += wide
            two += wide * wide
    where = into + (image * parts + part) * 2 * c + columns
    tl.store(where, tl.sum(one, 0), mask=columns < c)
    tl.store(where + c, tl.sum(two, 0), mask=columns < c)


@triton.jit
def _group_stats(
    sums, shift, w, b, rstd, still, scale, offset, p, c, parts, size, groups, eps,
    SHIFT: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    image = tl.program_id(1)
    at = tl.arange(0, SIZE)
    channels = group * size + at
    inside = at < size
    rows = tl.arange(0, PARTS)
    here = sums + (image * parts + rows[:, None]) * 2 * c + channels[None, :]
    both = (rows[:, None] < parts) & inside[None, :]
    one = tl.sum(tl.load(here, mask=both, other=0.0), 0)
    two = tl.sum(tl.load(here + c, mask=both, other=0.0), 0)
    if SHIFT:
        moved = tl.load(shift + image * c + channels, mask=inside, other=0.0).to(tl.float32)
        two += moved * (2 * one + p * moved)
        one += p * moved
    count = p * size
    m = tl.sum(one, 0) / count
    r = tl.rsqrt(tl.maximum(tl.sum(two, 0) / count - m * m, 0.0) + eps)
    gain = tl.load(w + channels, mask=inside, other=0.0).to(tl.float32)
    own = -m * r + tl.zeros((SIZE,), tl.float32)
    if SHIFT:
        own += moved * r
    tl.store(rstd + image * groups + group, r)
    tl.store(still + image * c + channels, own, mask=inside)
    tl.store(scale + image * c + channels, gain * r, mask=inside)
    o = tl.load(b + channels, mask=inside, other=0.0).to(tl.float32) + own * gain
    tl.store(offset + image * c + channels, o, mask=inside)


@triton.jit
def _group_back_stats(
    sums, w, rstd, still, by_x, by_one, p, c, parts, size, groups, PARTS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """dx = d scale + x by_x + by_one. Along with d go its mean and its mean product with the normed x."""
    group = tl.program_id(0)
    image = tl.program_id(1)
    at = tl.arange(0, SIZE)
    channels = group * size + at
    inside = at < size
    rows = tl.arange(0, PARTS)
    here = sums + (image * parts + rows[:, None]) * 2 * c + channels[None, :]
    both = (rows[:, None] < parts) & inside[None, :]
    d = tl.sum(tl.load(here, mask=both, other=0.0), 0)
    dx = tl.sum(tl.load(here + c, mask=both, other=0.0), 0)
    r = tl.load(rstd + image * groups + group)
    own = tl.load(still + image * c + channels, mask=inside, other=0.0)
    gain = tl.load(w + channels, mask=inside, other=0.0).to(tl.float32)
    count = p * size
    flat = tl.sum(gain * d, 0) / count
    along = tl.sum(gain * (r * dx + own * d), 0) / count
    tl.store(by_x + image * c + channels, -r * r * along + tl.zeros((SIZE,), tl.float32), mask=inside)
    tl.store(by_one + image * c + channels, -r * (flat + own * along), mask=inside)


@triton.jit
def _group_apply(
    x, g, scale, offset, by_x, by_one, plus, y, p, c, BACK: tl.constexpr, ACT: tl.constexpr, PLUS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    held = columns < c
    inside = (rows[:, None] < p) & held[None, :]
    at = (image * p + rows[:, None]) * c + columns[None, :]
    raw = tl.load(x + at, mask=inside, other=0.0)
    wide = raw.to(tl.float32)
    k = tl.load(scale + image * c + columns, mask=held, other=0.0)[None, :]
    o = tl.load(offset + image * c + columns, mask=held, other=0.0)[None, :]
    u = wide * k + o
    if BACK:
        d = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        if ACT:
            s = tl.sigmoid(u)
            d *= s * (1 + u * (1 - s))
        bx = tl.load(by_x + image * c + columns, mask=held, other=0.0)[None, :]
        b1 = tl.load(by_one + image * c + columns, mask=held, other=0.0)[None, :]
        out = d * k + wide * bx + b1
        if PLUS:
            out += tl.load(plus + at, mask=inside, other=0.0).to(tl.float32)
    else:
        out = u * tl.sigmoid(u) if ACT else u
    tl.store(y + at, out.to(raw.dtype), mask=inside)


def _sums(x: Tensor, g: Tensor | None, stats: GroupStats | None, act: bool) -> Tensor:
    """(images, parts, 2, channels): what `_group_sums` says, each part of some places."""
    n, p, c = x.shape
    tiles = triton.cdiv(c, CHANNELS)
    parts = max(1, min(triton.cdiv(p, PLACES), PROGRAMS // (n * tiles), 64))
    steps = triton.cdiv(triton.cdiv(p, PLACES), parts)
    parts = triton.cdiv(p, steps * PLACES)
    sums = torch.empty((n, parts, 2, c), dtype=torch.float32, device=x.device)
    scale, offset = (sums, sums) if stats is None else (stats.scale, stats.offset)
    _group_sums[(tiles, parts, n)](
        x, x if g is None else g, scale, offset, sums, p, c, parts, steps, g is not None, act, PLACES, CHANNELS,
        num_warps=4,
    )  # fmt: skip
    return sums


def _apply(
    x: Tensor, act: bool, stats: GroupStats, back: tuple[Tensor, Tensor, Tensor, Tensor | None] | None
) -> Tensor:
    n, p, c = x.shape
    y = torch.empty_like(x)
    g, by_x, by_one, plus = back if back is not None else (x, stats.scale, stats.scale, None)
    _group_apply[(triton.cdiv(c, CHANNELS), triton.cdiv(p, PLACES), n)](
        x, g, stats.scale, stats.offset, by_x, by_one, x if plus is None else plus, y, p, c,
        back is not None, act, plus is not None, PLACES, CHANNELS, num_warps=4,
    )  # fmt: skip
    return y


def group_norm(
    x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float, act: bool,
    shift: Tensor | None = None, stats: GroupStats | None = None,
) -> tuple[Tensor, GroupStats]:  # fmt: skip
    x = x.contiguous()
    with _on(x):
        if stats is None:
            stats = _stats(x, w, b, groups, eps, None if shift is None else shift.contiguous())
        return _apply(x, act, stats, None), stats


def _stats(x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float, shift: Tensor | None) -> GroupStats:
    n, p, c = x.shape
    sums = _sums(x, None, None, False)
    size, parts = c // groups, sums.shape[1]
    rstd = torch.empty((n, groups), dtype=torch.float32, device=x.device)
    still, scale, offset = torch.empty((3, n, c), dtype=torch.float32, device=x.device)
    _group_stats[(groups, n)](
        sums, w if shift is None else shift, w, b, rstd, still, scale, offset, p, c, parts, size, groups, eps,
        shift is not None, triton.next_power_of_2(parts), triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    return GroupStats(rstd, still, scale, offset)


def group_norm_back(
    g: Tensor, x: Tensor, w: Tensor, groups: int, act: bool, stats: GroupStats, plus: Tensor | None = None
) -> Tensor:
    g, x = g.contiguous(), x.contiguous()
    n, p, c = x.shape
    with _on(x):
        sums = _sums(x, g, stats, act)
        size, parts = c // groups, sums.shape[1]
        by_x, by_one = torch.empty((2, n, c), dtype=torch.float32, device=x.device)
        _group_back_stats[(groups, n)](
            sums, w, stats.rstd, stats.still, by_x, by_one, p, c, parts, size, groups,
            triton.next_power_of_2(parts), triton.next_power_of_2(size), num_warps=4,
        )  # fmt: skip
        return _apply(x, act, stats, (g, by_x, by_one, None if plus is None else plus.contiguous()))


# ------------------------------------------------------------------ channels


@triton.jit
def _add_channels(y, x, bias, total, c, X: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    raw = tl.load(y + at, mask=inside, other=0.0)
    out = raw.to(tl.float32)
    if X:
        out += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        out += tl.load(bias + at % c, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(raw.dtype), mask=inside)


def add_channels(y: Tensor, x: Tensor | None, bias: Tensor | None) -> Tensor:
    if x is None and bias is None:
        return y
    assert y.is_contiguous()  # a convolution's output with channels last
    x = None if x is None else x.contiguous()
    with _on(y):
        _add_channels[(triton.cdiv(y.numel(), 2048),)](
            y, y if x is None else x, y if bias is None else bias, y.numel(), y.shape[-1], x is not None,
            bias is not None, 2048, num_warps=8,
        )  # fmt: skip
    return y
