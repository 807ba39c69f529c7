"""Adapters to text. The names below are imported when they are first used.

from veneer.infer import Engine, Sampling, generate
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Chat": "veneer.infer.chat",
    "Engine": "veneer.infer.engine",
    "Sampling": "veneer.infer.sampling",
    "Speaker": "veneer.infer.chat",
    "evaluate": "veneer.infer.evaluate",
    "generate": "veneer.infer.engine",
    "load": "veneer.infer.load",
}

__all__ = ["Chat", "Engine", "Sampling", "Speaker", "evaluate", "generate", "load"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'veneer.infer' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
