"""A decoder block as a few autograd functions, each of which keeps what its backward pass cannot do without.

    Front   x -> norm -> q, k, v, rotated          keeps x
            attention, whichever the model has     keeps q, k, v and its output
    Tail    x, attention -> o + x -> norm -> gate, up -> down + x

    recompute  kept for each token, in numbers                     computed again in the backward pass
    none       x, q, k, v, attention, middle, gate, up             -
    gate_up    x, q, k, v, attention, middle                       gate and up
    middle     x, middle                                           and q, k, v and the attention
    input      x                                                   and o; never down, whose output nobody needs
    tiled      x                                                   the same, a tile of tokens at a time (tiled.py)

Only what is as wide as the model goes through autograd's saved tensors (and whatever hooks lie on those); what is r
wide, one number a row or shared by all blocks hangs on the function itself.

Blocks of other builds differ in the tail: Gemma 2 and 3 norm what the attention and the unit give before it is added,
and keep that, too, as wide as x each (or compute it again); in Phi the unit reads x's norm like the attention, and
there is no middle; GPT-2's unit has no gate, and both it and Phi drop out of what is added to the residual stream (its
masks, a byte a number, are kept with none and gate_up and else drawn again).

DoRA's magnitudes need what their layers gave, without the biases: next to a large one, what a magnitude scales has few
places left in half precision. q, k and v are there (turned back), gate and up, too; with biases gate and up are kept
without them, and q, k and v once more. The outputs of o and of down are kept besides with none and gate_up, as wide as
x each, and computed again with middle and input.

Rotations and the activation's product are always formed again, each in one pass over memory; so are norms, unless all
that is wanted of what they gave is a thin product (`Normed`). Everywhere the gradient that flows past a norm is added
in the pass that goes back through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.core.lowrank import shaped
from veneer.kernels.graphs import room_for
from veneer.kernels.group import Factors, Group, Thin, drawn, dropped, factors_of, token_sum
from veneer.kernels.pieces import Pair, activated, activated_back, kernels_for

__all__ = [
    "LEVELS",
    "Attend",
    "Block",
    "Drop",
    "Ending",
    "Norm",
    "Unit",
    "norm",
    "rotated",
    "run_block",
    "run_mlp",
    "through",
]

THIN = 64  # ranks up to this are added inside other kernels
LEVELS = ("none", "gate_up", "middle", "input", "tiled")  # the last: tiled.py
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Norm(NamedTuple):
    """An RMSNorm with a frozen gain."""

    weight: Tensor
    eps: float
    offset: float = 0.0  # Gemma's gain is w + 1

    def forward(
        self,
        x: Tensor,
        rstd: Tensor | None = None,
        rounded: torch.dtype | None = None,
        plus: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return kernels_for(x).rms_norm(x, self.weight, self.eps, self.offset, rstd, rounded, plus)

    def back(self, g: Tensor, x: Tensor, rstd: Tensor, plus: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return kernels_for(x).rms_norm_back(g, x, rstd, self.weight, self.offset, plus, out)


class Drop(NamedTuple):
    """Dropout of what a layer gives before it is added: where Gemma has a norm. To go back it needs its mask alone."""

    p: float

    reads_output = False

    def drawn(self, x: Tensor, width: int) -> Tensor:
        return drawn(x.new_empty(len(x), width), self.p)

    def onto(self, plus: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return dropped(y, mask, self.p).add_(plus)

    def back(self, g: Tensor, *kept: Tensor) -> Tensor:
        return dropped(g, kept[-1], self.p)


@dataclass(slots=True)
class Normed:
    """What a norm gave, formed again only where that is asked for.

    d^T (x rstd gain) = ((d rstd)^T x) gain: a product with something thin needs x and no more.
    """

    norm: Any
    x: Tensor
    rstd: Any
    y: Tensor | None = None

    def formed(self) -> Tensor:
        if self.y is None:
            self.y, _ = self.norm.forward(self.x, self.rstd)
        return self.y

    def product(self, d: Tensor, dtype: torch.dtype) -> Tensor:
        if self.y is not None or not isinstance(self.norm, Norm) or d.dtype == torch.float16:  # d rstd might vanish
            return token_sum(d.T, self.formed(), dtype)
        weight = self.norm.weight
        gain = weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.norm.offset
        scaled = torch.mul(d, self.rstd[:, None], out=torch.empty_like(d))
        return token_sum(scaled.T, self.x, dtype).mul_(gain)


@dataclass(slots=True)
class Unit:
    """A gated unit: gate and up as two layers, or as one that gives both. Or one without a gate: down(act(up))."""

    entry: Group
    down: Group
    act: str
    gated: bool = True
    up_first: bool = False  # of one layer: whether up is its first half, as diffusers has it

    @property
    def is_lean(self) -> bool:
        """Whether the adapters' share can be added inside the activation: thin, and nothing but h B^T."""
        layers = (*self.entry.layers, *self.down.layers)
        return self.gated and all(layer.is_bare and layer.rank <= THIN for layer in layers)

    def product(self, gates: Sequence[Tensor]) -> Tensor:
        return kernels_for(gates[0]).glu(*gates, self.act) if self.gated else activated(gates[0], self.act)


@dataclass(slots=True)
class Block:
    """All of a decoder block, as it is at this call."""

    first: Any  # a norm: Norm's methods
    qkv: Group
    heads: tuple[int, int]  # of q; of k and v
    head_dim: int
    turns: bool  # whether q and k are rotated right here, with nothing in between
    out: Group
    second: Any
    unit: Unit
    attend: Attend
    random: bool  # whether anything draws random numbers
    factors: tuple[Factors, Factors, Factors, Factors]  # of qkv, out, and the unit's two
    posts: tuple[Any, Any] = (None, None)  # norm or dropout of what attention and unit give, before it is added
    parallel: bool = False  # the unit reads the block's input, as the attention does

    @property
    def adds_in_turning(self) -> bool:
        """Whether the adapters' share of q and k can be added as they are rotated."""
        layers = self.qkv.layers
        is_thin = all(layer.rank <= THIN and layer.gain is None for layer in layers)
        return self.turns and len(layers) == 3 and is_thin


def rows_of(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# ------------------------------------------------------------------ norms and rotations by themselves


class NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        y, rstd = norm.forward(rows_of(x))
        ctx.save_for_backward(x, rstd)
        ctx.norm = norm
        return shaped(y, *x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, rstd = ctx.saved_tensors
        return ctx.norm.back(rows_of(g), rows_of(x), rstd).view(x.shape), None


def norm(x: Tensor, spec: Norm) -> Tensor:
    """RMSNorm that keeps its input as it is, where autograd would keep it in fp32."""
    return NormFunction.apply(x, spec)  # type: ignore[return-value]


class Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.pairs = pairs
        return kernels_for(x).rotate(x, rows_of(cos), rows_of(sin), torch.empty_like(x), pairs=pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        out = torch.empty(g.shape, dtype=g.dtype, device=g.device)
        rotate = kernels_for(g).rotate
        return rotate(g, rows_of(cos), rows_of(sin), out, back=True, pairs=ctx.pairs), None, None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool = False) -> Tensor:
    """Rotary positions on (batch, tokens, heads, d), of halves or of neighbours."""
    return Rotation.apply(x, cos, sin, pairs)  # type: ignore[return-value]


# ------------------------------------------------------------------ the gated unit


class UnitKept(NamedTuple):
    """What a gated unit keeps besides its input."""

    gate_up: list[Tensor]  # what `entered` gave; empty where it is computed again
    entry: Thin
    down: Thin
    ys: tuple[Tensor, ...]  # what down gave, without its bias, where it has a magnitude or a norm follows
    stats: Any = None  # of that norm


def entered(unit: Unit, x: Tensor, entry: Thin, factors: Factors) -> list[Tensor]:
    """What the entry's layers give, as it is kept: in a lean unit without the adapters' share, with magnitudes without
    the biases; slices of one tensor where one layer gives gate and up."""
    ys = unit.entry.outputs(x, None if unit.is_lean else entry.h, factors.bs, not unit.entry.splits_biases)
    return list(ys) if len(ys) == 2 or not unit.gated else list(_halves(unit, ys[0], -1))


def gates_of(unit: Unit, kept: list[Tensor]) -> list[Tensor]:
    """gate and up, or what goes through the activation where there is no gate."""
    if not unit.entry.splits_biases:
        return kept
    if len(unit.entry.layers) == len(kept):
        return unit.entry.with_biases(kept)
    return list(_halves(unit, unit.entry.with_biases(_entry_outputs(unit, kept))[0], -1))


def _halves(unit: Unit, t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """gate's and up's half of what belongs to the one layer that gives both."""
    first, second = t.chunk(2, dim)
    return (second, first) if unit.up_first else (first, second)


def gate_pairs(unit: Unit, entry: Thin, factors: Factors) -> tuple[Pair, Pair]:
    """What the adapters add to gate and to up: h and B of each."""
    h, bs = entry.h, factors.bs
    if h is None:
        return None, None
    if len(bs) == 1:
        assert bs[0] is not None
        return tuple((h, b) for b in _halves(unit, bs[0], 0))  # type: ignore[return-value]
    return tuple(b if b is None else (h[:, span], b) for b, span in zip(bs, unit.entry.spans, strict=True))  # type: ignore[return-value]


def unit_forward(
    unit: Unit, x: Tensor, factors: tuple[Factors, Factors], plus: Tensor | None, want: bool = True, post: Any = None
) -> tuple[Tensor | None, UnitKept]:
    """down(act(gate(x)) * up(x)) + plus; without the result where only what is kept is wanted."""
    entry = unit.entry.thin(x, factors[0].a)
    own, h = entered(unit, x, entry, factors[0]), None
    gates = gates_of(unit, own)
    if unit.is_lean:
        rounded = unit.down.rounds_to if want or post is not None else None
        pairs = gate_pairs(unit, entry, factors[0])
        product, h = kernels_for(x).thin_glu(*gates, unit.act, *pairs, rounded, factors[1].a)
    else:
        product = unit.product(gates)
    down = unit.down.thin(product, factors[1].a, h)
    y, ys, stats = through(unit.down, product, down, factors[1], plus, want, post)
    return y, UnitKept(own, entry, down, ys, stats)


def through(
    group: Group, x: Tensor, thin: Thin, factors: Factors, plus: Tensor | None, want: bool = True, post: Any = None
) -> tuple[Tensor | None, tuple[Tensor, ...], Any]:
    """A single layer's output, through `post`, plus `plus`, where it is wanted; the output without its bias, where a
    magnitude or the norm needs it; and what `post` keeps: a norm something of each row, dropout its mask."""
    (layer,), (b,) = group.layers, factors.bs
    if not group.magnitudes and post is None:
        wanted = None if not want else layer.forward(x, thin.h, b) if plus is None else layer.onto(plus, x, thin.h, b)
        return wanted, (), None
    gates = not getattr(post, "reads_output", True)
    kept = post.drawn(x, layer.weight.shape[0]) if gates else None
    if gates and not group.magnitudes:
        return (None if not want else post.onto(plus, layer.forward(x, thin.h, b), kept)), (), kept
    y = layer.unbiased(x, thin.h, b)
    whole = with_bias(group, y)
    if gates:
        return (None if not want else post.onto(plus, whole, kept)), (y,), kept
    normed, stats = (whole, None) if post is None else post.forward(whole)
    return (None if not want else normed if plus is None else normed + plus), (y,), stats


def with_bias(group: Group, y: Tensor) -> Tensor:
    bias = group.layers[0].bias
    return y if bias is None else y.clone().add_(bias)


def before_post(post: Any, g: Tensor, group: Group, ys: Sequence[Tensor], stats: Any) -> Tensor:
    """The gradient of what `through` gave, before the norm, gate or dropout that it went through."""
    return g if post is None else post.back(g, *(with_bias(group, y) for y in ys), stats)


def unit_back(
    unit: Unit, g: Tensor, x: Tensor | Normed, kept: UnitKept, factors: tuple[Factors, Factors]
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradients of x and of the factors of gate, up and down."""
    own = list(kept.gate_up)
    if not own:
        own += entered(unit, x if isinstance(x, Tensor) else x.formed(), kept.entry, factors[0])
    kept.gate_up.clear()
    gates = gates_of(unit, own)
    d_rest, gs = unit.down.rest_gradients([g], kept.ys, biased=False), unit.down.scaled([g])
    d = unit.down.thin_gradients(gs, factors[1])
    if unit.is_lean:
        dx, d_tensors = _lean_back(unit, g, x, d, gates, kept, factors)
        return dx, [*d_tensors, *d_rest]
    d_product = unit.down.input_gradient(gs, d, kept.down, factors[1])
    into, product = _gates_back(unit, d_product, gates)
    d_down = unit.down.factor_gradients(product, gs, d, kept.down)
    del product, d_product
    ys = _entry_outputs(unit, own) if unit.entry.magnitudes else []
    gates.clear()
    own.clear()
    dx, d_entry = unit.entry.back(x, into, kept.entry, factors[0], ys, biased=not unit.entry.splits_biases)
    assert dx is not None
    return dx, [*d_entry, *d_down, *d_rest]


def _gates_back(unit: Unit, d_product: Tensor, gates: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The gradients of what the entry's layers gave, and the product, formed again."""
    if not unit.gated:
        return [activated_back(d_product, gates[0], unit.act)], unit.product(gates)
    into = _room_for_gates(unit, d_product)
    d_gate, d_up = into if len(into) == 2 else _halves(unit, into[0], -1)
    return into, kernels_for(d_product).glu_back(d_product, *gates, unit.act, d_gate, d_up)


def _entry_outputs(unit: Unit, gates: Sequence[Tensor]) -> list[Tensor]:
    if len(unit.entry.layers) == len(gates):
        return list(gates)
    return [torch.cat(gates[::-1] if unit.up_first else gates, dim=-1)]  # type: ignore[arg-type]


def _lean_back(
    unit: Unit, g: Tensor, x: Tensor | Normed, d: Tensor | None, gates: list[Tensor], kept: UnitKept,
    factors: tuple[Factors, Factors],
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """The same where no adapter drops out: what they add to anything as wide as the unit is formed where it is used."""
    entry, down = factors
    d_product = unit.down.layers[0].back(g, None)
    gs = _room_for_gates(unit, d_product)
    d_gate, d_up = gs if len(gs) == 2 else _halves(unit, gs[0], -1)
    da, *dbs, d_thin = kernels_for(g).thin_glu_back(
        d_product, *gates, unit.act, d_gate, d_up, *gate_pairs(unit, kept.entry, entry),
        None if d is None or down.a is None else (d, down.a), unit.entry.rounding(gs, entry),
    )  # fmt: skip
    d_down = [] if da is None else [*unit.down.split_a(da), *unit.down.b_gradients([g], kept.down)]
    del d_product
    gates.clear()  # where nothing else holds them, their memory serves what follows
    d_thin = unit.entry.thin_gradients(gs, entry, d_thin)
    dx = unit.entry.input_gradient(gs, d_thin, kept.entry, entry)
    d_entry = [] if d_thin is None else unit.entry.a_gradients(x, d_thin, kept.entry)
    if len(unit.entry.layers) == 1 and dbs[0] is not None:
        dbs = [torch.cat(dbs[::-1] if unit.up_first else dbs)]
    for layer, db in zip(unit.entry.layers, dbs, strict=False):
        d_entry += [] if db is None else layer.split_b(db)
    return dx, [*d_entry, *unit.entry.rest_gradients(gs, ()), *d_down]


def _room_for_gates(unit: Unit, d_product: Tensor) -> list[Tensor]:
    """Where the gradients of gate and up go: the product's own takes the gate's."""
    if len(unit.entry.layers) == 2:
        return [d_product, torch.empty_like(d_product)]
    return [d_product.new_empty(len(d_product), 2 * d_product.shape[1])]


class Mlp(torch.autograd.Function):
    """A gated unit by itself: for blocks of another build."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: Unit, again: bool, *tensors: Tensor) -> Tensor:
        rows, factors = rows_of(x), tuple(factors_of([unit.entry, unit.down], x.dtype))
        y, kept = unit_forward(unit, rows, factors, None)
        ctx.save_for_backward(x, *kept.ys, *(() if again else kept.gate_up))
        ctx.rest = unit, factors, kept._replace(gate_up=[], ys=())
        assert y is not None
        return shaped(y, *x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *wide = ctx.saved_tensors
        unit, factors, kept = ctx.rest
        count = len(unit.down.magnitudes)  # no norm follows here
        kept = kept._replace(ys=tuple(wide[:count]), gate_up=list(wide[count:]))
        dx, d_tensors = unit_back(unit, rows_of(g), rows_of(x), kept, factors)
        return dx.view(x.shape), None, None, *d_tensors


def run_mlp(x: Tensor, unit: Unit, again: bool) -> Tensor:
    return Mlp.apply(x, unit, again, *unit.entry.tensors(), *unit.down.tensors())  # type: ignore[return-value]


# ------------------------------------------------------------------ the first half


class Front(torch.autograd.Function):
    """x -> q, k, v as (batch, tokens, heads, d), and x once more: what flows back beside the norm comes in here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Any, sin: Any, block: Block, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, factors = rows_of(x), block.factors[0]
        normed, rstd = block.first.forward(rows, rounded=block.qkv.rounds_to)
        thin = block.qkv.thin(normed, factors.a)
        inside = block.adds_in_turning
        bs = [None, None, factors.bs[2]] if inside else factors.bs
        splits = block.qkv.splits_biases
        bare = block.qkv.outputs(normed, thin.h, bs, not splits)
        ys = [y.view(*x.shape[:2], -1, block.head_dim) for y in (block.qkv.with_biases(bare) if splits else bare)]
        q, k, v = ys if len(ys) == 3 else ys[0].split([block.heads[0], block.heads[1], block.heads[1]], dim=2)
        if block.turns:
            owns = (None, None)
            if inside and thin.h is not None:
                pairs = zip(factors.bs[:2], block.qkv.spans[:2], strict=True)
                owns = tuple(b if b is None else (thin.h[:, span], b) for b, span in pairs)
            for t, own in zip((q, k), owns, strict=True):
                kernels_for(t).rotate(t, rows_of(cos), rows_of(sin), t, thin=own)
        ctx.save_for_backward(x, *(bare if splits else (q, k, v) if block.qkv.magnitudes else ()))
        ctx.rest = block, rstd, cos, sin, thin
        return q, k, v, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gq: Tensor, gk: Tensor, gv: Tensor, g: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, *outputs = ctx.saved_tensors
        block, rstd, cos, sin, thin = ctx.rest
        gs = _turned_back(block, (gq, gk, gv), cos, sin)
        if (splits := block.qkv.splits_biases) or not outputs:
            ys = outputs
        else:
            ys = _turned_back(block, outputs, *(_inverse(cos, sin) if block.turns else (cos, sin)))
        rows = rows_of(x)
        normed = Normed(block.first, rows, rstd)
        need_x = ctx.needs_input_grad[0]
        d_normed, d_tensors = block.qkv.back(normed, gs, thin, block.factors[0], ys, need_x, biased=not splits)
        dx = None
        if d_normed is not None:
            out = {} if not isinstance(block.first, Norm) or (room := room_for(x)) is None else {"out": rows_of(room)}
            dx = block.first.back(d_normed, rows, rstd, rows_of(g), **out).view(x.shape)
        return dx, None, None, None, *d_tensors


def _inverse(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """With these, turning back gives what was turned, even where positions scale as well (YaRN)."""
    c, s = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (cos, sin))
    size = c.square() + s.square()
    return c / size, s / size


def _turned_back(block: Block, gs: Sequence[Tensor], cos: Any, sin: Any) -> list[Tensor]:
    """Something shaped like q, k and v, as rows: turned back, and side by side where one layer made all three."""
    batch, tokens = gs[0].shape[:2]
    many, few = block.heads
    if len(block.qkv.layers) == 1:
        whole = gs[0].new_empty(batch, tokens, many + 2 * few, block.head_dim)
        rooms = list(whole.split([many, few, few], dim=2))
    else:
        whole = None
        rooms = [g.new_empty(g.shape) if block.turns and i < 2 else g for i, g in enumerate(gs)]
    for i, (g, room) in enumerate(zip(gs, rooms, strict=True)):
        if block.turns and i < 2:
            kernels_for(g).rotate(g, rows_of(cos), rows_of(sin), room, back=True)
        elif room is not g:
            room.copy_(g)
    return [g.reshape(batch * tokens, -1) for g in (rooms if whole is None else [whole])]


# ------------------------------------------------------------------ the second half


@runtime_checkable
class Ending(Protocol):
    """What the second half of a block needs to know: blocks of other builds end so, too."""

    @property
    def out(self) -> Group: ...
    @property
    def second(self) -> Any: ...  # a norm, with Norm's methods
    @property
    def unit(self) -> Unit: ...
    @property
    def factors(self) -> Sequence[Factors]: ...  # the first is another's; then of `out` and of the unit's two
    @property
    def posts(self) -> tuple[Any, Any]: ...
    @property
    def parallel(self) -> bool: ...


class TailKept(NamedTuple):
    middle: Tensor | None
    rstd: Any  # whatever the norm keeps of each row
    out: Thin
    ys: tuple[Tensor, ...]  # what the output projection gave, the same
    stats: Any  # of that norm
    unit: UnitKept


def tail_tensors(block: Ending) -> list[Tensor]:
    return [*block.out.tensors(), *block.unit.entry.tensors(), *block.unit.down.tensors()]


def tail_forward(
    block: Ending, x: Tensor | None, o: Tensor, middle: Tensor | None = None, want: bool = True
) -> tuple[Tensor | None, TailKept]:
    """From the attention's output to the block's; without that where only what is kept is wanted."""
    _, own, *units = block.factors
    out = block.out.thin(o, own.a)
    beside = None
    if middle is None and not (block.parallel or block.posts[0] or block.out.magnitudes):
        # the norm adds x as it reads: what out gives becomes the middle
        middle, ys, stats, beside = block.out.layers[0].forward(o, out.h, own.bs[0]), (), None, x
        total = middle
    else:
        wanted = want if block.parallel else middle is None
        total, ys, stats = through(block.out, o, out, own, x, wanted, block.posts[0])
        if middle is None:
            middle = x if block.parallel else total
    assert middle is not None
    normed, rstd = block.second.forward(middle, rounded=block.unit.entry.rounds_to, plus=beside)
    plus = total if block.parallel else middle
    y, unit = unit_forward(block.unit, normed, (units[0], units[1]), plus, want, block.posts[1])
    return y, TailKept(middle, rstd, out, ys, stats, unit)


def tail_back(block: Ending, g: Tensor, o: Tensor, kept: TailKept) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The gradients of x, of o, and of the factors."""
    assert kept.middle is not None
    normed = Normed(block.second, kept.middle, kept.rstd)
    first, second = block.posts
    d_down = before_post(second, g, block.unit.down, kept.unit.ys, kept.unit.stats)
    d_normed, d_unit = unit_back(block.unit, d_down, normed, kept.unit, (block.factors[2], block.factors[3]))
    del normed, d_down
    d_middle = block.second.back(d_normed, kept.middle, kept.rstd, g)
    d_total = g if block.parallel else d_middle
    d_y = before_post(first, d_total, block.out, kept.ys, kept.stats)
    d_o, d_out = block.out.back(o, [d_y], kept.out, block.factors[1], kept.ys, biased=False)
    assert d_o is not None
    return d_middle, d_o, [*d_out, *d_unit]


class Tail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, o: Tensor, block: Ending, again: bool, *tensors: Tensor) -> Tensor:
        y, kept = tail_forward(block, rows_of(x), rows_of(o))
        unit = kept.unit
        ctx.save_for_backward(o, kept.middle, *kept.ys, *unit.ys, *(() if again else unit.gate_up))
        counts = len(kept.ys), len(unit.ys)
        ctx.rest = block, kept._replace(middle=None, ys=(), unit=unit._replace(gate_up=[], ys=())), counts
        assert y is not None
        return shaped(y, *x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        o, middle, *wide = ctx.saved_tensors
        block, kept, (outs, downs) = ctx.rest
        ys, unit_ys, gate_up = wide[:outs], wide[outs : outs + downs], wide[outs + downs :]
        unit = kept.unit._replace(gate_up=list(gate_up), ys=tuple(unit_ys))
        kept = kept._replace(middle=middle, ys=tuple(ys), unit=unit)
        dx, d_o, d_tensors = tail_back(block, rows_of(g), rows_of(o), kept)
        return dx.view(g.shape), d_o.view(o.shape), None, None, *d_tensors


# ------------------------------------------------------------------ the whole block, from its input


class Whole(torch.autograd.Function):
    """The block as one function that keeps its input, and its middle where asked to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Any, sin: Any, block: Block, keeps_middle: bool, *tensors: Tensor) -> Tensor:
        state = RandomState.now(x) if block.random else None
        q, k, v, _ = Front.forward(Unkept(), x, cos, sin, block)
        y, kept = tail_forward(block, rows_of(x), rows_of(block.attend(q, k, v)))
        ctx.save_for_backward(x, *([kept.middle] if keeps_middle else []), *tensors)
        ctx.rest = block, cos, sin, state, keeps_middle
        assert y is not None
        return shaped(y, *x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        block, cos, sin, state, keeps_middle = ctx.rest
        x, *tensors = ctx.saved_tensors
        middle = tensors.pop(0) if keeps_middle else None
        count = len(block.qkv.tensors())
        first = [t.detach().requires_grad_(t.requires_grad) for t in tensors[:count]]
        with RandomState.again(state, x):
            with torch.enable_grad():
                again = x.detach().requires_grad_()
                q, k, v, beside = Front.apply(again, cos, sin, block, *first)  # type: ignore[misc]
                o = block.attend(q, k, v)
            rows = rows_of(o.detach())
            _, kept = tail_forward(block, rows_of(x), rows, middle, want=False)
        d_beside, d_o, d_last = tail_back(block, rows_of(g), rows, kept)
        del kept, rows
        inputs = [again, *(t for t in first if t.requires_grad)]
        found = iter(torch.autograd.grad([o, beside], inputs, [d_o.view(o.shape), d_beside.view(x.shape)]))
        dx = next(found)
        d_first = [next(found) if t.requires_grad else None for t in first]
        return dx, None, None, None, None, *d_first, *d_last


class Unkept:
    """Stands in for autograd's context where nothing is kept."""

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class RandomState(NamedTuple):
    """Where the random numbers of a forward pass began, so that a second one draws the same."""

    cpu: Tensor
    gpu: Tensor | None

    @staticmethod
    def now(x: Tensor) -> RandomState:
        return RandomState(torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if x.is_cuda else None)

    @staticmethod
    @contextmanager
    def again(state: RandomState | None, x: Tensor) -> Any:
        if state is None:
            yield
            return
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.set_rng_state(state.cpu)
            if state.gpu is not None:
                torch.cuda.set_rng_state(state.gpu, x.device)
            yield


def run_block(x: Tensor, cos: Tensor | None, sin: Tensor | None, block: Block, level: str) -> Tensor:
    """The block's output, keeping what `level` says."""
    first, last = block.qkv.tensors(), tail_tensors(block)
    if level in ("middle", "input"):
        return Whole.apply(x, cos, sin, block, level == "middle", *first, *last)  # type: ignore[return-value]
    q, k, v, beside = Front.apply(x, cos, sin, block, *first)  # type: ignore[misc]
    o = block.attend(q, k, v)
    return Tail.apply(beside, o, block, level == "gate_up", *last)  # type: ignore[return-value]
