"""What trains: low-rank adapters, everything, or the last layers. One function per method, one way to write each down.

| method | trains | the file holds |
| --- | --- | --- |
| lora | the adapter, and modules_to_save in copies of their own | the adapter, in PEFT's layout |
| full | all weights | the model |
| freeze | the last `layers` blocks of each stack, and a new head; with 0 the head alone, a probe | the model |

Full and partial fine-tuning are here as baselines: a low-rank adapter that does not come near them is the wrong tool.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.core.allocate import RankAllocator
from veneer.core.deltas.adalora import AdaLora
from veneer.core.model import attach, parameters
from veneer.core.select import block_index
from veneer.core.spec import LoRA
from veneer.errors import ConfigError
from veneer.extras import quiet
from veneer.train.optim import Masters, adamw

__all__ = ["ADAPTER", "allocator_of", "lora_of", "optimizer_of", "place", "to_train", "write_model"]

ADAPTER = "default"


def place(
    model: nn.Module,
    settings: Any,
    heads: Sequence[str],
    idle: Sequence[str] = (),
    aim: Callable[[nn.Module, LoRA], LoRA] = lambda model, spec: spec,
    **seen: Any,
) -> dict[str, nn.Parameter]:
    """Make `model` ready to train by the method and return what trains, by name. `heads` are new and must learn, `idle`
    layers could not; `aim` says what the targets mean on this model; `seen` is for inits that look at data (see
    `attach`)."""
    if settings.method == "lora":
        spec = lora_of(settings, heads)
        exclude = (spec.exclude,) if isinstance(spec.exclude, str) else tuple(spec.exclude)
        attach(model, aim(model, dataclasses.replace(spec, exclude=(*exclude, *idle))), ADAPTER, **seen)
        return parameters(model, ADAPTER)
    if settings.method == "full":
        model.requires_grad_(True)
    else:
        _freeze_all_but_last(model, settings.layers, heads)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def to_train(model: nn.Module) -> None:
    """Training mode, but for BatchNorm whose weights are frozen: in training mode it would go on measuring its mean and
    variance, and the base would no longer be the base when the adapter is off."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            p.requires_grad for p in module.parameters()
        ):
            module.eval()


def lora_of(settings: Any, heads: Sequence[str] = ()) -> LoRA:
    """The adapter that the settings describe."""
    return LoRA(
        rank=settings.r,
        alpha=settings.alpha,
        targets=settings.targets,
        exclude=settings.exclude,
        dropout=settings.dropout,
        delta=settings.delta,
        combine=settings.combine,
        init=settings.init,
        scaling=settings.scaling,
        bias=settings.bias,
        modules_to_save=tuple(dict.fromkeys([*settings.modules_to_save, *heads])),
        token_rows=settings.token_rows,
        tied=settings.tied,
        layers=_blocks(settings.layers),
        overrides=settings.overrides,
        options=settings.options,
    )


def allocator_of(model: nn.Module, settings: Any, steps: int) -> RankAllocator | None:
    """AdaLoRA's budget for this run, as its options say. By default all ranks for the first tenth of the steps and two
    thirds of them for the last three tenths (the shares of PEFT's examples: 12 ranks at first, 8 in the end). None for
    other deltas."""
    if settings.method != "lora" or settings.delta != "adalora":
        return None
    own = {**AdaLora.options, **settings.options}
    return RankAllocator(
        model,
        ADAPTER,
        target_rank=own["target_rank"] or max(1.0, settings.r * 2 / 3),
        total_steps=steps,
        warmup=_steps(own["warmup"], steps),
        final=_steps(own["final"], steps),
        every=own["every"] or max(1, steps // 100),
        beta1=own["beta1"],
        beta2=own["beta2"],
        orthogonality=own["orthogonality"],
    )


def _steps(share: float, steps: int) -> int:
    """A share of all steps below 1, else a number of steps."""
    return int(share * steps) if share < 1 else int(share)


def optimizer_of(masters: Masters, settings: Any) -> torch.optim.Optimizer:
    """The optimiser that the settings name."""
    ratio = settings.lora_plus_ratio if settings.method == "lora" else 1.0
    return adamw(masters, lora_plus_ratio=ratio, weight_decay=settings.weight_decay, kind=settings.optimizer)


def _blocks(layers: int | tuple[int, ...] | None) -> tuple[int, ...] | None:
    """A number stands for the last so many blocks."""
    return tuple(range(-layers, 0)) if isinstance(layers, int) else layers


def _freeze_all_but_last(model: nn.Module, last: int, heads: Sequence[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    blocks = {index for name in names if (index := block_index(name)) is not None}
    count = max(blocks, default=-1) + 1
    if not (0 if heads else 1) <= last <= count:
        raise ConfigError(
            f"layers: {last} is not possible, the model has {count} blocks" + " and no new head" * (not heads),
            fix=f"choose {0 if heads else 1} to {count}"
            if count
            else "use method full; this model has no numbered blocks to choose from",
        )
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        index = block_index(name)
        is_head = any(name.startswith(head + ".") for head in heads)
        if is_head or (index is not None and index >= count - last):
            parameter.requires_grad_(True)


def write_model(model: nn.Module, folder: Path, method: str) -> list[str]:
    """Write what was learned into `folder`. Returns what is to be known of the file: the same at each save."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _write(model, folder, method)
    return [str(each.message).removeprefix(f"saving {folder}: ") for each in caught]


def _write(model: nn.Module, folder: Path, method: str) -> None:
    if method == "lora":
        from veneer.ckpt.peft import save

        save(model, folder, ADAPTER)
    elif (save_pretrained := getattr(model, "save_pretrained", None)) is not None:
        with quiet():
            save_pretrained(folder)
    else:
        from safetensors.torch import save_model

        save_model(model, str(folder / "model.safetensors"))
