"""What is on a model at the moment: its hosts, what is merged, the config that says the same as a spec."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from veneer.ckpt import peft as store
from veneer.core.host import plain_modules
from veneer.core.model import Mixture, is_merged, spec_of, state_of
from veneer.peft.config import AnyConfig, PeftConfig

__all__ = ["LoadResult", "config_of", "hosts", "is_trained", "merged_mixture", "merged_names", "nothing_amiss"]


class LoadResult(NamedTuple):
    """As torch's load_state_dict returns it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def nothing_amiss() -> LoadResult:
    return LoadResult([], [])


def hosts(model: nn.Module) -> dict[str, Any]:
    """Every layer that carries an adapter or is trained whole by one, in the model's order."""
    held = state_of(model).hosts
    order = {name: i for i, name in enumerate(plain_modules(model))}
    return {name: held[name] for name in sorted(held, key=lambda n: order.get(n, order.get(n.rpartition(".")[0], 0)))}


def merged_mixture(model: nn.Module) -> Mixture:
    """What is merged into the weights, as merge takes it; None if nothing is."""
    return state_of(model).merged if is_merged(model) else None


def merged_names(model: nn.Module) -> list[str]:
    mixture = merged_mixture(model)
    return [mixture] if isinstance(mixture, str) else list(mixture or ())


def is_trained(model: nn.Module, name: str) -> bool:
    """Whether an adapter requires gradients, by its first layer."""
    state = state_of(model)
    placed = state.placed[name]
    first: Any = state.hosts[next(iter((*placed.sites, *placed.saved)))]
    return any(p.requires_grad for p in first.slots[name].parameters())


def config_of(model: nn.Module, name: str, task: str | None = None) -> AnyConfig:
    """A config for an adapter that was attached without one."""
    spec = spec_of(model, name)
    words = store.config_of(model, name, spec, store.contents_of(model, name))
    if words["peft_type"] == "LORA":
        words["init_lora_weights"] = True if spec.init == "kaiming" else spec.init
    return PeftConfig.from_peft_type(**{**words, "inference_mode": False, "task_type": task})
