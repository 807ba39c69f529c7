"""The names in a file and the names in a model, and how to get from one to the other.

A file may have been written for the body of a model and be read for the whole, or for an older version of transformers
that called the same layers something else. The ways to rename are few and known; the one that explains the most of the
file is taken, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from veneer.ckpt.layout import NESTED, parse_key
from veneer.ckpt.tensorfile import Stored, TensorFile
from veneer.core.op import op_for
from veneer.errors import CheckpointError

__all__ = ["Found", "Renaming", "best_renaming", "renamed", "renamed_in", "renamings", "sort_keys"]


@dataclass
class Found:
    """The contents of a file by what they belong to, under the file's own module names."""

    adapted: dict[str, dict[str, Stored]] = field(default_factory=dict)  # module -> A, B, magnitude, B.bias
    plain: dict[str, Stored] = field(default_factory=dict)  # full parameter name: saved modules, biases
    base: dict[str, Stored] = field(default_factory=dict)  # parameters of an adapted layer's base
    shared: dict[str, Stored] = field(default_factory=dict)  # what all layers have in common (VeRA's A and B)


def sort_keys(file: TensorFile, name: str) -> Found:
    """Read the keys. Files of old versions may hold several adapters, told apart by the name in the key."""
    keys = {stored.name: parse_key(stored.name) for stored in file}
    inside = {key.adapter for key in keys.values() if key is not None and key.adapter is not None}
    if len(inside) > 1 and name not in inside:
        raise CheckpointError(
            f"The file holds several adapters and none is called {name!r}.",
            str(file.path),
            f"load(..., name=) one of: {', '.join(sorted(inside))}",
        )
    found = Found()
    for stored in file:
        key = keys[stored.name]
        if key is None or (len(inside) > 1 and key.adapter not in (None, name)):
            continue
        kind, _, parameter = key.field.partition(".")
        if kind == "":
            found.plain[key.module] = stored
        elif kind == "saved":
            found.plain[f"{key.module}.{parameter}"] = stored
        elif kind == "shared":
            found.shared[parameter] = stored
        elif kind == "base":
            found.base[f"{key.module}.{parameter}"] = stored
        else:
            found.adapted.setdefault(key.module, {})[key.field] = stored
    return found


class Renaming(NamedTuple):
    """A way to turn the file's names into the model's, and back."""

    forward: Callable[[str], str]
    backward: Callable[[str], str]
    note: str = ""


SAME = Renaming(lambda name: name, lambda name: name)


def renamings(model: nn.Module) -> Iterator[Renaming]:
    """Names as they are; with the base model's prefix added or taken away; as transformers renames old checkpoints."""
    yield SAME
    prefix = getattr(model, "base_model_prefix", "") or "model"
    for p in dict.fromkeys((f"{prefix}.", "model.")):
        yield Renaming(lambda n, p=p: p + n, lambda n, p=p: n.removeprefix(p), f"{p!r} was put before the file's names")
        yield Renaming(lambda n, p=p: n.removeprefix(p), lambda n, p=p: p + n, f"{p!r} was cut off the file's names")
    yield from _transformers_renaming(model)


def _transformers_renaming(model: nn.Module) -> Iterator[Renaming]:
    """Newer versions of transformers moved layers of some models; they know how, and so it is left to them."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # a version without such a table has renamed nothing
        return
    table: Any = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    rules = [rule for rule in table if isinstance(rule, WeightRenaming)]

    def forward(name: str) -> str:
        return rename_source_key(f"{name}.weight", rules, [])[0].removesuffix(".weight")

    if rules:
        yield Renaming(forward, lambda name: name, "the file's names were brought up to date by transformers' table")


def best_renaming(
    model: nn.Module, modules: Mapping[str, nn.Module], found: Found, file: TensorFile
) -> tuple[Renaming, list[str]]:
    """The renaming under which the file's layers are the model's; raises if none makes a single one match."""
    names = list(found.adapted) or [full.rpartition(".")[0] for full in found.plain]
    best, most = SAME, 0
    for renaming in renamings(model):
        matches = sum(renaming.forward(name.removesuffix(NESTED * name.count(NESTED))) in modules for name in names)
        if matches > most:
            best, most = renaming, matches
        if most == len(names) and names:
            break
    if not most:
        here = [n for n, m in modules.items() if op_for(type(m)) is not None]
        raise CheckpointError(
            f"None of the {len(file)} tensors in the file belongs to this model, so nothing would be adapted.",
            str(file.path),
            f"load the base that it was made for. In the file: {_some(names or [s.name for s in file])}; "
            f"here: {_some(here)}",
        )
    return best, [best.note] if best.note else []


def renamed(found: Found, forward: Callable[[str], str]) -> Found:
    return Found(
        {forward(site): fields for site, fields in found.adapted.items()},
        {renamed_in(full, forward): stored for full, stored in found.plain.items()},
        {renamed_in(full, forward): stored for full, stored in found.base.items()},
        found.shared,
    )


def renamed_in(full: str, rename: Callable[[str], str]) -> str:
    """A tensor's full name with its module renamed."""
    module, _, leaf = full.rpartition(".")
    return f"{rename(module)}.{leaf}" if module else full


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "") if names else "nothing"
