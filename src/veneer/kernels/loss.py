"""Cross entropy on a linear head, chunk by chunk, its gradient formed in the logits' own memory.

    chunk of hidden --head--> logits --token_losses_--> d logits, in place --head backwards--> d hidden

One chunk of logits in the activations' type is all there ever is: no copy in fp32, no log-probabilities, no second
array for the gradient. The head may carry adapters and may be stored in 4 or 8 bits; what is trained whole goes the
general way of tasks/cross_entropy.py.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.group import Factors, Group
from veneer.kernels.pieces import kernels_for

__all__ = ["head_loss"]


class HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: Group, rows: int, *tensors: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        d_hidden, d_tensors = torch.empty_like(hidden), [torch.zeros_like(t) for t in tensors]
        factors = head.factors(hidden.dtype)
        for at in range(0, len(hidden), rows):
            x, y = hidden[at : at + rows], labels[at : at + rows]
            loss, d_x, d_factors = _chunk(head, x, y, factors)
            total += loss
            d_hidden[at : at + rows] = d_x
            for into, part in zip(d_tensors, d_factors, strict=True):
                into.add_(part if part is not None else 0)
        ctx.save_for_backward(d_hidden, *d_tensors)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        d_hidden, *d_tensors = (d * scale.to(d.dtype) for d in ctx.saved_tensors)
        return d_hidden, None, None, None, *d_tensors


def _chunk(head: Group, x: Tensor, labels: Tensor, factors: Factors) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    thin = head.thin(x, factors.a)
    (logits,) = head.outputs(x, thin.h, factors.bs)
    ys = [logits.clone()] if head.magnitudes else []
    loss = kernels_for(x).token_losses_(logits, labels).sum()
    d_x, d_factors = head.back(x, [logits], thin, factors, ys)
    assert d_x is not None
    return loss, d_x, d_factors


def head_loss(hidden: Float[Tensor, "n dim"], labels: Int[Tensor, " n"], head: Group, rows: int) -> Float[Tensor, ""]:
    """The summed loss of all rows, `rows` of them at a time."""
    return HeadLoss.apply(hidden, labels, head, rows, *head.tensors())  # type: ignore[return-value]
