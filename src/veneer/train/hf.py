"""HF's Trainer on an adapted model.

`transformers.Trainer` trains a model with adapters as it is. What it would do otherwise than wished is to save: its
checkpoints hold the whole base. A model from `veneer.peft` saves its adapters alone, and resumes and fetches its best
checkpoint from them; a model from `veneer.attach` does so after one call:

    from transformers import Trainer                          from veneer.train.hf import Trainer, TrainingArguments
    trainer = Trainer(adapter_checkpoints(model), ...)   or   trainer = Trainer(model, ...)

The two classes below are transformers' own with three habits more. They take the argument names of transformers 4 that
version 5 dropped, so scripts written for it run; they make the call above; and after the first backward they check that
every adapter got a gradient, because one that is not reached looks like one that learns slowly. No method of the
Trainer is replaced: all that matters here hangs on the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import transformers
from torch import nn

from veneer.core.model import adapters, check_alive
from veneer.errors import ConfigError
from veneer.peft.model import PeftModel, adopt

__all__ = ["CheckAlive", "Trainer", "TrainingArguments", "adapter_checkpoints", "modern"]

RENAMED = {  # argument of transformers 4 -> of transformers 5; None: it has no effect any more
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # a value below 1 is a share there
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "overwrite_output_dir": None,
    "save_safetensors": None,
}


def adapter_checkpoints(model: Any) -> Any:
    """Give an attached model PEFT's methods, so that it saves its adapters alone. The same object comes back.

    Training then moves what `veneer.attach` made trainable. veneer.peft.model.release(model) undoes it.
    """
    if not isinstance(model, nn.Module) or not adapters(model):
        raise ConfigError(
            f"{type(model).__name__} has no adapter to train", fix="veneer.attach(model, LoRA(...)) before the Trainer"
        )
    return adopt(model)


def modern(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of transformers 4 in the words of version 5, with a notice for each that was translated."""
    own = transformers.TrainingArguments.__dataclass_fields__
    renamed: dict[str, Any] = {}
    for old, new in RENAMED.items():
        if old not in arguments or old in own:  # an older transformers still knows it by this name
            continue
        if new is None:
            warnings.warn(f"{old} has no effect in transformers {transformers.__version__}", stacklevel=3)
            continue
        if arguments.get(new):
            raise ConfigError(f"{old} is the old name of {new}, and both are given", fix=f"keep {new}")
        warnings.warn(f"{old} is called {new} in transformers {transformers.__version__}", stacklevel=3)
        renamed[new] = arguments[old]
    return {key: value for key, value in arguments.items() if key not in RENAMED or key in own} | renamed


class TrainingArguments(transformers.TrainingArguments):
    """transformers' own; the names of version 4 are understood as well."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **modern(kwargs))


class CheckAlive(transformers.TrainerCallback):
    """After the first backward, raises naming every adapter that got no gradient."""

    done = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.done:
            self.done = True
            check_alive(kwargs["model"], finite=not args.fp16)


class Trainer(transformers.Trainer):
    """transformers' own, for a model with adapters. `tokenizer=` is processing_class, as it was in version 4."""

    def __init__(self, model: Any = None, *args: Any, tokenizer: Any = None, **kwargs: Any) -> None:
        if tokenizer is not None:
            kwargs.setdefault("processing_class", tokenizer)
        super().__init__(model if isinstance(model, PeftModel) else adapter_checkpoints(model), *args, **kwargs)
        self.add_callback(CheckAlive())
