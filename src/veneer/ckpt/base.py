"""Which base an adapter belongs to, and whether this one is it.

A low-rank change means something only on the weights it was trained on. Shapes catch the wrong size, but not another
model of the same size. So an adapter carries the base's id and revision, the fields of its configuration that decide
what it computes (with their hash), and a few values of its norm weights, which every fine-tuning of a base moves and no
quantisation touches. The id alone proves nothing - people keep models in folders - and is only reported.

All this travels in the metadata of the safetensors file, where PEFT and servers do not look; in adapter_config.json
an unknown key makes PEFT warn at each load.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.host import Hosted

__all__ = ["Base", "base_of", "differences", "is_hub_id"]

LOADING = """
    _name_or_path _commit_hash _attn_implementation attn_implementation architectures auto_map bos_token_id
    chunk_size_feed_forward decoder_start_token_id dtype eos_token_id forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label initializer_range label2id num_labels output_attentions output_hidden_states
    pad_token_id prefix pretraining_tp problem_type pruned_heads quantization_config return_dict sep_token_id
    task_specific_params tie_word_embeddings tokenizer_class torch_dtype torchscript transformers_version use_bfloat16
    use_cache
"""  # how a model is loaded, stored, run or labelled, not what its layers compute; so are all kinds of dropout
IGNORED = frozenset(LOADING.split())

SAMPLES, VALUES, TOLERANCE = 4, 8, 2**-6  # norm layers looked at, values of each, and what rounding may explain


@dataclass(frozen=True)
class Base:
    """Who a base is. `config` and `sample` are empty for models that are not from transformers."""

    id: str = ""
    revision: str = ""
    config_hash: str = ""
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    sample: dict[str, list[float]] = field(default_factory=dict, repr=False)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Base:
        """From the metadata of a file; fields that a later version may add are left out."""
        known = Base.__dataclass_fields__
        return Base(**{key: value for key, value in json.loads(text).items() if key in known})


def base_of(model: nn.Module, read: Callable[[str], Tensor | None] | None = None) -> Base:
    """The identity of the frozen model under whatever adapters it carries.

    read: where the values of a parameter come from when the model itself has none (on the meta device).
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return Base()
    facts = meaningful(config.to_dict())
    return Base(
        id=getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", "") or "",
        revision=getattr(config, "_commit_hash", None) or "",
        config_hash=hash_of(facts),
        config=facts,
        sample=_sample(model, read),
    )


def meaningful(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides what the layers compute, without what merely holds a default."""
    facts = {}
    for key, value in config.items():
        if key not in IGNORED and "drop" not in key and value is not None:
            facts[key] = meaningful(value) if isinstance(value, Mapping) else value
    return json.loads(json.dumps(facts, sort_keys=True, default=str))  # tuples become lists, as they will in the file


def hash_of(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def differences(saved: Base, here: Base) -> list[str]:
    """What sets two bases apart, in words; empty when they are the same or when nothing is known."""
    found = []
    if saved.config_hash != here.config_hash:
        unequal = _unequal(saved.config, here.config)
        found += [f"{key}: {a!r} in the adapter's base, {b!r} here" for key, a, b in unequal]
    return found + list(_other_values(saved.sample, here.sample))


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Keys that both have with other values; one that a newer version of transformers invented is no difference."""
    for key in sorted(a.keys() & b.keys()):
        mine, other = a[key], b[key]
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            yield from _unequal(mine, other, f"{prefix}{key}.")
        elif mine != other:
            yield prefix + key, mine, other


def _other_values(a: Mapping[str, list[float]], b: Mapping[str, list[float]]) -> Iterator[str]:
    for name in sorted(a.keys() & b.keys()):
        pairs = zip(a[name], b[name], strict=False)
        if any(abs(x - y) > TOLERANCE * max(abs(x), abs(y)) + 1e-6 for x, y in pairs):
            yield f"{name} has other values here, so these are other weights of the same shape"


def _sample(model: nn.Module, read: Callable[[str], Tensor | None] | None) -> dict[str, list[float]]:
    """The first values of a few norm weights, evenly spread over the model's depth."""
    norms = list(_norms(model))
    chosen = norms[:: max(1, (len(norms) - 1) // max(1, SAMPLES - 1))][:SAMPLES]
    values = {name: weight if read is None else read(name) for name, weight in chosen}
    return {
        name: value.detach().flatten()[:VALUES].float().tolist()
        for name, value in values.items()
        if value is not None and not value.is_meta
    }


def _norms(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """One-dimensional weights, which are those of norms; the inside of adapters is not walked."""
    for name, child in model._modules.items():
        if child is None or (name == "lora" and isinstance(model, Hosted)):
            continue
        weight = child._parameters.get("weight")
        if weight is not None and weight.ndim == 1 and weight.dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield f"{prefix}{name}.weight", weight
        yield from _norms(child, f"{prefix}{name}.")


def is_hub_id(text: str) -> bool:
    """Whether a name can be that of a model on a hub rather than of a folder.

    >>> is_hub_id("org/model"), is_hub_id("./model"), is_hub_id("/models/a"), is_hub_id("a/b/c")
    (True, False, False, False)
    """
    looks = 0 < len(text) < 97 and text.count("/") <= 1 and text[0] not in "./~" and text[-1] != "/"
    return looks and not os.path.exists(text) and "\\" not in text
