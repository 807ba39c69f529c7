"""One adapter in the place of another, in the same memory.

    A (R, in)  = [A'; 0]            B (out, R) = [s'/s B', 0]            so that  s B A = s' B' A'

A compiled model is compiled for the shapes, the scales and the names it saw. Attaching another adapter changes all
three; writing other values into an adapter that is already there changes none, so nothing is compiled again. The
adapter in place says how much room there is: one of a smaller rank is filled up with zeros, and layers that the new one
leaves alone get zeros, too. Nothing is rounded: values of a wider type than the room's are refused.

    overwrite(model, "slot", spec, values)          from values
    veneer.swap(model, "adapters/sql", "slot")      from a file (ckpt/pool.py, which also keeps hundreds of them)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer.core.combine import Add
from veneer.core.delta import Lora
from veneer.core.host import Adapter
from veneer.core.model import active_of, adapter_of, is_merged, sites, spec_of, tensors
from veneer.core.spec import LoRA
from veneer.errors import CheckpointError, StateError

__all__ = ["Values", "misfits", "overwrite"]

Values = Mapping[tuple[str, str], Tensor]
"""What `core.model.tensors` gives: (site, field) -> value."""


class Copy(NamedTuple):
    """target[: its first rows or columns] = factor * source, and zeros behind; all zeros where there is no source."""

    target: Tensor
    source: Tensor | None
    factor: float = 1.0


def overwrite(model: nn.Module, name: str, spec: LoRA, values: Values) -> None:
    """Put the adapter that `spec` and `values` describe in the place of adapter `name`, whose rank and layers bound it.

    What is active stays active. Raises CheckpointError with all that does not fit before a value is written.
    """
    if is_merged(model):
        raise StateError(f"{name!r} cannot change while adapters are merged", fix="unmerge(model) first")
    problems, copies = _plan(model, name, spec, values)
    if problems:
        raise CheckpointError(
            f"this adapter does not fit into the place of {name!r}",
            problems=sorted(problems),
            fix="attach one of its kind, with all its layers and at least its rank, or load it under a name of its own",
        )
    active = active_of(model)
    active.change(active.names, active.mix)  # refused while a checkpointed forward waits; forgets what was stacked
    with torch.no_grad():
        for copy in copies:
            _write(*copy)


def misfits(model: nn.Module, name: str, spec: LoRA, values: Values) -> list[str]:
    """All that keeps an adapter out of the place of `name`; empty if it fits."""
    return sorted(_plan(model, name, spec, values)[0])


def _plan(model: nn.Module, name: str, spec: LoRA, values: Values) -> tuple[list[str], list[Copy]]:
    own, room = tensors(model, name), spec_of(model, name)
    layers = sites(model, name)
    problems = [f"{site}: there is no room for its {key!r}" for site, key in values.keys() - own.keys()]
    brought = {site for site, _ in values}
    factors: dict[str, float] = {}
    for site in brought & layers.keys():
        adapter = adapter_of(layers[site], name)
        problems += [f"{site}: {problem}" for problem in _other_kind(room.at(site), spec.at(site))]
        factors[site] = spec.at(site).scale / adapter.delta.scale if adapter.delta is not None else 1.0
    copies = []
    for (site, key), target in own.items():
        adapter = adapter_of(layers[site], name) if site in layers else None
        copy = _copy(adapter, key, target, values.get((site, key)), factors.get(site, 1.0), site in brought)
        if isinstance(copy, str):
            problems.append(f"{site}: {copy}")
        else:
            copies.append(copy)
    return problems, copies


def _other_kind(room: LoRA, spec: LoRA) -> Iterator[str]:
    for field in ("delta", "combine", "options"):
        here, new = getattr(room, field), getattr(spec, field)
        if here != new:
            yield f"its {field} is {new!r}, and there is room for {here!r}"


def _copy(
    adapter: Adapter | None, key: str, target: Tensor, value: Tensor | None, factor: float, brought: bool
) -> Copy | str:
    """How one tensor gets its new value, or what is against it."""
    pads = adapter is not None and _pads(adapter)
    if value is None:
        plain = key == "bias" or (pads and not brought and adapter is not None and isinstance(adapter.combine, Add))
        return Copy(target, None) if plain else f"the new adapter has no {key!r}"
    if torch.promote_types(target.dtype, value.dtype) != target.dtype:
        return f"{key!r} is {value.dtype} and would be rounded to {target.dtype}"
    if pads and key in ("A", "B"):
        fits = _rank(key, value) <= _rank(key, target) and _rest(key, value) == _rest(key, target)
        return Copy(target, value, factor if key == "B" else 1.0) if fits else _too_large(key, value, target)
    if value.shape != target.shape:
        return _too_large(key, value, target)
    if factor != 1.0 and not pads:
        return f"its scale is {factor:g} times the one there is room for"
    return Copy(target, value)


def _pads(adapter: Adapter) -> bool:
    """Whether zeros behind A and B change nothing: for two free factors."""
    return isinstance(adapter.delta, Lora) and not adapter.delta.shifted


def _rank(key: str, t: Tensor) -> int:
    return t.shape[-2 if key == "A" else -1]


def _rest(key: str, t: Tensor) -> tuple[int, ...]:
    return (*t.shape[:-2], t.shape[-1 if key == "A" else -2])


def _too_large(key: str, value: Tensor, target: Tensor) -> str:
    return f"{key!r} is {tuple(value.shape)}, and there is room for {tuple(target.shape)}"


def _write(target: Tensor, source: Tensor | None, factor: float) -> None:
    if source is None:
        target.zero_()
        return
    inner = target[tuple(slice(n) for n in source.shape)]
    if inner.shape != target.shape:
        target.zero_()
    inner.copy_(source, non_blocking=True)
    if factor != 1.0:
        inner.mul_(factor)
