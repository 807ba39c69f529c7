"""What a layer keeps for its backward pass: what the papers promise, and gradients that are right without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer import LoRA
from veneer.core.deltas.loha import Hadamard
from veneer.core.model import parameters

ROWS, WIDTH, RANK = 512, 256, 4
X_BYTES, W_BYTES = 4 * ROWS * WIDTH, 4 * WIDTH * WIDTH


def kept(delta: str, x: Tensor) -> int:
    """Bytes that autograd keeps for one layer, parameters and the layer's own input not counted unless it is saved."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    veneer.attach(model, LoRA(rank=RANK, alpha=8, targets=["0"], delta=delta))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    y.sum().backward()
    assert all(p.grad is not None for p in parameters(model).values())
    return sum(held.values())


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_a_frozen_a_keeps_no_input(needs_gradient: bool) -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=needs_gradient)
    h = 4 * ROWS * RANK
    assert kept("lora", x) == X_BYTES + h
    assert kept("lora_fa", x) == h


def test_loha_keeps_one_matrix_of_the_size_of_w() -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    assert kept("loha", x) <= X_BYTES + W_BYTES


def test_the_product_of_products_has_its_gradient() -> None:
    factors = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 2), (2, 7), (5, 2), (2, 7))
    ]
    assert torch.autograd.gradcheck(Hadamard.apply, factors)
