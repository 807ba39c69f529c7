"""LoftQ: the quantised base with its adapter is nearer to W than the quantised base alone, and stays what it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer import LoRA
from veneer.core.model import adapter_of
from veneer.core.weight import read_weight
from veneer.errors import ConfigError, TargetError
from veneer.quant.nf4 import QUANTILES


def nf4(w: Tensor) -> Tensor:
    """QLoRA's 16 levels in blocks of 64, without double quantisation."""
    levels, blocks = torch.tensor(QUANTILES), w.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-30)
    nearest = (blocks[..., None] / scale[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * scale).view_as(w)


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("combine", ["add", "dora"])
@pytest.mark.parametrize("scaling", ["lora", "constant"])
def test_the_start_is_nearer_than_the_quantised_base(dtype: torch.dtype, combine: str, scaling: str) -> None:
    model = net(dtype)
    w, y = [model[i].weight.detach().float().clone() for i in (0, 2)], model(torch.eye(128, dtype=dtype)).detach()
    spec = LoRA(rank=16, alpha=3, init="loftq", targets=["0", "2"], combine=combine, scaling=scaling)
    veneer.attach(model, spec, round_trip=nf4)
    for i, before in zip((0, 2), w, strict=True):
        base, adapter = model[i]._parameters["weight"].float(), adapter_of(model[i])
        if dtype is torch.float32:
            torch.testing.assert_close(nf4(base), base, msg="the base is what NF4 can hold")
        alone, with_it = (nf4(before) - before).norm(), (adapter.weight(base) - before).detach().norm()
        assert float(with_it) < 0.75 * float(alone)
    quantised = net(dtype)
    with torch.no_grad():
        for i, before in zip((0, 2), w, strict=True):
            quantised[i].weight.copy_(nf4(before))
    far, near = (m(torch.eye(128, dtype=dtype)).detach() - y for m in (quantised, model))
    assert float(near.norm()) < 0.8 * float(far.norm())


def test_more_steps_than_one_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.core import init

    errors = []
    for steps in (1, 5):
        monkeypatch.setattr(init, "LOFTQ_STEPS", steps)
        model = net()
        w = model[0].weight.detach().clone()
        veneer.attach(model, LoRA(rank=16, init="loftq", targets=["0"]), round_trip=nf4)
        errors.append(float((adapter_of(model[0]).weight(model[0]._parameters["weight"]) - w).detach().norm()))
    assert errors[1] < errors[0]


def test_a_base_that_cannot_change_is_refused_and_left_alone() -> None:
    model = net()
    spec = LoRA(rank=4, init="loftq", targets=["0"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match="round_trip=function"):
        veneer.attach(model, spec)
    assert not veneer.adapters(model)
    veneer.attach(model, LoRA(rank=4, targets=["0"]), "first")
    with pytest.raises(TargetError, match="0 carries first, trained on the base as it is"):
        veneer.attach(model, spec, "second", round_trip=nf4)
    assert veneer.adapters(model) == ("first",)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    veneer.detach(model)
    veneer.attach(model, spec, "one", round_trip=nf4)
    with pytest.raises(TargetError, match="0 carries one"):
        veneer.attach(model, spec, "two", round_trip=nf4)
    veneer.attach(model, LoRA(rank=4, init="pissa", targets=["2"]), "beside")  # elsewhere, and it writes nothing

    tied = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    tied["b"].weight = tied["a"].weight
    with pytest.raises(TargetError, match="shares its weight"):
        veneer.attach(tied, LoRA(rank=2, init="loftq", targets=["a"], tied="apart"), round_trip=nf4)
    model = net()
    veneer.quantize(model, "nf4")
    with pytest.raises(TargetError, match="is packed already"):
        veneer.attach(model, spec, round_trip=nf4)


def test_weights_that_are_read_start_so_too() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 2)
    w = attention.in_proj_weight.detach().clone()
    veneer.attach(attention, LoRA(rank=8, init="loftq", targets=["in_proj_weight", "out_proj"]), round_trip=nf4)
    base = attention._parameters["in_proj_weight"]
    torch.testing.assert_close(nf4(base), base.detach())
    near, far = (attention.in_proj_weight - w).detach().norm(), (nf4(w) - w).norm()
    assert float(near) < 0.9 * float(far)


@pytest.mark.parametrize("combine", ["add", "dora"])
def test_on_a_packed_base_the_adapter_starts_with_what_was_lost(combine: str) -> None:
    model, x = net(), torch.eye(128)
    y, w = model(x).detach(), {name: model[int(name)].weight.detach().clone() for name in ("0", "2")}
    veneer.quantize(model, "nf4", targets=["0", "2"])
    far, bits = (model(x) - y).norm(), copy.deepcopy(model.state_dict())
    spec = LoRA(rank=16, init="loftq", targets=["0", "2"], combine=combine)
    with pytest.raises(ConfigError, match="originals=function"):
        veneer.attach(model, spec)
    veneer.attach(model, spec, originals=w.__getitem__)
    assert float((model(x) - y).detach().norm()) < 0.8 * float(far.detach())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in bits.items())
    (model(x) - y).square().sum().backward()
    veneer.check_alive(model)


def test_the_quick_way_finds_nearly_what_the_exact_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.core import init

    near = []
    for wide in (1000, 8):
        monkeypatch.setattr(init, "WIDE", wide)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 192))
        w = model[0].weight.detach().clone()
        veneer.quantize(model, "nf4", targets=["0"])
        veneer.attach(model, LoRA(rank=8, init="loftq", targets=["0"]), originals=lambda name, w=w: w)
        near.append(float((adapter_of(model[0]).weight(read_weight(model[0])) - w).detach().norm()))
    assert near[1] < 1.02 * near[0]


def test_what_is_known_of_the_inputs_says_what_was_lost() -> None:
    """On inputs with a few strong directions the same rank brings the outputs far nearer; a dead column does no harm,
    and where packing loses nothing the adapter still learns."""
    torch.manual_seed(1)
    x = torch.randn(300, 6) @ torch.randn(6, 128) * 3 + torch.randn(300, 128)
    x[:, 7] = 0
    known = x[:200].square().mean(0), torch.linalg.svd(x[:200], full_matrices=False)
    v = known[1].S[:16, None] * known[1].Vh[:16] / 200**0.5
    near = {}
    for inputs in (None, lambda name: (known[0], v) if name == "0" else None):
        model = net()
        with torch.no_grad():
            model[2].weight.zero_()
        y, w = model[0](x[200:]).detach(), {name: model[int(name)].weight.detach().clone() for name in ("0", "2")}
        veneer.quantize(model, "nf4", targets=["0", "2"])
        spec = LoRA(rank=8, init="loftq", targets=["0", "2"])
        veneer.attach(model, spec, originals=w.__getitem__, inputs=inputs)
        near[inputs is not None] = float((model[0](x[200:]) - y).detach().norm())
        (model[0](x).square().sum() + model[2](x[:, :64]).square().sum()).backward()
        veneer.check_alive(model)
    assert near[True] < 0.5 * near[False]
