"""A file says the same whether its adapter is merged at the moment or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import veneer
from veneer import LoRA
from veneer.core.model import parameters


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("combine", ["add", "dora"])
def test_saving_while_merged_writes_what_saving_unmerged_writes(tmp_path: Path, bias: str, combine: str) -> None:
    model, x = Net(), torch.randn(3, 6)
    veneer.attach(model, LoRA(rank=2, targets=["one"], bias=bias, combine=combine))
    with torch.no_grad():
        for p in parameters(model).values():
            p.add_(0.1 * torch.randn_like(p))
    y = model(x)
    veneer.merge(model)
    merged = model(x)
    veneer.save(model, tmp_path)
    assert torch.equal(model(x), merged), "still merged"
    other = Net()
    veneer.load(other, tmp_path)
    torch.testing.assert_close(other(x), y)
