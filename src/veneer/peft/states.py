"""State dicts under PEFT's keys: what its files hold, for those who handle the tensors themselves."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.ckpt import peft as store
from veneer.ckpt.config import parse
from veneer.ckpt.fit import fit
from veneer.ckpt.hub import WEIGHTS, find
from veneer.ckpt.layout import PREFIX
from veneer.ckpt.tensorfile import TensorFile, save_tensors
from veneer.core.host import plain_modules
from veneer.core.model import spec_of, tensors, unmerged
from veneer.errors import CheckpointError, ConfigError
from veneer.peft.held import LoadResult
from veneer.peft.live import live_state

__all__ = [
    "embeddings_of",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "refuse_options",
    "refuse_other_values",
    "same_start",
    "set_peft_model_state_dict",
    "wants_embeddings",
]


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors under the keys of PEFT's files, without the adapter's name in them."""
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    refuse_other_values(model, state_dict)
    with unmerged(model):
        found = dict(store.contents_of(model, adapter_name).tensors)
    if wants_embeddings(model, save_embedding_layers):
        found |= embeddings_of(model, found)
    return {_key(model, key): value for key, value in found.items()}


def _key(model: nn.Module, key: str) -> str:
    """PEFT's wrapper puts a prefix before all names; a model that was only injected into has none."""
    return key if hasattr(model, "get_base_model") else key.removeprefix(PREFIX)


def _full(key: str) -> str:
    """With the prefix, which only a tensor that belongs to no layer (VeRA's) comes without."""
    return key if key.startswith("base_model.") else PREFIX + key


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
    with unmerged(model):
        contents = store.contents_of(model, adapter_name)
        given = {_full(key): value for key, value in peft_model_state_dict.items()}
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
        config = store.config_of(model, adapter_name, spec, contents)
        _put_file(model, adapter_name, {**contents.tensors, **known}, config)
    return LoadResult(sorted(contents.tensors.keys() - known.keys()), unexpected)


def _put_file(model: nn.Module, name: str, content: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """What would be read from a file with this content, put into the live adapter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, WEIGHTS)
        save_tensors(path, {key: value.detach() for key, value in content.items()})
        fitted = fit(model, parse(config), TensorFile(path), name)
        store.fill(model, name, fitted, same_start(model, name, store.values_of(model, fitted, name)))


def same_start(model: nn.Module, name: str, values: dict[tuple[str, str], Tensor]) -> dict[tuple[str, str], Tensor]:
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


def refuse_other_values(model: nn.Module, state_dict: Mapping[str, Any] | None) -> None:
    """The state dict is the model's own, handed round by a Trainer; one with other values would silently be lost."""
    if state_dict is None:
        return
    own = live_state(model)
    other = [k for k, v in own.items() if k in state_dict and not torch.equal(store.whole(state_dict[k]).to(v), v)]
    if other:
        raise ConfigError(
            "this state_dict holds other values than the model's adapters",
            problems=other,
            fix="set_peft_model_state_dict(model, ...) first, then save",
        )


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


# ---------------------------------------------------------------- embeddings that were resized


def wants_embeddings(model: Any, choice: bool | str) -> bool:
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


def embeddings_of(model: Any, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the input and output embeddings, unless the adapter brings its own copy of them."""
    layers: list[Any] = [
        getattr(model, getter, lambda: None)() for getter in ("get_input_embeddings", "get_output_embeddings")
    ]
    if not any(layers):
        raise ConfigError("this model does not say which layers are its embeddings", fix="save_embedding_layers=False")
    names = {id(module): name for name, module in plain_modules(model).items()}
    extra = {}
    for layer in layers:
        name = names.get(id(layer))
        if name is not None and f"{PREFIX}{name}.weight" not in found:
            adapted = any(key.startswith(f"{PREFIX}{name}.lora_") for key in found)
            key = f"{PREFIX}{name}.base_layer.weight" if adapted else f"{PREFIX}{name}.weight"
            extra[key] = store.whole(layer._parameters["weight"]).clone()
    return extra
