"""Bad input, from the wrong rank to a file from the future: each is one clear error, and nothing is half-changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import veneer
from veneer import LoRA
from veneer.core.model import parameters
from veneer.errors import VeneerError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def everything(model: nn.Module) -> tuple[object, ...]:
    state = vars(model).get("_veneer")
    return (
        [type(m) for m in model.modules()],
        {k: v.clone() for k, v in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
        (state.active.names, tuple(state.placed), state.merged) if state else None,
        sorted(vars(model)),
    )


def same(one: tuple[Any, ...], two: tuple[Any, ...]) -> bool:
    values = one[1].keys() == two[1].keys() and all(torch.equal(one[1][k], two[1][k]) for k in one[1])
    return values and (one[0], *one[2:]) == (two[0], *two[2:])


def adapted() -> nn.Sequential:
    model = net()
    veneer.attach(model, LoRA(rank=2), "a")
    veneer.attach(model, LoRA(rank=2, delta="loha"), "full")
    with torch.no_grad():
        for p in parameters(model).values():
            p.normal_(std=0.3)
    veneer.activate(model, "a")
    return model


def loftq(model: nn.Module, name: str) -> None:
    veneer.attach(model, LoRA(rank=2, init="loftq", targets=["0"]), name, round_trip=lambda w: (w * 64).round() / 64)


ATTACHING: dict[str, tuple[Callable[[], Any], str]] = {
    "rank above the layer's": (lambda: LoRA(rank=5), "rank 5 is above the layer's own rank, at most 4 for 4 x 6"),
    "no rank": (lambda: LoRA(rank=0), "rank=0 must be a whole number of at least 1"),
    "alpha of zero": (lambda: LoRA(alpha=0), "alpha=0 must be a positive number"),
    "negative alpha": (lambda: LoRA(alpha=-2.0), "alpha=-2.0 must be a positive number"),
    "alpha of nothing": (lambda: LoRA(alpha=float("nan")), "alpha=nan must be a positive number"),
    "unknown delta": (lambda: LoRA(delta="adalroa"), "Did you mean 'adalora'?"),
    "unknown combine": (lambda: LoRA(combine="dorra"), "Did you mean 'dora'?"),
    "unknown init": (lambda: LoRA(init="orthogonol"), "Did you mean 'orthogonal'?"),
    "unknown scaling": (lambda: LoRA(scaling="rs_lora"), "Did you mean 'rslora'?"),
    "unknown option": (lambda: LoRA(delta="lokr", options={"factr": 2}), "Did you mean 'factor'?"),
    "unknown override": (lambda: LoRA(overrides={"0": {"rnk": 2}}), "Did you mean 'rank'?"),
    "alpha of zero in one layer": (lambda: LoRA(overrides={"0": {"alpha": 0}}), "alpha=0 must be a positive number"),
}


@pytest.mark.parametrize("case", ATTACHING)
def test_an_adapter_that_cannot_be_is_refused_whole(case: str) -> None:
    make, match = ATTACHING[case]
    model = net()
    before = everything(model)
    with pytest.raises(VeneerError) as error:
        veneer.attach(model, make())
    assert match in str(error.value)
    assert same(before, everything(model))


@pytest.mark.parametrize(
    "call,match",
    [
        (lambda m: veneer.combine(m, {"a": 1, "full": 1}, into="ab", method="cat"), "no product of thin factors"),
        (lambda m: veneer.combine(m, {"a": 1, "b": 1}, into="ab"), "no adapter named 'b'"),
        (lambda m: veneer.combine(m, {"a": float("inf")}, into="ab"), "the weight of 'a' is inf"),
        (lambda m: veneer.combine(m, {"a": 1}, into="ab", method="tise"), "Did you mean 'ties'?"),
        (lambda m: veneer.combine(m, {"a": 1}, into="full", method="svd"), "already an adapter named 'full'"),
        (lambda m: veneer.activate(m, ["a", "a"]), "named twice"),
        (lambda m: veneer.activate(m, {"a": 1.0, "ful": 1.0}), "Did you mean 'full'?"),
        (lambda m: loftq(m, "second"), "trained on the base as it is; two bases in one are not possible"),
    ],
)
def test_a_mix_that_cannot_be_leaves_the_adapters_as_they_were(call: Callable[[Any], Any], match: str) -> None:
    model = adapted()
    before = everything(model)
    with pytest.raises(VeneerError) as error:
        call(model)
    assert match in str(error.value)
    assert same(before, everything(model))


def test_two_inits_that_change_the_base_do_not_meet() -> None:
    model = net()
    loftq(model, "one")
    before = everything(model)
    with pytest.raises(VeneerError, match="two bases in one are not possible"):
        loftq(model, "two")
    assert same(before, everything(model))


@pytest.mark.parametrize(
    "words,match",
    [
        ({"peft_version": "99.0.0", "use_hyperlora": True}, "use_hyperlora"),
        ({"peft_type": "ADALROA"}, "ADALROA"),
        ({"r": 0}, "rank=0"),
        ({"lora_alpha": -1}, "alpha=-1"),
        ({"init_lora_weights": "from_the_future"}, "from_the_future"),
    ],
)
def test_a_file_that_cannot_be_followed_leaves_the_model_as_it_was(
    words: dict[str, Any], match: str, tmp_path: Path
) -> None:
    veneer.save(adapted(), tmp_path, "a")
    path = next(tmp_path.rglob("adapter_config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | words))
    model = net()
    before = everything(model)
    with pytest.raises(VeneerError) as error:
        veneer.load(model, path.parent)
    assert match in str(error.value)
    assert same(before, everything(model))
