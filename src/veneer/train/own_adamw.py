"""What our own kinds of AdamW share: the arguments of PyTorch's, and one parameter after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["OwnAdamW"]


class OwnAdamW(torch.optim.Optimizer, ABC):
    """AdamW (arXiv:1711.05101); a subclass says where its moments are and moves one parameter."""

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
                    self.move(parameter, group, place)
        return loss

    @abstractmethod
    def move(self, parameter: nn.Parameter, group: dict[str, Any], place: int) -> None:
        """One step of a parameter that has a gradient, in place. `place`: which of all it is, from 1."""
