"""The experiment behind packing: do samples of one row really not see each other in this very model?

Two samples in one row, on a few tokens:

1. every token of the first is changed: the logits of the second must stay as they are, to the bit. What is masked
   enters with weight exactly 0, so any change is a leak: attention across the boundary, a recurrent state, a cache.
2. each sample alone must give the logits it has in the row, up to rounding: else positions do not start again.

A class or a config can only promise this; three small forward passes show it, whatever the model, its attention
kernels or the version of the library. Run it once before a packed training begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.data.batch import collate
from veneer.data.pack import obstacle
from veneer.data.types import Encoded
from veneer.errors import StateError

__all__ = ["check"]

LENGTHS = (9, 7)


def check(model: nn.Module, *, by_samples: bool = False) -> float:
    """Raise StateError if packed samples influence each other in `model`. Returns how far the logits of a packed sample
    are from those of the same sample alone, as a share of their size: rounding. `by_samples`: as such batches are given
    (kernels/varlen.py), against samples alone as the model usually takes them."""
    if why := obstacle(model):
        _refuse(why)
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    random = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, size, (length,), generator=random).tolist() for length in LENGTHS)
    other = [(token + 1) % size for token in first]
    with _at_rest(model):
        packed, changed = (_logits(model, one, second, by_samples=by_samples) for one in (first, other))
        alone = torch.cat([_logits(model, first), _logits(model, second)])
    start = LENGTHS[0]
    if not torch.equal(packed[start:], changed[start:]):
        moved = (packed[start:] - changed[start:]).abs().max().item()
        _refuse(f"changing one sample of a row moved the logits of another by {moved:.3g}")
    off = ((packed - alone).norm() / alone.norm()).item()
    if not off < _rounding(packed.dtype):
        _refuse(f"a sample's logits differ by {off:.1%} when it is packed, so positions do not start again with it")
    return off


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """No dropout and no graph, and every module's mode as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _logits(model: nn.Module, *samples: list[int], by_samples: bool = False) -> Tensor:
    batch = collate([Encoded(ids, ids) for ids in samples], flat=True, by_samples=by_samples)
    device = next(model.parameters()).device
    return model(**batch.to(device).inputs).logits[0]


def _rounding(dtype: torch.dtype) -> float:
    return 1e-4 if dtype == torch.float32 else 5e-2


def _refuse(why: Any) -> None:
    raise StateError(f"this model cannot be trained on packed rows: {why}", where="packing", fix="set packing to off")
