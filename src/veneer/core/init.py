"""Where A and B start.

    kaiming      A uniform in +-1/sqrt(in), B = 0                                     (the reference implementation)
    gaussian     A normal with deviation 1/r, B = 0                                   (arXiv:2106.09685, section 4.1)
    orthogonal   A and B from the odd and even rows of one rotation, so that B A = 0
    pissa        A and B hold the top r singular directions of W                      (arXiv:2404.02948, eqs. 2-4)
    olora        B and A are the first r columns of Q and rows of R in W = Q R        (arXiv:2406.01775, section 3)

The layer starts as the base: B A = 0, or, where A and B were taken out of W, `shifted` says that the same product is
to be subtracted for good. The base weight itself is only ever read.

Embeddings start the other way round (A = 0, B normal with deviation 1): then a token that is never seen in training
keeps exactly the embedding that it had.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veneer.core.leaf import Leaf, own_parameters
from veneer.core.op import Op
from veneer.core.registry import Registry
from veneer.core.weight import read_weight
from veneer.errors import ConfigError

__all__ = ["INITS", "Site", "Start"]


class Start(NamedTuple):
    """What an init returns. `shifted`: dW is counted from here, so A0 = A and B0 = B are kept and subtracted."""

    a: Float[Tensor, "*e r in"]
    b: Float[Tensor, "*e out r"]
    shifted: bool = False


@dataclass
class Site:
    """The place where an adapter is about to be put, and what an init may want to know of it."""

    name: str
    host: nn.Module
    op: Op
    rank: int
    scale: float
    dtype: torch.dtype
    device: torch.device
    options: Mapping[str, Any] = field(default_factory=dict)  # the delta's own settings, defaults filled in
    shared: Any = None  # what Delta.share left here

    @property
    def shape(self) -> tuple[int, int]:
        return self.op.shape(self.host)

    def matrix(self) -> Float[Tensor, "*e out in"]:
        """W in fp32 or wider; a copy only where the storage makes one necessary."""
        w = self.op.to_matrix(self.host, read_weight(self.host).detach())
        return w.to(torch.promote_types(w.dtype, torch.float32))

    @property
    def batch(self) -> tuple[int, ...]:
        """Leading axes: one matrix for each expert of a stack."""
        weight = own_parameters(self.host).get("weight") if isinstance(self.host, Leaf) else None
        return () if weight is None else tuple(weight.shape[:-2])

    def empty(self) -> tuple[Tensor, Tensor]:
        """A and B with memory but without values."""
        (out, n), batch = self.shape, self.batch
        like = {"dtype": self.dtype, "device": self.device}
        return torch.empty(*batch, self.rank, n, **like), torch.empty(*batch, out, self.rank, **like)


INITS: Registry[Callable[[Site], Start]] = Registry("init")


def unset(site: Site) -> Start:
    """Memory only: whoever loads values next pays for no random numbers."""
    return Start(*site.empty())


@INITS.register("kaiming")
def kaiming(site: Site) -> Start:
    a, b = site.empty()
    if site.op.looks_up:
        return Start(a.zero_(), b.normal_())
    bound = 1 / math.sqrt(a.shape[-1])  # kaiming_uniform_ with a = sqrt(5), as in the reference implementation
    return Start(a.uniform_(-bound, bound), b.zero_())


@INITS.register("gaussian")
def gaussian(site: Site) -> Start:
    a, b = site.empty()
    if site.op.looks_up:
        return Start(a.zero_(), b.normal_())
    return Start(a.normal_(std=1 / site.rank), b.zero_())


@INITS.register("orthogonal")
def orthogonal(site: Site) -> Start:
    """Both factors differ from zero, so both learn from the first step; their product is zero up to rounding."""
    if site.rank % 2:
        raise ConfigError(
            f"init 'orthogonal' needs an even rank, got {site.rank}",
            where=site.name,
            fix=f"rank={site.rank + 1}, or another init",
        )
    (out, n), batch, half = site.shape, site.batch, site.rank // 2
    q, _ = torch.linalg.qr(torch.randn(*batch, site.rank, site.rank, device=site.device))
    a = torch.randn(*batch, n, half, device=site.device) @ q[..., 0::2, :] / 10  # (in, r): every other row of q
    b = torch.randn(*batch, out, half, device=site.device) @ q[..., 1::2, :] / 10  # (out, r): orthogonal to them
    return Start(a.mT.contiguous().to(site.dtype), b.to(site.dtype))


@INITS.register("pissa")
def pissa(site: Site) -> Start:
    """The paper moves these directions out of the base; here they are subtracted beside it, which is the same sum."""
    u, s, vh = torch.linalg.svd(site.matrix(), full_matrices=False)
    root = (s[..., : site.rank] / site.scale).sqrt()  # "...": a stack of experts is a batch of SVDs
    a, b = root[..., None] * vh[..., : site.rank, :], u[..., : site.rank] * root[..., None, :]
    return Start(a.to(site.dtype).contiguous(), b.to(site.dtype).contiguous(), shifted=True)


@INITS.register("olora")
def olora(site: Site) -> Start:
    q, r = torch.linalg.qr(site.matrix())
    a, b = r[..., : site.rank, :], q[..., : site.rank]
    return Start(a.to(site.dtype).contiguous(), b.to(site.dtype).contiguous(), shifted=True)
