"""What the layers of a diffusion model are called: by diffusers, by kohya's trainers, and in the first UNet of SDXL.

    diffusers, and so our modules     down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q
    the same in kohya's files         lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q
    SDXL in kohya's files             lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q

Dots became underscores, and names hold underscores of their own, so no rule leads back. What does is a table: every
module of the model under the name that it would have, which `spellings` refuses to build if two modules shared one.

Kohya's SDXL trainer has the blocks of the original release: one running number over a path's resnets and samplers, and
in each of these a resnet (0), an attention (1) and, in the outputs, an upsampler (last). `original_names` counts the
blocks of the model itself, so that it holds for any depth.

Without a model at hand the widely used shapes serve (`known_model`); they are built from their configs by diffusers,
without memory for a single weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.core.registry import near
from veneer.errors import CheckpointError, ConfigError
from veneer.extras import need

__all__ = [
    "DENOISERS",
    "KNOWN",
    "PARTS",
    "TEXTS",
    "Shapes",
    "canonical",
    "known_clip",
    "known_model",
    "original_names",
    "shapes_of",
    "spellings",
]

Shapes = Mapping[str, tuple[int, ...] | None]
"""The modules of a model and the shapes of their weights, None where there is none or nobody knows."""

DENOISERS = ("unet", "transformer")
TEXTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PARTS = (*DENOISERS, "transformer_2", *TEXTS)

KOHYA = {
    "unet": ("lora_unet",),
    "transformer": ("lora_transformer", "lora_unet"),
    "transformer_2": ("lora_transformer_2",),
    "text_encoder": ("lora_te1", "lora_te"),
    "text_encoder_2": ("lora_te2",),
    "text_encoder_3": ("lora_te3",),
}
"""What kohya's files call the parts of a pipeline; the first is what is written (but see `spellings`)."""


def canonical(part: str, module: str) -> str:
    """The module's name as files have it: transformers once kept CLIP's encoder in `text_model`, and files still do.

    >>> canonical("text_encoder", "encoder.layers.0.mlp.fc1")
    'text_model.encoder.layers.0.mlp.fc1'
    """
    return f"text_model.{module}" if part in TEXTS and module.startswith("encoder.layers.") else module


# ---------------------------------------------------------------- names in kohya's files


def spellings(
    part: str, modules: Collection[str], parts: Collection[str] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    """(every name that a file may have for a module -> the module, the module -> the name that is written).

    parts: all that the pipeline has; one with a single text encoder calls it `te`, others number theirs.
    """
    read: dict[str, str] = {}
    prefixes = KOHYA[part]
    if part == "text_encoder_2" and any("SelfAttention" in module for module in modules):
        prefixes = (*KOHYA["text_encoder_3"], *prefixes)  # FLUX has T5 second, and files number it as SD 3 does
    first = (
        "lora_te" if part == "text_encoder" and not {"text_encoder_2", "text_encoder_3"} & set(parts) else prefixes[0]
    )
    original = original_names(modules) if part == "unet" and "add_embedding.linear_1" in modules else {}
    written: dict[str, str] = {}
    for module in modules:
        names = [canonical(part, module), *([module] if canonical(part, module) != module else [])]
        if module in original:
            names.insert(0, original[module])
        flat = [name.replace(".", "_") for name in names]
        written[module] = f"{first}_{flat[0]}"
        for name in (f"{prefix}_{word}" for prefix in prefixes for word in flat):
            if read.setdefault(name, module) != module:
                what = f"In kohya's layout {module} and {read[name]} would both be called {name}."
                raise CheckpointError(what, part, "write the layout of diffusers or PEFT")
    return read, written


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
BLOCK = re.compile(
    r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)"
)


def original_names(modules: Collection[str]) -> dict[str, str]:
    """diffusers' name -> the name in the UNet as it was first released, for the modules that had one there."""
    places = _places(modules)
    found = {}
    for module in modules:
        match = BLOCK.match(module)
        if match is None:
            found |= {module: ENDS[module]} if module in ENDS else {}
            continue
        rest = module[match.end() :].removeprefix(".")
        kind = match[3]
        if kind == "resnets":
            rest = RESNET.get(rest, rest)
        elif kind == "downsamplers":
            rest = "op" if rest == "conv" else rest
        found[module] = ".".join(filter(None, (places[match[0]], rest)))
    return found


def _places(modules: Collection[str]) -> dict[str, str]:
    """Where each resnet, attention and sampler stood: `down_blocks.1.attentions.0` -> `input_blocks.4.1`."""
    held: dict[tuple[str, int], dict[str, set[int]]] = {}
    for match in filter(None, map(BLOCK.match, modules)):
        block = held.setdefault((match[1], int(match[2] or 0)), {})
        block.setdefault(match[3], set()).add(int(match[4]))
    places, down, up = {}, 1, 0
    for (path, i), kinds in sorted(held.items()):
        count = {kind: len(numbers) for kind, numbers in kinds.items()}
        for kind, numbers in kinds.items():
            name = path if path == "mid_block" else f"{path}.{i}"
            for j in numbers:
                if path == "mid_block":
                    place = f"middle_block.{2 * j if kind == 'resnets' else 1}"
                elif path == "down_blocks":
                    own = 0 if kind != "attentions" else 1
                    place = f"input_blocks.{down + (count['resnets'] if kind == 'downsamplers' else j)}.{own}"
                elif kind == "upsamplers":
                    place = f"output_blocks.{up + count['resnets'] - 1}.{2 if 'attentions' in count else 1}"
                else:
                    place = f"output_blocks.{up + j}.{int(kind == 'attentions')}"
                places[f"{name}.{kind}.{j}"] = place
        down += (count["resnets"] + ("downsamplers" in count)) if path == "down_blocks" else 0
        up += count["resnets"] if path == "up_blocks" else 0
    return places


# ---------------------------------------------------------------- models that everybody has

SD1: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD2: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SDXL: dict[str, Any] = {
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FLUX: dict[str, Any] = {"guidance_embeds": True}
SD3: dict[str, Any] = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
SD35_MEDIUM: dict[str, Any] = SD3 | {"dual_attention_layers": list(range(13)), "qk_norm": "rms_norm"}
SD35_LARGE: dict[str, Any] = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
KNOWN: dict[str, dict[str, Any]] = {
    "sd1": SD1,
    "sd2": SD2,
    "sdxl": SDXL,
    "flux": FLUX,
    "sd3": SD3,
    "sd3.5-medium": SD35_MEDIUM,
    "sd3.5-large": SD35_LARGE,
}


def known_model(word: str) -> dict[str, Shapes]:
    """The parts of a pipeline and their modules: one of KNOWN, or the folder of a pipeline or of one of its models."""
    folder = Path(word).expanduser()
    if word in KNOWN:
        if word == "flux":
            clip, t5 = known_clip(numbered=True)["text_encoder"], dict.fromkeys(_t5())
            shapes = _shapes("FluxTransformer2DModel", json.dumps(FLUX))
            return {"transformer": shapes, "text_encoder": clip, "text_encoder_2": t5}
        if word.startswith("sd3"):
            shapes = _shapes("SD3Transformer2DModel", json.dumps(KNOWN[word] | {"joint_attention_dim": 4096}))
            return {"transformer": shapes, **known_clip(numbered=True)}
        return {"unet": _shapes("UNet2DConditionModel", json.dumps(KNOWN[word])), **known_clip(numbered=word == "sdxl")}
    if not folder.is_dir():
        fix = f"one of {', '.join(KNOWN)}, or the folder of a pipeline"
        raise ConfigError(f"no model {word!r}.{near(word, KNOWN)}", "base", fix)
    found: dict[str, Shapes] = {}
    for part, file in ((p, folder / p / "config.json") for p in PARTS):
        if file.is_file() and part not in TEXTS:
            found[part] = _of_config(file)
    if not found and (folder / "config.json").is_file():
        shapes = _of_config(folder / "config.json")
        found["unet" if any(name.startswith("down_blocks.") for name in shapes) else "transformer"] = shapes
    if not found:
        fix = "name the folder of a diffusers pipeline, or of its unet or transformer"
        raise CheckpointError("There is no config.json of a UNet or transformer.", str(folder), fix)
    texts = known_clip(numbered=(folder / "text_encoder_2").is_dir())
    if any(name.startswith("single_transformer_blocks.") for name in found.get("transformer", ())):
        texts = {"text_encoder": texts["text_encoder"], "text_encoder_2": dict.fromkeys(_t5())}
    return found | texts


def _of_config(file: Path) -> Shapes:
    config = json.loads(file.read_text(encoding="utf-8"))
    return _shapes(config.get("_class_name", "UNet2DConditionModel"), json.dumps(config))


@cache
def _shapes(kind: str, config: str) -> Shapes:
    diffusers = need("diffusers", extra="diffusion", use="know what this model's layers are called")
    with torch.device("meta"):
        model = getattr(diffusers, kind).from_config(json.loads(config))
    return shapes_of(model)


def shapes_of(model: nn.Module) -> Shapes:
    """Every module of a model with its weight's shape."""
    found: dict[str, tuple[int, ...] | None] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        found[name] = tuple(weight.shape) if weight is not None else None
    found.pop("", None)
    return found


def known_clip(numbered: bool) -> dict[str, Shapes]:
    """Text encoders by the grammar of their names, at any width: CLIP's, and T5's for a third."""
    layers = [f"text_model.encoder.layers.{i}" for i in range(48)]
    leaves = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    clip: Shapes = dict.fromkeys([f"{layer}.{leaf}" for layer in layers for leaf in leaves] + ["text_projection"])
    if not numbered:
        return {"text_encoder": clip}
    return {"text_encoder": clip, "text_encoder_2": clip, "text_encoder_3": dict.fromkeys(_t5())}


def _t5() -> Iterator[str]:
    for block in range(24):
        yield from (f"encoder.block.{block}.layer.0.SelfAttention.{leaf}" for leaf in "qkvo")
        yield from (f"encoder.block.{block}.layer.1.DenseReluDense.{leaf}" for leaf in ("wi", "wi_0", "wi_1", "wo"))
