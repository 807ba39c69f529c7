"""Linear layers that read one input, with the adapters on them: forwards and backwards by hand.

    forward    h   = x [s1 A1; s2 A2; ..]^T           (tokens, R)    one product for all siblings, x is read once
               y_i = h_i B_i^T, then += x W_i^T, then += bias        thin first: the large product adds as it writes

    backward   d_i = g_i B_i                          (tokens, r_i)
               dx  = [d1 d2 ..] [s1 A1; s2 A2; ..], then += g_i W_i
               dA  = s [d1 d2 ..]^T x,  dB_i = g_i^T h_i

Beginning with the thin product is what makes the adapters cheap: a large product that adds to what is there costs a
few per cent more than one that does not, while adding a thin one afterwards reads and writes the whole result again.
And it is what lets them learn in half precision: the share of a young adapter is smaller than the spacing of numbers
around x W^T, so added to a rounded x W^T most of it is lost (benchmarks/first_steps.py).

`lay_bare` says what a layer amounts to right now - its adapters, weights and storage may change between calls - or in
words why it must run by its own forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.delta import Lora
from veneer.core.host import Adapted, Adapter, Hosted, original_class
from veneer.core.weight import is_plain
from veneer.kernels.image_pieces import image_kernels_for
from veneer.quant.layer import Packed
from veneer.quant.storage import Parts, Recipe, storage_of

__all__ = ["Bare", "Factors", "Group", "Thin", "all_bare", "factors_of", "lay_bare", "untouched"]


# ------------------------------------------------------------------ one layer


class Store(NamedTuple):
    """A packed weight, as quant/storage.py takes it."""

    parts: Parts
    shape: tuple[int, int]
    recipe: Recipe


def unpacked(weight: Tensor | Store, dtype: torch.dtype) -> Tensor | Store:
    """A storage that multiplies in the activations' type is unpacked here, so that the product can add as it writes."""
    if isinstance(weight, Tensor) or (weight.recipe.kind != "nf4" and weight.recipe.dynamic):
        return weight
    return storage_of(weight.recipe).unpack(weight.parts, weight.shape, dtype, weight.recipe)


@dataclass(slots=True)
class Bare:
    """A linear layer as a few tensors. W (out, in) and the bias are frozen."""

    weight: Tensor | Store
    bias: Tensor | None
    adapters: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)  # A, B, scale
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        return sum(a.shape[0] for a, _, _ in self.adapters)

    def split_b(self, db: Tensor) -> list[Tensor]:
        """g^T h as the gradient of each B."""
        return list(db.split([b.shape[1] for _, b, _ in self.adapters], dim=1))

    def forward(self, x: Tensor, h: Tensor | None, b: Tensor | None) -> Tensor:
        """x W^T + bias + h B^T. The bias comes last: into numbers of its size h B^T would round away."""
        weight = unpacked(self.weight, x.dtype)
        if h is None and isinstance(weight, Tensor):
            return F.linear(x, weight, self.bias)
        y = _multiplied(weight, x, h, b)
        return y if self.bias is None else y.add_(self.bias)

    def onto(self, c: Tensor, x: Tensor, h: Tensor | None, b: Tensor | None) -> Tensor:
        """c + x W^T + bias + h B^T in fresh memory: a layer that writes into the residual stream.

        c and the bias come last for the same reason, in one pass.
        """
        y = _multiplied(unpacked(self.weight, x.dtype), x, h, b)
        return y.add_(c) if self.bias is None else image_kernels_for(y).add_channels(y, c, self.bias)

    def back(self, g: Tensor, dx: Tensor | None) -> Tensor:
        """g W, added to dx where there is one."""
        weight = unpacked(self.weight, g.dtype)
        if isinstance(weight, Store):
            own = storage_of(weight.recipe).product_back(g, *weight)
            return own if dx is None else dx.add_(own)
        return g @ weight if dx is None else dx.addmm_(g, weight)


def _multiplied(weight: Tensor | Store, x: Tensor, h: Tensor | None, b: Tensor | None) -> Tensor:
    """x W^T + h B^T."""
    if isinstance(weight, Store):
        y = storage_of(weight.recipe).product(x, *weight)
        return y if h is None else y.addmm_(h, b.T)
    return x @ weight.T if h is None else (h @ b.T).addmm_(x, weight.T)


def lay_bare(layer: nn.Module, dtype: torch.dtype) -> Bare | str:
    """What `layer` amounts to, or why it cannot be told."""
    if (why := untouched(layer)) is not None:
        return why
    weight = _weight_of(layer, dtype)
    if isinstance(weight, str):
        return weight
    bias = layer._parameters.get("bias")
    if bias is not None and bias.requires_grad:
        return "its bias is trained"
    bare = Bare(weight, bias)
    if not isinstance(layer, Adapted):
        return bare if not isinstance(layer, Hosted) else "it is trained whole, or its weight is read by other code"
    why = _adapters_of(layer, bare)
    return bare if why is None else why


def untouched(layer: nn.Module) -> str | None:
    """None where calling the layer means its forward and nothing else; otherwise what hangs on it."""
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "a hook hangs on it"
    if "forward" in layer.__dict__ or "inner_forward" in layer.__dict__:
        return "something put a forward on the instance"
    return None


def _weight_of(layer: nn.Module, dtype: torch.dtype) -> Tensor | Store | str:
    weight = layer._parameters.get("weight")
    if isinstance(layer, Packed):
        if layer.compute_dtype not in (None, dtype):
            return f"it computes in {layer.compute_dtype}"
        return Store(layer.parts, layer.matrix_shape, layer.recipe)
    if original_class(type(layer)).forward is not nn.Linear.forward:
        return f"{original_class(type(layer)).__name__} has a forward of its own"
    if weight is None or not is_plain(weight):
        return "its weight is no plain tensor"
    if weight.requires_grad:
        return "its weight is trained"
    return weight if weight.dtype == dtype else f"its weight is {weight.dtype}, its input {dtype}"


def _adapters_of(layer: Adapted, bare: Bare) -> str | None:
    active = layer.active
    if active.routed:
        return "each row of the batch has its own adapters"
    for name, weight in zip(active.names, active.weights(), strict=True):
        adapter = layer.slots.get(name)
        if adapter is None:
            continue
        if (why := _unlike_lora(adapter)) is not None:
            return why
        a, b = adapter.delta.factors()
        if adapter.training and adapter.delta.dropout:
            if bare.adapters and bare.dropout != adapter.delta.dropout:
                return "its adapters differ in dropout"
            bare.dropout = adapter.delta.dropout
        elif bare.dropout:
            return "its adapters differ in dropout"
        bare.adapters.append((a, b if isinstance(weight, float) else b * weight, adapter.delta.scale))
    return "several adapters with dropout each draw their own mask" if bare.dropout and len(bare.adapters) > 1 else None


def _unlike_lora(adapter: Adapter) -> str | None:
    if adapter.combine_changes_base:
        return f"{type(adapter.combine).__name__.lower()} rescales its weight"
    if not isinstance(adapter.delta, Lora) or adapter.bias is not None:
        return f"its adapter is {type(adapter.delta).__name__.lower()}" + (
            " with a bias" if adapter.bias is not None else ""
        )
    return None


# ------------------------------------------------------------------ several layers


class Thin(NamedTuple):
    """The rank-r activations of a group, and what dropout kept of x for each layer that drops."""

    h: Tensor | None  # (tokens, R)
    masks: tuple[Tensor | None, ...]


class Factors(NamedTuple):
    """A of all siblings, one under the other and scaled, and each one's B; in the activations' type."""

    a: Tensor | None  # (R, in)
    bs: tuple[Tensor | None, ...]


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
        """All A, then all B: what autograd is told of."""
        pairs = [pair for layer in self.layers for pair in layer.adapters]
        return [a for a, _, _ in pairs] + [b for _, b, _ in pairs]

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

    def thin(self, x: Tensor, a: Tensor | None) -> Thin:
        """h, and the masks of dropout, drawn layer by layer as the layers themselves would."""
        nothing = (None,) * len(self.layers)
        if a is None:
            return Thin(None, nothing)
        if not any(layer.dropout for layer in self.layers):
            return Thin(x @ a.T, nothing)
        h, masks = x.new_empty(x.shape[0], a.shape[0]), []
        for layer, span in zip(self.layers, self.spans, strict=True):
            mask = None if not layer.dropout or not layer.rank else F.dropout(torch.ones_like(x), layer.dropout) != 0
            h[:, span] = _dropped(x, mask, layer.dropout) @ a[span].T
            masks.append(mask)
        return Thin(h, tuple(masks))

    def outputs(self, x: Tensor, h: Tensor | None, bs: Sequence[Tensor | None]) -> list[Tensor]:
        return [
            layer.forward(x, h[:, span] if h is not None and b is not None else None, b)
            for layer, span, b in zip(self.layers, self.spans, bs, strict=True)
        ]

    def back(
        self, x: Tensor, gs: Sequence[Tensor], thin: Thin, factors: Factors, need_x: bool = True
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients of x and of `tensors()`."""
        d = self.thin_gradients(gs, factors)
        dx = self.input_gradient(gs, d, thin, factors) if need_x else None
        return dx, self.factor_gradients(x, gs, d, thin)

    def thin_gradients(self, gs: Sequence[Tensor], factors: Factors) -> Tensor | None:
        """g_i B_i, side by side."""
        if factors.a is None:
            return None
        d = gs[0].new_empty(gs[0].shape[0], factors.a.shape[0])
        for g, b, span in zip(gs, factors.bs, self.spans, strict=True):
            if b is not None:
                torch.mm(g, b, out=d[:, span])
        return d

    def input_gradient(self, gs: Sequence[Tensor], d: Tensor | None, thin: Thin, factors: Factors) -> Tensor:
        dx = None
        if d is not None and not any(mask is not None for mask in thin.masks):
            dx = d @ factors.a
        elif d is not None:
            for layer, span, mask in zip(self.layers, self.spans, thin.masks, strict=True):
                if layer.rank:
                    own = _dropped(d[:, span] @ factors.a[span], mask, layer.dropout)
                    dx = own if dx is None else dx.add_(own)
        for layer, g in zip(self.layers, gs, strict=True):
            dx = layer.back(g, dx)
        assert dx is not None
        return dx

    def factor_gradients(self, x: Tensor, gs: Sequence[Tensor], d: Tensor | None, thin: Thin) -> list[Tensor | None]:
        pairs = [pair for layer in self.layers for pair in layer.adapters]
        if d is None or thin.h is None or not any(a.requires_grad or b.requires_grad for a, b, _ in pairs):
            return [None] * (2 * len(pairs))
        return [*self.a_gradients(x, d, thin), *self.b_gradients(gs, thin)]

    def a_gradients(self, x: Tensor, d: Tensor, thin: Thin) -> list[Tensor]:
        dtype = next(a.dtype for layer in self.layers for a, _, _ in layer.adapters)
        if not any(mask is not None for mask in thin.masks):
            da = _product(d.T, x, dtype)
        else:
            spans = zip(self.layers, self.spans, thin.masks, strict=True)
            da = torch.cat([_product(d[:, s].T, _dropped(x, m, layer.dropout), dtype) for layer, s, m in spans])
        return self.split_a(da)

    def split_a(self, da: Tensor) -> list[Tensor]:
        """d^T x of all siblings as the gradient of each A."""
        pairs = [pair for layer in self.layers for pair in layer.adapters]
        scales = {s for _, _, s in pairs}
        da.mul_(scales.pop() if len(scales) == 1 else self._scales(da))
        return list(da.split([a.shape[0] for a, _, _ in pairs]))

    def b_gradients(self, gs: Sequence[Tensor], thin: Thin) -> list[Tensor]:
        found: list[Tensor] = []
        for layer, g, span in zip(self.layers, gs, self.spans, strict=True):
            if layer.rank:
                found += layer.split_b(_product(g.T, thin.h[:, span], layer.adapters[0][1].dtype))
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


def _dropped(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    return x if mask is None else (x * mask).mul_(1 / (1 - p)) if p < 1 else torch.zeros_like(x)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """A sum over all tokens, given in the type of the parameter it belongs to; a GPU does not round it before."""
    if left.is_cuda and dtype == torch.float32 and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return left @ right


def all_bare(layers: Iterable[nn.Module], dtype: torch.dtype) -> Group | str:
    found = [lay_bare(layer, dtype) for layer in layers]
    return next((why for why in found if isinstance(why, str)), None) or Group(tuple(found))  # type: ignore[arg-type]
