"""What the modules of a decoder block are, found by asking them instead of by their names alone.

A block is taken when it is built as

    x + attention(norm(x)), then x + mlp(norm(x))                  Llama, Mistral, Qwen 2 and 3, Gemma, Phi 3, GPT-2 ..
    x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))      Gemma 2 and 3
    x + attention(norm(x)) + mlp(norm(x)), one norm for both       Phi

with norms that are RMSNorms or LayerNorms and an mlp that is a gated unit or has no gate. Whether a norm multiplies by
w or by w + 1, and which function an activation is, is tried out on a few numbers; that the block as a whole does what
its parts say, by `fuse.py` on a few tokens. Every answer is either the part or a sentence that says why not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.host import Hosted, original_class, plain_modules
from veneer.core.op import LinearOp, op_for
from veneer.kernels.block import Drop, Norm, Unit, rotated
from veneer.kernels.group import Group, Inside, all_bare, untouched
from veneer.kernels.image_blocks import LayerNorm
from veneer.kernels.pieces import ACTIVATIONS, glu

__all__ = [
    "AttentionParts",
    "BlockParts",
    "LayerNormParts",
    "MlpParts",
    "NormParts",
    "attention_parts",
    "block_parts",
    "layer_norm_now",
    "mlp_parts",
    "norm_now",
    "norm_parts",
]

OTHERS = ("ffn_norm", "post_mlp_layernorm", "post_self_attn_layernorm", "crossattention", "cross_attn")
DROPS = (  # of the residual stream, by whom they belong to: after the attention, after the unit
    (("resid_attn_dropout", "resid_dropout"), ("resid_dropout",)),
    (("resid_mlp_dropout", "resid_dropout", "dropout"), ("dropout",)),
)
CAPPING = ("transformers.models.gemma2.modeling_gemma2.Gemma2Attention",)  # they tell their kernel to cap scores
GAUGE = 64  # numbers an activation is tried on


@dataclass(frozen=True)
class NormParts:
    module: nn.Module
    eps: float
    offset: float

    def now(self, dtype: torch.dtype) -> Norm | str:
        weight = self.module._parameters.get("weight")
        if isinstance(self.module, Hosted) or weight is None or weight.requires_grad:
            return "a norm is trained"
        if weight.dtype != dtype:
            return f"a norm is {weight.dtype}, its input {dtype}"
        return untouched(self.module) or Norm(weight, self.eps, self.offset)


@dataclass(frozen=True)
class LayerNormParts:
    module: nn.Module

    def now(self, dtype: torch.dtype) -> LayerNorm | str:
        return layer_norm_now(self.module, dtype)


def layer_norm_now(norm: Any, dtype: torch.dtype) -> LayerNorm | str:
    return norm_now(norm, dtype) or LayerNorm(norm.weight, norm.bias, norm.eps)


def norm_now(norm: nn.Module, dtype: torch.dtype) -> str | None:
    """Why a norm with gain and bias cannot be taken as it is now."""
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    if isinstance(norm, Hosted) or weight is None or bias is None or weight.requires_grad or bias.requires_grad:
        return "a norm is trained, or has no gain"
    if weight.dtype != dtype:
        return f"a norm is {weight.dtype}, its input {dtype}"
    return untouched(norm)


@dataclass(frozen=True)
class MlpParts:
    entry: tuple[nn.Module, ...]  # gate and up, or one layer for both, or one and no gate
    down: nn.Module
    act: str
    gated: bool = True
    drops: tuple[nn.Dropout, ...] = ()

    @property
    def is_dropping(self) -> bool:
        return any(drop.p and drop.training for drop in self.drops)

    def now(self, dtype: torch.dtype, batch: int) -> Unit | str:
        entry, down = all_bare(self.entry, dtype, batch), all_bare([self.down], dtype, batch)
        if isinstance(entry, str) or isinstance(down, str):
            return entry if isinstance(entry, str) else str(down)
        return Unit(entry, down, self.act, self.gated)


@dataclass(frozen=True)
class AttentionParts:
    module: nn.Module
    qkv: tuple[nn.Module, ...]
    out: nn.Module
    heads: tuple[int, int]
    head_dim: int
    turned: int  # how many numbers of each head are rotated
    head_norms: tuple[nn.Module, nn.Module] | None

    @property
    def turns(self) -> bool:
        """Whether q and k are rotated whole, right after their projections."""
        return self.head_norms is None and self.turned == self.head_dim

    @property
    def dropout(self) -> float:
        module: Any = self.module
        if not module.training:
            return 0.0
        return module.attn_dropout.p if hasattr(module, "attn_dropout") else module.attention_dropout

    def now(self, dtype: torch.dtype, batch: int) -> tuple[Group, Group] | str:
        if (why := untouched(self.module)) is not None:
            return why
        qkv, out = all_bare(self.qkv, dtype, batch), all_bare([self.out], dtype, batch)
        if isinstance(qkv, str) or isinstance(out, str):
            return qkv if isinstance(qkv, str) else str(out)
        return qkv, out

    def attend(
        self, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, options: dict[str, Any], cache: Any = None
    ) -> Callable[..., Tensor]:
        """q, k, v as (batch, tokens, heads, d) -> what the model's own attention makes of them, by tokens."""
        module: Any = self.module
        kernel: Any = interface(module)
        options = {**options, "dropout": self.dropout, "scaling": module.scaling}
        options["sliding_window"] = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
        if (cap := getattr(module, "attn_logit_softcapping", None)) is not None:
            options["softcap"] = cap

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.head_norms is not None:
                q, k = self.head_norms[0](q), self.head_norms[1](k)
            if cos is not None and sin is not None and not self.turns:
                q, k = (_turned(t, cos, sin) for t in (q, k))
            keys, values = k.transpose(1, 2), v.transpose(1, 2)
            if cache is not None:
                keys, values = cache.update(keys, values, module.layer_idx)
            with quickest(q, mask):
                o, _ = kernel(module, q.transpose(1, 2), keys, values, mask, **options)
            return o.reshape(*q.shape[:2], -1)

        return attend


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on as much of each head as they are wide."""
    wide = cos.shape[-1]
    if wide == x.shape[-1]:
        return rotated(x, cos, sin)
    return torch.cat([rotated(x[..., :wide].contiguous(), cos, sin), x[..., wide:]], dim=-1)


@dataclass(frozen=True)
class BlockParts:
    first: AnyNorm
    attention: AttentionParts
    second: AnyNorm
    mlp: MlpParts
    posts: tuple[AnyNorm | None, AnyNorm | None]
    parallel: bool
    drops: tuple[nn.Dropout | None, nn.Dropout | None]  # of what the attention and the unit give, before it is added
    others: tuple[nn.Dropout, ...]  # that nobody here knows
    inside: Inside

    def endings(self, dtype: torch.dtype) -> tuple[Any, Any] | str:
        """What the attention and the unit give goes through before it is added, as it is now."""
        if any(drop.p and drop.training for drop in self.others):
            return "it drops out in a place that is not known"
        found = []
        for post, drop in zip(self.posts, self.drops, strict=True):
            is_dropping = drop is not None and bool(drop.p) and drop.training
            if is_dropping and post is not None:
                return "it drops out of what a norm gives"
            found.append(Drop(drop.p) if drop is not None and is_dropping else post and post.now(dtype))
        return next((each for each in found if isinstance(each, str)), None) or (found[0], found[1])

    def touched(self) -> str | None:
        return self.inside.touched()


def interface(module: nn.Module) -> Callable[..., Any]:
    """The attention that the model's configuration names."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[original_class(type(module)).__module__], "eager_attention_forward", None)
    name = module.config._attn_implementation
    return eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[return-value]


def quickest(q: Tensor, mask: Any = None) -> AbstractContextManager[Any]:
    """On Hopper, cuDNN's attention takes 0.7 of the time of the flash kernel that would come first. `mask`: the tensor
    of which the last size is that of the keys."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) < (9, 0):
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    unsafe = isinstance(mask, Tensor) and is_unsafe(mask.shape[-1])
    return sdpa_kernel(order[unsafe:], set_priority=True)


def is_unsafe(keys: int) -> bool:
    """Whether cuDNN's backward pass with a mask may give NaN for so many keys: in torch 2.11 to 2.13 it takes the empty
    half of its last tile of 128 for keys that score 0, where all others may score far less
    (github.com/pytorch/pytorch/issues/196678).

    >>> [n for n in (640, 700, 704, 768, 832) if is_unsafe(n)]
    [704, 832]
    """
    return keys % 128 == 64


# ------------------------------------------------------------------ finding them


AnyNorm = NormParts | LayerNormParts


def named(module: nn.Module, *names: str) -> Any:
    """The child that has one of these names."""
    return next((child for name in names if isinstance(child := getattr(module, name, None), nn.Module)), None)


def block_parts(block: nn.Module) -> BlockParts | str:
    attention, mlp = named(block, "self_attn", "attn"), named(block, "mlp")
    first, second = named(block, "input_layernorm", "ln_1"), named(block, "post_attention_layernorm", "ln_2")
    if any(part is None for part in (attention, mlp, first)):
        return "it is not built as norm, attention, norm, mlp"
    if any(hasattr(block, name) for name in OTHERS):
        return "it has norms in other places, or a second attention"
    posts = (None, None)
    if hasattr(block, "pre_feedforward_layernorm"):
        posts = norm_parts(second), norm_parts(named(block, "post_feedforward_layernorm"))
        second = named(block, "pre_feedforward_layernorm")
    own = norm_parts(first)
    found = own, attention_parts(attention), own if second is None else norm_parts(second), mlp_parts(mlp)
    if (why := next((part for part in (*found, *posts) if isinstance(part, str)), None)) is not None:
        return why
    drops = tuple(
        next((drop for names, of in zip(ending, (block, owner), strict=True) for name in names
              if isinstance(drop := getattr(of, name, None), nn.Dropout)), None)
        for ending, owner in zip(DROPS, (attention, mlp), strict=True)
    )  # fmt: skip
    known = {id(drop) for drop in (*drops, getattr(attention, "attn_dropout", None))}
    others = tuple(m for m in plain_modules(block).values() if isinstance(m, nn.Dropout) and id(m) not in known)
    inside = Inside.of(block)
    return BlockParts(*found, posts, second is None, drops, others, inside)  # type: ignore[arg-type]


@torch.no_grad()
def norm_parts(norm: nn.Module) -> AnyNorm | str:
    """A LayerNorm; or an RMSNorm, and whether its gain is w or w + 1: what it does with a row of numbers tells."""
    if type(norm) is nn.LayerNorm:
        return LayerNormParts(norm) if norm.elementwise_affine and norm.bias is not None else "a norm has no bias"
    weight = norm._parameters.get("weight")
    eps = next((e for name in ("variance_epsilon", "eps") if isinstance(e := getattr(norm, name, None), float)), None)
    if weight is None or weight.ndim != 1 or eps is None or norm._parameters.get("bias") is not None:
        return f"{type(norm).__name__} is no RMSNorm"
    from veneer.kernels.pieces import rms_norm

    x = torch.linspace(-3, 4, 2 * len(weight), device=weight.device).view(2, -1).to(weight.dtype)
    wanted = norm(x)
    near = 1e-5 if weight.dtype == torch.float32 else 2e-2
    for offset in (0.0, 1.0):
        got = rms_norm(x, weight, eps, offset)[0]
        if (got - wanted).float().norm() <= near * wanted.float().norm() + 1e-9:
            return NormParts(norm, eps, offset)
    return f"{type(norm).__name__} is no RMSNorm"


@torch.no_grad()
def mlp_parts(mlp: nn.Module) -> MlpParts | str:
    entry, down, gated = _mlp_layers(mlp)
    act = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", getattr(mlp, "act", None)))
    if not all(map(is_linear, (*entry, down))) or act is None:
        return f"{type(mlp).__name__} is no gated unit, nor one without a gate"
    known = {id(layer) for layer in (*entry, down)}
    if any(id(child) not in known and any(True for _ in child.parameters()) for child in mlp.children()):
        return f"{type(mlp).__name__} holds more than a gated unit"
    x = torch.linspace(-4, 4, GAUGE)[None]
    wanted, one = act(x), torch.ones_like(x)
    name = next((name for name in ACTIVATIONS if torch.allclose(glu(x, one, name), wanted, atol=1e-6)), None)
    if name is None:
        return f"its activation {type(act).__name__} is not known"
    drops = tuple(child for child in mlp.children() if isinstance(child, nn.Dropout))
    return MlpParts(entry, down, name, gated, drops)


def _mlp_layers(mlp: nn.Module) -> tuple[tuple[Any, ...], Any, bool]:
    """What reads the unit's input, what writes its output, and whether there is a gate."""
    down = named(mlp, "down_proj", "fc2", "c_proj")
    if (both := named(mlp, "gate_up_proj")) is not None:
        return (both,), down, True
    if (gate := named(mlp, "gate_proj")) is not None:
        return (gate, named(mlp, "up_proj")), down, True
    return (named(mlp, "up_proj", "fc1", "c_fc"),), down, False


def is_linear(layer: Any) -> bool:
    return isinstance(layer, nn.Module) and isinstance(op_for(type(layer)), LinearOp)


def attention_parts(attention: nn.Module) -> AttentionParts | str:
    qkv = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if not is_linear(qkv[0]):
        qkv = [named(attention, "qkv_proj", "c_attn")]
    out, head_dim = named(attention, "o_proj", "dense", "c_proj"), getattr(attention, "head_dim", None)
    if not all(map(is_linear, (*qkv, out))) or not isinstance(head_dim, int):
        return f"{type(attention).__name__} is not built from q, k, v and o"
    if (why := _unlike_attention(attention)) is not None:
        return f"{type(attention).__name__} {why}"
    config: Any = attention.config
    norms = [getattr(attention, n, None) for n in ("q_norm", "k_norm")]
    if any(n is not None for n in norms) and (len(qkv) == 1 or any(_is_wide(n, head_dim) for n in norms)):
        return f"{type(attention).__name__} norms more than single heads"
    heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_norms = (norms[0], norms[1]) if norms[0] is not None else None
    turned = getattr(attention, "rotary_ndims", 0 if hasattr(attention, "c_attn") else head_dim)
    return AttentionParts(attention, tuple(qkv), out, heads, head_dim, turned, head_norms)  # type: ignore[arg-type]


def _unlike_attention(attention: Any) -> str | None:
    """What an attention does that is not done here."""
    if any(getattr(attention, a, None) is None for a in ("scaling", "config")):
        return "does not say how it scales"
    if not hasattr(attention, "attention_dropout") and not hasattr(attention, "attn_dropout"):
        return "does not say whether it drops out"
    if getattr(attention.config, "attn_logit_softcapping", None) is not None:
        kind = original_class(type(attention))
        return None if f"{kind.__module__}.{kind.__name__}" in CAPPING else "caps its scores"
    if getattr(attention, "qk_layernorm", False):
        return "norms its heads by LayerNorms"
    if getattr(attention, "reorder_and_upcast_attn", False) or getattr(attention, "is_cross_attention", False):
        return "computes its scores in a way of its own"
    return None


def _is_wide(norm: Any, head_dim: int) -> bool:
    weight = getattr(norm, "_parameters", {}).get("weight")
    return weight is None or len(weight) != head_dim
