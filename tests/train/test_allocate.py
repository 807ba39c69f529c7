"""AdaLoRA's budget: the schedule is the paper's, the ranks end at the target, and they go where they are needed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import veneer
from veneer import LoRA
from veneer.core.allocate import RankAllocator
from veneer.core.model import adapter_of, parameters, sites
from veneer.errors import ConfigError

STEPS = 60


def setup() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Two layers in parallel; only the first has anything to learn, of rank 3."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.needed, self.idle = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.needed(x) + 0.01 * self.idle(x)

    model, x = Two(), torch.randn(64, 12)
    with torch.no_grad():
        y = model(x) + x @ torch.randn(12, 3) @ torch.randn(3, 12)
    return model, x, y


def train(model: nn.Module, allocator: RankAllocator, x: torch.Tensor, y: torch.Tensor, start: int = 0) -> list[float]:
    optimizer, losses = torch.optim.Adam(parameters(model).values(), lr=0.05), []
    for step in range(start + 1, STEPS + 1):
        loss = (model(x) - y).square().mean()
        (loss + 0.01 * allocator.penalty()).backward()
        allocator.observe()
        optimizer.step()
        optimizer.zero_grad()
        allocator.allocate(step)
        losses.append(float(loss.detach()))
    return losses


def allocator_for(model: nn.Module) -> RankAllocator:
    return RankAllocator(model, target_rank=2, total_steps=STEPS, warmup=10, final=10, every=5)


def test_the_budget_falls_along_the_cubic() -> None:
    model, *_ = setup()
    veneer.attach(model, LoRA(rank=6, alpha=6, delta="adalora"))
    budget = [allocator_for(model).budget(t) for t in range(STEPS + 1)]
    assert budget[:10] == [12] * 10 and budget[50:] == [4] * 11
    assert all(a >= b for a, b in itertools.pairwise(budget))
    assert budget[30] == round(4 + 8 * 0.5**3)


def test_ranks_end_at_the_target_where_they_are_needed() -> None:
    model, x, y = setup()
    veneer.attach(model, LoRA(rank=6, alpha=6, delta="adalora"))
    allocator = allocator_for(model)
    losses = train(model, allocator, x, y)
    ranks = allocator.ranks()
    assert sum(ranks.values()) == 4 and ranks["needed"] >= 3
    assert losses[-1] < 0.1 * losses[0]
    for site, layer in sites(model).items():
        delta = adapter_of(layer).delta
        assert int(torch.linalg.matrix_rank(delta.weight().detach(), rtol=1e-6)) <= ranks[site]


def test_state_survives_a_stop() -> None:
    results = []
    for stop in (None, 30):
        model, x, y = setup()
        torch.manual_seed(1)
        veneer.attach(model, LoRA(rank=6, alpha=6, delta="adalora"))
        allocator = allocator_for(model)
        train(model, allocator, x, y)
        if stop:
            fresh = allocator_for(model)
            fresh.load_state_dict(allocator.state_dict())
            assert all(torch.equal(fresh.scores()[s], v) for s, v in allocator.scores().items())
            allocator = fresh
        allocator.allocate(STEPS)
        results.append(allocator.ranks())
    assert results[0] == results[1]


def test_impossible_plans_are_refused() -> None:
    model, *_ = setup()
    veneer.attach(model, LoRA(rank=4, delta="adalora"))
    with pytest.raises(ConfigError) as error:
        RankAllocator(model, target_rank=9, total_steps=10, warmup=6, final=6)
    assert len(error.value.problems) == 2
    plain, *_ = setup()
    veneer.attach(plain, LoRA(rank=4))
    with pytest.raises(ConfigError, match="adalora"):
        RankAllocator(plain, target_rank=2, total_steps=10, warmup=1, final=1)
