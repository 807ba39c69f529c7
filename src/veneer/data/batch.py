"""Rows of different lengths become tensors. Labels were made before padding, so pad == eos never hides a real EOS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Batch"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `inputs` are keyword arguments of the model's forward; labels are kept apart, unshifted.

    Divide the summed loss by the trained tokens of the whole accumulated batch (`Step.trained_tokens`), never by this
    micro-batch's own.
    """

    inputs: dict[str, Any]  # input_ids, and attention_mask or position_ids (+ use_cache=False when packed), ...
    labels: Tensor  # (rows, tokens), (rows, target tokens) or (rows,) / (rows, classes)
    trained_tokens: int
    tokens: int  # real ones, without padding
    rows: int  # samples: packed ones count each
    packed: bool = False
    sequence_ids: Tensor | None = None  # (rows, tokens): which sample each token belongs to, -1 for padding
    cu_seqlens: Tensor | None = None  # (samples + 1,): boundaries once padding is removed, for varlen kernels

    def to(self, device: torch.device | str) -> Batch: ...
