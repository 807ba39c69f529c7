"""The learning rate over a run: a straight warm-up, then a fall.

The rate is a function of the step alone. Nothing is accumulated, so there is no scheduler to save and a resumed run
cannot be off by one.
"""

from __future__ import annotations

import math

__all__ = ["rate_factor", "warmup_steps"]


def warmup_steps(warmup: float, steps: int) -> int:
    """A share of all steps below 1, else a number of steps.

    >>> warmup_steps(0.03, 100), warmup_steps(5, 100), warmup_steps(0, 100)
    (3, 5, 0)
    """
    return math.ceil(warmup * steps) if warmup < 1 else min(int(warmup), steps)


def rate_factor(step: int, steps: int, warm: int, schedule: str) -> float:
    """What step `step` (counted from 0) multiplies the peak rate by.

    The first step already learns (1 / warm, not 0) and the last one still does.

    >>> [round(rate_factor(step, 10, 2, "linear"), 3) for step in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.125]
    """
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(steps - warm, 1)  # 0 at the peak, just below 1 at the last step
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]
