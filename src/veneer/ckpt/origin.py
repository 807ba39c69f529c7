"""Where the numbers of a model's tensors lie in the model's files, without asking whoever loaded them.

Most tensors are one tensor of the files, under the same name or a known other one. Some are several: transformers keeps
the experts of a mixture as one stack, whose matrices most files hold one by one, and fused projections that files hold
apart, or the other way round. In memory the pieces follow each other, so an origin is a list of runs of numbers:

    (E, gate and up, in)     expert 0's gate, expert 0's up, expert 1's gate, ...
    (q, k and v, in)         q, k, v
    (q, in) of a fused one   the first third of one tensor

Names come from transformers' own table where the model is one of its kind; from it nothing else is taken. What it makes
in any other way (turned over, interleaved) has no origin here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.ckpt.names import Renaming, renamed_in, renamings
from veneer.ckpt.shards import Shards
from veneer.ckpt.tensorfile import Stored

__all__ = ["Filed", "Origin", "best_places", "filed"]

APART, BESIDE, CUT = ("MergeModulelist",), ("Concatenate",), ("Chunk",)  # what transformers calls it


@dataclass(frozen=True)
class Piece:
    """`count` numbers of a stored tensor, from number `first` on."""

    stored: Stored
    first: int
    count: int


@dataclass(frozen=True)
class Origin:
    """The runs of numbers that, one after the other, are a tensor."""

    pieces: tuple[Piece, ...]

    @property
    def count(self) -> int:
        return sum(piece.count for piece in self.pieces)

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {piece.stored.dtype for piece in self.pieces}

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the one stored tensor that this is; None where there is no such one."""
        only = self.pieces[0]
        return only.stored.shape if len(self.pieces) == 1 and only.count == _count(only.stored) else None

    def starts(self, width: int) -> list[int]:
        """The rows of `width` numbers with which the pieces begin."""
        found, row = [], 0
        for piece in self.pieces:
            found.append(row)
            row += piece.count // width
        return found

    def rows(self, index: Sequence[int], width: int) -> Tensor:
        """Some rows of the matrix with `width` numbers in each, read anew from the disk; (rows, width)."""
        found = torch.empty(len(index), width, dtype=self.pieces[0].stored.dtype)
        for row, into in zip(index, found, strict=True):
            at = row * width
            for piece in self.pieces:
                if at < piece.count:
                    piece.stored.read(into, piece.first + at)
                    break
                at -= piece.count
        return found


class Filed(NamedTuple):
    """What the files of a model hold of it."""

    origins: dict[str, Origin]
    remade: set[str]  # tensors that transformers makes of the files' in a way that is not known here
    unused: list[str]  # tensors of the files that have no place in the model


def filed(model: nn.Module, names: Collection[str], shards: Shards) -> Filed:
    """Where each of these tensors of the model lies."""
    found = _by_table(model, names, shards)
    if found is None:
        places = best_places(model, names, shards)[1]
        found = {name: Origin((_all(stored),)) for name, stored in places.items() if name in names}, {}
    origins, remade = found
    used = {piece.stored.name for origin in origins.values() for piece in origin.pieces}
    used |= {name for sources in remade.values() for name in sources}
    return Filed(origins, set(remade), [name for name, _ in shards if name not in used])


def best_places(model: nn.Module, names: Collection[str], shards: Shards) -> tuple[Renaming, dict[str, Stored]]:
    """The model's names of what is in the files, under the renaming that explains most of `names`."""
    wanted, best = set(names), None
    for renaming in renamings(model):
        places = {renamed_in(name, renaming.forward): stored for name, stored in shards}
        if best is None or len(places.keys() & wanted) > len(best[1].keys() & wanted):
            best = renaming, places
        if best[1].keys() >= wanted:
            break
    assert best is not None
    return best


def _all(stored: Stored) -> Piece:
    return Piece(stored, 0, _count(stored))


def _count(stored: Stored) -> int:
    return stored.bytes // stored.dtype.itemsize


# --- by transformers' table ------------------------------------------------------------------------------------------


def _by_table(
    model: nn.Module, names: Collection[str], shards: Shards
) -> tuple[dict[str, Origin], dict[str, set[str]]] | None:
    """Where tensors lie, and from what the others are made; None where there is no table."""
    if not hasattr(getattr(model, "config", None), "model_type") or not hasattr(model, "base_model_prefix"):
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    table: Any = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    rules = [rule for rule in table if isinstance(rule, WeightRenaming)]
    builders = [rule for rule in table if isinstance(rule, WeightConverter)]
    known: Any = dict.fromkeys(names, True)
    found: dict[str, Origin] = {}
    made: dict[str, tuple[Any, dict[str, list[Stored]]]] = {}  # by the first of what a builder makes
    for name, stored in sorted(shards, key=lambda each: _in_order(each[0])):
        target, source = rename_source_key(name, rules, builders, model.base_model_prefix, known)  # type: ignore[arg-type]
        if source is None:
            found[target] = Origin((_all(stored),))
            continue
        builder = next(rule for rule in builders if source in rule.source_patterns)
        made.setdefault(target, (builder, {}))[1].setdefault(source, []).append(stored)
    remade: dict[str, set[str]] = {}
    for first, (builder, sources) in made.items():
        targets = [first.replace(builder.target_patterns[0], other) for other in builder.target_patterns]
        built = _built(targets, builder, sources)
        found |= built
        if not built:
            own = {stored.name for each in sources.values() for stored in each}
            remade |= dict.fromkeys(targets, own)
    kept = {name: origin for name, origin in found.items() if name in names}
    return kept, {name: sources for name, sources in remade.items() if name in names}


def _built(targets: Sequence[str], builder: Any, sources: Mapping[str, list[Stored]]) -> dict[str, Origin]:
    """What this builder makes of tensors of the files, where they only lie in another order; else nothing."""
    ways = tuple(type(step).__name__ for step in builder.operations)
    dims = [getattr(step, "dim", None) for step in builder.operations]
    lists = [sources[source] for source in builder.source_patterns if source in sources]
    if len(lists) != len(builder.source_patterns) or len({len(each) for each in lists}) != 1:
        return {}
    stacked = ways[:1] == APART and dims[0] == 0 and len(lists[0][0].shape) == 2
    if stacked and (len(lists) == 1 if ways == APART else ways == APART + BESIDE and dims[1] == 1):
        experts = range(len(lists[0]))
        return {targets[0]: Origin(tuple(_all(each[expert]) for expert in experts for each in lists))}
    if ways == BESIDE and dims == [0]:
        return {targets[0]: Origin(tuple(_all(each[0]) for each in lists))}
    if ways == CUT and dims == [0] and len(lists) == 1:
        stored = lists[0][0]
        count = _count(stored) // len(targets)
        return {name: Origin((Piece(stored, i * count, count),)) for i, name in enumerate(targets)}
    return {}


def _in_order(name: str) -> list[tuple[int, str | int]]:
    """Expert 10 comes after expert 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"\.", name)]
