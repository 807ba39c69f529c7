"""One layer of each kind, and every way to store it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import veneer
from veneer.core.model import parameters
from veneer.core.op import op_of
from veneer.core.weight import read_weight

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 16), (3, 5, 24)),
    "linear-odd": (lambda: nn.Linear(13, 7), (9, 13)),  # 91 weights: half a byte and a short block
    "linear-no-bias": (lambda: nn.Linear(64, 16, bias=False), (40, 64)),
    "hf-conv1d": (lambda: Conv1D(16, 24), (3, 5, 24)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, dilation=2, padding="same", padding_mode="circular"), (2, 6, 9)),
    "conv2d-grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, bias=False), (2, 8, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 2, stride=(1, 2, 1), groups=2), (2, 4, 4, 5, 4)),
    "embedding": (lambda: nn.Embedding(14, 8, padding_idx=0), (3, 5)),
    "embedding-in-blocks": (lambda: nn.Embedding(14, 64), (3, 5)),
}
STORAGES: dict[str, dict[str, Any]] = {
    "nf4": {"kind": "nf4"},
    "nf4-single": {"kind": "nf4", "double": False, "block": 32},
    "int8": {"kind": "int8"},
    "int8-unpacked": {"kind": "int8", "dynamic": False},
    "int8-as-it-is": {"kind": "int8", "rotate": False},
    "int8-outliers": {"kind": "int8", "outliers": 2.0},
    "fp8": {"kind": "fp8"},
    "fp8-as-it-is": {"kind": "fp8", "rotate": False},
    "fp8-outliers": {"kind": "fp8", "outliers": 2.0},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
ROUNDED = 2e-2  # inputs in 8 bits


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def make(kind: str, dtype: torch.dtype) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    net = Net(build()).to(dtype)
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randint(0, 14, shape) if kind.startswith("embedding") else torch.randn(shape).to(dtype)
    return net, x


def pack(net: nn.Module, storage: str) -> veneer.quant.model.Quantized:  # type: ignore[name-defined]
    return veneer.quantize(net, **STORAGES[storage], targets=["layer"])


def spread(net: nn.Module, name: str | None = None) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in parameters(net, name).values():
            p.add_(torch.randn_like(p) * 0.3)


def dense_twin(net: Net, original: nn.Module) -> nn.Module:
    """The plain layer in double precision with the weight that the packed one stands for, and its adapter's change."""
    plain, op = copy.deepcopy(original).double(), op_of(original)
    w = op.to_matrix(plain, read_weight(net.layer).double())
    slots = getattr(net.layer, "slots", {})
    if "default" in slots:
        adapter = copy.deepcopy(slots["default"]).double()
        w = adapter.weight(w).detach()
    plain.weight = nn.Parameter(op.to_weight(plain, w).contiguous())
    return plain


def run_twin(plain: nn.Module, x: Tensor) -> Tensor:
    return plain(x if not x.is_floating_point() else x.double()).detach()


def tolerance(storage: str, dtype: torch.dtype, kind: str) -> float:
    rounds = storage in ("int8", "int8-as-it-is", "int8-outliers") and ("linear" in kind or kind == "hf-conv1d")
    return max(CLOSE[dtype], ROUNDED) if rounds else CLOSE[dtype]


def error(y: Tensor, wanted: Tensor) -> float:
    return float((y.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())
