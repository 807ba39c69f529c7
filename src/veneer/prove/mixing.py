"""P6: adapters add up as changes of the weight.

    {"a": 1.0}                      is a
    {"a": 0.75, "copy of a": 0.25}  is a; a weight that is squared, or lost, shows here
    {"a": 0.75, "b": -0.25}         is the one LoRA [A_a; A_b], [0.75 s B_a, -0.25 s B_b] of rank 2r   (plain LoRA only)

b is a with its A upside down: another change of the same size. Quarters, because they are exact in every type. The pair
is made by `combine(..., method="cat")`, so that is proved as well. Mixing A and B separately, which is what some tools
call a weighted sum, fails the last two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer.core.combine import Add
from veneer.core.delta import DenseDelta
from veneer.core.mixing import combine
from veneer.core.model import activate, adapter_of, attach, put, sites, spec_of, tensors
from veneer.prove.answers import Subject, gap, limit
from veneer.prove.found import spare
from veneer.prove.proof import Check

__all__ = ["adds_up"]

TITLE = "Mixing"
UNTRAINED = {"sum of two": 10}  # nobody trained this one: it may amplify rounding more than the adapter does


def adds_up(subject: Subject) -> Check:
    model, name = subject.model, subject.name
    apart: dict[str, float] = {}
    activate(model, {name: 1.0})
    apart["weight 1"] = gap(subject.now(), subject.adapted)
    with spare(model, "twin") as twin:
        _copy(model, name, twin)
        activate(model, {name: 0.75, twin: 0.25})
        apart["shares of it"] = gap(subject.now(), subject.adapted)
        if _is_thin(model, name):
            apart["sum of two"] = _sum_and_pair(subject, twin)
    allowed = limit(subject.adapted)
    wrong = {which: by for which, by in apart.items() if not by <= allowed * UNTRAINED.get(which, 1)}
    worst = max(apart.values())
    said = f"One adapter with weight 1 is itself, and sums are sums of dW (largest difference {worst:.2g})."
    if wrong:
        told = ", ".join(f"{which} is off by {by:.3g}" for which, by in wrong.items())
        said = f"Adapters do not add up: {told}; {allowed:.2g} is allowed."
    return Check(
        "P6", TITLE, not wrong, said, {"largest_difference": worst, "allowed": allowed, "differences": apart}
    )  # fmt: skip


def _is_thin(model: nn.Module, name: str) -> bool:
    """Whether every dW is a product of thin factors that is simply added."""
    held = [adapter_of(layer, name) for layer in sites(model, name).values()]
    held = [adapter for adapter in held if adapter.delta is not None]
    return all(isinstance(a.combine, Add) and not isinstance(a.delta, DenseDelta) for a in held)


def _copy(model: nn.Module, name: str, twin: str) -> None:
    """The same adapter again; a thin one as the plain LoRA it amounts to, so that no costly init is run for it."""
    if _is_thin(model, name):
        combine(model, {name: 1.0}, twin, "cat")
    else:
        attach(model, spec_of(model, name), twin, init=False, trainable=False)  # a costly init need not run again
        put(model, twin, tensors(model, name))


def _sum_and_pair(subject: Subject, twin: str) -> float:
    """The difference between {name: 0.75, twin: -0.25} and the one adapter that is their sum."""
    model = subject.model
    for layer in sites(model, twin).values():
        if (delta := adapter_of(layer, twin).delta) is not None:
            _turn_over(delta)
    weights = {subject.name: 0.75, twin: -0.25}
    activate(model, weights)
    mixed = subject.now()
    with spare(model, "pair") as pair:
        combine(model, weights, pair, "cat")
        activate(model, pair)
        return gap(subject.now(), mixed)


def _turn_over(delta: Any) -> None:
    """Another dW of the same size: A upside down."""
    size = delta.norm()
    delta.A.data = delta.A.data.flip(-2)
    delta.B.data *= size / max(delta.norm(), torch.finfo(delta.B.dtype).tiny)
