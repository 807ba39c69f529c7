"""Which parameter learns how fast, what AdamW moves, and the kinds of AdamW there are.

| group | parameters | rate | decay |
| --- | --- | --- | --- |
| A | factors A, whole weights | lr | weight_decay |
| B | factors B | lr x lora_plus_ratio | weight_decay |
| flat | vectors: biases, norms, magnitudes | lr | 0 |

LoRA+ (arXiv:2402.12354): A and B have different widths, so with one rate for both, features are learned efficiently for
neither when a layer is wide; B wants the larger one. A parameter's role is its name in its own delta, never a
substring of a module's name.

| optimizer | |
| --- | --- |
| adamw | PyTorch's |
| adamw8bit | the same with moments of one byte (eight_bit.py) |
| adamw_host | the same with its moments in the host's memory (host_adam.py) |
| lora_fa | adamw on the gradient of B that is as close to that of the whole weight as a frozen A lets it be |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from veneer.core.deltas.lora_fa import LoraFA
from veneer.core.model import adapter_of, sites
from veneer.errors import ConfigError
from veneer.train.eight_bit import AdamW8bit
from veneer.train.host_adam import AdamWHost

__all__ = ["KINDS", "Masters", "Projection", "adamw", "groups_of", "set_rate"]

KINDS = ("adamw", "adamw8bit", "adamw_host", "lora_fa")
ALIGNED = 64  # elements: every parameter inside a buffer begins where a matrix product likes its operands to begin


def groups_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, nn.Parameter]]:
    """The groups that are not empty, by the table above."""
    groups: dict[str, dict[str, nn.Parameter]] = {"A": {}, "B": {}, "flat": {}}
    for name, parameter in parameters.items():
        groups[_group_of(name, parameter)][name] = parameter
    return {group: members for group, members in groups.items() if members}


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if parameter.ndim < 2:
        return "flat"
    return "B" if name.endswith(".delta.B") else "A"


def adamw(
    parameters: Mapping[str, nn.Parameter] | Masters,
    *,
    lora_plus_ratio: float = 1.0,
    weight_decay: float = 0.0,
    kind: str = "adamw",
) -> torch.optim.Optimizer:
    """AdamW without a rate: `set_rate` sets it before each step."""
    masters = parameters if isinstance(parameters, Masters) else Masters(parameters)
    times = {"A": 1.0, "B": lora_plus_ratio, "flat": 1.0}
    groups = [
        {"name": name, "params": moved, "times": times[name], "weight_decay": 0.0 if name == "flat" else weight_decay}
        for name, moved in masters.moved.items()
    ]
    if kind == "adamw8bit":
        return AdamW8bit(groups, lr=0.0)
    if kind == "adamw_host":
        return AdamWHost(groups, lr=0.0)
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=fused)


class Buffer:
    """Parameters whose values, and whose gradients, lie one after the other in one piece of memory.

    They stay the parameters they were, under their names; only the place of their values has changed. `whole` is the
    piece as one parameter, for the optimiser.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        starts, size = [], 0
        for parameter in parameters:
            starts.append(size)
            size += -(-parameter.numel() // ALIGNED) * ALIGNED
        self.whole = nn.Parameter(parameters[0].new_zeros(size))
        self.whole.grad = torch.zeros_like(self.whole)
        self.members: list[tuple[nn.Parameter, Tensor]] = []  # and the place of each one's gradient
        for start, parameter in zip(starts, parameters, strict=True):
            place = slice(start, start + parameter.numel())
            values = self.whole.detach()[place].view(parameter.shape)
            values.copy_(parameter.detach())
            home = self.whole.grad[place].view(parameter.shape)
            if parameter.grad is not None:
                home.copy_(parameter.grad)
            parameter.data, parameter.grad = values, home
            self.members.append((parameter, home))

    def gather(self) -> None:
        """Bring gradients home that somebody put elsewhere; autograd itself adds to the one that is there."""
        for parameter, home in self.members:
            if parameter.grad is not home:
                home.zero_() if parameter.grad is None else home.copy_(parameter.grad)
                parameter.grad = home

    def zero(self) -> None:
        for parameter, home in self.members:
            parameter.grad = home
        self.whole.grad.zero_()  # type: ignore[union-attr]

    def release(self) -> None:
        """Give every parameter memory of its own again, so that the buffer dies with the training."""
        for parameter, _ in self.members:
            parameter.data, parameter.grad = parameter.detach().clone(), None


class Masters:
    """What AdamW moves: fp32 values, whatever type the model computes in.

    An fp32 parameter is its own master. One in bf16 (a head trained whole on a bf16 base, a bf16 model trained in full)
    has eight bits of mantissa, in which most steps of AdamW would be lost to rounding; it gets a master in fp32. Its
    gradients are added up there too, micro-batch by micro-batch, and the model gets the rounded value after each step.

    flat: one buffer for each group. An adapter is hundreds of small matrices; as one piece of memory they take one
    step of AdamW, one norm and one clip instead of hundreds.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, flat: bool = False) -> None:
        self.model = dict(parameters)
        self.values = {name: p if p.dtype.itemsize >= 4 else _master(p) for name, p in parameters.items()}
        self.apart = [(p, self.values[name]) for name, p in parameters.items() if self.values[name] is not p]
        self.buffers: list[Buffer] = []
        self.moved: dict[str, list[nn.Parameter]] = {}  # by group: what the optimiser is given
        for group, members in groups_of(self.values).items():
            own = list(members.values())
            if flat and len(own) > 1 and _fits_one_buffer(own):
                self.buffers.append(Buffer(own))
                own = [self.buffers[-1].whole]
            self.moved[group] = own

    def collect(self) -> None:
        """After a backward: the gradients of half-precision parameters move to their masters."""
        for parameter, master in self.apart:
            if parameter.grad is not None:
                gradient = parameter.grad.to(master.dtype)
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None
        for buffer in self.buffers:
            buffer.gather()

    @torch.no_grad()
    def publish(self) -> None:
        """After a step, or after values were put back: the model gets what its masters hold."""
        for parameter, master in self.apart:
            parameter.copy_(master)

    def zero_grad(self) -> None:
        for parameter in (*self.model.values(), *self.values.values()):
            parameter.grad = None
        for buffer in self.buffers:
            buffer.zero()

    def release(self) -> None:
        """The end of training: no gradient is held, and every parameter has memory of its own."""
        for buffer in self.buffers:
            buffer.release()
        self.buffers = []

    def norm(self) -> float:
        """The joint norm of all gradients."""
        return float(torch.stack(_foreach_norm(self._gradients())).norm()) if self._gradients() else 0.0

    def gradient_norms(self) -> Tensor:
        """The norm of each gradient, 0 where there is none, as one tensor on the device."""
        held = list(self.values.values())
        norms = iter(_foreach_norm([p.grad for p in held if p.grad is not None]))
        return torch.stack([next(norms) if p.grad is not None else p.new_zeros(()) for p in held])

    def clip(self, norm: float, limit: float) -> None:
        """Scale all gradients, whose joint norm is `norm`, down to `limit`. 0 is no limit."""
        if limit and norm > limit:
            torch._foreach_mul_(self._gradients(), limit / (norm + 1e-6))  # pyright: ignore[reportPrivateImportUsage]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for moved in self.moved.values() for p in moved if p.grad is not None]


def _fits_one_buffer(parameters: list[nn.Parameter]) -> bool:
    """Plain tensors of one type on one device; sharded ones (DTensor) keep their own memory."""
    kinds = {(type(p), p.dtype, p.device) for p in parameters}
    return len(kinds) == 1 and next(iter(kinds))[0] is nn.Parameter and not hasattr(parameters[0], "_local_tensor")


def _master(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to(torch.float32, copy=True))


def _foreach_norm(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch._foreach_norm(tensors) if tensors else ()  # pyright: ignore[reportPrivateImportUsage]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["times"]


class Projection:
    """LoRA-FA's gradient (arXiv:2308.03303 freezes A): of all steps that B can take, the one nearest to the full step.

    A step d of B moves the weight by s d A. The gradient G of the whole weight is known through g = s G A^T, B's own.
    |s d A - G| is smallest for

        d = G A^T (A A^T)^-1 / s = g (A A^T)^-1 / s^2

    A never changes, so the r x r inverse is taken once.
    """

    def __init__(self, model: nn.Module, name: str = "default") -> None:
        self.inverses = list(self._inverses(model, name))
        if not self.inverses:
            raise ConfigError(
                f"optimizer 'lora_fa' is for factors whose A is frozen, and adapter {name!r} has none",
                fix="delta='lora_fa', or another optimizer",
            )

    @staticmethod
    def _inverses(model: nn.Module, name: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for layer in sites(model, name).values():
            delta = adapter_of(layer, name).delta
            if isinstance(delta, LoraFA):
                a = delta.A.double()
                yield delta.B, (torch.linalg.pinv(a @ a.mT, hermitian=True) / delta.scale**2).to(delta.B.dtype)

    @torch.no_grad()
    def apply(self) -> None:
        """After the gradients of a step are all there."""
        for parameter, inverse in self.inverses:
            if parameter.grad is not None:
                parameter.grad.copy_(parameter.grad @ inverse)
