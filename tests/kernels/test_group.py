"""Layers by hand: what a young adapter changes is not rounded away."""

from __future__ import annotations

import pytest
import torch

from veneer.kernels.group import Bare


@pytest.mark.parametrize("onto", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_change_below_the_spacing_of_half_precision_arrives_in_the_mean(onto: bool, biased: bool) -> None:
    torch.manual_seed(0)
    x, w, h = torch.randn(64, 1024), torch.randn(512, 1024) * 0.02, torch.randn(64, 16) * 0.6
    b, c = torch.randn(512, 16).sign() * 2e-4, torch.randn(64, 512)
    x, w, h, b, c = (t.bfloat16() for t in (x, w, h, b, c))
    bias = torch.randn(512).bfloat16() if biased else None
    layer = Bare(w, bias, [(torch.empty(16, 1024), b, 1.0)])
    exact = h.double() @ b.double().T
    base = x.double() @ w.double().T + (0 if bias is None else bias) + (c if onto else 0)
    y = layer.onto(c, x, h, b) if onto else layer.forward(x, h, b)
    arrives = ((y.double() - base) * exact).sum() / exact.square().sum()
    assert exact.abs().mean() < base.abs().mean() / 256  # half of what one place in bf16 is worth
    assert 0.9 < arrives < 1.1, arrives
