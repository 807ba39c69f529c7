"""Where A and B start.

    kaiming      A uniform in +-1/sqrt(in), B = 0                                     (the reference implementation)
    gaussian     A normal with deviation 1/r, B = 0                                   (arXiv:2106.09685, section 4.1)
    orthogonal   A and B from the odd and even rows of one rotation, so that B A = 0
    pissa        A and B hold the top r singular directions of W                      (arXiv:2404.02948, eqs. 2-4)
    olora        B and A are the first r columns of Q and rows of R in W = Q R        (arXiv:2406.01775, section 3)

with data (`attach(..., data=batches)`), X the layer's inputs and G the gradient of its weight:

    eva          A holds the top right singular vectors of X, B = 0; the ranks of all layers are shared out again by
                 how much variance each direction explains                            (arXiv:2410.07170, section 3)
    eva_uniform  the same, every layer at the rank that was asked for
    corda        A and B hold the top r components of W C C^-1, C = X^T X: the ones that matter most to this data
    corda_kpm    the r that matter least, so that what the data show is kept          (arXiv:2406.05223, section 3)
    lora_ga      A and B along the top 2 r singular directions of G                   (arXiv:2407.05000, section 3.2)

for a base that is about to be quantised (`attach(..., round_trip=function)`, Q(W) being W after the round trip):

    loftq        Q <- Q(W - s B A) and s B A <- the top r singular directions of W - Q, in turn: the pair that comes
                 nearest to W. The base becomes that Q                                   (arXiv:2310.08659)

or for one that is quantised already (`attach(..., originals=function)`, W by the name of its layer):

    loftq        s B A <- the top r singular directions of W - Q, once: the base stays what it is. Where the inputs x
                 are known (`inputs=function`, too) the ones that bring Q x + s B A x nearest to W x: with the mean of
                 x x^T = L L^T and U the top left singular vectors of (W - Q) L, s B A = U U^T (W - Q)

The layer starts as the base: B A = 0, or, where A and B were taken out of W, `shifted` says that the same product is
to be subtracted for good. The base weight itself is only ever read; LoftQ alone writes it, once, to what its storage
will hold anyway.

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
from veneer.core.observe import damped
from veneer.core.op import Op
from veneer.core.registry import Registry
from veneer.core.weight import read_weight
from veneer.errors import ConfigError

__all__ = ["CHANGES_BASE", "INITS", "NEEDS", "Known", "Originals", "RoundTrip", "Site", "Start", "share_ranks"]

RoundTrip = Callable[[Tensor], Tensor]
"""A matrix (out, in) in fp32 -> the same as its storage will give it back."""
Originals = Callable[[str], Tensor]
"""The name of a layer -> its weight as it was before it was packed, in the layer's own shape."""
Known = Callable[[str], tuple[Tensor, Tensor | None] | None]
"""The name of a layer -> the mean of x^2 in each column of its inputs, and directions V (k, in) whose squares are part
of it: the mean of x x^T is V^T V and a diagonal. None where nothing is known."""


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
    seen: Any = None  # what core.observe saw, for inits that ask for it in NEEDS
    round_trip: RoundTrip | None = None  # for inits in CHANGES_BASE
    base: Tensor | None = None  # what such an init makes of W
    originals: Originals | None = None  # for loftq where W is packed already
    known: Known | None = None  # for the same, its inputs

    @property
    def shape(self) -> tuple[int, int]:
        return self.op.shape(self.host)

    def matrix(self) -> Float[Tensor, "*e out in"]:
        """W in fp32 or wider; a copy only where the storage makes one necessary."""
        w = self.op.to_matrix(self.host, read_weight(self.host).detach())
        return w.to(torch.promote_types(w.dtype, torch.float32))

    @property
    def host_dtype(self) -> torch.dtype:
        return read_weight(self.host).dtype

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
NEEDS: dict[str, str] = {}  # init -> what it wants to see of the data, see core/observe.py


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


WIDE = 8  # times the rank
LOFTQ_STEPS = 5  # after which the paper's own errors hardly fall any more; the best step is taken
CHANGES_BASE = ("loftq",)


@INITS.register("loftq")
def loftq(site: Site) -> Start:
    if site.originals is not None:
        w = site.op.to_matrix(site.host, site.originals(site.name)).to(site.device, torch.float32)
        root = _root(site, site.known(site.name)) if site.known else None
        return Start(*(t.to(site.dtype).contiguous() for t in _of_what_is_lost(site, w, w - site.matrix(), root)))
    assert site.round_trip is not None
    w, best = site.matrix(), float("inf")
    product, kept = torch.zeros_like(w), None
    for _ in range(LOFTQ_STEPS):
        q = site.round_trip(w - product).to(site.host_dtype).to(w.dtype)
        a, b = _of_what_is_lost(site, w, w - q)
        product = site.scale * (b @ a)
        error = float((w - q - product).norm())
        if error >= best:
            break
        best, kept = error, (q, a, b)
    assert kept is not None
    site.base = kept[0]
    return Start(*(t.to(site.dtype).contiguous() for t in kept[1:]))


def _of_what_is_lost(site: Site, w: Tensor, lost: Tensor, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A and B whose scaled product is the nearest to what is lost of w; a row of A is as large as its column of B."""
    felt = lost if root is None else lost @ root
    if min(site.shape) > WIDE * site.rank:  # a random projection finds the top of a wide matrix far sooner
        u = torch.svd_lowrank(felt, q=2 * site.rank, niter=4)[0]
    else:
        u = torch.linalg.svd(felt, full_matrices=False)[0]
    u = u[..., : site.rank]
    a = u.mT @ lost
    size = a.norm(dim=-1)
    is_lost = size > torch.finfo(w.dtype).eps * w.norm()
    balance = torch.where(is_lost, size * site.scale, 1).sqrt()
    drawn = torch.randn_like(a) / site.shape[1]  # where nothing is lost A is not 0 as well, or it stays dead
    a = torch.where(is_lost[..., None], a / balance[..., None], drawn)
    return a, u * torch.where(is_lost, balance / site.scale, 0)[..., None, :]


def _root(site: Site, known: tuple[Tensor, Tensor | None] | None) -> Tensor | None:
    """L, (in, in + k), with L L^T the mean of x x^T; columns without inputs count a little."""
    if known is None:
        return None
    energy, v = (None if t is None else t.to(site.device, torch.float32) for t in known)
    assert energy is not None
    v = energy.new_zeros(0, len(energy)) if v is None else v
    return torch.cat([torch.diag(damped(energy, v).sqrt()), v.T], dim=1) / (float(energy.mean()) or 1.0) ** 0.5


# --- inits that look at data ----------------------------------------------------------------------------------------


@INITS.register("eva", "eva_uniform")
def eva(site: Site) -> Start:
    a, b = site.empty()
    directions = site.seen.directions[: site.rank]
    a.zero_()
    a[: len(directions)] = directions.to(a)
    return Start(a, b.zero_())


NEEDS["eva"] = NEEDS["eva_uniform"] = "spectrum"
SHARES_RANKS = {"eva": 2.0}  # no layer may get more than this times the rank asked for (the paper's rho)


def share_ranks(explained: Mapping[str, Tensor], ranks: Mapping[str, int], rho: float) -> dict[str, int]:
    """The budget of all ranks given to the directions that explain most, wherever they are; at least 1 a layer.

    >>> share_ranks({"a": torch.tensor([0.9, 0.05]), "b": torch.tensor([0.5, 0.4])}, {"a": 1, "b": 1}, 2.0)
    {'a': 1, 'b': 1}
    >>> share_ranks({"a": torch.tensor([0.9, 0.0]), "b": torch.tensor([0.5, 0.4])}, {"a": 2, "b": 1}, 2.0)
    {'a': 1, 'b': 2}
    """
    offers = [
        (float(share), name)
        for name, shares in explained.items()
        for share in shares[1 : int(rho * ranks[name])]  # the first of each layer is given in any case
    ]
    left = sum(ranks.values()) - len(ranks)
    won = [name for _, name in sorted(offers, key=lambda offer: -offer[0])[: max(left, 0)]]
    return {name: 1 + won.count(name) for name in ranks}


def _corda(site: Site, pick: slice) -> Start:
    """W C = U S V^T; W is then U S V^T C^-1 and the picked components of that sum are taken out."""
    c = site.seen / site.seen.diagonal().mean().clamp_min(1e-30)
    damp = 1e-2
    eye = torch.eye(len(c), device=c.device)
    while True:  # rank-deficient where fewer rows were seen than there are inputs: damp until the inverse is sound
        damped = c + damp * eye
        inverse = torch.linalg.inv(damped)
        if float((damped @ inverse - eye).abs().max()) < 1e-3 or damp > 1:
            break
        damp *= 2
    u, s, vh = torch.linalg.svd(site.matrix() @ damped, full_matrices=False)
    root = (s[pick] / site.scale).sqrt()
    a, b = root[:, None] * (vh[pick] @ inverse), u[:, pick] * root
    return Start(a.to(site.dtype).contiguous(), b.to(site.dtype).contiguous(), shifted=True)


@INITS.register("corda")
def corda(site: Site) -> Start:
    return _corda(site, slice(0, site.rank))


@INITS.register("corda_kpm")
def corda_kpm(site: Site) -> Start:
    count = min(site.shape)
    return _corda(site, slice(count - site.rank, count))


NEEDS["corda"] = NEEDS["corda_kpm"] = "covariance"
GAMMA = 16.0  # LoRA-GA's stable scale; the paper's choice for all its experiments


@INITS.register("lora_ga")
def lora_ga(site: Site) -> Start:
    """A from the first r right directions of G, B from the next r left ones: the first step is then the best rank-2r
    approximation of a step of full fine-tuning."""
    g = site.seen
    if 2 * site.rank > min(g.shape):
        raise ConfigError(f"init 'lora_ga' needs 2 r = {2 * site.rank} directions of a {tuple(g.shape)} gradient")
    u, _, v = torch.svd_lowrank(g, q=min(4 * site.rank, min(g.shape)), niter=4)
    size = g.shape[0] ** 0.25 / math.sqrt(GAMMA)
    a, b = size * v.T[: site.rank], size * u[:, site.rank : 2 * site.rank]
    return Start(a.to(site.dtype).contiguous(), b.to(site.dtype).contiguous(), shifted=True)


NEEDS["lora_ga"] = "gradient"
