"""The small pieces of the loop, each held to its law: schedule, groups, clipping, the watchdog, |dW|."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from veneer.core.model import adapter_of, attach, parameters, sites
from veneer.core.spec import LoRA
from veneer.train.monitor import Meter, Movement, Watchdog, memory_bytes, not_finite
from veneer.train.optim import Masters, adamw, set_rate
from veneer.train.schedule import rate_factor, warmup_steps


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def spread(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in parameters(model).values():
            parameter.normal_()


# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps,warm", [(1, 0), (1, 1), (7, 0), (100, 3), (5, 5)])
def test_every_step_learns_and_the_peak_is_one(schedule: str, steps: int, warm: int) -> None:
    factors = [rate_factor(step, steps, warm, schedule) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors) and max(factors) == 1
    assert factors[:warm] == [(i + 1) / warm for i in range(warm)]
    assert sorted(factors[warm:], reverse=True) == factors[warm:]


def test_warm_up_is_a_share_or_a_number_of_steps() -> None:
    assert [warmup_steps(w, 40) for w in (0, 0.03, 0.5, 1, 10, 99)] == [0, 2, 20, 1, 10, 40]


# ---------------------------------------------------------------- optimiser


def test_lora_plus_gives_b_its_own_rate_and_vectors_no_decay() -> None:
    model = net()
    attach(model, LoRA(rank=2, combine="dora", bias="lora_only", modules_to_save=["2"]))
    optimizer = adamw(parameters(model), lora_plus_ratio=16.0, weight_decay=0.1)
    set_rate(optimizer, 1e-3)
    named = {id(p): name for name, p in parameters(model).items()}
    found = {named[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == {
        "0.lora.default.delta.A": (1e-3, 0.1),
        "0.lora.default.delta.B": (16e-3, 0.1),
        "0.lora.default.combine.magnitude": (1e-3, 0.0),
        "0.lora.default.bias": (1e-3, 0.0),
        "2.lora.default.weight": (1e-3, 0.1),
        "2.lora.default.bias": (1e-3, 0.0),
    }


def test_clipping_is_torchs() -> None:
    one, two = net(), net()
    two.load_state_dict(one.state_dict())
    x = torch.randn(5, 6)
    for model in (one, two):
        (model(x) * 100).square().sum().backward()
    one[0].bias.grad = two[0].bias.grad = None
    masters = Masters(dict(one.named_parameters()))
    norms = masters.gradient_norms()
    assert norms.shape == (4,) and norms[1] == 0
    masters.clip(float(norms.norm()), 0.5)
    torch.nn.utils.clip_grad_norm_(two.parameters(), 0.5)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.allclose(a.grad, b.grad, rtol=1e-5)
    before = one[0].weight.grad.clone()
    masters.clip(1e9, 0)
    assert torch.equal(before, one[0].weight.grad)


def test_bf16_parameters_learn_through_masters_in_fp32() -> None:
    """Steps far below bf16's resolution add up; gradients of micro-batches are added in fp32."""
    half, full = nn.Linear(4, 1, bias=False).bfloat16(), nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        full.weight.copy_(half.weight)
    masters = [Masters(dict(model.named_parameters())) for model in (half, full)]
    optimizers = [adamw(each.values, lora_plus_ratio=1, weight_decay=0) for each in masters]
    assert masters[1].values["weight"] is full.weight and not masters[1].apart
    for _ in range(50):
        for model, each, optimizer in zip((half, full), masters, optimizers, strict=True):
            for scale in (1.0, 1e-3):
                (model(torch.ones(1, 4, dtype=model.weight.dtype)) * scale).sum().backward()
                each.collect()
            set_rate(optimizer, 1e-5)
            optimizer.step()
            each.publish()
            each.zero_grad()
    assert half.weight.grad is None and half.weight.dtype == torch.bfloat16
    assert torch.allclose(masters[0].values["weight"], full.weight, atol=1e-6)
    assert torch.equal(half.weight, masters[0].values["weight"].bfloat16())


# ---------------------------------------------------------------- watching


def test_the_watchdog_barks_at_what_is_not_a_number_and_at_a_spike() -> None:
    assert "loss is nan" in str(Watchdog().verdict(math.nan, 1.0))
    assert "norm is inf" in str(Watchdog().verdict(1.0, math.inf))
    dog = Watchdog()
    assert not any(dog.verdict(3.0, 1.0) for _ in range(10)) and dog.is_calm
    verdicts = [dog.verdict(11.0, 1.0) for _ in range(5)]
    assert verdicts[0] is None and "rose from 3 to" in str(verdicts[-1]) and not dog.is_calm


def test_the_watchdog_lets_noise_pass() -> None:
    dog = Watchdog()
    losses = [3.6, 3.1, 4.4, 2.2, 1.8, 3.9, 1.2, 2.5, 0.9, 3.0] * 5
    assert not any(dog.verdict(loss, 1.0) for loss in losses)


def test_the_watchdog_goes_on_where_it_was() -> None:
    whole, first, second = Watchdog(), Watchdog(), Watchdog()
    losses = [3.0, 2.0, 2.0, 2.0, 2.0, 9.0, 9.0, 9.0, 9.0]
    expected = [whole.verdict(loss, 1.0) for loss in losses]
    found = [first.verdict(loss, 1.0) for loss in losses[:6]]
    second.restore(first.state())
    assert found + [second.verdict(loss, 1.0) for loss in losses[6:]] == expected and any(expected)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("moved_before", [False, True])
def test_movement_is_the_norm_of_dw(init: str, moved_before: bool) -> None:
    model = net()
    attach(model, LoRA(rank=2, init=init))
    if moved_before:
        spread(model)
    start = {name: adapter_of(layer).delta.weight().detach().clone() for name, layer in sites(model).items()}
    movement = Movement(model)
    assert all(change < 1e-6 for change in movement.now()["dw_change"].values())
    spread(model)
    now = movement.now()
    for name, layer in sites(model).items():
        w = adapter_of(layer).delta.weight().detach()
        assert now["dw"][name] == pytest.approx(float(w.norm()), rel=1e-4)
        assert now["dw_change"][name] == pytest.approx(float((w - start[name]).norm()), rel=1e-4)


def test_movement_of_a_model_without_adapters_is_empty() -> None:
    assert Movement(net()).now() == {}


def test_what_is_not_finite_is_named() -> None:
    tensors = {
        "a": torch.ones(3),
        "b": torch.tensor([1.0, math.nan]),
        "c": torch.tensor([math.inf]),
        "d": torch.ones(1).int(),
    }
    assert not_finite(tensors) == ["b", "c"]


def test_the_meter_counts_since_it_was_last_read() -> None:
    meter = Meter()
    meter.add(100, 40)
    found = meter.read()
    assert found["tokens_per_second"] >= 2 * found["trained_tokens_per_second"] > 0
    assert meter.read()["tokens_per_second"] == 0
    assert memory_bytes(torch.device("cpu")) > 1 << 20
