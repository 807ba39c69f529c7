"""The storages' kernels for a GPU, in Triton; nf4.py and eight.py hold the references that tests compare them with.

    nf4_unpack      codes -> numbers: a byte is read once, its two weights are written side by side
    quantize_rows   numbers -> 8-bit codes and a scale a row: the row is read once and stays in registers
    rescale         products of whole numbers times their scales
    turn            bytes transposed in tiles, where a plain copy would write one byte at a time

All are bound by memory: their floor is the bytes read and written over the card's bandwidth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from veneer.quant.eight import LARGEST, TINY, quantize_plain
from veneer.quant.nf4 import dynamic_values, nf4_unpack, pairs

__all__ = ["quantize_beside_kernel", "quantize_rows_kernel", "rescale", "turn", "unpack_kernel", "unpack_with"]

WIDEST = 32768  # columns that one program holds
WEIGHTS = 2048  # weights that one program unpacks: the quickest of 1,024 to 8,192 on an H100


@triton.jit
def _unpack(
    codes, absmax, nested, offset, table, scales, out, n, DOUBLE: tl.constexpr, BLOCK: tl.constexpr, MANY: tl.constexpr
):
    half: tl.constexpr = BLOCK // 2
    start = tl.program_id(0) * MANY
    block = start + tl.arange(0, MANY)
    last = (n - 1) // BLOCK
    if DOUBLE:
        index = tl.load(absmax + block, mask=block <= last, other=0).to(tl.int32)
        scale = tl.load(scales + index) * tl.load(nested + block // 256, mask=block <= last, other=0.0)
        scale += tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=block <= last, other=0.0)
    first_byte = start.to(tl.int64) * half
    inner = tl.arange(0, MANY)[:, None] * half + tl.arange(0, half)[None, :]
    left = n - first_byte * 2  # weights from here to the end
    byte = tl.load(codes + first_byte + inner, mask=inner * 2 < left, other=0).to(tl.int32)
    pair = tl.load(table + byte)  # both weights of the byte in one look-up
    high = (pair & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True) * scale[:, None]
    low = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True) * scale[:, None]
    both = tl.interleave(high.to(out.dtype.element_ty), low.to(out.dtype.element_ty))  # (MANY, BLOCK)
    to = tl.arange(0, MANY)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + first_byte * 2 + to, both, mask=to < left)


@nf4_unpack.register_kernel("cuda")
def unpack_kernel(parts: list[Tensor], block: int, n: int, dtype: torch.dtype) -> Tensor:
    return unpack_with(parts, block, n, dtype, WEIGHTS, 4)


def unpack_with(parts: list[Tensor], block: int, n: int, dtype: torch.dtype, weights: int, warps: int) -> Tensor:
    """`weights` for each program, `warps` to do them."""
    codes, absmax = parts[0], parts[1]
    device = codes.device
    out = torch.empty(n, dtype=dtype, device=device)
    many = max(1, weights // block)
    double = len(parts) == 4
    nested, offset = (parts[2], parts[3]) if double else (absmax, absmax)
    with torch.cuda.device(device):
        _unpack[(triton.cdiv(n, block * many),)](
            codes, absmax, nested, offset, pairs(torch.float32, device), dynamic_values(device), out, n,
            DOUBLE=double, BLOCK=block, MANY=many, num_warps=warps,
        )  # fmt: skip
    return out


@triton.jit
def _rounded(scaled, codes, largest, WHOLE: tl.constexpr):
    """The nearest of the numbers that codes may be, as a code."""
    if WHOLE:
        scaled = libdevice.rint(scaled)
    return tl.minimum(tl.maximum(scaled, -largest), largest).to(codes.dtype.element_ty)


@triton.jit
def _quantize(
    x, columns, codes, scale, row, n, largest, tiny, FOLD: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    wide = tl.load(x + r * row + at, mask=inside, other=0.0).to(tl.float32)
    if FOLD:
        wide = wide * tl.load(columns + at, mask=inside, other=0.0)
    s = tl.maximum(tl.max(tl.abs(wide), 0) / largest, tiny)
    tl.store(scale + r, s)
    tl.store(codes + r * n + at, _rounded(wide * (1.0 / s), codes, largest, WHOLE), mask=inside)


def quantize_rows_kernel(x: Tensor, dtype: torch.dtype, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if x.shape[1] > WIDEST and columns is not None:  # the gradient of a vocabulary's logits
        return quantize_beside_kernel([x], dtype, [columns])
    if x.shape[1] > WIDEST or not x.numel():
        return quantize_plain(x, dtype, columns)
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(len(x), device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    with torch.cuda.device(x.device):
        _quantize[(len(x),)](
            x, x if columns is None else columns, codes, scale, x.stride(0), x.shape[1], LARGEST[dtype], TINY,
            FOLD=columns is not None, WHOLE=dtype == torch.int8, BLOCK=block, num_warps=min(16, max(4, block // 1024)),
        )  # fmt: skip
    return codes, scale


@triton.jit
def _row(x, columns, n: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    wide = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    return wide * tl.load(columns + at, mask=at < n, other=0.0)


@triton.jit
def _write(wide, codes, factor, largest, n: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(codes + at, _rounded(wide * factor, codes, largest, WHOLE), mask=at < n)


@triton.jit
def _quantize_beside(
    x1, x2, x3, c1, c2, c3, codes, scale, row1, row2, row3, largest, tiny,
    n1: tl.constexpr, n2: tl.constexpr, n3: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    first = _row(x1 + r * row1, c1, n1, B1)
    second = _row(x2 + r * row2, c2, n2, B2)
    most = tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(second), 0))
    if n3:
        third = _row(x3 + r * row3, c3, n3, B3)
        most = tl.maximum(most, tl.max(tl.abs(third), 0))
    s = tl.maximum(most / largest, tiny)
    tl.store(scale + r, s)
    to = codes + r * (n1 + n2 + n3)
    _write(first, to, 1.0 / s, largest, n1, WHOLE, B1)
    _write(second, to + n1, 1.0 / s, largest, n2, WHOLE, B2)
    if n3:
        _write(third, to + n1 + n2, 1.0 / s, largest, n3, WHOLE, B3)  # pyright: ignore[reportPossiblyUnboundVariable]


@triton.jit
def _larger(x, columns, row, most, n: tl.constexpr, BLOCK: tl.constexpr):
    """In each of BLOCK lanes the largest size in a row of one of several matrices, or what it was so far."""
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        wide = tl.load(x + row + at, mask=at < n, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(wide * tl.load(columns + at, mask=at < n, other=0.0)))
    return most


@triton.jit
def _write_parts(x, columns, codes, row, factor, largest, n: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        wide = tl.load(x + row + at, mask=at < n, other=0.0).to(tl.float32)
        scaled = wide * tl.load(columns + at, mask=at < n, other=0.0) * factor
        tl.store(codes + at, _rounded(scaled, codes, largest, WHOLE), mask=at < n)


@triton.jit
def _quantize_parts(
    x1, x2, x3, c1, c2, c3, codes, scale, row1, row2, row3, largest, tiny,
    n1: tl.constexpr, n2: tl.constexpr, n3: tl.constexpr, MANY: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    most = _larger(x1, c1, r * row1, tl.zeros((BLOCK,), tl.float32), n1, BLOCK)
    if MANY >= 2:
        most = _larger(x2, c2, r * row2, most, n2, BLOCK)
    if MANY == 3:
        most = _larger(x3, c3, r * row3, most, n3, BLOCK)
    s = tl.maximum(tl.max(most, 0) / largest, tiny)
    tl.store(scale + r, s)
    to = codes + r * (n1 + n2 + n3)
    _write_parts(x1, c1, to, r * row1, 1.0 / s, largest, n1, WHOLE, BLOCK)
    if MANY >= 2:
        _write_parts(x2, c2, to + n1, r * row2, 1.0 / s, largest, n2, WHOLE, BLOCK)
    if MANY == 3:
        _write_parts(x3, c3, to + n1 + n2, r * row3, 1.0 / s, largest, n3, WHOLE, BLOCK)


def quantize_beside_kernel(
    xs: Sequence[Tensor], dtype: torch.dtype, columns: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """One to three matrices, as if they lay side by side. A row is read once and stays in registers; one that is too
    wide for them is read twice, the second time from the cache."""
    xs, many = [x if x.stride(1) == 1 else x.contiguous() for x in xs], len(xs)
    widths = [x.shape[1] for x in xs]
    codes = torch.empty((len(xs[0]), sum(widths)), dtype=dtype, device=xs[0].device)
    scale = torch.empty(len(codes), device=codes.device)
    if not len(codes):
        return codes, scale
    blocks = [triton.next_power_of_2(n) for n in widths]
    for _ in range(many, 3):
        xs, columns, widths, blocks = [*xs, xs[0]], [*columns, columns[0]], [*widths, 0], [*blocks, 1]
    given = *xs, *columns, codes, scale, *(x.stride(0) for x in xs), LARGEST[dtype], TINY, *widths
    with torch.cuda.device(codes.device):
        if many == 1 or sum(blocks) > WIDEST + 1:
            _quantize_parts[(len(codes),)](*given, MANY=many, WHOLE=dtype == torch.int8, BLOCK=4096, num_warps=8)
        else:
            warps = min(16, max(4, sum(blocks) // 1024))
            warps = 1 << (warps.bit_length() - 1)
            _quantize_beside[(len(codes),)](*given, *blocks, WHOLE=dtype == torch.int8, num_warps=warps)
    return codes, scale


@triton.jit
def _rescale(whole, rows, columns, out, n, FOLD: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    y = tl.load(whole + r * n + at, mask=inside, other=0).to(tl.float32) * tl.load(rows + r)
    if FOLD:
        y = y * tl.load(columns + at, mask=inside, other=0.0)
    tl.store(out + r * n + at, y.to(out.dtype.element_ty), mask=inside)


def rescale(whole: Tensor, rows: Tensor, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Whole numbers times the scale of their row, and of their column where given."""
    out = torch.empty(whole.shape, dtype=dtype, device=whole.device)
    with torch.cuda.device(whole.device):
        _rescale[(whole.shape[0], triton.cdiv(whole.shape[1], 2048))](
            whole, rows, rows if columns is None else columns, out, whole.shape[1],
            FOLD=columns is not None, BLOCK=2048, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _turn(x, y, rows, cols, y_row, TILE: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    c = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    tile = tl.load(x + r[:, None] * cols + c[None, :], mask=(r[:, None] < rows) & (c[None, :] < cols), other=0)
    to = y + c[:, None] * y_row + r[None, :]
    tl.store(to, tl.trans(tile), mask=(c[:, None] < cols) & (r[None, :] < rows))


def turn(*codes: Tensor) -> Tensor:
    """The transpose of a matrix of bytes, in memory of its own; of several with as many columns, side by side."""
    cols, total = codes[0].shape[1], sum(len(each) for each in codes)
    out, at = torch.empty(cols, total, dtype=codes[0].dtype, device=codes[0].device), 0
    with torch.cuda.device(out.device):
        for each in codes:
            rows = len(each)
            _turn[(triton.cdiv(rows, 128), triton.cdiv(cols, 128))](
                each, out[:, at:], rows, cols, total, TILE=128, num_warps=8
            )
            at += rows
    return out
