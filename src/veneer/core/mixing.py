"""The algebra of adapters: mix several into one, take one out of two models, make one smaller. Always on dW.

Mixing A and B apart is not mixing dW: (A1 + A2)(B1 + B2) has cross terms that belong to no adapter. So every method
here works on the changes themselves:

    cat                exact: the factors side by side; the rank is the sum of the ranks
    linear, svd        the same sum, cut to a rank by its singular values; the error is reported for each layer
    ties               trim each dW by magnitude, elect a sign for each entry, average those that agree
                       (arXiv:2306.01708, algorithm 1)
    dare_linear        drop entries at random, rescale the rest, sum (arXiv:2311.03099, eq. 1)
    dare_ties          drop and rescale, then elect signs as in ties
    magnitude_prune    trim by magnitude, sum

Factored changes are cut by a QR of the stacked factors and an SVD of the small core between them, which for layers of
width n and rank r costs n r^2 instead of n^3 and gives the same answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veneer.core.combine import Add
from veneer.core.delta import DenseDelta, wide
from veneer.core.host import Adapter
from veneer.core.model import adapter_of, attach, detach, parameters, put, sites, spec_of, state_of
from veneer.core.op import op_of
from veneer.core.registry import Registry
from veneer.core.select import select
from veneer.core.spec import LoRA
from veneer.core.weight import read_weight
from veneer.errors import ConfigError, StateError

__all__ = ["METHODS", "Mixed", "combine", "convert", "cut", "extract", "resize"]

Factors = tuple[Tensor, Tensor]  # A (r, in) and B (out, r), the scale inside B


@dataclass(frozen=True)
class Mixed:
    """What came out. `errors`: |dW - wanted| / |wanted| for each layer; `ranks`: what each layer got."""

    name: str
    errors: dict[str, float]
    ranks: dict[str, int]
    left_out: tuple[str, ...] = ()  # parameters that differ but that a low-rank adapter does not hold

    def __str__(self) -> str:
        worst = max(self.errors.values(), default=0.0)
        ranks = sorted(set(self.ranks.values()))
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        out = f"; not held: {', '.join(self.left_out[:8])}" if self.left_out else ""
        return (
            f"adapter {self.name!r} on {len(self.ranks)} layers, rank {shown}, error at most {100 * worst:.2g} %{out}"
        )


# --- cutting to a rank ----------------------------------------------------------------------------------------------


def cut(change: Factors | Tensor, rank: int | None = None, energy: float | None = None) -> tuple[Factors, float]:
    """The nearest change of the given rank (or of the least rank that keeps a share `energy` of |dW|^2), balanced
    between A and B, and its relative error."""
    if isinstance(change, Tensor):
        return _cut_dense(change, rank, energy)
    a, b = change
    left, r_left = torch.linalg.qr(b)  # (out, R), (R, R)
    right, r_right = torch.linalg.qr(a.mT)  # (in, R), (R, R)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT)
    keep = _keep(s, rank, energy)
    root = s[..., :keep].sqrt()
    small = root[..., None] * (vh[..., :keep, :] @ right.mT), (left @ u[..., :keep]) * root[..., None, :]
    return small, _lost(s[..., keep:], s)


def _cut_dense(m: Tensor, rank: int | None, energy: float | None) -> tuple[Factors, float]:
    if energy is None and rank is not None and m.ndim == 2 and rank < min(m.shape) // 4:
        u, s, v = torch.svd_lowrank(m, q=min(rank + 16, *m.shape), niter=6)
        u, s, v = u[:, :rank], s[:rank], v[:, :rank]
        total = m.double().square().sum()
        error = float(((total - s.double().square().sum()).clamp_min(0) / total.clamp_min(1e-300)).sqrt())
    else:
        u, full, vh = torch.linalg.svd(m, full_matrices=False)
        keep = _keep(full, rank, energy)
        u, s, v, error = u[..., :keep], full[..., :keep], vh[..., :keep, :].mT, _lost(full[..., keep:], full)
    root = s.sqrt()[..., None, :]
    return ((v * root).mT.contiguous(), u * root), error


def _keep(s: Tensor, rank: int | None, energy: float | None) -> int:
    count = s.shape[-1]
    if energy is None:
        return min(rank or count, count)
    squares = s.double().square()
    share = squares.cumsum(-1) / squares.sum(-1, keepdim=True).clamp_min(1e-300)
    enough = int((share < energy).sum(-1).max()) + 1  # the neediest matrix of a stack decides for all
    return max(1, min(enough, count, rank or count))


def _lost(dropped: Tensor, s: Tensor) -> float:
    return float(dropped.double().norm() / s.double().norm().clamp_min(1e-300))


# --- changes of one layer -------------------------------------------------------------------------------------------


def _thin(adapter: Adapter) -> bool:
    return isinstance(adapter.combine, Add) and not isinstance(adapter.delta, DenseDelta)


def _factored(adapter: Adapter, weight: float) -> Factors:
    a, b = (wide(f.detach()) for f in adapter.delta.factors())  # type: ignore[union-attr]
    return a, b * (adapter.delta.scale * weight)  # type: ignore[union-attr]


def _dense(host: nn.Module, adapter: Adapter) -> Float[Tensor, "out in"]:
    """dW of one adapter as a matrix: for DoRA, all by which the combined weight differs from W."""
    if isinstance(adapter.combine, Add):
        return adapter.delta.weight().detach()  # type: ignore[union-attr]
    w = wide(op_of(host).to_matrix(host, read_weight(host)))
    return (adapter.weight(w) - w).detach()


def _stack(parts: Sequence[Factors]) -> Factors:
    return torch.cat([a for a, _ in parts], dim=-2), torch.cat([b for _, b in parts], dim=-1)


def _sum(host: nn.Module, here: Sequence[tuple[Adapter, float]]) -> Factors | Tensor:
    """sum of w dW, kept as factors where all are."""
    if all(_thin(adapter) for adapter, _ in here):
        return _stack([_factored(adapter, w) for adapter, w in here])
    return sum(w * _dense(host, adapter) for adapter, w in here)  # type: ignore[return-value]


# --- methods on dense changes ---------------------------------------------------------------------------------------

Stack = Float[Tensor, "n *e out in"]
METHODS: Registry[Callable[..., Tensor] | None] = Registry("mixing method")
METHODS["cat"] = METHODS["linear"] = METHODS["svd"] = None  # sums of factors, see _sum


def _trim(d: Tensor, density: float) -> Tensor:
    """The largest entries by magnitude, as many as `density` says."""
    count = max(1, round(density * d.numel()))
    if count >= d.numel():
        return d
    threshold = d.abs().flatten().kthvalue(d.numel() - count + 1).values
    return d * (d.abs() >= threshold)


def _drop(d: Tensor, density: float) -> Tensor:
    return d * torch.empty_like(d).bernoulli_(density) / density


def _elect(stack: Stack, weights: Sequence[float], sign: str) -> Tensor:
    """The mean over those changes whose sign at an entry is the elected one; the total decides where votes are even."""
    signs = stack.sign()
    votes, total = signs.sum(0).sign(), stack.sum(0).sign()
    elected = total if sign == "total" else torch.where(votes == 0, total, votes)
    agree = (signs == elected) & (signs != 0)
    weighted = stack * torch.tensor(weights, dtype=stack.dtype, device=stack.device).view(-1, *[1] * (stack.ndim - 1))
    return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)


def _weighted(stack: Stack, weights: Sequence[float]) -> Tensor:
    return torch.einsum("n...,n->...", stack, torch.tensor(weights, dtype=stack.dtype, device=stack.device))


@METHODS.register("ties")
def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float, sign: str) -> Tensor:
    return _elect(torch.stack([_trim(d, density) for d in changes]), weights, sign)


@METHODS.register("dare_linear")
def dare_linear(changes: Sequence[Tensor], weights: Sequence[float], density: float, sign: str) -> Tensor:
    return _weighted(torch.stack([_drop(d, density) for d in changes]), weights)


@METHODS.register("dare_ties")
def dare_ties(changes: Sequence[Tensor], weights: Sequence[float], density: float, sign: str) -> Tensor:
    return _elect(torch.stack([_drop(d, density) for d in changes]), weights, sign)


@METHODS.register("magnitude_prune")
def magnitude_prune(changes: Sequence[Tensor], weights: Sequence[float], density: float, sign: str) -> Tensor:
    return _weighted(torch.stack([_trim(d, density) for d in changes]), weights)


# --- whole adapters -------------------------------------------------------------------------------------------------


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    into: str,
    method: str = "cat",
    *,
    rank: int | None = None,
    density: float = 0.5,
    sign: str = "total",
    seed: int = 0,
) -> Mixed:
    """Mix adapters of `model` into a new one called `into`, a plain LoRA whatever the others are.

    weights: adapter -> factor of its dW; negative ones take a skill away (task arithmetic, arXiv:2212.04089).
    rank: for all methods but cat, which is exact; the largest rank among the adapters unless given. density: the share
    of entries kept by ties, dare_* and magnitude_prune. sign: how ties elects, by "total" or by "frequency". seed: for
    dare's random choice. Modules trained whole and biases are summed as changes, too. The active adapters stay.
    """
    rule = METHODS[method]
    _check_cut(rank, None)
    _check(model, weights, density, sign, method)
    layers = _together(model, weights)
    found: dict[str, tuple[Factors, float]] = {}
    with torch.random.fork_rng(devices=_gpus(layers.values())):
        torch.manual_seed(seed)
        for site, layer in layers.items():
            here = [(adapter_of(layer, n), w) for n, w in weights.items() if n in layer.slots]  # type: ignore[operator]
            here = [(adapter, w) for adapter, w in here if adapter.delta is not None]
            if here:
                limit = rank or max(adapter.delta.rank for adapter, _ in here)  # type: ignore[union-attr]
                found[site] = _mix_layer(layer, here, rule, method, limit, density, sign)
    return _place(model, into, found, weights)


def _gpus(layers: Iterable[nn.Module]) -> list[torch.device]:
    return list({p.device for layer in layers for p in layer.parameters() if p.device.type == "cuda"})


def _mix_layer(
    layer: nn.Module,
    here: Sequence[tuple[Adapter, float]],
    rule: Callable[..., Tensor] | None,
    method: str,
    rank: int,
    density: float,
    sign: str,
) -> tuple[Factors, float]:
    if rule is not None:
        changes = [math.copysign(1, w) * _dense(layer, adapter) for adapter, w in here]  # what is negated votes so
        return cut(rule(changes, [abs(w) for _, w in here], density, sign), rank)
    total = _sum(layer, here)
    if method == "cat":
        return (total, 0.0) if isinstance(total, tuple) else cut(total)
    return cut(total, rank)


def _check(model: nn.Module, weights: Mapping[str, float], density: float, sign: str, method: str) -> None:
    problems = []
    if not weights:
        problems.append("no adapter is named")
    if not 0 < density <= 1:
        problems.append(f"density={density} must be above 0 and at most 1")
    if sign not in ("total", "frequency"):
        problems.append(f"sign={sign!r} is neither 'total' nor 'frequency'")
    for name, weight in weights.items():
        spec_of(model, name)
        if not math.isfinite(weight):
            problems.append(f"the weight of {name!r} is {weight}")
        if broken := _broken(model, name):
            problems.append(f"{name!r} holds NaN or infinite values ({broken[0]})")
        dense = [s for s, layer in sites(model, name).items() if not _is_thin(adapter_of(layer, name))]
        if method == "cat" and dense and len(weights) > 1:
            problems.append(
                f"{name!r} is no product of thin factors ({dense[0]}), so its dW has full rank; method='svd'"
            )
    if problems:
        raise ConfigError("these adapters cannot be mixed so", problems=problems)


def _check_cut(rank: int | None, energy: float | None) -> None:
    problems = [] if rank is None or rank >= 1 else [f"rank={rank} must be at least 1"]
    if energy is not None and not 0 < energy <= 1:
        problems.append(f"energy={energy} is the share of |dW|^2 to keep: above 0 and at most 1")
    if problems:
        raise ConfigError("no adapter can be cut so", problems=problems)


def _broken(model: nn.Module, name: str) -> list[str]:
    return [key for key, p in parameters(model, name).items() if not bool(torch.isfinite(p).all())]


def _is_thin(adapter: Adapter) -> bool:
    return adapter.delta is None or _thin(adapter)


def _together(model: nn.Module, names: Mapping[str, float]) -> dict[str, nn.Module]:
    return {site: layer for name in names for site, layer in sites(model, name).items()}


def _place(
    model: nn.Module, into: str, found: Mapping[str, tuple[Factors, float]], weights: Mapping[str, float]
) -> Mixed:
    """Attach the outcome as a plain LoRA with scale 1, and fill it."""
    specs = [spec_of(model, name) for name in weights]
    ranks = {site: a.shape[-2] for site, ((a, _), _) in found.items()}
    spec = _spec_for(model, specs, ranks)
    active = state_of(model).active
    before = active.names, active.mix
    attach(model, spec, into, init=False)
    try:
        values = {(s, "A"): a for s, ((a, _), _) in found.items()} | {(s, "B"): b for s, ((_, b), _) in found.items()}
        put(model, into, values | _rest(model, into, weights))
    except BaseException:
        detach(model, into)
        raise
    active.change(*before)
    return Mixed(into, {site: error for site, (_, error) in found.items()}, ranks)


def _spec_for(model: nn.Module, specs: Sequence[LoRA], ranks: Mapping[str, int]) -> LoRA:
    """A plain LoRA on just these layers: the sources' own targets where they name the same layers."""
    common = max(ranks.values())
    overrides = {
        re.escape(site): {"rank": rank, "alpha": float(rank)} for site, rank in ranks.items() if rank != common
    }
    bias = next((b for b in ("all", "lora_only") if any(s.bias == b for s in specs)), "none")
    saved = tuple(dict.fromkeys(m for s in specs for m in s.modules_to_save))
    exact = "|".join(re.escape(site) for site in ranks)
    spec = LoRA(
        rank=common, alpha=common, targets=exact, bias=bias, modules_to_save=saved, overrides=overrides, tied="apart"
    )
    if len(specs) == 1 or all(s.targets == specs[0].targets for s in specs):
        like = LoRA(
            rank=common,
            alpha=common,
            targets=specs[0].targets,
            exclude=specs[0].exclude,
            layers=specs[0].layers,
            bias=bias,
            modules_to_save=saved,
            overrides=overrides,
            tied="apart",
        )
        if set(select(model, like)) == set(ranks):
            return like
    return spec


def _rest(model: nn.Module, into: str, weights: Mapping[str, float]) -> dict[tuple[str, str], Tensor]:
    """Biases and whole modules of the new adapter: the weighted sums of the changes."""
    values: dict[tuple[str, str], Tensor] = {}
    state = state_of(model)
    placed = state.placed[into]
    for site in placed.sites:
        layer = state.hosts[site]
        own = layer.slots[into].bias  # type: ignore[index, union-attr]
        if own is not None:
            changes = [w * layer.slots[n].bias for n, w in weights.items() if _bias(layer, n) is not None]  # type: ignore[index, operator, union-attr]
            values[site, "bias"] = sum(changes, torch.zeros_like(own)).detach()
    for site in placed.saved:
        layer = state.hosts[site]
        base = {k: v for k, v in layer.state_dict().items() if not k.startswith("lora.")}
        for key, value in base.items():
            twins = [(layer.slots[n].state_dict()[key], w) for n, w in weights.items() if n in layer.slots]  # type: ignore[index, operator]
            blended = value + sum(w * (t - value) for t, w in twins) if value.is_floating_point() else twins[-1][0]
            values[site, f"saved.{key}"] = blended
    return values


def _bias(layer: nn.Module, name: str) -> Tensor | None:
    return getattr(layer.slots.get(name), "bias", None)  # type: ignore[union-attr, operator]


def convert(model: nn.Module, name: str, into: str, *, rank: int | None = None, energy: float | None = None) -> Mixed:
    """Adapter `name`, whatever its kind, as a plain LoRA, for engines that know nothing else; the error is reported.

    Exact where dW is a product of thin factors and neither rank nor energy asks for less.
    """
    _check_cut(rank, energy)
    if broken := _broken(model, name):
        raise StateError(f"{name!r} holds NaN or infinite values", problems=broken)
    found = {}
    for site, layer in sites(model, name).items():
        adapter = adapter_of(layer, name)
        if adapter.delta is not None:
            change = _sum(layer, [(adapter, 1.0)])
            exact = isinstance(change, tuple) and rank is None and energy is None
            found[site] = (change, 0.0) if exact else cut(change, rank, energy)
    return _place(model, into, found, {name: 1.0})  # type: ignore[arg-type]


def resize(model: nn.Module, name: str, into: str, *, rank: int | None = None, energy: float | None = None) -> Mixed:
    """A smaller copy of adapter `name`: of a rank, or in each layer of the least rank that keeps the energy share."""
    if rank is None and energy is None:
        raise ConfigError("resize needs a rank or an energy share", fix="rank=8, or energy=0.95")
    return convert(model, name, into, rank=rank, energy=energy)


def extract(
    tuned: nn.Module,
    base: nn.Module,
    *,
    rank: int | None = 16,
    energy: float | None = None,
    targets: str | Sequence[str] = "all-linear",
    name: str = "extracted",
) -> Mixed:
    """A LoRA out of two full models of one shape: the best of the given rank for W_tuned - W_base in every layer.

    It is attached to `base` under `name`. What differs but is not in the targeted layers (norms, embeddings, biases)
    is listed in the result, because a low-rank adapter does not hold it.
    """
    _check_cut(rank, energy)
    layers = select(base, LoRA(rank=1, targets=targets))
    others = dict(tuned.named_modules())
    problems = [f"{n}: not in the tuned model" for n in layers if n not in others]
    problems += [
        f"{n}: {tuple(read_weight(layer).shape)} in the base, {tuple(read_weight(others[n]).shape)} in the tuned model"
        for n, layer in layers.items()
        if n in others and read_weight(layer).shape != read_weight(others[n]).shape
    ]
    if problems:
        raise StateError("these are not two versions of one model", problems=problems)
    found = {}
    for site, layer in layers.items():
        op = op_of(layer)
        change = wide(op.to_matrix(others[site], read_weight(others[site]))) - wide(
            op.to_matrix(layer, read_weight(layer))
        )
        found[site] = cut(change.detach(), min(rank, *change.shape) if rank else None, energy)
    ranks = {site: a.shape[-2] for site, ((a, _), _) in found.items()}
    spec = _spec_for(base, [LoRA(rank=1, targets=targets)], ranks)
    left_out = _other_changes(tuned, base, layers)
    attach(base, spec, name, init=False)
    put(base, name, {(s, f): t for s, ((a, b), _) in found.items() for f, t in (("A", a), ("B", b))})
    return Mixed(name, {site: error for site, (_, error) in found.items()}, ranks, left_out)


def _other_changes(tuned: nn.Module, base: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    held = {f"{site}.weight" for site in layers}
    mine = {n: p for n, p in base.named_parameters() if ".lora." not in n}
    theirs = dict(tuned.named_parameters())
    return tuple(
        n for n, p in mine.items() if n not in held and n in theirs and not torch.equal(p, theirs[n].to(p.device))
    )
