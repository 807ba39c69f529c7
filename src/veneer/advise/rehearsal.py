"""What a training step holds, found by going through it with tensors that have a shape and no memory.

peak.py works memory out from what transformers' text and image models are known to be. Denoisers, detectors and models
of pictures and words are of too many builds for that. Their step is rehearsed instead: the very modules, adapters and
loss, on fake tensors (torch's FakeTensorMode), with every storage that comes and goes written into a ledger. Nothing is
read and nothing computed; it takes the time of Python alone.

    peak = the highest sum of live storages in forward and backward + the optimiser's moments

It is exact as far as the step can be gone through so. A step that asks a tensor for its numbers (a loss that matches
boxes, positions worked out from tokens) cannot be, and says so.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from veneer.advise.memory import CPU_RESERVE, CUDA_FRAGMENTS, CUDA_RESERVE
from veneer.errors import UserError

__all__ = ["Rehearsed", "Scene", "faked", "placed", "rehearse"]

MOMENTS = {"adamw": 8, "adamw8bit": 2, "adamw_host": 0, "lora_fa": 8, "sgd": 0}  # bytes for each trained number
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError)


class Scene(NamedTuple):
    """A model without weights, what of it trains, and one micro-batch's loss."""

    model: nn.Module
    trained: Sequence[nn.Parameter]
    loss: Callable[[], Tensor]
    beside: int = 0  # bytes of models that lie on the same device and take no part


@dataclass(frozen=True)
class Rehearsed:
    """Bytes of a step, by part, in the manner of `Estimate`."""

    parts: dict[str, int]
    parameters: int
    trainable: int
    device: str
    device_bytes: int
    knobs: tuple[Any, ...] = ()  # what would save how much is not known

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> int:
        more = CUDA_RESERVE + CUDA_FRAGMENTS * self.total_bytes if self.device == "cuda" else CPU_RESERVE
        return int(self.total_bytes + more)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.device_bytes

    def to_json(self) -> dict[str, Any]:
        own = {"parts": self.parts, "parameters": self.parameters, "trainable": self.trainable, "how": "rehearsed"}
        return own | {"total_bytes": self.total_bytes, "needed_bytes": self.needed_bytes, "fits": self.fits}


class Ledger(TorchDispatchMode):
    """Every storage that an operator makes, until it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.enter(leaf)
        return found

    def enter(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self.held:
            return
        self.held[key] = storage.nbytes()
        self.live += self.held[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.leave, key)

    def leave(self, key: int) -> None:
        self.live -= self.held.pop(key, 0)


@contextmanager
def faked() -> Iterator[None]:
    """Tensors made here have no memory; real ones that come in are taken for what they are."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def placed(model: nn.Module) -> nn.Module:
    """The model's tensors, which lie on the meta device, as fake ones on a CPU; what was shared still is."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                if t is None:
                    continue
                if id(t) not in made:
                    new = torch.empty_like(t, device="cpu", requires_grad=False)
                    made[id(t)] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
                held[name] = made[id(t)]  # type: ignore[assignment]
    return model


def rehearse(make: Callable[[], Scene], optimizer: str, device: str, device_bytes: int) -> Rehearsed | str:
    """`make` builds the scene inside the fake world. Where that cannot be done, the reason; what is wrong with the
    settings is raised, as a run would."""
    try:
        with faked():
            scene = make()
            with Ledger() as ledger:
                scene.loss().backward()
    except UserError:
        raise
    except FAILURES as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        return f"its step cannot be gone through without numbers ({line})"
    weights = sum(t.nbytes for t in _storages([*scene.model.parameters(), *scene.model.buffers()]))
    adapter = sum(p.nbytes for p in scene.trained)
    count = sum(p.numel() for p in scene.trained)
    gradients = sum(p.grad.nbytes for p in scene.trained if p.grad is not None)
    parts = {
        "weights": weights - adapter, "adapter": adapter, "gradients": gradients,
        "optimizer": MOMENTS[optimizer] * count, "activations": max(ledger.peak - gradients, 0),
        "models beside": scene.beside,
    }  # fmt: skip
    parameters = sum(p.numel() for p in scene.model.parameters()) - count
    return Rehearsed({k: v for k, v in parts.items() if v}, parameters, count, device, device_bytes)


def _storages(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One tensor for each storage."""
    return list({t.untyped_storage()._cdata: t for t in tensors}.values())
