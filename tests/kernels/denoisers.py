"""What the laws of both kinds of denoisers share: weights that hide nothing, one pass and all that comes of it, and how
near two of them must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import veneer
from veneer import LoRA
from veneer.core.model import parameters

__all__ = ["adapted", "agree", "distance", "gone_through", "shifted", "spread"]

NEAR = 1e-5  # diffusers embeds the time, and some transformers turn their heads, in fp32


def shifted(model: nn.Module) -> nn.Module:
    """Biases start at zero and gains at one; what is forgotten must show."""
    for p in model.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, 0.5, 0.3)
    return model


def adapted(model: nn.Module, targets: Any, **spec: Any) -> nn.Module:
    veneer.attach(model, LoRA(rank=3, alpha=6, targets=targets, **spec))
    return spread(model)


def spread(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for p in parameters(model).values():
        nn.init.normal_(p, std=0.2)
    return model.train()


def gone_through(model: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """The output and all gradients, from a fixed place in the random numbers; the text's, too, if it wants one."""
    for p in model.parameters():
        p.grad = None
    torch.manual_seed(3)
    y = model(**given).sample
    (y.double() * torch.cos(y.detach().double())).sum().backward()
    found = {"y": y.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
    text = given["encoder_hidden_states"]
    return found | ({"text": text.grad} if text.requires_grad else {})


def distance(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert got.keys() == wanted.keys()
    off = sum(float((got[n].double() - w.double()).square().sum()) for n, w in wanted.items())
    return (off / sum(float(w.double().square().sum()) for w in wanted.values())) ** 0.5


def agree(got: dict[str, Tensor], wanted: dict[str, Tensor], near: float = NEAR) -> None:
    """Each by itself."""
    assert got.keys() == wanted.keys()
    assert len(wanted) > 1
    largest = max(float(value.double().norm()) for value in wanted.values())
    for name, value in wanted.items():
        off = (got[name].double() - value.double()).norm() / max(float(value.double().norm()), 1e-6 * largest)
        assert off <= near, f"{name} is off by {off:.2g}"
