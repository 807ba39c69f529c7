"""Layers and pieces by hand: what a young adapter changes is not rounded away."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.kernels.group import Bare
from veneer.kernels.pieces import kernels_for

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def drawn(device: str, *shape: int, size: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * size).to(device, torch.bfloat16)


def arrives(y: Tensor, without: Tensor, exact: Tensor) -> float:
    """The share of an exact change that a rounded result has, against what the result would be without rounding."""
    return float(((y.double() - without) * exact).sum() / exact.square().sum())


def skip_without(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("onto", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_layers_change_below_the_spacing_of_half_precision(onto: bool, biased: bool, device: str) -> None:
    skip_without(device)
    torch.manual_seed(0)
    tokens, n, out = (64, 1024, 512) if device == "cpu" else (2048, 4096, 4096)
    x, w, h = drawn(device, tokens, n), drawn(device, out, n, size=0.02), drawn(device, tokens, 16, size=0.6)
    b, c = (drawn(device, out, 16).sign() * 2e-4).bfloat16(), drawn(device, tokens, out)
    bias = drawn(device, out) if biased else None
    layer = Bare(w, bias, [(torch.empty(16, n, device=device), b, 1.0)])
    exact = h.double() @ b.double().T
    base = x.double() @ w.double().T + (0 if bias is None else bias) + (c if onto else 0)
    y = layer.onto(c, x, h, b) if onto else layer.forward(x, h, b)
    assert exact.abs().mean() < base.abs().mean() / 256  # half of what one place in bf16 is worth
    assert arrives(y, base, exact) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_a_units_change_below_the_spacing_of_half_precision(act: str, device: str) -> None:
    skip_without(device)
    torch.manual_seed(0)
    gate, up, h = drawn(device, 512, 2048), drawn(device, 512, 2048), drawn(device, 512, 16, size=0.6)
    b = (drawn(device, 2048, 16).sign() * 2e-4).bfloat16()
    wide = gate.double(), up.double()
    thin = h.double() @ b.double().T
    without, moved = (kernels_for(wide[0]).glu(wide[0] + own, wide[1], act) for own in (0 * thin, thin))
    y, _ = kernels_for(gate).thin_glu(gate, up, act, (h, b), None)
    assert arrives(y, without, moved - without) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("device", DEVICES)
def test_a_change_of_what_is_rotated(device: str) -> None:
    skip_without(device)
    torch.manual_seed(0)
    x, h = drawn(device, 2, 256, 8, 64), drawn(device, 512, 16, size=0.6)
    b = (drawn(device, 512, 16).sign() * 2e-4).bfloat16()
    angle = torch.rand(256, 32, device=device).repeat(1, 2) * 6
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    wide, thin = x.double(), (h.double() @ b.double().T).view(x.shape)
    without, moved = (
        kernels_for(wide).rotate(wide + own, cos.double(), sin.double(), torch.empty_like(wide))
        for own in (0 * thin, thin)
    )
    y = kernels_for(x).rotate(x, cos, sin, torch.empty_like(x), thin=(h, b))
    assert arrives(y, without, moved - without) == pytest.approx(1, abs=0.1)
