"""P2: what was frozen kept every bit, what was to learn moved, and the loss can reach every layer that should learn.

Three ways in which a training that looks right has done nothing, or something else than was asked: the optimiser was
given the wrong parameters (the base moved, or nothing did), a layer's forward was replaced so that its adapter is never
run, or a statistic of the base (BatchNorm's) drifted although its weights stood still. `snapshot` remembers bits and
the base's answers before the training; `frozen_and_learning` compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.model import activate, adapter_of, adapters, sites, tensors
from veneer.prove.answers import Answer, Inputs, answers, batches, call, full_precision, tensors_in
from veneer.prove.fingerprint import Fingerprints, fingerprints
from veneer.prove.found import as_found, bare
from veneer.prove.proof import Check

__all__ = ["Before", "frozen_and_learning", "silent", "snapshot"]

TITLE = "Frozen and learning"
SHOWN = 5  # names in a sentence; all of them are in the figures


@dataclass(frozen=True)
class Before:
    """A model as it was before training: fingerprints, and its base's answers to `inputs`."""

    frozen: Fingerprints
    trained: Fingerprints
    inputs: Sequence[Inputs] = ()
    base: Sequence[Answer] = field(default=())


@full_precision()
def snapshot(model: nn.Module, name: str = "default", inputs: Inputs | list[Any] | None = None) -> Before:
    """Remember `model` before it trains: after attach, before the first step. `inputs` as in `prove`."""
    asked = [] if inputs is None else batches(inputs)
    with as_found(model), bare(model):
        base = answers(model, asked)
    parts = {key: t for part in learning(model, name).values() for key, t in part.items()}
    return Before(fingerprints(dict(frozen(model, name))), fingerprints(parts), asked, base)


def frozen(model: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """Everything that training must leave alone: parameters and persistent buffers, other adapters among them."""
    learned = {id(t) for part in learning(model, name).values() for t in part.values()}
    for owner, module in model.named_modules():
        own = module._parameters
        held = (
            own if any(id(p) in learned for p in own.values()) else {**own, **module._buffers}
        )  # BatchNorm's, trained
        for leaf, tensor in held.items():
            if tensor is not None and id(tensor) not in learned and leaf not in module._non_persistent_buffers_set:
                yield f"{owner}.{leaf}".lstrip("."), tensor


def learning(model: nn.Module, name: str) -> dict[str, dict[str, Tensor]]:
    """What learns, layer by layer: the adapter's tensors, or on a model without adapters the trained parameters."""
    if name not in adapters(model):
        return {key: {key: p} for key, p in model.named_parameters() if p.requires_grad}
    found: dict[str, dict[str, Tensor]] = {}
    for (site, leaf), tensor in tensors(model, name).items():
        found.setdefault(site, {})[f"{site}:{leaf}"] = tensor
    return found


def frozen_and_learning(model: nn.Module, name: str, inputs: Sequence[Inputs], before: Before | None = None) -> Check:
    """Run inside `as_found`. Without `before`, nothing can be said of the frozen weights, and moved means dW != 0."""
    parts = learning(model, name)
    now = fingerprints(dict(frozen(model, name)))
    changed = now.differing(before.frozen) if before else []
    broken = [site for site, part in parts.items() if not _finite(part.values())]
    still = _still(model, name, parts, before)
    if name not in adapters(model):  # trained whole: parts that a task never uses (a pooler) may rest
        mute, wild, still = [], [], still if len(still) == len(parts) else []
    else:
        mute = silent(model, name, inputs)
        wild = [site for site, part in parts.items() if site not in mute and not _finite(t.grad for t in part.values())]
    problems = {
        "frozen tensors changed": changed,
        "hold NaN or infinity": broken,
        "did not move": still,
        "get no gradient": mute,
        "get a gradient that is NaN or infinite": wild,
    }
    applied = len(parts) - len({*still, *mute, *wild, *broken})
    return Check(
        "P2", TITLE, bool(parts) and not any(problems.values()), _statement(problems, parts, before, now),
        {"layers": len(parts), "applied": applied, "frozen_tensors": len(now.values), "frozen_bytes": now.total_bytes,
         "share_read": now.share, "frozen_hash": now.combined(), "compared": before is not None,
         **{key.replace(" ", "_"): found for key, found in problems.items() if found}},
        f"{applied}/{len(parts)} modules applied",
    )  # fmt: skip


def _finite(tensors: Iterable[Tensor | None]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors if t is not None)


def _statement(
    problems: Mapping[str, list[str]], parts: Mapping[str, object], before: object, now: Fingerprints
) -> str:
    if not parts:
        return "Nothing on this model is trained."
    wrong = [f"{len(found)} {what}: {_few(found)}" for what, found in problems.items() if found]
    if wrong:
        return "; ".join(wrong) + "."
    read = "" if now.share == 1 else f" ({100 * now.share:.0f} % of their bytes read)"
    kept = f"All {len(now.values)} frozen tensors kept every bit{read}; " if before else ""
    return f"{kept}all {len(parts)} trained layers moved and get a gradient."


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _still(model: nn.Module, name: str, parts: Mapping[str, Mapping[str, Tensor]], before: Before | None) -> list[str]:
    """Layers in which nothing differs from where it began."""
    if before is not None and before.trained.values:
        now = fingerprints({key: t for part in parts.values() for key, t in part.items()})
        moved = set(now.differing(before.trained))
        return [site for site, part in parts.items() if not moved & part.keys()]
    if name not in adapters(model):
        return []
    return [site for site, layer in sites(model, name).items() if not _acts(layer, name)]


def _acts(layer: nn.Module, name: str) -> bool:
    adapter = adapter_of(layer, name)
    if adapter.bias is not None and bool(adapter.bias.any()):
        return True
    return adapter.delta is not None and adapter.delta.norm() > 0


def silent(model: nn.Module, name: str, inputs: Sequence[Inputs]) -> list[str]:
    """Layers whose adapter no output depends on. More inputs are tried while some are silent: experts wait for a token.

    The objective is a random sum of the outputs rather than a loss, so any module has one, and no normalised output
    (whose squares always add up to one) can hide a layer.
    """
    activate(model, name)
    parts = {
        site: [t for t in part.values() if isinstance(t, nn.Parameter) and t.is_floating_point()]
        for site, part in learning(model, name).items()
    }
    for part in parts.values():
        for tensor in part:
            tensor.requires_grad_(True).grad = None
    waiting = list(parts)
    for each in inputs:
        with torch.enable_grad():
            _objective(tensors_in(call(model, each))).backward()
        waiting = [site for site in waiting if not any(t.grad is not None and bool(t.grad.any()) for t in parts[site])]
        if not waiting:
            break
    return waiting


def _objective(outputs: Sequence[Tensor]) -> Tensor:
    source = torch.Generator().manual_seed(0)
    parts = [
        (y.float() * torch.randn(y.shape, generator=source).to(y.device)).nan_to_num().sum() / max(1, y.numel()) ** 0.5
        for y in outputs
        if y.requires_grad
    ]
    return torch.stack(parts).sum() if parts else torch.zeros((), requires_grad=True)
