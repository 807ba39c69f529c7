"""The frozen base: its configuration, its tokenizer, its weights, and the type they are kept in."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from veneer.data.batch import pad_id_of
from veneer.errors import ConfigError, UserError
from veneer.extras import need, pip_line, quiet
from veneer.tasks.base import Task

__all__ = [
    "config_of",
    "context_of",
    "device_of",
    "dtype_of",
    "fit_head",
    "is_loaded",
    "load_model",
    "packing",
    "pipeline_of",
    "precision_of",
    "recomputing",
    "tokenizer_of",
    "usual_device",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx")


def usual_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_loaded(model: Any) -> bool:
    """Whether this is a model itself, or a pipeline of several, and not the name of one."""
    return isinstance(model, nn.Module) or hasattr(model, "components")


def _learning_part(model: Any) -> nn.Module:
    """The module itself; of a pipeline the one that paints."""
    held = getattr(model, "components", None) if not isinstance(model, nn.Module) else None
    return model if held is None else held.get("unet") or held["transformer"]


def dtype_of(model: Any) -> torch.dtype:
    return next((p.dtype for p in _learning_part(model).parameters() if p.is_floating_point()), torch.float32)


def device_of(model: Any) -> torch.device:
    return next(_learning_part(model).parameters()).device


def precision_of(model: Any) -> tuple[str, str]:
    """The precision when nobody says, and why: a loaded model stays as it is (but for fp16, which overflows)."""
    if is_loaded(model):
        held = dtype_of(model)
        return ("bf16" if held.itemsize == 2 else "fp32"), f"the model came in {held}"
    if not torch.cuda.is_available():
        return "fp32", "on a CPU, where bf16 is slower"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", f"{torch.cuda.get_device_name()} computes in it"
    return "fp32", f"{torch.cuda.get_device_name()} has no bf16"


def config_of(model: nn.Module | str) -> Any:
    """The model's configuration, before its weights are read."""
    if isinstance(model, nn.Module):
        return getattr(model, "config", None)
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, model)


def tokenizer_of(model: nn.Module | str, reader: str = "AutoTokenizer") -> Any:
    """The tokenizer that belongs to the model, or its processor of images."""
    where = model if isinstance(model, str) else getattr(model, "name_or_path", "")
    if not where:
        raise ConfigError(
            f"{type(model).__name__} was given without its tokenizer", fix="veneer.train(model, data, tokenizer=...)"
        )
    import transformers

    if reader != "AutoTokenizer":
        need("PIL.Image", extra="vision", use="read pictures")
    with quiet():
        return _from_pretrained(getattr(transformers, reader), where)


def pipeline_of(source: Any, kind: Any) -> Any:
    """What is known of a pipeline before its weights are read."""
    if not source:
        raise ConfigError("no model was named", fix="give a pipeline's folder or hub id: veneer train MODEL DATA")
    if isinstance(source, nn.Module):
        what = f"the task {kind.name} needs a whole pipeline, and got a {type(source).__name__}"
        raise ConfigError(what, "model", "give the pipeline of diffusers, loaded or by its folder")
    return kind.open(source)


def load_model(
    where: str,
    task: Task,
    precision: str,
    device: torch.device,
    quant: str = "none",
    whole: Sequence[str] = (),
    energies: str | None = None,
    rotate: bool | None = None,
) -> nn.Module:
    """The base on its device. With `quant` its weights are packed one by one as they are read, so that no more than one
    is ever there in full; `whole`: modules that will be trained, and so stay as they are; `energies`: the file of what
    was seen of their inputs; `rotate`: as in quant/storage.py."""
    import transformers

    import veneer.quant.hf  # noqa: F401 - transformers then knows a folder that was saved packed

    kind, options = getattr(transformers, task.auto_class), task.model_options()
    if quant != "none":
        options |= packing(quant, whole, device, energies, rotate)
    with quiet():
        return _from_pretrained(kind, where, dtype=DTYPES[precision], **options).to(device)


def packing(
    kind: str, whole: Sequence[str], device: torch.device, energies: str | None = None, rotate: bool | None = None
) -> dict[str, Any]:
    """The options of `from_pretrained` that pack a base as it is read."""
    from veneer.quant.hf import VeneerConfig

    # a decorator hides the class's own __init__
    config = VeneerConfig(kind, whole=tuple(whole), energies=energies, rotate=rotate)  # pyright: ignore[reportCallIssue]
    return {"quantization_config": config, "device_map": {"": device}}


def release(device: torch.device) -> None:
    """Give back what a model that is gone had."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _from_pretrained(kind: Any, where: str, **options: Any) -> Any:
    """transformers' loading, with its long errors cut to what happened, where, and what to do."""
    if not where:
        raise ConfigError("no model was named", fix="give a folder or a hub id: veneer train MODEL DATA")
    try:
        return kind.from_pretrained(where, **options)
    except UserError:
        raise
    except ImportError as error:
        what = str(error).strip().splitlines()[0].partition(": `pip")[0]
        raise ConfigError(f"this model needs a package that is not here: {what}", where, pip_line(error)) from error
    except (OSError, ValueError, KeyError) as error:
        what = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"this model cannot be loaded as {kind.__name__.removeprefix('Auto')}: {what}", where,
            "check the spelling; a folder needs config.json, the weights as safetensors, and the tokenizer's files",
        ) from error  # fmt: skip


def stored_as(config: Any) -> str | None:
    """What a folder's weights are packed in, by its config.json."""
    held = getattr(config, "quantization_config", None)
    told = held if isinstance(held, dict) else vars(held) if held is not None else {}
    return next((str(told[key]) for key in ("kind", "quant_method") if told.get(key)), None)


def context_of(config: Any) -> int | None:
    """The longest text the model has positions for, where it says so."""
    found = [getattr(config, name, None) for name in LIMITS]
    return min((limit for limit in found if isinstance(limit, int) and limit > 0), default=None)


def fit_head(model: nn.Module, task: Task) -> None:
    """A loaded model must have as many outputs as the data has classes, and know what padding is: a decoder that sorts
    texts looks for the last token that is none."""
    config: Any = getattr(model, "config", None)
    if task.labelled and config is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_id_of(task.tokenizer)
    wanted = task.model_options().get("num_labels")
    held = getattr(config, "num_labels", None)
    if wanted is not None and held is not None and wanted != held:
        raise ConfigError(
            f"the model's head has {held} outputs, the data {wanted} classes",
            fix=f"load it with num_labels={wanted}, or give its folder instead of the loaded model",
        )


@contextmanager
def recomputing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Recompute activations in the backward pass, and afterwards no more.

    Only the non-reentrant kind: the other needs inputs that require gradients, which a frozen embedding's outputs do
    not, and then trains nothing in silence. For its sake transformers makes the embedding's outputs require gradients;
    that costs a backward pass through the first layer's input and is switched off again.
    """
    if not wanted:
        yield
        return
    enable = _method(
        model, "activation_checkpointing_enable", "gradient_checkpointing_enable"
    )  # before 5.20 the second
    enable_plainly = _method(model, "enable_gradient_checkpointing")  # diffusers', never reentrant
    if enable is None and enable_plainly is None:
        fix = "leave recompute: none, or wrap its blocks yourself"
        raise ConfigError(f"{type(model).__name__} knows no gradient checkpointing", fix=fix)
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    if enable is not None:
        enable({"use_reentrant": False})
    else:
        enable_plainly()
    if (disable := _method(model, "disable_input_require_grads")) is not None:
        disable()
    try:
        if cached is not None:
            config.use_cache = False
        yield
    finally:
        if cached is not None:
            config.use_cache = cached
        names = ("activation_checkpointing_disable", "gradient_checkpointing_disable", "disable_gradient_checkpointing")
        if (stop := _method(model, *names)) is not None:
            stop()


def _method(model: nn.Module, *names: str) -> Any:
    return next((found for name in names if (found := getattr(model, name, None)) is not None), None)
