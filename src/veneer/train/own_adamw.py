"""What our own kinds of AdamW share: the arguments of PyTorch's, and one parameter after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OwnAdamW"]


class OwnAdamW(torch.optim.Optimizer, ABC):
    """AdamW (arXiv:1711.05101); a subclass says what its moments are and how they move."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._update(parameter, group, place)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            state.update(self.fresh(parameter))
        state["step"] += 1
        values = parameter.reshape(-1)
        self.move(values, parameter.grad.reshape(-1), state, group, place)  # type: ignore[union-attr]
        if values.data_ptr() != parameter.data_ptr():  # a parameter that is no plain run of memory was copied
            parameter.copy_(values.view_as(parameter))

    @abstractmethod
    def fresh(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The state before the first step; its "step" is counted here."""

    @abstractmethod
    def move(self, values: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], place: int) -> None:
        """One step of a parameter as one run of numbers, in place. `place`: which of all it is, from 1."""
