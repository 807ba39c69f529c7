"""Kohya's layout: what sd-scripts, LyCORIS and OneTrainer write, and what most web UIs read.

    lora_unet_<module>.lora_down.weight     A (r, in), for convolutions (r, in, *k)
    lora_unet_<module>.lora_up.weight       B (out, r), for convolutions (out, r, 1, 1)
    lora_unet_<module>.alpha                one number; the scale is alpha / r, and 1 where there is none
    lora_unet_<module>.lora_mid.weight      (r, r, *k) between the two, which are then 1 x 1 (read, never written)
    lora_unet_<module>.dora_scale           DoRA's magnitude, (out, 1, ...)
    lora_unet_<module>.hada_*, lokr_*       LoHa and LoKr, in PEFT's shapes (which came from here)

<module> is the module's name with underscores for dots (unets.py); for FLUX and SD 3 it is the name that the layer was
released under, which may be one layer of several of our modules (dits.py). `dora_scale` is also written as (1, in), a
magnitude of the inputs' columns, in which case it is another method, and refused as unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.ckpt.dits import CUT, Share, joined, released_names
from veneer.ckpt.layers import LAYOUTS, Layer, Piece, Shared
from veneer.ckpt.tensorfile import TensorFile
from veneer.ckpt.unets import KOHYA, Shapes, canonical, spellings
from veneer.errors import CheckpointError

__all__ = ["Kohya"]

LEAVES = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "lora_mid.weight": "lora_mid.weight",
    "dora_scale": "lora_magnitude_vector",
    "alpha": "alpha",
    **{leaf: leaf for leaf in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{leaf: leaf for leaf in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}
WRITTEN = {theirs: ours for ours, theirs in LEAVES.items()}
PREFIXES = tuple(f"{prefix}_" for prefixes in KOHYA.values() for prefix in prefixes)


class Kohya:
    def recognises(self, keys: Collection[str]) -> int:
        return sum(key.startswith(PREFIXES) for key in keys)

    def pieces(self, file: TensorFile, known: Mapping[str, Shapes]) -> Mapping[str, Sequence[Piece]]:
        table: dict[str, tuple[Place, ...]] = {}
        for part, modules in known.items():
            for spelled, module in spellings(part, modules, known)[0].items():
                table.setdefault(spelled, (Place(part, canonical(part, module)),))
            for spelled, shares in _released(part, modules).items():
                table[spelled] = tuple(Place(part, share.module, share) for share in shares)
        return {stored.name: _pieces(stored.name, stored.shape, table) for stored in file}

    def alphas(self, file: TensorFile) -> Callable[[str, str, Layer], float | None]:
        return lambda part, module, layer: None

    def write(self, shared: Shared, known: Mapping[str, Shapes]) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors: dict[str, Tensor] = {}
        for part, layers in shared.parts.items():
            modules: Shapes = known[part] if part in known else dict.fromkeys(layers)
            names = spellings(part, modules, {*known, *shared.parts})[1]
            released = _released(part, modules)
            if released:  # a model that has such names goes by them alone
                names = {}
            named = {names[module]: layer for module, layer in layers.items() if module in names}
            done = set(layers) & set(names)
            for spelled, shares in released.items():
                if own := {share.module for share in shares} & layers.keys():
                    named[spelled] = joined(spelled, shares, layers)
                    done |= own
            if lost := [module for module in layers if module not in done]:
                fix = "name the model that the adapter is for (--base)"
                raise CheckpointError(f"The model of {part} has no such layers.", None, fix, lost)
            for spelled, layer in named.items():
                tensors |= {f"{spelled}.{leaf}": value for leaf, value in _written(layer).items()}
        return tensors, {}


class Place(NamedTuple):
    """Where a name of a file leads: a module, and its share of the layer if that is more than one module's."""

    part: str
    module: str
    share: Share | None = None


def _released(part: str, modules: Shapes) -> dict[str, tuple[Share, ...]]:
    if part != "transformer":
        return {}
    return {f"lora_unet_{name.replace('.', '_')}": shares for name, shares in released_names(modules).items()}


def _pieces(key: str, shape: tuple[int, ...], table: Mapping[str, tuple[Place, ...]]) -> tuple[Piece, ...]:
    spelled, _, theirs = key.partition(".")
    leaf, places = LEAVES.get(theirs), table.get(spelled, ())
    if leaf is None:
        return ()
    if leaf == "lora_magnitude_vector" and torch.Size(shape).numel() != shape[0]:
        return ()  # of columns
    several = len(places) > 1
    if several and leaf.startswith("lokr"):
        return ()  # a Kronecker product has no rows of its own for each module
    return tuple(Piece(p.part, p.module, leaf, _cut(p, leaf, shape), spelled if several else "") for p in places)


def _cut(place: Place, leaf: str, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor] | None:
    """The module's rows; all of them where the file is for another width, which is then said of the module."""
    share = place.share
    return share.take if share is not None and leaf in CUT and share.width == shape[0] else None


def _written(layer: Layer) -> dict[str, Tensor]:
    found = {WRITTEN[leaf]: value for leaf, value in layer.tensors.items()}
    if "dora_scale" in found:
        ones = layer.tensors["lora_A.weight"].ndim - 1
        found["dora_scale"] = found["dora_scale"].reshape(-1, *[1] * ones)
    alpha = layer.rank if layer.alpha is None else layer.alpha
    return {**found, "alpha": torch.tensor(float(alpha), dtype=torch.float32)}


LAYOUTS["kohya"] = Kohya()
