"""PEFT's helper functions around a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from veneer.core.model import adapter_of, adapters, sites
from veneer.core.weight import is_plain
from veneer.errors import CheckpointError, ConfigError
from veneer.peft.config import PeftConfig

__all__ = [
    "cast_mixed_precision_params",
    "check_if_peft_model",
    "prepare_model_for_kbit_training",
    "rescale_adapter_scale",
]


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a model, bring what it keeps in half precision to fp32, and let gradients reach its inputs.

    As in PEFT, packed weights stay packed, and gradient checkpointing is switched on where the base is quantised.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    packed = _is_quantised(model)
    for parameter in model.parameters():
        if is_plain(parameter) and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if packed and use_gradient_checkpointing:
        options = gradient_checkpointing_kwargs or {}
        if options.get("use_reentrant", True):
            model.enable_input_require_grads()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options or None)
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """What is frozen to `dtype`, what is trained to fp32; packed weights stay packed.

    A half-precision base needs none of this: an adapter on it is fp32 from the start.
    """
    for parameter in model.parameters():
        if is_plain(parameter):
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def _is_quantised(model: nn.Module) -> bool:
    told = getattr(model, "is_quantized", False) or getattr(model, "is_loaded_in_4bit", False)
    return bool(told) or any(not is_plain(p) for p in model.parameters())


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """All adapters' effects times `multiplier`, for the length of the block. Between 0 and 1 they are weakened."""
    if not isinstance(multiplier, int | float):
        raise TypeError(f"multiplier should be a number, got {type(multiplier).__name__}")
    deltas: list[Any] = [
        adapter_of(layer, name).delta for name in adapters(model) for layer in sites(model, name).values()
    ]
    before = [(delta, delta.scale) for delta in deltas if delta is not None]
    if not before:
        raise ConfigError("this model has no adapter to rescale", fix="get_peft_model(model, LoraConfig(...)) first")
    try:
        for delta, scale in before:
            delta.scale = scale * multiplier
        yield
    finally:
        for delta, scale in before:
            delta.scale = scale


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or hub id holds an adapter."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except CheckpointError:
        return False
    except ConfigError:  # an adapter, if one that is not served here
        return True
    return True
