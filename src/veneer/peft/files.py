"""Adapters to and from folders, as PEFT's methods have it, by way of `veneer.ckpt.peft`."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from veneer.ckpt import peft as store
from veneer.ckpt.atomic import atomic_write
from veneer.ckpt.config import CONFIG, parse, read_config
from veneer.ckpt.fit import fit
from veneer.ckpt.hub import WEIGHTS, find
from veneer.ckpt.tensorfile import TensorFile, save_tensors
from veneer.core.model import (
    active_of,
    adapter_of,
    adapters,
    detach,
    is_merged,
    parameters,
    sites,
    spec_of,
    state_of,
    unmerged,
)
from veneer.core.registry import near
from veneer.core.spec import LoRA
from veneer.errors import CheckpointError, ConfigError, StateError
from veneer.peft.config import AnyConfig, PeftConfig
from veneer.peft.held import LoadResult, nothing_amiss
from veneer.peft.live import CHECKPOINT, LIVE, save_live
from veneer.peft.states import IGNORED, embeddings_of, refuse_options, refuse_other_values, same_start, wants_embeddings

__all__ = ["hotswap_adapter", "load_into", "load_new", "save_pretrained"]


def save_pretrained(
    model: Any,
    folder: Path,
    selected: Iterable[str] | None,
    *,
    safe_serialization: bool,
    save_embedding_layers: str | bool,
    is_main_process: bool,
    state_dict: Mapping[str, Any] | None,
) -> None:
    names = _chosen(model, selected)
    if not safe_serialization:
        raise ConfigError("safe_serialization=False would write a pickle, which can run any code", fix="leave it out")
    if folder.is_file():
        raise ConfigError("the place to save to is a file", str(folder), "give a folder")
    refuse_other_values(model, state_dict)
    if not is_main_process:
        return
    with unmerged(model):
        for name in names:
            path = store.save(model, folder, name)
            _complete(model, path, model.peft_config[name], save_embedding_layers)
        if CHECKPOINT.fullmatch(folder.name):
            save_live(model, folder / LIVE)


def _chosen(model: nn.Module, selected: Iterable[str] | None) -> list[str]:
    names = list(adapters(model) if selected is None else selected)
    unknown = [f"{n!r}.{near(n, adapters(model))}" for n in names if n not in adapters(model)]
    if unknown or not names:
        there = ", ".join(adapters(model)) or "none"
        raise StateError("selected_adapters: no such adapter", problems=unknown, fix=f"there are: {there}")
    return names


def _complete(model: Any, path: Path, config: AnyConfig, save_embedding_layers: str | bool) -> None:
    """What only the config knows (task, base, revision, keys from elsewhere), and embeddings where they belong."""
    written = read_config(path / CONFIG)
    config.base_model_name_or_path = config.base_model_name_or_path or written["base_model_name_or_path"]
    own = {key: getattr(config, key) for key in ("base_model_name_or_path", "revision") if getattr(config, key)}
    if config.task_type is not None:
        own |= {"task_type": config.to_dict()["task_type"], "auto_mapping": None}
    completed = {**config.unknown, **written, **own}
    if completed != written:
        atomic_write(path / CONFIG, json.dumps(completed, indent=2, sort_keys=True) + "\n")
    if wants_embeddings(model, save_embedding_layers):
        file = TensorFile(path / WEIGHTS)
        content = {stored.name: stored.load() for stored in file}
        with tempfile.TemporaryDirectory(dir=path.parent) as temp:
            save_tensors(Path(temp, WEIGHTS), {**content, **embeddings_of(model, content)}, file.metadata)
            os.replace(Path(temp, WEIGHTS), path / WEIGHTS)


def load_new(
    model: nn.Module,
    model_id: str | os.PathLike[str],
    name: str,
    is_trainable: bool,
    autocast_adapter_dtype: bool = True,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    **kwargs: Any,
) -> AnyConfig:
    """Attach the adapter in a folder or on a hub, active, and return its config."""
    refuse_options(**{key: value for key, value in kwargs.items() if key not in IGNORED})
    where = Path(model_id, subfolder) if subfolder else model_id
    loaded = store.load(model, where, name, trainable=is_trainable, revision=revision)
    config = _config_in(loaded.path)
    config.inference_mode = not is_trainable
    return config


def _config_in(folder: Path) -> AnyConfig:
    raw = read_config(folder / CONFIG)
    raw.pop("runtime_config", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # load has said it already
        return PeftConfig.from_peft_type(**{**raw, "inference_mode": True})


def load_into(
    model: nn.Module,
    model_id: str | os.PathLike[str],
    name: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    **kwargs: Any,
) -> LoadResult:
    """Put the values of a saved adapter into one that is there, so that an optimizer keeps its parameters."""
    refuse_options(**{key: value for key, value in kwargs.items() if key not in IGNORED})
    path = find(Path(model_id, subfolder) if subfolder else model_id, name, revision)
    file, config = TensorFile(path / WEIGHTS), read_config(path / CONFIG)
    with unmerged(model):
        fitted = fit(model, parse(config, str(path)), file, name)
        _refuse_other_scale(model, name, fitted.spec, str(path))
        store.fill(model, name, fitted, same_start(model, name, store.values_of(model, fitted, name)))
    return nothing_amiss()


def _scales(model: nn.Module, name: str, spec: LoRA) -> Iterator[tuple[str, Any, float]]:
    """(layer, its live delta, the scale that `spec` gives it)."""
    for site, layer in sites(model, name).items():
        delta = adapter_of(layer, name).delta
        if delta is not None:
            yield site, delta, spec.at(site).scale


def _refuse_other_scale(model: nn.Module, name: str, spec: LoRA, where: str) -> None:
    """The same factors under another alpha are another adapter, and shapes do not show it."""
    other = [
        f"{site}: scale {scale:g} in the file, {delta.scale:g} here"
        for site, delta, scale in _scales(model, name, spec)
        if abs(delta.scale - scale) > 1e-6 * abs(scale)
    ]
    if other:
        raise CheckpointError(
            f"the file's adapter is scaled otherwise than {name!r} (alpha, rank or rsLoRA differ)",
            where,
            "hotswap_adapter takes the file's scale, or load it under another name",
            other,
        )


def hotswap_adapter(
    model: Any,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str = "default",
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Put another saved adapter in the place of `adapter_name`, scale and all; what is active stays active.

    Where layers, ranks and kinds are the same the parameters stay the same objects, so nothing is compiled again.
    Otherwise the old adapter is taken away and the new one attached under its name.
    """
    model = getattr(model, "_orig_mod", model)
    old = spec_of(model, adapter_name)
    if is_merged(model):
        raise StateError(f"{adapter_name!r} cannot be swapped while adapters are merged", fix="unmerge_adapter() first")
    path = find(model_name_or_path, adapter_name, kwargs.get("revision"))
    fitted = fit(model, parse(read_config(path / CONFIG), str(path)), TensorFile(path / WEIGHTS), adapter_name)
    try:
        values = same_start(model, adapter_name, store.values_of(model, fitted, adapter_name))
        store.fill(model, adapter_name, fitted, values)
    except CheckpointError:  # other layers, ranks or kinds
        _replace(model, adapter_name, path)
    else:
        for _, delta, scale in _scales(model, adapter_name, fitted.spec):
            delta.scale = scale
        new = {key: getattr(fitted.spec, key) for key in ("rank", "alpha", "scaling", "overrides", "dropout")}
        state_of(model).placed[adapter_name].spec = dataclasses.replace(old, **new)
    if hasattr(model, "peft_config"):
        model.peft_config[adapter_name] = _config_in(path)


def _replace(model: nn.Module, name: str, path: Path) -> None:
    active = active_of(model)
    before, trained = (active.names, active.mix), any(p.requires_grad for p in parameters(model, name).values())
    detach(model, name)
    store.load(model, path, name, trainable=trained)
    active_of(model).change(*before)
