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
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.ckpt.atomic import atomic_folder
from veneer.ckpt.base import Base, base_of, differences
from veneer.ckpt.config import (
    CONFIG,
    RECOMPUTED,
    TASK_HEADS,
    Parsed,
    Rank,
    parameters_for,
    parse,
    patterns_for,
    read_config,
    targets_for,
)
from veneer.ckpt.fit import NESTED, Fit, fit
from veneer.ckpt.hub import WEIGHTS, find
from veneer.ckpt.layout import PREFIX, file_rank, to_file
from veneer.ckpt.tensorfile import TensorFile, save_tensors
from veneer.core.delta import Lora
from veneer.core.deltas.fused import FusedLora
from veneer.core.host import plain_modules
from veneer.core.leaf import Leaf, own_parameters
from veneer.core.model import adapter_of, attach, detach, put, sites, spec_of, tensors, unmerged
from veneer.core.op import OPS, op_of
from veneer.core.spec import LoRA
from veneer.core.weight import read_weight
from veneer.errors import CheckpointError, TargetError

__all__ = ["Loaded", "check_base", "load", "refuse_broken", "save"]

METADATA = "veneer"  # our entry in the safetensors file's metadata

# What config files held that we do not know, to be written back with the same adapter.
_unknown: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[LoRA, dict[str, Any]]]] = weakref.WeakKeyDictionary()


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
) -> Loaded:
    """Attach the adapter in `folder` (or on a hub) to `model` under `name`, and make it the active one.

    Raises CheckpointError with all that is wrong, and leaves the model as it was, if the file is damaged, belongs to
    another base, or fits only in part. The three last flags each lift one of these refusals.
    """
    path = find(folder, name, revision)
    parsed, file = parse(read_config(path / CONFIG), str(path / CONFIG)), TensorFile(path / WEIGHTS)
    base, notes = check_base(base_of(model), parsed, file, allow_other_base)
    fitted = fit(model, parsed, file, name, partial=partial)
    if not allow_nan:
        refuse_broken(fitted.values, str(path / WEIGHTS))
    notes += fitted.notes + [f"{key}={value!r} in {CONFIG} is not known" for key, value in parsed.unknown.items()]
    spec = _attach(model, fitted, name, trainable)
    if parsed.unknown:
        _unknown.setdefault(model, {})[name] = spec, parsed.unknown
    if notes:
        warnings.warn(f"loading {path}: " + "; ".join(notes), stacklevel=2)
    return Loaded(name, path, spec, fitted.sites, fitted.saved, base, tuple(notes))


def _attach(model: nn.Module, fitted: Fit, name: str, trainable: bool) -> LoRA:
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
            if _adapted(model, name) == set(fitted.sites):
                put(model, name, _values(model, fitted, name))
                return spec
        except BaseException:
            detach(model, name)
            raise
        detach(model, name)
    raise problem or CheckpointError(f"the layers {fitted.sites} cannot be targeted by their names")


def _specs(model: nn.Module, fitted: Fit) -> Iterator[LoRA]:
    """The config's own words; and, where our rules read them differently from PEFT's, the layers' full names."""
    yield fitted.spec
    yield dataclasses.replace(fitted.spec, targets=_exactly(model, fitted.sites), exclude=(), layers=None)


def _exactly(model: nn.Module, names: tuple[str, ...]) -> str | tuple[str, ...]:
    """Targets that mean these layers and no others: their names, or a pattern where one name ends in another."""
    more = {n for n in plain_modules(model) if n.endswith(tuple(f".{name}" for name in names))} - set(names)
    return "|".join(re.escape(name) for name in names) if more else names


def _adapted(model: nn.Module, name: str) -> set[str]:
    return {site for site, host in sites(model, name).items() if adapter_of(host, name).delta is not None}


def _values(model: nn.Module, fitted: Fit, name: str) -> dict[tuple[str, str], Tensor]:
    """What to put: the file's tensors, the start that PiSSA and OLoRA subtract, and biases as changes."""
    values, hosts = dict(fitted.values), sites(model, name)
    if fitted.spec.bias == "none" and fitted.spec.init not in RECOMPUTED:
        return values
    for (site, key), own in tensors(model, name).items():
        if key in ("A0", "B0"):
            values[site, key] = own.detach()
        elif key == "bias" and (site in fitted.biases or site in fitted.bias_changes or fitted.bias_changes):
            now = hosts[site]._parameters["bias"].detach()  # type: ignore[union-attr]
            whole = fitted.biases.get(site)
            change = torch.zeros_like(own) if whole is None else whole.to(own) - now.to(own)
            values[site, key] = change + fitted.bias_changes.get(site, torch.zeros(())).to(own)
    return values


def _dtype(model: nn.Module, fitted: Fit, trainable: bool) -> torch.dtype | None:
    """The file's own type, so that values arrive unchanged; never narrower than the base, or than fp32 to train in."""
    kept = {t.dtype for (_, key), t in fitted.values.items() if key in ("A", "B")}
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
    path = Path(folder).expanduser() / ("" if name == "default" else name)
    spec = spec_of(model, name)
    with unmerged(model):  # biases and magnitudes are written relative to the base, whatever is merged just now
        contents = _contents(model, name)
        config = _config(model, name, spec, contents)
    if not allow_nan:
        refuse_broken(contents.tensors, str(path))
    with atomic_folder(path, keep=True) as temp:
        save_tensors(temp / WEIGHTS, contents.tensors, {METADATA: base_of(model).to_json()})
        (temp / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for note, where in contents.notes.items():
        more = f" and {len(where) - 1} more" if where[1:] else ""
        warnings.warn(f"saving {path}: {note} ({where[0]}{more})", stacklevel=2)
    return path


@dataclass
class Contents:
    """The file to be: tensors by key, the rank and alpha of every layer in it, and what PEFT will read differently."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, Rank] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)  # what to know -> the layers that it is about


def _contents(model: nn.Module, name: str) -> Contents:
    spec, hosts, out = spec_of(model, name), sites(model, name), Contents()
    uses_dora = any(spec.at(site).combine == "dora" for site in _adapted(model, name))
    for site, host in hosts.items():
        adapter = adapter_of(host, name)
        if adapter.delta is not None:
            parts, key = _parts(host, adapter, uses_dora), _module_key(site, host, hosts)
            out.tensors |= {f"{PREFIX}{key}.{leaf}": value for leaf, value in to_file(host, parts).items()}
            out.ranks[site] = _rank_in_file(spec, site, host, adapter.delta, parts["A"].shape[-2])
            for note in _limits(host, adapter.delta, uses_dora):
                out.notes.setdefault(note, []).append(site)
        if adapter.bias is not None:
            whole = _whole(own_parameters(host)["bias"]).to(adapter.bias) + _whole(adapter.bias)
            out.tensors[f"{PREFIX}{site}{'' if adapter.delta is None else '.base_layer'}.bias"] = whole
    for (site, key), value in tensors(model, name).items():
        if key.startswith("saved."):
            out.tensors[f"{PREFIX}{site}.{key.removeprefix('saved.')}"] = _whole(value)
            out.saved += [site] if site not in out.saved else []
    return out


def _module_key(site: str, host: nn.Module, hosts: Mapping[str, nn.Module]) -> str:
    """The layer's name; for a bare parameter its module's, nested as PEFT nests several of one module."""
    if not isinstance(host, Leaf):
        return site
    adapted = {h.name for h in hosts.values() if isinstance(h, Leaf) and h.owner is host.owner}
    owner: Any = host.owner
    order = [p for p in owner._parameters if p in adapted]
    return site.rpartition(".")[0] + NESTED * (len(order) - 1 - order.index(host.name))


def _parts(host: nn.Module, adapter: Any, uses_dora: bool) -> dict[str, Tensor]:
    """A, B and, for DoRA, the magnitude. PEFT has one use_dora for all layers, so a layer without gets |W + dW|."""
    a, b = (_whole(factor) for factor in adapter.delta.factors())
    if hasattr(adapter.delta, "real_rank"):  # AdaLoRA: directions that are switched off need no place in a file
        on = a.any(-1) if a.any() else torch.arange(len(a)) == 0
        a, b = a[on], b[:, on]
    parts = {"A": a, "B": b}
    if hasattr(adapter.combine, "magnitude"):
        parts["magnitude"] = _whole(adapter.combine.magnitude)
    elif uses_dora:
        op = op_of(host)
        w = op.to_matrix(host, _whole(read_weight(host))).float() + adapter.delta.weight().detach()
        parts["magnitude"] = w.norm(dim=-1)
    return parts


def _rank_in_file(spec: LoRA, site: str, host: nn.Module, delta: Any, rank: int) -> Rank:
    """Rank and alpha that give the layer's own scale under the file's scaling rule.

    PiSSA's pair has twice the rank, a grouped convolution's A as many times as it has groups, and a layer or a kind of
    delta may have a rule of its own; alpha makes up for each.
    """
    own, shown, is_linear = spec.at(site), file_rank(host, rank), spec.scaling == "lora"
    if own.scaling == spec.scaling and own.scale == delta.scale:  # by the ratio: no rounding creeps into alpha
        grown = shown / own.rank
        return Rank(shown, own.alpha * (grown if is_linear else grown**0.5))
    return Rank(shown, delta.scale * (shown if is_linear else shown**0.5))


def _limits(host: Any, delta: Any, uses_dora: bool) -> Iterator[str]:
    """What is not in the file, or what PEFT computes otherwise from this very file (here it comes back as it was)."""
    if not isinstance(delta, Lora | FusedLora):
        yield f"{type(delta).__name__} is written as the plain LoRA that it is worth, and will be loaded as one"
    if isinstance(host, Leaf) and uses_dora:
        yield "PEFT has no DoRA for bare parameters; load this file with veneer"
    if getattr(host, "groups", 1) > 1 and uses_dora:
        yield "PEFT computes DoRA's norm of a grouped convolution wrongly; load this file with veneer"
    if any(d != 1 for d in getattr(host, "dilation", ())):
        yield "PEFT cannot run an adapter on a dilated convolution; load this file with veneer"
    if getattr(host, "padding_mode", "zeros") != "zeros":
        yield "PEFT pads with zeros inside the adapter, which this layer does not; borders will differ there"


def _config(model: nn.Module, name: str, spec: LoRA, contents: Contents) -> dict[str, Any]:
    modules = plain_modules(model)
    saved = _saved_names(spec, contents.saved, modules)
    kinds = {op_of(host) for site, host in sites(model, name).items() if site in contents.ranks}
    base = base_of(model)
    task = _task(model, contents.saved)
    bare = [site for site, host in sites(model, name).items() if isinstance(host, Leaf)]
    layers = [site for site in contents.ranks if site not in bare]
    parameters = [f"{n}.{p}" for n, module in modules.items() for p in module._parameters] if bare else []
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": None if task else _auto_mapping(model),
        "base_model_name_or_path": base.id or None,
        "revision": base.revision or None,
        "inference_mode": True,
        "lora_dropout": spec.dropout,
        "exclude_modules": None,
        "fan_in_fan_out": OPS["transformers.pytorch_utils.Conv1D"] in kinds,
        "bias": spec.bias,
        "use_rslora": spec.scaling == "rslora",
        "use_dora": any(key.endswith("lora_magnitude_vector") for key in contents.tensors),
        "modules_to_save": saved or None,
        "init_lora_weights": True,  # where training began; the values are in the file
        "layers_to_transform": None,
        "layers_pattern": None,
        **patterns_for(spec, contents.ranks),
        **targets_for(spec, layers, list(modules), saved),
        **({"target_parameters": parameters_for(bare, parameters)} if bare else {}),
    }
    kept_for, unknown = _unknown.get(model, {}).get(name, (None, {}))
    config |= unknown if kept_for is spec else {}
    return {key: config[key] for key in sorted(config)}


def _saved_names(spec: LoRA, saved: Collection[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The user's words for whole modules where PEFT's rule (any ending, dot or not) takes the same ones."""
    chosen = {n for n in modules if n and n.endswith(tuple(spec.modules_to_save))} if spec.modules_to_save else set()
    return list(spec.modules_to_save) if chosen == set(saved) else list(saved)


TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def _task(model: nn.Module, saved: Iterable[str]) -> str | None:
    """PEFT's word for the model's task. With a classification task PEFT insists on a trained head in the file."""
    kind = next((c.__name__ for c in type(model).__mro__ if c.__module__.startswith("transformers.")), "")
    task = next((task for ending, task in TASKS.items() if kind.endswith(ending)), None)
    if task == "SEQ_2_SEQ_LM" and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None
    heads = TASK_HEADS.get(task or "")
    return None if heads and not any(site.endswith(heads) for site in saved) else task


def _auto_mapping(model: nn.Module) -> dict[str, str]:
    """For AutoPeftModel: which class the base is."""
    kind = next((c for c in type(model).__mro__ if not c.__module__.startswith("veneer.")), type(model))
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def _whole(t: Any) -> Tensor:
    """The tensor itself, gathered where FSDP2 has spread it over ranks."""
    t = t.detach()
    return t.full_tensor() if hasattr(t, "full_tensor") else t
