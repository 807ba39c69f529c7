"""Diffusers' layout: what its pipelines' `save_lora_weights` writes and `load_lora_weights` reads.

    unet.<module>.lora_A.weight                          as in PEFT; written
    unet.<module>.lora.down.weight                       as older versions write UNets
    text_encoder.<module>.lora_linear_layer.down.weight  as they write text encoders
    unet.<...>.attn1.processor.to_q_lora.down.weight     older still, also without `unet.`
    <any of these>.alpha                                 alpha of one layer

What rank and alpha are stands in the file's metadata since 0.34 (`lora_adapter_metadata`, PEFT's config under each
part's name); a file without it, and without alphas, has a scale of 1. There is no LoHa in diffusers and no LoKr for its
text encoders; LoKr is for transformers, and for a UNet's own `load_lora_adapter`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from veneer.ckpt.kohya import LEAVES as KOHYA_LEAVES
from veneer.ckpt.layers import ADAPTER_WORDS, LAYOUTS, Layer, Piece, Shared, alphas_by_words, config_for
from veneer.ckpt.tensorfile import TensorFile
from veneer.ckpt.unets import PARTS, TEXTS, Shapes, canonical
from veneer.errors import CheckpointError

__all__ = ["Diffusers"]

ENDS = {
    ".lora_A.weight": "lora_A.weight",
    ".lora_B.weight": "lora_B.weight",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
    ".lora.down.weight": "lora_A.weight",
    ".lora.up.weight": "lora_B.weight",
    ".lora_linear_layer.down.weight": "lora_A.weight",
    ".lora_linear_layer.up.weight": "lora_B.weight",
    "_lora.down.weight": "lora_A.weight",
    "_lora.up.weight": "lora_B.weight",
    ".alpha": "alpha",
    **{f".{leaf}": leaf for leaf in KOHYA_LEAVES if leaf.startswith(("hada", "lokr"))},
}
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
END = re.compile("|".join(re.escape(end) for end in sorted(ENDS, key=len, reverse=True)))


class Diffusers:
    def recognises(self, keys: Collection[str]) -> int:
        return sum(_piece(key) is not None for key in keys)

    def pieces(self, file: TensorFile, known: Mapping[str, Shapes]) -> Mapping[str, Sequence[Piece]]:
        found = {stored.name: _piece(stored.name) for stored in file}
        return {name: () if piece is None else (piece,) for name, piece in found.items()}

    def alphas(self, file: TensorFile) -> Callable[[str, str, Layer], float | None]:
        words: dict[str, dict[str, Any]] = {}
        for key, value in _words(file).items():
            part, _, word = key.partition(".")
            words.setdefault(part, {})[word] = value
        rules = {part: alphas_by_words(own) for part, own in words.items()}

        def told(part: str, module: str, layer: Layer) -> float | None:
            return rules[part](module) if part in rules else None

        return told

    def write(self, shared: Shared, known: Mapping[str, Shapes]) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors: dict[str, Tensor] = {}
        words: dict[str, Any] = {}
        for part, layers in shared.parts.items():
            _refuse(part, layers)
            own = {module.removeprefix("text_model."): layer for module, layer in layers.items()}
            words |= {f"{part}.{key}": value for key, value in _config(part, own).items()}
            for module, layer in layers.items():
                tensors |= {f"{part}.{module}.{leaf}": value for leaf, value in layer.tensors.items()}
        return tensors, {ADAPTER_WORDS: json.dumps(words, sort_keys=True)}


def _piece(key: str) -> Piece | None:
    """What a key is, whichever version wrote it.

    >>> _piece("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight")[:3]
    ('unet', 'mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0', 'lora_B.weight')
    >>> _piece("text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight").module
    'text_model.encoder.layers.0.self_attn.q_proj'
    """
    end = END.search(key)
    if end is None or end.end() != len(key):
        return None
    part, _, module = key[: end.start()].partition(".")
    if part not in PARTS:
        if not part.endswith(("_blocks", "_block")):
            return None
        part, module = "unet", key[: end.start()]
    module = module.replace(".processor.", ".")
    if end[0].startswith("_lora"):
        owner, _, last = module.rpartition(".")
        module = f"{owner}.{OLD_TEXT.get(last, last)}" if part in TEXTS else module
        module += ".0" if module.endswith(".to_out") else ""
    return Piece(part, canonical(part, module), ENDS[end[0]])


def _words(file: TensorFile) -> Mapping[str, Any]:
    try:
        found = json.loads(file.metadata.get(ADAPTER_WORDS) or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        what = f"The file's {ADAPTER_WORDS} is damaged, so its ranks and alphas are unknown."
        raise CheckpointError(what, str(file.path), "save it again")
    return found


def _config(part: str, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """PEFT's config without what diffusers passes on to no one."""
    config = config_for(part, layers)
    config["target_modules"] = sorted(layers)
    return {key: value for key, value in config.items() if key not in ("peft_type", "task_type", "inference_mode")}


def _refuse(part: str, layers: Mapping[str, Layer]) -> None:
    for kind in {layer.kind for layer in layers.values()}:
        if kind == "LOHA" or (kind == "LOKR" and part in TEXTS):
            fix = "write it as kohya or peft, or make a LoRA of it first: veneer.convert(model, ...)"
            raise CheckpointError(f"diffusers reads no {kind} for {part}.", None, fix)


LAYOUTS["diffusers"] = Diffusers()
