"""One tensor of a model beside the rows of a file that it is said to be.

Which rows: all of a small tensor; of a large one the first and the last, those with which joined pieces begin, and a
few that chance picks by the tensor's name, so the same in each run. How far apart: 0 where every number looked at is
the same once it has the model's type; for packed ones a share of what rounding leaves, and more than 1 is a fault.
"""

from __future__ import annotations

import math
import random
import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.ckpt.origin import Origin
from veneer.core.op import TransposedLinearOp, op_of
from veneer.core.weight import is_plain
from veneer.quant.inputs import Inputs
from veneer.quant.layer import Packed
from veneer.quant.stack import PackedStack
from veneer.quant.storage import NEAREST, Rounding, storage_of

__all__ = ["Held", "Seen", "comparable", "compare", "raw", "shape_of"]

ROWS = 4  # by chance, beside the first and the last
SMALL = 1 << 13  # numbers of a tensor that is looked at whole
LEAST = 256  # numbers that make a row worth reading

Held = Tensor | Packed
"""A tensor of a model, or the layer whose weight it is the codes of."""


class Seen(NamedTuple):
    """What came of it: how far off, and what was read for it."""

    off: float
    rows: int
    bytes: int


def raw(held: Held) -> Tensor:
    return held.parts[0] if isinstance(held, Packed) else held


def shape_of(held: Held) -> tuple[int, ...]:
    return tuple(held.weight_shape if isinstance(held, Packed) else held.shape)


def comparable(held: Held, origin: Origin) -> bool:
    """Whether one can say how the two must agree: not where somebody else packed one of them."""
    there = origin.dtypes
    numbers = all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in there)
    if isinstance(held, Packed | PackedStack):
        return numbers
    return (numbers and is_plain(held)) or (type(held) in (Tensor, torch.nn.Parameter) and there == {held.dtype})


def compare(name: str, held: Held, origin: Origin, inputs: Inputs | None = None) -> Seen:
    if isinstance(held, Packed):
        return _packed(name, held, origin, Rounding(held.weighed is not False, inputs))
    if isinstance(held, PackedStack):
        return _stack(name, held, origin)
    index, width = _chosen(name, tuple(held.shape), origin)
    wanted = origin.rows(index, width)
    there = held.detach().reshape(-1, width)[torch.tensor(index, device=held.device)].cpu()
    same = (wanted.to(there.dtype) == there) | (wanted.isnan() & there.isnan())
    return Seen(0.0 if bool(same.all()) else math.inf, len(index), wanted.nbytes)


def _packed(name: str, layer: Packed, origin: Origin, rounding: Rounding) -> Seen:
    shape = layer.matrix_shape
    index, turned = _picked(name, *shape, origin.starts(shape[1])), type(op_of(layer)) is TransposedLinearOp
    if turned:  # its rows lie across the file's
        wanted = origin.rows([0], origin.count).view(layer.weight_shape).T[index]
    else:
        wanted = origin.rows(index, shape[1])
    places = torch.tensor(index, device=layer.parts[0].device)
    w = wanted.to(places.device).to(layer.weight_dtype)
    off = storage_of(layer.recipe).off_by(w, layer.parts, shape, places, layer.recipe, rounding)
    return Seen(_worst(off), len(index), origin.count * wanted.itemsize if turned else wanted.nbytes)


def _stack(name: str, stack: PackedStack, origin: Origin) -> Seen:
    """Each matrix of it is packed by itself."""
    out, width = stack.shape[-2], stack.shape[-1]
    index = _picked(
        name, stack.numel() // width, width, [*origin.starts(width), *range(0, stack.numel() // width, out)]
    )
    wanted, off, storage = origin.rows(index, width), 0.0, storage_of(stack.recipe)
    parts = [part.flatten(0, stack.dim() - 3) for part in stack.parts]
    for one in sorted({row // out for row in index}):
        own = [i for i, row in enumerate(index) if row // out == one]
        places = torch.tensor([index[i] % out for i in own], device=parts[0].device)
        w = wanted[own].to(places.device).to(stack.dtype)
        of_one = tuple(part[one] for part in parts)
        off = max(off, _worst(storage.off_by(w, of_one, (out, width), places, stack.recipe, NEAREST)))
    return Seen(off, len(index), wanted.nbytes)


def _worst(off: Tensor) -> float:
    return float(off.nan_to_num(math.inf, math.inf).max())


# --- which rows ------------------------------------------------------------------------------------------------------


def _chosen(name: str, shape: tuple[int, ...], origin: Origin) -> tuple[list[int], int]:
    """Rows, and how many numbers are in one: of a vector all, else of as many trailing axes as make a row."""
    width = shape[-1] if shape else 1
    for size in shape[-2:0:-1]:
        if width >= LEAST or len(origin.pieces) > 1:
            break
        width *= size
    return _picked(name, origin.count // width, width, origin.starts(width)), width


def _picked(name: str, rows: int, width: int, starts: list[int]) -> list[int]:
    if rows * width <= SMALL:
        return list(range(rows))
    chance = random.Random(zlib.crc32(name.encode()))
    return sorted({0, rows - 1, *starts, *chance.sample(range(rows), min(rows, ROWS))})
