"""add_weighted_adapter: several adapters as one.

The sum is taken on dW, layer by layer: sum of w_i s_i B_i A_i. Stacking the factors,

    A = [A_1; A_2; ...]        B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]

gives exactly that as one LoRA whose rank is the sum of the ranks. PEFT calls this "cat". Its "linear" adds A to A and
B to B instead, which is not the sum of the effects and can be far from it; here "linear" is the exact sum as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.combine import Add
from veneer.core.model import adapter_of, adapters, attach, put, sites, spec_of, tensors
from veneer.core.registry import near
from veneer.core.spec import LoRA
from veneer.errors import ConfigError, StateError
from veneer.peft.config import LoraConfig

__all__ = ["add"]

EXACT = ("cat", "linear")
PLANNED = (
    "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd", "magnitude_prune",
    "magnitude_prune_svd",
)  # fmt: skip


def add(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    new: str,
    method: str,
    options: Mapping[str, Any],
) -> LoraConfig:
    """Put the weighted sum of adapters `names` on the model as adapter `new`, frozen; returns its config."""
    _check(model, names, weights, method, options)
    stacked = {site: _stack(layer, dict(zip(names, weights, strict=True))) for site, layer in _all_sites(model, names)}
    ranks = {site: a.shape[0] for site, (a, _) in stacked.items()}
    rank = max(ranks.values())
    odd = {"^" + re.escape(site): r for site, r in ranks.items() if r != rank}
    spec = LoRA(
        rank=rank,
        alpha=rank,  # a scale of 1: the weights and scales are in B
        targets="|".join(re.escape(site) for site in stacked),
        overrides={pattern: {"rank": r, "alpha": r} for pattern, r in odd.items()},
    )
    attach(model, spec, new, init=False, trainable=False)
    put(model, new, {(site, key): value for site, pair in stacked.items() for key, value in zip("AB", pair, strict=True)})
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(stacked),
        rank_pattern=dict(odd),
        alpha_pattern=dict(odd),
        inference_mode=True,
    )


def _all_sites(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Every layer that one of the adapters is on, each once."""
    return list({site: layer for name in names for site, layer in sites(model, name).items()}.items())


@torch.no_grad()
def _stack(layer: nn.Module, weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """A and B of the weighted sum on one layer."""
    deltas: list[tuple[Any, float]] = [
        (adapter_of(layer, name).delta, weight)
        for name, weight in weights.items()
        if name in layer.slots  # type: ignore[operator]
    ]
    factors = [(*delta.factors(), delta.scale * weight) for delta, weight in deltas]
    return torch.cat([a for a, _, _ in factors], dim=-2), torch.cat([b * s for _, b, s in factors], dim=-1)


def _check(
    model: nn.Module, names: Sequence[str], weights: Sequence[float], method: str, options: Mapping[str, Any]
) -> None:
    if not names or len(names) != len(weights):
        raise ConfigError(f"{len(names)} adapters and {len(weights)} weights", fix="give one weight for each adapter")
    if len(set(names)) < len(names):
        raise ConfigError(f"an adapter is named twice in {list(names)}", fix="add its weights up")
    missing = [f"{name!r} is no adapter of this model.{near(name, adapters(model))}" for name in names
               if name not in adapters(model)]  # fmt: skip
    if missing:
        raise StateError("these adapters do not exist", problems=missing)
    given = sorted(key for key, value in options.items() if value is not None)
    if method in EXACT and (len(names) == 1 or not given):
        _refuse_inexact(model, names)
    elif method in PLANNED and len(names) > 1:
        raise ConfigError(
            f"combination_type={method!r} is not built",
            fix="combination_type='cat' is the exact sum, at a rank that is the sum of the ranks",
        )
    elif method in PLANNED:
        _refuse_inexact(model, names)  # of a single adapter there is nothing to combine
    elif method in EXACT:
        raise ConfigError(f"{', '.join(given)} say nothing about the exact sum", fix="leave them out")
    else:
        known = (*EXACT, *PLANNED)
        raise ConfigError(f"combination_type={method!r} is not known.{near(method, known)} Known: {', '.join(known)}.")


def _refuse_inexact(model: nn.Module, names: Sequence[str]) -> None:
    """What cannot be written as a sum of factors."""
    problems = []
    for name in names:
        if any(not isinstance(adapter_of(layer, name).combine, Add | None) for layer in sites(model, name).values()):
            problems.append(f"{name!r} combines by {spec_of(model, name).combine}, which is not a sum with the base")
        if any(key == "bias" or key.startswith("saved.") for _, key in tensors(model, name)):
            problems.append(f"{name!r} also changes biases or whole modules, which factors cannot hold")
    if problems:
        raise ConfigError(
            "these adapters cannot be added up into one",
            problems=problems,
            fix='set_adapter(["a", "b"]) lets several act at once, whatever they are',
        )
