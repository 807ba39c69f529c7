"""What PEFT's users do with files and state dicts, by way of `veneer.ckpt.peft`.

A folder that a Trainer calls checkpoint-<step> gets one file more: model.safetensors, with the adapters' live state
under the model's own names. The Trainer looks for that name when it resumes or fetches the best model, and hands what
it finds to `load_state_dict`. There is nothing of the base in it, and it is exact where the PEFT layout is a
translation (PiSSA's pair becomes a LoRA of twice the rank there). So an unchanged Trainer resumes bit for bit from a
few megabytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.ckpt import peft as store
from veneer.ckpt.atomic import atomic_file, atomic_write
from veneer.ckpt.config import CONFIG, parse, read_config
from veneer.ckpt.fit import fit
from veneer.ckpt.hub import WEIGHTS, find
from veneer.ckpt.layout import PREFIX
from veneer.ckpt.tensorfile import TensorFile, header_bytes, save_tensors
from veneer.core.model import (
    Mixture,
    _state,
    active_of,
    adapter_of,
    adapters,
    detach,
    is_merged,
    merge,
    parameters,
    put,
    sites,
    spec_of,
    tensors,
    unmerge,
)
from veneer.core.registry import near
from veneer.core.spec import LoRA
from veneer.errors import CheckpointError, ConfigError, StateError
from veneer.peft.config import LoraConfig, PeftConfig

__all__ = [
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "load_into",
    "load_new",
    "load_peft_weights",
    "save_pretrained",
    "set_peft_model_state_dict",
]

CHECKPOINT, LIVE = re.compile(r"checkpoint-\d+"), "model.safetensors"  # as transformers' Trainer names them


class LoadResult(NamedTuple):
    """As torch's load_state_dict returns it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def nothing_amiss() -> LoadResult:
    return LoadResult([], [])


# ---------------------------------------------------------------- what is on a model


def hosts(model: nn.Module) -> dict[str, Any]:
    """Every layer that carries an adapter or is trained whole by one, in the model's order."""
    held = _state(model).hosts
    return {name: held[name] for name, _ in store.plain_modules(model).items() if name in held}


def merged_mixture(model: nn.Module) -> Mixture:
    """What is merged into the weights, as merge takes it; None if nothing is."""
    return _state(model).merged if is_merged(model) else None


def merged_names(model: nn.Module) -> list[str]:
    mixture = merged_mixture(model)
    return [mixture] if isinstance(mixture, str) else list(mixture or ())


def config_of(model: nn.Module, name: str, task: str | None = None) -> LoraConfig:
    """A LoraConfig for an adapter that was attached without one."""
    spec = spec_of(model, name)
    words = store._config(model, name, spec, store._contents(model, name))
    known = {key: value for key, value in words.items() if key in LoraConfig.__dataclass_fields__}
    start = True if spec.init == "kaiming" else spec.init
    return LoraConfig(**{**known, "inference_mode": False, "init_lora_weights": start, "task_type": task})


@contextmanager
def _unmerged(model: nn.Module) -> Iterator[None]:
    """Files are written of adapters beside the base, whatever is merged at the moment."""
    merged = merged_mixture(model)
    if merged is None:
        yield
        return
    unmerge(model)
    try:
        yield
    finally:
        merge(model, merged)


# ---------------------------------------------------------------- state dicts


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors under the keys of PEFT's files, without the adapter's name in them."""
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    _refuse_other_values(model, state_dict)
    with _unmerged(model):
        found = dict(store._contents(model, adapter_name).tensors)
    if _wants_embeddings(model, save_embedding_layers):
        found |= _embeddings(model, found)
    return {_key(model, key): value for key, value in found.items()}


def _key(model: nn.Module, key: str) -> str:
    """PEFT's wrapper puts a prefix before all names; a model that was only injected into has none."""
    return key if hasattr(model, "get_base_model") else key.removeprefix(PREFIX)


def load_peft_weights(
    model_id: str | os.PathLike[str], device: str | torch.device | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """The tensors of an adapter's file under its own keys; they lie on the file's pages until they are used."""
    refuse_options(**{key: value for key, value in kwargs.items() if key not in (*IGNORED, "revision")})
    file = TensorFile(find(model_id, revision=kwargs.get("revision")) / WEIGHTS)
    return {stored.name: stored.load().to(device or "cpu") for stored in file}


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Put values under PEFT's keys into an adapter that is there. Says which were missing and which were too many."""
    spec = spec_of(model, adapter_name)
    with _unmerged(model):
        contents = store._contents(model, adapter_name)
        given = {PREFIX + key.removeprefix(PREFIX): value for key, value in peft_model_state_dict.items()}
        bases = {f"{PREFIX}{site}.base_layer.weight" for site in contents.ranks}  # an embedding's, compared with ours
        unexpected = sorted(given.keys() - contents.tensors.keys() - bases)
        known = {key: value for key, value in given.items() if key not in unexpected}
        if not known:
            some = ", ".join(list(given)[:2]) or "nothing"
            raise CheckpointError(
                f"none of the {len(given)} keys belongs to adapter {adapter_name!r}",
                fix=f"given: {some}; wanted: {', '.join(list(contents.tensors)[:2])}",
            )
        if ignore_mismatched_sizes:
            shapes = {key: value.shape for key, value in contents.tensors.items()}
            known = {key: value for key, value in known.items() if value.shape == shapes.get(key, value.shape)}
        config = store._config(model, adapter_name, spec, contents)
        _put_file(model, adapter_name, {**contents.tensors, **known}, config)
    return LoadResult(sorted(contents.tensors.keys() - known.keys()), unexpected)


def _put_file(model: nn.Module, name: str, content: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """What would be read from a file with this content, put into the live adapter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, WEIGHTS)
        save_tensors(path, {key: value.detach() for key, value in content.items()})
        fitted = fit(model, parse(config), TensorFile(path), name)
        put(model, name, _same_start(model, name, store._values(model, fitted, name)))


def _same_start(model: nn.Module, name: str, values: dict[tuple[str, str], Tensor]) -> dict[tuple[str, str], Tensor]:
    """A live PiSSA or OLoRA adapter takes its factors out of the pair [A; A0], [B, -B0] that a file holds of it."""
    own = tensors(model, name)
    for (site, key), a0 in own.items():
        if key != "A0" or (site, "A") not in values:
            continue
        b0, a, b, r = own[site, "B0"], values[site, "A"], values[site, "B"], a0.shape[0]
        values |= {(site, "A0"): a0.detach(), (site, "B0"): b0.detach()}
        if a.shape[0] == 2 * r and torch.equal(a[r:].to(a0), a0) and torch.equal(-b[:, r:].to(b0), b0):
            values |= {(site, "A"): a[:r], (site, "B"): b[:, :r]}
    return values


def _refuse_other_values(model: nn.Module, state_dict: Mapping[str, Any] | None) -> None:
    """The state dict is the model's own, handed round by a Trainer; one with other values would silently be lost."""
    if state_dict is None:
        return
    own = live_state(model)
    other = [k for k, v in own.items() if k in state_dict and not torch.equal(store._whole(state_dict[k]).to(v), v)]
    if other:
        raise ConfigError(
            "this state_dict holds other values than the model's adapters",
            problems=other,
            fix="set_peft_model_state_dict(model, ...) first, then save",
        )


# ---------------------------------------------------------------- embeddings that were resized


def _wants_embeddings(model: Any, choice: bool | str) -> bool:
    """With "auto" only where the vocabulary was resized, because then the base alone could not give the rows back."""
    if choice != "auto":
        return bool(choice)
    config, base = getattr(model, "config", None), getattr(model, "name_or_path", None)
    if not base or not Path(base, "config.json").is_file():
        return False  # as PEFT does: what cannot be compared is taken as unchanged
    before = json.loads(Path(base, "config.json").read_text()).get("vocab_size")
    resized = before is not None and before != getattr(config, "vocab_size", before)
    if resized:
        warnings.warn(f"the vocabulary was resized from {before}, so the embeddings are saved whole", stacklevel=4)
    return resized


def _embeddings(model: Any, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the input and output embeddings, unless the adapter brings its own copy of them."""
    layers: list[Any] = [
        getattr(model, getter, lambda: None)() for getter in ("get_input_embeddings", "get_output_embeddings")
    ]
    if not any(layers):
        raise ConfigError("this model does not say which layers are its embeddings", fix="save_embedding_layers=False")
    names = {id(module): name for name, module in store.plain_modules(model).items()}
    extra = {}
    for layer in layers:
        name = names.get(id(layer))
        if name is not None and f"{PREFIX}{name}.weight" not in found:
            adapted = any(key.startswith(f"{PREFIX}{name}.lora_") for key in found)
            key = f"{PREFIX}{name}.base_layer.weight" if adapted else f"{PREFIX}{name}.weight"
            extra[key] = store._whole(layer._parameters["weight"]).clone()
    return extra


# ---------------------------------------------------------------- folders


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
    _refuse_other_values(model, state_dict)
    if not is_main_process:
        return
    with _unmerged(model):
        for name in names:
            path = store.save(model, folder, name)
            _complete(model, path, model.peft_config[name], save_embedding_layers)
        if CHECKPOINT.fullmatch(folder.name):
            _save_live(model, folder / LIVE)


def _chosen(model: nn.Module, selected: Iterable[str] | None) -> list[str]:
    names = list(adapters(model) if selected is None else selected)
    unknown = [f"{n!r}.{near(n, adapters(model))}" for n in names if n not in adapters(model)]
    if unknown or not names:
        there = ", ".join(adapters(model)) or "none"
        raise StateError("selected_adapters: no such adapter", problems=unknown, fix=f"there are: {there}")
    return names


def _complete(model: Any, path: Path, config: LoraConfig, save_embedding_layers: str | bool) -> None:
    """What only the LoraConfig knows (task, base, revision, keys from elsewhere), and embeddings where they belong."""
    written = read_config(path / CONFIG)
    config.base_model_name_or_path = config.base_model_name_or_path or written["base_model_name_or_path"]
    own = {key: getattr(config, key) for key in ("base_model_name_or_path", "revision") if getattr(config, key)}
    if config.task_type is not None:
        own |= {"task_type": config.to_dict()["task_type"], "auto_mapping": None}
    completed = {**config.unknown, **written, **own}
    if completed != written:
        atomic_write(path / CONFIG, json.dumps(completed, indent=2, sort_keys=True) + "\n")
    if _wants_embeddings(model, save_embedding_layers):
        file = TensorFile(path / WEIGHTS)
        content = {stored.name: stored.load() for stored in file}
        with tempfile.TemporaryDirectory(dir=path.parent) as temp:
            save_tensors(Path(temp, WEIGHTS), {**content, **_embeddings(model, content)}, file.metadata)
            os.replace(Path(temp, WEIGHTS), path / WEIGHTS)


IGNORED = (  # say where to run or how to download; an adapter goes where its layer is
    *("torch_device", "device_map", "max_memory", "offload_folder", "offload_dir", "offload_index"),
    *("token", "use_auth_token", "cache_dir", "local_files_only", "force_download", "proxies", "user_agent"),
    *("use_safetensors", "etag_timeout"),
)


def refuse_options(**options: Any) -> None:
    """Arguments of PEFT that would change what is loaded, and are not served."""
    given = [f"{key}={value!r}" for key, value in options.items() if value]
    if given:
        raise ConfigError("these options are not served", problems=given, fix="leave them out")


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
) -> LoraConfig:
    """Attach the adapter in a folder or on a hub, active, and return its config."""
    refuse_options(**{key: value for key, value in kwargs.items() if key not in IGNORED})
    where = Path(model_id, subfolder) if subfolder else model_id
    loaded = store.load(model, where, name, trainable=is_trainable, revision=revision)
    config = _config_in(loaded.path)
    config.inference_mode = not is_trainable
    return config


def _config_in(folder: Path) -> LoraConfig:
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
    with _unmerged(model):
        fitted = fit(model, parse(config, str(path)), file, name)
        _refuse_other_scale(model, name, fitted.spec, str(path))
        put(model, name, _same_start(model, name, store._values(model, fitted, name)))
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
        put(model, adapter_name, _same_start(model, adapter_name, store._values(model, fitted, adapter_name)))
    except CheckpointError:  # other layers, ranks or kinds
        _replace(model, adapter_name, path)
    else:
        for _, delta, scale in _scales(model, adapter_name, fitted.spec):
            delta.scale = scale
        new = {key: getattr(fitted.spec, key) for key in ("rank", "alpha", "scaling", "overrides", "dropout")}
        _state(model).placed[adapter_name].spec = dataclasses.replace(old, **new)
    if hasattr(model, "peft_config"):
        model.peft_config[adapter_name] = _config_in(path)


def _replace(model: nn.Module, name: str, path: Path) -> None:
    active = active_of(model)
    before, trained = (active.names, active.mix), any(p.requires_grad for p in parameters(model, name).values())
    detach(model, name)
    store.load(model, path, name, trainable=trained)
    active_of(model).change(*before)


# ---------------------------------------------------------------- a Trainer's checkpoint


def is_live_key(key: str) -> bool:
    """Whether a key of the model's own state dict belongs to an adapter."""
    return ".lora." in f".{key}"


def live_state(model: nn.Module) -> dict[str, Tensor]:
    """What of the model's state dict belongs to its adapters."""
    return {key: value for key, value in model.state_dict().items() if is_live_key(key)}


def _save_live(model: nn.Module, path: Path) -> None:
    content = {key: store._whole(value).cpu().contiguous() for key, value in live_state(model).items()}
    note = {"veneer": "adapters alone, for a Trainer to resume from; the adapter to use is adapter_model.safetensors"}
    announced = {key: (value.dtype, tuple(value.shape)) for key, value in content.items()}
    with atomic_file(path) as file:
        file.write(header_bytes(announced, note))
        for value in content.values():
            file.write(value.flatten().view(torch.uint8).numpy().tobytes())


def load_live(model: nn.Module, state: Mapping[str, Tensor]) -> LoadResult:
    """Put a checkpoint's adapters back. Other adapters, or other shapes, mean another run: an error, not a warning."""
    own = live_state(model)
    problems = [f"{key}: in the checkpoint, not on the model" for key in state.keys() - own.keys()]
    problems += [f"{key}: on the model, not in the checkpoint" for key in own.keys() - state.keys()]
    problems += [
        f"{key}: {list(value.shape)} in the checkpoint, {list(own[key].shape)} on the model"
        for key, value in state.items()
        if key in own and own[key].shape != value.shape
    ]
    if problems:
        raise CheckpointError(
            "this checkpoint belongs to other adapters than the model has; nothing was loaded",
            fix="attach the adapters with the settings that the run began with, then resume",
            problems=sorted(problems),
        )
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)
    return nothing_amiss()
