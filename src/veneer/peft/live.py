"""A Trainer's checkpoint: the adapters' live state, to resume from.

A folder that a Trainer calls checkpoint-<step> gets one file more than the adapter's two: model.safetensors, with the
adapters alone under the model's own names. The Trainer looks for that name when it resumes or fetches the best model,
and hands what it finds to `load_state_dict`. There is nothing of the base in it, and it is exact where PEFT's layout
is a translation (PiSSA's pair becomes a LoRA of twice the rank there). So an unchanged Trainer resumes bit for bit from
a few megabytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.ckpt import peft as store
from veneer.ckpt.atomic import atomic_file
from veneer.ckpt.tensorfile import header_bytes
from veneer.errors import CheckpointError
from veneer.peft.held import LoadResult, nothing_amiss

__all__ = ["CHECKPOINT", "LIVE", "is_live_key", "live_state", "load_live", "save_live"]

CHECKPOINT, LIVE = re.compile(r"checkpoint-\d+"), "model.safetensors"  # as transformers' Trainer names them


def is_live_key(key: str) -> bool:
    """Whether a key of the model's own state dict belongs to an adapter."""
    return ".lora." in f".{key}"


def live_state(model: nn.Module) -> dict[str, Tensor]:
    """What of the model's state dict belongs to its adapters."""
    return {key: value for key, value in model.state_dict().items() if is_live_key(key)}


def save_live(model: nn.Module, path: Path) -> None:
    content = {key: store.whole(value).cpu().contiguous() for key, value in live_state(model).items()}
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
