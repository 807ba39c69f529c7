"""AdamW whose two moments lie in the host's memory: 8 bytes an element less on the GPU, and not a bit rounded.

The moments are wanted once a step. They come over the bus piece by piece, are moved by the same fused step that
torch.optim.AdamW takes, and go back, on a stream beside the one that computes: the next piece arrives while this one
is moved. An adapter of 60 million parameters has 0.5 GiB of moments. Optimiser states in host memory are the paged
optimisers of QLoRA (arXiv:2305.14314, section 3), except that nothing is left to page faults.

Every element goes through the arithmetic of torch's fused AdamW, so the values are its values, bit for bit. On a CPU
the moments are where they would be anyway, and nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.train.own_adamw import OwnAdamW

__all__ = ["AdamWHost"]

PIECE = 1 << 21  # elements: two pieces of both moments are 32 MiB of the GPU
MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamWHost(OwnAdamW):
    """AdamW (arXiv:1711.05101) with fp32 moments in pinned host memory; torch.optim.AdamW reads its state_dict."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self._streams: dict[torch.device, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        for stream in self._streams.values():
            stream.synchronize()  # what is on its way to the host has arrived
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The moments never pass through the GPU, where there may be no room for them."""
        held, keys = state_dict["state"], [key for group in state_dict["param_groups"] for key in group["params"]]
        kept = {key: {"step": state["step"]} for key, state in held.items()}
        super().load_state_dict({**state_dict, "state": kept})
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(keys, own, strict=True):
            if key in held:
                fresh = _fresh(parameter)
                for name in MOMENTS:
                    fresh[name].copy_(held[key][name].reshape(-1))
                self.state[parameter].update({name: fresh[name] for name in MOMENTS})

    def fresh(self, parameter: nn.Parameter) -> dict[str, Any]:
        return _fresh(parameter)

    def move(self, values: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], place: int) -> None:
        moments = [state[name] for name in MOMENTS]
        if values.is_cuda:
            stream = self._streams.get(values.device) or torch.cuda.Stream(values.device)
            self._streams[values.device] = stream
            _streamed(values, gradient, moments, float(state["step"]), group, stream)
        else:
            _move(values, gradient, moments, float(state["step"]), group)


def _fresh(parameter: nn.Parameter) -> dict[str, Any]:
    pinned, size = parameter.is_cuda, parameter.numel()
    return {"step": torch.zeros(()), **{name: torch.zeros(size, pin_memory=pinned) for name in MOMENTS}}


def _streamed(
    values: Tensor, gradient: Tensor, moments: list[Tensor], step: float, group: dict[str, Any], stream: Any
) -> None:
    """Two pieces of device memory take turns. All copies are on one stream, so a piece is fetched into memory only
    after what was there has left; the events say when the step on it is done."""
    here = torch.cuda.current_stream(values.device)
    room = [torch.empty(2, min(PIECE, values.numel()), device=values.device) for _ in range(2)]
    pieces = [slice(at, min(at + PIECE, values.numel())) for at in range(0, values.numel(), PIECE)]
    stream.wait_stream(here)

    def fetch(i: int) -> Any:
        with torch.cuda.stream(stream):
            for there, own in zip(room[i % 2], moments, strict=True):
                there[: pieces[i].stop - pieces[i].start].copy_(own[pieces[i]], non_blocking=True)
            return stream.record_event()

    arrived = fetch(0)
    for i, piece in enumerate(pieces):
        here.wait_event(arrived)
        if i + 1 < len(pieces):
            arrived = fetch(i + 1)
        present = [there[: piece.stop - piece.start] for there in room[i % 2]]
        _move(values[piece], gradient[piece], present, step, group)
        stream.wait_event(here.record_event())
        with torch.cuda.stream(stream):
            for there, own in zip(present, moments, strict=True):
                own[piece].copy_(there, non_blocking=True)
    here.wait_stream(stream)  # `room` is given back in the order of the main stream


def _move(values: Tensor, gradient: Tensor, moments: list[Tensor], step: float, group: dict[str, Any]) -> None:
    """torch's fused step on a piece, in place."""
    beta1, beta2 = group["betas"]
    counted = torch.tensor(step, device=values.device)
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        [values], [gradient], [moments[0]], [moments[1]], [], [counted], lr=group["lr"], beta1=beta1, beta2=beta2,
        weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip
