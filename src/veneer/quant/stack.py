"""A stack of matrices in one parameter, packed: the experts of a mixture as transformers keeps them, (E, out, in).

The module that owns the parameter reads it in a forward of its own, so the parameter itself becomes a tensor that is
packed inside and an ordinary weight to whoever looks:

    w[e]               the packed matrix of one expert
    F.linear(x, w[e])  quant/linear.py's product: in 8 bits where the storage has it, nothing dense kept for backward
    anything else      on the unpacked stack: a grouped product of all experts, or W + dW for core/leaf.py

What is unpacked for anything else is kept by autograd until the backward pass; recompute the blocks to hold one stack
at a time. Each expert is packed by itself, so a matrix is the same bytes wherever it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from veneer.core.leaf import Leaf
from veneer.core.weight import dense, is_packed
from veneer.quant.linear import packed_linear
from veneer.quant.storage import Parts, Recipe, storage_of

__all__ = ["PackedStack", "pack_stack", "unpack_stack"]

KEPT = ("detach", "clone", "alias", "_to_copy")  # what gives a packed stack again


class PackedStack(Tensor):
    """Parts whose leading axes are those of the stack, under the shape and type of the weight."""

    recipe: Recipe
    parts: Parts

    @staticmethod
    def __new__(cls, parts: Parts, recipe: Recipe, shape: torch.Size, dtype: torch.dtype) -> PackedStack:
        device = parts[0].device
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[return-value]

    def __init__(self, parts: Parts, recipe: Recipe, shape: torch.Size, dtype: torch.dtype) -> None:
        self.parts, self.recipe = parts, recipe

    @classmethod
    def pack(cls, w: Float[Tensor, "*e out n"], recipe: Recipe) -> PackedStack:
        storage, flat = storage_of(recipe), w.detach().flatten(0, -3)
        each = [storage.pack(m, recipe) for m in flat]
        parts = tuple(torch.stack(part).unflatten(0, w.shape[:-2]) for part in zip(*each, strict=True))
        return cls(parts, recipe, w.shape, w.dtype)

    @property
    def nbytes_packed(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def dense(self) -> Tensor:
        lead = self.dim() - 2
        flat = [part.flatten(0, lead - 1) if lead else part[None] for part in self.parts]
        storage, size = storage_of(self.recipe), (self.shape[-2], self.shape[-1])
        each = (storage.unpack(parts, size, self.dtype, self.recipe) for parts in zip(*flat, strict=True))
        return torch.stack(list(each)).view(self.shape)

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"PackedStack({tuple(self.shape)}, {self.recipe.kind}, {self.dtype}, {self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = [f"part_{i}" for i in range(len(self.parts))]
        return names, (self.recipe, self.dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("part_"):
            return self.parts[int(name.removeprefix("part_"))]
        raise AttributeError(name)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], about: Any, size: Any, stride: Any) -> PackedStack:
        return PackedStack(tuple(inner.values()), about[0], torch.Size(size), about[1])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and args[0].dim() > 2 and _is_one(args[1]):
            whole, index = args
            parts = tuple(part[index] for part in whole.parts)
            return cls(parts, whole.recipe, whole.shape[1:], whole.dtype)
        if func is F.linear and isinstance(args[1], cls) and args[1].dim() == 2:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # what comes out is plain, not a stack again
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in KEPT:
            return _kept(func, name, args[0], kwargs or {})
        plain = torch.utils._pytree.tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def _is_one(index: Any) -> bool:
    return isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool)


def _linear(x: Tensor, weight: PackedStack, bias: Tensor | None = None) -> Tensor:
    size = (weight.shape[0], weight.shape[1])
    return packed_linear(x, weight.parts, size, weight.recipe, bias)


def _kept(func: Callable[..., Tensor], name: str, whole: PackedStack, options: dict[str, Any]) -> PackedStack:
    """The types of the parts never change; what changes is what the stack unpacks to."""
    dtype = options.pop("dtype", None) or whole.dtype
    parts = tuple(func(part, **options) for part in whole.parts)
    return PackedStack(parts, whole.recipe, whole.shape, dtype)


# --- a module's parameter, packed and back ---------------------------------------------------------------------------


def pack_stack(leaf: Leaf, recipe: Recipe) -> None:
    owner, name = leaf.owner, leaf.name  # type: ignore[attr-defined]
    owner._parameters[name] = nn.Parameter(PackedStack.pack(leaf.raw, recipe), requires_grad=False)


def unpack_stack(owner: nn.Module, name: str, dtype: torch.dtype | None) -> None:
    packed: Any = owner._parameters[name]
    owner._parameters[name] = nn.Parameter(packed.dense().to(dtype or packed.dtype), requires_grad=False)


@dense.register
def _(w: PackedStack) -> Tensor:
    return w.dense()


@is_packed.register
def _(host: Leaf) -> str | None:
    raw = host.raw
    return raw.recipe.kind if isinstance(raw, PackedStack) else None
