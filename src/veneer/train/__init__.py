"""Training. `veneer.train(model, data)` is a call, and this is the package that holds its parts."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """The function and the package bear one name: whichever of them was imported first, `veneer.train(...)` works."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from veneer.train.loop import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
