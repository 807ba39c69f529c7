"""The blocks of a diffusion model as autograd functions that keep what their backward passes cannot do without.

    Enter     x -> norm -> siblings (q, k, v)                   keeps x
              attention                                         keeps q, k, v and its output
    Between   x, attention -> out + x -> norm -> siblings (q)   keeps the attention's output and the sum
    Tail      x, attention -> out + x -> norm -> unit -> + x    as in block.py: the same, and gate and up
    Resnet    x -> norm, SiLU, conv -> + time -> norm, SiLU, conv -> + x
                                                                keeps x and what the first convolution gave; with
                                                                adapters on its convolutions, their inputs as well

What is written for the text, k and v of the cross-attention, needs no gradient of the text where the text encoder is
frozen. Norms, activations and the unit's product are formed again; a frozen convolution keeps nothing. In autograd's
hands the same resnet keeps the inputs of both norms, both activations and both convolutions, six images instead of two.

What is computed again is asked for by the words of block.py: gate_up there, and for middle, input and tiled the whole
block under torch's own checkpoint, which keeps its input only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from veneer.kernels.block import Tail, Unit, rows_of, tail_tensors, through
from veneer.kernels.group import Factors, Group
from veneer.kernels.image_pieces import GroupStats, Stats, convolved, convolved_back, image_kernels_for

__all__ = [
    "GroupNorm",
    "Image",
    "LayerNorm",
    "Residual",
    "entered",
    "frozen_convolution",
    "group_normed",
    "layered",
    "run_image",
    "run_residual",
]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class LayerNorm(NamedTuple):
    """A LayerNorm with frozen gain and bias, called as block.py calls its norms."""

    weight: Tensor  # (n,), or a row for each picture, and the bias alike
    bias: Tensor
    eps: float

    def forward(
        self,
        x: Tensor,
        stats: Stats | None = None,
        rounded: torch.dtype | None = None,
        plus: Tensor | None = None,
    ) -> tuple[Tensor, Stats]:
        if plus is not None:
            x.add_(plus)
        return image_kernels_for(x).layer_norm(x, self.weight, self.bias, self.eps, stats)

    def back(self, g: Tensor, x: Tensor, stats: Stats, plus: Tensor | None = None) -> Tensor:
        return image_kernels_for(x).layer_norm_back(g, x, stats, self.weight, plus)


# ------------------------------------------------------------------ transformer blocks


class End(NamedTuple):
    """What block.py's Tail reads of a block."""

    out: Group
    second: LayerNorm
    unit: Unit
    factors: tuple[Factors, ...]  # one that is not read, then of out and of the unit's two
    posts: tuple[None, None] = (None, None)
    parallel: bool = False


@dataclass(slots=True)
class Image:
    """A transformer block of an image model, as it is at this call."""

    first: LayerNorm
    qkv: Group
    out: Group
    second: LayerNorm
    q: Group
    kv: Group
    end: End
    attend: Attend
    attend_text: Attend
    factors: tuple[Factors, ...]  # of qkv, out, q, kv; the rest is in `end`

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.out, self.q, self.kv, self.end.out, self.end.unit.entry, self.end.unit.down


class Enter(torch.autograd.Function):
    """x -> the siblings' outputs, and x once more: what flows back beside the norm comes in here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Any, group: Group, factors: Factors, *tensors: Tensor) -> tuple[Tensor, ...]:
        rows = rows_of(x)
        normed, stats = (rows, None) if norm is None else norm.forward(rows)
        thin = group.thin(normed, factors.a)
        ys = group.outputs(normed, thin.h, factors.bs)
        ctx.save_for_backward(x, *(ys if group.magnitudes else ()))
        ctx.rest = norm, group, factors, stats, thin
        ctx.set_materialize_grads(False)
        return *(y.view(*x.shape[:-1], y.shape[-1]) for y in ys), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *ys = ctx.saved_tensors
        norm, group, factors, stats, thin = ctx.rest
        *own, beside = gs
        rows = rows_of(x)
        normed = rows if norm is None or thin.h is None else norm.forward(rows, stats)[0]
        g_rows = [rows_of(g) for g in own if g is not None]
        if len(g_rows) < len(own):  # somebody asked for the gradient of some outputs only
            g_rows = _filled(own, group, rows)
        dx, d_tensors = group.back(normed, g_rows, thin, factors, ys, ctx.needs_input_grad[0])
        if dx is not None:
            past = None if beside is None else rows_of(beside)
            dx = _joined(dx, past) if norm is None else norm.back(dx, rows, stats, past)
            dx = dx.view(x.shape)
        return dx, None, None, None, *d_tensors


def _filled(gs: list[Tensor | None], group: Group, rows: Tensor) -> list[Tensor]:
    wide = [layer.weight.shape[0] for layer in group.layers]
    return [rows.new_zeros(len(rows), n) if g is None else rows_of(g) for g, n in zip(gs, wide, strict=True)]


def _joined(dx: Tensor, past: Tensor | None) -> Tensor:
    return dx if past is None else dx.add_(past)


def entered(x: Tensor, norm: Any, group: Group, factors: Factors) -> tuple[Tensor, ...]:
    return Enter.apply(x, norm, group, factors, *group.tensors())  # type: ignore[return-value]


class Between(torch.autograd.Function):
    """x, o -> the query of the next attention, and the sum out(o) + x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, o: Tensor, block: Image, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        _, f_out, f_q, *_ = block.factors
        rows = rows_of(o)
        out = block.out.thin(rows, f_out.a)
        middle, outs, _ = through(block.out, rows, out, f_out, rows_of(x))
        assert middle is not None
        normed, stats = block.second.forward(middle)
        thin = block.q.thin(normed, f_q.a)
        (q,) = block.q.outputs(normed, thin.h, f_q.bs)
        middle = middle.view(x.shape)
        ctx.save_for_backward(o, middle, *outs, *([q] if block.q.magnitudes else []))
        ctx.rest = block, stats, out, thin
        return q.view(*x.shape[:-1], -1), middle

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gq: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        o, middle, *ys = ctx.saved_tensors
        block, stats, out, thin = ctx.rest
        outs, qs = ys[: len(block.out.magnitudes)], ys[len(block.out.magnitudes) :]
        _, f_out, f_q, *_ = block.factors
        rows = rows_of(middle)
        normed = rows if thin.h is None else block.second.forward(rows, stats)[0]
        d_normed, d_q = block.q.back(normed, [rows_of(gq)], thin, f_q, qs)
        assert d_normed is not None
        d_middle = block.second.back(d_normed, rows, stats, rows_of(g))
        d_o, d_out = block.out.back(rows_of(o), [d_middle], out, f_out, outs, biased=False)
        assert d_o is not None
        return d_middle.view(middle.shape), d_o.view(o.shape), None, *d_out, *d_q


def _run(x: Tensor, text: Tensor, block: Image, again: bool) -> Tensor:
    q, k, v, beside = entered(x, block.first, block.qkv, block.factors[0])
    o = block.attend(q, k, v)
    q, middle = Between.apply(beside, o, block, *block.out.tensors(), *block.q.tensors())  # type: ignore[misc]
    k, v, _ = entered(text, None, block.kv, block.factors[3])
    o = block.attend_text(q, k, v)
    return Tail.apply(middle, o, block.end, again, *tail_tensors(block.end))  # type: ignore[return-value]


def run_image(x: Tensor, text: Tensor, block: Image, level: str) -> Tensor:
    """The block's output, keeping what `level` says."""
    if level in ("middle", "input", "tiled"):
        draws = any(layer.dropout for group in block.groups for layer in group.layers)
        return checkpoint(_run, x, text, block, True, use_reentrant=False, preserve_rng_state=draws)  # type: ignore[return-value]
    return _run(x, text, block, level == "gate_up")


# ------------------------------------------------------------------ images


class GroupNorm(NamedTuple):
    """A GroupNorm with frozen gain and bias, and whether SiLU follows."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    act: bool

    def forward(self, x: Tensor, shift: Tensor | None = None, stats: GroupStats | None = None) -> Any:
        norm = image_kernels_for(x).group_norm
        return norm(x, self.weight, self.bias, self.groups, self.eps, self.act, shift, stats)

    def back(self, g: Tensor, x: Tensor, stats: GroupStats, plus: Tensor | None = None) -> Tensor:
        back = image_kernels_for(x).group_norm_back
        return back(g, x, self.weight, self.groups, self.act, stats, plus)


def places_of(x: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, places, c), without a copy where channels are last in memory."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])


def image_of(places: Tensor, like: Tensor) -> Tensor:
    n, c = places.shape[0], places.shape[2]
    return places.view(n, *like.shape[2:], c).permute(0, 3, 1, 2)


class GroupNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: GroupNorm) -> Tensor:
        y, stats = norm.forward(places_of(x))
        ctx.save_for_backward(x)
        ctx.rest = norm, stats
        return image_of(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        norm, stats = ctx.rest
        return image_of(norm.back(places_of(g), places_of(x), stats), x), None


def group_normed(x: Tensor, norm: GroupNorm) -> Tensor:
    """GroupNorm (and SiLU) that keeps its input and nothing else, with channels last."""
    return GroupNormFunction.apply(x, norm)  # type: ignore[return-value]


class FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: nn.Conv2d) -> Tensor:
        ctx.rest = conv, x.shape
        return convolved(x, conv, conv.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        conv, shape = ctx.rest
        return convolved_back(g, conv, shape), None


def frozen_convolution(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution by a frozen weight that keeps nothing."""
    return FrozenConvolution.apply(x, conv)  # type: ignore[return-value]


@dataclass(slots=True)
class Residual:
    """A residual block of two convolutions, as it is at this call."""

    first: GroupNorm
    conv1: nn.Conv2d
    second: GroupNorm
    conv2: nn.Conv2d
    shortcut: nn.Conv2d | None
    adapted: tuple[nn.Conv2d, ...] = ()  # those of them on which adapters act


class Resnet(torch.autograd.Function):
    """x and the time's share of each channel -> the block's output. conv1's bias is added where the norm reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, time: Tensor | None, block: Residual) -> Tensor:
        rows = places_of(x)
        y, s1 = block.first.forward(rows)
        h = convolved(image_of(y, x), block.conv1)
        y, s2 = block.second.forward(places_of(h), _shift(time, block.conv1.bias, x))
        y = convolved(image_of(y, h), block.conv2)
        beside, bias = x, block.conv2.bias
        if block.shortcut is not None:
            beside, bias = convolved(x, block.shortcut), _sum(bias, block.shortcut.bias)
        ctx.save_for_backward(x, h)
        ctx.rest = block, s1, s2
        return image_of(image_kernels_for(x).add_channels(places_of(y), places_of(beside), bias), y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, h = ctx.saved_tensors
        block, s1, s2 = ctx.rest
        d = convolved_back(g, block.conv2, h.shape)
        dh = block.second.back(places_of(d), places_of(h), s2)
        d_time = dh.sum(1) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, d_time, None
        d = convolved_back(image_of(dh, h), block.conv1, x.shape)
        beside = g if block.shortcut is None else convolved_back(g, block.shortcut, x.shape)
        dx = block.first.back(places_of(d), places_of(x), s1, places_of(beside))
        return image_of(dx, x), d_time, None


def _shift(time: Tensor | None, bias: Tensor | None, x: Tensor) -> Tensor | None:
    if time is None:
        return None if bias is None else bias.expand(x.shape[0], -1)
    return _sum(time, bias)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def run_residual(x: Tensor, time: Tensor | None, block: Residual) -> Tensor:
    if block.adapted:
        return _by_layers(x, time, block)
    return Resnet.apply(x, time, block)  # type: ignore[return-value]


def _by_layers(x: Tensor, time: Tensor | None, block: Residual) -> Tensor:
    """A convolution with adapters keeps its input for their gradients, so it runs as the layer that it is; norms and
    activations around it run as ever. Four images are kept at most."""
    h = layered(group_normed(x, block.first), block.conv1, block.adapted)
    h = h if time is None else h + time[:, :, None, None]
    h = layered(group_normed(h, block.second), block.conv2, block.adapted)
    return h + (x if block.shortcut is None else layered(x, block.shortcut, block.adapted))


def layered(x: Tensor, conv: nn.Conv2d, adapted: tuple[nn.Conv2d, ...]) -> Tensor:
    """x through the convolution, by itself where adapters act on it."""
    if not any(conv is each for each in adapted):
        return frozen_convolution(x, conv)
    return conv(x.contiguous(memory_format=torch.channels_last))
