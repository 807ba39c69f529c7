"""What a merge on disk will do to every tensor, known and checked before the first byte is written.

For each parameter of the model: where it lies in the base's files, and what the adapters do to it - low-rank changes,
whole values, biases. What cannot be done (a weight that another layer shares, one that is quantised, one that the files
hold in another form) is refused here, with all of it at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.ckpt.base import base_of
from veneer.ckpt.config import CONFIG, RECOMPUTED, parse, read_config
from veneer.ckpt.fit import Fit, fit
from veneer.ckpt.hub import WEIGHTS
from veneer.ckpt.methods import built, drawn
from veneer.ckpt.names import renamed_in
from veneer.ckpt.origin import best_places
from veneer.ckpt.peft import check_base, refuse_broken
from veneer.ckpt.rows import Change
from veneer.ckpt.shards import Shards, model_folder
from veneer.ckpt.tensorfile import Stored, TensorFile
from veneer.core.init import INITS, Site
from veneer.core.leaf import Leaf
from veneer.core.op import op_of
from veneer.errors import CheckpointError

__all__ = ["FLOATS", "Edit", "Item", "Plan", "originals"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what can be merged into


def originals(where: str | os.PathLike[str], model: nn.Module) -> Callable[[str], Tensor]:
    """The weight of a layer, by the layer's name, as the files of `model` hold it; read when it is asked for."""
    plan = Plan(model_folder(where), model, untie=False)

    def read(site: str) -> Tensor:
        stored = plan.place.get(f"{site}.weight")
        if stored is None or stored.dtype not in FLOATS:
            held = "no weight" if stored is None else f"a weight in {stored.dtype}"
            problem = f"the base's files hold {held} of {site}, so it is not known what packing has lost"
            raise CheckpointError(problem, str(plan.folder), "name the model before it was packed")
        return stored.load()

    return read


@dataclass
class Edit:
    """All that happens to one parameter."""

    deltas: list[tuple[Fit, str, float]] = field(default_factory=list)  # low rank, for the site so called
    whole: list[tuple[Tensor, float]] = field(default_factory=list)  # base + weight * (theirs - base)
    added: list[tuple[Tensor, float]] = field(default_factory=list)  # base + weight * theirs


@dataclass
class Item:
    """One tensor of the result."""

    name: str  # in the files
    parameter: str  # in the model
    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: Stored | None  # None for what only the adapter has

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Plan:
    """What will become of every tensor, known and checked before the first byte is written."""

    def __init__(self, folder: Path, skeleton: nn.Module, untie: bool) -> None:
        self.folder, self.skeleton, self.untie = folder, skeleton, untie
        self.shards = Shards(folder)
        self.parameters = dict(skeleton.named_parameters(remove_duplicate=False))
        self.notes: list[str] = []
        self.edits: dict[str, Edit] = {}
        self.adapters: list[TensorFile] = []
        self.renaming, self.place = best_places(skeleton, self.parameters, self.shards)
        self.notes += [f"{folder}: {self.renaming.note}"] if self.renaming.note else []
        self.untied: dict[str, Stored] = {}  # parameters that get a weight of their own, and where its values are

    def add(self, path: Path, weight: float, *, allow_other_base: bool, allow_nan: bool) -> None:
        """Check one adapter against the base, and note what it changes."""
        parsed, file = parse(read_config(path / CONFIG), str(path / CONFIG)), TensorFile(path / WEIGHTS)
        self.notes += check_base(base_of(self.skeleton, self._read), parsed, file, allow_other_base)[1]
        fitted = fit(self.skeleton, parsed, file, "default", read=self._read)
        self.adapters.append(file)
        if not allow_nan:
            refuse_broken(fitted.values, str(file.path))
        self.notes += [f"{path}: {note}" for note in fitted.notes]
        for site, host in fitted.hosts.items():
            self._edit(site if isinstance(host, Leaf) else f"{site}.weight").deltas.append((fitted, site, weight))
        for (site, key), value in fitted.values.items():
            if key.startswith("saved."):
                self._edit(f"{site}.{key.removeprefix('saved.')}").whole.append((value, weight))
        for site, value in fitted.biases.items():
            self._edit(f"{site}.bias").whole.append((value, weight))
        for site, value in fitted.bias_changes.items():
            self._edit(f"{site}.bias").added.append((value, weight))

    def _read(self, parameter: str) -> Tensor | None:
        return self.place[parameter].load() if parameter in self.place else None

    def _edit(self, parameter: str) -> Edit:
        return self.edits.setdefault(parameter, Edit())

    def layout(self, dtype: torch.dtype | None, max_shard_size: int | None) -> list[list[Item]]:
        """The tensors of each shard in the order in which they will be written."""
        self._resolve_ties()
        self._check()
        shards: list[list[Item]] = [[] for _ in self.shards.files]
        index = {file.path: i for i, file in enumerate(self.shards.files)}
        for parameter, stored in self.place.items():
            shards[index[stored.file.path]].append(self._item(stored.name, parameter, stored, dtype))
        for parameter in {**self.untied, **self.edits}:
            if parameter not in self.place:
                name = renamed_in(parameter, self.renaming.backward)
                shards[-1].append(self._item(name, parameter, self.untied.get(parameter), dtype))
        return shards if max_shard_size is None else _redivide([i for s in shards for i in s], max_shard_size)

    def _item(self, name: str, parameter: str, stored: Stored | None, dtype: torch.dtype | None) -> Item:
        own = stored.dtype if stored is not None else next(s.dtype for _, s in self.shards if s.dtype in FLOATS)
        shape = stored.shape if stored is not None else tuple(self.edits[parameter].whole[0][0].shape)
        return Item(name, parameter, dtype if dtype is not None and own in FLOATS else own, shape, stored)

    def _resolve_ties(self) -> None:
        """A weight that two layers share can only change for both; `untie` gives each its own."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            names.setdefault(id(parameter), []).append(name)
        shared = [group for group in names.values() if len(group) > 1 and any(self._is_own(name) for name in group)]
        if shared and not self.untie:
            raise CheckpointError(
                "An adapter changes a weight that another layer shares (tied embeddings).",
                str(self.folder),
                "untie=True gives each layer its own weight; the model grows by one",
                [" = ".join(group) for group in shared],
            )
        for group in shared:
            source = next((self.place[name] for name in group if name in self.place), None)
            self.untied |= {name: source for name in group if source is not None and name not in self.place}

    def _is_own(self, parameter: str) -> bool:
        """Whether an edit is meant for this layer and not for those that share its weight, as trained tokens are."""
        edit = self.edits.get(parameter, Edit())
        tokens = all(fitted.at(site).delta == "tokens" for fitted, site, _ in edit.deltas)
        return bool(edit.whole or edit.added or not tokens)

    def _check(self) -> None:
        problems = []
        for parameter, edit in self.edits.items():
            stored = self.place.get(parameter, self.untied.get(parameter))
            if stored is None:
                if edit.deltas or edit.added or sum(w for _, w in edit.whole) != 1:
                    problems.append(f"{parameter}: not in the files as one tensor; merge() in memory can do it")
            elif stored.dtype not in FLOATS and edit.deltas:
                problems.append(f"{parameter}: packed, as {stored.dtype}")
            elif parameter in self.parameters and tuple(self.parameters[parameter].shape) != stored.shape:
                shape = list(self.parameters[parameter].shape)
                problems.append(f"{parameter}: {list(stored.shape)} in the files, {shape} by config.json")
        if problems:
            packed = any(": packed, as" in problem for problem in problems)
            fix = "name the folder of the unpacked weights: base=, or --base on the command line" if packed else None
            raise CheckpointError("These weights cannot be merged into.", str(self.folder), fix, problems)

    def changes(self, parameter: str, stored: Stored, expert: int | None = None) -> list[Change]:
        """The low-rank changes of a stored matrix: of a whole tensor, or of one expert's slice of a stack."""
        deltas = self.edits[parameter].deltas
        return [_change(fitted, site, weight, stored, expert) for fitted, site, weight in deltas]


def _change(fitted: Fit, site: str, weight: float, stored: Stored, expert: int | None) -> Change:
    """The factors in the orientation of the stored matrix (see rows.py)."""
    host, spec = fitted.hosts[site], fitted.at(site)
    parts = _factors(fitted, site)
    if expert is not None:
        parts = {key: value[expert] for key, value in parts.items()}
    a, b, magnitude = parts["A"], parts["B"], parts.get("magnitude")
    if spec.init in RECOMPUTED:
        a0, b0 = _start(site, host, spec.init, spec.rank, spec.scale, stored)
        a, b = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
    if _is_transposed(host, stored.shape):
        return Change((spec.scale * a.T).contiguous(), b.T.contiguous(), weight, magnitude, transposed=True)
    return Change(spec.scale * b, a, weight, magnitude)


def _factors(fitted: Fit, site: str) -> dict[str, Tensor]:
    """A, B and perhaps magnitude. Another kind of delta than LoRA's says itself what product of two factors it is."""
    held = {key: value.float() for (owner, key), value in fitted.values.items() if owner == site}
    spec = fitted.at(site)
    if spec.delta == "lora":
        return {key: held[key] for key in ("A", "B", "magnitude") if key in held}
    delta: Any = built(site, fitted.hosts[site], spec, "cpu")
    delta.load_state_dict(held, strict=False)
    if spec.delta == "vera":
        fitted.shared = fitted.shared or drawn(fitted.hosts, fitted.spec)
        delta.project(fitted.shared["A"], fitted.shared["B"])
    a, b = (factor.detach() for factor in delta.factors())
    return {"A": a, "B": b * (delta.scale / spec.scale)}


def _is_transposed(host: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether the layer's matrix is the stored tensor turned over."""
    flat = torch.empty(shape, device="meta").flatten(1)
    matrix = op_of(host).to_matrix(host, torch.empty(shape, device="meta"))
    return (matrix.shape, matrix.stride()) != (flat.shape, flat.stride())


def _start(site: str, host: Any, init: str, rank: int, scale: float, stored: Stored) -> tuple[Tensor, Tensor]:
    """What PiSSA or OLoRA took out of this very base: its own init, run on the stored weight."""
    values = {"weight": nn.Parameter(stored.load(), requires_grad=False)}
    held, host._parameters = host._parameters, {**host._parameters, **values}
    try:
        start = INITS[init](Site(site, host, op_of(host), rank, scale, torch.float32, torch.device("cpu")))
    finally:
        host._parameters = held
        stored.forget()
    return start.a, start.b


def _redivide(items: list[Item], limit: int) -> list[list[Item]]:
    """The same order in shards of at most `limit` bytes (a larger tensor has one to itself)."""
    shards: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.bytes
    return shards
