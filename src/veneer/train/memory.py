"""When memory runs out: do the same with fewer rows at a time.

The global batch is what the result depends on; the micro-batch is only how it is cut. So an out-of-memory error halves
the micro-batch, the random state is put back and the whole step is done again. The loss is a sum over the global
batch, divided by all its trained tokens, so nothing else changes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from veneer.errors import DoesNotFit
from veneer.train.resume import random_state, restore_random

__all__ = ["back_off", "is_out_of_memory"]

T = TypeVar("T")
CPU_WORDS = ("can't allocate memory", "not enough memory", "cannot allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU has an exception of its own for it; on a CPU PyTorch only says so."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in CPU_WORDS)


def back_off(
    attempt: Callable[[int], T], rows: int, clean: Callable[[], None], say: Callable[[int, int, str], None],
    instead: Callable[[str], bool] | None = None,
) -> tuple[T, int]:  # fmt: skip
    """`attempt(rows)`, with half the rows each time memory runs out; the result and the rows that fitted.

    `clean` drops what the failed attempt left (gradients), `say(before, after, doing)` tells the world. `instead` is
    asked first: it may save memory in another way, says so itself, and answers whether it did.
    """
    state = random_state()
    while True:
        try:
            return attempt(rows), rows
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
        # outside the handler: the exception holds the frames, and those the tensors that must go
        clean()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if instead is not None and instead(message):
            restore_random(state)
            continue
        if rows == 1:
            raise DoesNotFit(
                f"one row at a time does not fit into memory ({message})",
                fix="shorten the rows (max_len), set recompute: input, store the base smaller (precision, quant), "
                "or lower r and the number of targets",
            )
        smaller = rows // 2
        say(rows, smaller, message)
        restore_random(state)
        rows = smaller
