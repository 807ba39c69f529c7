"""P6: adapters add up as changes of the weight.

    {"a": 1.0}                      is a
    {"a": 0.75, "copy of a": 0.25}  is a; a weight that is squared, or lost, shows here
    {"a": 0.75, "b": -0.25}         is the one LoRA [A_a; A_b], [0.75 s B_a, -0.25 s B_b] of rank 2r   (plain LoRA only)

b is a with its A upside down: another change of the same size. Quarters, because they are exact in every type. The pair
is made by `combine(..., method="cat")`, so that is proved as well. Mixing A and B separately, which is what some tools
call a weighted sum, fails the last two.

Logits tell as long as the model does not make more of a rounding than `limit` knows of. In a narrow type some do: what
two orders of a sum differ by in one layer may turn the answer of a late one (a 30-layer model in bf16 was off by 32 of
43). Then each layer is asked by itself, with the input that it gets: both sums must give it the same output, up to a
rounding and a tenth of what the adapter changes. A sum that is wrong is wrong in its layers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.core.combine import Add
from veneer.core.delta import DenseDelta
from veneer.core.mixing import combine
from veneer.core.model import activate, adapter_of, attach, disabled, put, sites, spec_of, tensors
from veneer.prove.answers import Subject, gap, limit
from veneer.prove.found import spare
from veneer.prove.proof import Check

__all__ = ["adds_up"]

TITLE = "Mixing"
UNTRAINED = {"sum of two": 10}  # nobody trained this one: it may amplify rounding more than the adapter does


NARROW = (torch.float16, torch.bfloat16)
SHARE = 0.1  # of what an adapter changes in a layer: far more than rounding it does, and less than any weight is off by
TELLING = 4  # roundings: a change that is no larger than these is lost among them

Weights = str | dict[str, float]  # a name alone is added inside its layer's product, and rounded otherwise


class Sum(NamedTuple):
    """One sum of adapters, held against what it is to be."""

    which: str
    apart: float  # the largest difference of two answers
    allowed: float
    layers: float | None = (
        None  # the largest difference in a layer, over what is allowed there; where logits cannot tell
    )

    @property
    def holds(self) -> bool:
        return self.apart <= self.allowed or (self.layers is not None and self.layers <= 1)


def adds_up(subject: Subject) -> Check:
    model, name = subject.model, subject.name
    sums = [_held(subject, "weight 1", {name: 1.0}, name)]
    with spare(model, "twin") as twin:
        _copy(model, name, twin)
        sums.append(_held(subject, "shares of it", {name: 0.75, twin: 0.25}, name))
        if _is_thin(model, name):
            sums.append(_sum_and_pair(subject, twin))
    apart = {each.which: each.apart for each in sums}
    wrong = [each for each in sums if not each.holds]
    by_layers = {each.which: each.layers for each in sums if each.layers is not None}
    allowed, worst = limit(subject.adapted), max(apart.values())
    said = f"One adapter with weight 1 is itself, and sums are sums of dW (largest difference {worst:.2g})."
    if by_layers:
        said += " This model makes much of a rounding, so layers were asked one by one."
    if wrong:
        told = ", ".join(f"{each.which} is off by {each.apart:.3g}" for each in wrong)
        said = f"Adapters do not add up: {told}; {allowed:.2g} is allowed."
    figures = {"largest_difference": worst, "allowed": allowed, "differences": apart, "layers": by_layers}
    return Check("P6", TITLE, not wrong, said, figures)


def _held(subject: Subject, which: str, these: Weights, those: Weights) -> Sum:
    """Whether the model answers the same with both."""
    activate(subject.model, these)
    mixed = subject.now()
    alone = subject.adapted
    if those != subject.name:
        activate(subject.model, those)
        alone = subject.now()
    apart, allowed = gap(mixed, alone), limit(subject.adapted) * UNTRAINED.get(which, 1)
    narrow = all(each.values.dtype in NARROW for each in subject.adapted)
    if apart <= allowed or not narrow:
        return Sum(which, apart, allowed)
    return Sum(which, apart, allowed, _layers_apart(subject, these, those))


@torch.no_grad()
def _layers_apart(subject: Subject, these: Weights, those: Weights) -> float:
    """The largest difference of a layer's output over what is allowed; infinite where a layer cannot be asked."""
    model, layers = subject.model, _layers(subject)
    activate(model, these)
    met = _met(subject, layers)
    if met.keys() != layers.keys():
        return math.inf
    found, tells = [], False
    for site, (x, y) in met.items():
        layer = layers[site]
        activate(model, those)
        wanted = layer(x)
        with disabled(model):
            change = float((wanted - layer(x)).float().norm())
        rounding = torch.finfo(y.dtype).eps * float(wanted.float().norm())
        found.append(float((y - wanted).float().norm()) / (SHARE * change + rounding))
        tells = tells or change > TELLING * rounding
    return max(found, default=math.inf) if tells and all(map(math.isfinite, found)) else math.inf


def _layers(subject: Subject) -> dict[str, nn.Module]:
    held = sites(subject.model, subject.name)
    return {site: layer for site, layer in held.items() if adapter_of(layer, subject.name).delta is not None}


def _met(subject: Subject, layers: dict[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """What each layer gets at last while the model answers, and what it gives."""
    met: dict[str, tuple[Tensor, Tensor]] = {}

    def note(site: str, inputs: tuple[Any, ...], output: Any) -> None:
        if len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            met[site] = inputs[0], output

    hooks = [
        layer.register_forward_hook(lambda _, inputs, output, site=site: note(site, inputs, output))
        for site, layer in layers.items()
        if isinstance(layer, nn.Module)
    ]
    try:
        subject.now()
    finally:
        for hook in hooks:
            hook.remove()
    return met


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


def _sum_and_pair(subject: Subject, twin: str) -> Sum:
    """{name: 0.75, twin: -0.25} and the one adapter that is their sum."""
    model = subject.model
    for layer in sites(model, twin).values():
        if (delta := adapter_of(layer, twin).delta) is not None:
            _turn_over(delta)
    weights = {subject.name: 0.75, twin: -0.25}
    with spare(model, "pair") as pair:
        combine(model, weights, pair, "cat")
        return _held(subject, "sum of two", weights, pair)


def _turn_over(delta: Any) -> None:
    """Another dW of the same size: A upside down."""
    size = delta.norm()
    delta.A.data = delta.A.data.flip(-2)
    delta.B.data *= size / max(delta.norm(), torch.finfo(delta.B.dtype).tiny)
