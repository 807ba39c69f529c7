"""What a denoiser learns: pictures x mixed with noise n at a time t, and what it must say of the mixture.

| process | mixture | the model says | from the scheduler |
| --- | --- | --- | --- |
| steps | sqrt(a) x + sqrt(1 - a) n, a = alphas_cumprod[t] | epsilon: n | prediction_type epsilon |
| | | v: sqrt(a) n - sqrt(1 - a) x (arXiv:2202.00512) | v_prediction |
| | | sample: x | sample |
| flow | (1 - s) x + s n, s in (0, 1) | n - x (arXiv:2403.03206) | flow matching |

The kind is read off the pipeline's scheduler, because that is how its model was trained; a setting that says otherwise
is refused, for the loss would fall and the pictures would not be any.

    min-SNR      with SNR = a / (1 - a), a step counts min(SNR, g) / SNR for epsilon, / (SNR + 1) for v, / 1 for sample:
                 easy times are counted less (arXiv:2303.09556, where g = 5). Flow matching has no such weight
    noise offset n + o z with one z for each channel: dark and bright pictures are learned
    times        steps: uniform. flow: the logistic function of a normal variable (arXiv:2403.03206, eq. 19), or
                 uniform; then shifted as the scheduler shifts its own
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import ConfigError

__all__ = ["Flow", "Process", "Steps", "process_of"]

Rows = Float[Tensor, "rows *shape"]
PerRow = Float[Tensor, " rows"]


@runtime_checkable
class Process(Protocol):
    """Times are in the model's own count, 0 ... 1000, also where they are not whole."""

    @property
    def kind(self) -> str: ...
    def time(self, uniform: Tensor, normal: Tensor, tokens: int) -> Tensor: ...
    def mixture(self, clean: Rows, noise: Rows, time: PerRow) -> Rows: ...
    def target(self, clean: Rows, noise: Rows, time: PerRow) -> Rows: ...
    def weight(self, time: PerRow) -> PerRow: ...


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Steps:
    """Noise in whole steps. `alphas` are the scheduler's alphas_cumprod; `gamma` 0 weighs all steps alike."""

    alphas: Float[Tensor, " steps"]
    kind: str = "epsilon"
    gamma: float = 0.0

    def time(self, uniform: Tensor, normal: Tensor, tokens: int) -> Tensor:
        """A whole step, each as likely as any other."""
        return (uniform * len(self.alphas)).floor().clamp(max=len(self.alphas) - 1)

    def _alpha(self, time: Tensor) -> Tensor:
        return self.alphas.to(time.device)[time.long()]

    def mixture(self, clean: Rows, noise: Rows, time: PerRow) -> Rows:
        a = _wide(self._alpha(time), clean)
        return a.sqrt() * clean + (1 - a).sqrt() * noise

    def target(self, clean: Rows, noise: Rows, time: PerRow) -> Rows:
        a = _wide(self._alpha(time), clean)
        if self.kind == "v_prediction":
            return a.sqrt() * noise - (1 - a).sqrt() * clean
        return noise if self.kind == "epsilon" else clean

    def weight(self, time: PerRow) -> PerRow:
        if not self.gamma:
            return torch.ones_like(time)
        a = self._alpha(time)
        snr = a / (1 - a)
        capped = snr.clamp(max=self.gamma)
        below = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[self.kind]
        return torch.where(below > 0, capped / below, 1.0)  # epsilon without any signal: the limit, 1


@dataclass(frozen=True)
class Flow:
    """A straight line from picture to noise. `shift` is the scheduler's fixed one; `dynamic` holds its words for one
    that grows with the picture."""

    shift: float = 1.0
    dynamic: Mapping[str, float] | None = None
    times: str = "logit_normal"
    steps: int = 1000
    kind: str = "flow"

    def time(self, uniform: Tensor, normal: Tensor, tokens: int) -> Tensor:
        at = uniform if self.times == "uniform" else normal.sigmoid()
        shift = self._shift(tokens)
        return self.steps * shift * at / (1 + (shift - 1) * at)

    def _shift(self, tokens: int) -> float:
        """Larger pictures need more noise to lose their content, so their times are moved up."""
        if self.dynamic is None:
            return self.shift
        low, high = self.dynamic["base_image_seq_len"], self.dynamic["max_image_seq_len"]
        share = (tokens - low) / (high - low)
        return math.exp(self.dynamic["base_shift"] * (1 - share) + self.dynamic["max_shift"] * share)

    def mixture(self, clean: Rows, noise: Rows, time: PerRow) -> Rows:
        s = _wide(time / self.steps, clean)
        return (1 - s) * clean + s * noise

    def target(self, clean: Rows, noise: Rows, time: PerRow) -> Rows:
        return noise - clean

    def weight(self, time: PerRow) -> PerRow:
        return torch.ones_like(time)


# ---------------------------------------------------------------- which one


DYNAMIC = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")


def process_of(
    scheduler: Any, is_transformer: bool, *, prediction: str = "auto", times: str = "auto", min_snr: float = 0.0
) -> Process:
    """The process that a pipeline's scheduler describes. `prediction` may only say what is so."""
    config, name = scheduler.config, type(scheduler).__name__
    is_flow = "FlowMatch" in name or getattr(config, "prediction_type", "") == "flow_prediction"
    kind = "flow" if is_flow else getattr(config, "prediction_type", "epsilon")
    if prediction not in ("auto", kind):
        raise ConfigError(
            f"the pipeline's scheduler, {name}, is for {kind}, not for {prediction}", "prediction",
            "leave it out; or, if you know that the model was trained so, set prediction_type in scheduler_config.json",
        )  # fmt: skip
    if is_flow != is_transformer:
        what = "transformers are trained by flow matching" if is_transformer else "UNets are trained in steps of noise"
        fix = "put the scheduler of the model's own release into the pipeline"
        raise ConfigError(f"{what} here, and the pipeline's scheduler is {name} ({kind})", "scheduler", fix)
    if is_flow:
        return _flow(config, times, min_snr)
    if times not in ("auto", "uniform"):
        raise ConfigError(
            f"times {times} is for flow matching; steps of noise are drawn evenly", "times", "leave it out"
        )
    if not hasattr(scheduler, "alphas_cumprod") or kind not in ("epsilon", "v_prediction", "sample"):
        fix = "put a DDPM, DDIM, PNDM, Euler or DPM-Solver scheduler into the pipeline"
        raise ConfigError(f"{name} ({kind}) does not say how noise is added", "scheduler", fix)
    return Steps(scheduler.alphas_cumprod.float().cpu(), kind, min_snr)


def _flow(config: Any, times: str, min_snr: float) -> Flow:
    if min_snr:
        raise ConfigError(
            "min_snr weighs steps of noise, and this model learns by flow matching", "min_snr", "leave it out"
        )
    dynamic = {word: float(config[word]) for word in DYNAMIC} if config.get("use_dynamic_shifting") else None
    return Flow(float(config.get("shift", 1.0)), dynamic, "logit_normal" if times == "auto" else times)
