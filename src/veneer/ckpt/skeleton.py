"""A model without its weights: layers, shapes and ties from config.json, built on the meta device in a moment."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.ckpt.config import CONFIG, TASK_HEADS, read_config
from veneer.ckpt.hub import WEIGHTS
from veneer.ckpt.tensorfile import TensorFile
from veneer.errors import CheckpointError

__all__ = ["read_json", "skeleton_of", "task_config"]

TASK_CLASSES = {
    "SEQ_CLS": ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("ForTokenClassification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
}  # the adapter brings the head, so its task decides
BODY_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}  # where config is silent


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"There is no {path.name}.", str(path.parent), "name the folder of a model") from None
    except ValueError as error:
        raise CheckpointError(f"{path.name} is not valid JSON: {error}.", str(path), "download it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path.name} holds no JSON object.", str(path), "download it again")
    return found


def skeleton_of(folder: Path, adapters: Iterable[Path], trust_remote_code: bool = False) -> nn.Module:
    """The model of this folder on the meta device, with the head that its adapters were trained with."""
    from transformers import AutoConfig

    facts = read_json(folder / "config.json")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    kind = _class_for(config, facts, adapters)
    with torch.device("meta"):
        if hasattr(kind, "from_config"):
            return kind.from_config(config, trust_remote_code=trust_remote_code)
        return kind(config)


def _class_for(config: Any, facts: dict[str, Any], adapters: Iterable[Path]) -> Any:
    import transformers

    name = next(iter(facts.get("architectures") or ()), "")
    for path in adapters:
        task = read_config(path / CONFIG).get("task_type") or ""
        ending, auto = TASK_CLASSES.get(task, ("", ""))
        if ending and not name.endswith(ending):
            labels = _labels(path, TASK_HEADS[task])
            if labels is not None:
                config.num_labels = labels
            return getattr(transformers, auto)
        if not name and task in BODY_CLASSES:
            return getattr(transformers, BODY_CLASSES[task])
    kind = getattr(transformers, name, None)
    if kind is not None:
        return kind
    if "auto_map" in facts:
        return transformers.AutoModelForCausalLM
    raise CheckpointError(
        f"config.json names the architecture {name!r}, which this version of transformers does not know.",
        fix="update transformers, or pass skeleton=<the model on the meta device>",
    )


def _labels(adapter: Path, heads: tuple[str, ...]) -> int | None:
    """How many classes the head in an adapter's file tells apart."""
    for stored in TensorFile(adapter / WEIGHTS):
        parts = stored.name.split(".")
        if parts[-1] == "weight" and any(head in parts for head in heads) and len(stored.shape) == 2:
            return stored.shape[0]
    return None


def task_config(skeleton: nn.Module) -> dict[str, Any]:
    """What config.json must say so that the merged folder loads as this model."""
    config = getattr(skeleton, "config", None)
    name = type(skeleton).__name__
    if config is None or not any(name.endswith(ending) for ending, _ in TASK_CLASSES.values()):
        return {}
    labels = {str(i): label for i, label in config.id2label.items()}
    return {"architectures": [name], "id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}
