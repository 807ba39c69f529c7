"""Cross entropy over a vocabulary without the logits.

For 8,192 tokens and a vocabulary of 128,256 the logits and their gradient are the largest tensors of a training step by
far (11.7 GiB where everything else fits in less). None of it is needed at once:

    hidden (tokens, dim) --trained tokens only--> chunks of ROWS --head--> logits --> loss and d loss / d hidden

The gradient is taken while a chunk's logits are there, so the backward pass only scales what is stored: dim numbers a
token instead of a vocabulary's worth. A linear head, adapted or not, goes the way of kernels/loss.py, which needs no
second array of that size; any other runs through its own forward, chunk by chunk, and its parameters get their
gradients.

Not every model's logits are `head(hidden)`: some scale or cap them. `head_split` therefore tries it out once, on a few
tokens, and where the two differ the plain way is used and the reason said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from veneer.data.types import IGNORE
from veneer.kernels.group import Bare, Group, lay_bare
from veneer.kernels.loss import head_loss

__all__ = ["HeadSplit", "chunked_cross_entropy", "evaluating", "head_split", "plain_cross_entropy"]

ROWS = 2048  # tokens whose logits exist at a time: 0.5 GiB in bf16 at a vocabulary of 128,256


class HeadSplit(NamedTuple):
    """A model in two parts whose composition is the model; `body` is None where that does not hold, `why` says so."""

    body: Callable[..., Any] | None
    head: nn.Module | None
    why: str


def plain_cross_entropy(logits: Float[Tensor, "*n classes"], labels: Int[Tensor, "*n"]) -> Float[Tensor, ""]:
    """The summed loss of the labels that count: what `chunked_cross_entropy` must equal."""
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def chunked_cross_entropy(
    hidden: Float[Tensor, "*n dim"],
    labels: Int[Tensor, "*n"],
    head: nn.Module,
    rows: int = ROWS,
    count: int | None = None,
) -> Float[Tensor, ""]:
    """The same, from what goes into the head. Labels are those of the same position (shift them before).

    count: how many labels count, where that is known; a GPU then need not be waited for to learn it.
    """
    hidden, labels, index = hidden.flatten(0, -2), labels.flatten(), None
    if count != len(labels):  # ignored rows never meet the head
        counted = labels != IGNORE
        index = counted.nonzero()[:, 0] if count is None else counted.nonzero_static(size=count)[:, 0]
        labels = labels[index]
    if torch.is_grad_enabled():
        bare = lay_bare(head, hidden.dtype)
        if isinstance(bare, Bare) and not torch.is_autocast_enabled(hidden.device.type):
            return head_loss(hidden, labels, Group((bare,)), rows, index)
    hidden = hidden if index is None else hidden[index]
    if not torch.is_grad_enabled():
        return _sum(hidden, labels, head, rows)
    trained = [p for p in head.parameters() if p.requires_grad]
    return _Chunked.apply(hidden, labels, head, rows, *trained)


def _sum(hidden: Tensor, labels: Tensor, head: nn.Module, rows: int) -> Tensor:
    total = hidden.new_zeros((), dtype=torch.float32)
    for h, y in zip(hidden.split(rows), labels.split(rows), strict=True):
        total = total + plain_cross_entropy(head(h), y)
    return total


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: nn.Module, rows: int, *trained: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden)
        d_trained = [torch.zeros_like(p) for p in trained]
        at = 0
        for h, y in zip(hidden.split(rows), labels.split(rows), strict=True):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                loss = plain_cross_entropy(head(h), y)
            d_h, *d_p = torch.autograd.grad(loss, [h, *trained], allow_unused=True)
            total += loss.detach()
            d_hidden[at : at + len(h)] = d_h
            for into, part in zip(d_trained, d_p, strict=True):
                into.add_(part if part is not None else 0)
            at += len(h)
        ctx.save_for_backward(d_hidden, *d_trained)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        d_hidden, *d_trained = ctx.saved_tensors
        scaled = [d * scale.to(d.dtype) for d in (d_hidden, *d_trained)]
        return scaled[0], None, None, None, *scaled[1:]


@torch.no_grad()
def head_split(model: nn.Module, inputs: Mapping[str, Any]) -> HeadSplit:
    """Find body and head of a causal LM, and hold head(body(x)) against model(x) on a few tokens."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    body = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if not isinstance(head, nn.Module) or not isinstance(body, nn.Module):
        return HeadSplit(None, None, "the model does not say what its body and its head are")
    few = {name: value[:1, :16] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    with evaluating(model):
        try:
            whole, split = model(**few).logits, head(body(**few)[0])
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            return HeadSplit(None, None, f"body and head do not run apart ({type(error).__name__}: {error})")
    if whole.shape != split.shape or not torch.allclose(whole, split, rtol=1e-3, atol=1e-3):
        return HeadSplit(None, None, "the model changes its logits after the head")
    return HeadSplit(body, head, "head(body(x)) is the model's own output")


@contextmanager
def evaluating(model: nn.Module) -> Any:
    """Evaluation mode for a moment, each module back to what it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
