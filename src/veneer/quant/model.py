"""Packing the frozen weights of a whole model, and unpacking them.

Everything is checked before the first layer changes: kinds, shapes, values. What is asked for and cannot be packed is
an error; what `targets="all-linear"` merely covers is left as it is, and the report says why.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.host import Whole, plain_modules
from veneer.core.leaf import Leaf, own_parameters
from veneer.core.model import is_merged
from veneer.core.observe import loss_of, observe
from veneer.core.op import LinearOp, op_for, op_of
from veneer.core.select import PRESETS, block_index, ends_with, output_head, places, select
from veneer.core.spec import LoRA
from veneer.core.weight import is_packed, is_plain
from veneer.errors import ConfigError, StateError, TargetError
from veneer.quant.inputs import Inputs, save_inputs, summed_up
from veneer.quant.layer import Packed, is_packable, pack_layer, unpack_layer
from veneer.quant.stack import PackedStack, pack_stack, unpack_stack
from veneer.quant.storage import STORAGES, Recipe, storage_of

__all__ = [
    "Quantized",
    "choose",
    "dequantize",
    "note_packing",
    "packed_stacks",
    "quantize",
    "round_trip",
    "save_energies",
]


@dataclass(frozen=True)
class Quantized:
    """What quantize did: which layers are packed, which were left and why, and the bytes of all weights."""

    kind: str
    layers: tuple[str, ...]
    left: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        lines = [
            f"{self.kind}: {len(self.layers)} layers packed, {self.bytes_before / 2**20:,.1f} -> "
            f"{self.bytes_after / 2**20:,.1f} MiB"
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"  left as they are ({len(names)}, {names[0]}): {reason}" for reason, names in reasons.items()]
        return "\n".join(lines)


def quantize(
    model: nn.Module,
    kind: str = "nf4",
    *,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    embedding: bool = False,
    head: bool = False,
    block: int = 64,
    double: bool = True,
    dynamic: bool = True,
    outliers: float | None = None,
    rotate: bool | None = None,
    compute_dtype: torch.dtype | None = None,
    whole: Sequence[str] = (),
    data: Iterable[Any] | None = None,
    energies: Mapping[str, Inputs] | None = None,
) -> Quantized:
    """Store the frozen weights of `model` in 4 or 8 bits ("nf4", "int8", "fp8"), in place.

    targets, exclude: as in LoRA. embedding, head: pack the token embedding and the output head, too; where they share
    one weight, either packs both. compute_dtype: what products run in; the input's own type when None. whole:
    modules that will be trained whole, by their names' endings; all inside them stays as it is. data: a few batches
    (mappings are passed to the model by keyword); nf4 and fp8 then round with more care what their large values meet.
    energies: what `look` saw of such data, in its place. The other options are those of `Recipe`. Layers stay the same
    objects; adapters may be there already or come later.
    """
    recipe = Recipe(kind, block, double, dynamic, outliers, rotate).checked()
    if is_merged(model):
        raise StateError("the model is merged, so W + dW would be packed", fix="unmerge(model) first")
    chosen, left = choose(model, targets, exclude, embedding, head, whole)
    _check(chosen, kind, left)
    if data is not None and not storage_of(recipe).weighs:
        raise ConfigError(
            f"{recipe.kind} makes no use of data; it is for {' and '.join(k for k in STORAGES if STORAGES[k].weighs)}",
            fix="leave data out",
        )
    energies = look(model, chosen, data) if data is not None else energies or {}
    before = weight_bytes(model)
    done: dict[int, Packed] = {}
    for name, layer in chosen.items():
        if isinstance(layer, Leaf):
            pack_stack(layer, recipe)
            continue
        weight = layer._parameters["weight"]
        shared = done.get(id(weight))
        pack_layer(layer, recipe, compute_dtype, shared, energies.get(name))
        done[id(weight)] = shared or layer  # type: ignore[assignment]
        del weight  # so that one layer's dense weight is gone before the next is packed
    note_packing(model, whole)
    return Quantized(kind, tuple(chosen), left, before, weight_bytes(model))


def look(model: nn.Module, layers: Mapping[str, nn.Module], data: Iterable[Any]) -> dict[str, Inputs]:
    """What the inputs of each linear layer are like in these batches."""
    linear = {name: layer for name, layer in layers.items() if isinstance(op_of(layer), LinearOp)}
    return summed_up(observe(model, linear, "sketch", data, loss_of, 0))


def save_energies(
    model: nn.Module, layers: Mapping[str, nn.Module], data: Iterable[Any], path: str | os.PathLike[str]
) -> None:
    """What `look` sees, in a file: a base may then be packed while it is read, and the same way each time."""
    save_inputs(look(model, layers, data), path)


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """Give packed layers dense weights again, rounded as they were; returns their names.

    dtype: what the whole model is turned to, so that its layers agree; what each layer unpacks to when None. A merge
    into torch.float32 loses nothing of dW.
    """
    if is_merged(model):
        raise StateError("the model is merged", fix="unmerge(model) first")
    packed = {n: m for n, m in plain_modules(model).items() if isinstance(m, Packed)}
    stacks = list(packed_stacks(model))
    if not packed and not stacks:
        theirs = next(((n, k) for n, m in plain_modules(model).items() if (k := _packed_by_others(m))), None)
        raise StateError(
            "no layer of this model is packed by veneer" + (f"; {theirs[0]} holds {theirs[1]}" if theirs else ""),
            fix="veneer.adopt(model) takes over what bitsandbytes packed" if theirs else None,
        )
    done: dict[int, nn.Parameter] = {}
    for layer in packed.values():
        codes = layer._parameters["weight"]
        done[id(codes)] = unpack_layer(layer, dtype or layer.weight_dtype, done.get(id(codes)))
    for owner, name, _ in stacks:
        unpack_stack(owner, name, dtype)
    if dtype is not None:
        model.to(dtype)
    note_packing(model)
    return (*packed, *(full for *_, full in stacks))


def note_packing(model: nn.Module, whole: Sequence[str] = (), energies: str | None = None) -> None:
    """What `save_pretrained` writes into config.json decides how the folder loads again."""
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        from veneer.quant import hf

        hf.note_packing(model, whole, energies)


def round_trip(w: Tensor, kind: str = "nf4", *, block: int = 64, double: bool = True) -> Tensor:
    """The weight matrix (or stack of them) as it comes back from a storage: what LoftQ's init needs to know."""
    recipe = Recipe(kind, block, double).checked()
    matrix = w.detach().reshape(-1, w.shape[-1])
    storage, shape = storage_of(recipe), (matrix.shape[0], matrix.shape[1])
    return storage.unpack(storage.pack(matrix, recipe), shape, w.dtype, recipe).view(w.shape)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers outside adapters, shared ones once."""
    own = _own_tensors(model)
    return sum(t.nbytes_packed if isinstance(t, PackedStack) else t.numel() * t.element_size() for t in own)


def packed_stacks(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """The owner, the parameter's own name and its full one of each packed stack."""
    for module_name, module in plain_modules(model).items():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, PackedStack):
                yield module, name, f"{module_name}.{name}" if module_name else name


def _own_tensors(model: nn.Module) -> Iterator[Tensor]:
    seen: set[int] = set()
    for module in plain_modules(model).values():
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is not None and id(t) not in seen:
                seen.add(id(t))
                yield t


# --- choosing and checking -------------------------------------------------------------------------------------------


def choose(
    model: nn.Module,
    targets: str | Sequence[str],
    exclude: str | Sequence[str],
    embedding: bool,
    head: bool,
    whole: Sequence[str] = (),
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers to pack, by name; and those that a preset covers but that cannot be packed, with the reason."""
    preset = isinstance(targets, str) and targets in PRESETS
    stacks, exclude = _stacks(model, exclude) if targets == "all-linear" else ({}, exclude)
    found = select(model, LoRA(targets=targets, exclude=exclude)) | stacks if targets else {}
    outside = _outside_blocks(found) if preset else {}
    ends = _ends(model, embedding, head)
    outside |= {name: "trained whole" for name in found if _is_inside(name, whole)}
    found = {**{name: layer for name, layer in found.items() if name not in outside}, **ends}
    reasons = {name: reason for name, layer in found.items() if (reason := _reason(model, name, layer))}
    if reasons and (not preset or reasons.keys() & ends.keys()):
        raise TargetError("these layers cannot be packed", problems=[f"{n}: {r}" for n, r in reasons.items()])
    chosen = {name: layer for name, layer in found.items() if name not in reasons}
    return {**chosen, **_sharing(model, chosen)}, {**outside, **reasons}


def _stacks(model: nn.Module, exclude: str | Sequence[str]) -> tuple[dict[str, nn.Module], str | Sequence[str]]:
    """Stacks of experts, which are linear layers to whoever packs; and what is left of `exclude` for layers."""
    found = {n: p for n, p in places(model).items() if isinstance(p, Leaf) and p.raw.dim() == 3}
    found = {name: leaf for name, leaf in found.items() if block_index(name) is not None}
    endings = [exclude] if isinstance(exclude, str) and exclude else list(exclude)
    used = {e for e in endings if any(ends_with(name, e) for name in found)}
    layers = [n for n, m in plain_modules(model).items() if op_for(type(m)) is not None]
    left = tuple(e for e in endings if e not in used or any(ends_with(name, e) for name in layers))
    kept = {name: leaf for name, leaf in found.items() if not any(ends_with(name, e) for e in used)}
    return dict(kept), left if used else exclude


def _is_inside(name: str, modules: Sequence[str]) -> bool:
    parts = name.split(".")
    return any(ends_with(".".join(parts[:i]), module) for i in range(1, len(parts) + 1) for module in modules)


def _outside_blocks(found: Mapping[str, nn.Module]) -> dict[str, str]:
    """Poolers, projections and new heads, where a model has numbered blocks: small, and often trained whole."""
    inside = {name for name in found if block_index(name) is not None}
    return {name: "outside the numbered blocks; name it to pack it" for name in found if inside and name not in inside}


def _ends(model: nn.Module, embedding: bool, head: bool) -> dict[str, nn.Module]:
    """The token embedding and the output head, where they are asked for."""
    names = {id(module): name for name, module in plain_modules(model).items()}
    get = getattr(model, "get_input_embeddings", None)
    wanted = {"embedding": get() if embedding and get else None, "head": output_head(model) if head else None}
    missing = [n for n, asked in (("embedding", embedding), ("head", head)) if asked and wanted[n] is None]
    if missing:
        raise TargetError(
            f"{type(model).__name__} does not say which layer is its {' and '.join(missing)}",
            fix="name it among the targets",
        )
    return {names[id(m)]: m for m in wanted.values() if m is not None and id(m) in names}


def _reason(model: nn.Module, name: str, layer: nn.Module) -> str | None:
    if isinstance(layer, Leaf):
        return None if layer.raw.dim() == 3 else "a parameter that a module reads itself, and no stack of experts"
    if isinstance(layer, Whole):
        return "it is trained whole by an adapter"
    if any(part in name.split(".") for part in getattr(model, "_keep_in_fp32_modules", None) or ()):
        return "the model asks for it to stay in fp32"
    return None if is_packed(layer) else is_packable(layer)  # what is packed already is an error of its own


def _sharing(model: nn.Module, chosen: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Other layers that hold the weight of a chosen one: they are packed with it, or would go on holding it dense."""
    held = {id(layer._parameters.get("weight")) for layer in chosen.values()}
    return {
        name: module
        for name, module in plain_modules(model).items()
        if name not in chosen and id(module._parameters.get("weight")) in held and op_for(type(module)) is not None
    }


def _check(chosen: Mapping[str, nn.Module], kind: str, left: Mapping[str, str]) -> None:
    """Every weight is a plain finite one that is not packed already; all that is wrong in one error."""
    problems = []
    for name, layer in chosen.items():
        weight = own_parameters(layer).get("weight")
        if isinstance(layer, Packed):
            problems.append(f"{name} is stored as {layer.recipe.kind} already; veneer.dequantize(model) first")
        elif (theirs := _packed_by_others(layer)) is not None:
            problems.append(f"{name} is packed already ({theirs})")
        elif weight is None or not is_plain(weight):
            problems.append(f"{name} holds a {type(weight).__name__} of {getattr(weight, 'dtype', None)}, not numbers")
        elif not weight.numel():
            problems.append(f"{name} is empty: {tuple(weight.shape)}")
        elif not weight.is_meta and not bool(torch.isfinite(weight).all()):
            problems.append(f"{name} holds NaN or infinite values")
    if problems:
        raise TargetError(f"the base cannot be stored as {kind}; nothing was changed", problems=problems)
    if not chosen:
        why = [f"{name}: {reason}" for name, reason in left.items()]
        raise TargetError(
            "no layer is left to pack", fix="name layers that can be packed with targets=[...]", problems=why
        )


def _packed_by_others(layer: nn.Module) -> str | None:
    return None if isinstance(layer, Packed) else is_packed(layer)
