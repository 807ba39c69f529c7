"""P6: adapters add up as changes of the weight.

    {"a": 1.0}                      is a
    {"a": 0.75, "copy of a": 0.25}  is a; a weight that is squared, or lost, shows here
    {"a": 0.75, "b": -0.25}         is the one LoRA [A_a; A_b], [0.75 s B_a, -0.25 s B_b] of rank 2r   (plain LoRA only)

b is a with its A upside down: another change of the same size. Quarters, because they are exact in every type. Mixing A
and B separately, which is what some tools call a weighted sum, fails the last two.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veneer.core.combine import Add
from veneer.core.delta import Lora
from veneer.core.model import activate, adapter_of, attach, put, sites, spec_of, tensors
from veneer.core.spec import LoRA
from veneer.prove.answers import Subject, gap, limit
from veneer.prove.found import spare
from veneer.prove.proof import Check

__all__ = ["adds_up"]

TITLE = "Mixing"


def adds_up(subject: Subject) -> Check:
    model, name = subject.model, subject.name
    apart: dict[str, float] = {}
    activate(model, {name: 1.0})
    apart["weight 1"] = gap(subject.now(), subject.adapted)
    with spare(model, "twin") as twin:
        _copy(model, name, twin)
        activate(model, {name: 0.75, twin: 0.25})
        apart["shares of it"] = gap(subject.now(), subject.adapted)
        if _is_plain_lora(model, name):
            apart["sum of two"] = _sum_and_pair(subject, twin)
    allowed = limit(subject.adapted)
    wrong = {which: by for which, by in apart.items() if not by <= allowed}
    worst = max(apart.values())
    said = f"One adapter with weight 1 is itself, and sums are sums of dW (largest difference {worst:.2g})."
    if wrong:
        told = ", ".join(f"{which} is off by {by:.3g}" for which, by in wrong.items())
        said = f"Adapters do not add up: {told}; {allowed:.2g} is allowed."
    return Check("P6", TITLE, not wrong, said, {"largest_difference": worst, "allowed": allowed, "differences": apart})


def _copy(model: nn.Module, name: str, twin: str) -> None:
    attach(model, spec_of(model, name), twin, trainable=False)
    put(model, twin, tensors(model, name))


def _is_plain_lora(model: nn.Module, name: str) -> bool:
    held = [adapter_of(layer, name) for layer in sites(model, name).values()]
    whole = any(leaf.startswith("saved.") for _, leaf in tensors(model, name))
    plain = all(type(a.delta) is Lora and type(a.combine) is Add and a.bias is None for a in held)
    return plain and bool(held) and not whole


def _sum_and_pair(subject: Subject, twin: str) -> float:
    """The difference between {name: 0.75, twin: -0.25} and the one adapter that is their sum."""
    model, name = subject.model, subject.name
    for layer in sites(model, twin).values():
        delta = adapter_of(layer, twin).delta
        delta.A.data = delta.A.data.flip(-2)  # type: ignore[union-attr]
    activate(model, {name: 0.75, twin: -0.25})
    mixed = subject.now()
    with spare(model, "pair") as pair:
        attach(model, _pair_spec(model, name), pair, init=False, trainable=False)
        put(model, pair, _pair_values(model, {name: 0.75, twin: -0.25}))
        activate(model, pair)
        return gap(subject.now(), mixed)


def _pair_spec(model: nn.Module, name: str) -> LoRA:
    """A spec for the joined pairs: the same layers, whatever rank each pair has, scale 1."""
    ranks = {site: len(adapter_of(layer, name).delta.factors()[0]) * 2 for site, layer in sites(model, name).items()}  # type: ignore[union-attr]
    exact = {re.escape(site): {"rank": rank, "alpha": float(rank)} for site, rank in ranks.items()}
    return dataclasses.replace(
        spec_of(model, name), targets="|".join(exact), exclude=(), layers=None, overrides=exact, init="kaiming",
        scaling="lora", dropout=0.0,
    )  # fmt: skip


def _pair_values(model: nn.Module, weights: Mapping[str, float]) -> dict[tuple[str, str], Tensor]:
    found = {}
    for site in sites(model, next(iter(weights))):
        deltas = [(adapter_of(model.get_submodule(site), name).delta, w) for name, w in weights.items()]
        factors = [(*delta.factors(), delta.scale * w) for delta, w in deltas]  # type: ignore[union-attr]
        found[site, "A"] = torch.cat([a for a, _, _ in factors], -2).detach()
        found[site, "B"] = torch.cat([b * scale for _, b, scale in factors], -1).detach()
    return found
