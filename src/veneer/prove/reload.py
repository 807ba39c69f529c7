"""P3: what the file holds is what the model does.

The adapter is read back from its folder into the same base under a second name, and held against the live one twice:
value by value, layer by layer, and by the logits of the whole model. The values find a layer that was lost, zeroed or
left out of the file even where it hardly shows in the logits; the logits find everything else that loading does (scale,
targets, the order of two factors).
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.ckpt.peft import load, save
from veneer.core.delta import Delta
from veneer.core.leaf import own_parameters
from veneer.core.model import activate, adapter_of, sites, tensors
from veneer.prove.answers import Subject, gap, limit
from veneer.prove.found import spare
from veneer.prove.proof import Check

__all__ = ["beside_delta", "reloads_equal"]

TITLE = "Reload"
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative, as stored


def reloads_equal(subject: Subject, folder: str | Path | None = None) -> Check:
    """`folder`: where the adapter was saved; without, it is saved to a temporary place and read from there."""
    model, live = subject.model, subject.name
    with _quiet(), _saved(model, live, folder) as path, spare(model, "reloaded") as again:
        load(model, path, again)
        lost = _differing(model, live, again)
        activate(model, again)
        apart = gap(subject.now(), subject.adapted)
    allowed = limit(subject.adapted)
    said = f"Loaded from its file, the adapter gives the live model's logits (largest difference {apart:.2g})."
    if not apart <= allowed:
        said = f"Loaded from its file, the adapter gives other logits: off by {apart:.3g}, {allowed:.2g} is allowed."
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        said = f"The file does not hold what the model holds: {'; '.join(lost[:3])}{more}."
    return Check(
        "P3", TITLE, apart <= allowed and not lost, said,
        {"largest_difference": apart, "allowed": allowed, "differing": lost, "from": "file" if folder else "own copy"},
        f"reloaded adapter matches live model (max |\u0394logit| {apart:.1g})",
    )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """What saving and loading warn of was said when the run itself saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _saved(model: nn.Module, name: str, folder: str | Path | None) -> Iterator[Path]:
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="veneer-proof-") as temporary:
        yield save(model, Path(temporary) / "adapter", name)


def beside_delta(model: nn.Module, name: str) -> set[tuple[str, str]]:
    """Fields of an adapter that are no part of a delta: magnitude, bias, modules that are trained whole."""
    inside = {
        (site, key)
        for site, layer in sites(model, name).items()
        if (delta := adapter_of(layer, name).delta) is not None
        for key in delta.state_dict()
    }
    return set(tensors(model, name)) - inside


def _differing(model: nn.Module, live: str, again: str) -> list[str]:
    """In words, each layer in which the two adapters are not the same.

    Deltas are compared as dW, not by their tensors: a file may hold the same dW with A and B of another rank, or any
    delta as the plain LoRA it amounts to. PEFT's layout has both projections of an attention where one is adapted, the
    other as zeros.
    """
    ours, theirs = sites(model, live), sites(model, again)
    found = [f"{site} is missing" for site in ours.keys() - theirs.keys()]
    added = {site: adapter_of(theirs[site], again).delta for site in theirs.keys() - ours.keys()}
    found += [f"{site} was not trained" for site, delta in added.items() if delta is None or delta.norm()]
    for site in ours.keys() & theirs.keys():
        a, b = adapter_of(ours[site], live).delta, adapter_of(theirs[site], again).delta
        if (a is None) != (b is None):
            found.append(f"dW of {site} is missing")
        elif a is not None and (apart := _distance(a, b)) > _close(a):  # type: ignore[arg-type]
            found.append(f"dW of {site} differs by {100 * apart:.2g} %")
    mine, other = tensors(model, live), tensors(model, again)
    for site, leaf in beside_delta(model, live):
        around = own_parameters(ours[site]).get("bias") if leaf == "bias" else None  # the file holds base + change
        twin = other.get((site, leaf))
        if twin is None or not _equal(mine[site, leaf], twin, around):
            found.append(f"{leaf} of {site} differs")
    return sorted(found)


def _distance(a: Delta, b: Delta) -> float:
    """|dW_a - dW_b| / |dW_a|, from the factors alone: the norm of the joined pair [B_a, -B_b] [A_a; A_b]."""
    (a1, b1), (a2, b2) = ([f.detach().double() for f in d.factors()] for d in (a, b))
    if a1.shape[-1] != a2.shape[-1] or b1.shape[-2] != b2.shape[-2]:
        return math.inf
    rows, columns = torch.cat([a1, a2], -2), torch.cat([a.scale * b1, -b.scale * b2], -1)
    norm = float(((columns.mT @ columns) * (rows @ rows.mT)).sum().clamp_min(0).sqrt())
    return norm / own if (own := a.norm()) else (math.inf if norm else 0.0)


def _close(delta: Delta) -> float:
    return CLOSE.get(delta.factors()[0].dtype, CLOSE[torch.float32])  # a mirror has no parameters of its own


def _equal(a: Tensor, b: Tensor, around: Tensor | None = None) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a.cpu(), b.cpu())
    scale = max((float(t.abs().max()) for t in (a, around) if t is not None and t.numel()), default=0.0)
    return bool(((a.cpu().double() - b.cpu().double()).abs() <= CLOSE.get(a.dtype, 1e-6) * scale).all())
