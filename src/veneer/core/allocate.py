"""AdaLoRA's budget: which singular values of which layers may stay (arXiv:2303.10512, sections 3.2 and 3.3).

    after each backward      I = |w dL/dw| for every entry of A, B and E; its running mean and the running mean of how
                             much it varies are multiplied: sensitivity that is there and is sure         (eqs. 8-11)
    a triplet's score        E_i's own + the mean over A_i's row + the mean over B_i's column                  (eq. 7)
    every few steps          the best b(t) triplets of all layers stay, the others' E is set to zero           (eq. 6)
    the budget b(t)          all ranks at first, then down along a cubic to the target, then the target        (eq. 12)

A triplet whose E was zeroed still gets gradients and may come back, until the last phase fixes the choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.deltas.adalora import AdaLora
from veneer.core.model import adapter_of, sites
from veneer.errors import ConfigError

__all__ = ["RankAllocator"]


class RankAllocator:
    """Shares a falling budget of ranks among the layers of an AdaLoRA adapter while it is trained."""

    def __init__(
        self,
        model: nn.Module,
        name: str = "default",
        *,
        target_rank: float,
        total_steps: int,
        warmup: int,
        final: int,
        every: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orthogonality: float = 0.5,
    ) -> None:
        layers: dict[str, Any] = {site: adapter_of(layer, name).delta for site, layer in sites(model, name).items()}
        self.deltas: dict[str, AdaLora] = {site: d for site, d in layers.items() if isinstance(d, AdaLora)}
        problems = []
        if not self.deltas:
            problems.append(f"adapter {name!r} has no layer with delta 'adalora'")
        if warmup + final >= total_steps:
            problems.append(f"{warmup} first and {final} last steps leave no step of {total_steps} to shrink in")
        if not 0 < target_rank <= max((d.rank for d in self.deltas.values()), default=target_rank):
            problems.append(f"target_rank={target_rank} is not between 0 and the rank that the adapter starts with")
        if problems:
            raise ConfigError("ranks cannot be shared out so", problems=problems)
        self.target = round(target_rank * len(self.deltas))
        self.start = sum(d.rank for d in self.deltas.values())
        self.total_steps, self.warmup, self.final, self.every = total_steps, warmup, final, every
        self.beta1, self.beta2, self.orthogonality = beta1, beta2, orthogonality
        self.mean: dict[str, Tensor] = {}  # of I, by "site.A" and so on
        self.spread: dict[str, Tensor] = {}  # of |I - mean|
        self.chosen: dict[str, Tensor] | None = None  # which triplets stay, once that is fixed

    def budget(self, step: int) -> int:
        """Triplets that may stay after `step` (eq. 12)."""
        if step < self.warmup:
            return self.start
        if step >= self.total_steps - self.final:
            return self.target
        left = 1 - (step - self.warmup) / (self.total_steps - self.warmup - self.final)
        return round(self.target + (self.start - self.target) * left**3)

    def penalty(self) -> Tensor:
        """To add to the loss: orthogonal rows of A and columns of B make entries of E comparable (eq. 4)."""
        terms = [delta.orthogonality() for delta in self.deltas.values()]
        return self.orthogonality * torch.stack(terms).mean()

    @torch.no_grad()
    def observe(self) -> None:
        """After backward, before the optimiser's step: bring the running means up to date."""
        for key, p in self._entries():
            if p.grad is None:
                continue
            importance = (p * p.grad).abs()
            mean = self.mean.setdefault(key, torch.zeros_like(p))
            spread = self.spread.setdefault(key, torch.zeros_like(p))
            mean.lerp_(importance, 1 - self.beta1)
            spread.lerp_((importance - mean).abs(), 1 - self.beta2)

    @torch.no_grad()
    def allocate(self, step: int) -> dict[str, int] | None:
        """After the optimiser's step `step` (the first is 1): zero what lost its place. The ranks, if it did."""
        if step < self.warmup:
            return None
        if step >= self.total_steps - self.final:
            self.chosen = self.chosen or self._choose(self.target)
            self._apply(self.chosen)
            return self.ranks()
        if step % self.every:
            return None
        self._apply(self._choose(self.budget(step)))
        return self.ranks()

    def ranks(self) -> dict[str, int]:
        return {site: delta.real_rank for site, delta in self.deltas.items()}

    def scores(self) -> dict[str, Tensor]:
        """One number for each triplet of each layer (eq. 7)."""
        found = {}
        for site in self.deltas:
            sure = {part: self.mean[f"{site}.{part}"] * self.spread[f"{site}.{part}"] for part in "ABE"}
            found[site] = sure["E"][:, 0] + sure["A"].mean(1) + sure["B"].mean(0)
        return found

    def _choose(self, budget: int) -> dict[str, Tensor]:
        scores = self.scores()
        ranked = torch.cat(list(scores.values())).argsort(descending=True, stable=True)
        stays = torch.zeros(len(ranked), dtype=torch.bool)
        stays[ranked[:budget].cpu()] = True
        return dict(zip(scores, stays.split([len(s) for s in scores.values()]), strict=True))

    def _apply(self, chosen: Mapping[str, Tensor]) -> None:
        for site, stays in chosen.items():
            self.deltas[site].E[~stays.to(self.deltas[site].E.device)] = 0

    def _entries(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{site}.{part}", getattr(delta, part)) for site, delta in self.deltas.items() for part in "ABE"]

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "spread": self.spread, "chosen": self.chosen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean, self.spread, self.chosen = dict(state["mean"]), dict(state["spread"]), state["chosen"]
