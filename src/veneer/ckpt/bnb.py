"""A packed model as bitsandbytes' own files, for engines and scripts that load those: the way back from `adopt`.

    nf4     NAME.weight (n / 2, 1) bytes       NAME.weight.absmax, .quant_map, .nested_absmax, .nested_quant_map
            NAME.weight.quant_state.bitsandbytes__nf4: the JSON of what is no tensor, as bytes
    int8    NAME.weight (out, in)              NAME.SCB: the largest size in each row; NAME.weight_format: 0, row by row

Nothing is rounded again. What bitsandbytes cannot hold (fp8, embeddings, convolutions, layers packed in several ways)
is an error before anything is written. bitsandbytes itself is not needed to write.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.ckpt.atomic import atomic_folder
from veneer.core.model import adapters
from veneer.core.op import LinearOp, TransposedLinearOp, op_for, op_of
from veneer.errors import CheckpointError, StateError
from veneer.quant.layer import Packed
from veneer.quant.model import packed_stacks
from veneer.quant.nf4 import NESTED_BLOCK, dynamic_values, quantiles
from veneer.quant.storage import Recipe

__all__ = ["save_bitsandbytes"]

LINEAR = (LinearOp, TransposedLinearOp)


def save_bitsandbytes(model: nn.Module, folder: str | os.PathLike[str], **options: Any) -> Path:
    """Write `model`, from transformers and packed as nf4 or int8, into a folder that transformers loads with
    bitsandbytes. `options` go to `save_pretrained`. Adapters are files of their own: `veneer.save`, then `detach`."""
    packed = {name: m for name, m in model.named_modules() if isinstance(m, Packed)}
    recipe = _checked(model, packed)
    parts = {f"{name}.{key}": t for name, layer in packed.items() for key, t in _tensors(layer)}
    held = model.state_dict()
    ours = {f"{name}.{part}" for name, layer in packed.items() for part in ("weight", *_buffers(layer))}
    state = {key: t for key, t in held.items() if key not in ours} | parts
    left = [n for n, m in model.named_modules() if n not in packed and isinstance(op_for(type(m)), LINEAR)]
    with atomic_folder(Path(folder)) as empty, _told(model, _configuration(recipe, packed, left)):
        model.save_pretrained(empty, state_dict=state, **options)  # type: ignore[operator]
    return Path(folder)


def _checked(model: nn.Module, packed: dict[str, Packed]) -> Recipe:
    if not hasattr(model, "save_pretrained"):
        raise StateError(
            f"{type(model).__name__} is no model of transformers", fix="save its state_dict() with safetensors"
        )
    if adapters(model):
        raise StateError("adapters lie on the model", fix="veneer.save(model, ...), then veneer.detach(model) first")
    if not packed:
        raise StateError("no layer of this model is packed by veneer", fix='veneer.quantize(model, "nf4") first')
    recipes = {layer.recipe._replace(dynamic=True, outliers=None) for layer in packed.values()}
    problems = [
        f"{n}: {type(m).__name__} is no linear layer" for n, m in packed.items() if type(op_of(m)) not in LINEAR
    ]
    problems += [f"{name}: a stack of matrices in one parameter" for *_, name in packed_stacks(model)]
    problems += [f"layers are stored as {kind}, which bitsandbytes does not know" for kind in _unknown(recipes)]
    if any(layer.recipe.kind == "int8" and layer.recipe.rotate for layer in packed.values()):
        problems.append('its int8 weights are not rotated; veneer.quantize(model, "int8", rotate=False)')
    if len(recipes) > 1:
        problems.append("layers are packed in several ways, and its files hold one")
    if problems:
        fix = "pack linear layers alone, in one way, as nf4 or int8; or model.save_pretrained, which veneer loads"
        raise CheckpointError("bitsandbytes' files cannot hold this model", fix=fix, problems=problems)
    return recipes.pop()


def _unknown(recipes: set[Recipe]) -> set[str]:
    return {recipe.kind for recipe in recipes} - {"nf4", "int8"}


def _buffers(layer: Packed) -> Iterator[str]:
    return (name for name in layer._buffers if name.startswith("weight_"))


def _tensors(layer: Packed) -> Iterator[tuple[str, Tensor]]:
    """What bitsandbytes keeps for this layer, under its names."""
    codes, scales, *nested = (part.detach() for part in layer.parts)
    if layer.recipe.kind == "int8":
        yield from (("weight", codes), ("SCB", scales * 127))
        yield "weight_format", torch.tensor(0, dtype=torch.uint8)
        return
    told: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": layer.recipe.block,
        "dtype": str(layer.weight_dtype).removeprefix("torch."),
        "shape": list(layer.matrix_shape),
    }
    yield from (("weight", codes.reshape(-1, 1)), ("weight.absmax", scales))
    yield "weight.quant_map", quantiles(codes.device).clone()
    if nested:
        absmax, offset = nested
        yield "weight.nested_absmax", absmax
        yield "weight.nested_quant_map", dynamic_values(codes.device).clone()
        told |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(offset)}
    text = torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)
    yield "weight.quant_state.bitsandbytes__nf4", text


def _configuration(recipe: Recipe, packed: dict[str, Packed], left: list[str]) -> dict[str, Any]:
    """What transformers' BitsAndBytesConfig reads from config.json."""
    layer = next(iter(packed.values()))
    told = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": left}
    if recipe.kind == "int8":
        threshold = layer.recipe.outliers or 0.0
        return told | {"load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": threshold}
    return told | {
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": recipe.double,
        "bnb_4bit_compute_dtype": str(layer.compute_dtype or layer.weight_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }


@contextmanager
def _told(model: Any, configuration: dict[str, Any]) -> Iterator[None]:
    """config.json says so for as long as it is written."""
    before, quantizer = vars(model.config).get("quantization_config"), vars(model).pop("hf_quantizer", None)
    model.config.quantization_config = configuration
    try:
        yield
    finally:
        model.config.quantization_config = before
        if before is None:
            del model.config.quantization_config
        if quantizer is not None:
            model.hf_quantizer = quantizer
