"""What the modules of a diffusion model are: diffusers' blocks, taken apart by their attributes.

A transformer block is taken when it is LayerNorm, self-attention, LayerNorm, cross-attention, LayerNorm, gated unit,
all added to one stream, with diffusers' plain processor on both attentions; a residual block when it is norm, SiLU,
convolution twice over, with the time added in the middle. Whether that is all, `image_fuse.py` tries out. Every answer
is the part or a sentence that says why not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.host import Active, Hosted
from veneer.core.weight import is_plain
from veneer.kernels.block import Unit
from veneer.kernels.graphs import state_of
from veneer.kernels.group import Group, Inside, all_bare, factors_of, untouched
from veneer.kernels.image_blocks import End, GroupNorm, Image, LayerNorm, Residual
from veneer.kernels.parts import layer_norm_now, norm_now, quickest

__all__ = ["AttentionParts", "ImageParts", "ResidualParts", "SamplerParts", "StageParts"]
__all__ += ["image_parts", "residual_parts", "sampler_parts", "stage_parts"]

GATES = {"GEGLU": "gelu", "SwiGLU": "silu"}
PROCESSORS = ("AttnProcessor2_0", "AttnProcessor", "FusedAttnProcessor2_0")
Part = TypeVar("Part")


def either(*parts: Any) -> str | None:
    """The first reason among parts and reasons."""
    return next((part for part in parts if isinstance(part, str)), None)


def group_norm_now(norm: Any, dtype: torch.dtype, act: bool) -> GroupNorm | str:
    return norm_now(norm, dtype) or GroupNorm(norm.weight, norm.bias, norm.num_groups, norm.eps, act)


def conv_now(conv: nn.Conv2d, dtype: torch.dtype) -> str | None:
    """Why a convolution cannot be taken as a frozen weight now."""
    weight, bias = conv._parameters.get("weight"), conv._parameters.get("bias")
    if weight is None or not is_plain(weight) or weight.dtype != dtype:
        return f"a convolution's weight is no plain tensor of {dtype}"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "a convolution is trained"
    return untouched(conv)


def with_adapters(*convs: nn.Conv2d) -> tuple[nn.Conv2d, ...]:
    """Those on which adapters act."""
    return tuple(conv for conv in convs if isinstance(conv, Hosted) and conv.active.names)


def _is_plain_conv(conv: Any) -> bool:
    return isinstance(conv, nn.Conv2d) and conv.groups == 1 and conv.padding_mode == "zeros"


# ------------------------------------------------------------------ attention


@dataclass(frozen=True)
class AttentionParts:
    module: Any

    def attend(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        heads = self.module.heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
            with quickest(q):
                o = F.scaled_dot_product_attention(q, k, v)
            return o.transpose(1, 2).flatten(2)

        return attend

    def now(self) -> str | None:
        module = self.module
        if type(module.processor).__name__ not in PROCESSORS:
            return f"its attention is run by {type(module.processor).__name__}"
        if getattr(module, "fused_projections", False):
            return "its q, k and v are joined into one layer"
        if module.to_out[1].p and module.training:
            return "its attention drops out"
        return None


def attention_parts(attention: Any) -> AttentionParts | str:
    layers = [getattr(attention, name, None) for name in ("to_q", "to_k", "to_v")]
    to_out = getattr(attention, "to_out", None)
    name = type(attention).__name__
    if not isinstance(to_out, nn.ModuleList) or len(to_out) != 2 or not isinstance(to_out[1], nn.Dropout):
        return f"{name} is not built from to_q, to_k, to_v and to_out"
    if not all(isinstance(layer, nn.Linear) for layer in (*layers, to_out[0])):
        return f"{name} is not built from linear layers"
    odd = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj", "residual_connection")
    if (found := next((o for o in odd if getattr(attention, o, None)), None)) is not None:
        return f"its attention has {found}"
    return AttentionParts(attention)


# ------------------------------------------------------------------ transformer blocks


class Laid(NamedTuple):
    """A block's norms and layers, laid bare."""

    norms: list[LayerNorm]
    groups: list[Group]
    actives: list[Active]
    trained: list[tuple[dict[str, Any], str, nn.Parameter]]  # where each parameter stood

    @property
    def is_here(self) -> bool:
        """Whether these very parameters still stand there: recording has others stand in for them."""
        return all(held.get(name) is p for held, name, p in self.trained)

    @property
    def is_lasting(self) -> bool:
        """Whether all of it is parameters themselves, and nothing was computed from them."""
        layers = [layer for group in self.groups for layer in group.layers]
        factors = [t for layer in layers for a, b, _ in layer.adapters for t in (a, b)]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        plain = all(layer.gain is None and layer.picks is None for layer in layers)
        return plain and all(isinstance(t, nn.Parameter) for t in (*factors, *biases))

    def watch(self) -> None:
        """As each layer would: a checkpointed forward pass must find the same adapters on its way back."""
        if torch.is_grad_enabled():
            for active in self.actives:
                active.watch_checkpoint()


@dataclass(frozen=True)
class ImageParts:
    module: Any
    self_attention: AttentionParts
    cross_attention: AttentionParts
    entry: nn.Linear
    down: nn.Linear
    act: str
    inside: Inside
    held: dict[Any, Laid] = field(default_factory=dict, compare=False)  # the last answer of `_laid`, by what it is for

    def now(self, dtype: torch.dtype) -> Image | str:
        """The block as it is at this call. Laying ten layers bare takes Python a while, and nothing has changed mostly:
        then only the factors are taken anew."""
        state = state_of(self.module)
        key = dtype, state, self.says
        laid = self.held.get(key)
        if laid is None or not laid.is_here:
            laid = self._laid(dtype)
            self.held.clear()
            if isinstance(laid, str):
                return laid
            if state is not None and laid.is_lasting:
                self.held[key] = laid
        else:
            laid.watch()
        return self._block(laid, dtype)

    @property
    def says(self) -> tuple[Any, ...]:
        """What may change about the block besides its modules and parameters."""
        attentions = self.self_attention.module, self.cross_attention.module
        return self.module._chunk_size, *((type(a.processor), getattr(a, "fused_projections", 0)) for a in attentions)

    def _laid(self, dtype: torch.dtype) -> Laid | str:
        block, own, cross = self.module, self.self_attention.module, self.cross_attention.module
        if (why := self.inside.touched()) is not None:
            return why
        if block._chunk_size is not None:
            return "its feed-forward is cut into chunks"
        if any(drop.p and drop.training for drop in block.ff.modules() if isinstance(drop, nn.Dropout)):
            return "its feed-forward drops out"
        norms = [layer_norm_now(norm, dtype) for norm in (block.norm1, block.norm2, block.norm3)]
        siblings = [own.to_q, own.to_k, own.to_v], [own.to_out[0]], [cross.to_q], [cross.to_k, cross.to_v]
        groups = [all_bare(group, dtype) for group in (*siblings, [cross.to_out[0]], [self.entry], [self.down])]
        if (why := either(*norms, *groups, self.self_attention.now(), self.cross_attention.now())) is not None:
            return why
        hosts = {id(m.active): m.active for m in self.module.modules() if isinstance(m, Hosted)}
        parameters = [(m._parameters, n, p) for m in self.module.modules() for n, p in m._parameters.items()]
        trained = [(held, n, p) for held, n, p in parameters if p is not None and p.requires_grad]
        return Laid(norms, groups, list(hosts.values()), trained)  # type: ignore[arg-type]

    def _block(self, laid: Laid, dtype: torch.dtype) -> Image:
        norms, groups = laid.norms, laid.groups
        factors = factors_of(groups, dtype)
        qkv, out, q, kv, cross_out, entry, down = groups
        unit = Unit(entry, down, self.act, up_first=True)
        end = End(cross_out, norms[2], unit, (factors[0], *factors[4:]))
        attends = self.self_attention.attend(), self.cross_attention.attend()
        return Image(norms[0], qkv, out, norms[1], q, kv, end, *attends, tuple(factors[:4]))


def image_parts(block: Any) -> ImageParts | str:
    if getattr(block, "norm_type", None) != "layer_norm" or block.pos_embed is not None or hasattr(block, "fuser"):
        return f"{type(block).__name__} norms by {getattr(block, 'norm_type', 'something else')}, or does more"
    if block.attn2 is None or block.only_cross_attention:
        return "it has no self-attention followed by cross-attention"
    own, cross = attention_parts(block.attn1), attention_parts(block.attn2)
    unit = unit_parts(block.ff)
    if isinstance(own, str) or isinstance(cross, str) or isinstance(unit, str):
        return str(either(own, cross, unit))
    return ImageParts(block, own, cross, *unit, Inside.of(block))


def unit_parts(ff: Any) -> tuple[nn.Linear, nn.Linear, str] | str:
    steps = [step for step in ff.net if not isinstance(step, nn.Dropout)]
    gate = type(steps[0]).__name__
    if gate not in GATES or len(steps) != 2 or not isinstance(steps[1], nn.Linear):
        return f"its feed-forward is {gate}"
    return steps[0].proj, steps[1], GATES[gate]


@dataclass(frozen=True)
class StageParts:
    """An image on its way into transformer blocks and out of them."""

    module: Any

    def norm_now(self, dtype: torch.dtype) -> GroupNorm | str:
        return group_norm_now(self.module.norm, dtype, act=False)

    @property
    def says(self) -> tuple[Any, ...]:
        """What may change about its blocks besides their modules and parameters."""
        states = [block.__dict__.get("fused") for block in self.module.transformer_blocks]
        return tuple(None if state is None else (state.recompute, state.parts.says) for state in states)


def stage_parts(stage: Any) -> StageParts | str:
    if not getattr(stage, "is_input_continuous", False):
        return "its input is no image of channels"
    if not hasattr(stage, "_get_output_for_continuous_inputs") or not hasattr(stage, "_operate_on_continuous_inputs"):
        return "this version of diffusers builds it otherwise"
    return StageParts(stage)


# ------------------------------------------------------------------ residual blocks


@dataclass(frozen=True)
class ResidualParts:
    module: Any
    inside: Inside

    def now(self, dtype: torch.dtype) -> Residual | str:
        block = self.module
        if (why := self.inside.touched()) is not None:
            return why
        first, second = (group_norm_now(norm, dtype, act=True) for norm in (block.norm1, block.norm2))
        if block.dropout.p and block.dropout.training:
            return "it drops out"
        convs = [conv for conv in (block.conv1, block.conv2, block.conv_shortcut) if conv is not None]
        if (why := either(first, second, *(conv_now(conv, dtype) for conv in convs))) is not None:
            return why
        own = block.conv1, second, block.conv2, block.conv_shortcut
        return Residual(first, *own, with_adapters(*convs))  # type: ignore[arg-type]

    def time(self, temb: Tensor | None) -> Tensor | None:
        """The time's share of each channel, by the block's own layer, whatever adapters are on it."""
        block = self.module
        if block.time_emb_proj is None or temb is None:
            return None
        return block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))


def residual_parts(block: Any) -> ResidualParts | str:
    if block.upsample is not None or block.downsample is not None:
        return "it changes the image's size"
    if block.time_embedding_norm != "default" and block.time_emb_proj is not None:
        return "its time scales"
    if block.output_scale_factor != 1 or not isinstance(block.nonlinearity, nn.SiLU):
        return "it scales its output, or its activation is not SiLU"
    convs = [conv for conv in (block.conv1, block.conv2, block.conv_shortcut) if conv is not None]
    norms = (block.norm1, block.norm2)
    if not all(map(_is_plain_conv, convs)) or not all(isinstance(norm, nn.GroupNorm) for norm in norms):
        return "its layers are no plain convolutions and group norms"
    return ResidualParts(block, Inside.of(block))


@dataclass(frozen=True)
class SamplerParts:
    """A convolution that changes the image's size, or follows such a change."""

    module: Any
    conv: nn.Conv2d
    doubles: bool
    inside: Inside

    def now(self, dtype: torch.dtype) -> str | None:
        return self.inside.touched() or conv_now(self.conv, dtype)


def sampler_parts(sampler: Any) -> SamplerParts | str:
    conv = getattr(sampler, "conv", None) if sampler.use_conv else None
    if conv is None or not _is_plain_conv(conv) or sampler.norm is not None:
        return "it has no plain convolution"
    if not hasattr(sampler, "interpolate") and sampler.padding == 0:
        return "it pads one side only"
    if getattr(sampler, "use_conv_transpose", False) or not getattr(sampler, "interpolate", True):
        return "it doubles the image otherwise"
    return SamplerParts(sampler, conv, hasattr(sampler, "interpolate"), Inside.of(sampler))
