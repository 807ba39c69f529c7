"""Proofs at the hand-overs: nothing is said to work before it has been shown to, on the model itself."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_HOME = {
    **dict.fromkeys(["prove", "prove_run"], "veneer.prove.run"),
    **dict.fromkeys(["Check", "LeftOut", "Outcome", "Proof"], "veneer.prove.proof"),
    **dict.fromkeys(["Before", "snapshot"], "veneer.prove.frozen"),
    **dict.fromkeys(["is_as_filed"], "veneer.prove.base"),
    **dict.fromkeys(["every_key_read"], "veneer.prove.consumed"),
    **dict.fromkeys(["every_sample_teaches"], "veneer.prove.masks"),
    **dict.fromkeys(["few"], "veneer.prove.answers"),
    **dict.fromkeys(["replay"], "veneer.prove.canary"),
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'veneer.prove' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


class _Callable(ModuleType):
    """`veneer.prove(model, inputs)` and `veneer.prove.snapshot(model)` both work, whichever was imported first."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return __getattr__("prove")(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
