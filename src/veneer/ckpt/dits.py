"""What FLUX and Stable Diffusion 3 were called when they were released, which kohya's trainers still call them.

    released, and so in kohya's files     diffusers, and so our modules
    double_blocks.3.img_attn.qkv          transformer_blocks.3.attn.to_q, to_k, to_v: one after the other in its rows
    single_blocks.3.linear1               single_transformer_blocks.3.attn.to_q, to_k, to_v, proj_mlp
    joint_blocks.3.context_block.mlp.fc1  transformer_blocks.3.ff_context.net.0.proj
    final_layer.adaLN_modulation.1        norm_out.linear, with shift and scale the other way round

Each module has rows of a released layer, `Share`. Reading gives every module the whole of A and its own rows of B;
where a file was joined from separate adapters, the columns of B that these rows never use are dropped again, so that
what was written comes back. Writing puts the A of all modules one under the other, and each B in its rows and columns;
modules that still have the one A that they were read with are written with one again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.ckpt.layers import Layer
from veneer.ckpt.unets import Shapes
from veneer.errors import CheckpointError

__all__ = ["CUT", "Share", "joined", "released_names", "without_idle"]

CUT = ("lora_B.weight", "lora_magnitude_vector", "hada_w1_a", "hada_w2_a")  # tensors with a row for each output


class Share(NamedTuple):
    """The rows of a released layer that are a module's, in the module's own order."""

    module: str
    spans: tuple[tuple[int, int], ...]
    width: int  # the rows of the released layer

    def take(self, value: Tensor) -> Tensor:
        return torch.cat([value[i:j] for i, j in self.spans])

    def put(self, whole: Tensor, value: Tensor) -> None:
        at = 0
        for i, j in self.spans:
            whole[i:j] = value[at : at + j - i]
            at += j - i


ATTENTION = ("to_q", "to_k", "to_v")
FLUX = {
    "double_blocks.{i}.img_attn.qkv": [f"transformer_blocks.{{i}}.attn.{name}" for name in ATTENTION],
    "double_blocks.{i}.txt_attn.qkv": [f"transformer_blocks.{{i}}.attn.add_{name}_proj" for name in "qkv"],
    "double_blocks.{i}.img_attn.proj": ["transformer_blocks.{i}.attn.to_out.0"],
    "double_blocks.{i}.txt_attn.proj": ["transformer_blocks.{i}.attn.to_add_out"],
    "double_blocks.{i}.img_mlp.0": ["transformer_blocks.{i}.ff.net.0.proj"],
    "double_blocks.{i}.img_mlp.2": ["transformer_blocks.{i}.ff.net.2"],
    "double_blocks.{i}.txt_mlp.0": ["transformer_blocks.{i}.ff_context.net.0.proj"],
    "double_blocks.{i}.txt_mlp.2": ["transformer_blocks.{i}.ff_context.net.2"],
    "double_blocks.{i}.img_mod.lin": ["transformer_blocks.{i}.norm1.linear"],
    "double_blocks.{i}.txt_mod.lin": ["transformer_blocks.{i}.norm1_context.linear"],
    "single_blocks.{i}.linear1": [
        *(f"single_transformer_blocks.{{i}}.attn.{name}" for name in ATTENTION),
        "single_transformer_blocks.{i}.proj_mlp",
    ],
    "single_blocks.{i}.linear2": ["single_transformer_blocks.{i}.proj_out"],
    "single_blocks.{i}.modulation.lin": ["single_transformer_blocks.{i}.norm.linear"],
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    **{
        f"{theirs}_in.{side}_layer": [f"time_text_embed.{ours}_embedder.linear_{n}"]
        for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for side, n in (("in", 1), ("out", 2))
    },
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
SD3 = {
    **{
        f"joint_blocks.{{i}}.x_block.{attention}.qkv": [f"transformer_blocks.{{i}}.{attention}.{n}" for n in ATTENTION]
        for attention in ("attn", "attn2")
    },
    "joint_blocks.{i}.context_block.attn.qkv": [f"transformer_blocks.{{i}}.attn.add_{name}_proj" for name in "qkv"],
    "joint_blocks.{i}.x_block.attn.proj": ["transformer_blocks.{i}.attn.to_out.0"],
    "joint_blocks.{i}.x_block.attn2.proj": ["transformer_blocks.{i}.attn2.to_out.0"],
    "joint_blocks.{i}.context_block.attn.proj": ["transformer_blocks.{i}.attn.to_add_out"],
    "joint_blocks.{i}.x_block.mlp.fc1": ["transformer_blocks.{i}.ff.net.0.proj"],
    "joint_blocks.{i}.x_block.mlp.fc2": ["transformer_blocks.{i}.ff.net.2"],
    "joint_blocks.{i}.context_block.mlp.fc1": ["transformer_blocks.{i}.ff_context.net.0.proj"],
    "joint_blocks.{i}.context_block.mlp.fc2": ["transformer_blocks.{i}.ff_context.net.2"],
    "joint_blocks.{i}.x_block.adaLN_modulation.1": ["transformer_blocks.{i}.norm1.linear"],
    "joint_blocks.{i}.context_block.adaLN_modulation.1": ["transformer_blocks.{i}.norm1_context.linear"],
    "x_embedder.proj": ["pos_embed.proj"],
    "context_embedder": ["context_embedder"],
    **{
        f"{theirs}_embedder.mlp.{place}": [f"time_text_embed.{ours}_embedder.linear_{n}"]
        for theirs, ours in (("t", "timestep"), ("y", "text"))
        for place, n in ((0, 1), (2, 2))
    },
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
NUMBERED = re.compile(r"(?:single_)?transformer_blocks\.(\d+)\.")


def released_names(modules: Shapes) -> dict[str, tuple[Share, ...]]:
    """The released layers of a model, and what of each is whose; empty for models that were not released so.

    >>> shapes = dict.fromkeys((f"transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "to_v")), (4, 4))
    >>> names = released_names(shapes | {"pos_embed.proj": (4, 4, 1, 1), "transformer_blocks.0.attn.add_q_proj": None})
    >>> [share.spans for share in names["joint_blocks.0.x_block.attn.qkv"]]
    [((0, 4),), ((4, 8),), ((8, 12),)]
    """
    table = _table(modules)
    found: dict[str, tuple[Share, ...]] = {}
    count = 1 + max((int(m[1]) for m in map(NUMBERED.match, modules) if m), default=-1)
    for released, templates in table.items():
        for i in range(count if "{i}" in released else 1):
            names = [template.format(i=i) for template in templates]
            if all(modules.get(name) is not None for name in names):
                turned = _is_turned(names[0], last=i == count - 1 and table is SD3)
                found[released.format(i=i)] = tuple(_shares(names, modules, turned))
    return found


def _table(modules: Shapes) -> Mapping[str, Sequence[str]]:
    if "transformer_blocks.0.attn.add_q_proj" not in modules:
        return {}
    if any(name.startswith("single_transformer_blocks.") for name in modules):
        return FLUX
    return SD3 if "pos_embed.proj" in modules else {}


def _is_turned(module: str, last: bool) -> bool:
    """The norms that diffusers gives scale before shift, where the release had shift before scale."""
    return module == "norm_out.linear" or (last and module.endswith(".norm1_context.linear"))


def _shares(names: Sequence[str], modules: Shapes, turned: bool) -> Iterator[Share]:
    rows = [(modules[name] or (0,))[0] for name in names]
    ends = list(accumulate(rows))
    for name, count, end in zip(names, rows, ends, strict=True):
        start, middle = end - count, end - count // 2
        yield Share(name, ((middle, end), (start, middle)) if turned else ((start, end),), ends[-1])


# ---------------------------------------------------------------- to and fro


def without_idle(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers that a joined one gave, without the columns that their rows never use.

    A layer with none left was not adapted when the file was written; if that holds for all, the file holds a start.
    """
    used = {module: _used(layer) for module, layer in layers.items()}
    if not any(bool(columns.any()) for columns in used.values()):
        return dict(layers)
    return {module: _narrowed(layers[module], columns) for module, columns in used.items() if columns.any()}


def _used(layer: Layer) -> Tensor:
    ups = [value for leaf, value in layer.tensors.items() if leaf in ("lora_B.weight", "hada_w1_a", "hada_w2_a")]
    return torch.stack([(up != 0).any(0) for up in ups]).any(0)


def _narrowed(layer: Layer, columns: Tensor) -> Layer:
    if columns.all():
        return layer
    downs = ("lora_A.weight", "hada_w1_b", "hada_w2_b")
    tensors: dict[str, Tensor] = {}
    for leaf, value in layer.tensors.items():
        is_up = leaf in CUT and leaf != "lora_magnitude_vector"
        tensors[leaf] = value[:, columns].contiguous() if is_up else value[columns] if leaf in downs else value
    return Layer(tensors, layer.scale * int(columns.sum()))


def joined(name: str, shares: Sequence[Share], layers: Mapping[str, Layer]) -> Layer:
    """One layer of the modules that share a released one: A under A, B beside B, zeros elsewhere."""
    held = {share: layers[share.module] for share in shares if share.module in layers}
    if len(shares) == 1:
        share, layer = next(iter(held.items()))
        return _spread(share, layer, share.spans[0][0] != 0)
    kinds = {layer.kind for layer in held.values()}
    magnitudes = sum("lora_magnitude_vector" in layer.tensors for layer in held.values())
    if kinds & {"LOKR"} or len(kinds) > 1 or magnitudes not in (0, len(shares)):
        fix = "write the layout of diffusers or PEFT, or make a LoRA of it first: veneer.convert(model, ...)"
        what = f"{name} is one layer there, and these adapters of its parts cannot be joined."
        raise CheckpointError(what, None, fix, [f"{s.module}: {layer.kind.lower()}" for s, layer in held.items()])
    return _together(shares, held, kinds.pop(), bool(magnitudes))


def _spread(share: Share, layer: Layer, turned: bool) -> Layer:
    if not turned:
        return layer
    tensors = dict(layer.tensors)
    for leaf in CUT:
        if leaf in tensors:
            whole = torch.empty_like(tensors[leaf])
            share.put(whole, tensors[leaf])
            tensors[leaf] = whole
    return Layer(tensors, layer.alpha)


def _together(shares: Sequence[Share], held: Mapping[Share, Layer], kind: str, magnitudes: bool) -> Layer:
    pairs = [("lora_A.weight", "lora_B.weight")]
    if kind == "LOHA":
        pairs = [("hada_w1_b", "hada_w1_a"), ("hada_w2_b", "hada_w2_a")]
    scales = {layer.scale for layer in held.values()}
    common = scales.pop() if len(scales) == 1 else None
    tensors: dict[str, Tensor] = {}
    alike = common is not None and len(held) == len(shares) and all(_is_one(held, down) for down, _ in pairs)
    for n, (down, up) in enumerate(pairs):
        if alike:
            tensors[down] = held[shares[0]].tensors[down]
            tensors[up] = torch.cat([held[share].tensors[up] for share in shares])
            continue
        own = [_scaled(layer.tensors[down], layer.scale if common is None and n == 0 else 1) for layer in held.values()]
        tensors[down] = torch.cat(own)
        tensors[up] = _diagonal(held, up, shares[0].width)
    if magnitudes:
        tensors["lora_magnitude_vector"] = torch.cat([held[s].tensors["lora_magnitude_vector"] for s in shares])
    layer = Layer(tensors)
    return Layer(tensors, (1.0 if common is None else common) * layer.rank)


def _is_one(held: Mapping[Share, Layer], leaf: str) -> bool:
    first, *others = (layer.tensors[leaf] for layer in held.values())
    return all(first.shape == other.shape and torch.equal(first, other) for other in others)


def _scaled(value: Tensor, scale: float) -> Tensor:
    return value if scale == 1 else (value.float() * scale).to(value.dtype)


def _diagonal(held: Mapping[Share, Layer], up: str, rows: int) -> Tensor:
    ups: dict[Share, Any] = {share: layer.tensors[up] for share, layer in held.items()}
    whole = next(iter(ups.values())).new_zeros(rows, sum(value.shape[1] for value in ups.values()))
    at = 0
    for share, value in ups.items():
        share.put(whole[:, at : at + value.shape[1]], value)
        at += value.shape[1]
    return whole
