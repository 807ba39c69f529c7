"""A decoder block a tile of tokens at a time: for rows so long that one block's own numbers fill a GPU.

    level tiled    there for every token                             there for one tile of TILE tokens
    forward        x, q, k, v, attention, y                          norms, gate, up, their product, thin products
    backward       x, q, k, v, attention, g, d middle, d attention   the same again, and the gradients of all these

Everything but attention treats each token by itself, so nothing is lost by taking a few at a time; it is what ALST does
with the unit and the loss under the name of sequence tiling (arXiv:2506.13996). Gradients of what is learned are
summed over the tiles in fp32. Attention meets all tokens, but each head by itself: a few heads at a time, its scratch
(in fp32, and d k and d v once for every head of q) is a part of what it would be. What it finds for q, k and v is
written over them.

A gated unit 3.5 times as wide as the model thus costs nothing per token; without tiles it is most of the memory. Packed
weights that multiply in the activations' type are unpacked once for all tiles. What a batch of one tile needs is what
the level input needs, and it runs so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import block as home
from veneer.kernels.block import (
    Block,
    Front,
    RandomState,
    Unkept,
    rows_of,
    tail_back,
    tail_forward,
    tail_tensors,
)
from veneer.kernels.group import Bare, Group, unpacked

__all__ = ["HEAD_GROUPS", "TILE", "is_tiled", "run_block"]

TILE = 4096  # tokens: a GPU's products are as quick as with more
HEAD_GROUPS = 8  # attention's heads are taken in so many parts, or as many as k and v have heads


def run_block(x: Tensor, cos: Tensor | None, sin: Tensor | None, block: Block, level: str) -> Tensor:
    """The block's output, keeping what `level` says."""
    if level != "tiled":
        return home.run_block(x, cos, sin, block, level)
    if not is_tiled(x):
        return home.run_block(x, cos, sin, block, "input")
    tiles = list(_tiles(*x.shape[:2]))
    return Tiled.apply(x, cos, sin, block, tiles, *block.qkv.tensors(), *tail_tensors(block))  # type: ignore[return-value]


def is_tiled(x: Tensor) -> bool:
    """Whether the level does anything to (batch, tokens, n)."""
    return x.shape[0] * x.shape[1] > TILE


class Tile(NamedTuple):
    """Some of the batch: rows, and tokens of each."""

    rows: slice
    tokens: slice

    def of(self, t: Any) -> Any:
        """What belongs to it of something with a row for every row of the batch, or with one for all."""
        return t if t is None else t[self.rows if len(t) > 1 else slice(None), self.tokens]


def _tiles(rows: int, tokens: int) -> Iterator[Tile]:
    """Parts of one row, or several whole rows, so that a tile is one piece of memory."""
    if tokens > TILE:
        for row in range(rows):
            for at in range(0, tokens, TILE):
                yield Tile(slice(row, row + 1), slice(at, at + TILE))
    else:
        step = TILE // max(tokens, 1)
        for row in range(0, rows, step):
            yield Tile(slice(row, row + step), slice(None))


class Tiled(torch.autograd.Function):
    """The block as one function that keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Any, sin: Any, block: Block, tiles: list[Tile], *tensors: Tensor) -> Tensor:
        state = RandomState.now(x) if block.random else None
        qkv = _entered(x, cos, sin, block, tiles, [Unkept() for _ in tiles])
        os = [block.attend(*few) for few in _by_heads(block, qkv)]
        del qkv
        y, tail = torch.empty_like(x), _opened_tail(block, x.dtype)
        for tile in tiles:
            own, _ = tail_forward(_narrowed(tail, tile, len(x)), rows_of(tile.of(x)), _beside(os, tile))
            tile.of(y).copy_(own.view_as(tile.of(y)))  # type: ignore[union-attr]
        ctx.save_for_backward(x)
        ctx.rest = block, cos, sin, tiles, state
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        block, cos, sin, tiles, state = ctx.rest
        (x,) = ctx.saved_tensors
        fronts = [Held(ctx.needs_input_grad[0]) for _ in tiles]
        with RandomState.again(state, x):
            qkv = _entered(x, cos, sin, block, tiles, fronts)
            heads = list(_attended(block, qkv))
            d_x, d_o, d_last = _tails_back(block, x, g, [few.o.detach() for few in heads], tiles)
        while heads:
            heads.pop().go_back(d_o)
        del d_o
        d_first = _fronts_back(fronts, qkv, d_x, tiles)
        return (d_x if ctx.needs_input_grad[0] else None), None, None, None, None, *d_first, *d_last


class Held:
    """Stands in for autograd's context, for one tile."""

    saved_tensors: tuple[Tensor, ...] = ()
    rest: Any = None

    def __init__(self, needs_x: bool) -> None:
        self.needs_input_grad = (needs_x,)

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


class Sums:
    """Gradients of what is learned, over the tiles."""

    found: list[Tensor | None] | None = None

    def add(self, parts: Sequence[Tensor | None]) -> None:
        wide = [t if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in parts]
        if self.found is None:
            self.found = wide
            return
        for total, part in zip(self.found, wide, strict=True):
            if total is not None and part is not None:
                total.add_(part)


# ------------------------------------------------------------------ tile by tile


def _entered(x: Tensor, cos: Any, sin: Any, block: Block, tiles: list[Tile], fronts: Sequence[Any]) -> list[Tensor]:
    """q, k and v of all tokens, as (batch, tokens, heads, d)."""
    many, few = block.heads
    whole = [x.new_empty(*x.shape[:2], n, block.head_dim) for n in (many, few, few)]
    front = replace(block, qkv=_opened(block.qkv, x.dtype))
    for tile, held in zip(tiles, fronts, strict=True):
        own = Front.forward(held, tile.of(x), tile.of(cos), tile.of(sin), _narrowed(front, tile, len(x)))
        for into, part in zip(whole, own[:3], strict=True):
            tile.of(into).copy_(part)
    return whole


def _fronts_back(fronts: list[Held], d_qkv: list[Tensor], d_x: Tensor, tiles: list[Tile]) -> list[Tensor | None]:
    """Adds to what flows past the first norm, in its place, what flows through it."""
    sums = Sums()
    for tile in reversed(tiles):
        held = fronts.pop()
        dx, _, _, _, *found = Front.backward(held, *(tile.of(t) for t in d_qkv), tile.of(d_x))
        sums.add(found)
        if dx is not None:
            tile.of(d_x).copy_(dx)
    return sums.found or []


def _tails_back(
    block: Block, x: Tensor, g: Tensor, os: list[Tensor], tiles: list[Tile]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The second half, once more and backwards: gradients of x (beside the attention), of the attention, of factors."""
    d_x, d_o = torch.empty_like(x), x.new_empty(*x.shape[:2], sum(o.shape[-1] for o in os))
    sums, tail = Sums(), _opened_tail(block, x.dtype)
    for tile in tiles:
        own, o = _narrowed(tail, tile, len(x)), _beside(os, tile)
        _, kept = tail_forward(own, rows_of(tile.of(x)), o, want=False)
        beside, d_own, found = tail_back(own, rows_of(tile.of(g)), o, kept)
        for into, part in ((d_x, beside), (d_o, d_own)):
            tile.of(into).copy_(part.view_as(tile.of(into)))
        sums.add(found)
    return d_x, d_o, sums.found or []


def _beside(os: list[Tensor], tile: Tile) -> Tensor:
    """The attention of a tile, all heads."""
    return torch.cat([rows_of(tile.of(o)) for o in os], dim=-1)


# ------------------------------------------------------------------ a few heads at a time


@dataclass
class Few:
    """A few heads of q with those of k and v that they meet, and what attention made of them."""

    room: tuple[Tensor, ...]  # their places in q, k and v, to be written over
    leaves: list[Tensor]
    o: Tensor
    columns: slice  # of d o

    def go_back(self, d_o: Tensor) -> None:
        found = torch.autograd.grad(self.o, self.leaves, d_o[..., self.columns])
        for place, part in zip(self.room, found, strict=True):
            place.copy_(part)


def _by_heads(block: Block, qkv: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    many, few = block.heads
    parts = next(n for n in range(min(few, HEAD_GROUPS), 0, -1) if few % n == 0)
    yield from zip(*(t.split(n // parts, dim=2) for t, n in zip(qkv, (many, few, few), strict=True)), strict=True)


def _attended(block: Block, qkv: list[Tensor]) -> Iterator[Few]:
    """`data`, because autograd counts how often a memory was written: one part's may be, while others wait."""
    at = 0
    for room in _by_heads(block, qkv):
        leaves = [t.data.requires_grad_() for t in room]
        with torch.enable_grad():
            o = block.attend(*leaves)
        yield Few(room, leaves, o, slice(at, at + o.shape[-1]))
        at += o.shape[-1]


# ------------------------------------------------------------------ a block for one tile


def _over(group: Group, change: Callable[[Bare], Bare]) -> Group:
    return replace(group, layers=tuple(map(change, group.layers)))


def _opened(group: Group, dtype: torch.dtype) -> Group:
    """With weights that multiply in the activations' type, unpacked once for all tiles."""
    return _over(group, lambda layer: replace(layer, weight=unpacked(layer.weight, dtype)))


def _opened_tail(block: Block, dtype: torch.dtype) -> Block:
    unit = replace(block.unit, entry=_opened(block.unit.entry, dtype), down=_opened(block.unit.down, dtype))
    return replace(block, out=_opened(block.out, dtype), unit=unit)


def _narrowed(block: Block, tile: Tile, rows: int) -> Block:
    """With the adapters of the tile's rows, where each row has its own."""
    entry, down = (_narrowed_group(group, tile, rows) for group in (block.unit.entry, block.unit.down))
    qkv, out = (_narrowed_group(group, tile, rows) for group in (block.qkv, block.out))
    return replace(block, qkv=qkv, out=out, unit=replace(block.unit, entry=entry, down=down))


def _narrowed_group(group: Group, tile: Tile, rows: int) -> Group:
    def own(layer: Bare) -> Bare:
        if layer.picks is None:
            return layer
        return replace(layer, picks=layer.picks.repeat_interleave(rows // len(layer.picks), 0)[tile.rows])

    return _over(group, own)
