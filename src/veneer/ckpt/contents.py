"""What a file says of an adapter that is on a model: its tensors under PEFT's keys, and its config in PEFT's words.

PEFT's config has one rank and alpha with patterns for exceptions, one scaling rule and one answer to "DoRA?" for all
layers, and lists of names where our presets are rules. All of that can be said exactly: what differs by layer goes into
alpha (only the scale counts), names are chosen so that PEFT's own rules pick the same layers (config.py checks), and a
layer without DoRA among others with it gets the magnitude that changes nothing, |W + dW|.

An adapter of another method is written in PEFT's layout of that method where PEFT can hold all of it (methods.py), and
as the plain LoRA that it is worth where not, which is noted.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.ckpt.base import base_of
from veneer.ckpt.config import TASK_HEADS, Parsed, Rank, parameters_for, patterns_for, targets_for
from veneer.ckpt.layout import NESTED, PREFIX, TOKENS, file_rank, to_file
from veneer.ckpt.methods import METHODS, Method, method_of, pack, projection, pruned
from veneer.core.delta import DELTAS, Lora
from veneer.core.deltas.fused import FusedLora
from veneer.core.deltas.tokens import TokenRows
from veneer.core.host import plain_modules
from veneer.core.leaf import Leaf, own_parameters
from veneer.core.model import adapter_of, sites, spec_of, tensors
from veneer.core.op import OPS, op_of
from veneer.core.select import ends_with
from veneer.core.spec import LoRA
from veneer.core.weight import read_weight
from veneer.errors import CheckpointError

__all__ = ["Contents", "adapted_sites", "add_factors", "config_of", "contents_of", "keep_words", "kept_words", "whole"]

# What configs say that no spec holds, to be written back with the same adapter.
_kept: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[LoRA, dict[str, Any]]]] = weakref.WeakKeyDictionary()


def keep_words(model: nn.Module, name: str, spec: LoRA, words: Mapping[str, Any]) -> None:
    """Write these keys when adapter `name` is saved, as long as it is the one with this spec."""
    _kept.setdefault(model, {})[name] = spec, dict(words)


def kept_words(parsed: Parsed) -> dict[str, Any]:
    """What of a config would be lost: keys that nobody knows, and those that only PEFT's training reads."""
    method = METHODS.get(parsed.kind)
    training = method.training if method is not None else {}
    return {**parsed.unknown, **{key: parsed.raw[key] for key in training if key in parsed.raw}}


def adapted_sites(model: nn.Module, name: str) -> set[str]:
    """The layers with a change of their own: neither those of which only the bias changes, nor those that share their
    weight with another and show its change."""
    deltas = {site: adapter_of(host, name).delta for site, host in sites(model, name).items()}
    return {site for site, delta in deltas.items() if delta is not None and not hasattr(delta, "source")}


@dataclass
class Contents:
    """The file to be: tensors by key, the rank and alpha of every layer in it, and what PEFT will read differently."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, Rank] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)  # what to know -> the layers that it is about
    kind: str = "LORA"  # the peft_type
    attentions: list[str] = field(default_factory=list)  # the projections of attentions that are targets as a whole
    follows: bool = False  # whether a layer shows the change of another one that its weight is tied to
    rows: dict[str, list[int]] = field(default_factory=dict)  # tables of which only these rows are trained
    masks: dict[str, list[bool]] = field(default_factory=dict)  # AdaLoRA: which directions of each layer are in it


def contents_of(model: nn.Module, name: str) -> Contents:
    """The tensors of the file, and what the config has to say about them."""
    spec, hosts = spec_of(model, name), sites(model, name)
    layers = {site: (host, adapter_of(host, name)) for site, host in hosts.items()}
    out = Contents(kind=method_of(spec, layers))
    (add_factors if out.kind == "LORA" else _add_tensors)(out, spec, layers)
    _complete_attentions(model, out)
    for site, (host, adapter) in layers.items():
        if adapter.bias is not None:
            out.tensors |= _bias(site, host, adapter, spec.bias == "lora")
    for (site, key), value in tensors(model, name).items():
        if key.startswith("saved."):
            out.tensors[f"{PREFIX}{site}.{key.removeprefix('saved.')}"] = whole(value)
            out.saved += [site] if site not in out.saved else []
    return out


def _bias(site: str, host: nn.Module, adapter: Any, in_b: bool) -> dict[str, Tensor]:
    """The bias as the file has it: B's own, inside the scaling; or the layer's, its full value."""
    change = whole(adapter.bias)
    if in_b:
        return {f"{PREFIX}{site}.lora_B.bias": change / adapter.delta.scale}
    total = whole(own_parameters(host)["bias"]).to(change) + change
    return {f"{PREFIX}{site}{'' if adapter.delta is None else '.base_layer'}.bias": total}


Layers = Mapping[str, tuple[Any, Any]]
"""Name -> the layer and its adapter."""


def add_factors(out: Contents, spec: LoRA, layers: Layers) -> None:
    """Every layer as A and B."""
    adapted = {site: pair for site, pair in layers.items() if pair[1].delta is not None}
    tables = [site for site, (_, adapter) in adapted.items() if isinstance(adapter.delta, TokenRows)]
    for site in tables if len(tables) < len(adapted) else ():  # PEFT refuses a LoRA without a single target
        host, adapter = adapted.pop(site)
        if not hasattr(adapter.delta, "source"):  # a layer that is tied to the table shows the same rows in PEFT, too
            _add_rows(out, spec, site, host, adapter.delta)
    uses_dora = any(spec.at(site).combine == "dora" for site in adapted)
    hosts = {site: host for site, (host, _) in layers.items()}
    for site, (host, adapter) in adapted.items():
        parts = _parts(host, adapter, uses_dora)
        if (attention := _attention_of(site, hosts)) is not None:
            rank = _rank_in_file(spec, site, host, adapter.delta, len(parts["A"]))
            parts["B"] = parts["B"] * _attention_share(out, attention, site, rank)
        key = _module_key(site, host, hosts)
        out.tensors |= {f"{PREFIX}{key}.{leaf}": value for leaf, value in to_file(host, parts).items()}
        if attention is not None:
            continue
        if hasattr(adapter.delta, "source"):  # PEFT, told to, makes this layer a target by itself
            out.follows = True
            continue
        out.ranks[site] = _rank_in_file(spec, site, host, adapter.delta, parts["A"].shape[-2])
        for note in _limits(host, adapter.delta, uses_dora):
            out.notes.setdefault(note, []).append(site)


def _add_rows(out: Contents, spec: LoRA, site: str, host: nn.Module, delta: Any) -> None:
    """The new values of a table's rows, in the order in which they were asked for."""
    asked = [rows for ending, rows in _asked_rows(spec) if ending is None or ends_with(site, ending)]
    asked = asked or [delta.rows.tolist()]  # attached as any other kind of delta, not by token_rows
    order = torch.tensor(list(dict.fromkeys(asked[-1])), device=delta.rows.device)
    table = whole(read_weight(host))
    change = whole(delta.change)[torch.searchsorted(delta.rows, order)] * delta.scale
    out.rows[site] = order.tolist()
    out.tensors[f"{PREFIX}{site}{TOKENS}.trainable_tokens_delta"] = table[order.to(table.device)] + change


def _asked_rows(spec: LoRA) -> list[tuple[str | None, Any]]:
    """(name ending, rows); no ending stands for the input embedding."""
    if isinstance(spec.token_rows, Mapping):
        return list(spec.token_rows.items())
    return [(None, spec.token_rows)] if spec.token_rows else []


def _add_tensors(out: Contents, spec: LoRA, layers: Layers) -> None:
    """Every layer as its own method has it."""
    held = {site: (host, adapter.delta) for site, (host, adapter) in layers.items() if adapter.delta is not None}
    own = {site: _saved_by(delta) for site, (_, delta) in held.items()}
    out.masks = pruned(own) if out.kind == "ADALORA" else {}
    for site, (host, delta) in held.items():
        if (on := out.masks.get(site)) is not None:
            a, b, e = (own[site][key] for key in "ABE")
            own[site] = {"A": a[on], "B": b[:, on], "E": e[on]}
        found = pack(host, delta, own[site])
        out.tensors |= {f"{PREFIX}{site}.{leaf}": value for leaf, value in found.items()}
        asked = spec.at(site)
        is_plain = METHODS[out.kind].alpha is None or (asked.scaling == "lora" and asked.scale == delta.scale)
        out.ranks[site] = Rank(asked.rank, asked.alpha if is_plain else delta.scale * asked.rank)
    if out.kind == "VERA" and _options(spec, held)["save_projection"]:
        out.tensors |= {key: whole(value) for key, value in projection(delta for _, delta in held.values())}


def _options(spec: LoRA, layers: Iterable[str]) -> dict[str, Any]:
    """The settings of this kind of delta, which are the same for all layers of one file."""
    own = spec.at(next(iter(layers)))
    return {**DELTAS[own.delta].options, **own.options}


def _saved_by(delta: Any) -> dict[str, Tensor]:
    return {key: whole(value) for key, value in delta.state_dict(keep_vars=True).items() if key in type(delta).saved}


def _attention_of(site: str, hosts: Mapping[str, nn.Module]) -> str | None:
    """The nn.MultiheadAttention whose packed projections PEFT adapts as one target, if this is a part of it.

    PEFT adapts in_proj and out_proj together, under the name of the attention. An in_proj alone is a bare parameter.
    """
    owner, _, part = site.rpartition(".")
    is_out = isinstance(hosts[site], nn.modules.linear.NonDynamicallyQuantizableLinear)
    is_in = part == "in_proj_weight" and isinstance(hosts[site], Leaf) and f"{owner}.out_proj" in hosts
    return owner if is_out or is_in else None


def _attention_share(out: Contents, attention: str, site: str, rank: Rank) -> float:
    """What this projection's B must be multiplied by: PEFT has one rank and one alpha for both projections, and it
    counts the change of out_proj twice (layout.py)."""
    times = 2 if site.endswith(".out_proj") else 1
    common = out.ranks.setdefault(attention, Rank(rank.rank, rank.alpha / times))
    if common.rank != rank.rank:
        raise CheckpointError(
            f"PEFT has one rank for both projections of {attention}, and here they differ.",
            site,
            "give in_proj_weight and out_proj the same rank",
        )
    out.attentions.append(site)
    return rank.alpha / (times * common.alpha)


def _complete_attentions(model: nn.Module, out: Contents) -> None:
    """An out_proj alone: PEFT expects the input projection's factors too, and zeros are what they are."""
    for attention in {site.rpartition(".")[0] for site in out.attentions}:
        key, module = f"{PREFIX}{attention}", model.get_submodule(attention)
        weight = module._parameters.get("in_proj_weight")
        if weight is None:
            note = (
                "PEFT cannot adapt the out_proj of an attention with separate projections; load this file with veneer"
            )
            out.notes.setdefault(note, []).append(f"{attention}.out_proj")
        elif f"{key}.lora_A.weight" not in out.tensors:
            like, rank = out.tensors[f"{key}{NESTED}.out_proj.lora_A.weight"], out.ranks[attention].rank
            out.tensors[f"{key}.lora_A.weight"] = like.new_zeros(rank, weight.shape[1])
            out.tensors[f"{key}.lora_B.weight"] = like.new_zeros(weight.shape[0], rank)


def _module_key(site: str, host: nn.Module, hosts: Mapping[str, nn.Module]) -> str:
    """The layer's name; for a bare parameter its module's, nested as PEFT nests several of one module."""
    if (attention := _attention_of(site, hosts)) is not None:
        return attention if isinstance(host, Leaf) else f"{attention}{NESTED}.out_proj"
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
    own, shown = spec.at(site), file_rank(host, rank)
    is_root = spec.scaling == "rslora"  # a constant is written as lora
    if own.scaling == spec.scaling != "constant" and own.scale == delta.scale:  # by the ratio: alpha is not rounded
        grown = shown / own.rank
        return Rank(shown, own.alpha * (grown**0.5 if is_root else grown))
    return Rank(shown, delta.scale * (shown**0.5 if is_root else shown))


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
    hosts = {site: host for site, host in sites(model, name).items() if site not in contents.attentions}
    kinds = {op_of(host) for site, host in hosts.items() if site in contents.ranks}
    base = base_of(model)
    task = _task(model, contents.saved)
    bare = [site for site, host in hosts.items() if isinstance(host, Leaf)]
    layers = [site for site in contents.ranks if site not in bare]
    parameters = [f"{n}.{p}" for n, module in modules.items() for p in module._parameters] if bare else []
    method = METHODS.get(contents.kind)
    config: dict[str, Any] = {
        "peft_type": contents.kind,
        "task_type": task,
        "auto_mapping": None if task else _auto_mapping(model),
        "base_model_name_or_path": base.id or None,
        "revision": base.revision or None,
        "inference_mode": True,
        "modules_to_save": saved or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        **(_lora_words(spec, contents) if method is None else _method_words(method, spec, contents)),
        **targets_for(spec, layers, list(modules), saved, excludes=method is None or method.excludes),
        **({"target_parameters": parameters_for(bare, parameters)} if bare else {}),
        **({"ensure_weight_tying": True} if contents.follows else {}),
        **({"trainable_token_indices": _token_words(spec, contents)} if contents.rows else {}),
    }
    if "fan_in_fan_out" in config:
        config["fan_in_fan_out"] = OPS["transformers.pytorch_utils.Conv1D"] in kinds
    kept_for, words = _kept.get(model, {}).get(name, (None, {}))
    config |= words if kept_for is spec else {}
    return {key: config[key] for key in sorted(config)}


def _token_words(spec: LoRA, contents: Contents) -> list[int] | dict[str, list[int]]:
    """Bare rows for the input embedding, else the tables by the names that were given."""
    if not spec.token_rows:
        return dict(contents.rows)
    if not isinstance(spec.token_rows, Mapping):
        return next(iter(contents.rows.values()))
    return {ending: list(dict.fromkeys(rows)) for ending, rows in spec.token_rows.items()}


def _lora_words(spec: LoRA, contents: Contents) -> dict[str, Any]:
    return {
        "lora_dropout": spec.dropout,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "bias": "none" if spec.bias == "lora" else spec.bias,
        **({"lora_bias": True} if spec.bias == "lora" else {}),
        "use_rslora": spec.scaling == "rslora",
        "use_dora": any(key.endswith("lora_magnitude_vector") for key in contents.tensors),
        "init_lora_weights": True,  # where training began; the values are in the file
        **patterns_for(spec, contents.ranks),
    }


def _method_words(method: Method, spec: LoRA, contents: Contents) -> dict[str, Any]:
    """The same of another method, in its words."""
    ranks, options = patterns_for(spec, contents.ranks), _options(spec, contents.ranks)
    words: dict[str, Any] = {**method.training, **{theirs: options[ours] for ours, theirs in method.options.items()}}
    words[method.rank] = ranks["r"]
    if method.alpha is not None:
        words[method.alpha] = ranks["lora_alpha"]
    if method.dropout is not None:
        words[method.dropout] = spec.dropout
    if method.bias is not None:
        words |= {"bias": method.bias if spec.bias == "lora_only" else spec.bias, "fan_in_fan_out": False}
    if method.by_layer:
        words |= {key: ranks[key] for key in ("rank_pattern", "alpha_pattern")}
    if contents.kind == "ADALORA":
        words["rank_pattern"] = {f"{site}.lora_E": mask for site, mask in contents.masks.items()} or None
        words["target_r"] = _mean_rank(contents)
    return words


def _mean_rank(contents: Contents) -> int:
    """What PEFT calls target_r: how many directions a layer has left on average."""
    left = [sum(contents.masks.get(site, [True] * own.rank)) for site, own in contents.ranks.items()]
    return round(sum(left) / len(left))


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
