"""A moving average of what is trained: steadier than the last step, and what is then saved, judged and painted with.

    after step t:   average <- d average + (1 - d) value,   d = min(decay, (1 + t) / (10 + t))

The decay grows into its own, as in diffusers and kohya's trainers, so that a short run is not held back at its start:
with 0.9999 from the first step on, a run of a thousand steps would still be nine tenths its beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Average", "decay_at"]


def decay_at(step: int, decay: float) -> float:
    """
    >>> decay_at(1, 0.999), decay_at(10**6, 0.999)
    (0.18181818181818182, 0.999)
    """
    return min(decay, (1 + step) / (10 + step))


class Average:
    """The average of `values`, in fp32 beside them."""

    def __init__(self, values: Mapping[str, nn.Parameter], decay: float) -> None:
        self.values, self.decay = values, decay
        self.held: dict[str, Tensor] = {name: value.detach().float().clone() for name, value in values.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After `step`, which counts from 1."""
        now = [value.detach() for value in self.values.values()]
        torch._foreach_lerp_(list(self.held.values()), now, 1 - decay_at(step, self.decay))  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def acting(self) -> Iterator[None]:
        """The values are the average's; afterwards their own again, bit for bit."""
        own = {name: value.detach().clone() for name, value in self.values.items()}
        self._put(self.held)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        return {name: value.clone() for name, value in self.held.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, value in self.held.items():
            value.copy_(state[name])
