"""Which parameter learns how fast, and AdamW over them.

| group | parameters | rate | decay |
| --- | --- | --- | --- |
| A | factors A, whole weights | lr | weight_decay |
| B | factors B | lr x lora_plus_ratio | weight_decay |
| flat | vectors: biases, norms, magnitudes | lr | 0 |

LoRA+ (arXiv:2402.12354): A and B have different widths, so with one rate for both, features are learned efficiently for
neither when a layer is wide; B wants the larger one. A parameter's role is its name in its own delta, never a
substring of a module's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["adamw", "clip_", "gradient_norms", "set_rate"]


def adamw(parameters: Mapping[str, nn.Parameter], *, lora_plus_ratio: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW without a rate: `set_rate` sets it before each step."""
    groups = {
        "A": {"params": [], "times": 1.0, "weight_decay": weight_decay},
        "B": {"params": [], "times": lora_plus_ratio, "weight_decay": weight_decay},
        "flat": {"params": [], "times": 1.0, "weight_decay": 0.0},
    }
    for name, parameter in parameters.items():
        groups[_group_of(name, parameter)]["params"].append(parameter)
    used = [{"name": name, **group} for name, group in groups.items() if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters.values())
    return torch.optim.AdamW(used, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=fused)


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if parameter.ndim < 2:
        return "flat"
    return "B" if name.endswith(".delta.B") else "A"


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["times"]


def gradient_norms(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of each parameter's gradient, 0 where there is none, as one tensor on the device."""
    held = list(parameters)
    with_gradient = [p.grad for p in held if p.grad is not None]
    norms = iter(torch._foreach_norm(with_gradient) if with_gradient else [])
    return torch.stack(
        [next(norms).float() if p.grad is not None else p.new_zeros((), dtype=torch.float32) for p in held]
    )


def clip_(parameters: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """Scale all gradients, whose joint norm is `norm`, down to `limit`. 0 is no limit."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if limit and norm > limit:
        torch._foreach_mul_(gradients, limit / (norm + 1e-6))
