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

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["Masters", "adamw", "set_rate"]


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
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters.values())
    return torch.optim.AdamW(used, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=fused)


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if parameter.ndim < 2:
        return "flat"
    return "B" if name.endswith(".delta.B") else "A"


class Masters:
    """What AdamW moves: fp32 values, whatever type the model computes in.

    An fp32 parameter is its own master. One in bf16 (a head trained whole on a bf16 base, a bf16 model trained in full)
    has eight bits of mantissa, in which most steps of AdamW would be lost to rounding; it gets a master in fp32. Its
    gradients are added up there too, micro-batch by micro-batch, and the model gets the rounded value after each step.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.model = dict(parameters)
        self.values = {name: p if p.dtype.itemsize >= 4 else _master(p) for name, p in parameters.items()}
        self.apart = [(p, self.values[name]) for name, p in parameters.items() if self.values[name] is not p]

    def collect(self) -> None:
        """After a backward: the gradients of half-precision parameters move to their masters."""
        for parameter, master in self.apart:
            if parameter.grad is not None:
                gradient = parameter.grad.to(master.dtype)
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """After a step, or after values were put back: the model gets what its masters hold."""
        for parameter, master in self.apart:
            parameter.copy_(master)

    def zero_grad(self) -> None:
        for parameter in (*self.model.values(), *self.values.values()):
            parameter.grad = None

    def gradient_norms(self) -> Tensor:
        """The norm of each gradient, 0 where there is none, as one tensor on the device."""
        held = list(self.values.values())
        norms = iter(_foreach_norm(self._gradients()))
        return torch.stack([next(norms) if p.grad is not None else p.new_zeros(()) for p in held])

    def clip(self, norm: float, limit: float) -> None:
        """Scale all gradients, whose joint norm is `norm`, down to `limit`. 0 is no limit."""
        if limit and norm > limit:
            torch._foreach_mul_(self._gradients(), limit / (norm + 1e-6))  # pyright: ignore[reportPrivateImportUsage]

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.values.values() if parameter.grad is not None]


def _master(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to(torch.float32, copy=True))


def _foreach_norm(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch._foreach_norm(tensors) if tensors else ()  # pyright: ignore[reportPrivateImportUsage]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["times"]
