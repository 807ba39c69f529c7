"""Blocks of image transformers as the functions of dit_blocks.py, in the manner of image_fuse.py.

    FluxTransformerBlock, JointTransformerBlock, QwenImageTransformerBlock    image and text, each a stream
    FluxSingleTransformerBlock                                                both as one

The three kinds of two streams differ in names, in which stream comes first in the attention and in how heads are
turned: one table says so. All can be recorded as CUDA graphs. Adapters on what the time is turned into (norm1.linear,
img_mod) make blocks run plainly, for then gates are learned, and must see what they multiply.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.kernels.block import Norm, Unit, norm, rotated
from veneer.kernels.dit_blocks import Attend, Gate, Single, Stream, StreamEnd, run_single, run_streams
from veneer.kernels.fuse import FAMILIES, Family, FusedModule, _argument_names, _is_resting
from veneer.kernels.graphs import Unfit, replayed
from veneer.kernels.group import Inside, all_bare, factors_of
from veneer.kernels.image_blocks import LayerNorm
from veneer.kernels.image_fuse import SIDE, WORDS, _differs, _waves
from veneer.kernels.image_parts import either
from veneer.kernels.parts import NormParts, norm_parts, quickest

__all__ = ["FusedSingle", "FusedStreams"]

Turn = tuple[Tensor, Tensor] | None
"""cos and sin for each place of the attention, (places, d)."""


# ------------------------------------------------------------------ what blocks are made of


class Build(NamedTuple):
    """Where a kind of block has its parts; the image's first, then the text's."""

    mods: tuple[str, str]  # the layer that makes shifts, scales and gates out of the time
    norms: tuple[tuple[str, str], tuple[str, str]]
    units: tuple[str, str]
    processor: str
    text_first: bool  # in the attention


FLUX = Build(
    ("norm1.linear", "norm1_context.linear"), (("norm1.norm", "norm2"), ("norm1_context.norm", "norm2_context")),
    ("ff", "ff_context"), "FluxAttnProcessor", True,
)  # fmt: skip
JOINT = FLUX._replace(processor="JointAttnProcessor2_0", text_first=False)
QWEN = Build(
    ("img_mod.1", "txt_mod.1"), (("img_norm1", "img_norm2"), ("txt_norm1", "txt_norm2")), ("img_mlp", "txt_mlp"),
    "QwenDoubleStreamAttnProcessor2_0", True,
)  # fmt: skip
LAYERS = (("to_q", "to_k", "to_v", "to_out.0"), ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))
HEAD_NORMS = (("norm_q", "norm_k"), ("norm_added_q", "norm_added_k"))
HeadNorms = tuple[NormParts, NormParts] | None


@dataclass(frozen=True)
class StreamParts:
    mod: nn.Linear
    eps: tuple[float, float]
    qkv: tuple[nn.Linear, ...]
    head_norms: HeadNorms
    out: nn.Linear | None  # None where the block's text is not read on
    unit: tuple[nn.Linear, nn.Linear, str] | None

    def now(self, x: Tensor, time: Tensor, dtype: torch.dtype) -> Stream | str:
        rows = self.mod(F.silu(time))
        if rows.requires_grad:
            return "what the time scales by is learned"
        qkv = all_bare(self.qkv, dtype, len(x))
        if isinstance(qkv, str):
            return qkv
        if self.out is None or self.unit is None:
            scale, shift = rows.chunk(2, dim=1)
            return Stream(LayerNorm(1 + scale, shift, self.eps[0]), qkv, factors_of([qkv], dtype)[0], None)
        entry, down, act = self.unit
        rest = [all_bare([layer], dtype, len(x)) for layer in (self.out, entry, down)]
        if (why := either(*rest)) is not None:
            return why
        shift, scale, gate, shift2, scale2, gate2 = rows.chunk(6, dim=1)
        factors = factors_of([qkv, *rest], dtype)  # type: ignore[list-item]
        unit = Unit(rest[1], rest[2], act, gated=False)  # type: ignore[arg-type]
        second = LayerNorm(1 + scale2, shift2, self.eps[1])
        end = StreamEnd(rest[0], second, unit, tuple(factors), (Gate(gate), Gate(gate2)))  # type: ignore[arg-type]
        return Stream(LayerNorm(1 + scale, shift, self.eps[0]), qkv, factors[0], end)


@dataclass(frozen=True)
class StreamsParts:
    """A block of two streams."""

    module: Any
    build: Build
    streams: tuple[StreamParts, ...]
    inside: Inside

    @property
    def says(self) -> tuple[Any, ...]:
        """What may change about the block besides its modules and parameters."""
        more = getattr(self.module, "_chunk_size", None), getattr(self.module, "zero_cond_t", False)
        return *more, *_attention_says(self.module.attn)

    def now(self, xs: Sequence[Tensor], time: Tensor) -> list[Stream] | str:
        """The block as it is at this call: adapters, dropout and hooks may have changed since the last."""
        if (why := _touched(self.inside) or _other_attention(self.module.attn, self.build.processor)) is not None:
            return why
        if getattr(self.module, "_chunk_size", None) is not None:
            return "its feed-forward is cut into chunks"
        found = [s.now(x, time, x.dtype) for s, x in zip(self.streams, xs, strict=True)]
        return either(*found) or found  # type: ignore[return-value]

    def attend(self, dtype: torch.dtype, turn: Turn, mask: Tensor | None) -> Attend | str:
        norms = [_head_norms_now(s.head_norms, dtype) for s in self.streams]
        if (why := either(*norms)) is not None:
            return why
        return _attend(self.module.attn, norms, turn, mask, self.build.text_first)  # type: ignore[arg-type]


@dataclass(frozen=True)
class SingleParts:
    """A block of one stream."""

    module: Any
    head_norms: HeadNorms
    act: str
    inside: Inside

    @property
    def says(self) -> tuple[Any, ...]:
        return _attention_says(self.module.attn)

    def now(self, x: Tensor, time: Tensor) -> Single | str:
        block, attention = self.module, self.module.attn
        if (why := _touched(self.inside) or _other_attention(attention, "FluxAttnProcessor")) is not None:
            return why
        rows = block.norm.linear(F.silu(time))
        if rows.requires_grad:
            return "what the time scales by is learned"
        layers = attention.to_q, attention.to_k, attention.to_v, block.proj_mlp
        entry, out = all_bare(layers, x.dtype, len(x)), all_bare([block.proj_out], x.dtype, len(x))
        if isinstance(entry, str) or isinstance(out, str):
            return entry if isinstance(entry, str) else str(out)
        shift, scale, gate = rows.chunk(3, dim=1)
        first, second = factors_of([entry, out], x.dtype)
        modulated = LayerNorm(1 + scale, shift, block.norm.norm.eps)
        return Single(modulated, entry, out, self.act, Gate(gate), (first, second))

    def attend(self, dtype: torch.dtype, turn: Turn) -> Attend | str:
        norms = _head_norms_now(self.head_norms, dtype)
        return norms if isinstance(norms, str) else _attend(self.module.attn, [norms], turn, None, True)


def _touched(inside: Inside) -> str | None:
    drops = any(isinstance(m, nn.Dropout) and m.p and m.training for _, _, m in inside.places)
    return "it drops out" if drops else inside.touched()


def _other_attention(attention: Any, processor: str) -> str | None:
    if type(attention.processor).__name__ != processor:
        return f"its attention is run by {type(attention.processor).__name__}"
    if getattr(attention.processor, "_parallel_config", None) or getattr(attention.processor, "_attention_backend", 0):
        return "its attention has another backend"
    return "its q, k and v are joined into one layer" if getattr(attention, "fused_projections", False) else None


def _attention_says(attention: Any) -> tuple[Any, ...]:
    how = attention.processor
    ways = getattr(how, "_parallel_config", None), getattr(how, "_attention_backend", 0)
    return type(how), *map(bool, ways), getattr(attention, "fused_projections", False)


# ------------------------------------------------------------------ the attention

Heads = tuple[Norm, Norm] | None


def _head_norms_now(norms: HeadNorms, dtype: torch.dtype) -> Heads | str:
    if norms is None:
        return None
    found = [each.now(dtype) for each in norms]
    return either(*found) or tuple(found)  # type: ignore[return-value]


def _attend(attention: Any, norms: Sequence[Heads], turn: Turn, mask: Tensor | None, text_first: bool) -> Attend:
    heads: int = attention.heads

    def attend(streams: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        split = [[t.unflatten(-1, (heads, -1)) for t in stream] for stream in streams]  # (pictures, places, heads, d)
        for stream, own in zip(split, norms, strict=True):
            if own is not None:
                stream[:2] = norm(stream[0], own[0]), norm(stream[1], own[1])
        order = split[::-1] if text_first else split
        q, k, v = (torch.cat(each, dim=1) for each in zip(*order, strict=True)) if len(order) > 1 else order[0]
        if turn is not None:
            q, k = (rotated(t, *turn, True) for t in (q, k))
        with quickest(q, mask):
            o = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask)
        sizes = [each[0].shape[1] for each in order]
        # split's gradient has rows of its own, also that of a single part, as cuDNN needs it (even.py)
        parts = list(o.transpose(1, 2).flatten(2).split(sizes, dim=1))
        return parts[::-1] if text_first else parts

    return attend


# ------------------------------------------------------------------ classes


class FusedDit(FusedModule):
    """Every such block is called with the image and the text beside it, and returns text and image.

    As CUDA graphs (graphs.py) a block is recorded with both in one tensor, the text first, as blocks of one stream have
    them anyway; a block gives two views of one tensor, and the next takes that tensor as it is.
    """

    records = True

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs |= zip(_argument_names(type(self).__bases__[1]), args, strict=False)
        if _is_resting(hidden_states):
            return super().forward(hidden_states, **kwargs)
        named = {name: kwargs.get(name) for name in READ}
        if any(value is not None and value != {} for name, value in kwargs.items() if name not in READ):
            return self.plain("its attention is given more arguments", hidden_states, **kwargs)
        given = hidden_states, *named.values()
        found = self._by_replay(*given) or self.fast(*given)
        return self.plain(found, hidden_states, **kwargs) if isinstance(found, str) else found

    def _by_replay(self, image: Tensor, text: Tensor, time: Tensor, turn: Any, words: Tensor | None) -> Any:
        state = self.fused
        if state.recorder is None or time.requires_grad:
            return None
        given = {"time": time, "words": words} | dict(zip(("one", "other"), turn or (), strict=False))
        tensors = {name: t for name, t in given.items() if t is not None}
        sizes = [text.shape[1], image.shape[1]]

        def whole(x: Tensor, *, time: Tensor, words: Tensor | None = None, **turn: Tensor) -> Tensor:
            text, image = x.split(sizes, dim=1)
            found = self.fast(image, text, time, (turn["one"], turn["other"]) if turn else None, words, x)
            if isinstance(found, str):
                raise Unfit(found)
            return found[1] if found[0] is None else _beside(*found)

        y = replayed(
            state.recorder, self, _beside(text, image), (state.recompute, *sizes, *state.parts.says), tensors, whole
        )
        if y is None:
            return None
        return (None, y) if y.shape[1] == sizes[1] else _parted(y, sizes[0])

    @abstractmethod
    def fast(
        self, image: Tensor, text: Tensor, time: Tensor, turn: Any, words: Tensor | None, both: Tensor | None = None
    ) -> Any:
        """Text and image after the block, or why it must run plainly. `both`: the two as one, where that is at hand."""


READ = ("encoder_hidden_states", "temb", "image_rotary_emb", "encoder_hidden_states_mask")
PARTED = "veneer_parted"  # on a tensor: what it is a part of
LARGEST = 65504  # of fp16: FLUX and Qwen-Image clip there, and no number of SD 3's that is one lies beyond


class Parted(NamedTuple):
    """What two parts of one tensor know of it. Their `_base` is no help: that of what an autograd function gives may be
    a tensor inside of it, without a gradient."""

    whole: Tensor
    version: int  # of its numbers, when it was parted


def _parted(both: Tensor, words: int) -> tuple[Tensor, Tensor]:
    parts = both[:, :words], both[:, words:]
    vars(parts[0])[PARTED] = vars(parts[1])[PARTED] = Parted(both, both._version)
    return parts


def _beside(text: Tensor, image: Tensor) -> Tensor:
    """Both as one tensor: the one that they are parts of, if a block gave them so and nobody looks at their gradients;
    then nothing is copied, and on the way back nothing is added up."""
    known: Parted | None = vars(text).get(PARTED)
    if known is not None and known is vars(image).get(PARTED) and known.whole._version == known.version:
        is_first = text.data_ptr() == known.whole.data_ptr()
        if is_first and not any(part._backward_hooks or part.retains_grad for part in (text, image)):
            return known.whole
    return torch.cat([text, image], dim=1)


class FusedStreams(FusedDit):
    def fast(
        self, image: Tensor, text: Tensor, time: Tensor, turn: Any, words: Tensor | None, both: Tensor | None = None
    ) -> Any:
        if getattr(self, "zero_cond_t", False):
            return "a picture has two times"
        mask = None
        if words is not None:
            mask = torch.cat([words.bool(), words.new_ones(image.shape[:2]).bool()], dim=1)[:, None, None]
        parts = self.fused.parts
        streams, attend = parts.now((image, text), time), parts.attend(image.dtype, _turn(turn), mask)
        if isinstance(streams, str) or isinstance(attend, str):
            return streams if isinstance(streams, str) else attend
        image, after = run_streams((image, text), streams, attend, self.fused.recompute)  # type: ignore[assignment]
        return (after.clip(-LARGEST, LARGEST) if after is not None and after.dtype == torch.float16 else after), image


def _turn(turn: Any) -> Turn:
    """Qwen-Image has complex numbers, of the image and of the text."""
    if turn is None or not turn[0].is_complex():
        return turn
    angles = torch.cat(turn[::-1]).repeat_interleave(2, dim=-1)
    return angles.real.contiguous(), angles.imag.contiguous()


class FusedSingle(FusedDit):
    def fast(
        self, image: Tensor, text: Tensor, time: Tensor, turn: Any, words: Tensor | None, both: Tensor | None = None
    ) -> Any:
        parts = self.fused.parts
        block, attend = parts.now(image, time), parts.attend(image.dtype, turn)
        if isinstance(block, str) or isinstance(attend, str):
            return block if isinstance(block, str) else attend
        both = _beside(text, image) if both is None else both
        both = run_single(both, block, attend, self.fused.recompute)
        both = both.clip(-LARGEST, LARGEST) if both.dtype == torch.float16 else both
        return _parted(both, text.shape[1])


# ------------------------------------------------------------------ finding the parts


def streams_parts(build: Build) -> Callable[[Any], StreamsParts | str]:
    def parts(block: Any) -> StreamsParts | str:
        if getattr(block, "attn2", None) is not None:
            return "it has a second attention"
        found = [_stream_parts(block, build, which) for which in (0, 1)]
        return either(*found) or StreamsParts(block, build, tuple(found), Inside.of(block))  # type: ignore[arg-type]

    return parts


def _stream_parts(block: Any, build: Build, which: int) -> StreamParts | str:
    mod, norms, attention = build.mods[which], build.norms[which], block.attn
    *qkv, out = (_at(attention, name) for name in LAYERS[which])
    mod, first = _at(block, mod), _at(block, norms[0])
    if not all(isinstance(layer, nn.Linear) for layer in (mod, *qkv)) or not _is_bare_norm(first):
        return "it is not built as its kind is"
    heads = _head_norms(attention, which)
    if isinstance(heads, str):
        return heads
    unit, second = _at(block, build.units[which]), _at(block, norms[1])
    if unit is None or out is None:  # SD 3's last text
        return StreamParts(mod, (first.eps, 0.0), tuple(qkv), heads, None, None)
    layers = _unit_layers(unit)
    if isinstance(layers, str) or not _is_bare_norm(second) or not isinstance(out, nn.Linear):
        return layers if isinstance(layers, str) else "it is not built as its kind is"
    return StreamParts(mod, (first.eps, second.eps), tuple(qkv), heads, out, layers)


def _at(module: Any, name: str) -> Any:
    for step in name.split("."):
        module = module[int(step)] if step.isdigit() else getattr(module, step, None)
        if module is None:
            return None
    return module


def _is_bare_norm(norm: Any) -> bool:
    return isinstance(norm, nn.LayerNorm) and not norm.elementwise_affine


def _head_norms(attention: Any, which: int) -> HeadNorms | str:
    norms = [getattr(attention, name, None) for name in HEAD_NORMS[which]]
    if all(each is None for each in norms):
        return None
    if any(each is None for each in norms):
        return "it norms only q or only k"
    found = [norm_parts(each) for each in norms]  # type: ignore[arg-type]
    if not all(isinstance(each, NormParts) for each in found):
        return either(*found) or "its heads are not normed by RMSNorms"
    return tuple(found)  # type: ignore[return-value]


def _unit_layers(unit: Any) -> tuple[nn.Linear, nn.Linear, str] | str:
    steps = [step for step in unit.net if not isinstance(step, nn.Dropout)]
    if type(steps[0]).__name__ != "GELU" or len(steps) != 2 or not isinstance(steps[1], nn.Linear):
        return f"its feed-forward is {type(steps[0]).__name__}"
    return steps[0].proj, steps[1], "gelu_tanh" if steps[0].approximate == "tanh" else "gelu"


def single_parts(block: Any) -> SingleParts | str:
    act, heads = block.act_mlp, _head_norms(block.attn, 0)
    if not isinstance(act, nn.GELU) or not _is_bare_norm(block.norm.norm):
        return "it is not built as its kind is"
    if isinstance(heads, str):
        return heads
    return SingleParts(block, heads, "gelu_tanh" if act.approximate == "tanh" else "gelu", Inside.of(block))


# ------------------------------------------------------------------ the experiment


def _block_differs(block: Any) -> str | None:
    parts = block.fused.parts
    is_single, attention = isinstance(parts, SingleParts), block.attn
    mod = block.norm.linear if is_single else parts.streams[0].mod
    weight = mod.bias
    if weight is None or weight.is_meta:
        return None
    width, head = attention.to_q.in_features, attention.to_q.out_features // attention.heads
    image, text = _waves((1, SIDE * SIDE, width), weight), _waves((1, WORDS, width), weight).flip(-1)
    named: dict[str, Any] = {"temb": _waves((1, mod.in_features), weight)}
    angle = torch.linspace(0, 1, (SIDE * SIDE + WORDS) * head // 2, device=weight.device).view(-1, head // 2)
    wide, turns = angle.repeat_interleave(2, dim=-1), torch.polar(torch.ones_like(angle), angle)
    if not is_single and parts.build is QWEN:
        named |= {"encoder_hidden_states_mask": None, "image_rotary_emb": (turns[WORDS:], turns[:WORDS])}
    elif is_single or parts.build is FLUX:
        named["image_rotary_emb"] = wide.cos(), wide.sin()
    return _differs(block, (image, text), named, learned=2)


FAMILIES |= {
    "diffusers.models.attention.JointTransformerBlock": Family(
        "blocks of two streams", FusedStreams, streams_parts(JOINT), _block_differs
    ),
    "diffusers.models.transformers.transformer_flux.FluxTransformerBlock": Family(
        "blocks of two streams", FusedStreams, streams_parts(FLUX), _block_differs
    ),
    "diffusers.models.transformers.transformer_flux.FluxSingleTransformerBlock": Family(
        "blocks of one stream", FusedSingle, single_parts, _block_differs
    ),
    "diffusers.models.transformers.transformer_qwenimage.QwenImageTransformerBlock": Family(
        "blocks of two streams", FusedStreams, streams_parts(QWEN), _block_differs
    ),
}
