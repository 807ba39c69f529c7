"""Kohya's layout: what sd-scripts, LyCORIS and OneTrainer write, and what most web UIs read.

    lora_unet_<module>.lora_down.weight     A (r, in), for convolutions (r, in, *k)
    lora_unet_<module>.lora_up.weight       B (out, r), for convolutions (out, r, 1, 1)
    lora_unet_<module>.alpha                one number; the scale is alpha / r, and 1 where there is none
    lora_unet_<module>.lora_mid.weight      (r, r, *k) between the two, which are then 1 x 1 (read, never written)
    lora_unet_<module>.dora_scale           DoRA's magnitude, (out, 1, ...)
    lora_unet_<module>.hada_*, lokr_*       LoHa and LoKr, in PEFT's shapes (which came from here)

<module> is the module's name with underscores for dots (unets.py). `dora_scale` is also written as (1, in), a magnitude
of the inputs' columns, in which case it is another method, and refused as unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

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

    def pieces(self, file: TensorFile, known: Mapping[str, Shapes]) -> Mapping[str, Piece | None]:
        table: dict[str, tuple[str, str]] = {}
        for part, modules in known.items():
            for spelled, module in spellings(part, modules, known)[0].items():
                table.setdefault(spelled, (part, canonical(part, module)))
        return {stored.name: _piece(stored.name, stored.shape, table) for stored in file}

    def alphas(self, file: TensorFile) -> Callable[[str, str, Layer], float | None]:
        return lambda part, module, layer: None

    def write(self, shared: Shared, known: Mapping[str, Shapes]) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors: dict[str, Tensor] = {}
        for part, layers in shared.parts.items():
            names = spellings(part, known.get(part, layers), {*known, *shared.parts})[1]
            lost = [module for module in layers if module not in names]
            if lost:
                fix = "name the model that the adapter is for (--base)"
                raise CheckpointError(f"The model of {part} has no such layers.", None, fix, lost)
            for module, layer in layers.items():
                tensors |= {f"{names[module]}.{leaf}": value for leaf, value in _written(layer).items()}
        return tensors, {}


def _piece(key: str, shape: tuple[int, ...], table: Mapping[str, tuple[str, str]]) -> Piece | None:
    spelled, _, theirs = key.partition(".")
    leaf, place = LEAVES.get(theirs), table.get(spelled)
    if leaf is None or place is None:
        return None
    if leaf == "lora_magnitude_vector" and torch.Size(shape).numel() != shape[0]:
        return None  # of columns
    return Piece(*place, leaf)


def _written(layer: Layer) -> dict[str, Tensor]:
    found = {WRITTEN[leaf]: value for leaf, value in layer.tensors.items()}
    if "dora_scale" in found:
        ones = layer.tensors["lora_A.weight"].ndim - 1
        found["dora_scale"] = found["dora_scale"].reshape(-1, *[1] * ones)
    alpha = layer.rank if layer.alpha is None else layer.alpha
    return {**found, "alpha": torch.tensor(float(alpha), dtype=torch.float32)}


LAYOUTS["kohya"] = Kohya()
