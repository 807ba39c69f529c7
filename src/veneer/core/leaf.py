"""Read mode: adapters on a single parameter, for code that reads a weight instead of calling a layer.

    nn.MultiheadAttention.in_proj_weight      (3 dim, dim)      read by F.multi_head_attention_forward
    a stack of experts in transformers        (E, out, in)      indexed by expert, or given to a grouped product

The module that owns the parameter changes its class, as in core/host.py, and gets a property under the parameter's
name that gives W + dW. Inside one forward of the owner the sum is formed once, however often it is read: an eager loop
over experts reads it for each of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.op import OPS
from veneer.core.weight import dense, read_weight, write_weight
from veneer.errors import StateError

__all__ = ["Leaf", "Reading", "host_leaf", "leaves_of", "own_parameters", "release_leaf"]


class ParameterOp:
    """The parameter is the matrix; leading axes are independent matrices (experts)."""

    looks_up = False

    def shape(self, host: nn.Module) -> tuple[int, int]:
        out, n = own_parameters(host)["weight"].shape[-2:]
        return out, n

    def to_matrix(self, host: nn.Module, w: Tensor) -> Tensor:
        return w

    def to_weight(self, host: nn.Module, m: Tensor) -> Tensor:
        return m

    def _never(self, host: nn.Module, *args: Any) -> Tensor:
        raise StateError("a parameter is read, not called, so it has no input")

    down = up = product = per_channel = _never


OPS["veneer.core.leaf.Leaf"] = ParameterOp()


class Leaf(nn.Module):
    """One parameter of `owner` as a place for adapters."""

    active: Any
    slots: dict[str, Any]

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not a child: the owner holds the leaf, not the other way round
        self.__dict__["name"] = name
        self.lora = nn.ModuleDict()
        self.__dict__["slots"] = self.lora._modules

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["slots"] = self.__dict__["_modules"]["lora"]._modules

    @property
    def raw(self) -> nn.Parameter:
        return self.owner._parameters[self.name]  # type: ignore[return-value, attr-defined]

    def combined(self) -> Tensor:
        active = self.active
        if not any(name in self.slots for name in active.names) or hasattr(self.raw, "_local_tensor"):
            return self.raw
        if active.routed:
            raise StateError(f"{self.name} is read by other code, so it cannot be routed row by row")
        if torch.is_grad_enabled():
            active.watch_checkpoint()
        w = dense(self.raw)
        total = w
        for name, weight in zip(active.names, active.weights(), strict=True):
            if (adapter := self.slots.get(name)) is not None:
                change = adapter.weight(w) - w if adapter.combine_changes_base else adapter.delta.weight().to(w.dtype)
                total = total + (change if isinstance(weight, float) else change * weight.to(w.dtype))
        return total


@read_weight.register
def _(host: Leaf) -> Tensor:
    return dense(host.raw)


@write_weight.register
def _(host: Leaf, w: Tensor) -> None:
    with torch.no_grad():
        host.raw.copy_(w)


def own_parameters(layer: nn.Module) -> dict[str, Any]:
    """The frozen parameters that adapters of this layer act on, by their role."""
    return {"weight": layer.raw} if isinstance(layer, Leaf) else layer._parameters


class Reading:
    """The owner's side: properties for its adapted parameters, and one sum for each forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["sums"] = {}
        try:
            inner = self.__dict__.get("inner_forward")
            return inner(*args, **kwargs) if inner is not None else super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.__dict__["sums"] = None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        names = tuple(self.__dict__["_modules"]["lora"]._modules)
        return _rebuild, (original(type(self)), names), self.__dict__


def _property(name: str) -> property:
    def get(self: Any) -> Any:
        sums, leaf = self.__dict__.get("sums"), self.__dict__["_modules"]["lora"]._modules[name]
        if sums is None:
            return leaf.combined()
        if name not in sums:
            sums[name] = leaf.combined()
        return sums[name]

    def set_(self: Any, value: Any) -> None:
        self.__dict__["_parameters"][name] = value

    return property(get, set_)


@cache
def reading_class(base: type, names: tuple[str, ...]) -> type:
    return type(f"Read{base.__name__}", (Reading, base), {name: _property(name) for name in names})


def original(kind: type) -> type:
    return kind.__mro__[kind.__mro__.index(Reading) + 1] if issubclass(kind, Reading) else kind


def _rebuild(base: type, names: tuple[str, ...]) -> Any:
    kind = reading_class(base, names)
    return kind.__new__(kind)


def leaves_of(module: nn.Module) -> dict[str, Leaf]:
    """The leaves that a module already has, by parameter name."""
    return dict(module.lora.items()) if isinstance(module, Reading) else {}  # type: ignore[union-attr, operator]


def host_leaf(leaf: Leaf, active: Any) -> Leaf:
    """Let the owner read through `leaf` from now on."""
    owner = leaf.owner
    leaf.__dict__["active"] = active
    if leaves_of(owner).get(leaf.name) is leaf:
        return leaf
    if not isinstance(owner, Reading):
        if "forward" in vars(owner):
            owner.inner_forward = vars(owner).pop("forward")
        owner.lora = nn.ModuleDict()
    owner.lora[leaf.name] = leaf
    owner.__class__ = reading_class(original(type(owner)), tuple(owner.lora._modules))
    return leaf


def release_leaf(leaf: Leaf) -> None:
    """Give the owner its parameter back, and with the last one its class."""
    owner = leaf.owner
    del owner.lora[leaf.name]
    if owner.lora._modules:
        owner.__class__ = reading_class(original(type(owner)), tuple(owner.lora._modules))
        return
    del owner.lora
    vars(owner).pop("sums", None)
    owner.__class__ = original(type(owner))
    inner = vars(owner).pop("inner_forward", None)
    if inner is not None:
        owner.forward = inner
