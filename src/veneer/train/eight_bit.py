"""AdamW whose two moments take one byte an element each: a quarter of the optimiser's memory.

    block      256 elements share one scale, their largest magnitude (block-wise quantisation, arXiv:2110.02861)
    first      sign and k of 0..127    m = +-scale (k / 127)^4
    second     k of 1..256             v = scale (k / 256)^4      never 0 beside a larger one: it is divided by

The codes lie closer where values are smaller, over 8 and 9 orders of magnitude. What makes their choice uncritical is
the rounding: up or down at random, with odds that keep the mean. The moments are running means that move by a
thousandth of themselves a step, far below a code's resolution; rounded to the nearest code they would stand still. The
random numbers come from the number of the step, so a run that goes on from a checkpoint draws the same ones.

A step uses the moments before they are rounded. Parameters of fewer than 4,096 elements keep theirs in full.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.train.own_adamw import OwnAdamW

__all__ = ["AdamW8bit"]

BLOCK = 256
SMALL = 4096
CHUNK = {"cpu": 1 << 16, "cuda": 1 << 22}  # elements at a time: unpacked, they fit a core's cache, or cost 128 MiB
CODES = ("first", "second")
TOP = {"first": 127, "second": 256}
LOWEST = {"first": 0, "second": 1}


def _fourth(t: Tensor) -> Tensor:
    return t.square().square_()


def pack(key: str, values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes and scales of (blocks, BLOCK) values; of the second moment, whose values have no sign, and of the first."""
    top, sizes = TOP[key], values.abs()
    scale = sizes.amax(1, keepdim=True)
    share = sizes.div_(scale.clamp_min(torch.finfo(values.dtype).tiny))
    low = share.sqrt().sqrt_().mul_(top).floor_().clamp_(LOWEST[key], top - 1)
    under, over = _fourth(low / top), _fourth((low + 1) / top)
    odds = share.sub_(under).div_(over.sub_(under))  # of going up, so that the mean of what is stored is the value
    code = low.add_(torch.rand(odds.shape, generator=generator, device=odds.device) < odds).sub_(LOWEST[key])
    if key == "first":
        code.add_(values < 0, alpha=128)
    return code.to(torch.uint8), scale[:, 0]


def unpack(key: str, code: Tensor, scale: Tensor) -> Tensor:
    size = (code & 127 if key == "first" else code).float()
    value = _fourth(size.add_(LOWEST[key]).div_(TOP[key])).mul_(scale[:, None])
    return value.where(code < 128, -value) if key == "first" else value


class AdamW8bit(OwnAdamW):
    """AdamW (arXiv:1711.05101) with moments of 8 bits; the state goes through state_dict like any optimiser's."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():  # torch gives every value the parameter's type
            state.update({key: state[key].to(torch.uint8) for key in CODES if key in state})

    def fresh(self, parameter: nn.Parameter) -> dict[str, Any]:
        return _fresh(parameter)

    def move(self, values: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], place: int) -> None:
        chunk = CHUNK.get(values.device.type, 1 << 20)
        for start in range(0, values.numel(), chunk):
            piece = slice(start, min(start + chunk, values.numel()))
            seed = int(state["step"]) * 1_000_003 + place * 10_007 + start // chunk
            moments = _Moments(state, piece, torch.Generator(values.device).manual_seed(seed))
            _adamw(values[piece], gradient[piece].float(), moments, group, int(state["step"]))
            moments.store()


def _fresh(parameter: nn.Parameter) -> dict[str, Any]:
    size, device = parameter.numel(), parameter.device
    if size < SMALL:
        return {"step": torch.zeros(()), "m": torch.zeros(size, device=device), "v": torch.zeros(size, device=device)}
    blocks = -(-size // BLOCK)
    codes = {key: torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=device) for key in CODES}
    scales = {f"{key}_scale": torch.zeros(blocks, device=device) for key in CODES}
    return {"step": torch.zeros(()), **codes, **scales}


class _Moments:
    """Both moments of a piece of one parameter in fp32, for the length of one step."""

    def __init__(self, state: dict[str, Any], piece: slice, generator: torch.Generator) -> None:
        self.state, self.generator, self.size = state, generator, piece.stop - piece.start
        self.is_packed = "first" in state
        if not self.is_packed:
            self.m, self.v = state["m"][piece], state["v"][piece]
            return
        self.blocks = slice(piece.start // BLOCK, -(-piece.stop // BLOCK))
        self.all_m, self.all_v = (
            unpack(key, state[key][self.blocks], state[f"{key}_scale"][self.blocks]) for key in CODES
        )
        self.m, self.v = self.all_m.view(-1)[: self.size], self.all_v.view(-1)[: self.size]

    def store(self) -> None:
        if not self.is_packed:
            return
        for key, values in zip(CODES, (self.all_m, self.all_v), strict=True):
            values.view(-1)[self.size :] = 0  # what fills the last block up
            packed = pack(key, values, self.generator)
            self.state[key][self.blocks], self.state[f"{key}_scale"][self.blocks] = packed


def _adamw(p: Tensor, g: Tensor, moments: _Moments, group: dict[str, Any], step: int) -> None:
    """One step of AdamW on a piece, in place (arXiv:1711.05101, algorithm 2)."""
    (beta1, beta2), rate = group["betas"], group["lr"]
    moments.m.lerp_(g, 1 - beta1)
    moments.v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.mul_(1 - rate * group["weight_decay"])
    root = moments.v.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    p.addcdiv_(moments.m, root, value=-rate / (1 - beta1**step))
