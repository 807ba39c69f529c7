"""What is on a model at the moment: its hosts, what is merged, the config that says the same as a spec."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from veneer.ckpt import peft as store
from veneer.core.host import plain_modules
from veneer.core.model import Mixture, _state, is_merged, spec_of
from veneer.peft.config import LoraConfig

__all__ = ["LoadResult", "config_of", "hosts", "merged_mixture", "merged_names", "nothing_amiss"]


class LoadResult(NamedTuple):
    """As torch's load_state_dict returns it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def nothing_amiss() -> LoadResult:
    return LoadResult([], [])


def hosts(model: nn.Module) -> dict[str, Any]:
    """Every layer that carries an adapter or is trained whole by one, in the model's order."""
    held = _state(model).hosts
    order = {name: i for i, name in enumerate(plain_modules(model))}
    return {name: held[name] for name in sorted(held, key=lambda n: order.get(n, order.get(n.rpartition(".")[0], 0)))}


def merged_mixture(model: nn.Module) -> Mixture:
    """What is merged into the weights, as merge takes it; None if nothing is."""
    return _state(model).merged if is_merged(model) else None


def merged_names(model: nn.Module) -> list[str]:
    mixture = merged_mixture(model)
    return [mixture] if isinstance(mixture, str) else list(mixture or ())


def config_of(model: nn.Module, name: str, task: str | None = None) -> LoraConfig:
    """A LoraConfig for an adapter that was attached without one."""
    spec = spec_of(model, name)
    words = store.config_of(model, name, spec, store.contents_of(model, name))
    known = {key: value for key, value in words.items() if key in LoraConfig.__dataclass_fields__}
    start = True if spec.init == "kaiming" else spec.init
    return LoraConfig(**{**known, "inference_mode": False, "init_lora_weights": start, "task_type": task})
