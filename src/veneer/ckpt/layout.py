"""One layer's adapter in PEFT's files and here.

    layer              in the file                                             here: A (r, in), B (out, r)
    Linear, Conv1D     lora_A.weight (r, in), lora_B.weight (out, r)           the same
    Embedding          lora_embedding_A (r, vocab), lora_embedding_B (dim, r)  the same
    ConvNd             lora_A.weight (r, in, *k), lora_B.weight (out, r, 1..)  flattened
    ConvNd, g groups   lora_A.weight (R, in, *k), lora_B.weight (out, R/g, 1..)  see below
    stack of E         lora_A.weight (r E, in), lora_B.weight (out, r E)       (E, r, in), (E, out, r): see below
    DoRA               lora_magnitude_vector (out,), for ConvNd (1, out, 1..)  flattened
    rows of a table    token_adapter.trainable_tokens_delta (rows, dim)        a change: minus the table's own rows
    lora_bias          lora_B.bias (out,)                                      a change of the bias, times the scale
    other methods      their own names (methods.py)                            the delta's own

Groups are where the two differ in kind. A grouped convolution's weight is (out, in/g, *k), and our change of it is too:
all groups share A (r, in/g * k). PEFT's A is an ordinary convolution over *all* input channels, of which group j of B
reads the j-th R/g results; what it adds is no change of the grouped weight at all, and PEFT itself cannot merge it.

    ours -> PEFT   always: R = g r; row block j of A holds our A at the channels of group j and zeros elsewhere; B as it
                   is. The scale must stay alpha / r, so alpha becomes g alpha (rsLoRA: sqrt(g) alpha).
    PEFT -> ours   if A is zero outside those blocks. Equal blocks are what we wrote, and give the first r rows back.
                   Else A's blocks are stacked and B is padded: its rows of group j use only block j.

Bare parameters (PEFT's target_parameters: stacks of experts) have no layer of their own, so their keys name the module
that holds them, and of several in one module the first is nested deepest: `experts.base_layer.lora_A` belongs to the
first parameter, `experts.lora_A` to the last. The experts run fastest in B's columns and slowest in A's rows. Where the
module says that its stacks are transposed (E, in, out), A and B change places; so they did everywhere before PEFT 0.19.

An nn.MultiheadAttention is one target in PEFT: `attn.lora_A` is of the packed input projection, and that of the output
projection is nested, `attn.base_layer.out_proj.lora_A`. PEFT merges both before each call, and out_proj twice: by the
attention and by the layer's own merge. So what is in the file counts double there, and in training with PEFT did.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.ckpt.methods import tensor_names
from veneer.core.leaf import Leaf
from veneer.core.op import op_of
from veneer.core.select import ends_with

__all__ = [
    "NESTED",
    "PREFIX",
    "TOKENS",
    "Key",
    "file_rank",
    "from_file",
    "is_conv",
    "is_flipped",
    "misfit",
    "parse_key",
    "to_file",
]

PREFIX = "base_model.model."
NESTED = ".base_layer"  # in the name of a module: an adapter of one of its parameters, under that of another
FIELDS = {
    **tensor_names(),
    "lora_A": "A",
    "lora_B": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "trainable_tokens_delta": "rows",
    "vera_A": "shared.A",  # of no layer: all of them share it
    "vera_B": "shared.B",
}
TOKENS = ".token_adapter"  # in the name of a table of which single rows are trained
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module")  # torch.compile and FSDP leave these in names


class Key(NamedTuple):
    """What a key of the file speaks of: a module, what of it, and whose adapter where the key says so."""

    module: str
    field: (
        str  # A, B, magnitude, ..., B.bias, shared.<name>, base.<parameter>, saved.<parameter>, or "" for a plain one
    )
    adapter: str | None = None


def parse_key(key: str) -> Key | None:
    """Read one key, with or without prefix, wrappers and adapter's name; None for what PEFT keeps of the base.

    >>> parse_key("base_model.model.h.0.attn.lora_A.weight")
    Key(module='h.0.attn', field='A', adapter=None)
    >>> parse_key("_orig_mod.h.0.attn.lora_B.sql.bias")
    Key(module='h.0.attn', field='B.bias', adapter='sql')
    >>> parse_key("base_model.model.score.modules_to_save.default.weight")
    Key(module='score', field='saved.weight', adapter='default')
    """
    parts = [part for part in key.removeprefix(PREFIX).split(".") if part not in WRAPPERS]
    for i in range(len(parts) - 1, -1, -1):
        module, rest = ".".join(parts[:i]), parts[i + 1 :]
        if parts[i] in FIELDS:
            leaf = rest.pop() if rest and rest[-1] in ("weight", "bias") else "weight"
            field = FIELDS[parts[i]]
            module = "" if field.startswith("shared.") else module.removesuffix(TOKENS)
            return Key(module, field if leaf == "weight" else f"{field}.bias", ".".join(rest) or None)
        if parts[i] == "base_layer":
            return Key(module, f"base.{'.'.join(rest)}")
        if parts[i] == "original_module":
            return None
        if parts[i] == "modules_to_save":
            named = len(rest) > 1
            return Key(module, f"saved.{'.'.join(rest[named:])}", rest[0] if named else None)
    return Key(".".join(parts), "")


def is_conv(host: Any) -> bool:
    return hasattr(host, "kernel_size")


def is_stack(host: Any) -> bool:
    return isinstance(host, Leaf) and host.raw.ndim == 3


def is_flipped(host: Any, version: str = "", shapes: Mapping[str, tuple[int, ...]] | None = None) -> bool:
    """Whether A and B of a stack have changed places in the file: by shape, and for squares by PEFT's version."""
    if not is_stack(host):
        return False
    flipped = bool(getattr(host.owner, "is_transposed", False))
    if shapes is None:
        return flipped
    rank = shapes["A"][0] // len(host.raw)
    fits = [f for f in (flipped, not flipped) if file_shapes(host, rank, f) == {k: shapes[k] for k in "AB"}]
    is_old = re.match(r"0\.1[0-8](\.|$)", version) is not None
    return is_old or flipped if len(fits) == 2 else fits[0] if fits else flipped


def file_shapes(host: Any, rank: int, flipped: bool = False) -> dict[str, tuple[int, ...]]:
    """The shapes that the file must have for this layer at this rank (of the file: see groups above)."""
    out, n = op_of(host).shape(host)
    if is_stack(host):
        out, n, rank = *((n, out) if flipped else (out, n)), rank * len(host.raw)
    if not is_conv(host):
        return {"A": (rank, n), "B": (out, rank)}
    ones = (1,) * len(host.kernel_size)
    return {"A": (rank, host.in_channels, *host.kernel_size), "B": (out, rank // host.groups, *ones)}


def misfit(site: str, host: Any, rank: int, shapes: Mapping[str, tuple[int, ...]], flipped: bool = False) -> str | None:
    """Why tensors of these shapes cannot be this layer's adapter: both shapes and the likely cause; None if they can.

    `rank` is the one that the file's config gives, `shapes` those of A, B and perhaps magnitude in the file.
    """
    wanted = file_shapes(host, rank, flipped)
    odd = [name for name in "AB" if shapes[name] != wanted[name]]
    wrong = [f"{name} is {list(shapes[name])}, needs {list(wanted[name])}" for name in odd]
    size = op_of(host).shape(host)[0] * (len(host.raw) if is_stack(host) else 1)
    if "magnitude" in shapes and (given := torch.Size(shapes["magnitude"]).numel()) != size:
        wrong.append(f"magnitude has {given} values, needs {size}")
    return f"{site}: {'; '.join(wrong)} ({_cause(site, host, rank, shapes, wanted)})" if wrong else None


def _cause(
    site: str, host: Any, rank: int, given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> str:
    if is_conv(host) and rank % host.groups:
        return f"the rank must be a multiple of the layer's {host.groups} groups"
    if given["A"][0] != wanted["A"][0]:
        return f"the file has rank {given['A'][0]}, its config says {rank}: r or rank_pattern was edited"
    in_differs, out_differs = given["A"][1:] != wanted["A"][1:], given["B"][:1] != wanted["B"][:1]
    if op_of(host).looks_up and in_differs and not out_differs:
        return f"another vocabulary: call model.resize_token_embeddings({given['A'][1]}) before loading"
    if ends_with(site, "lm_head") and out_differs and not in_differs:
        return f"another vocabulary: call model.resize_token_embeddings({given['B'][0]}) before loading"
    return "made for a base of another size"


class Pair(NamedTuple):
    """A (r, in) and B (out, r), and by how much the rank shrank on the way from the file."""

    a: Tensor
    b: Tensor
    shrunk: int = 1


def from_file(host: Any, a: Tensor, b: Tensor, flipped: bool = False) -> Pair | None:
    """Our matrices out of the file's tensors; None if the file mixes the channels of different groups."""
    if is_stack(host):
        a, b = a.reshape(len(host.raw), -1, a.shape[1]), b.view(len(b), -1, len(host.raw)).permute(2, 0, 1)
        return Pair(b.mT, a.mT) if flipped else Pair(a, b)
    if not is_conv(host) or host.groups == 1:
        return Pair(a.flatten(1), b.flatten(1))
    g, rank = host.groups, a.shape[0]
    blocks = a.reshape(g, rank // g, g, -1)  # (block of rows, row, group of channels, in/g * k)
    own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (g, R/g, in/g * k)
    if blocks.count_nonzero() != own.count_nonzero():
        return None
    if (own == own[0]).all():
        return Pair(own[0].contiguous(), b.flatten(1), shrunk=g)
    padded = torch.block_diag(*b.flatten(1).view(g, -1, rank // g))  # (out, R)
    return Pair(own.reshape(rank, -1), padded)


def to_file(host: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors, by the ending of their keys, out of A, B and (for DoRA) magnitude."""
    a, b = tensors["A"], tensors["B"]
    if is_stack(host):
        a, b = (b.mT, a.mT) if is_flipped(host) else (a, b)
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    magnitude = {"lora_magnitude_vector": tensors["magnitude"].flatten()} if "magnitude" in tensors else {}
    if op_of(host).looks_up:
        return {"lora_embedding_A": a, "lora_embedding_B": b, **magnitude}
    if not is_conv(host):
        return {"lora_A.weight": a, "lora_B.weight": b, **magnitude}
    ones = (1,) * len(host.kernel_size)
    return {
        "lora_A.weight": _spread(host, a).view(-1, host.in_channels, *host.kernel_size),
        "lora_B.weight": b.reshape(*b.shape, *ones),
        **{key: value.view(1, -1, *ones) for key, value in magnitude.items()},
    }


def _spread(host: Any, a: Tensor) -> Tensor:
    """A for all input channels: one block for each group, zero at the channels of the others."""
    if host.groups == 1:
        return a
    spread = a.new_zeros(host.groups, a.shape[0], host.groups, a.shape[1])
    for j in range(host.groups):
        spread[j, :, j] = a
    return spread.flatten(0, 1)


def file_rank(host: Any, rank: int) -> int:
    """The rank that the file shows for an adapter of this rank."""
    return rank * host.groups if is_conv(host) else rank
