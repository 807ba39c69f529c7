"""The pieces of pieces.py for a GPU: each reads its inputs once and writes its result once.

All arithmetic is in fp32, rounded where a tensor is written. Rows may lie apart (slices of a fused projection), so
every kernel takes the distance between rows; the last axis is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.language.extra import libdevice  # pyright: ignore[reportMissingImports]

from veneer.kernels import pieces
from veneer.kernels.pieces import Pair, Rounding
from veneer.quant.eight import LARGEST, TINY, remember

__all__ = [
    "add_product",
    "glu",
    "glu_back",
    "rms_norm",
    "rms_norm_back",
    "rotate",
    "round_thin",
    "thin_glu",
    "thin_glu_back",
    "token_losses_",
]

ACTS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
WIDE = 1024  # columns of a gated unit that one program does
GLU_TILE = (32, 256, 4)  # rows, columns and warps of a program that adds adapters and multiplies
BACK_TILE = (64, 64, 4, 2)  # rows, columns, warps and loads ahead of a program that goes back through a gated unit
BACK_TILE_ROUNDED: tuple[int, int, int, int] | None = (64, 64, 4, 2)  # of one that finds each row's size as well
ROUND_TILE = (64, 128, 4, 3)  # rows, columns, warps and loads ahead of a program that rounds what a unit gave
ROUND_PROGRAMS = 264  # of them for one matrix: two for each multiprocessor, the quickest of 264 to 2,112 on an H100
CHUNK = 8192  # logits that one program holds at a time


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which may be another one than x's."""
    return nullcontext() if x.device.index == torch.cuda.current_device() else torch.cuda.device(x.device)


# ------------------------------------------------------------------ norms


@triton.jit
def _rms_norm(
    x, w, y, rstd, codes, scale, plus, x_row, n, eps, largest, tiny,
    OFFSET: tl.constexpr, KNOWN: tl.constexpr, ROUNDED: tl.constexpr, PLUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    raw = tl.load(x + row * x_row + at, mask=inside, other=0.0)
    if PLUS:
        raw = (raw.to(tl.float32) + tl.load(plus + row * n + at, mask=inside, other=0.0).to(tl.float32)).to(raw.dtype)
        tl.store(x + row * x_row + at, raw, mask=inside)
    wide = raw.to(tl.float32)
    if KNOWN:
        r = tl.load(rstd + row)
    else:
        r = tl.rsqrt(tl.sum(wide * wide, 0) / n + eps)
        tl.store(rstd + row, r)
    gain = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    if OFFSET == 0.0:  # noqa: SIM108
        out = (wide * r).to(raw.dtype).to(tl.float32) * gain
    else:
        out = wide * r * (gain + OFFSET)
    tl.store(y + row * n + at, out.to(raw.dtype), mask=inside)
    if ROUNDED:  # as quantize_rows of quant/cuda.py does it
        out = out.to(raw.dtype).to(tl.float32)
        s = tl.maximum(tl.max(tl.abs(out), 0) / largest, tiny)
        tl.store(scale + row, s)
        scaled = out * (1.0 / s)
        if ROUNDED == 2:
            scaled = libdevice.rint(scaled)
        scaled = tl.minimum(tl.maximum(scaled, -largest), largest)
        tl.store(codes + row * n + at, scaled.to(codes.dtype.element_ty), mask=inside)


def rms_norm(
    x: Tensor, w: Tensor, eps: float, offset: float = 0.0, rstd: Tensor | None = None,
    rounded: torch.dtype | None = None, plus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    t, n = x.shape
    plus = plus if plus is None else plus.contiguous()
    y, known = torch.empty((t, n), dtype=x.dtype, device=x.device), rstd is not None
    rstd = rstd if rstd is not None else torch.empty(t, dtype=torch.float32, device=x.device)
    codes, scale, largest = y, rstd, 0.0
    if rounded is not None:
        codes, scale = torch.empty((t, n), dtype=rounded, device=x.device), torch.empty_like(rstd)
        largest = LARGEST[rounded]
    if t:
        block = triton.next_power_of_2(n)
        with _on(x):
            _rms_norm[(t,)](
                x, w, y, rstd, codes, scale, x if plus is None else plus, x.stride(0), n, eps, largest, TINY, offset,
                known, {None: 0, torch.int8: 2}.get(rounded, 1), plus is not None, block, num_warps=_warps(block),
            )  # fmt: skip
        if rounded is not None:
            remember([y], codes, scale)
    return y, rstd


@triton.jit
def _rms_norm_back(g, x, rstd, w, plus, dx, n, OFFSET: tl.constexpr, PLUS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    r = tl.load(rstd + row)
    raw = tl.load(x + row * n + at, mask=inside, other=0.0)
    normed = raw.to(tl.float32) * r
    gain = tl.load(w + at, mask=inside, other=0.0).to(tl.float32) + OFFSET
    wg = tl.load(g + row * n + at, mask=inside, other=0.0).to(tl.float32) * gain
    out = r * (wg - normed * (tl.sum(wg * normed, 0) / n))
    if PLUS:
        out += tl.load(plus + row * n + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * n + at, out.to(raw.dtype), mask=inside)


def rms_norm_back(
    g: Tensor, x: Tensor, rstd: Tensor, w: Tensor, offset: float = 0.0, plus: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    t, n = x.shape
    g, x = g.contiguous(), x.contiguous()
    plus = plus.contiguous() if plus is not None else None
    dx = torch.empty_like(x) if out is None else out
    if t:
        block = triton.next_power_of_2(n)
        with _on(x):
            _rms_norm_back[(t,)](
                g, x, rstd, w, plus if plus is not None else x, dx, n, offset, plus is not None, block,
                num_warps=_warps(block),
            )  # fmt: skip
    return dx


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


# ------------------------------------------------------------------ gated units


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _act(x, ACT: tl.constexpr):
    if ACT == 0:
        return x * tl.sigmoid(x)
    elif ACT == 1:
        return 0.5 * x * (1 + libdevice.erf(x * 0.7071067811865476))
    elif ACT == 2:
        return 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def _slope(x, ACT: tl.constexpr):
    if ACT == 0:
        s = tl.sigmoid(x)
        return s * (1 + x * (1 - s))
    elif ACT == 1:
        return 0.5 * (1 + libdevice.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == 2:
        t = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * x * x)
    else:
        return tl.where(x > 0, 1.0, 0.0)


@triton.jit
def _glu(gate, up, y, gate_row, up_row, n, ACT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    raw = tl.load(gate + row * gate_row + at, mask=inside, other=0.0)
    u = tl.load(up + row * up_row + at, mask=inside, other=0.0).to(tl.float32)
    a = _act(raw.to(tl.float32), ACT).to(raw.dtype).to(tl.float32)  # rounded here, as the plain model does
    tl.store(y + row * n + at, (a * u).to(raw.dtype), mask=inside)


def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    t, n = gate.shape
    y = torch.empty((t, n), dtype=gate.dtype, device=gate.device)
    if t:
        with _on(gate):
            _glu[(t, triton.cdiv(n, WIDE))](gate, up, y, gate.stride(0), up.stride(0), n, ACTS[act], WIDE, num_warps=4)
    return y


@triton.jit
def _glu_back(
    g,
    gate,
    up,
    d_gate,
    d_up,
    y,
    g_row,
    gate_row,
    up_row,
    d_gate_row,
    d_up_row,
    n,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    raw = tl.load(gate + row * gate_row + at, mask=inside, other=0.0)
    x = raw.to(tl.float32)
    u = tl.load(up + row * up_row + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(g + row * g_row + at, mask=inside, other=0.0).to(tl.float32)
    a = _act(x, ACT)
    tl.store(y + row * n + at, (a.to(raw.dtype).to(tl.float32) * u).to(raw.dtype), mask=inside)
    tl.store(d_up + row * d_up_row + at, (d * a).to(raw.dtype), mask=inside)
    tl.store(d_gate + row * d_gate_row + at, (d * u * _slope(x, ACT)).to(raw.dtype), mask=inside)


def glu_back(g: Tensor, gate: Tensor, up: Tensor, act: str, d_gate: Tensor, d_up: Tensor) -> Tensor:
    t, n = gate.shape
    y = torch.empty((t, n), dtype=gate.dtype, device=gate.device)
    if t:
        with _on(gate):
            _glu_back[(t, triton.cdiv(n, WIDE))](
                g, gate, up, d_gate, d_up, y, g.stride(0), gate.stride(0), up.stride(0), d_gate.stride(0),
                d_up.stride(0), n, ACTS[act], WIDE, num_warps=4,
            )  # fmt: skip
    return y


@triton.jit
def _thin(h, b, rows, columns, t, n, r, h_row, b_row, b_column, R: tl.constexpr, EXACT: tl.constexpr):
    """A tile of h B^T, with B's rows b_row and its columns b_column apart."""
    at = tl.arange(0, R)
    left = tl.load(h + rows[:, None] * h_row + at[None, :], mask=(rows[:, None] < t) & (at[None, :] < r), other=0.0)
    right = tl.load(
        b + columns[None, :] * b_row + at[:, None] * b_column,
        mask=(columns[None, :] < n) & (at[:, None] < r),
        other=0.0,
    )
    return tl.dot(left, right, input_precision="ieee" if EXACT else "tf32"), left


@triton.jit
def _thin_glu(
    gate, up, y, hg, bg, hu, bu, most, t, n, rg, ru, gate_row, up_row, hg_row, bg_row, hu_row, bu_row,
    ACT: tl.constexpr, RG: tl.constexpr, RU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EXACT: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < t) & (columns[None, :] < n)
    raw = tl.load(gate + rows[:, None] * gate_row + columns[None, :], mask=inside, other=0.0)
    x = raw.to(tl.float32)
    u = tl.load(up + rows[:, None] * up_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if RG:
        own, _ = _thin(hg, bg, rows, columns, t, n, rg, hg_row, bg_row, 1, RG, EXACT)
        x += own
    if RU:
        own, _ = _thin(hu, bu, rows, columns, t, n, ru, hu_row, bu_row, 1, RU, EXACT)
        u += own
    product = (_act(x, ACT) * u).to(raw.dtype)
    tl.store(y + rows[:, None] * n + columns[None, :], product, mask=inside)
    if MOST:
        tl.atomic_max(most + rows, tl.max(tl.abs(product.to(tl.float32)), 1), mask=rows < t)


def thin_glu(
    gate: Tensor, up: Tensor, act: str, gate_thin: Pair, up_thin: Pair,
    rounded: torch.dtype | None = None, a: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    t, n = gate.shape
    y = torch.empty((t, n), dtype=gate.dtype, device=gate.device)
    (hg, bg, rg, wide_g), (hu, bu, ru, wide_u) = _padded(gate_thin, gate), _padded(up_thin, gate)
    most = torch.zeros(t, dtype=torch.float32, device=gate.device) if rounded is not None else y
    if t:
        with _on(gate):
            _thin_glu[(triton.cdiv(t, GLU_TILE[0]), triton.cdiv(n, GLU_TILE[1]))](
                gate, up, y, hg, bg, hu, bu, most, t, n, rg, ru, gate.stride(0), up.stride(0), hg.stride(0),
                bg.stride(0), hu.stride(0), bu.stride(0), ACTS[act], wide_g, wide_u, *GLU_TILE[:2],
                gate.dtype == torch.float32, rounded is not None, num_warps=GLU_TILE[2],
            )  # fmt: skip
    if rounded is None:
        return y, None
    codes, scale, h = round_thin([y], most, rounded, None, [None if a is None else a.T])
    remember([y], codes, scale)
    return y, h


def _padded(thin: Pair, like: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """h, B, their rank, and the rank that a tile has; 0 where there is no adapter."""
    if thin is None:
        return like, like, 0, 0
    rank = thin[0].shape[1]
    return *thin, rank, max(16, triton.next_power_of_2(rank))


@triton.jit
def _thin_glu_back(
    g, gate, up, d_gate, d_up, hg, bg, hu, bu, d, a, into_a, into_g, into_u, most, cg, cu, t, n, rg, ru, rd, steps,
    all_ranks, g_row, gate_row, up_row, d_gate_row, d_up_row, hg_row, bg_row, hu_row, bu_row, d_row, a_row,
    ACT: tl.constexpr, RG: tl.constexpr, RU: tl.constexpr, RD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    sum_a = tl.zeros((RD if RD else 16, COLUMNS), tl.float32)
    sum_g = tl.zeros((RG if RG else 16, COLUMNS), tl.float32)
    sum_u = tl.zeros((RU if RU else 16, COLUMNS), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        rows = ((part * steps + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows[:, None] < t) & (columns[None, :] < n)
        raw = tl.load(gate + rows[:, None] * gate_row + columns[None, :], mask=inside, other=0.0)
        x = raw.to(tl.float32)
        u = tl.load(up + rows[:, None] * up_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        w = tl.load(g + rows[:, None] * g_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if RG:
            own, left_g = _thin(hg, bg, rows, columns, t, n, rg, hg_row, bg_row, 1, RG, EXACT)
            x += own
        if RU:
            own, left_u = _thin(hu, bu, rows, columns, t, n, ru, hu_row, bu_row, 1, RU, EXACT)
            u += own
        if RD:
            own, left_d = _thin(d, a, rows, columns, t, n, rd, d_row, 1, a_row, RD, EXACT)
            w += own
        active = _act(x, ACT)
        dg = (w * u * _slope(x, ACT)).to(raw.dtype)
        du = (w * active).to(raw.dtype)
        tl.store(d_gate + rows[:, None] * d_gate_row + columns[None, :], dg, mask=inside)
        tl.store(d_up + rows[:, None] * d_up_row + columns[None, :], du, mask=inside)
        if MOST:
            fold = tl.load(cg + columns, mask=columns < n, other=0.0)[None, :]
            size = tl.max(tl.abs(dg.to(tl.float32)) * fold, 1)
            fold = tl.load(cu + columns, mask=columns < n, other=0.0)[None, :]
            size = tl.maximum(size, tl.max(tl.abs(du.to(tl.float32)) * fold, 1))
            tl.atomic_max(most + rows, size, mask=rows < t)
        if RD:
            sum_a = tl.dot(tl.trans(left_d), (active * u).to(raw.dtype), sum_a, input_precision=precision)
        if RG:
            sum_g = tl.dot(tl.trans(left_g), dg, sum_g, input_precision=precision)
        if RU:
            sum_u = tl.dot(tl.trans(left_u), du, sum_u, input_precision=precision)
    if RD:
        _keep(into_a, sum_a, part * all_ranks, columns, rd, n, RD)
    if RG:
        _keep(into_g, sum_g, part * all_ranks, columns, rg, n, RG)
    if RU:
        _keep(into_u, sum_u, part * all_ranks, columns, ru, n, RU)


@triton.jit
def _keep(into, total, first, columns, r, n, R: tl.constexpr):
    """One part's sum; parts are added up afterwards, always in the same order."""
    at = tl.arange(0, R)[:, None]
    tl.store(into + (first + at) * n + columns[None, :], total, mask=(at < r) & (columns[None, :] < n))


def thin_glu_back(
    g: Tensor, gate: Tensor, up: Tensor, act: str, d_gate: Tensor, d_up: Tensor,
    gate_thin: Pair, up_thin: Pair, down: Pair, rounding: Rounding | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    t, n = gate.shape
    rounding = rounding if BACK_TILE_ROUNDED is not None else None
    rows, columns, warps, stages = BACK_TILE_ROUNDED if rounding is not None and BACK_TILE_ROUNDED else BACK_TILE
    parts = max(1, min(triton.cdiv(t, rows), 1056 // triton.cdiv(n, columns)))  # eight programs for each multiprocessor
    steps = triton.cdiv(triton.cdiv(t, rows), parts)
    (hg, bg, rg, wide_g), (hu, bu, ru, wide_u), (d, a, rd, wide_d) = (
        _padded(thin, gate) for thin in (gate_thin, up_thin, down)
    )
    ends = [0, rd, rd + rg, rd + rg + ru]  # all parts' sums, one under the other
    sums = torch.empty((parts, ends[-1], n), dtype=torch.float32, device=g.device)
    most, folds = g, (g, g)
    if rounding is not None:
        most, folds = torch.zeros(t, dtype=torch.float32, device=g.device), rounding.columns
    with _on(g):
        _thin_glu_back[(triton.cdiv(n, columns), parts)](
            g, gate, up, d_gate, d_up, hg, bg, hu, bu, d, a, *(sums[:, at:] for at in ends[:3]), most, *folds, t, n,
            rg, ru, rd, steps, ends[-1],
            *(each.stride(0) for each in (g, gate, up, d_gate, d_up, hg, bg, hu, bu, d, a)),
            ACTS[act], wide_g, wide_u, wide_d, rows, columns, gate.dtype == torch.float32, stages,
            rounding is not None, num_warps=warps,
        )  # fmt: skip
    whole = sums.sum(0)
    da, dg, du = (whole[at:end] if end > at else None for at, end in pairwise(ends))
    thin = None
    if rounding is not None:
        codes, scale, thin = round_thin([d_gate, d_up], most, rounding.dtype, rounding.columns, rounding.bs)
        remember([d_gate, d_up], codes, scale, of=rounding.columns)
    return da, dg if dg is None else dg.T, du if du is None else du.T, thin


@triton.jit
def _round_thin(
    x, columns, b, most, codes, scale, sums, t, n, r, steps, x_row, b_row, b_column, codes_row, largest, tiny,
    FOLD: tl.constexpr, WHOLE: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    part = tl.program_id(1)
    s = tl.maximum(tl.load(most + rows, mask=rows < t, other=0.0) / largest, tiny)
    if part == 0:
        tl.store(scale + rows, s, mask=rows < t)
    factor = (1.0 / s)[:, None]
    thin = tl.arange(0, R if R else 16)[None, :]
    total = tl.zeros((ROWS, R if R else 16), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        at = (part * steps + step) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (rows[:, None] < t) & (at[None, :] < n)
        raw = tl.load(x + rows[:, None] * x_row + at[None, :], mask=inside, other=0.0)
        if R:
            right = tl.load(b + at[:, None] * b_row + thin * b_column, mask=(at[:, None] < n) & (thin < r), other=0.0)
            total = tl.dot(raw, right, total, input_precision="ieee" if EXACT else "tf32")
        wide = raw.to(tl.float32)
        if FOLD:
            wide *= tl.load(columns + at, mask=at < n, other=0.0)[None, :]
        scaled = wide * factor
        if WHOLE:
            scaled = libdevice.rint(scaled)
        scaled = tl.minimum(tl.maximum(scaled, -largest), largest)
        tl.store(codes + rows[:, None] * codes_row + at[None, :], scaled.to(codes.dtype.element_ty), mask=inside)
    if R:
        to = sums + (part * t + rows[:, None]) * r + thin
        tl.store(to, total, mask=(rows[:, None] < t) & (thin < r))


@triton.jit
def _add_parts(sums, out, size, r, parts, out_row, BLOCK: tl.constexpr):
    at = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(sums + part * size + at, mask=at < size, other=0.0)
    tl.store(out + at // r * out_row + at % r, total.to(out.dtype.element_ty), mask=at < size)


def round_thin(
    xs: Sequence[Tensor], most: Tensor, dtype: torch.dtype, columns: Sequence[Tensor] | None,
    bs: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Matrices (t, n) side by side, times `columns`, as 8-bit codes with a scale for each row, whose largest size is
    known; and each one's product with its B (n, r), side by side as well. One pass does both."""
    t, widths, ranks = len(xs[0]), [x.shape[1] for x in xs], [0 if b is None else b.shape[1] for b in bs]
    like = xs[0]
    codes = torch.empty((t, sum(widths)), dtype=dtype, device=like.device)
    scale = torch.empty(t, dtype=torch.float32, device=like.device)
    h = torch.empty((t, sum(ranks)), dtype=like.dtype, device=like.device) if any(ranks) else None
    rows, wide, warps, stages = ROUND_TILE
    at = into = 0
    for i, (x, n, b, r) in enumerate(zip(xs, widths, bs, ranks, strict=True)):
        tiles = triton.cdiv(t, rows)
        parts = max(1, min(triton.cdiv(n, wide), ROUND_PROGRAMS // max(tiles, 1)))
        steps = triton.cdiv(triton.cdiv(n, wide), parts)
        sums = torch.empty((parts, t, r), dtype=torch.float32, device=like.device) if r else like
        b = like if b is None else b
        with _on(like):
            if t:
                _round_thin[(tiles, parts)](
                    x, most if columns is None else columns[i], b, most, codes[:, at:], scale, sums, t, n, r, steps,
                    x.stride(0), b.stride(0), b.stride(1), codes.stride(0), LARGEST[dtype], TINY,
                    columns is not None, dtype == torch.int8, max(16, triton.next_power_of_2(r)) if r else 0,
                    rows, wide, like.dtype == torch.float32, stages, num_warps=warps,
                )  # fmt: skip
            if t and r and h is not None:
                out = h[:, into:]
                _add_parts[(triton.cdiv(t * r, 256),)](sums, out, t * r, r, parts, out.stride(0), 256, num_warps=2)
        at, into = at + n, into + r
    return codes, scale, h


# ------------------------------------------------------------------ rotary positions


@triton.jit
def _rotate(
    x, cos, sin, y, h, b, x_batch, x_row, x_head, y_batch, y_row, y_head, h_row, b_row, t, rows, positions, n, half,
    apart, r, STEP: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    places = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = (places[:, None] < t) & (at[None, :] < half)
    first_of = at[None, :] * STEP  # where the first of two lies in its head; the second is `apart` further
    angle = (places % positions)[:, None] * 2 * half + first_of
    c1 = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos + angle + apart, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin + angle + apart, mask=inside, other=0.0).to(tl.float32)
    batch, row = (places // rows)[:, None], (places % rows)[:, None]
    head = tl.program_id(1).to(tl.int64)
    here = x + batch * x_batch + row * x_row + head * x_head + first_of
    there = y + batch * y_batch + row * y_row + head * y_head + first_of
    raw = tl.load(here, mask=inside, other=0.0)
    first = raw.to(tl.float32)
    second = tl.load(here + apart, mask=inside, other=0.0).to(tl.float32)
    if R:
        channel = head * 2 * half + at
        end = head * 2 * half + half
        own, _ = _thin(h, b, places, channel, t, end, r, h_row, b_row, 1, R, EXACT)
        first += own
        own, _ = _thin(h, b, places, channel + half, t, end + half, r, h_row, b_row, 1, R, EXACT)
        second += own
    if BACK:
        tl.store(there, (first * c1 + second * s2).to(raw.dtype), mask=inside)
        tl.store(there + apart, (second * c2 - first * s1).to(raw.dtype), mask=inside)
    else:
        tl.store(there, (first * c1 - second * s1).to(raw.dtype), mask=inside)
        tl.store(there + apart, (second * c2 + first * s2).to(raw.dtype), mask=inside)


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, back: bool = False, thin: Pair = None, pairs: bool = False
) -> Tensor:  # fmt: skip
    batch, rows, heads, d = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    h, b, r, wide = _padded(thin, x)
    if batch * rows:
        with _on(x):
            _rotate[(triton.cdiv(batch * rows, 32), heads)](
                x, cos, sin, out, h, b, *x.stride()[:3], *out.stride()[:3], h.stride(0), b.stride(0), batch * rows,
                rows, cos.shape[0], heads * d, d // 2, 1 if pairs else d // 2, r, 2 if pairs else 1, back, 32,
                max(16, triton.next_power_of_2(d // 2)), wide, x.dtype == torch.float32, num_warps=4,
            )  # fmt: skip
    return out


# ------------------------------------------------------------------ thin products


@triton.jit
def _add_product(
    c, h, b, y, out, t, n, r, c_row, h_row, b_row, PLUS: tl.constexpr, OLD: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, R: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < t) & (columns[None, :] < n)
    total, _ = _thin(h, b, rows, columns, t, n, r, h_row, b_row, 1, R, EXACT)
    if PLUS:
        total += tl.load(y + rows[:, None] * n + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if OLD:
        total += tl.load(c + rows[:, None] * c_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows[:, None] * n + columns[None, :], total.to(out.dtype.element_ty), mask=inside)


def add_product(c: Tensor | None, h: Tensor, b: Tensor, y: Tensor | None = None) -> Tensor:
    (t, r), n = h.shape, b.shape[0]
    if r > 128:
        return pieces.add_product(c, h, b, y)
    out = y if y is not None and y.dtype == h.dtype else torch.empty((t, n), dtype=h.dtype, device=h.device)
    if t:
        old, more = (h if given is None else given for given in (c, y))
        with _on(h):
            _add_product[(triton.cdiv(t, 64), triton.cdiv(n, 128))](
                old, h, b, more, out, t, n, r, old.stride(0), h.stride(0), b.stride(0), y is not None, c is not None,
                64, 128, max(16, triton.next_power_of_2(r)), h.dtype == torch.float32, num_warps=4,
            )  # fmt: skip
    return out


# ------------------------------------------------------------------ the loss


@triton.jit
def _token_losses(logits, labels, losses, row_size, v: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    here = logits + row * row_size
    label = tl.load(labels + row)
    wanted = tl.load(here + label).to(tl.float32)
    largest = float("-inf")
    total = 0.0
    for start in range(0, v, BLOCK):
        z = tl.load(here + start + at, mask=start + at < v, other=float("-inf")).to(tl.float32)
        more = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - more) + tl.sum(tl.exp(z - more), 0)
        largest = more
    tl.store(losses + row, largest + tl.log(total) - wanted)
    for start in range(0, v, BLOCK):
        raw = tl.load(here + start + at, mask=start + at < v, other=float("-inf"))
        d = tl.exp(raw.to(tl.float32) - largest) / total
        d = tl.where(start + at == label, d - 1.0, d)
        tl.store(here + start + at, d.to(raw.dtype), mask=start + at < v)


def token_losses_(logits: Tensor, labels: Tensor) -> Tensor:
    t, v = logits.shape
    losses = torch.empty(t, dtype=torch.float32, device=logits.device)
    if t:
        with _on(logits):
            _token_losses[(t,)](logits, labels, losses, logits.stride(0), v, CHUNK, num_warps=16)
    return losses
