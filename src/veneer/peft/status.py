"""get_layer_status and get_model_status: PEFT's report on what is attached, active, merged and trained.

Here all layers share one state, so `enabled`, `active_adapters` and `merged_adapters` can never be "irregular"; only
`requires_grad`, which anybody may set on single parameters, can.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from veneer.core.host import original_class
from veneer.core.leaf import Leaf
from veneer.core.model import active_of, adapters, elements, is_merged, parameters
from veneer.core.weight import is_plain
from veneer.errors import StateError
from veneer.peft.held import hosts, merged_names

__all__ = ["TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"]

Mixed = bool | Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One adapted layer."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Mixed]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The whole model."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: Mixed
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, Mixed]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Literal["irregular"] | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """One entry for each layer that carries an adapter or is trained whole by one, in the order of the model."""
    return list(_layers(model))


def _layers(model: Any) -> Iterator[TunerLayerStatus]:
    if not adapters(model):
        raise StateError("this model has no adapter", fix="get_peft_model(model, LoraConfig(...)) first")
    enabled, active, merged = _activity(model)
    prefix = "model." if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else ""
    for name, layer in hosts(model).items():
        parts = {adapter: list(module.parameters()) for adapter, module in layer.slots.items()}
        yield TunerLayerStatus(
            name=prefix + name,
            module_type=_kind(model, layer),
            enabled=enabled,
            active_adapters=list(active),
            merged_adapters=[adapter for adapter in merged if adapter in parts],
            requires_grad={adapter: _all_or_none(p.requires_grad for p in own) for adapter, own in parts.items()},
            available_adapters=sorted(parts),
            devices={adapter: sorted({p.device.type for p in own}) for adapter, own in parts.items()},
            quantization_backend=_backend(layer),
        )


def _kind(model: Any, layer: Any) -> str:
    """PEFT's name for its wrapper of such a layer."""
    configs = getattr(model, "peft_config", {})
    method = next((str(configs[name].peft_type).lower() for name in layer.slots if name in configs), "lora")
    kind = "ParamWrapper" if isinstance(layer, Leaf) else original_class(type(layer)).__name__
    return f"{method}.{'SVD' if method == 'adalora' else ''}{kind}"


def _activity(model: Any) -> tuple[bool, list[str], list[str]]:
    merged = merged_names(model)
    paused = vars(model).get("_paused")
    active = list(paused[0]) if paused else merged if is_merged(model) else list(active_of(model).names)
    return paused is None and bool(active), active, merged


def _all_or_none(flags: Iterable[bool]) -> Mixed:
    seen = set(flags)
    return "irregular" if len(seen) > 1 else True in seen


def _backend(layer: nn.Module) -> str | None:
    weight = layer._parameters.get("weight")
    return None if weight is None or is_plain(weight) else type(weight).__name__


def get_model_status(model: nn.Module) -> TunerModelStatus:
    layers = get_layer_status(model)
    names = sorted(adapters(model))
    backends = {layer.quantization_backend for layer in layers}
    devices = {name: sorted({d for layer in layers for d in layer.devices.get(name, ())}) for name in names}
    is_peft = hasattr(model, "get_nb_trainable_parameters")
    return TunerModelStatus(
        base_model_type=type(model).__name__,
        adapter_model_type="LoraModel" if is_peft else "None",
        peft_types={name: str(model.peft_config[name].peft_type) for name in names} if is_peft else {},
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_params=model.get_nb_trainable_parameters()[1] if is_peft else elements(model),  # type: ignore[operator]
        num_adapter_layers=len(layers),
        enabled=layers[0].enabled,
        active_adapters=layers[0].active_adapters,
        merged_adapters=merged_names(model),
        requires_grad={name: _all_or_none(p.requires_grad for p in parameters(model, name).values()) for name in names},
        available_adapters=names,
        devices=devices,
        quantization_backend=backends.pop() if len(backends) == 1 else "irregular",
    )
