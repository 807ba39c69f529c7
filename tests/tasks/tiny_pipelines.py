"""Pipelines of four families at toy size, made from configs: every part is diffusers' or transformers' own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["<|startoftext|>", "<|endoftext|>", "<unk>", "a", "photo", "of", "red", "green", "blue", "dot", "bar", "sks"]
LENGTH = 8
FAMILIES = ("sd", "sdxl", "sd3", "flux")


def tokenizer(kind: str = "CLIPTokenizer") -> Any:
    """One token a word."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    held = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    held.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    held.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=held, bos_token=WORDS[0], eos_token=WORDS[1], unk_token="<unk>", pad_token=WORDS[1],
        model_max_length=LENGTH,
    )  # fmt: skip


def clip(*, projects: bool = False, width: int = 16) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=width,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    return kind(config).eval()


def t5(width: int = 32) -> Any:
    import transformers

    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config).eval()


def vae(channels: int = 4, **more: Any) -> Any:
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **more,
    ).eval()  # fmt: skip


def unet(**more: Any) -> Any:
    import diffusers

    common: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 4, "norm_num_groups": 4,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**common | more).eval()


def sd(**scheduler: Any) -> Any:
    import diffusers

    return diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=clip(), tokenizer=tokenizer(), unet=unet(), safety_checker=None, feature_extractor=None,
        scheduler=diffusers.DDIMScheduler(**{"clip_sample": False, "steps_offset": 1, **scheduler}),
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> Any:
    import diffusers

    denoiser = unet(
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16, use_linear_projection=True,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(), text_encoder_2=clip(projects=True), tokenizer=tokenizer(),
        tokenizer_2=tokenizer(), unet=denoiser, add_watermarker=False,
        scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1),
    )  # fmt: skip


def sd3() -> Any:
    import diffusers

    denoiser = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=denoiser, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06, scaling_factor=1.5), text_encoder=clip(projects=True),
        text_encoder_2=clip(projects=True), text_encoder_3=t5(), tokenizer=tokenizer(), tokenizer_2=tokenizer(),
        tokenizer_3=tokenizer(),
    )  # fmt: skip


def flux(guided: bool = True) -> Any:
    import diffusers

    denoiser = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=guided,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=denoiser, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.06, scaling_factor=1.5), text_encoder=clip(), text_encoder_2=t5(),
        tokenizer=tokenizer(), tokenizer_2=tokenizer(),
    )  # fmt: skip


MAKERS = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def folder_of(family: str, folder: Path | None = None) -> str:
    """A pipeline's folder; weights are the same each time."""
    where = Path(folder or tempfile.mkdtemp()) / family
    if not where.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            MAKERS[family]().save_pretrained(where)
    return str(where)
