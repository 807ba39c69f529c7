"""add_weighted_adapter: several adapters as one, by `veneer.core.mixing`.

PEFT's "linear", "ties", "dare_linear", "dare_ties" and "magnitude_prune" work on A and B apart, which is not what the
adapters do together; only its "..._svd" forms work on dW. Here all of them work on dW, so the two forms are one. "cat"
is exact; the others are cut to a rank, and what the cut lost is in the report that comes back.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from veneer.core.mixing import METHODS, Mixed, combine
from veneer.core.registry import near
from veneer.errors import ConfigError
from veneer.peft.states import refuse_options

__all__ = ["add"]

ON_DW = "_svd"  # PEFT's mark for the forms that work on dW


def add(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    new: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> Mixed:
    """Put the mixture on the model as adapter `new`. How an SVD is computed (full_matrices, driver) changes nothing."""
    refuse_options(svd_clamp=svd_clamp)
    if len(names) != len(weights):
        raise ConfigError(f"{len(names)} adapters and {len(weights)} weights", fix="give one weight for each adapter")
    if len(set(names)) < len(names):
        raise ConfigError(f"an adapter is named twice in {list(names)}", fix="add its weights up")
    method = combination_type if combination_type in METHODS else combination_type.removesuffix(ON_DW)
    if method not in METHODS:
        known = [*METHODS, *(f"{m}{ON_DW}" for m in METHODS if METHODS[m] is not None)]
        raise ConfigError(
            f"combination_type={combination_type!r} is not known.{near(combination_type, known)}",
            fix=f"one of {', '.join(known)}",
        )
    return combine(
        model,
        dict(zip(names, map(float, weights), strict=True)),
        new,
        "cat" if len(names) == 1 else method,
        rank=svd_rank,
        density=0.5 if density is None else density,
        sign=majority_sign_method,
    )
