"""What the tests of the loop share: rows, settings at toy size, a listener, and ways to look at what a run left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.train.run import Run

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
ROWS = [{"prompt": f"say {word}", "completion": f"{word} " * (1 + i % 4) + "!"} for i, word in enumerate(WORDS)]
TINY: dict[str, Any] = {"r": 2, "lr": 5e-3, "batch_size": 4, "val": 2, "steps": 8, "eval_every": 4, "save_every": 2}


class Heard(list[dict[str, Any]]):
    """A listener that keeps what it is told; `wishes` maps a step to what is asked for after it."""

    def __init__(self, wishes: dict[int, str] | None = None) -> None:
        super().__init__()
        self.wishes = wishes or {}

    def __call__(self, event: dict[str, Any]) -> str | None:
        self.append(event)
        return self.wishes.get(event["step"]) if event["event"] == "step" else None

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self if event["event"] == kind]

    @property
    def losses(self) -> list[float]:
        return [event["loss"] for event in self.of("step")]


def adapter_bytes(run: Run) -> dict[str, bytes]:
    """The files that hold what was learned, of the best and of the last checkpoint."""
    names = ("adapter_model.safetensors", "adapter_config.json")
    return {f"{folder.name}/{name}": (folder / name).read_bytes() for folder in (run.best, run.last) for name in names}


def figures(run: Run) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    timed = ("seconds", "tokens_per_second", "trained_tokens_per_second", "memory_bytes")
    return [{name: value for name, value in row.items() if name not in timed} for row in run.metrics()]


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
