"""What an adapter is made of, measured from its two thin factors and nothing else.

    dW = s B A      with QR  B = Qb Rb,  A^T = Qa Ra      becomes      dW = Qb (s Rb Ra^T) Qa^T

The middle is r x r, so its singular values, which are those of dW, cost r^3 instead of out x in^2: a 7B model's adapter
is taken apart in seconds on a laptop. The same identity gives angles and differences between two adapters without
either dW being formed. Everything runs in float64, since a difference of two nearly equal adapters cancels.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ckpt.base import Base, differences, hash_of, meaningful
from veneer.ckpt.config import CONFIG, parse, read_config
from veneer.ckpt.hub import WEIGHTS, find
from veneer.ckpt.layout import parse_key
from veneer.ckpt.peft import METADATA
from veneer.ckpt.tensorfile import TensorFile
from veneer.core.spec import LoRA
from veneer.errors import CheckpointError

__all__ = [
    "Comparison",
    "Factors",
    "Held",
    "Layer",
    "Spectrum",
    "base_of_config",
    "base_problems",
    "compare",
    "compare_layers",
    "cosine",
    "describe",
    "difference",
    "effective_rank",
    "energy_rank",
    "inner",
    "norm",
    "overlap",
    "read",
    "spectrum",
    "stable_rank",
]

NOISE = 1e-7  # singular values below this share of the largest are rounding


class Factors(NamedTuple):
    """dW = scale * b @ a, whatever the layer kind."""

    a: Float[Tensor, "r in"]
    b: Float[Tensor, "out r"]
    scale: float


class Spectrum(NamedTuple):
    """dW = u @ diag(values) @ v.T, largest first, rounding noise cut off."""

    u: Float[Tensor, "out k"]
    values: Float[Tensor, " k"]
    v: Float[Tensor, "in k"]


def spectrum(f: Factors) -> Spectrum:
    """The singular value decomposition of dW through its r x r core.

    >>> f = Factors(torch.eye(2, 5), torch.eye(7, 2) * torch.tensor([3.0, 4.0]), 2.0)
    >>> spectrum(f).values.tolist()
    [8.0, 6.0]
    """
    qb, rb = torch.linalg.qr(f.b.double())
    qa, ra = torch.linalg.qr(f.a.double().mT)
    u, values, vh = torch.linalg.svd(f.scale * rb @ ra.mT, full_matrices=False)
    real = values > NOISE * values[0] if len(values) else values > 0
    return Spectrum((qb @ u)[:, real], values[real], (qa @ vh.mT)[:, real])


def effective_rank(values: Float[Tensor, " k"]) -> float:
    """How many directions carry dW: the exponential of the entropy of the singular values' shares.

    The effective rank of Roy and Vetterli (EUSIPCO 2007): r for r equal values, near 1 when one dominates.

    >>> round(effective_rank(torch.ones(4)), 6), round(effective_rank(torch.tensor([1.0, 0.0])), 6)
    (4.0, 1.0)
    """
    if not values.sum() > 0:
        return 0.0
    share = values.double() / values.sum()
    return math.exp(float(-torch.special.xlogy(share, share).sum()))


def stable_rank(values: Float[Tensor, " k"]) -> float:
    """|dW|_F^2 / |dW|_2^2, which small directions hardly move."""
    return float(values.square().sum() / values.max().square()) if values.sum() > 0 else 0.0


def energy_rank(values: Float[Tensor, " k"], share: float = 0.9) -> int:
    """The fewest directions that hold `share` of |dW|^2: the rank that would have been enough.

    >>> energy_rank(torch.tensor([4.0, 1.0, 0.1]))
    1
    """
    if not values.sum() > 0:
        return 0
    held = values.double().square().cumsum(0) / values.double().square().sum()
    return min(int((held < share).sum()) + 1, len(values))


def inner(f: Factors, g: Factors) -> float:
    """<dW_f, dW_g> = s_f s_g <B_f^T B_g, A_f A_g^T>."""
    return f.scale * g.scale * float(((f.b.double().mT @ g.b.double()) * (f.a.double() @ g.a.double().mT)).sum())


def norm(f: Factors) -> float:
    return math.sqrt(max(inner(f, f), 0.0))


def cosine(f: Factors, g: Factors) -> float:
    """The angle between two changes of one weight: 1 the same direction, 0 unrelated, -1 opposed, nan when one is 0."""
    size = norm(f) * norm(g)
    return inner(f, g) / size if size else math.nan


def difference(f: Factors, g: Factors) -> Factors:
    """dW_f - dW_g as one pair, exactly: [A_f; A_g] and [s_f B_f, -s_g B_g]."""
    return Factors(torch.cat([f.a, g.a]), torch.cat([f.scale * f.b, -g.scale * g.b], dim=1), 1.0)


def overlap(p: Float[Tensor, "n k"], q: Float[Tensor, "n j"]) -> float:
    """The share of the smaller subspace that lies in the larger: |P^T Q|_F^2 / min(k, j) (arXiv:2106.09685, eq. 4).

    Both have orthonormal columns. Two random subspaces of k and j <= k columns share k/n on average.
    """
    smaller = min(p.shape[1], q.shape[1])
    return float((p.mT @ q).square().sum()) / smaller if smaller else math.nan


@dataclass(frozen=True)
class Layer:
    """One adapted layer: sizes of its change and how many directions the change really has."""

    site: str
    shape: tuple[int, int]  # (out, in) of the matrix that dW changes
    rank: int
    scale: float
    norm: float
    spectral_norm: float
    effective_rank: float
    stable_rank: float
    energy_rank_90: int
    values: tuple[float, ...]

    @property
    def is_dead(self) -> bool:
        """B is still zero: the layer was never trained, or never reached."""
        return self.norm == 0

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.norm)


def describe(site: str, f: Factors) -> Layer:
    if not (torch.isfinite(f.a).all() and torch.isfinite(f.b).all()):
        return Layer(site, _shape(f), len(f.a), f.scale, math.nan, math.nan, math.nan, math.nan, 0, ())
    values = spectrum(f).values if norm(f) else torch.zeros(0)
    return Layer(
        site,
        _shape(f),
        len(f.a),
        f.scale,
        norm(f),
        float(values.max()) if len(values) else 0.0,
        effective_rank(values),
        stable_rank(values),
        energy_rank(values),
        tuple(values.tolist()),
    )


def _shape(f: Factors) -> tuple[int, int]:
    return f.b.shape[0], f.a.shape[1]


@dataclass(frozen=True)
class Comparison:
    """Two changes of one layer: their angle, what they share of input and output directions, how far apart they are."""

    site: str
    cosine: float
    overlap_in: float
    overlap_out: float
    chance_in: float  # what unrelated adapters of these ranks would share
    chance_out: float
    difference: float  # |dW_f - dW_g|
    relative_difference: float  # of the larger of the two norms


def compare_layers(site: str, f: Factors, g: Factors) -> Comparison:
    sf, sg = spectrum(f), spectrum(g)
    larger = max(len(sf.values), len(sg.values))
    apart = float(spectrum(difference(f, g)).values.norm())  # not through `norm`, whose squares cancel
    size = max(norm(f), norm(g))
    return Comparison(
        site,
        cosine(f, g),
        overlap(sf.v, sg.v),
        overlap(sf.u, sg.u),
        larger / f.a.shape[1],
        larger / f.b.shape[0],
        apart,
        apart / size if size else 0.0,
    )


def compare(first: Mapping[str, Factors], second: Mapping[str, Factors]) -> list[Comparison]:
    """Layer by layer, for the layers that both adapt in the same shape, in the order of `first`."""
    shared = [site for site in first if site in second and _shape(first[site]) == _shape(second[site])]
    return [compare_layers(site, first[site], second[site]) for site in shared]


# ------------------------------------------------------------------ from files


@dataclass(frozen=True)
class Held:
    """What an adapter's folder holds, read without any model. `whole` are modules and biases saved as they are."""

    path: Path
    spec: LoRA
    base: Base
    factors: Mapping[str, Factors] = field(repr=False)
    whole: tuple[str, ...]
    parameters: int
    bytes: int


def read(where: str | os.PathLike[str], name: str = "default") -> Held:
    """The adapter in a folder, a run's folder or on a hub. NaN is no obstacle here: it is what one looks for."""
    path = find(where, name)
    config = read_config(path / CONFIG)
    parsed, file = parse(config, str(path / CONFIG)), TensorFile(path / WEIGHTS)
    if parsed.kind != "LORA":
        raise CheckpointError(
            f"the adapter is {parsed.kind}, which has no pair of A and B for each layer in its file",
            str(path / WEIGHTS),
            'load it onto its base, convert(model, name, into="plain"), and save that',
        )
    spec = parsed.spec
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, None] = {}
    for stored in file:
        key = parse_key(stored.name)
        if key is not None and key.field in ("A", "B"):
            parts.setdefault(key.module, {})[key.field] = stored.load().flatten(1)
        elif key is not None and key.field != "magnitude":
            whole[key.module] = None
    halves = [f"{site} has {' and '.join(found)} only" for site, found in parts.items() if len(found) < 2]
    if halves or not parts:
        fix = "download or save the adapter again"
        raise CheckpointError("there are no pairs of A and B to look at", str(path / WEIGHTS), fix, halves)
    factors = {site: Factors(found["A"], found["B"], spec.at(site).scale) for site, found in parts.items()}
    base = Base(id=config.get("base_model_name_or_path") or "")
    if METADATA in file.metadata:
        base = Base.from_json(file.metadata[METADATA])
    count = sum(math.prod(stored.shape) for stored in file)
    return Held(path, spec, base, factors, tuple(whole), count, file.size)


def base_of_config(folder: str | os.PathLike[str]) -> Base | None:
    """Who the model in a folder is, by its config.json alone; None where there is none to read."""
    path = Path(folder).expanduser() / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    facts = meaningful(config)
    return Base(id=str(folder), config_hash=hash_of(facts), config=facts)


def base_problems(held: Held, folder: str | os.PathLike[str]) -> list[str] | None:
    """How the model in `folder` differs from the adapter's base; None when one of the two says nothing of itself."""
    here = base_of_config(folder)
    if here is None or not held.base.config_hash:
        return None
    return differences(held.base, here)
