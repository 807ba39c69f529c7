"""A proof looks, it does not touch: whatever it has to change on a model is as it was when it ends.

Proofs run at the end of a training that took hours, on the very object that is saved, chatted with or trained on next.
So one context manager holds everything a proof may disturb, and gives it back also when a check raises.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from veneer.core.host import Hosted, original_class
from veneer.core.leaf import Reading, original
from veneer.core.model import active_of, adapters, detach

__all__ = ["as_found", "bare", "spare"]


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Modes, gradients, what requires them, random state and active adapters are afterwards what they were before."""
    modes = [(module, module.training) for module in model.modules()]
    leaves = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    active = active_of(model) if adapters(model) else None
    acting = (active.names, active.mix) if active is not None else None
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=_gpus(model)):
            for p, _, _ in leaves:
                p.grad = None
            model.eval()
            yield
    finally:
        random.setstate(state)
        for module, training in modes:
            module.training = training
        for p, grad, required in leaves:
            p.requires_grad_(required)
            p.grad = grad
        if active is not None and acting is not None:
            active.change(*acting)


def _gpus(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


@contextmanager
def spare(model: nn.Module, wanted: str) -> Iterator[str]:
    """A free adapter name; whatever is attached under it goes when the block ends."""
    name = next(n for n in (wanted, *(f"{wanted}_{k}" for k in range(2, 1000))) if n not in adapters(model))
    try:
        yield name
    finally:
        if name in adapters(model):
            detach(model, name)


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Every adapted layer as it was before Veneer touched it: its own class, its own forward. Until the block ends.

    This is a base that no line of the adapters' code can colour, and so the thing to hold `disabled` against.
    """
    hosts = [layer for layer in model.modules() if isinstance(layer, Hosted | Reading)]
    held = [(type(layer), vars(layer).get("forward"), layer._modules["lora"]) for layer in hosts]
    try:
        for layer in hosts:
            layer.__class__ = original(original_class(type(layer)))
            del layer._modules["lora"]  # a Sequential would take it for one more layer
            vars(layer).pop("forward", None)
            if "inner_forward" in vars(layer):
                layer.forward = vars(layer)["inner_forward"]
        yield
    finally:
        for layer, (kind, forward, lora) in zip(hosts, held, strict=True):
            vars(layer).pop("forward", None)
            layer.__class__ = kind  # type: ignore[assignment]
            layer._modules["lora"] = lora
            if forward is not None:
                layer.forward = forward
