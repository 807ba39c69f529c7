"""diffusers' blocks as the functions of image_blocks.py: the families that fuse.py finds by class.

    BasicTransformerBlock    transformer blocks of UNets
    Transformer2DModel       what brings an image to them and back, without turning its memory round
    ResnetBlock2D            residual blocks
    Upsample2D, Downsample2D

A block is tried on a small input before it is taken, forwards and backwards, and left alone where the two differ. At
every call it looks again at what it is made of; what cannot run so runs by the block's own forward and is named once.
On a GPU the frozen convolutions' weights are laid out with channels last when their block is taken.

As CUDA graphs (graphs.py) what is recorded is large: an image's whole way through its transformer blocks, and each
residual block. What they are called with must then be the image, the text and the time, and no more.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.kernels.fuse import FAMILIES, Family, FusedModule, _at_rest, _is_resting, _Plainly
from veneer.kernels.graphs import Unfit, replayed
from veneer.kernels.group import untouched
from veneer.kernels.image_blocks import group_normed, layered, run_image, run_residual
from veneer.kernels.image_parts import (
    image_parts,
    residual_parts,
    sampler_parts,
    stage_parts,
    with_adapters,
)

__all__ = ["FusedImage", "FusedResidual", "FusedSampler", "FusedStage"]

SIDE = 4  # of the image that a block is tried on
WORDS = 5  # of the text


class FusedImage(FusedModule):
    """A transformer block: self-attention, cross-attention, gated unit."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or _is_resting(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        text = kwargs.get("encoder_hidden_states")
        why = _more_is_asked(kwargs)
        block = why or self.fused.parts.now(hidden_states.dtype)
        if isinstance(block, str):
            return self.plain(block, hidden_states, **kwargs)
        return run_image(hidden_states, text, block, self.fused.recompute)


def _more_is_asked(kwargs: dict[str, Any]) -> str | None:
    if kwargs.get("encoder_hidden_states") is None:
        return "there is no text"
    if kwargs.get("attention_mask") is not None or kwargs.get("encoder_attention_mask") is not None:
        return "a mask is given"
    return "its attention is given more arguments" if kwargs.get("cross_attention_kwargs") else None


class FusedStage(FusedModule):
    """An image -> rows -> transformer blocks -> an image. Channels stay last, so rows and images are one memory."""

    records = True

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = None if args else self._by_replay(hidden_states, kwargs)
        return super().forward(hidden_states, *args, **kwargs) if y is None else (y,)

    def _by_replay(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        text = kwargs.get("encoder_hidden_states")
        more = [v for k, v in kwargs.items() if k != "encoder_hidden_states" and (isinstance(v, Tensor) or v)]
        if _is_resting(x) or more or text is None or text.requires_grad or kwargs.get("return_dict", True):
            return None
        if self.gradient_checkpointing and self.training:
            return None
        run = super().forward

        def whole(x: Tensor, *, text: Tensor) -> Tensor:
            for name, inside in self.named_modules():
                if name and (why := untouched(inside)) is not None:
                    raise Unfit(why)
            return run(x, encoder_hidden_states=text, return_dict=False)[0]

        return _replayed(self, x, {"text": text}, whole)

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> Any:
        norm = self.fused.parts.norm_now(hidden_states.dtype)
        if _is_resting(hidden_states) or isinstance(norm, str):
            return super()._operate_on_continuous_inputs(hidden_states)  # type: ignore[misc]
        image, proj_in = group_normed(hidden_states, norm), self.proj_in
        if not self.use_linear_projection:
            image = proj_in(image)  # type: ignore[operator]
        rows = image.permute(0, 2, 3, 1).reshape(image.shape[0], -1, image.shape[1])
        return (proj_in(rows) if self.use_linear_projection else rows), image.shape[1]  # type: ignore[operator]

    def _get_output_for_continuous_inputs(self, hidden_states: Tensor, residual: Tensor, **sizes: Any) -> Tensor:
        if _is_resting(hidden_states):
            return super()._get_output_for_continuous_inputs(hidden_states, residual, **sizes)  # type: ignore[misc]
        n, height, width = sizes["batch_size"], sizes["height"], sizes["width"]
        out: Any = self.proj_out
        if self.use_linear_projection:
            hidden_states = out(hidden_states)
        image = hidden_states.view(n, height, width, -1).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            image = out(image)
        return image + residual.contiguous(memory_format=torch.channels_last)


def _replayed(module: FusedModule, x: Tensor, tensors: dict[str, Tensor], run: Any) -> Tensor | None:
    """An image's output by a replay, where there is one. Records have images as memory lies, channels last."""
    state = module.fused
    if state.recorder is None:
        return None

    def whole(image: Tensor, **tensors: Tensor) -> Tensor:
        return run(image.permute(0, 3, 1, 2), **tensors).permute(0, 2, 3, 1)

    image = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    settings = state.recompute, getattr(state.parts, "says", ())
    y = replayed(state.recorder, module, image, settings, tensors, whole)
    return None if y is None else y.permute(0, 3, 1, 2)


class FusedResidual(FusedModule):
    """A residual block of two convolutions."""

    records = True

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or _is_resting(input_tensor):
            return super().forward(input_tensor, temb, *args, **kwargs)
        block = self.fused.parts.now(input_tensor.dtype)
        if isinstance(block, str):
            return self.plain(block, input_tensor, temb)
        time = self.fused.parts.time(temb)
        y = None  # the way back does not read the time, so all records may be given theirs in one place
        if input_tensor.requires_grad and (time is None or not time.requires_grad):
            y = _replayed(self, input_tensor, {} if time is None else {"time": time}, self._whole)
        return run_residual(input_tensor, time, block) if y is None else y

    def _whole(self, x: Tensor, *, time: Tensor | None = None) -> Tensor:
        block = self.fused.parts.now(x.dtype)
        if isinstance(block, str):
            raise Unfit(block)
        return run_residual(x, time, block)


class FusedSampler(FusedModule):
    """Twice or half the image's sides, by a convolution."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(args) > 1 or kwargs.keys() - {"output_size"} or _is_resting(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        parts = self.fused.parts
        if (why := parts.now(hidden_states.dtype)) is not None:
            return self.plain(why, hidden_states, *args, **kwargs)
        size = args[0] if args else kwargs.get("output_size")
        if parts.doubles:
            scale = 2.0 if size is None else None
            hidden_states = F.interpolate(hidden_states, size=size, scale_factor=scale, mode="nearest")
        return layered(hidden_states, parts.conv, with_adapters(parts.conv))


# ------------------------------------------------------------------ the experiment


def _differs(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], learned: int = 1) -> str | None:
    """Run the module both ways on small inputs. None where they agree, also in the gradients of the first `learned`
    inputs; else what is wrong."""
    with _at_rest(module):
        fused, plain = (_outcome(run, inputs, named, learned) for run in (module, _Plainly(module)))
    if isinstance(fused, str) or isinstance(plain, str):
        return fused if isinstance(fused, str) else str(plain)
    near = 1e-3 if fused[0].dtype in (torch.float32, torch.float64) else 5e-2
    for mine, own in zip(fused, plain, strict=True):
        off = float((mine - own).float().norm() / own.float().norm().clamp_min(1e-30))
        if not off <= near:
            return f"its own forward gives something else (off by {off:.1%})"
    return None


def _outcome(run: Any, inputs: tuple[Any, ...], named: dict[str, Any], learned: int) -> list[Tensor] | str:
    with torch.enable_grad():
        xs = [x.clone().requires_grad_() for x in inputs[:learned]]
        try:
            found = run(*xs, *inputs[learned:], **named)
            ys = [y for y in (found if isinstance(found, tuple) else (found,)) if y is not None]
            ds = torch.autograd.grad(ys, xs, [torch.cos(y.detach()) for y in ys])
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
            return f"it does not run by itself ({type(error).__name__}: {error})"
    return [*(y.detach() for y in ys), *ds]


def _waves(shape: tuple[int, ...], like: Tensor) -> Tensor:
    values = torch.sin(torch.arange(math.prod(shape), device=like.device) * math.sqrt(2))
    return values.view(shape).to(like.dtype)


def _image_differs(block: Any) -> str | None:
    weight = block.norm1.weight
    if weight.is_meta:
        return None
    text = _waves((1, WORDS, block.attn2.to_k.in_features), weight)
    return _differs(block, (_waves((1, SIDE * SIDE, len(weight)), weight),), {"encoder_hidden_states": text})


def _stage_differs(stage: Any) -> str | None:
    weight = stage.norm.weight
    if weight.is_meta:
        return None
    text = _waves((1, WORDS, stage.transformer_blocks[0].attn2.to_k.in_features), weight)
    named = {"encoder_hidden_states": text, "return_dict": False}
    return _differs(stage, (_waves((1, len(weight), SIDE, SIDE), weight),), named)


def _residual_differs(block: Any) -> str | None:
    weight = block.norm1.weight
    if weight.is_meta:
        return None
    temb = None if block.time_emb_proj is None else _waves((1, block.time_emb_proj.in_features), weight)
    why = _differs(block, (_waves((1, len(weight), SIDE, SIDE), weight), temb), {})
    return why or _lay_out(block)


def _sampler_differs(sampler: Any) -> str | None:
    weight = sampler.fused.parts.conv._parameters["weight"]
    if weight.is_meta:
        return None
    return _differs(sampler, (_waves((1, sampler.channels, SIDE, SIDE), weight),), {}) or _lay_out(sampler)


def _lay_out(module: nn.Module) -> None:
    """Weights of frozen convolutions as a GPU reads them; the numbers and the shape stay."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d) and conv.weight.is_cuda and not conv.weight.requires_grad:
            conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)


FAMILIES |= {
    "diffusers.models.attention.BasicTransformerBlock": Family(
        "transformer blocks", FusedImage, image_parts, _image_differs
    ),
    "diffusers.models.transformers.transformer_2d.Transformer2DModel": Family(
        "ways in and out of them", FusedStage, stage_parts, _stage_differs
    ),
    "diffusers.models.resnet.ResnetBlock2D": Family(
        "residual blocks", FusedResidual, residual_parts, _residual_differs
    ),
    **{
        f"diffusers.models.{place}": Family("samplers", FusedSampler, sampler_parts, _sampler_differs)
        for place in ("upsampling.Upsample2D", "downsampling.Downsample2D")
    },
}
