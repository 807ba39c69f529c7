"""What a file says of an adapter that is on a model: its tensors under PEFT's keys, and its config in PEFT's words.

PEFT's config has one rank and alpha with patterns for exceptions, one scaling rule and one answer to "DoRA?" for all
layers, and lists of names where our presets are rules. All of that can be said exactly: what differs by layer goes into
alpha (only the scale counts), names are chosen so that PEFT's own rules pick the same layers (config.py checks), and a
layer without DoRA among others with it gets the magnitude that changes nothing, |W + dW|.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.ckpt.base import base_of
from veneer.ckpt.config import TASK_HEADS, Rank, parameters_for, patterns_for, targets_for
from veneer.ckpt.layout import NESTED, PREFIX, file_rank, to_file
from veneer.core.delta import Lora
from veneer.core.deltas.fused import FusedLora
from veneer.core.host import plain_modules
from veneer.core.leaf import Leaf, own_parameters
from veneer.core.model import adapter_of, sites, spec_of, tensors
from veneer.core.op import OPS, op_of
from veneer.core.spec import LoRA
from veneer.core.weight import read_weight

__all__ = ["Contents", "adapted_sites", "config_of", "contents_of", "keep_unknown", "whole"]

# What config files held that we do not know, to be written back with the same adapter.
_unknown: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[LoRA, dict[str, Any]]]] = weakref.WeakKeyDictionary()


def keep_unknown(model: nn.Module, name: str, spec: LoRA, words: Mapping[str, Any]) -> None:
    """Write these keys back when adapter `name` is saved, as long as it is the one with this spec."""
    _unknown.setdefault(model, {})[name] = spec, dict(words)


def adapted_sites(model: nn.Module, name: str) -> set[str]:
    """The layers with a low-rank change; those that only got a change of their bias are not among them."""
    return {site for site, host in sites(model, name).items() if adapter_of(host, name).delta is not None}


@dataclass
class Contents:
    """The file to be: tensors by key, the rank and alpha of every layer in it, and what PEFT will read differently."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, Rank] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)  # what to know -> the layers that it is about


def contents_of(model: nn.Module, name: str) -> Contents:
    """The tensors of the file, and what the config has to say about them."""
    spec, hosts, out = spec_of(model, name), sites(model, name), Contents()
    uses_dora = any(spec.at(site).combine == "dora" for site in adapted_sites(model, name))
    for site, host in hosts.items():
        adapter = adapter_of(host, name)
        if adapter.delta is not None:
            parts, key = _parts(host, adapter, uses_dora), _module_key(site, host, hosts)
            out.tensors |= {f"{PREFIX}{key}.{leaf}": value for leaf, value in to_file(host, parts).items()}
            out.ranks[site] = _rank_in_file(spec, site, host, adapter.delta, parts["A"].shape[-2])
            for note in _limits(host, adapter.delta, uses_dora):
                out.notes.setdefault(note, []).append(site)
        if adapter.bias is not None:
            total = whole(own_parameters(host)["bias"]).to(adapter.bias) + whole(adapter.bias)
            out.tensors[f"{PREFIX}{site}{'' if adapter.delta is None else '.base_layer'}.bias"] = total
    for (site, key), value in tensors(model, name).items():
        if key.startswith("saved."):
            out.tensors[f"{PREFIX}{site}.{key.removeprefix('saved.')}"] = whole(value)
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
    a, b = (whole(factor) for factor in adapter.delta.factors())
    if hasattr(adapter.delta, "real_rank"):  # AdaLoRA: directions that are switched off need no place in a file
        on = a.any(-1) if a.any() else torch.arange(len(a)) == 0
        a, b = a[on], b[:, on]
    parts = {"A": a, "B": b}
    if hasattr(adapter.combine, "magnitude"):
        parts["magnitude"] = whole(adapter.combine.magnitude)
    elif uses_dora:
        op = op_of(host)
        w = op.to_matrix(host, whole(read_weight(host))).float() + adapter.delta.weight().detach()
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


def config_of(model: nn.Module, name: str, spec: LoRA, contents: Contents) -> dict[str, Any]:
    """The adapter_config.json that belongs to these contents."""
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


def whole(t: Any) -> Tensor:
    """The tensor itself, gathered where FSDP2 has spread it over ranks."""
    t = t.detach()
    return t.full_tensor() if hasattr(t, "full_tensor") else t
