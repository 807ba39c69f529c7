"""What belongs beside the weights so that they are used as they were trained: tokenizer, template, stops, labels.

tokenizer.json ...        with the chat template that was used, whatever the base's own was
chat_template.jinja       the same, for tools that look for it there
generation_config.json    the tokens that end an answer
task.json                 the task and, for classifiers, what each class is called
inputs.safetensors        what the inputs of a packed base's layers are like, so that it is packed in the same way
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from veneer.quant.storage import Recipe
from veneer.tasks.base import Task

__all__ = ["ENERGIES", "write_companions"]

ENERGIES = "inputs.safetensors"


def write_companions(folder: Path, task: Task, model: nn.Module) -> None:
    tokenizer: Any = task.tokenizer
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer = copy.copy(tokenizer)
        if task.renderer is not None and (source := task.renderer.source):
            tokenizer.chat_template = source
        tokenizer.save_pretrained(folder)
    if task.ends and (config := getattr(model, "generation_config", None)) is not None:
        config = copy.deepcopy(config)
        config.eos_token_id = list(task.ends)
        config.save_pretrained(folder)
    told: dict[str, Any] = {"task": task.name, **task.told()}
    if task.labels is not None:
        told |= {"labels": list(task.labels.names), "kind": task.labels.kind}
    if task.renderer is not None:
        told |= {"template": task.renderer.name, "template_fingerprint": task.renderer.fingerprint}
    packed: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if getattr(packed, "quant_method", None) == "veneer":
        usual = Recipe(packed.kind).checked()._asdict()
        own = {key: value for key, value in packed.recipe._asdict().items() if value != usual[key]}
        told["quant"] = {"kind": packed.kind, "whole": list(packed.whole), **own}  # to be asked as it was trained
        if packed.energies is not None:
            shutil.copyfile(packed.energies, folder / ENERGIES)
            told["quant"]["energies"] = ENERGIES
    (folder / "task.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
