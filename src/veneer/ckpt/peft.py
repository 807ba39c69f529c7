"""Adapters on disk, in PEFT's layout: what vLLM, SGLang, TGI, llama.cpp's converters and PEFT itself read.

    folder/adapter_config.json            what the adapter is (config.py says which words PEFT has for it)
    folder/adapter_model.safetensors      its tensors (layout.py says in which shapes), and which base it belongs to
    folder/<name>/...                     the same for every adapter that is not called "default"

`save` replaces both files at once: a process killed in between leaves the old adapter, not half of the new one. `load`
knows everything that could be wrong before it touches the model, and reads the tensors from the file's own pages.

Two things are kept differently here and there. PEFT trains biases in place and saves their full values; here each
adapter has a *change* of the bias. And PiSSA or OLoRA move part of the base into the adapter in PEFT; here the base
stays, and what is saved is the plain LoRA [A; A0], [B, -B0] of twice the rank, right on the unchanged base anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.ckpt.atomic import atomic_folder
from veneer.ckpt.base import Base, base_of, differences
from veneer.ckpt.config import CONFIG, RECOMPUTED, Parsed, parse, read_config
from veneer.ckpt.contents import adapted_sites, config_of, contents_of, keep_words, kept_words, whole
from veneer.ckpt.fit import Fit, fit
from veneer.ckpt.hub import WEIGHTS, find
from veneer.ckpt.tensorfile import TensorFile, save_tensors
from veneer.core.delta import DELTAS
from veneer.core.host import plain_modules
from veneer.core.model import adapter_of, attach, detach, put, sites, spec_of, tensors, unmerged, unwrapped
from veneer.core.spec import LoRA
from veneer.errors import CheckpointError, TargetError

__all__ = [
    "Loaded",
    "attach_fitted",
    "check_base",
    "config_of",
    "contents_of",
    "fill",
    "load",
    "refuse_broken",
    "save",
    "values_of",
    "whole",
]

METADATA = "veneer"  # our entry in the safetensors file's metadata


@dataclass(frozen=True)
class Loaded:
    """What load did. `notes` are things to know; they are also given as one warning."""

    name: str
    path: Path
    spec: LoRA
    sites: tuple[str, ...]
    saved: tuple[str, ...]
    base: Base = field(repr=False)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        whole = f" and {len(self.saved)} whole modules" if self.saved else ""
        return f"adapter {self.name!r} from {self.path} on {len(self.sites)} layers{whole}"


# ---------------------------------------------------------------- load


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    trainable: bool = False,
    revision: str | None = None,
    partial: bool = False,
    allow_other_base: bool = False,
    allow_nan: bool = False,
    allow_unknown: bool = False,
) -> Loaded:
    """Attach the adapter in `folder` (or on a hub) to `model` under `name`, and make it the active one.

    Raises CheckpointError with all that is wrong, and leaves the model as it was, if the file is damaged, belongs to
    another base, fits only in part, or comes from a newer PEFT with options that nobody here knows. `partial` and the
    last three flags each lift one of these refusals.
    """
    model, path = unwrapped(model), find(folder, name, revision)
    config, file = read_config(path / CONFIG), TensorFile(path / WEIGHTS)
    parsed = parse(config, str(path / CONFIG), allow_unknown=allow_unknown)
    base, notes = check_base(base_of(model), parsed, file, allow_other_base)
    fitted = fit(model, parsed, file, name, partial=partial)
    if not allow_nan:
        refuse_broken(fitted.values, str(path / WEIGHTS))
    notes += fitted.notes + [f"{key}={value!r} in {CONFIG} is not known" for key, value in parsed.unknown.items()]
    if trainable:
        notes += [f"{key}={parsed.raw[key]!r} acts in PEFT's training and not in ours" for key in _dropouts(parsed)]
    spec = attach_fitted(model, fitted, name, trainable)
    if words := kept_words(parsed):
        keep_words(model, name, spec, words)
    if notes:
        warnings.warn(f"loading {path}: " + "; ".join(notes), stacklevel=2)
    return Loaded(name, path, spec, fitted.sites, fitted.saved, base, tuple(notes))


def _dropouts(parsed: Parsed) -> list[str]:
    """LoHa's and LoKr's own kinds of dropout, where they are set."""
    return [key for key in ("rank_dropout", "module_dropout") if parsed.raw.get(key)]


def attach_fitted(model: nn.Module, fitted: Fit, name: str, trainable: bool) -> LoRA:
    """Attach without drawing values, put the file's in; on any error take it all away again."""
    dtype, has_start = _dtype(model, fitted, trainable), fitted.spec.init in RECOMPUTED
    problem: TargetError | None = None
    for spec in _specs(model, fitted):
        try:
            attach(model, spec, name, dtype=dtype, init=has_start, trainable=trainable)
        except TargetError as error:
            problem = error
            continue
        try:
            if adapted_sites(model, name) == set(fitted.sites):
                fill(model, name, fitted, values_of(model, fitted, name))
                return spec
        except BaseException:
            detach(model, name)
            raise
        detach(model, name)
    raise problem or CheckpointError(f"the layers {fitted.sites} cannot be targeted by their names")


def _specs(model: nn.Module, fitted: Fit) -> Iterator[LoRA]:
    """The config's own words; and, where our rules read them differently from PEFT's, the layers' full names."""
    yield fitted.spec
    sites = tuple(site for site in fitted.sites if site not in fitted.tables)
    yield dataclasses.replace(fitted.spec, targets=_exactly(model, sites), exclude=(), layers=None)


def _exactly(model: nn.Module, names: tuple[str, ...]) -> str | tuple[str, ...]:
    """Targets that mean these layers and no others: their names, or a pattern where one name ends in another."""
    more = {n for n in plain_modules(model) if n.endswith(tuple(f".{name}" for name in names))} - set(names)
    return "|".join(re.escape(name) for name in names) if more else names


def fill(model: nn.Module, name: str, fitted: Fit, values: Mapping[tuple[str, str], Tensor]) -> None:
    """Put a file's values into an adapter that is there, the matrices that its layers share among them."""
    put(model, name, values)
    if fitted.shared:
        a, b = (fitted.shared[key].clone() for key in "AB")  # the file's pages may change under us
        for host in sites(model, name).values():
            delta: Any = adapter_of(host, name).delta
            delta.project(a, b)


def values_of(model: nn.Module, fitted: Fit, name: str) -> dict[tuple[str, str], Tensor]:
    """What to put: the file's tensors, the start that PiSSA and OLoRA subtract, and biases as changes."""
    values = dict(fitted.values)
    if fitted.spec.bias == "none" and fitted.spec.init not in RECOMPUTED:
        return values
    own, hosts = tensors(model, name), sites(model, name)
    values |= {(site, key): value.detach() for (site, key), value in own.items() if key in ("A0", "B0")}
    for site in (site for site, key in own if key == "bias"):
        if site in fitted.biases or fitted.bias_changes:
            values[site, "bias"] = _bias_change(hosts[site], own[site, "bias"], fitted, site)
    lost = sorted((fitted.biases.keys() | fitted.bias_changes.keys()) - {site for site, key in own if key == "bias"})
    if lost:
        raise CheckpointError("The file holds biases of layers that have none to change here.", None, None, lost)
    return values


def _bias_change(host: nn.Module, like: Tensor, fitted: Fit, site: str) -> Tensor:
    """PEFT's full value minus the base's, and what its B adds to the bias by itself."""
    total, now = fitted.biases.get(site), host._parameters["bias"]
    change = torch.zeros_like(like) if total is None or now is None else total.to(like) - now.detach().to(like)
    return change + fitted.bias_changes.get(site, torch.zeros(())).to(like)


def _dtype(model: nn.Module, fitted: Fit, trainable: bool) -> torch.dtype | None:
    """The file's own type, so that values arrive unchanged; never narrower than the base, or than fp32 to train in."""
    factors = DELTAS[fitted.spec.delta].saved
    kept = {t.dtype for (_, key), t in fitted.values.items() if key in factors}
    if not kept or not all(dtype.is_floating_point and dtype.itemsize >= 2 for dtype in kept):
        return None
    plain = (p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize >= 2)
    wide = torch.float32 if trainable else next(plain, torch.float32)
    for dtype in kept:
        wide = torch.promote_types(wide, dtype)
    return wide


def check_base(here: Base, parsed: Parsed, file: TensorFile, allowed: bool) -> tuple[Base, list[str]]:
    """Compare the base that the adapter was trained on with the one that is here; returns the former, and notes."""
    saved = Base(id=parsed.raw.get("base_model_name_or_path") or "")
    if METADATA in file.metadata:
        try:
            saved = Base.from_json(file.metadata[METADATA])
        except (ValueError, TypeError, AttributeError):
            what = "What the file says of its base is damaged."
            raise CheckpointError(what, str(file.path), "save it again") from None
    found = differences(saved, here)
    if found and not allowed:
        raise CheckpointError(
            f"The adapter was trained on another base{f' ({saved.id})' if saved.id else ''}.",
            str(file.path),
            "take that base, or pass allow_other_base=True if you know that this one fits",
            problems=found,
        )
    return saved, [f"another base, as allowed: {difference}" for difference in found]


def refuse_broken(values: Mapping[Any, Tensor], where: str) -> None:
    """NaN and infinity are caught by the sum, at memory speed; only a suspicious sum is looked at closely."""
    broken = [key if isinstance(key, str) else ".".join(key) for key, t in values.items() if not _is_finite(t)]
    if broken:
        raise CheckpointError(
            "The adapter holds NaN or infinite values.",
            where,
            "use an earlier checkpoint; allow_nan=True takes it as it is",
            problems=broken,
        )


def _is_finite(t: Tensor) -> bool:
    if not t.is_floating_point():
        return True
    return bool(torch.isfinite(t.sum(dtype=torch.float32))) or bool(torch.isfinite(t).all())


# ---------------------------------------------------------------- save


def save(model: nn.Module, folder: str | os.PathLike[str], name: str = "default", *, allow_nan: bool = False) -> Path:
    """Write adapter `name` to `folder` ("default"), or to a subfolder of its name (any other); returns where.

    Other files there stay. The two of the adapter are replaced together, or, on a full disk or a kill, not at all.
    """
    model, path = unwrapped(model), Path(folder).expanduser() / ("" if name == "default" else name)
    spec = spec_of(model, name)
    with unmerged(model):  # biases and magnitudes are written relative to the base, whatever is merged just now
        contents = contents_of(model, name)
        config = config_of(model, name, spec, contents)
    if not allow_nan:
        refuse_broken(contents.tensors, str(path))
    with atomic_folder(path, keep=True) as temp:
        save_tensors(temp / WEIGHTS, contents.tensors, {METADATA: base_of(model).to_json()})
        (temp / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for note, where in contents.notes.items():
        more = f" and {len(where) - 1} more" if where[1:] else ""
        warnings.warn(f"saving {path}: {note} ({where[0]}{more})", stacklevel=2)
    return path
