"""What is watched while a run trains: the loss, how far the adapters have moved, and what it costs."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.model import adapter_of, adapters, sites

__all__ = ["Meter", "Movement", "Watchdog", "memory_bytes", "not_finite"]


class Watchdog:
    """Says when a loss has left the ground.

    NaN and infinity are clear. Otherwise the mean of the last few losses is held against the lowest such mean so far:
    above twice that plus two nats it has diverged. A noisy small batch does not get there, a model that forgot its
    language does (its loss nears the logarithm of the vocabulary, about 11).
    """

    WINDOW = 5

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=self.WINDOW)
        self.lowest = math.inf

    def verdict(self, loss: float, norm: float) -> str | None:
        """Take in a step; the reason if it is one too many."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm}"
        self.recent.append(loss)
        if len(self.recent) < self.WINDOW:
            return None
        mean = sum(self.recent) / self.WINDOW
        self.lowest = min(self.lowest, mean)
        if mean > 2 * self.lowest + 2:
            return f"the mean loss of the last {self.WINDOW} steps rose from {self.lowest:.3g} to {mean:.3g}"
        return None

    @property
    def is_calm(self) -> bool:
        """Whether this is a state worth going back to."""
        return not self.recent or sum(self.recent) / len(self.recent) <= 1.3 * self.lowest + 0.5

    def state(self) -> dict[str, Any]:
        return {"recent": list(self.recent), "lowest": self.lowest}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.recent = deque(state["recent"], maxlen=self.WINDOW)
        self.lowest = state["lowest"]


class Movement:
    """|dW| of every adapted layer (Frobenius, from the factors, dW never formed) and how far dW went since the start.

    The distance from the start needs the start only where that was not zero: |dW - dW0| is the norm of the pair
    [A; A0], [B, -B0], and a fresh adapter's dW0 is 0.
    """

    def __init__(self, model: nn.Module, name: str = "default") -> None:
        layers = sites(model, name) if name in adapters(model) else {}
        found = {site: adapter_of(layer, name).delta for site, layer in layers.items()}
        self.deltas = {site: delta for site, delta in found.items() if delta is not None}  # None: only a bias learns
        moved = {site: delta for site, delta in self.deltas.items() if delta.norm() > 0}
        self.start = {site: [f.detach().clone() for f in delta.factors()] for site, delta in moved.items()}

    def now(self) -> dict[str, dict[str, float]]:
        if not self.deltas:
            return {}
        norms = {site: delta.norm() for site, delta in self.deltas.items()}
        return {"dw": norms, "dw_change": {site: self._change(site, norm) for site, norm in norms.items()}}

    def _change(self, site: str, norm: float) -> float:
        if site not in self.start:
            return norm
        (a, b), (a0, b0) = self.deltas[site].factors(), self.start[site]
        return frobenius(torch.cat([a.detach(), a0], -2), torch.cat([b.detach(), -b0], -1), self.deltas[site].scale)


def frobenius(a: Tensor, b: Tensor, scale: float) -> float:
    """|s B A| = s sqrt(trace(B^T B A A^T)): r x r work.

    >>> a, b = torch.randn(2, 5), torch.randn(4, 2)
    >>> abs(frobenius(a, b, 3.0) - float((3 * b @ a).norm())) < 1e-4
    True
    """
    a, b = a.double(), b.double()
    return abs(scale) * math.sqrt(max(float(((b.mT @ b) * (a @ a.mT)).sum()), 0.0))


class Meter:
    """Tokens per second since it was last read. Waiting for evaluation and saves is not counted."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.since, self.tokens, self.trained = time.perf_counter(), 0, 0

    def add(self, tokens: int, trained: int) -> None:
        self.tokens += tokens
        self.trained += trained

    def read(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.since, 1e-9)
        found = {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "trained_tokens_per_second": round(self.trained / seconds, 1),
        }
        self.restart()
        return found


def memory_bytes(device: torch.device) -> int:
    """The most memory used so far: what PyTorch allocated on a GPU, what the process held on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold NaN or infinity: the first thing to know when a loss is NaN before any step."""
    return [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
