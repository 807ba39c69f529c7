"""A layer whose frozen weight is packed: it stays the same object, and its class becomes a subclass that unpacks.

    layer.weight              the codes, under the weight's own key
    layer.weight_scale, ...   the other parts, as buffers
    read_weight(layer)        the weight as the layer itself would hold it

So keys keep their names, `isinstance(layer, nn.Linear)` holds, and the adapters of core/host.py lie on top like on any
layer. The parts never change their types: `model.to(torch.bfloat16)` moves what the layer unpacks to, and would
otherwise round fp32 scales in silence.

A packed weight is not written in place. What is merged into it would have to be rounded again, far more coarsely than
the change of a weight is large, so `write_weight` refuses.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.host import Hosted, adapted_class, original_class
from veneer.core.op import LinearOp, TransposedLinearOp, op_of
from veneer.core.weight import is_packed, read_weight
from veneer.quant import fp8, int8, nf4  # noqa: F401  (each registers its storage)
from veneer.quant.inputs import Inputs
from veneer.quant.linear import packed_linear
from veneer.quant.storage import Parts, Recipe, storage_of

__all__ = [
    "Packed",
    "is_packable",
    "pack_layer",
    "packed_class",
    "put_parts",
    "rounds_inputs",
    "unpack_layer",
    "unrounded",
]


WRITTEN_OUT = {"FalconLinear"}  # of transformers: their own forward is that of a linear layer, term by term
LOOKED_UP = 8192  # rows of an embedding that are unpacked at a time


class PackedType(type):
    """The class of packed classes: they are made when needed, so pickle is told how to make them again."""


class Packed(nn.Module, metaclass=PackedType):
    """What packed layers share. The class that the layer had comes right behind it among the bases."""

    recipe: Recipe
    weight_shape: torch.Size  # as the layer itself would hold it
    weight_dtype: torch.dtype  # what it unpacks to
    compute_dtype: torch.dtype | None  # what products run in; the input's type when None
    weighed: bool | None = None  # whether it was rounded with regard to inputs; None where nobody knows

    @property
    def parts(self) -> Parts:
        names = storage_of(self.recipe).part_names(self.recipe)
        return self._parameters["weight"], *(self._buffers[name] for name in names)  # type: ignore[return-value]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, cols) of what is packed: rows are output channels; of an embedding, tokens."""
        first, *rest = self.weight_shape
        rows, cols = first, torch.Size(rest).numel()
        return (cols, rows) if type(op_of(self)) is TransposedLinearOp else (rows, cols)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, unpacked, in the shape the layer itself would hold."""
        dtype = dtype or self.weight_dtype
        matrix = storage_of(self.recipe).unpack(self.parts, self.matrix_shape, dtype, self.recipe)
        return from_matrix(self, matrix)

    def forward(self, x: Tensor) -> Tensor:
        op = op_of(self)
        if isinstance(op, LinearOp):
            return self.low_rank(x)
        if op.looks_up:
            return self._looked_up(x)
        x, back = self._computed_in(x)
        w = self.dense(x.dtype)
        with _without_saving(self, w):
            y = op.product(self, x, op.to_matrix(self, w))
        bias = self._parameters.get("bias")
        return (y if bias is None else y + op.per_channel(self, bias.to(y.dtype))).to(back)

    def low_rank(self, x: Tensor, factors: tuple[Tensor, Tensor, float] | None = None) -> Tensor:
        """A linear layer's output, with the low-rank change of factors (A, B, s) added inside the same function."""
        x, back = self._computed_in(x)
        bias = self._parameters.get("bias")
        return packed_linear(x, self.parts, self.matrix_shape, self.recipe, bias, factors).to(back)

    def _looked_up(self, ids: Tensor) -> Tensor:
        dtype = self.compute_dtype or self.weight_dtype
        y = self._rows(ids.flatten(), dtype).view(*ids.shape, -1)
        scale = getattr(self, "embed_scale", None)  # Gemma and M2M multiply what they look up
        return y if scale is None else y * scale

    def _rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """A few at a time: what unpacks them takes ten times their room on a GPU."""
        storage = storage_of(self.recipe)
        if len(ids) <= LOOKED_UP:
            return storage.rows(self.parts, self.matrix_shape, ids, dtype, self.recipe)
        found = torch.empty(len(ids), self.matrix_shape[1], dtype=dtype, device=ids.device)
        for few, into in zip(ids.split(LOOKED_UP), found.split(LOOKED_UP), strict=True):
            into.copy_(storage.rows(self.parts, self.matrix_shape, few, dtype, self.recipe))
        return found

    def _computed_in(self, x: Tensor) -> tuple[Tensor, torch.dtype]:
        """x in the type of the products, and the type to give back."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return (x, x.dtype) if self.compute_dtype is None else (x.to(self.compute_dtype), x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        held = {id(part) for part in self.parts}
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.parts[0].device)).dtype

        def guarded(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if id(t) in held and moved.dtype != t.dtype else moved

        return super()._apply(guarded, recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.recipe.kind}"


@cache
def packed_class(base: type) -> type:
    """`base` with a packed weight: PackedLinear for Linear. One class for each base, whatever the storage."""
    return PackedType(f"Packed{base.__name__}", (Packed, base), {"__module__": __name__})


copyreg.pickle(PackedType, lambda kind: "Packed" if kind is Packed else (packed_class, (kind.__mro__[2],)))  # type: ignore[arg-type]


def _without_saving(layer: Packed, w: Tensor) -> AbstractContextManager[Any]:
    """Autograd keeps a note that w can be unpacked again, and not w."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return nullcontext()
    address, shape = w.untyped_storage().data_ptr(), w.shape  # not w itself: the hooks live as long as the graph

    def pack(t: Tensor) -> Tensor | torch.dtype:
        same = t.shape == shape and t.untyped_storage().data_ptr() == address
        return t.dtype if same and t.is_contiguous() else t

    def unpack(kept: Tensor | torch.dtype) -> Tensor:
        return kept if isinstance(kept, Tensor) else layer.dense(kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def rounds_inputs(model: nn.Module) -> bool:
    """Whether some layer rounds its inputs to 8 bits."""
    return any(isinstance(m, Packed) and m.recipe.dynamic and m.recipe.kind != "nf4" for m in model.modules())


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """8-bit layers leave their inputs as they are for the length of the block. Two ways of computing the same thing may
    then be compared: rounding turns a difference in the last place into one of a percent."""
    recipes = {module: module.recipe for module in model.modules() if isinstance(module, Packed)}
    for module, recipe in recipes.items():
        module.recipe = recipe._replace(dynamic=False)
    try:
        yield
    finally:
        for module, recipe in recipes.items():
            module.recipe = recipe


# --- from plain to packed and back -----------------------------------------------------------------------------------


def to_matrix(layer: nn.Module, w: Tensor) -> Tensor:
    return w.T if type(op_of(layer)) is TransposedLinearOp else w.flatten(1)


def from_matrix(layer: Packed, m: Tensor) -> Tensor:
    return m.T if type(op_of(layer)) is TransposedLinearOp else m.view(layer.weight_shape)


def is_packable(layer: nn.Module) -> str | None:
    """Why the weight of this layer cannot be packed; None when it can."""
    kind = original_class(type(layer))
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    own = kind.forward not in {k.forward for k in plain} and not hasattr(layer, "embed_scale")
    own = own and not (kind.__name__ in WRITTEN_OUT and kind.__module__.startswith("transformers."))
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its weight is read by other code, which would get the codes"
    if own and type(op_of(layer)) is not TransposedLinearOp:
        return f"{kind.__name__} has a forward of its own"
    if "forward" in vars(layer) or "inner_forward" in vars(layer):
        return "something (accelerate?) put a forward on the instance"
    if getattr(layer, "max_norm", None) is not None:
        return "an embedding with max_norm rewrites its weight when called"
    return None


def pack_layer(
    layer: nn.Module,
    recipe: Recipe,
    compute_dtype: torch.dtype | None,
    shared: Packed | None,
    inputs: Inputs | None = None,
) -> None:
    """Replace the layer's weight by its parts. `shared`: a layer packed before whose weight is this one's."""
    weight = layer._parameters["weight"]
    assert weight is not None
    with torch.no_grad():
        if shared is not None:
            parts = shared.parts
        elif weight.is_meta:
            empty = storage_of(recipe).pack(torch.zeros(to_matrix(layer, weight).shape, device="meta"), recipe)
            parts = tuple(part.to("meta") for part in empty)
        else:
            parts = storage_of(recipe).pack(to_matrix(layer, weight.detach()), recipe, inputs)
    shape, dtype = weight.shape, weight.dtype
    kind = packed_class(original_class(type(layer)))
    layer.__class__ = adapted_class(type(layer).__mro__[1], kind) if isinstance(layer, Hosted) else kind
    layer.recipe, layer.compute_dtype = recipe, compute_dtype  # type: ignore[assignment]
    layer.weight_shape, layer.weight_dtype = shape, dtype  # type: ignore[assignment]
    layer.weighed = (inputs is not None) if shared is None else shared.weighed  # type: ignore[assignment]
    put_parts(layer, parts)  # type: ignore[arg-type]


def put_parts(layer: Packed, parts: Parts) -> None:
    codes, *rest = parts
    is_parameter = isinstance(codes, nn.Parameter)
    layer._parameters["weight"] = codes if is_parameter else nn.Parameter(codes, requires_grad=False)
    for name, part in zip(storage_of(layer.recipe).part_names(layer.recipe), rest, strict=True):
        layer.register_buffer(name, part)


def unpack_layer(layer: Any, dtype: torch.dtype, shared: nn.Parameter | None) -> nn.Parameter:
    """Give the layer a dense weight and its own class again."""
    weight = shared
    if weight is None:
        weight = nn.Parameter(layer.dense(dtype).contiguous(), requires_grad=False)
    for name in storage_of(layer.recipe).part_names(layer.recipe):
        del layer._buffers[name]
    layer._parameters["weight"] = weight
    for name in ("recipe", "compute_dtype", "weight_shape", "weight_dtype"):
        del layer.__dict__[name]
    layer.__dict__.pop("weighed", None)
    kind = original_class(type(layer)).__mro__[2]
    layer.__class__ = adapted_class(type(layer).__mro__[1], kind) if isinstance(layer, Hosted) else kind
    return weight


@read_weight.register
def _(host: Packed) -> Tensor:
    return host.dense()


@is_packed.register
def _(host: Packed) -> str | None:
    return host.recipe.kind
