"""Training: settings, the loop, runs. The package itself can be called: `veneer.train(model, data, r=8)`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.train.run import Run


class _Callable(ModuleType):
    """`veneer.train(...)` and `veneer.train.settings` both work, whichever was imported first."""

    def __call__(self, *args: Any, **kwargs: Any) -> Run:
        from veneer.train.loop import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
