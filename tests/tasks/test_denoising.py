"""What a denoiser learns, against diffusers' own schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from veneer.errors import ConfigError
from veneer.tasks.denoising import Flow, Steps, process_of

diffusers = pytest.importorskip("diffusers")
STEPS = ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]


def values(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, n = torch.randn(6, 4, 3, 5, generator=g), torch.randn(6, 4, 3, 5, generator=g)
    return x, n, torch.tensor([0.0, 1.0, 250.0, 500.0, 900.0, 999.0])


@pytest.mark.parametrize("name", STEPS)
def test_mixtures_are_those_of_the_scheduler(name: str) -> None:
    scheduler = getattr(diffusers, name)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x, n, t = values()
    found = process_of(scheduler, False).mixture(x, n, t)
    reference = diffusers.DDPMScheduler.from_config(scheduler.config)
    assert torch.allclose(found, reference.add_noise(x, n, t.long()), atol=1e-5)


@pytest.mark.parametrize("zero", [False, True])
def test_targets_are_noise_and_velocity(zero: bool) -> None:
    x, n, t = values()
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = diffusers.DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=zero)
        wanted = {"epsilon": n, "sample": x, "v_prediction": scheduler.get_velocity(x, n, t.long())}[kind]
        assert torch.allclose(process_of(scheduler, False).target(x, n, t), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_is_the_loss_of_the_picture_with_capped_weight(kind: str) -> None:
    """In every parametrisation the weighted loss is min(SNR, 5) |x - x'|^2, for the x' that an answer stands for."""
    from diffusers.training_utils import compute_snr

    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    process = process_of(scheduler, False, min_snr=5.0)
    x, n, t = values()
    mixture, off = process.mixture(x, n, t), 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    a = scheduler.alphas_cumprod[t.long()].view(-1, 1, 1, 1)
    answer = process.target(x, n, t) + off
    guess = {
        "epsilon": (mixture - (1 - a).sqrt() * answer) / a.sqrt(),
        "v_prediction": a.sqrt() * mixture - (1 - a).sqrt() * answer,
        "sample": answer,
    }[kind]
    found = process.weight(t) * off.square().flatten(1).mean(1)
    wanted = compute_snr(scheduler, t.long()).clamp(max=5) * (guess - x).square().flatten(1).mean(1)
    assert torch.allclose(found, wanted, rtol=2e-3)
    assert torch.equal(process_of(scheduler, False).weight(t), torch.ones_like(t))


def test_steps_are_whole_and_all_of_them_come() -> None:
    process = process_of(diffusers.DDIMScheduler(), False)
    at = torch.linspace(0, 1, 5001)
    found = process.time(at, torch.zeros(()), 0)
    assert torch.equal(found.unique(), torch.arange(1000.0)) and found.max() == 999


def test_flow_is_the_schedulers() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    x, n, _ = values()
    t = scheduler.timesteps[[0, 10, 200, 500, 900, 999]]
    process = process_of(scheduler, True, times="uniform")
    assert isinstance(process, Flow)
    assert torch.allclose(process.mixture(x, n, t), scheduler.scale_noise(x, t, n), atol=1e-5)
    assert torch.allclose(
        process.mixture(x, n, t) + (1 - t / 1000).view(-1, 1, 1, 1) * process.target(x, n, t), n, atol=1e-5
    )
    even = torch.linspace(1, 1 / 1000, 1000)
    assert torch.allclose(process.time(even, even, 0), scheduler.timesteps, atol=1e-2)  # its own shift


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_a_shift_that_grows_is_the_pipelines(tokens: int) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    even = torch.linspace(1, 1 / 1000, 1000)
    found = process_of(scheduler, True, times="uniform").time(even, even, tokens)
    scheduler.set_timesteps(sigmas=even.tolist(), mu=calculate_shift(tokens))
    assert torch.allclose(found, scheduler.timesteps, atol=1e-2)


def test_normal_times_lie_in_the_middle() -> None:
    process = process_of(diffusers.FlowMatchEulerDiscreteScheduler(), True)
    drawn = process.time(torch.zeros(()), torch.randn(4000, generator=torch.Generator().manual_seed(0)), 0)
    assert drawn.min() > 0 and drawn.max() < 1000 and abs(float(drawn.mean()) - 500) < 12
    assert float(((drawn > 250) & (drawn < 750)).float().mean()) > 0.7


REFUSED: list[tuple[str, dict[str, Any], bool, dict[str, Any], str]] = [
    ("DDIMScheduler", {"prediction_type": "v_prediction"}, False, {"prediction": "epsilon"}, "is for v_prediction"),
    ("DDIMScheduler", {}, False, {"prediction": "flow"}, "is for epsilon"),
    ("DDIMScheduler", {}, True, {}, "transformers are trained by flow matching"),
    ("FlowMatchEulerDiscreteScheduler", {}, False, {}, "UNets are trained in steps"),
    ("FlowMatchEulerDiscreteScheduler", {}, True, {"min_snr": 5.0}, "min_snr weighs steps"),
    ("DDIMScheduler", {}, False, {"times": "logit_normal"}, "drawn evenly"),
    ("CMStochasticIterativeScheduler", {}, False, {}, "does not say how noise is added"),
]


@pytest.mark.parametrize("name,config,is_transformer,options,said", REFUSED)
def test_contradictions_are_refused(name: str, config: Any, is_transformer: bool, options: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        process_of(getattr(diffusers, name)(**config), is_transformer, **options)
    assert caught.value.fix


def test_saying_what_is_so_is_allowed() -> None:
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    assert isinstance(process_of(scheduler, False, prediction="v_prediction", min_snr=5.0), Steps)
