"""create_loraplus_optimizer: the groups of LoRA+ under PEFT's name (arXiv:2402.12354).

    A, whole weights            lr                          loraplus_weight_decay
    both factors of embeddings  loraplus_lr_embedding       loraplus_weight_decay
    B, magnitudes               lr x loraplus_lr_ratio      loraplus_weight_decay
    biases                      lr x loraplus_lr_ratio      none

A parameter's role is its name in its own delta, never a part of a module's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from veneer.core.host import NORMS
from veneer.core.model import adapters, parameters, sites
from veneer.core.op import op_for

__all__ = ["create_loraplus_optimizer"]


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """`optimizer_cls` over all trained parameters of the model's adapters. kwargs: the optimizer's own arguments."""
    groups: dict[str, dict[str, Any]] = {
        "A": {"params": [], "lr": lr, "weight_decay": loraplus_weight_decay},
        "embedding": {"params": [], "lr": loraplus_lr_embedding, "weight_decay": loraplus_weight_decay},
        "B": {"params": [], "lr": lr * loraplus_lr_ratio, "weight_decay": loraplus_weight_decay},
        "B without decay": {"params": [], "lr": lr * loraplus_lr_ratio, "weight_decay": 0.0},
    }
    layers = sites(model)
    for adapter in adapters(model):
        for name, parameter in parameters(model, adapter).items():
            if parameter.requires_grad:
                site, _, part = name.partition(f".lora.{adapter}.")
                groups[_role(layers.get(site), part, parameter)]["params"].append(parameter)
    return optimizer_cls(list(groups.values()), lr=lr, **kwargs)


def _role(layer: nn.Module | None, part: str, parameter: nn.Parameter) -> str:
    op = op_for(type(layer)) if layer is not None else None
    if op is not None and op.looks_up and part.startswith("delta."):
        return "embedding"
    if part == "bias" or part.endswith(".bias") or isinstance(layer, NORMS):
        return "B without decay"
    return "B" if part == "delta.B" or parameter.ndim == 1 else "A"
