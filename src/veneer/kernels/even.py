"""Gradients of attention that all lie in memory alike, which cuDNN's attention needs.

torch keeps a plan for each backward pass of cuDNN's attention and finds it again by the shapes and strides of q, k and
v. The plan holds the strides of the output's gradient, too, but nobody looks whether they are the same: seen with torch
2.11, and to be mended after 2.13 (github.com/pytorch/pytorch/pull/191576). Two attentions alike whose outputs are used
differently then share one plan, and the gradient of the second is read as that of the first lies: other numbers, or an
illegal memory access.

FLUX is such a model. In its blocks of one stream the attention's output goes on beside the unit's activation, so that
its gradient is a slice of wider rows; in its blocks of two streams it has rows of its own. Fused blocks hand on rows of
their own everywhere (`_attend` in dit_fuse.py). Here is the same for blocks that run by their own forward.

    with even_gradients(model): ...        of every attention that ends without a layer of its own
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.kernels.fuse import FusedModule

__all__ = ["even_gradients"]


@contextmanager
def even_gradients(model: nn.Module) -> Iterator[int]:
    """Rows of their own for the gradients of what the heads gave; of how many modules."""
    bare = list(_bare_attentions(model))
    with ExitStack() as stack:
        for module in bare:
            stack.callback(module.register_forward_hook(_evened).remove)
        yield len(bare)


def _bare_attentions(model: nn.Module) -> Iterator[nn.Module]:
    """diffusers' attentions whose output is that of the heads, where no fused block runs them."""
    fused = {id(inside) for m in model.modules() if isinstance(m, FusedModule) for inside in m.modules()}
    for module in model.modules():
        is_attention = hasattr(module, "processor") and hasattr(module, "to_q")
        if is_attention and getattr(module, "to_out", None) is None and id(module) not in fused:
            yield module


def _evened(module: nn.Module, args: Any, output: Any) -> Any:
    return Even.apply(output) if isinstance(output, Tensor) and output.requires_grad else output


class Even(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g.contiguous()
