"""Veneer: low-rank adaptation for frozen models.

The names below are imported when they are first used: `import veneer` costs milliseconds and does not load torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "LoRA": "veneer.core.spec",
    **dict.fromkeys(
        (
            "activate",
            "adapters",
            "attach",
            "check_alive",
            "detach",
            "disabled",
            "routed",
            "summary",
            "unmerge",
        ),
        "veneer.core.model",
    ),
    "merge": "veneer.core.model",
    **dict.fromkeys(("dequantize", "quantize"), "veneer.quant.model"),
    "adopt": "veneer.quant.foreign",
    **dict.fromkeys(("fuse", "unfuse"), "veneer.kernels.fuse"),
    **dict.fromkeys(("combine", "convert", "extract", "resize"), "veneer.core.mixing"),
    "Pool": "veneer.ckpt.pool",
    "swap": "veneer.ckpt.pool",
    "save": "veneer.ckpt.peft",
    "load": "veneer.ckpt.peft",
    **dict.fromkeys(("load_shared", "save_shared"), "veneer.ckpt.shared"),
    "merge_to_disk": "veneer.ckpt.stream",
    "save_bitsandbytes": "veneer.ckpt.bnb",
    "train": "veneer.train.loop",
    "recommend": "veneer.advise.recommend",
    "estimate_memory": "veneer.advise.memory",
    "prove": "veneer.prove",
}

__all__ = [
    "LoRA",
    "Pool",
    "__version__",
    "activate",
    "adapters",
    "adopt",
    "attach",
    "check_alive",
    "combine",
    "convert",
    "dequantize",
    "detach",
    "disabled",
    "estimate_memory",
    "extract",
    "fuse",
    "load",
    "load_shared",
    "merge",
    "merge_to_disk",
    "prove",
    "quantize",
    "recommend",
    "resize",
    "routed",
    "save",
    "save_bitsandbytes",
    "save_shared",
    "summary",
    "swap",
    "train",
    "unfuse",
    "unmerge",
]

if TYPE_CHECKING:
    from veneer.advise.memory import estimate_memory
    from veneer.advise.recommend import recommend
    from veneer.ckpt.bnb import save_bitsandbytes
    from veneer.ckpt.peft import load, save
    from veneer.ckpt.pool import Pool, swap
    from veneer.ckpt.shared import load_shared, save_shared
    from veneer.ckpt.stream import merge_to_disk
    from veneer.core.mixing import combine, convert, extract, resize
    from veneer.core.model import (
        activate,
        adapters,
        attach,
        check_alive,
        detach,
        disabled,
        merge,
        routed,
        summary,
        unmerge,
    )
    from veneer.core.spec import LoRA
    from veneer.kernels.fuse import fuse, unfuse
    from veneer.prove import prove
    from veneer.quant.foreign import adopt
    from veneer.quant.model import dequantize, quantize
    from veneer.train.loop import train


def __getattr__(name: str) -> Any:
    if name == "peft":  # a part of the library with names of its own, not one of these
        return import_module("veneer.peft")
    if name not in _HOME:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    value = sys.modules.get(f"veneer.{name}", value)  # `train` and `prove` are packages too, and those can be called
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
