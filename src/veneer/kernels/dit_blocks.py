"""Blocks of image transformers (SD 3, FLUX, Qwen-Image) as autograd functions that keep what they cannot do without.

    m(x) = norm(x) (1 + scale) + shift        scale, shift and gates come from the time: a row for each picture

    two streams   image and text, each:  x -> m -> q, k, v           Enter of image_blocks.py keeps x
                  one attention over both, its heads normed and turned
                  each:  x + gate out(o) -> m -> unit -> x + gate'   Tail of block.py keeps o, the sum and the entry
    one stream    x -> m -> q, k, v, entry                           Enter; four layers that read one input
                  x + gate out(attention, act(entry))                Joined keeps the attention and the entry

In autograd's hands a two-stream block keeps each modulated norm's input, its normed input and its output, the
activation's input and output, and what each gate multiplies. Gates need not see what they multiply here: the time is
frozen, so nobody asks for their gradient; where somebody does, the block runs plainly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from veneer.kernels.block import Tail, Unit, rows_of, tail_tensors
from veneer.kernels.group import Factors, Group
from veneer.kernels.image_blocks import LayerNorm, entered
from veneer.kernels.pieces import activated, activated_back

__all__ = ["Gate", "Single", "Stream", "run_single", "run_streams"]

Attend = Callable[[list[tuple[Tensor, Tensor, Tensor]]], list[Tensor]]
"""q, k, v of each stream, as rows -> each stream's part of what the attention gives."""


class Gate(NamedTuple):
    """A row for each picture, times what a layer gives: where Gemma has a norm. To go back it needs no output."""

    gate: Tensor  # (pictures, n)

    reads_output = False

    def drawn(self, x: Tensor, width: int) -> None:
        return None

    def onto(self, plus: Tensor, y: Tensor, _: None = None) -> Tensor:
        return torch.addcmul(self._by_picture(plus), self._by_picture(y), self.gate[:, None]).view(y.shape)

    def back(self, g: Tensor, *_: Any) -> Tensor:
        return (self._by_picture(g) * self.gate[:, None]).view(g.shape)

    def _by_picture(self, t: Tensor) -> Tensor:
        return t.view(len(self.gate), -1, t.shape[-1])


class StreamEnd(NamedTuple):
    """What block.py's Tail reads."""

    out: Group
    second: LayerNorm
    unit: Unit
    factors: tuple[Factors, ...]
    posts: tuple[Gate, Gate]
    parallel: bool = False


class Stream(NamedTuple):
    """The image's, or the text's, half of a block at this call. `end` is None where nobody reads on."""

    first: LayerNorm
    qkv: Group
    factors: Factors
    end: StreamEnd | None

    @property
    def groups(self) -> list[Group]:
        rest = [] if self.end is None else [self.end.out, self.end.unit.entry, self.end.unit.down]
        return [self.qkv, *rest]


def run_streams(
    xs: Sequence[Tensor], streams: Sequence[Stream], attend: Attend, level: str
) -> tuple[Tensor | None, ...]:
    """What each stream goes on with, keeping what `level` says."""
    if level in ("none", "gate_up"):
        return _run_streams(tuple(xs), streams, attend, level == "gate_up")
    draws = _draws(group for stream in streams for group in stream.groups)
    return checkpoint(_run_streams, tuple(xs), streams, attend, True, use_reentrant=False, preserve_rng_state=draws)  # type: ignore[return-value]


def _run_streams(
    xs: tuple[Tensor, ...], streams: Sequence[Stream], attend: Attend, again: bool
) -> tuple[Tensor | None, ...]:
    entries = [entered(x, s.first, s.qkv, s.factors) for x, s in zip(xs, streams, strict=True)]
    parts = attend([(q, k, v) for q, k, v, _ in entries])
    return tuple(
        None if s.end is None else Tail.apply(beside, o, s.end, again, *tail_tensors(s.end))
        for (*_, beside), o, s in zip(entries, parts, streams, strict=True)
    )  # type: ignore[return-value]


def _draws(groups: Any) -> bool:
    """Whether anything draws random numbers."""
    return any(layer.dropout for group in groups for layer in group.layers)


@dataclass(slots=True)
class Single:
    """A block of one stream, as it is at this call."""

    first: LayerNorm
    entry: Group  # q, k, v and the unit's entry
    out: Group
    act: str
    gate: Gate
    factors: tuple[Factors, Factors]


def run_single(x: Tensor, block: Single, attend: Attend, level: str) -> Tensor:
    """The block's output. Its unit is not computed again by itself: the levels are none, and the whole block."""
    if level in ("none", "gate_up"):
        return _run_single(x, block, attend)
    draws = _draws((block.entry, block.out))
    return checkpoint(_run_single, x, block, attend, use_reentrant=False, preserve_rng_state=draws)  # type: ignore[return-value]


def _run_single(x: Tensor, block: Single, attend: Attend) -> Tensor:
    q, k, v, entry, beside = entered(x, block.first, block.entry, block.factors[0])
    (o,) = attend([(q, k, v)])
    return Joined.apply(beside, o, entry, block, *block.out.tensors())  # type: ignore[return-value]


class Joined(torch.autograd.Function):
    """x, the attention's output and the unit's entry -> x + gate out(attention, act(entry))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, o: Tensor, entry: Tensor, block: Single, *tensors: Tensor) -> Tensor:
        wide = _beside(rows_of(o), rows_of(entry), block.act)
        _, factors = block.factors
        thin = block.out.thin(wide, factors.a)
        (y,) = block.out.outputs(wide, thin.h, factors.bs)
        ctx.save_for_backward(o, entry, *([y] if block.out.magnitudes else []))
        ctx.rest = block, thin
        return block.gate.onto(rows_of(x), y).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        o, entry, *ys = ctx.saved_tensors
        block, thin = ctx.rest
        d = block.gate.back(rows_of(g))
        rows = rows_of(entry)
        wide = rows if thin.h is None else _beside(rows_of(o), rows, block.act)  # read for the gradient of A alone
        d_wide, d_out = block.out.back(wide, [d], thin, block.factors[1], ys)
        assert d_wide is not None
        del wide
        d_entry = activated_back(d_wide[:, o.shape[-1] :], rows, block.act).view(entry.shape)
        return g, d_wide[:, : o.shape[-1]].reshape(o.shape), d_entry, None, *d_out


def _beside(o: Tensor, entry: Tensor, act: str) -> Tensor:
    """o and act(entry), side by side."""
    wide = o.new_empty(len(o), o.shape[1] + entry.shape[1])
    left, right = wide.split([o.shape[1], entry.shape[1]], dim=1)
    left.copy_(o)
    if act.startswith("gelu"):
        torch.ops.aten.gelu.out(entry, approximate="tanh" if act == "gelu_tanh" else "none", out=right)
    else:
        right.copy_(activated(entry, act))
    return wide
