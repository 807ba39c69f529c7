"""NF4 with double quantisation (QLoRA, arXiv:2305.14314, section 3), bit for bit as bitsandbytes packs it.

    codes    two weights a byte, the first in the high half: an index into 16 quantiles of a normal, scaled to [-1, 1]
    absmax   the largest size in each block of 64 weights in a row (rows follow each other; the last block may be short)
    double   absmax - mean(absmax) as an index into 256 values of a float with a moving exponent (arXiv:1511.04561),
             one fp32 scale for each 256 of them

A byte is looked up whole: 256 entries of two weights each, half the look-ups of a table of 16.

Any scales and codes make a valid file; the largest size in the block and the nearest code are not the best ones. Where
something is known of the inputs (inputs.py), each block takes the scale with the least sum of cost (W - Q)^2: of a few,
the one that does best, then the least-squares scale for its codes. Codes are then chosen column by column, each making
up for the errors of those before it (rounding.py).
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.quant.inputs import Inputs
from veneer.quant.rounding import off_in_turn, plan_rounding, round_in_turn
from veneer.quant.storage import NEAREST, STORAGES, Parts, Recipe, Rounding, Storage, use_kernels

__all__ = ["NESTED_BLOCK", "QUANTILES", "Nf4", "dynamic_values", "unpack_absmax"]

QUANTILES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NESTED_BLOCK = 256
PIECE = {"cpu": 1 << 19, "cuda": 1 << 22}  # weights packed at a time: about 20 bytes of scratch for each
SHARES = (0.76, 0.86, 0.96, 1.04)  # of the largest size that are tried as scales
LAST_PLACE = 1e-5  # of a scale: it is rounded twice on its way
MISFIT = 0.11  # by which scales may miss their codes' best; seen: 0.05
SPREAD = 0.15  # and by how much more where few stand for a row
ALIKE = 0.1  # by which they all may miss it alike; seen: 0.005
CACHED = 1 << 17  # bytes unpacked at a time on a CPU
PAIR = {2: torch.int32, 4: torch.int64}  # an integer that holds two weights


@cache
def quantiles(device: torch.device) -> Float[Tensor, " 16"]:
    return torch.tensor(QUANTILES, device="cpu").to(device)


@cache
def dynamic_values(device: torch.device) -> Float[Tensor, " 256"]:
    """Signed values whose exponent takes as many of the 7 bits as it needs and leaves the rest to the fraction."""
    values = [torch.tensor([0.0, 1.0], device="cpu")]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2 * 10 ** (exponent - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values.to(device)


@cache
def pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two weights of each byte, seen as one integer."""
    byte = torch.arange(256, device=device)
    both = torch.stack([byte >> 4, byte & 15], dim=1)
    return quantiles(device)[both].to(dtype).view(PAIR[dtype.itemsize]).flatten()


def nearest(scaled: Tensor, values: Tensor) -> Tensor:
    """The index of the nearest of sorted values."""
    return torch.bucketize(scaled, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8)


def blocks_of(flat: Tensor, block: int) -> Tensor:
    """(blocks, block); the last one is filled up with zeros, which never are a block's largest."""
    missing = -len(flat) % block
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, block)


def quantize_blocks(
    flat: Float[Tensor, " n"], block: int, values: Tensor, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Indices into `values`, and each block's scale: its largest size unless given."""
    blocks = blocks_of(flat, block)
    scales = blocks.abs().amax(dim=1) if scales is None else scales
    inverse = 1 / torch.where(scales.abs() < 1e-38, 1e-38, scales)  # rounded, a scale near 0 may have come below it
    return nearest((blocks * inverse[:, None]).clamp_(-1, 1), values).flatten()[: len(flat)], scales


def nest(absmax: Float[Tensor, " blocks"]) -> Parts:
    """Scales in 8 bits: their codes, the scale of each 256 of them, and their mean."""
    offset = absmax.mean()
    index, nested = quantize_blocks(absmax - offset, NESTED_BLOCK, dynamic_values(absmax.device))
    return index, nested, offset


def fitted_scales(blocks: Tensor, energy: Tensor, values: Tensor) -> Float[Tensor, " blocks"]:
    """The scales with the least error, each weight's squared error counted by its column's energy."""
    absmax, weighted = blocks.abs().amax(dim=1), blocks * energy
    best, scales, middles = torch.full_like(absmax, torch.inf), absmax, (values[:-1] + values[1:]) / 2
    for share in SHARES:
        tried = absmax * share
        index = torch.bucketize(blocks * (1 / tried.clamp_min(1e-38))[:, None], middles, out_int32=True)
        q = values.index_select(0, index.flatten()).view_as(blocks)
        across, along = (weighted * q).sum(1), (energy * q.square()).sum(1)
        fitted = (across / along.clamp_min(1e-38)).where(across > 0, tried)  # least squares for these codes
        error = fitted * (fitted * along - 2 * across)  # up to the blocks' own energy
        scales = fitted.where(error < best, scales)
        best = torch.minimum(error, best)
    return scales


def _fitted(flat: Tensor, step: int, cols: int, energy: Tensor, block: int) -> Float[Tensor, " blocks"]:
    energy = energy.to(flat.device, torch.float32)
    energy = energy / energy.mean().clamp_min(1e-38) + 1e-6  # no column is free
    step, values, found = max(step // block, 1) * block, quantiles(flat.device), []
    for at, piece in zip(range(0, len(flat), step), flat.split(step), strict=True):
        column = torch.arange(at, at + len(piece), device=flat.device) % cols
        found.append(fitted_scales(blocks_of(piece.float(), block), blocks_of(energy[column], block), values))
    return torch.cat(found)


def unpack_absmax(parts: Parts) -> Float[Tensor, " blocks"]:
    if len(parts) == 2:
        return parts[1]
    _, codes, nested, offset = parts
    values = blocks_of(dynamic_values(codes.device)[codes.int()], NESTED_BLOCK) * nested[:, None]
    return values.flatten()[: len(codes)] + offset


def in_pairs(index: Tensor) -> Tensor:
    if len(index) % 2:
        index = torch.cat([index, index.new_full((1,), 7)])  # half a byte too many: a zero
    return index[::2] << 4 | index[1::2]


def _nearest(w: Tensor, recipe: Recipe) -> tuple[Tensor, Parts]:
    """Every weight to its nearest code, under the largest size in its block: what bitsandbytes does."""
    step = max(PIECE.get(w.device.type, PIECE["cpu"]) // recipe.block, 1) * recipe.block
    values, codes, scales = quantiles(w.device), [], []
    for piece in w.reshape(-1).split(step):
        index, absmax = quantize_blocks(piece.float(), recipe.block, values)
        codes.append(in_pairs(index))
        scales.append(absmax)
    absmax = torch.cat(scales)
    return torch.cat(codes), nest(absmax) if recipe.double else (absmax,)


def _in_turn(w: Tensor, recipe: Recipe, inputs: Inputs) -> tuple[Tensor, Parts]:
    plan = plan_rounding(inputs)
    step = PIECE.get(w.device.type, PIECE["cpu"]) // 4
    fitted = _fitted(w.reshape(-1), step, w.shape[1], plan.cost, recipe.block)
    kept = nest(fitted) if recipe.double else (fitted,)
    scales = unpack_absmax((w, *kept))  # codes go by the scales as they are kept
    return in_pairs(round_in_turn(w, scales, recipe.block, quantiles(w.device), plan).flatten()), kept


def _without_values(w: Tensor, recipe: Recipe) -> Parts:
    """The parts' shapes alone. Computed on the meta device, they took longer than packing the values on a GPU."""
    columns, blocks = w.shape[-1], -(-w.numel() // recipe.block)
    codes = w.new_empty((len(w), columns // 2) if columns % 2 == 0 else (-(-w.numel() // 2), 1), dtype=torch.uint8)
    if not recipe.double:
        return codes, w.new_empty(blocks, dtype=torch.float32)
    scales = w.new_empty(blocks, dtype=torch.uint8), w.new_empty(-(-blocks // NESTED_BLOCK), dtype=torch.float32)
    return codes, *scales, w.new_empty((), dtype=torch.float32)


class Nf4(Storage):
    names = ("weight_absmax", "weight_nested", "weight_offset")
    weighs = True

    def part_names(self, recipe: Recipe) -> tuple[str, ...]:
        return self.names if recipe.double else self.names[:1]

    def pack(self, w: Tensor, recipe: Recipe, inputs: Inputs | None = None) -> Parts:
        if w.is_meta:
            return _without_values(w, recipe)
        codes, scales = _nearest(w, recipe) if inputs is None else _in_turn(w, recipe, inputs)
        codes = codes.view(len(w), -1) if w.shape[-1] % 2 == 0 else codes[:, None]
        return codes, *scales

    def unpack(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype, recipe: Recipe) -> Tensor:
        codes = parts[0]
        if torch.compiler.is_compiling() or _has_kernel(codes):
            whole = torch.ops.veneer.nf4_unpack(list(parts), recipe.block, shape[0] * shape[1], dtype)
        else:
            whole = unpack_plain(parts, recipe.block, shape[0] * shape[1], dtype)
        return whole.view(shape)

    def rows(
        self, parts: Parts, shape: tuple[int, int], index: Int[Tensor, " n"], dtype: torch.dtype, recipe: Recipe
    ) -> Tensor:
        cols, block = shape[1], recipe.block
        if cols % block or cols % 2:  # blocks reach over the ends of rows
            return self.unpack(parts, shape, dtype, recipe)[index]
        absmax = unpack_absmax(parts).view(shape[0], cols // block)[index]
        return unpack_plain((parts[0][index], absmax.flatten()), block, len(index) * cols, dtype).view(-1, cols)

    def off_by(
        self,
        w: Float[Tensor, "n cols"],
        parts: Parts,
        shape: tuple[int, int],
        index: Int[Tensor, " n"],
        recipe: Recipe,
        rounding: Rounding = NEAREST,
    ) -> Float[Tensor, " n"]:
        """Weight by weight within half a gap, and each block's largest size as its scale; or in turn."""
        w = w.float()
        codes, blocks = _codes_of(parts, shape[1], index, recipe.block)
        scale, slack = _scales_at(parts, blocks)
        values = quantiles(w.device)
        q = values[codes] * scale
        if rounding.weighed:
            step = half_gaps(values)[codes] * scale.abs()
            return torch.maximum(off_in_turn(w, q, step, rounding.inputs), _misfit(w, q, recipe.block))
        allowed = half_gaps(values)[codes] * (scale.abs() + slack) + values[codes].abs() * slack
        off = ((w - q).abs() / allowed.clamp_min(1e-30)).amax(dim=1)
        if shape[1] % recipe.block:
            return off
        largest = w.unflatten(1, (-1, recipe.block)).abs().amax(dim=2)  # in each block: what its scale is kept of
        apart = (largest - scale[:, :: recipe.block]).abs() / slack[:, :: recipe.block].clamp_min(1e-30)
        return torch.maximum(off, apart.amax(dim=1))


STORAGES["nf4"] = Nf4()


def _has_kernel(codes: Tensor) -> bool:
    """Triton comes with PyTorch for GPUs; the kernel is registered when the first of them is used."""
    if not use_kernels(codes):
        return False
    import veneer.quant.cuda  # noqa: F401

    return True


def unpack_plain(parts: Parts, block: int, n: int, dtype: torch.dtype) -> Float[Tensor, " n"]:
    """The reference. The product with the scale is formed in fp32 and rounded once, as in bitsandbytes."""
    if dtype == torch.float64:
        return unpack_plain(parts, block, n, torch.float32).double()
    codes, absmax = parts[0].reshape(-1), unpack_absmax(parts)
    if codes.is_cuda or not len(codes):
        flat = quantiles(codes.device)[torch.stack([codes >> 4, codes & 15], dim=1).int()].flatten()
        return (blocks_of(flat[:n], block) * absmax[:, None]).flatten()[:n].to(dtype)
    out = torch.empty(2 * len(codes), dtype=dtype)
    step = CACHED // block * block or block  # bytes; the pieces stay in the processor's cache
    table = pairs(torch.float32, codes.device)
    for at in range(0, len(codes), step):
        pair = torch.index_select(table, 0, codes[at : at + step].int()).view(torch.float32)
        scales = absmax[2 * at // block : -(-2 * (at + step) // block)]
        out[2 * at : 2 * (at + step)] = (blocks_of(pair, block) * scales[:, None]).flatten()[: len(pair)]
    return out[:n]


SCHEMA = "(Tensor[] parts, int block, int n, ScalarType dtype) -> Tensor"


@torch.library.custom_op("veneer::nf4_unpack", mutates_args=(), schema=SCHEMA)
def nf4_unpack(parts: list[Tensor], block: int, n: int, dtype: torch.dtype) -> Tensor:
    """The matrix behind packed parts as one run of numbers; on a GPU a kernel of cuda.py does it."""
    return unpack_plain(tuple(parts), block, n, dtype).contiguous().clone()


@nf4_unpack.register_fake
def _(parts: list[Tensor], block: int, n: int, dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty(n, dtype=dtype)


# --- what a packed matrix may differ by from the one that was packed --------------------------------------------------


def half_gaps(values: Tensor) -> Tensor:
    """How far from each value a number may lie whose nearest it is."""
    gaps = values.diff() / 2
    return torch.maximum(torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]]))


def _codes_of(parts: Parts, cols: int, index: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Of some rows, each weight's code and the number of its block."""
    at = index[:, None] * cols + torch.arange(cols, device=index.device)
    byte = parts[0].reshape(-1)[at // 2].int()
    return torch.where(at % 2 == 0, byte >> 4, byte & 15), at // block


def _scales_at(parts: Parts, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The scales of these blocks, and how far each may be from the one that was kept as it."""
    if len(parts) == 2:
        scale = parts[1][blocks]
        return scale, LAST_PLACE * scale.abs()
    _, codes, nested, offset = parts
    values, code, step = dynamic_values(codes.device), codes[blocks].int(), nested[blocks // NESTED_BLOCK]
    scale = values[code] * step + offset
    return scale, half_gaps(values)[code] * step + LAST_PLACE * scale.abs()


def _misfit(w: Tensor, q: Tensor, block: int) -> Float[Tensor, " n"]:
    """Scales are those that fit their codes best, but for the codes' own moves: each block's, and all alike."""
    off = ((w * q).sum() / q.square().sum().clamp_min(1e-30) - 1).abs() / ALIKE
    if w.shape[1] % block:
        return off.expand(len(w))
    of_w, of_q = (t.unflatten(1, (-1, block)) for t in (w, q))
    misfit = ((of_w * of_q).sum(2) / of_q.square().sum(2).clamp_min(1e-30) - 1).where(of_q.any(2), 0)
    return torch.maximum(off, misfit.square().mean(1).sqrt() / (MISFIT + SPREAD * (block / w.shape[1]) ** 0.5))
