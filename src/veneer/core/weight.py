"""Reading and writing a frozen weight, whatever it is stored as.

Three functions are the whole storage interface. A storage comes in one of two kinds and registers accordingly:

    by tensor type   the layer is a plain Linear whose weight is a clever tensor (torchao, bnb's Params4bit)  -> dense
    by layer type    the codes are packed in the layer (our NF4, INT8 and FP8 layers)       -> read_weight, write_weight

A storage that cannot be written in place says so through `is_packed`, which is asked before anything is merged. The
rest of the core never asks what a weight is made of.

Types of other packages are not imported to be known: ELSEWHERE names what knows them, and it is
asked when the first such weight is met.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import StateError, TargetError

__all__ = ["ELSEWHERE", "UNPACK_FIRST", "dense", "is_packed", "is_plain", "read_weight", "write_weight"]

ELSEWHERE = {
    package: f"veneer.quant.foreign:register_{package}" for package in ("bitsandbytes", "torchao", "gptqmodel")
}  # the package a class comes from -> what registers its types with the functions below
UNPACK_FIRST = (
    "veneer.dequantize(model, torch.float32) first and merge then, or merge into the full-precision base on disk "
    "(veneer.merge_to_disk)"
)


@singledispatch
def dense(w: Tensor) -> Tensor:
    """The weight as an ordinary floating-point tensor; the same object when it is one already."""
    if is_plain(w):  # first, for a compiler cannot follow the questions below
        return w
    known = _known_now(dense, w)
    if known is not None:
        return known(w)
    if _homes(w):
        raise TargetError(f"a {type(w).__name__} does not say how it unpacks", fix="load the unpacked weights instead")
    return w


@singledispatch
def read_weight(host: nn.Module) -> Tensor:
    """The frozen weight of `host` in the shape the layer itself uses, without any adapter."""
    raw = host._parameters.get("weight")  # not `host.weight`: in read mode that is W + dW
    known = None if is_plain(raw) else _known_now(read_weight, host)
    return known(host) if known is not None else dense(host.weight if raw is None else raw)


@singledispatch
def write_weight(host: nn.Module, w: Tensor) -> None:
    """Store `w`, in the layer's own shape, as the frozen weight; values are rounded to what the storage can hold."""
    if (kind := is_packed(host)) is not None:
        raise StateError(
            f"a weight that is packed ({kind}) is not written in place: most of what is written would be rounded away",
            fix=UNPACK_FIRST,
        )
    with torch.no_grad():
        raw = host._parameters.get("weight")
        (host.weight if raw is None else raw).copy_(w)


@singledispatch
def is_packed(host: nn.Module) -> str | None:
    """What the weight is packed in, where it cannot be written in place without losing what is written."""
    raw = host._parameters.get("weight")
    known = None if is_plain(raw) else _known_now(is_packed, host)
    if known is not None:
        return known(host)
    return type(raw).__name__ if _homes(raw) else None


def is_plain(w: object) -> bool:
    """Whether `w` is an ordinary floating-point tensor or parameter: neither a tensor subclass nor packed in 8 bits."""
    ordinary = type(w) in (nn.Parameter, Tensor) and w.is_floating_point()  # type: ignore[attr-defined]
    return ordinary and w.dtype.itemsize > 1  # type: ignore[attr-defined]


def _known_now(function: Any, thing: object) -> Callable[..., Any] | None:
    """The handler for a type from elsewhere, if importing the module that knows it brought one."""
    before = function.dispatch(type(thing))
    homes = _homes(thing)
    if isinstance(thing, nn.Module):  # perhaps an ordinary layer around somebody's tensor
        homes |= _homes(thing._parameters.get("weight"))
    for home in homes:
        module, _, register = home.partition(":")
        try:
            getattr(import_module(module), register)()
        except ImportError as error:
            package = register.removeprefix("register_")
            raise TargetError(
                f"a weight that {package} packed cannot be read, for {package} cannot be imported: {error}",
                fix=f"pip install {package}, or load the unpacked weights",
            ) from error
    found = function.dispatch(type(thing))
    return None if found is before else found


def _homes(thing: object) -> set[str]:
    packages = {base.__module__.partition(".")[0] for base in type(thing).__mro__}
    return {ELSEWHERE[package] for package in packages & ELSEWHERE.keys()}
