"""What an init sees is what is there, and the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import veneer
from veneer import LoRA
from veneer.core.model import adapter_of, sites, spec_of
from veneer.core.observe import Spectrum, observe
from veneer.errors import ConfigError, TargetError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 10)).train()


def batches(count: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(6, 12) * torch.linspace(0.1, 3, 12) for _ in range(count)]


def square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().sum()


def test_the_running_spectrum_is_that_of_all_rows_at_once() -> None:
    x = torch.cat(batches())
    spectrum = Spectrum(12)
    for part in x.split(5):
        spectrum.see(part)
    _, s, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(spectrum.explained, s.square() / s.square().sum(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((spectrum.directions * vh).sum(1).abs(), torch.ones(12), rtol=1e-3, atol=1e-3)


def test_covariance_and_gradient_are_sums_over_the_batches() -> None:
    model, data = net(), batches()
    layers = {"0": model[0], "3": model[3]}
    before = [(p.requires_grad, m.training) for m in model.modules() for p in m.parameters()]
    got = observe(model, layers, "covariance", data, square, 2)
    x = torch.cat(data)
    torch.testing.assert_close(got["0"], x.T @ x, rtol=1e-4, atol=1e-3)
    got = observe(model, layers, "gradient", data, square, 2)
    assert [(p.requires_grad, m.training) for m in model.modules() for p in m.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    sum(square(model, b) for b in data).backward()
    torch.testing.assert_close(got["3"], model[3].weight.grad, rtol=1e-4, atol=1e-3)


def test_eva_shares_out_ranks_and_keeps_the_budget_and_the_scale() -> None:
    model = net()
    veneer.attach(model, LoRA(rank=4, alpha=8, targets=["0", "3"], init="eva"), data=batches())
    ranks = {n: adapter_of(layer).delta.rank for n, layer in sites(model).items()}
    assert sum(ranks.values()) == 8 and max(ranks.values()) <= 8
    assert all(adapter_of(layer).delta.scale == 2.0 for layer in sites(model).values())
    again = net()
    veneer.attach(again, spec_of(model), init=False)
    assert ranks == {n: adapter_of(layer).delta.rank for n, layer in sites(again).items()}
    a = adapter_of(model[0]).delta.A.detach()
    torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=1e-4, atol=1e-4)


def test_lora_ga_first_step_follows_full_fine_tuning_better_than_a_random_start() -> None:
    """dW after one small gradient step points along -G far better than a random start's (the paper's aim)."""
    cosine = {}
    for init in ("kaiming", "lora_ga"):
        model, data = net().eval(), batches()
        g = observe(model, {"0": model[0]}, "gradient", data, square, 2)["0"]
        veneer.attach(model, LoRA(rank=4, alpha=4, targets=["0"], init=init), data=data, loss=square)
        delta = adapter_of(model[0]).delta
        sum(square(model, b) for b in data).backward()
        with torch.no_grad():
            for p in delta.parameters():
                p -= 1e-6 * p.grad
        step = delta.weight().detach()
        cosine[init] = float((-g * step).sum() / (g.norm() * step.norm()))
    assert cosine["lora_ga"] > 0.8 > cosine["kaiming"]


def test_corda_takes_out_what_matters_most_to_the_data() -> None:
    """Without its r top components the layer's answer to this data loses more than without PiSSA's r."""
    lost = {}
    x = torch.cat(batches())
    for init in ("corda", "pissa", "corda_kpm"):
        model = net().eval()
        veneer.attach(model, LoRA(rank=3, alpha=3, targets=["0"], init=init), data=batches(), loss=square)
        delta = adapter_of(model[0]).delta
        lost[init] = float((x @ (delta.B0 @ delta.A0).T).norm())
    assert lost["corda"] > lost["pissa"] > lost["corda_kpm"]


def test_inits_that_look_at_data_ask_for_it_and_refuse_what_they_cannot_see() -> None:
    with pytest.raises(ConfigError, match="init eva looks at data"):
        veneer.attach(net(), LoRA(rank=2, targets=["0"], init="eva"))
    with pytest.raises(ConfigError, match="no batch"):
        veneer.attach(net(), LoRA(rank=2, targets=["0"], init="eva"), data=[])
    with pytest.raises(TargetError, match="linear layers only"):
        veneer.attach(
            nn.Sequential(nn.Conv1d(3, 4, 1)), LoRA(rank=2, targets=["0"], init="eva"), data=[torch.ones(1, 3, 2)]
        )

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Skips()
    with pytest.raises(TargetError, match="never ran"):
        veneer.attach(model, LoRA(rank=2, init="eva"), data=[torch.ones(2, 4)])
    assert veneer.adapters(model) == () and type(model.used) is nn.Linear
