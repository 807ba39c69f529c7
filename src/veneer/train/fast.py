"""Training on fused blocks, for the length of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from veneer.kernels.fuse import fuse, is_fused, unfuse

__all__ = ["fused"]


@contextmanager
def fused(model: nn.Module, wanted: bool, recompute: bool, tell: Callable[..., Any]) -> Iterator[bool]:
    """Fuse what can be fused, say what that is, and undo it afterwards; a model that came fused stays so.

    Whether recomputation is taken care of: fused blocks keep their input and skip what nobody needs of the rest, which
    takes less time than transformers' way. One block that runs plainly is enough to leave it to that.
    """
    if not wanted or is_fused(model):
        yield False
        return
    report = fuse(model, "input" if recompute else "none", verbose=False)
    whole = report.replaced["blocks"] > 0 and not report.skipped
    if recompute and not whole:
        unfuse(model)
        report = fuse(model, "none", verbose=False)
    for line in str(report).splitlines():
        tell("note", text=line)
    try:
        yield whole
    finally:
        unfuse(model)
