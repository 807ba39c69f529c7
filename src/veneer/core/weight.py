"""Reading and writing a frozen weight, whatever it is stored as.

Three functions are the whole storage interface. A storage comes in one of two kinds and registers accordingly:

    by tensor type   the layer is a plain Linear whose weight is a clever tensor (torchao, bnb's Params4bit)  -> dense
    by layer type    the codes are packed in the layer (our NF4, INT8 and FP8 layers)       -> read_weight, write_weight

A storage that cannot be written in place says so through `is_packed`, which is asked before anything is merged. The
rest of the core never asks what a weight is made of.

Types of other packages are not imported to be known: ELSEWHERE names the module of ours that knows them, and it is
imported when the first such weight is met.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ELSEWHERE", "dense", "is_packed", "is_plain", "read_weight", "write_weight"]

ELSEWHERE: dict[str, str] = dict.fromkeys(
    ("bitsandbytes", "torchao", "gptqmodel", "auto_gptq", "awq"), "veneer.quant.foreign"
)  # the package a class comes from -> the module that registers its types with the functions below


@singledispatch
def dense(w: Tensor) -> Tensor:
    """The weight as an ordinary floating-point tensor; the same object when it is one already."""
    known = None if is_plain(w) else _known_now(dense, w)
    return w if known is None else known(w)


@singledispatch
def read_weight(host: nn.Module) -> Tensor:
    """The frozen weight of `host` in the shape the layer itself uses, without any adapter."""
    raw = host._parameters.get("weight")  # not `host.weight`: in read mode that is W + dW
    known = None if is_plain(raw) else _known_now(read_weight, host)
    return known(host) if known is not None else dense(host.weight if raw is None else raw)


@singledispatch
def write_weight(host: nn.Module, w: Tensor) -> None:
    """Store `w`, in the layer's own shape, as the frozen weight; values are rounded to what the storage can hold."""
    with torch.no_grad():
        raw = host._parameters.get("weight")
        (host.weight if raw is None else raw).copy_(w)


@singledispatch
def is_packed(host: nn.Module) -> str | None:
    """What the weight is packed in, where it cannot be written in place without losing what is written."""
    known = None if is_plain(host._parameters.get("weight")) else _known_now(is_packed, host)
    return None if known is None else known(host)


def is_plain(w: object) -> bool:
    """Whether `w` is an ordinary floating-point tensor or parameter: neither a tensor subclass nor packed in 8 bits."""
    ordinary = type(w) in (nn.Parameter, Tensor) and w.is_floating_point()  # type: ignore[attr-defined]
    return ordinary and w.dtype.itemsize > 1  # type: ignore[attr-defined]


def _known_now(function: Any, thing: object) -> Callable[..., Any] | None:
    """The handler for a type from elsewhere, if importing the module that knows it brought one."""
    before = function.dispatch(type(thing))
    homes = {ELSEWHERE.get(base.__module__.partition(".")[0]) for base in type(thing).__mro__}
    if isinstance(thing, nn.Module):  # an ordinary layer around somebody's tensor
        homes |= {ELSEWHERE.get(type(p).__module__.partition(".")[0]) for p in thing._parameters.values()}
    for home in homes - {None}:
        import_module(home)  # type: ignore[arg-type]
    found = function.dispatch(type(thing))
    return None if found is before else found
