"""The learning rate when nobody gives one: `lr: auto`.

    lr = 2e-4  x  (8e9 / parameters) ** 0.4  x  (32 / strength) ** 0.5  x  method  x  task  x  data

One rule with an anchor and five corrections. Each has a source, and each was tried: benchmarks/learning_rate.py finds
the best rate of SmolLM2-135M on 761 shell questions for 22 settings, benchmarks/small_data.py that of MiniLM (22.7 M)
on film reviews (docs/benchmarks.md).

    anchor     2e-4 for a 7-8 B model at alpha 32: what Axolotl ships, between QLoRA's 2e-4 at alpha 16
               (arXiv:2305.14314) and Tinker's 2.9e-4
    size       between Tinker's fit for Llama (lr ~ hidden ** -0.781) and the optimum found at 135 M (1.5e-3 over 190
               steps); gives 4.3e-4 at 1.2 B, 0.84e-4 at 70 B
    strength   s r, which is alpha for LoRA and alpha sqrt(r) for rsLoRA. Found: at alpha 32 the best rate is 1.9e-3 at
               r = 1 and 2.4e-3 to 2.5e-3 at r = 4, 16, 64 and 128 (that it does not depend on the rank is in "LoRA
               Without Regret" too); with alpha it falls from 5.4e-3 (8) over 2.4e-3 (32) and 1.15e-3 (128) to 0.86e-3
               (256): power -0.53. rsLoRA lies on the same line by its s r
    method     full fine-tuning a tenth ("LoRA Without Regret": LoRA's best rate is 10 times full's; found: 10.1), the
               last two blocks half (found: 0.53). DoRA as it is (found: x 1.2)
    task       classifiers 0.4: above that MiniLM stops learning at all (found: r = 32 at 2e-3; best 5e-4 to 1e-3)
    data       where the rows are known: x 1.5 for less than 100 steps ("LoRA Without Regret": 15 times full's in short
               runs; found: 1.6 from 190 to 47 steps), but x 0.4 when a model that writes sees less than 100 rows
               again and again (found with 40 rows: 0.42 for an adapter, 0.46 for the whole model)

A rule is a start, not an optimum: the best rate of a task lies within a factor of two or three of it, either way.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from veneer.core.registry import near
from veneer.errors import ConfigError

__all__ = ["LearningRate", "learning_rate"]

ANCHOR, ANCHOR_PARAMETERS, ANCHOR_STRENGTH = 2e-4, 8e9, 32.0
SIZE_POWER = -0.4
STRENGTH_POWER = 0.5
SHORT_STEPS, FEW_ROWS = 100, 100
METHODS = {"lora": 1.0, "full": 0.1, "freeze": 0.5}
COMBINES = ("add", "dora")
TASKS = {"sequence_classification": 0.4, "token_classification": 0.4}
PICTURES = 1e-4  # what the scripts of diffusers, kohya and ai-toolkit begin with for a LoRA, whatever the model's size
LOWEST, HIGHEST = 1e-6, 5e-3


class LearningRate(NamedTuple):
    value: float
    reason: str


def learning_rate(
    params: float,
    rank: int = 16,
    alpha: float | None = None,
    scaling: str = "lora",
    combine: str = "add",
    method: str = "lora",
    task: str = "causal_lm",
    steps: int | None = None,
    rows: int | None = None,
) -> LearningRate:
    """A peak learning rate for AdamW and why. `params` counts the base, `alpha` is twice the rank when None.

    steps and rows: of the run; without rows nothing is said about the amount of data.

    >>> learning_rate(8e9, rank=16, alpha=32)
    LearningRate(value=0.0002, reason='rule: 2.0e-4 for 8 B at alpha 32')
    >>> learning_rate(8e9, method="full").value
    2e-05
    """
    if task == "diffusion":
        return LearningRate(PICTURES * METHODS[method], f"rule: {PICTURES:.0e} for pictures".replace("e-0", "e-"))
    alpha = 2.0 * rank if alpha is None else float(alpha)
    _check(params, rank, alpha, scaling, combine, method, steps, rows)
    factors = (
        _size(params),
        _strength(rank, alpha, scaling) if method == "lora" else (METHODS[method], f"for method {method}"),
        (TASKS.get(task, 1.0), "for a classifier"),
        _data(task, method, steps, rows),
    )
    value = ANCHOR * math.prod(factor for factor, _ in factors)
    said = [f"x {float(f'{factor:.2g}'):g} {why}" for factor, why in factors if factor != 1.0]
    reason = ", ".join([f"rule: {ANCHOR:.1e} for 8 B at alpha {ANCHOR_STRENGTH:g}".replace("e-0", "e-"), *said])
    return LearningRate(_round(min(max(value, LOWEST), HIGHEST)), reason)


def _size(params: float) -> tuple[float, str]:
    near_anchor = math.isclose(params, ANCHOR_PARAMETERS, rel_tol=0.2)
    return (1.0 if near_anchor else (params / ANCHOR_PARAMETERS) ** SIZE_POWER), f"for {_count(params)}"


def _strength(rank: int, alpha: float, scaling: str) -> tuple[float, str]:
    strength = alpha * math.sqrt(rank) if scaling == "rslora" else alpha
    factor = (ANCHOR_STRENGTH / strength) ** STRENGTH_POWER
    return factor, f"for alpha {alpha:g} x sqrt(r = {rank})" if scaling == "rslora" else f"for alpha {alpha:g}"


def _data(task: str, method: str, steps: int | None, rows: int | None) -> tuple[float, str]:
    if rows is not None and rows < FEW_ROWS and task not in TASKS:
        return 0.4, f"for {rows} rows seen again and again"
    if rows is not None and rows >= FEW_ROWS and steps is not None and steps < SHORT_STEPS and method == "lora":
        return 1.5, f"for a run of {steps} steps"
    return 1.0, ""


def _check(
    params: float, rank: int, alpha: float, scaling: str, combine: str, method: str, steps: int | None, rows: int | None
) -> None:
    problems = [
        f"{name}={value!r} is none of {', '.join(known)}.{near(str(value), known)}"
        for name, value, known in (
            ("scaling", scaling, ("lora", "rslora")),
            ("combine", combine, COMBINES),
            ("method", method, tuple(METHODS)),
        )
        if value not in known
    ]
    given = {"params": params, "rank": rank, "alpha": alpha, "steps": steps, "rows": rows}
    for name, number in ((name, number) for name, number in given.items() if number is not None):
        if not math.isfinite(number) or number <= 0:
            problems.append(f"{name}={number!r} must be above zero")
    if problems:
        raise ConfigError("no learning rate for this", problems=problems)


def _count(params: float) -> str:
    """
    >>> _count(1.7e9), _count(135e6), _count(9560)
    ('1.7 B', '135 M', '9.56 k')
    """
    size, letter = next(((n, c) for n, c in ((1e9, "B"), (1e6, "M")) if params >= n), (1e3, "k"))
    return f"{params / size:.3g} {letter}"


def _round(value: float) -> float:
    """Two figures: more would claim what no rule knows."""
    return float(f"{value:.1e}")
