"""Linear layers that read one input, with the adapters on them: forwards and backwards by hand.

    forward    h   = x [s1 A1; s2 A2; ..]^T           (tokens, R)    one product for all siblings, x is read once
               y_i = h_i B_i^T, then += x W_i^T, then += bias        thin first: the large product adds as it writes

    backward   d_i = g_i B_i                          (tokens, r_i)
               dx  = [d1 d2 ..] [s1 A1; s2 A2; ..], then += g_i W_i
               dA  = s [d1 d2 ..]^T x,  dB_i = g_i^T h_i,  d bias_i = sum g_i

    DoRA       y_i = gain_i (x W_i^T + h_i B_i^T) + bias; then g_i is gain_i g_i above, and
               d m_i = sum g_i (y_i - bias) / m_i     which is why such a layer's output is kept

    several    A and B side by side: a sum of adapters is one of a larger rank; where each row of the batch has its
               own, h and d are multiplied by what each adapter weighs in the row

Beginning with the thin product is what makes the adapters cheap: a large product that adds to what is there costs a
few per cent more than one that does not, while adding a thin one afterwards reads and writes the whole result again.
And it is what lets them learn in half precision: the share of a young adapter is smaller than the spacing of numbers
around x W^T, so added to a rounded x W^T most of it is lost (benchmarks/first_steps.py). cuBLAS, though, rounds before
it adds: there x W^T stays in fp32 until a kernel has added the rest.

`lay_bare` says what a layer amounts to right now - its adapters, weights and storage may change between calls - or in
words why it must run by its own forward. Any delta that is two thin factors is taken by them, and autograd carries
their gradients on to what is learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from veneer.core.combine import Add, Dora
from veneer.core.delta import Delta
from veneer.core.host import Adapted, Adapter, Hosted, original_class, plain_modules
from veneer.core.op import TransposedLinearOp, op_for, op_of
from veneer.core.weight import is_plain
from veneer.kernels.image_pieces import image_kernels_for
from veneer.kernels.pieces import Rounding, column_products, kernels_for
from veneer.quant.layer import Packed
from veneer.quant.storage import Parts, Recipe, storage_of

__all__ = [
    "Bare",
    "Factors",
    "Group",
    "Inside",
    "Thin",
    "Unformed",
    "all_bare",
    "drawn",
    "dropped",
    "factors_of",
    "lay_bare",
    "token_sum",
    "untouched",
]


WIDEST = 32768  # more columns than this (a vocabulary) are not held in fp32
THINNEST = 128  # ranks up to this are added by kernels of their own

# ------------------------------------------------------------------ one layer


class Store(NamedTuple):
    """A packed weight, as quant/storage.py takes it."""

    parts: Parts
    shape: tuple[int, int]
    recipe: Recipe

    @property
    def multiplies_itself(self) -> bool:
        """In 8 bits, for which it is not unpacked."""
        return self.recipe.kind != "nf4" and self.recipe.dynamic


def unpacked(weight: Tensor | Store, dtype: torch.dtype) -> Tensor | Store:
    """A storage that multiplies in the activations' type is unpacked here, so that the product can add as it writes."""
    if isinstance(weight, Tensor) or weight.multiplies_itself:
        return weight
    return storage_of(weight.recipe).unpack(weight.parts, weight.shape, dtype, weight.recipe)


@dataclass(slots=True)
class Bare:
    """A linear layer as a few tensors. W (out, in) is frozen; the bias holds what adapters add to it."""

    weight: Tensor | Store
    bias: Tensor | None
    adapters: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)  # A, B, scale
    dropout: float = 0.0
    magnitude: Tensor | None = None  # DoRA's (out,), and
    gain: Tensor | None = None  # that over the rows' norms, which are constants
    picks: Tensor | None = None  # (rows of the batch, rank): what each adapter weighs in each row

    @property
    def is_bare(self) -> bool:
        """Whether an adapter's share is h B^T and no more, so that it can be added elsewhere."""
        return not self.dropout and self.gain is None

    @property
    def rank(self) -> int:
        return sum(a.shape[0] for a, _, _ in self.adapters)

    def split_b(self, db: Tensor) -> list[Tensor]:
        """g^T h as the gradient of each B."""
        return list(db.split([b.shape[1] for _, b, _ in self.adapters], dim=1))

    def forward(self, x: Tensor, h: Tensor | None, b: Tensor | None) -> Tensor:
        """x W^T + bias + h B^T. The bias comes last: into numbers of its size h B^T would round away."""
        weight = unpacked(self.weight, x.dtype)
        if h is None and self.gain is None and isinstance(weight, Tensor) and self._adds_bias_itself(x.dtype):
            return F.linear(x, weight, self.bias)
        y = self._unbiased(weight, x, h, b)
        return y if self.bias is None else y.add_(self.bias)

    def unbiased(self, x: Tensor, h: Tensor | None, b: Tensor | None) -> Tensor:
        """What a magnitude scales: without the bias."""
        return self._unbiased(unpacked(self.weight, x.dtype), x, h, b)

    def onto(self, c: Tensor, x: Tensor, h: Tensor | None, b: Tensor | None) -> Tensor:
        """c + x W^T + bias + h B^T in fresh memory: a layer that writes into the residual stream.

        c and the bias come last for the same reason, in one pass. Where a kernel sums in fp32 what is left, and after
        an 8-bit product, which has rounded already, h B^T is added in the same pass. On a GPU x W^T is wide until
        then: cuBLAS rounds it before it adds, and h B^T, which at first is below half of its last place, goes.
        """
        weight = unpacked(self.weight, x.dtype)
        at_once = isinstance(weight, Store) or (c.is_cuda and self.rank <= THINNEST)
        if at_once and h is not None and b is not None and self.bias is None and self.gain is None:
            stored = isinstance(weight, Store)
            y = storage_of(weight.recipe).product(x, *weight) if stored else wide_product(x, weight)
            return kernels_for(c).add_product(c, h, b, y)
        y = self._unbiased(weight, x, h, b)
        return y.add_(c) if self.bias is None else image_kernels_for(y).add_channels(y, c, self.bias)

    def _unbiased(self, weight: Tensor | Store, x: Tensor, h: Tensor | None, b: Tensor | None) -> Tensor:
        """x W^T + h B^T, and DoRA's gain on it."""
        if isinstance(weight, Store):
            y = storage_of(weight.recipe).product(x, *weight)
            y = y if h is None else y.addmm_(h, b.T)
        elif h is None or b is None:
            y = x @ weight.T
        elif sums_wide(x, weight):
            y = kernels_for(x).add_product(None, h, b, wide_product(x, weight))
        else:
            y = (h @ b.T).addmm_(x, weight.T)
        return y if self.gain is None else y.mul_(self.gain)

    def _adds_bias_itself(self, dtype: torch.dtype) -> bool:
        return self.bias is None or self.bias.dtype == dtype

    def back(self, g: Tensor, dx: Tensor | None) -> Tensor:
        """g W, added to dx where there is one."""
        weight = unpacked(self.weight, g.dtype)
        if isinstance(weight, Store):
            own = storage_of(weight.recipe).product_back(g, *weight)
            return own if dx is None else dx.add_(own)
        return g @ weight if dx is None else dx.addmm_(g, weight)


def lay_bare(layer: nn.Module, dtype: torch.dtype, batch: int | None = None) -> Bare | str:
    """What `layer` amounts to, or why it cannot be told. `batch`: rows of the batch, where the input still has them."""
    if (why := untouched(layer)) is not None:
        return why
    weight = _weight_of(layer, dtype)
    if isinstance(weight, str):
        return weight
    bare = Bare(weight, layer._parameters.get("bias"))
    if not isinstance(layer, Adapted):
        return bare if not isinstance(layer, Hosted) else "it is trained whole, or its weight is read by other code"
    if torch.is_grad_enabled():
        layer.active.watch_checkpoint()
    why = _routed(layer, bare, batch) if layer.active.routed else _adapters_of(layer, bare)
    return bare if why is None else why


def untouched(layer: nn.Module) -> str | None:
    """None where calling the layer means its forward and nothing else; otherwise what hangs on it."""
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "a hook hangs on it"
    if "parametrizations" in layer._modules:
        return "a parametrization is on it"
    if _has_any_global_hook():
        return "a hook hangs on every module"
    if "forward" in layer.__dict__ or "inner_forward" in layer.__dict__:
        return "something put a forward on the instance"
    return None


class Inside(NamedTuple):
    """Every module of a block as it was when the block was taken: who holds it, and under which name. A fused block
    calls few of them or none, so it has to look at all of them."""

    places: tuple[tuple[nn.Module, str, nn.Module], ...]

    @classmethod
    def of(cls, block: nn.Module) -> Inside:
        modules = plain_modules(block)
        names = [(name, *name.rpartition(".")) for name in modules if name]
        return cls(tuple((modules[holder], key, modules[name]) for name, holder, _, key in names))

    def touched(self) -> str | None:
        for holder, key, module in self.places:
            if holder._modules.get(key) is not module:
                return f"its {key} was replaced"
            if (why := untouched(module)) is not None:
                return why
        return None


def _weight_of(layer: nn.Module, dtype: torch.dtype) -> Tensor | Store | str:
    weight = layer._parameters.get("weight")
    if isinstance(layer, Packed):
        if layer.compute_dtype not in (None, dtype):
            return f"it computes in {layer.compute_dtype}"
        return Store(layer.parts, layer.matrix_shape, layer.recipe)
    kind = original_class(type(layer))
    turned = type(op_for(kind)) is TransposedLinearOp and kind.__name__ == "Conv1D"
    if kind.forward is not nn.Linear.forward and not turned:
        return f"{kind.__name__} has a forward of its own"
    if weight is None or not is_plain(weight):
        return "its weight is no plain tensor"
    if weight.requires_grad:
        return "its weight is trained"
    if weight.dtype != dtype:
        return f"its weight is {weight.dtype}, its input {dtype}"
    return weight.T if turned else weight


def _adapters_of(layer: Adapted, bare: Bare) -> str | None:
    acting = [(layer.slots[n], w) for n, w in zip(layer.active.names, layer.active.weights(), strict=True)
              if n in layer.slots]  # fmt: skip
    drops = {_dropout_of(adapter) for adapter, _ in acting}
    if any(drops) and len(acting) > 1:
        return "several adapters with dropout each draw their own mask"
    for adapter, weight in acting:
        if (why := _unlike_factors(adapter)) is not None:
            return why
        if isinstance(adapter.combine, Dora):
            if len(acting) > 1 or not isinstance(weight, float):
                return "dora rescales its weight, and is not alone or weighs other than 1"
            bare.magnitude = adapter.combine.magnitude
            with torch.no_grad():
                bare.gain = adapter.combine.gain(layer, op_of(layer), adapter.delta)  # type: ignore[arg-type]
        if adapter.bias is not None:
            own = adapter.bias if isinstance(weight, float) else adapter.bias * weight
            bare.bias = own if bare.bias is None else bare.bias + own
        if adapter.delta is not None:
            a, b = adapter.delta.factors()
            bare.adapters.append((a, b if isinstance(weight, float) else b * weight, adapter.delta.scale))
    bare.dropout = max(drops, default=0.0)
    return None


def _routed(layer: Adapted, bare: Bare, batch: int | None) -> str | None:
    """Every row meets every adapter that acts in some row, and `picks` says which count. Cheap while all of them
    together are thin."""
    mix = layer.active.mix
    assert mix is not None
    if batch is None or not len(mix) or batch % len(mix):
        return "each row of the batch has its own adapters"
    acting = [(layer.slots[r.name], layer.active.names.index(r.name)) for r in layer.active.routes(batch, layer)
              if r.name in layer.slots]  # fmt: skip
    for adapter, _ in acting:
        if (why := _unlike_factors(adapter)) is not None:
            return why
        if adapter.combine_changes_base or adapter.bias is not None or _dropout_of(adapter):
            return "each row of the batch has its own adapters, and they are more than two factors"
        bare.adapters.append((*adapter.delta.factors(), adapter.delta.scale))
    if acting:
        columns = [
            mix[:, i : i + 1].expand(-1, a.shape[0]) for (_, i), (a, _, _) in zip(acting, bare.adapters, strict=True)
        ]
        bare.picks = torch.cat(columns, dim=1)
    return None


def _dropout_of(adapter: Adapter) -> float:
    return adapter.delta.dropout if adapter.training and adapter.delta is not None else 0.0


def _unlike_factors(adapter: Adapter) -> str | None:
    """Why an adapter is more than a bias, two thin factors and perhaps a gain."""
    if adapter.combine is not None and type(adapter.combine) not in (Add, Dora):
        return f"{type(adapter.combine).__name__.lower()} is a rule of its own"
    if adapter.delta is None or type(adapter.delta).forward is Delta.forward:
        return None
    return f"the change of {type(adapter.delta).__name__.lower()} is no product of two thin factors"


# ------------------------------------------------------------------ several layers


class Thin(NamedTuple):
    """The rank-r activations of a group, and what dropout kept of x for each layer that drops."""

    h: Tensor | None  # (tokens, R)
    masks: tuple[Tensor | None, ...]


class Factors(NamedTuple):
    """A of all siblings, one under the other and scaled, and each one's B; in the activations' type."""

    a: Tensor | None  # (R, in)
    bs: tuple[Tensor | None, ...]


@runtime_checkable
class Unformed(Protocol):
    """An input that is not there any more, though its products with thin matrices can be had without it."""

    def formed(self) -> Tensor: ...
    def product(self, d: Tensor, dtype: torch.dtype) -> Tensor:
        """d^T of it."""
        ...


@dataclass(slots=True)
class Group:
    """Layers with one input."""

    layers: tuple[Bare, ...]

    @property
    def spans(self) -> list[slice]:
        """Which columns of h are whose."""
        ends, at = [], 0
        for layer in self.layers:
            ends.append(slice(at, at + layer.rank))
            at += layer.rank
        return ends

    def tensors(self) -> list[Tensor]:
        """All A, then all B, then magnitudes and trained biases: what autograd is told of."""
        pairs = [pair for layer in self.layers for pair in layer.adapters]
        return [a for a, _, _ in pairs] + [b for _, b, _ in pairs] + self.magnitudes + self.biases

    @property
    def magnitudes(self) -> list[Tensor]:
        return [layer.magnitude for layer in self.layers if layer.magnitude is not None]

    @property
    def biases(self) -> list[Tensor]:
        return [layer.bias for layer in self.layers if layer.bias is not None and layer.bias.requires_grad]

    def factors(self, dtype: torch.dtype) -> Factors:
        pairs = [pair for layer in self.layers for pair in layer.adapters]
        if not pairs:
            return Factors(None, (None,) * len(self.layers))
        a = torch.cat([a for a, _, _ in pairs])
        scales = {s for _, _, s in pairs}
        a = a * (scales.pop() if len(scales) == 1 else self._scales(a))
        bs = [_joined([b for _, b, _ in layer.adapters]) for layer in self.layers]
        return Factors(a.to(dtype), tuple(b if b is None else b.to(dtype) for b in bs))

    def _scales(self, like: Tensor) -> Tensor:
        """One scale a row of A."""
        each = [s for layer in self.layers for a, _, s in layer.adapters for _ in range(a.shape[0])]
        return like.new_tensor(each)[:, None]

    def thin(self, x: Tensor, a: Tensor | None, h: Tensor | None = None) -> Thin:
        """h, unless whoever made x made it as well, and the masks of dropout, drawn layer by layer as the layers
        themselves would."""
        nothing = (None,) * len(self.layers)
        if a is None:
            return Thin(None, nothing)
        if not any(layer.dropout for layer in self.layers):
            return Thin(self._pick_(x @ a.T if h is None else h), nothing)
        h, masks = x.new_empty(x.shape[0], a.shape[0]), []
        for layer, span in zip(self.layers, self.spans, strict=True):
            mask = None if not layer.dropout or not layer.rank else drawn(x, layer.dropout)
            h[:, span] = dropped(x, mask, layer.dropout) @ a[span].T
            masks.append(mask)
        return Thin(h, tuple(masks))

    def _pick_(self, h: Tensor) -> Tensor:
        """What a row's own adapters have no part in becomes zero."""
        for layer, span in zip(self.layers, self.spans, strict=True):
            if layer.picks is not None:
                rows = h[:, span].view(len(layer.picks), -1, layer.rank)
                rows.mul_(layer.picks.to(h.dtype)[:, None])
        return h

    def outputs(self, x: Tensor, h: Tensor | None, bs: Sequence[Tensor | None], biased: bool = True) -> list[Tensor]:
        return [
            (layer.forward if biased else layer.unbiased)(x, h[:, span] if h is not None and b is not None else None, b)
            for layer, span, b in zip(self.layers, self.spans, bs, strict=True)
        ]

    @property
    def splits_biases(self) -> bool:
        """Whether outputs are kept without their biases: next to a large one, what a magnitude scales has few places
        left in 16 bits."""
        return any(layer.magnitude is not None and layer.bias is not None for layer in self.layers)

    def with_biases(self, ys: Sequence[Tensor]) -> list[Tensor]:
        """Outputs that come without them, in memory of their own."""
        pairs = zip(ys, self.layers, strict=True)
        return [y if layer.bias is None else y.clone().add_(layer.bias) for y, layer in pairs]

    @property
    def rounds_to(self) -> torch.dtype | None:
        """The 8-bit type to which all layers round the input that they share."""
        stored = [w for w in self.weights if isinstance(w, Store)]
        found = {storage_of(w.recipe).rounds_to(w.recipe, w.parts[0].device) for w in stored}
        return found.pop() if len(found) == 1 else None

    def rounding(self, gs: Sequence[Tensor], factors: Factors) -> Rounding | None:
        """How `input_gradient` is going to round two gradients, where it does so to both side by side."""
        stored = [w for w in self.weights if isinstance(w, Store) and w.multiplies_itself]
        if len(stored) != 2 or len(gs) != 2 or len({w.recipe for w in stored}) != 1 or len(self.layers) != 2:
            return None
        recipe = stored[0].recipe
        found = storage_of(recipe).rounds_back(gs, [(w.parts, w.shape) for w in stored], recipe)
        return None if found is None else Rounding(*found, factors.bs)

    @property
    def weights(self) -> list[Tensor | Store]:
        return [layer.weight for layer in self.layers]

    def back(
        self, x: Tensor | Unformed, gs: Sequence[Tensor], thin: Thin, factors: Factors, ys: Sequence[Tensor] = (),
        need_x: bool = True, biased: bool = True,
    ) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
        """The gradients of x and of `tensors()`; `ys` are the outputs, where there are magnitudes, and `biased` says
        whether with the biases."""
        rest = self.rest_gradients(gs, ys, biased)
        gs = self.scaled(gs)
        d = self.thin_gradients(gs, factors)
        dx = self.input_gradient(gs, d, thin, factors) if need_x else None
        return dx, [*self.factor_gradients(x, gs, d, thin), *rest]

    def rest_gradients(self, gs: Sequence[Tensor], ys: Sequence[Tensor], biased: bool = True) -> list[Tensor]:
        """Of magnitudes and of trained biases."""
        found = []
        if self.magnitudes:
            for layer, g, y in zip(self.layers, gs, ys, strict=True):
                if layer.magnitude is not None:
                    m = layer.magnitude.to(torch.promote_types(g.dtype, torch.float32))
                    found.append(column_products(g, y, layer.bias if biased else None) / torch.where(m == 0, 1, m))
        for layer, g in zip(self.layers, gs, strict=True):
            if layer.bias is not None and layer.bias.requires_grad:
                found.append(g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32)))
        return found

    def scaled(self, gs: Sequence[Tensor]) -> list[Tensor]:
        """The gradients before DoRA's gain."""
        pairs = zip(self.layers, gs, strict=True)
        return [g if layer.gain is None else (g * layer.gain).to(g.dtype) for layer, g in pairs]

    def thin_gradients(self, gs: Sequence[Tensor], factors: Factors, d: Tensor | None = None) -> Tensor | None:
        """g_i B_i, side by side; unless whoever made the gs has done that."""
        if factors.a is None:
            return None
        if d is not None:
            return self._pick_(d)
        d = gs[0].new_empty(gs[0].shape[0], factors.a.shape[0])
        for g, b, span in zip(gs, factors.bs, self.spans, strict=True):
            if b is not None:
                torch.mm(g, b, out=d[:, span])
        return self._pick_(d)

    def input_gradient(self, gs: Sequence[Tensor], d: Tensor | None, thin: Thin, factors: Factors) -> Tensor:
        is_dropping = any(mask is not None for mask in thin.masks)
        stored = [w for w in self.weights if isinstance(w, Store) and w.multiplies_itself]
        if len(stored) == len(gs) and len({w.recipe for w in stored}) == 1 and not is_dropping:
            recipe = stored[0].recipe
            dx = storage_of(recipe).products_back(gs, [(w.parts, w.shape) for w in stored], recipe)
            return dx if d is None else dx.addmm_(d, factors.a)
        dx = None
        if d is not None and not is_dropping:
            dx = d @ factors.a
        elif d is not None:
            for layer, span, mask in zip(self.layers, self.spans, thin.masks, strict=True):
                if layer.rank:
                    own = dropped(d[:, span] @ factors.a[span], mask, layer.dropout)
                    dx = own if dx is None else dx.add_(own)
        for layer, g in zip(self.layers, gs, strict=True):
            dx = layer.back(g, dx)
        assert dx is not None
        return dx

    def factor_gradients(
        self, x: Tensor | Unformed, gs: Sequence[Tensor], d: Tensor | None, thin: Thin
    ) -> list[Tensor | None]:
        pairs = [pair for layer in self.layers for pair in layer.adapters]
        if d is None or thin.h is None or not any(a.requires_grad or b.requires_grad for a, b, _ in pairs):
            return [None] * (2 * len(pairs))
        return [*self.a_gradients(x, d, thin), *self.b_gradients(gs, thin)]

    def a_gradients(self, x: Tensor | Unformed, d: Tensor, thin: Thin) -> list[Tensor | None]:
        if not any(a.requires_grad for layer in self.layers for a, _, _ in layer.adapters):
            return [None] * sum(len(layer.adapters) for layer in self.layers)
        dtype = next(a.dtype for layer in self.layers for a, _, _ in layer.adapters)
        if not any(mask is not None for mask in thin.masks):
            da = token_sum(d.T, x, dtype) if isinstance(x, Tensor) else x.product(d, dtype)
        else:
            x = x if isinstance(x, Tensor) else x.formed()
            spans = zip(self.layers, self.spans, thin.masks, strict=True)
            da = torch.cat([token_sum(d[:, s].T, dropped(x, m, layer.dropout), dtype) for layer, s, m in spans])
        return self.split_a(da)

    def split_a(self, da: Tensor) -> list[Tensor | None]:
        """d^T x of all siblings as the gradient of each A."""
        pairs = [pair for layer in self.layers for pair in layer.adapters]
        scales = {s for _, _, s in pairs}
        da.mul_(scales.pop() if len(scales) == 1 else self._scales(da))
        return list(da.split([a.shape[0] for a, _, _ in pairs]))

    def b_gradients(self, gs: Sequence[Tensor], thin: Thin) -> list[Tensor]:
        found: list[Tensor] = []
        for layer, g, span in zip(self.layers, gs, self.spans, strict=True):
            if layer.rank:
                found += layer.split_b(token_sum(g.T, thin.h[:, span], layer.adapters[0][1].dtype))
        return found


@torch.no_grad()
def factors_of(groups: Sequence[Group], dtype: torch.dtype) -> list[Factors]:
    """The factors of several groups. Where they are plain they are gathered, scaled and rounded all at once: three
    small kernels instead of one or two for each factor."""
    held = [[layer.adapters for layer in group.layers] for group in groups]
    pairs = [adapters[0] for group in held for adapters in group if adapters]
    scales = {s for _, _, s in pairs}
    if len(scales) != 1 or any(len(adapters) > 1 for group in held for adapters in group):
        return [group.factors(dtype) for group in groups]
    flat = torch.cat([a.reshape(-1) for a, _, _ in pairs] + [b.reshape(-1) for _, b, _ in pairs])
    sizes = [sum(each[0][0].numel() for each in group if each) for group in held]
    flat.narrow(0, 0, sum(sizes)).mul_(scales.pop())
    pieces = iter(flat.to(dtype).split([*sizes, *(b.numel() for _, b, _ in pairs)]))
    ups = [next(pieces) for _ in sizes]
    return [_shaped(group, a, pieces) for group, a in zip(held, ups, strict=True)]


def _shaped(group: list[list[tuple[Tensor, Tensor, float]]], a: Tensor, bs: Iterator[Tensor]) -> Factors:
    width = next((each[0][0].shape[1] for each in group if each), 0)
    shaped = tuple(next(bs).view(each[0][1].shape) if each else None for each in group)
    return Factors(a.view(-1, width) if width else None, shaped)


def _joined(bs: list[Tensor]) -> Tensor | None:
    return None if not bs else bs[0] if len(bs) == 1 else torch.cat(bs, dim=1)


def drawn(x: Tensor, p: float) -> Tensor:
    """The mask that dropout would draw for something like x."""
    return F.dropout(torch.ones_like(x), p) != 0


def dropped(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    return x if mask is None else (x * mask).mul_(1 / (1 - p)) if p < 1 else torch.zeros_like(x)


def sums_wide(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of x can be had as it was summed, in fp32: half-precision numbers on a GPU."""
    return x.is_cuda and x.dtype.itemsize == 2 and len(weight) <= WIDEST


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, in fp32 where it can be had."""
    return torch.mm(x, weight.T, out_dtype=torch.float32) if sums_wide(x, weight) else x @ weight.T


def token_sum(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """A sum over all tokens, given in the type of the parameter it belongs to; a GPU does not round it before."""
    if left.is_cuda and dtype == torch.float32 and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return left @ right


def all_bare(layers: Iterable[nn.Module], dtype: torch.dtype, batch: int | None = None) -> Group | str:
    found = [lay_bare(layer, dtype, batch) for layer in layers]
    return next((why for why in found if isinstance(why, str)), None) or Group(tuple(found))  # type: ignore[arg-type]
