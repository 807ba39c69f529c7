"""A pipeline of diffusers: several models in one folder, and how each family of them is asked.

| family | denoiser | words | time | besides |
| --- | --- | --- | --- | --- |
| Stable Diffusion 1.x, 2.x | UNet2DConditionModel | CLIP | whole steps | |
| SDXL | the same, `addition_embed_type` text_time | two CLIPs, the second's summary | whole steps | sizes and cuts |
| Stable Diffusion 3 | SD3Transformer2DModel | two CLIPs and T5, and a summary | 0 ... 1000 | |
| FLUX | FluxTransformer2DModel | T5, and CLIP's summary | 0 ... 1 | places of 2 x 2 patches, guidance |

The words are made by the pipeline's own `encode_prompt`, and pictures by the pipeline itself, so that what is trained
is what will be asked. What this file adds is the step in between, for which a pipeline has no method.

Two models learn in one run where text encoders are trained too. They are then one module, `WithText`, whose parts bear
the names that they have in the pipeline: unet.down_blocks..., text_encoder.encoder....
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veneer.ckpt.tensorfile import TensorFile
from veneer.core.select import block_index, ends_with, places
from veneer.errors import ConfigError, UserError
from veneer.extras import need, quiet

__all__ = ["FAMILIES", "Family", "Pipeline", "WithText"]

DENOISERS = ("unet", "transformer")
Words = Mapping[str, Tensor]
Latents = Float[Tensor, "rows channels height width"]


class Family:
    """One kind of denoiser. `times` is what the model's `timestep` is, seen from 0 ... 1000."""

    name: ClassVar[str]
    learning: ClassVar[tuple[str, ...]]  # the text encoders that may learn: CLIP's; T5 is left as it is
    is_transformer: ClassVar[bool] = True
    attention: ClassVar[tuple[str, ...]] = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip
    minimal: ClassVar[tuple[str, ...]] = ("to_q", "to_v")

    def step(self, config: Mapping[str, Any], factor: int) -> int:
        """Sides of pictures are multiples of this."""
        return factor * 2

    def side(self, config: Mapping[str, Any], factor: int) -> int:
        """Of the pictures that the model was made for."""
        found = config.get("sample_size") or 128
        return (found if isinstance(found, int) else max(found)) * factor

    def words(self, pipe: Any, prompts: Sequence[str]) -> Words:
        raise NotImplementedError

    def inputs(self, model: Any, noisy: Latents, time: Tensor, words: Words, sizes: Tensor) -> dict[str, Any]:
        """What the denoiser's forward takes. `sizes`: of each picture, see `Canvas`: for those that are told."""
        raise NotImplementedError

    def answer(self, output: Any, like: Latents) -> Latents:
        """The prediction in the shape of the latents."""
        return output.sample

    def idle(self, model: nn.Module) -> tuple[str, ...]:
        """Layers whose output nobody reads."""
        return ()

    def spoken(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shapes of what text encoders say of a caption, in most pipelines of this family."""
        width, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]
        return {"text": (1, self.places_of_words, width), "pooled": (1, pooled)}

    places_of_words: ClassVar[int] = 77
    read_early: ClassVar[tuple[str, ...]] = ()  # text encoders of which nothing is read behind the last block but one


class Unet(Family):
    name, learning, is_transformer = "Stable Diffusion", ("text_encoder",), False

    def step(self, config: Mapping[str, Any], factor: int) -> int:
        return factor * 2 ** (len(config["down_block_types"]) - 1)

    def side(self, config: Mapping[str, Any], factor: int) -> int:
        found = config.get("sample_size") or 64
        return (found if isinstance(found, int) else max(found)) * factor

    def spoken(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"text": (1, self.places_of_words, config["cross_attention_dim"])}

    def words(self, pipe: Any, prompts: Sequence[str]) -> Words:
        return {"text": pipe.encode_prompt(list(prompts), pipe.unet.device, 1, False)[0]}

    def inputs(self, model: Any, noisy: Latents, time: Tensor, words: Words, sizes: Tensor) -> dict[str, Any]:
        return {"sample": noisy, "timestep": time.long(), "encoder_hidden_states": words["text"]}


class UnetXL(Unet):
    name, learning = "Stable Diffusion XL", ("text_encoder", "text_encoder_2")
    read_early = ("text_encoder",)  # of the second the whole text is read at its end

    def spoken(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return {**super().spoken(config), "pooled": (1, pooled)}

    def words(self, pipe: Any, prompts: Sequence[str]) -> Words:
        found = pipe.encode_prompt(list(prompts), device=pipe.unet.device, do_classifier_free_guidance=False)
        return {"text": found[0], "pooled": found[2]}

    def inputs(self, model: Any, noisy: Latents, time: Tensor, words: Words, sizes: Tensor) -> dict[str, Any]:
        told = {"text_embeds": words["pooled"], "time_ids": sizes.to(noisy)}
        return {**super().inputs(model, noisy, time, words, sizes), "added_cond_kwargs": told}


class Transformer3(Family):
    name, learning = "Stable Diffusion 3", ("text_encoder", "text_encoder_2")
    places_of_words = 77 + 256  # CLIP's and T5's

    def words(self, pipe: Any, prompts: Sequence[str]) -> Words:
        found = pipe.encode_prompt(
            list(prompts), None, None, device=pipe.transformer.device, do_classifier_free_guidance=False
        )
        return {"text": found[0], "pooled": found[2]}

    def inputs(self, model: Any, noisy: Latents, time: Tensor, words: Words, sizes: Tensor) -> dict[str, Any]:
        told = {"encoder_hidden_states": words["text"], "pooled_projections": words["pooled"]}
        return {"hidden_states": noisy, "timestep": time, **told}

    def idle(self, model: nn.Module) -> tuple[str, ...]:
        """The last block drops its words, so the question that they ask has no answer."""
        return (f"transformer_blocks.{len(model.transformer_blocks) - 1}.attn.add_q_proj",)  # type: ignore[arg-type]


class Flux(Family):
    name, learning = "FLUX", ("text_encoder",)
    GUIDANCE = 1.0  # of the guidance-distilled models, in training: none
    places_of_words = 512

    def side(self, config: Mapping[str, Any], factor: int) -> int:
        return 128 * factor

    def words(self, pipe: Any, prompts: Sequence[str]) -> Words:
        text, pooled, _ = pipe.encode_prompt(list(prompts), None, device=pipe.transformer.device)
        return {"text": text, "pooled": pooled}

    def inputs(self, model: Any, noisy: Latents, time: Tensor, words: Words, sizes: Tensor) -> dict[str, Any]:
        rows, channels, height, width = noisy.shape
        pipeline = need("diffusers", extra="diffusion", use="train image models").FluxPipeline
        places = pipeline._prepare_latent_image_ids(rows, height // 2, width // 2, noisy.device, noisy.dtype)
        guided = {"guidance": torch.full_like(time, self.GUIDANCE)} if model.config.guidance_embeds else {}
        return {
            "hidden_states": pipeline._pack_latents(noisy, rows, channels, height, width),
            "timestep": time / 1000,
            "encoder_hidden_states": words["text"],
            "pooled_projections": words["pooled"],
            "txt_ids": noisy.new_zeros(words["text"].shape[1], 3),
            "img_ids": places,
            **guided,
        }

    def answer(self, output: Any, like: Latents) -> Latents:
        rows, channels, height, width = like.shape
        patches = output.sample.view(rows, height // 2, width // 2, channels, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(like.shape)


FAMILIES: dict[str, type[Family]] = {
    "UNet2DConditionModel": Unet,
    "SD3Transformer2DModel": Transformer3,
    "FluxTransformer2DModel": Flux,
}


class Pipeline:
    """What a pipeline's files say, before any weight is read, and its models once they are (`load`)."""

    def __init__(self, source: Any) -> None:
        diffusers = need("diffusers", extra="diffusion", use="train image models")
        self.source = source
        self.pipe: Any = None if isinstance(source, str) else source
        with _quiet():
            kinds, configs = _of_files(diffusers, source) if self.pipe is None else _of_models(source)
        self.part = next((part for part in DENOISERS if kinds.get(part)), "")
        if kinds.get(self.part) not in FAMILIES:
            fix = f"take a pipeline whose denoiser is one of {', '.join(FAMILIES)}"
            raise ConfigError(
                f"no family here has a {kinds.get(self.part) or 'pipeline without a denoiser'}", "model", fix
            )
        self.config, vae = configs[self.part], configs["vae"]
        is_xl = self.config.get("addition_embed_type") == "text_time"
        self.family = UnetXL() if is_xl else FAMILIES[kinds[self.part]]()
        self.factor = 2 ** (len(vae["block_out_channels"]) - 1)
        self.channels, self.kind = int(vae["latent_channels"]), kinds[self.part]
        self.step = self.family.step(self.config, self.factor)
        self.side = self.family.side(self.config, self.factor)
        self.scheduler = getattr(diffusers, kinds["scheduler"]).from_config(configs["scheduler"])
        self.texts = tuple(part for part in self.family.learning if kinds.get(part))
        self._refuse_other_uses(vae)

    def _refuse_other_uses(self, vae: Mapping[str, Any]) -> None:
        """Models that paint over a part of a picture, or change one, take more channels than a picture has."""
        packed = 4 if isinstance(self.family, Flux) else 1
        wanted, held = int(vae["latent_channels"]) * packed, self.config.get("in_channels")
        if held != wanted:
            fix = "take the pipeline that makes pictures from text alone"
            raise ConfigError(f"the denoiser takes {held} channels, and a picture has {wanted}", self.part, fix)

    # ---------------------------------------------------------------- the models

    def load(self, dtype: torch.dtype, device: torch.device) -> None:
        """Read the weights, or take the models as they are, and freeze all of them."""
        diffusers = need("diffusers", extra="diffusion", use="train image models")
        with _quiet():
            if self.pipe is None:
                self.pipe = _from_pretrained(diffusers, str(self.source), dtype)
            self.pipe.to(device=device, dtype=dtype)
        self.pipe.set_progress_bar_config(disable=True)
        for model in self.models.values():
            model.requires_grad_(False).eval()

    def pretend(self, dtype: torch.dtype) -> nn.Module:
        """The denoiser without weights, on the meta device, in a pipeline that holds nothing else."""
        diffusers = need("diffusers", extra="diffusion", use="train image models")
        with torch.device("meta"), _quiet():
            model = getattr(diffusers, self.kind).from_config(self.config).to(dtype)
        self.pipe = SimpleNamespace(components={self.part: model.requires_grad_(False).eval()})
        return model

    @property
    def unsaid(self) -> Words:
        """Words of the shape that text encoders give, without meaning."""
        return {name: torch.zeros(shape, dtype=self.dtype) for name, shape in self.family.spoken(self.config).items()}

    def others(self) -> dict[str, int]:
        """Numbers in each model beside the denoiser, from the heads of their files; none where there are no files."""
        folder, found = Path(str(self.source)), {}
        for file in sorted(folder.glob("*/*.safetensors")):
            part = file.parent.name
            if part != self.part and ".fp16." not in file.name:
                found[part] = found.get(part, 0) + sum(math.prod(stored.shape) for stored in TensorFile(file))
        return found

    @property
    def models(self) -> dict[str, nn.Module]:
        return {name: model for name, model in self.pipe.components.items() if isinstance(model, nn.Module)}

    @property
    def denoiser(self) -> nn.Module:
        return self.models[self.part]

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations: norms are never packed."""
        kinds = {p.dtype for p in self.denoiser.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
        return next(iter(kinds), torch.float32)

    def rest(self, parts: Sequence[str]) -> None:
        """Models that are not needed for now wait in the CPU's memory."""
        for part in parts:
            if part in self.models:
                self.models[part].to("cpu")

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """All models where the denoiser is; afterwards where they were, and in the modes they were in."""
        before = {name: (_device_of(model), model.training) for name, model in self.models.items()}
        try:
            for model in self.models.values():
                model.to(self.device).eval()
            yield
        finally:
            for name, (device, training) in before.items():
                self.models[name].to(device).train(training)

    # ---------------------------------------------------------------- what they say

    @torch.no_grad()
    def moments(self, pixels: Float[Tensor, "channels height width"]) -> Float[Tensor, "two c h w"]:
        """Mean and deviation of a picture's latents, scaled as the denoiser has them."""
        vae: Any = self.pipe.vae
        encoded = vae.encode(pixels[None].to(self.device, vae.dtype))
        if hasattr(encoded, "latents"):  # the tiny autoencoders say one value
            mean, spread = encoded.latents, torch.zeros_like(encoded.latents)
        else:
            mean, spread = encoded.latent_dist.mean, encoded.latent_dist.std
        shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
        return torch.cat([(mean - shift) * scale, spread * scale]).float()

    def words(self, prompts: Sequence[str]) -> Words:
        with _quiet():
            return self.family.words(self.pipe, prompts)

    @torch.no_grad()
    def paint(self, prompts: Sequence[str], seeds: Sequence[int], size: tuple[int, int], **more: Any) -> list[Any]:
        """A picture for each prompt as (height, width, channels) in 0 ... 255, the same for the same seed."""
        found = []
        with self.awake(), _quiet():
            for prompt, seed in zip(prompts, seeds, strict=True):
                generator = torch.Generator("cpu").manual_seed(seed)
                made = self.pipe(prompt, width=size[0], height=size[1], generator=generator, output_type="np", **more)
                found.append((made.images[0].clip(0, 1) * 255).round().astype("uint8"))
        return found

    def prefix(self, model: nn.Module) -> str:
        """What names of the denoiser's layers begin with in the model that learns."""
        return f"{self.part}." if isinstance(model, WithText) else ""

    def idle(self, model: nn.Module) -> tuple[str, ...]:
        """Layers of the model that learns whose output nobody reads."""
        found = [self.prefix(model) + name for name in self.family.idle(self.denoiser)]
        for part in self.family.read_early if isinstance(model, WithText) else ():
            last: int = model.get_submodule(part).config.num_hidden_layers - 1  # type: ignore[assignment, operator, union-attr]
            found += [
                f"{part}.{name}"
                for name, module in model.get_submodule(part).named_modules()
                if isinstance(module, nn.Linear) and block_index(name) == last
            ]
        return tuple(found)

    def targets(self, model: nn.Module, asked: str | tuple[str, ...], convolutions: bool) -> str | tuple[str, ...]:
        """The layers to adapt, by full name where a preset is asked for: of the denoiser's attention and, where they
        learn, of the text encoders'; with `convolutions` also the UNet's (LoCon)."""
        presets = {"attention": self.family.attention, "minimal": self.family.minimal}
        is_preset = not isinstance(asked, str) or asked in (*presets, "all-linear")
        if convolutions and not is_preset:
            fix = "name them in the expression, or give targets as a preset or a list"
            raise ConfigError(f"convolutions would be added to the expression {asked!r}", "convolutions", fix)
        if not convolutions and not (isinstance(asked, str) and is_preset):
            return asked
        prefix = self.prefix(model)
        chosen = [
            name for name, layer in places(model).items()
            if _is_wanted(name, layer, asked, presets, name.startswith(prefix), convolutions)
        ]  # fmt: skip
        if not chosen:
            raise ConfigError(
                f"targets {asked!r} match no layer of the {self.part}", "targets", "choose another preset"
            )
        return tuple(chosen)


INNER = ("conv", "conv1", "conv2", "conv_shortcut", "proj_in", "proj_out")
TEXT = {"attention": ("q_proj", "k_proj", "v_proj", "out_proj"), "minimal": ("q_proj", "v_proj")}


def _is_wanted(
    name: str, layer: nn.Module, asked: str | tuple[str, ...], presets: Mapping[str, tuple[str, ...]], paints: bool,
    convolutions: bool,
) -> bool:  # fmt: skip
    if isinstance(layer, nn.Conv2d):  # those inside blocks: the first and the last are left alone, as in kohya's LoCon
        return paints and convolutions and any(ends_with(name, inner) for inner in INNER)
    if not isinstance(layer, nn.Linear):
        return False
    if asked == "all-linear":
        return True
    endings = (presets if paints else TEXT)[asked] if isinstance(asked, str) else asked
    return any(ends_with(name, ending) for ending in endings)


class WithText(nn.Module):
    """A denoiser and the text encoders that learn beside it, as one model that is asked in words."""

    def __init__(self, pipeline: Pipeline, texts: Sequence[str]) -> None:
        super().__init__()
        self.pipeline = pipeline
        for part in (pipeline.part, *texts):
            self.add_module(part, pipeline.models[part])

    def forward(self, noisy: Latents, time: Tensor, sizes: Tensor, prompts: Sequence[str]) -> Any:
        denoiser, words = self.pipeline.denoiser, self.pipeline.words(prompts)
        return denoiser(**self.pipeline.family.inputs(denoiser, noisy, time, words, sizes))

    def enable_gradient_checkpointing(self) -> None:
        self.pipeline.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]

    def disable_gradient_checkpointing(self) -> None:
        self.pipeline.denoiser.disable_gradient_checkpointing()  # type: ignore[operator]


# ---------------------------------------------------------------- files


def _of_files(diffusers: Any, where: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The classes of a pipeline's parts, and the configurations that are needed before its weights."""
    try:
        index = diffusers.DiffusionPipeline.load_config(where)
        kinds = {part: said[1] for part, said in index.items() if isinstance(said, list | tuple) and said[1]}
        parts = [part for part in (*DENOISERS, "vae", "scheduler") if kinds.get(part)]
        return kinds, {part: getattr(diffusers, kinds[part]).load_config(where, subfolder=part) for part in parts}
    except (OSError, ValueError, AttributeError) as error:
        raise _unreadable(where, error) from error


def _of_models(pipe: Any) -> tuple[dict[str, str], dict[str, Any]]:
    held = {part: model for part, model in pipe.components.items() if model is not None}
    configs = {part: held[part].config for part in (*DENOISERS, "vae", "scheduler") if part in held}
    return {part: type(model).__name__ for part, model in held.items()}, configs


def _from_pretrained(diffusers: Any, where: str, dtype: torch.dtype) -> Any:
    try:
        return diffusers.DiffusionPipeline.from_pretrained(where, torch_dtype=dtype)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> ConfigError:
    what = (str(error).strip().splitlines() or [type(error).__name__])[0]
    fix = "check the spelling; a pipeline's folder has model_index.json and a folder for each of its models"
    return ConfigError(f"this cannot be loaded as a pipeline of diffusers: {what}", where, fix)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without bars, and without advice on prompts that are too long."""
    with quiet("diffusers"), warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):  # of their own code, for its authors
            warnings.simplefilter("ignore", kind)
        warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
        yield


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
