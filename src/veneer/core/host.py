"""Putting adapters on a layer by changing its class.

The layer stays the same object under the same name, with its own weights in it; only its class becomes a subclass
that knows about adapters. So every base key keeps its name, `isinstance(m, nn.Linear)` still holds, a quantised layer
keeps its own forward, and taking the last adapter away gives the very layer back that was there.

    call mode    the layer is called:            forward = base + what the active adapters change
    read mode    its weight is read by others:   `layer.weight` is a property that gives the combined weight
    whole        the module is trained whole:    forward runs the adapter's own copy of the module

All layers of a model share one `Active`, so switching adapters is one assignment however large the model is.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.combine import Add, Combine
from veneer.core.delta import Delta, Lora
from veneer.core.leaf import Leaf, Reading, host_leaf, own_parameters, release_leaf
from veneer.core.lowrank import low_rank_linear
from veneer.core.op import LinearOp, Op, op_for, op_of
from veneer.core.weight import is_plain, read_weight
from veneer.errors import StateError, TargetError

__all__ = [
    "Active",
    "Adapted",
    "Adapter",
    "Readable",
    "Whole",
    "adapted_class",
    "host",
    "original_class",
    "plain_modules",
    "release",
]

FEW = 4  # rows for each adapter up to which copying the factors for every row beats going adapter by adapter
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass
class Active:
    """Which adapters act now; one for a model, shared by its layers.

    `mix` holds the weights of `names`: None for all 1, (n,) for a weighted sum, (batch, n) to route each row on its
    own, where a row of zeros is the base.
    """

    names: tuple[str, ...] = ()
    mix: Tensor | None = None
    routed: bool = False
    pending: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)  # checkpointed forwards without backward
    stacks: dict[int, Any] = field(default_factory=dict)  # stacked factors of routed rows, by id of the layer
    _routes: dict[int, list[Route]] = field(default_factory=dict)  # by batch size, made when first needed

    def change(self, names: tuple[str, ...], mix: Tensor | None = None) -> None:
        """Switch. Refused while a checkpointed forward waits for its backward, which would run the new adapters."""
        if self.pending:
            raise StateError(
                "the active adapters cannot change now: a forward under gradient checkpointing still waits for its "
                "backward, which runs the layers again and would run other adapters",
                fix="call backward() before switching, inside the `with` block where there is one",
            )
        self.names, self.mix = names, mix
        self.routed = mix is not None and mix.ndim == 2
        self._routes = {}
        self.stacks.clear()

    @contextmanager
    def changed(self, names: tuple[str, ...], mix: Tensor | None = None) -> Iterator[None]:
        before = self.names, self.mix
        self.change(names, mix)
        try:
            yield
        except BaseException:
            self.pending.clear()  # the forward that failed has no backward to protect
            raise
        finally:
            self.change(*before)

    def weights(self) -> list[Tensor | float]:
        return [1.0] * len(self.names) if self.mix is None else list(self.mix.unbind(-1))

    def routes(self, batch: int, layer: nn.Module) -> list[Route]:
        """Who acts in which rows of a batch. Beams, and time folded into the batch, repeat a row in place."""
        if batch not in self._routes:
            mix: Tensor = self.mix  # type: ignore[assignment]
            if not len(mix) or batch % len(mix):
                raise StateError(
                    f"{len(mix)} rows are routed, but {original_class(type(layer)).__name__} gets a batch of {batch}",
                    fix="give routed() one adapter for each row of the batch",
                )
            columns = mix.repeat_interleave(batch // len(mix), dim=0).T
            found = [(n, c.nonzero()[:, 0], c) for n, c in zip(self.names, columns, strict=True)]
            self._routes[batch] = [Route.make(n, index, c[index]) for n, index, c in found if len(index)]
        return self._routes[batch]

    def watch_checkpoint(self) -> None:
        """Remember a checkpointed forward until autograd drops it, whether or not the caller keeps the loss.

        Inside a compiled graph there is nothing to watch: the graph holds the adapters it was compiled for.
        """
        if torch.compiler.is_compiling():
            return
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if hooks is not None and hooks[1].__module__ == "torch.utils.checkpoint" and not _in_backward():
            self.pending.add(hooks[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "mix": self.mix}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.change(state["names"], state["mix"])


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@dataclass
class Route:
    """The rows of a batch in which one adapter acts, and its weight in each."""

    name: str
    index: Tensor  # (k,) row numbers
    weights: Tensor  # (k,)
    rows: slice | Tensor  # the same rows, as a slice where they lie together: no copy then
    weight: float | None  # the one weight, where all rows have the same

    @staticmethod
    def make(name: str, index: Tensor, weights: Tensor) -> Route:
        first, last = int(index[0]), int(index[-1])
        together = last - first + 1 == len(index)
        same = bool((weights == weights[0]).all())
        rows = slice(first, last + 1) if together else index
        return Route(name, index, weights, rows, float(weights[0]) if same else None)

    def add_(self, y: Tensor, delta: Delta, x: Tensor) -> None:
        """y[rows] += weight s (x[rows] A^T) B^T, for a (batch, ..., out) output that nobody else holds."""
        a, b = delta.factors()
        h = F.linear(x[self.rows], a)
        if self.weight is None:
            h = h * self.weights.to(h).view(-1, *_ones(h))
        scale = delta.scale * (1.0 if self.weight is None else self.weight)
        if isinstance(self.rows, slice):
            y[self.rows].view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), b.T, alpha=scale)
        else:
            y.index_add_(0, self.rows, F.linear(h, b), alpha=scale)


class Adapter(nn.Module):
    """One adapter on one layer: what is learned, how it joins the base, and a change of the bias where asked for."""

    def __init__(self, delta: Delta | None, combine: Combine | None, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.delta = delta
        self.combine = combine
        self.bias = bias
        self._quick = isinstance(delta, Lora) and type(combine) is Add and bias is None

    @property
    def combine_changes_base(self) -> bool:
        """Whether dW alone does not say it all (DoRA rescales W, too)."""
        return not isinstance(self.combine, Add)

    def change(self, host: nn.Module, op: Op | None, x: Tensor, y: Tensor) -> Tensor:
        """What this adapter adds to the base's output y."""
        if self.combine is None:
            return _per_channel(host, op, self.bias, y).to(y.dtype)  # type: ignore[arg-type]
        change = self.combine.change(host, op, self.delta, x, y)  # type: ignore[arg-type]
        return change if self.bias is None else change + _per_channel(host, op, self.bias, y).to(y.dtype)

    def weight(self, w: Tensor) -> Tensor:
        """The combined weight matrix for a base matrix w."""
        return w if self.combine is None else self.combine.weight(w, self.delta)  # type: ignore[arg-type]


def _per_channel(host: nn.Module, op: Op | None, v: Tensor, y: Tensor) -> Tensor:
    if op is not None:
        return op.per_channel(host, v)
    channels_first = isinstance(host, NORMS) and not isinstance(host, nn.LayerNorm)
    spatial = y.ndim - 2 if isinstance(host, nn.GroupNorm) else _spatial(host)
    return v.view(1, -1, *[1] * spatial) if channels_first else v


def _spatial(norm: nn.Module) -> int:
    """How many axes follow the channels; BatchNorm1d also takes (batch, channels), where broadcasting does the rest."""
    name = type(norm).__name__
    return next((n for n in (1, 2, 3) if f"{n}d" in name), 0)


class Hosted:
    """What all hosts share: their adapters by name, and pickling of a class that no module holds."""

    active: Active
    slots: dict[str, Any]  # the very dict inside self.lora, so that forward does not pay for nn.Module's lookups

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        plain = original_class(type(self))
        return _rebuild, (type(self).__mro__[1], plain), self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        twin.__dict__["slots"] = twin.__dict__["_modules"]["lora"]._modules
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)  # type: ignore[arg-type]
        self.__dict__["slots"] = self.__dict__["_modules"]["lora"]._modules

    def _base(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward; one put on the instance (accelerate's hooks) was moved to inner_forward."""
        inner = self.__dict__.get("inner_forward")
        return inner(*args, **kwargs) if inner is not None else super().forward(*args, **kwargs)  # type: ignore[misc]


class Adapted(Hosted):
    """Call mode: forward = base + adapters."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        active, slots = self.active, self.slots
        names = active.names
        if not names:
            return self._base(*args, **kwargs)
        if active.mix is None and len(names) == 1:
            adapter = slots.get(names[0])
            if adapter is None:
                return self._base(*args, **kwargs)
            x = args[0] if args else next(iter(kwargs.values()))
            if torch.is_grad_enabled():
                active.watch_checkpoint()
            if adapter._quick and self._is_quick(adapter, x):
                delta = adapter.delta
                parameters = self._parameters  # type: ignore[attr-defined]
                return low_rank_linear(x, parameters["weight"], parameters["bias"], *delta.factors(), delta.scale)
            if adapter._quick and self.packs and not (adapter.delta.dropout and adapter.training):
                a, b = adapter.delta.factors()  # a packed linear layer adds the product in its own function
                return self.low_rank(x, (a, b, adapter.delta.scale))  # type: ignore[attr-defined]
            y = self._base(*args, **kwargs)
            return y + adapter.change(self, op_for(original_class(type(self))), x, y)
        return self._mixed(args, kwargs)

    def _is_quick(self, adapter: Adapter, x: Tensor) -> bool:
        """One plain LoRA on one plain dense Linear: the whole layer is one function."""
        own = self.__dict__["_parameters"]
        weight = own.get("weight") if self.plain and "bias" in own else None  # a parametrized one stands elsewhere
        return (
            weight is not None
            and is_plain(weight)
            and weight.dtype == x.dtype
            and not weight.requires_grad
            and "inner_forward" not in self.__dict__
            and not (adapter.delta.dropout and adapter.training)  # type: ignore[union-attr]
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _mixed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Several adapters: the base once, then the weighted sum of what each would change (a sum on dW)."""
        active = self.active
        y = self._base(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        op = op_for(original_class(type(self)))
        if torch.is_grad_enabled():
            active.watch_checkpoint()
        if active.routed:
            return self._routed(op, x, y)
        total = y
        for name, weight in zip(active.names, active.weights(), strict=True):
            if (adapter := self.slots.get(name)) is not None:
                change = adapter.change(self, op, x, y)
                total = total + (change if isinstance(weight, float) else change * weight.to(y))
        return total

    def _routed(self, op: Op | None, x: Tensor, y: Tensor) -> Tensor:
        """Each row of the batch has its own adapters; only the rows in which one acts meet its factors."""
        if torch.compiler.is_compiling():
            return self._routed_at_once(op, x, y)
        stack = self.active.stacks.get(id(self))
        if stack is not None and stack.fits(y, x):
            return stack.add(x, y, in_place=self.plain)
        routes = [(self.slots[r.name], r) for r in self.active.routes(y.shape[0], self) if r.name in self.slots]
        if not routes:
            return y
        if type(op) is LinearOp and y.ndim > 1 and all(a._quick and not a.delta.dropout for a, _ in routes):
            if y.shape[0] <= FEW * len(routes):
                return self._stack(routes, y.shape[0], x.dtype).add(x, y, in_place=self.plain)
            if not torch.is_grad_enabled() and self.plain and y.is_contiguous() and x.dtype == y.dtype:
                for adapter, route in routes:
                    route.add_(y, adapter.delta, x)
                return y
        changes = [
            adapter.change(self, op, x[r.rows], y[r.rows]).expand_as(y[r.rows]) * r.weights.to(y).view(-1, *_ones(y))
            for adapter, r in routes
        ]
        return y.index_add(0, torch.cat([r.index for _, r in routes]), torch.cat(changes))

    def _routed_at_once(self, op: Op | None, x: Tensor, y: Tensor) -> Tensor:
        """Every row meets every adapter, and the mix picks: one compiled graph then serves every routing."""
        names, mix = self.active.names, self.active.mix.to(y.dtype)  # type: ignore[union-attr]
        mix = mix.repeat_interleave(y.shape[0] // len(mix), dim=0)  # (batch, n); beams repeat a row in place
        here = [(self.slots[n], mix[:, i : i + 1]) for i, n in enumerate(names) if n in self.slots]
        if not (type(op) is LinearOp and all(a._quick and not a.delta.dropout for a, _ in here)):
            changes = [a.change(self, op, x, y) * m.view(-1, *_ones(y)) for a, m in here]
            return sum(changes, y)  # type: ignore[return-value]
        pairs = [(adapter.delta.factors(), adapter.delta.scale, m) for adapter, m in here]
        a = torch.cat([a for (a, _), _, _ in pairs]).to(x.dtype)  # (R, in)
        b = torch.cat([b * s for (_, b), s, _ in pairs], dim=1).to(y.dtype)
        picked = torch.cat([m.expand(-1, a.shape[0]) for (a, _), _, m in pairs], dim=1)  # (batch, R)
        h = F.linear(x, a).to(y.dtype)
        return y + F.linear(h * picked.view(len(picked), *[1] * (h.ndim - 2), -1), b)

    def _stack(self, routes: list[tuple[Adapter, Route]], batch: int, dtype: torch.dtype) -> Stack:
        """The factors for every row; kept while the routing stands, if they are frozen."""
        factors = [p for adapter, _ in routes for p in adapter.delta.parameters()]  # type: ignore[union-attr]
        stack = Stack(*stack_rows([(adapter.delta, r) for adapter, r in routes], batch, dtype), factors, self)
        if not any(p.requires_grad for p in factors):
            self.active.stacks[id(self)] = stack
        return stack


class Stack:
    """A (batch, R, in) and B (batch, out, R): row i of a batch meets the factors of its own adapters, scaled."""

    def __init__(self, a: Tensor, b: Tensor, factors: list[nn.Parameter], layer: Any) -> None:
        self.a, self.b, self.factors = a, b, factors
        self.layer = layer  # held, so that its id stays its own
        self.version = sum(p._version for p in factors)

    def fits(self, y: Tensor, x: Tensor) -> bool:
        same = len(self.a) == y.shape[0] and self.a.dtype == x.dtype
        return same and self.version == sum([p._version for p in self.factors])

    def add(self, x: Tensor, y: Tensor, in_place: bool) -> Tensor:
        """y + x A^T B^T in one batched product; into y itself where nobody needs the old one."""
        rows = x if x.ndim == 3 else x.reshape(len(self.a), -1, x.shape[-1])
        out = y if y.ndim == 3 else y.view(len(self.a), -1, y.shape[-1])
        h = torch.bmm(rows, self.a.mT)
        if in_place and not torch.is_grad_enabled() and y.dtype == h.dtype:
            out.baddbmm_(h, self.b.mT)
            return y
        return torch.baddbmm(out, h.to(y.dtype), self.b.mT.to(y.dtype)).view_as(y)


def stack_rows(routes: list[tuple[Any, Route]], batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors of each row's adapters, one under the other and filled up with zeros to the widest row."""
    per_row: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(batch)]
    for delta, route in routes:
        a, b = (f.to(dtype) for f in delta.factors())
        scaled = [(a, b * (w * delta.scale)) for w in set(route.weights.tolist())]
        by_weight = dict(zip(set(route.weights.tolist()), scaled, strict=True))
        for row, weight in zip(route.index.tolist(), route.weights.tolist(), strict=True):
            per_row[row].append(by_weight[weight])
    widest = max(sum(len(a) for a, _ in row) for row in per_row)
    any_a, any_b = next(pair for row in per_row for pair in row)
    left, right = [], []
    for row in per_row:
        missing = widest - sum(len(a) for a, _ in row)
        pad = [(any_a.new_zeros(missing, any_a.shape[1]), any_b.new_zeros(len(any_b), missing))] if missing else []
        pairs = [*row, *pad]
        left.append(pairs[0][0] if len(pairs) == 1 else torch.cat([a for a, _ in pairs]))
        right.append(pairs[0][1] if len(pairs) == 1 else torch.cat([b for _, b in pairs], dim=1))
    return torch.stack(left), torch.stack(right)


def _ones(y: Tensor) -> list[int]:
    return [1] * (y.ndim - 1)


class Readable(Hosted):
    """Read mode: whoever reads `weight` gets W + dW; the stored parameter stays W."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._base(*args, **kwargs)  # reads self.weight like everybody else

    @property
    def weight(self) -> Tensor:
        raw = self.__dict__["_parameters"]["weight"]
        active = self.active
        if not active.names or _is_sharded(raw):
            return raw
        if active.routed:
            raise StateError("a layer whose weight is read by other code cannot be routed row by row")
        op, w = op_of(self), read_weight(self)  # type: ignore[arg-type]
        matrix = op.to_matrix(self, w)  # type: ignore[arg-type]
        total = matrix
        for name, weight in zip(active.names, active.weights(), strict=True):
            if (adapter := self.slots.get(name)) is not None:
                total = total + weight * (adapter.weight(matrix) - matrix)
        return op.to_weight(self, total)  # type: ignore[arg-type]

    @weight.setter
    def weight(self, value: Any) -> None:
        self.__dict__["_parameters"]["weight"] = value

    @property
    def bias(self) -> Tensor | None:
        bias = self.__dict__["_parameters"]["bias"]
        for name, weight in zip(self.active.names, self.active.weights(), strict=True):
            change = getattr(self.slots.get(name), "bias", None)
            bias = bias if change is None else bias + weight * change
        return bias

    @bias.setter
    def bias(self, value: Any) -> None:
        self.__dict__["_parameters"]["bias"] = value


class Whole(Hosted):
    """A module that an adapter trains whole, in its own copy."""

    def _base(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, nn.Sequential):
            return super()._base(*args, **kwargs)
        copies = self._modules.pop("lora")  # a Sequential runs all its children, and these are not among its steps
        try:
            return super()._base(*args, **kwargs)
        finally:
            self._modules["lora"] = copies

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        active = self.active
        acting = [(n, w) for n, w in zip(active.names, active.weights(), strict=True) if n in self.slots]
        if not acting:
            return self._base(*args, **kwargs)
        if active.routed:
            return self._routed(args, kwargs)
        if len(acting) == 1 and isinstance(acting[0][1], float):
            return self.slots[acting[0][0]](*args, **kwargs)
        return self._blended(acting, args, kwargs)

    def _blended(self, acting: list[tuple[str, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Several copies at once: their changes of the weights are summed, as everywhere."""
        base = {k: v for k, v in self.named_parameters() if not k.startswith("lora.")}  # type: ignore[attr-defined]
        blend = {
            key: value + sum(w * (self.slots[n].get_parameter(key) - value) for n, w in acting)
            for key, value in base.items()
        }
        return torch.func.functional_call(self.slots[acting[0][0]], blend, args, kwargs)

    def _routed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Every row from the copy that its one adapter holds; rows with none, from the base."""
        active, total = self.active, self._base(*args, **kwargs)
        if not isinstance(total, Tensor):
            raise StateError("a module that is trained whole and returns more than a tensor cannot be routed by row")
        out = total
        for route in active.routes(total.shape[0], self):  # type: ignore[arg-type]
            if route.name in self.slots:
                own = self.slots[route.name](*(a[route.rows] if isinstance(a, Tensor) else a for a in args), **kwargs)
                change = (own - total[route.rows]) * route.weights.to(own).view(-1, *_ones(own))
                out = out.index_add(0, route.index, change)
        return out


@cache
def adapted_class(mode: type, base: type) -> type:
    """`base` with adapters: LoRALinear for Linear, LoRALinear4bit for Linear4bit. One class for each base."""
    prefix = {"Adapted": "LoRA", "Readable": "Read", "Whole": "Whole"}[mode.__name__]
    namespace = {
        "__module__": mode.__module__,
        "plain": base.forward is nn.Linear.forward,
        "packs": hasattr(base, "low_rank") and isinstance(op_for(base), LinearOp),
    }
    return type(f"{prefix}{base.__name__}", (mode, base), namespace)


def _rebuild(mode: type, base: type) -> Any:
    kind = adapted_class(mode, base)
    return kind.__new__(kind)


@cache
def original_class(kind: type) -> type:
    """The class a hosted layer had, and gets back."""
    return kind.__mro__[kind.__mro__.index(Hosted) + 1] if issubclass(kind, Hosted) else kind


def host(layer: nn.Module, active: Active, mode: type = Adapted) -> nn.Module:
    """Make `layer` able to carry adapters. It stays the same object."""
    if isinstance(layer, Leaf):
        return host_leaf(layer, active)
    if isinstance(layer, Hosted):
        return layer
    if "forward" in vars(layer):  # accelerate puts forward on the instance; left there, it would hide ours
        layer.inner_forward = vars(layer).pop("forward")
    layer.__class__ = adapted_class(mode, type(layer))
    lora = nn.ModuleDict()
    layer.lora = lora
    layer.__dict__["slots"] = lora._modules
    layer.__dict__["active"] = active
    return layer


def release(layer: nn.Module) -> None:
    """Give the layer its own class back, and the forward that somebody had put on the instance."""
    if isinstance(layer, Leaf):
        return release_leaf(layer)
    del layer.lora, layer.slots, layer.active
    inner = vars(layer).pop("inner_forward", None)
    layer.__class__ = original_class(type(layer))
    if inner is not None:
        layer.forward = inner  # type: ignore[method-assign]


def _is_sharded(w: Tensor) -> bool:
    return hasattr(w, "_local_tensor")


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """`named_modules` without the inside of adapters, so that its cost does not grow with their number."""
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str) -> None:
        if module in seen:
            return
        seen.add(module)
        found[name] = module
        inside = isinstance(module, Hosted | Reading)
        for key, child in module._modules.items():
            if child is not None and not (inside and key == "lora"):
                walk(child, f"{name}.{key}" if name else key)

    walk(model, "")
    return found


def refuse_sharded(layers: Mapping[str, nn.Module]) -> None:
    """After fully_shard, each rank would draw its own A and no gradient would be reduced: silently wrong."""
    sharded = [
        n for n, m in layers.items() if any(p is not None and _is_sharded(p) for p in own_parameters(m).values())
    ]
    if sharded:
        raise TargetError(
            "these layers are already sharded, so gradients of a new adapter would not be reduced across ranks",
            problems=sharded,
            fix="attach adapters first, then call fully_shard",
        )
