"""An adapted model compiles to one graph, with the outputs and gradients of the model that runs plainly.

In a process of its own: the shape checks that tests put around every function are not for a compiler to read.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import torch, veneer
from torch import nn
from veneer import LoRA
from veneer.core.model import parameters

for rows in (2, 4096):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    veneer.attach(model, LoRA(rank=2, targets=["0", "2"], combine="COMBINE"))
    mine = list(parameters(model).values())
    for p in mine:
        nn.init.normal_(p, std=0.3)
    x = torch.randn(rows, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    wanted = torch.autograd.grad(model(x).square().sum(), mine)
    got = torch.autograd.grad(compiled(x).square().sum(), mine)
    torch.testing.assert_close(compiled(x), model(x))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with veneer.disabled(model):
        torch.testing.assert_close(compiled(x), model(x))
print("one graph")
"""


@pytest.mark.parametrize("combine", ["add", "dora"])
def test_an_adapted_model_compiles_to_one_graph_with_equal_gradients(combine: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.replace("COMBINE", combine)], capture_output=True, text=True)
    assert done.stdout.strip() == "one graph", done.stderr[-2000:]
