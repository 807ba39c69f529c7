"""Reading and writing a frozen weight, whatever it is stored as.

These three functions are the whole storage interface. A storage comes in one of two kinds and registers accordingly:

    by tensor type   the layer is a plain Linear whose weight is a clever tensor (torchao, bnb's Params4bit)  -> dense
    by layer type    the codes are packed in the layer (our NF4, INT8 and FP8 layers)       -> read_weight, write_weight

The rest of the core never asks what a weight is made of.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor, nn

__all__ = ["dense", "is_plain", "read_weight", "write_weight"]


@singledispatch
def dense(w: Tensor) -> Tensor:
    """The weight as an ordinary floating-point tensor; the same object when it is one already."""
    return w


@singledispatch
def read_weight(host: nn.Module) -> Tensor:
    """The frozen weight of `host` in the shape the layer itself uses, without any adapter."""
    raw = host._parameters.get("weight")  # not `host.weight`: in read mode that is W + dW
    return dense(host.weight if raw is None else raw)


@singledispatch
def write_weight(host: nn.Module, w: Tensor) -> None:
    """Store `w`, in the layer's own shape, as the frozen weight; values are rounded to what the storage can hold."""
    with torch.no_grad():
        raw = host._parameters.get("weight")
        (host.weight if raw is None else raw).copy_(w)


def is_plain(w: object) -> bool:
    """Whether `w` is an ordinary floating-point tensor or parameter: neither a tensor subclass nor packed integers."""
    return type(w) in (nn.Parameter, Tensor) and w.is_floating_point()  # type: ignore[attr-defined]
