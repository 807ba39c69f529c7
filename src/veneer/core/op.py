"""Layer kinds: what matrix a weight stands for, how an input meets A, and how the result meets B.

    layer        weight as stored           the matrix W (out, in)        A's input
    Linear       (out, in)                  as it is                      the last axis of x
    HF Conv1D    (in, out)                  transposed                    the last axis of x
    ConvNd       (out, in/groups, *k)       flattened: in = in/groups*k   every patch, by the layer's own convolution
    Embedding    (vocab, dim)               transposed: out = dim         a row of A.T picked by the token

Everything else in the core - deltas, combine rules, inits, merging, files - speaks of the matrix alone, so a new layer
kind is one class here and one row in OPS.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from veneer.core.registry import Registry

__all__ = ["OPS", "Op", "is_turned", "op_for", "op_of"]


@runtime_checkable
class Op(Protocol):
    """One layer kind. All methods take the layer itself as `host`, because strides and groups live there."""

    looks_up: bool  # the input is token ids: nothing to multiply and nothing to drop out

    def shape(self, host: nn.Module) -> tuple[int, int]:
        """(out, in) of the matrix, known without reading the weight."""
        ...

    def to_matrix(self, host: nn.Module, w: Tensor) -> Float[Tensor, "out in"]: ...

    def to_weight(self, host: nn.Module, m: Float[Tensor, "out in"]) -> Tensor: ...

    def down(self, host: nn.Module, x: Tensor, a: Float[Tensor, "r in"]) -> Tensor:
        """x meets A: the rank-r activations h."""
        ...

    def up(self, host: nn.Module, h: Tensor, b: Float[Tensor, "out r"]) -> Tensor:
        """h meets B: a tensor of the layer's output shape."""
        ...

    def product(self, host: nn.Module, x: Tensor, m: Float[Tensor, "out in"]) -> Tensor:
        """What the layer would give for x if it held m and no bias: for changes that are no product of two factors."""
        ...

    def per_channel(self, host: nn.Module, v: Float[Tensor, " out"]) -> Tensor:
        """One value for each output channel, shaped to broadcast against the layer's output."""
        ...


class LinearOp:
    """nn.Linear and every subclass of it, packed or not."""

    looks_up = False

    def shape(self, host: nn.Module) -> tuple[int, int]:
        return host.out_features, host.in_features

    def to_matrix(self, host: nn.Module, w: Tensor) -> Tensor:
        return w

    def to_weight(self, host: nn.Module, m: Tensor) -> Tensor:
        return m

    def down(self, host: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a.to(x.dtype))

    def up(self, host: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        return F.linear(h, b.to(h.dtype))

    def product(self, host: nn.Module, x: Tensor, m: Tensor) -> Tensor:
        return F.linear(x, m.to(x.dtype))

    def per_channel(self, host: nn.Module, v: Tensor) -> Tensor:
        return v


class TransposedLinearOp(LinearOp):
    """GPT-2's Conv1D: a linear layer that stores its weight as (in, out)."""

    def shape(self, host: nn.Module) -> tuple[int, int]:
        return host.nf, host.nx  # not the weight's shape: it may be packed

    def to_matrix(self, host: nn.Module, w: Tensor) -> Tensor:
        return w.T

    def to_weight(self, host: nn.Module, m: Tensor) -> Tensor:
        return m.T


class ConvOp:
    """Conv1d, Conv2d and Conv3d. With groups, every group sees the same A and its own rows of B."""

    looks_up = False

    def shape(self, host: nn.Module) -> tuple[int, int]:
        return host.out_channels, host.in_channels // host.groups * math.prod(host.kernel_size)

    def to_matrix(self, host: nn.Module, w: Tensor) -> Tensor:
        return w.flatten(1)

    def to_weight(self, host: nn.Module, m: Tensor) -> Tensor:
        return m.reshape(host.out_channels, host.in_channels // host.groups, *host.kernel_size)

    def down(self, host: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        # The layer's own forward with r filters a group: no stride, dilation or padding mode can be forgotten.
        filters = a.to(x.dtype).view(-1, host.in_channels // host.groups, *host.kernel_size)
        if host.groups > 1:
            filters = filters.repeat(host.groups, *[1] * (filters.ndim - 1))
        return host._conv_forward(x, filters, None)

    def up(self, host: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(host.kernel_size)]
        return conv(h, b.to(h.dtype).view(*b.shape, *[1] * len(host.kernel_size)), groups=host.groups)

    def product(self, host: nn.Module, x: Tensor, m: Tensor) -> Tensor:
        return host._conv_forward(x, self.to_weight(host, m.to(x.dtype)), None)

    def per_channel(self, host: nn.Module, v: Tensor) -> Tensor:
        return v.view(-1, *[1] * len(host.kernel_size))  # (out, 1, ...): batched and unbatched inputs alike


class EmbeddingOp:
    """nn.Embedding: the product W e_token is a look-up, and so is A e_token."""

    looks_up = True

    def shape(self, host: nn.Module) -> tuple[int, int]:
        return host.embedding_dim, host.num_embeddings

    def to_matrix(self, host: nn.Module, w: Tensor) -> Tensor:
        return w.T

    def to_weight(self, host: nn.Module, m: Tensor) -> Tensor:
        return m.T

    def down(self, host: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        return F.embedding(x, a.T, padding_idx=host.padding_idx)

    def up(self, host: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        return self._scaled(host, F.linear(h, b.to(h.dtype)))

    def product(self, host: nn.Module, x: Tensor, m: Tensor) -> Tensor:
        return self._scaled(host, F.embedding(x, m.T, padding_idx=host.padding_idx))

    def _scaled(self, host: nn.Module, y: Tensor) -> Tensor:
        scale = getattr(host, "embed_scale", None)  # Gemma and M2M multiply what they look up
        return y if scale is None else y * scale

    def per_channel(self, host: nn.Module, v: Tensor) -> Tensor:
        return v


OPS: Registry[Op] = Registry("layer kind")  # by class, or by its dotted name where importing it would be heavy

OPS["torch.nn.modules.linear.Linear"] = LinearOp()
OPS["transformers.pytorch_utils.Conv1D"] = TransposedLinearOp()
for _kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    OPS[f"{_kind.__module__}.{_kind.__qualname__}"] = ConvOp()
OPS["gptqmodel.nn_modules.qlinear.BaseQuantLinear"] = LinearOp()  # GPTQ and AWQ
OPS["torch.nn.modules.sparse.Embedding"] = EmbeddingOp()


@cache
def op_for(kind: type) -> Op | None:
    """The layer kind of a class, looked up through its bases; None when it cannot carry adapters."""
    for base in kind.__mro__:
        op = OPS.get(f"{base.__module__}.{base.__qualname__}")
        if op is not None:
            return op
    return None


def op_of(host: nn.Module) -> Op:
    op = op_for(type(host))
    assert op is not None, f"{type(host).__name__} is not an adaptable layer"
    return op


def is_turned(one: Op, other: Op) -> bool:
    """Whether two layer kinds read the same stored weight as matrices that are each other's transpose.

    >>> is_turned(LinearOp(), EmbeddingOp()), is_turned(EmbeddingOp(), EmbeddingOp())
    (True, False)
    """
    probe, nobody = torch.empty(2, 3, device="meta"), nn.Module()
    return one.to_matrix(nobody, probe).shape != other.to_matrix(nobody, probe).shape
