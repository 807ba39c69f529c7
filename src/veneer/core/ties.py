"""Layers that share one weight: an embedding and its head; and token rows, where this matters most.

one is a target, the other is not    what `LoRA.tied` says
  "refuse"     an error: the adapter would act on one side of a weight that is one, and could not be merged
  "together"   the other one mirrors the change (transposed where it reads the weight so); merging writes it once
  "apart"      the other one keeps the base's weight; merging needs untie=True
both are targets                     two adapters of their own, or one with "together"
rows of a table are trained          always together: a new token must be read and said with the same row
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from veneer.core.host import Whole, plain_modules
from veneer.core.leaf import own_parameters
from veneer.core.op import is_turned, op_for, op_of
from veneer.core.select import ends_with, near_names, places
from veneer.core.spec import LoRA
from veneer.errors import TargetError

__all__ = ["Follower", "followers", "select_tokens", "tied_groups"]


class Follower(NamedTuple):
    """A layer that shows the change of another one."""

    layer: nn.Module
    source: str
    turned: bool


def select_tokens(model: nn.Module, spec: LoRA) -> dict[str, tuple[nn.Module, LoRA]]:
    """The tables of which `spec` trains single rows, by name, each with what holds for it."""
    if not spec.token_rows:
        return {}
    if isinstance(spec.token_rows, Mapping):
        named = {n: rows for ending, rows in spec.token_rows.items() for n in _tables(model, ending)}
    else:
        named = {_input_embedding(model): spec.token_rows}
    modules = plain_modules(model)
    return {name: (modules[name], _token_spec(spec, rows)) for name, rows in named.items()}


def _token_spec(spec: LoRA, rows: object) -> LoRA:
    plain = {"combine": "add", "init": "kaiming", "scaling": "lora", "dropout": 0.0, "overrides": {}}
    return dataclasses.replace(spec, delta="tokens", options={"rows": rows}, **plain)  # type: ignore[arg-type]


def _tables(model: nn.Module, ending: str) -> list[str]:
    found = {n: m for n, m in plain_modules(model).items() if op_for(type(m)) is not None}
    matches = [n for n, m in found.items() if ends_with(n, ending) and isinstance(m, nn.Embedding | nn.Linear)]
    if not matches:
        raise TargetError(f"token_rows {ending!r} matches no embedding and no linear layer.{near_names(ending, found)}")
    return matches


def _input_embedding(model: nn.Module) -> str:
    """The table that turns tokens into vectors: as the model says, or the only one there is."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        said = get() if callable(get) else None
    except NotImplementedError:
        said = None
    tables = {n: m for n, m in plain_modules(model).items() if isinstance(m, nn.Embedding)}
    found = [n for n, m in tables.items() if m is said] or list(tables)
    if len(found) != 1:
        raise TargetError(
            f"which of {len(found)} embeddings has the rows of the tokens is not known",
            where=type(model).__name__,
            fix="token_rows={'name of the embedding': [rows]}",
            problems=found[:8],
        )
    return found[0]


def followers(
    model: nn.Module, layers: Mapping[str, nn.Module], specs: Mapping[str, LoRA], whole: Mapping[str, nn.Module]
) -> dict[str, Follower]:
    """The layers that are to show another one's change. Raises TargetError for ties that the specs leave open."""
    found: dict[str, Follower] = {}
    problems: list[str] = []
    for group in tied_groups(model):
        mine = [n for n in group if n in layers]
        if not mine:
            continue
        source = next((n for n in mine if specs[n].delta == "tokens"), mine[0])
        rest = [n for n in group if n != source]
        how = "together" if specs[source].delta == "tokens" else specs[source].tied
        if how == "apart" or (how == "refuse" and len(mine) == len(group)):
            continue
        problems += _against(source, rest, how, group, specs, whole)
        op = op_of(layers[source])
        found |= {n: Follower(group[n], source, is_turned(op, op_of(group[n]))) for n in rest}
    if problems:
        raise TargetError("weights that several layers share cannot be adapted so", problems=problems)
    return found


def tied_groups(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """The layers that hold the same parameter, in the model's order."""
    by_weight: dict[int, dict[str, nn.Module]] = {}
    for name, layer in places(model).items():
        if (weight := own_parameters(layer).get("weight")) is not None:
            by_weight.setdefault(id(weight), {})[name] = layer
    return (group for group in by_weight.values() if len(group) > 1)


def _against(
    source: str,
    rest: list[str],
    how: str,
    group: Mapping[str, nn.Module],
    specs: Mapping[str, LoRA],
    whole: Mapping[str, nn.Module],
) -> Iterator[str]:
    own, shown = specs[source], " and ".join(rest)
    if how == "refuse":
        yield (
            f"{source} shares its weight with {shown}, which is no target: say tied='together' (one change for both) "
            "or tied='apart' (the other stays as it is; merging needs untie=True)"
        )
    elif own.combine != "add":
        yield f"{source}: combine {own.combine!r} scales rows, which are columns of {shown}; tied='together' needs add"
    for name in rest:
        if name in specs and (specs[name].delta, specs[name].options) != (own.delta, own.options):
            yield f"{name} shares its weight with {source} but is to have an adapter of another kind; leave one out"
        if name in whole or isinstance(group[name], Whole):
            yield f"{name} is trained whole, so it cannot follow {source}, whose weight it shares"
