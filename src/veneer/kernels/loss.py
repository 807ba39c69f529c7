"""Cross entropy on a linear head, chunk by chunk, its gradient formed in the logits' own memory.

    chunk of hidden --head--> logits --token_losses_--> d logits, in place --head backwards--> d hidden

One chunk of logits in the activations' type is all there ever is: no copy in fp32, no log-probabilities, no second
array for the gradient. Rows that do not count are left out as chunks are gathered, not before: at 350,000 tokens hidden
is 2.7 GiB in an 8B model, and a copy of it, and of its gradient, as much again. The head may carry adapters and may be
stored in 4 or 8 bits; what is trained whole goes the general way of tasks/cross_entropy.py.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from veneer.kernels.group import Factors, Group
from veneer.kernels.pieces import kernels_for

__all__ = ["head_loss"]


class HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, index: Tensor | None, head: Group, rows: int, *tensors: Tensor
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        make = torch.empty_like if index is None else torch.zeros_like
        d_hidden, d_tensors = make(hidden), [torch.zeros_like(t) for t in tensors]
        factors = head.factors(hidden.dtype)
        for at in range(0, len(labels), rows):
            place = slice(at, at + rows) if index is None else index[at : at + rows]
            loss, d_x, d_factors = _chunk(head, hidden[place], labels[at : at + rows], factors)
            total += loss
            d_hidden[place] = d_x
            for into, part in zip(d_tensors, d_factors, strict=True):
                into.add_(part if part is not None else 0)
        ctx.save_for_backward(d_hidden, *d_tensors)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        d_hidden, *d_tensors = (d * scale.to(d.dtype) for d in ctx.saved_tensors)
        return d_hidden, None, None, None, None, *d_tensors


def _chunk(head: Group, x: Tensor, labels: Tensor, factors: Factors) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    thin = head.thin(x, factors.a)
    (logits,) = head.outputs(x, thin.h, factors.bs)
    ys = [logits.clone()] if head.magnitudes else []
    loss = kernels_for(x).token_losses_(logits, labels).sum()
    d_x, d_factors = head.back(x, [logits], thin, factors, ys)
    assert d_x is not None
    return loss, d_x, d_factors


def head_loss(
    hidden: Float[Tensor, "n dim"],
    labels: Int[Tensor, " m"],
    head: Group,
    rows: int,
    index: Int[Tensor, " m"] | None = None,
) -> Float[Tensor, ""]:
    """The summed loss, `rows` of hidden at a time; of the rows in `index` only, where it is given."""
    with saved_tensors_hooks(_as_it_is, _as_it_is):  # what is kept is needed next: it stays where it is
        return HeadLoss.apply(hidden, labels, index, head, rows, *head.tensors())  # type: ignore[return-value]


def _as_it_is(t: Tensor) -> Tensor:
    return t
