"""What the modules of a decoder block are, found by asking them instead of by their names alone.

A block is taken when it is built as

    x + attention(norm(x)), then x + mlp(norm(x)), both norms RMSNorms, the mlp a gated unit

which Llama, Mistral, Qwen 2 and 3, Gemma, Phi 3 and many others are. Whether a norm multiplies by w or by w + 1, and
which function an activation is, is tried out on a few numbers; that the block as a whole does what its parts say, by
`fuse.py` on a few tokens. Every answer is either the part or a sentence that says why not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.host import Hosted, original_class
from veneer.kernels.block import Norm, Unit, rotated
from veneer.kernels.group import Group, all_bare, untouched
from veneer.kernels.pieces import ACTIVATIONS, glu

__all__ = [
    "AttentionParts",
    "BlockParts",
    "MlpParts",
    "NormParts",
    "attention_parts",
    "block_parts",
    "mlp_parts",
    "norm_parts",
]

OTHER_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm", "ffn_norm", "post_mlp_layernorm")
DROPS = ("resid_attn_dropout", "resid_mlp_dropout", "resid_dropout")
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
class MlpParts:
    entry: tuple[nn.Linear, ...]  # gate and up, or one layer for both
    down: nn.Linear
    act: str

    def now(self, dtype: torch.dtype, batch: int) -> Unit | str:
        entry, down = all_bare(self.entry, dtype, batch), all_bare([self.down], dtype, batch)
        if isinstance(entry, str) or isinstance(down, str):
            return entry if isinstance(entry, str) else str(down)
        return Unit(entry, down, self.act)


@dataclass(frozen=True)
class AttentionParts:
    module: nn.Module
    qkv: tuple[nn.Linear, ...]
    out: nn.Linear
    heads: tuple[int, int]
    head_dim: int
    head_norms: tuple[nn.Module, nn.Module] | None

    def now(self, dtype: torch.dtype, batch: int) -> tuple[Group, Group] | str:
        if (why := untouched(self.module)) is not None:
            return why
        qkv, out = all_bare(self.qkv, dtype, batch), all_bare([self.out], dtype, batch)
        if isinstance(qkv, str) or isinstance(out, str):
            return qkv if isinstance(qkv, str) else str(out)
        return qkv, out

    def attend(
        self, cos: Tensor, sin: Tensor, mask: Tensor | None, options: dict[str, Any], cache: Any = None
    ) -> Callable[..., Tensor]:
        """q, k, v as (batch, tokens, heads, d) -> what the model's own attention makes of them, by tokens."""
        module = self.module
        kernel: Any = interface(module)
        window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
        dropout = module.attention_dropout if module.training else 0.0

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.head_norms is not None:
                q, k = rotated(self.head_norms[0](q), cos, sin), rotated(self.head_norms[1](k), cos, sin)
            keys, values = k.transpose(1, 2), v.transpose(1, 2)
            if cache is not None:
                keys, values = cache.update(keys, values, module.layer_idx)
            with quickest(q):
                o, _ = kernel(
                    module, q.transpose(1, 2), keys, values, mask, dropout=dropout,
                    scaling=module.scaling, sliding_window=window, **options,
                )  # fmt: skip
            return o.reshape(*q.shape[:2], -1)

        return attend


@dataclass(frozen=True)
class BlockParts:
    first: NormParts
    attention: AttentionParts
    second: NormParts
    mlp: MlpParts
    mlp_module: nn.Module
    drops: tuple[nn.Dropout, ...]


def interface(module: nn.Module) -> Callable[..., Any]:
    """The attention that the model's configuration names."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[original_class(type(module)).__module__], "eager_attention_forward", None)
    name = module.config._attn_implementation
    return eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[return-value]


def quickest(q: Tensor) -> AbstractContextManager[Any]:
    """On Hopper, cuDNN's attention takes 0.7 of the time of the flash kernel that would come first."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) < (9, 0):
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


# ------------------------------------------------------------------ finding them


def block_parts(block: nn.Module) -> BlockParts | str:
    attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
    first, second = getattr(block, "input_layernorm", None), getattr(block, "post_attention_layernorm", None)
    if not all(isinstance(part, nn.Module) for part in (attention, mlp, first, second)):
        return "it is not built as norm, attention, norm, mlp"
    if any(hasattr(block, name) for name in OTHER_NORMS):
        return "it has norms in other places"
    found = norm_parts(first), attention_parts(attention), norm_parts(second), mlp_parts(mlp)
    if (why := next((part for part in found if isinstance(part, str)), None)) is not None:
        return why
    drops = tuple(getattr(block, name) for name in DROPS if isinstance(getattr(block, name, None), nn.Dropout))
    return BlockParts(*found, mlp, drops)  # type: ignore[arg-type]


@torch.no_grad()
def norm_parts(norm: nn.Module) -> NormParts | str:
    """An RMSNorm, and whether its gain is w or w + 1: what it does with a row of numbers tells."""
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
    linears = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    entry = linears[:2] if isinstance(linears[0], nn.Linear) else [getattr(mlp, "gate_up_proj", None)]
    act = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    if not all(isinstance(layer, nn.Linear) for layer in (*entry, linears[2])) or act is None:
        return f"{type(mlp).__name__} is no gated unit"
    known = {id(layer) for layer in (*entry, linears[2])}
    if any(id(child) not in known and any(True for _ in child.parameters()) for child in mlp.children()):
        return f"{type(mlp).__name__} holds more than a gated unit"
    x = torch.linspace(-4, 4, GAUGE)[None]
    wanted, one = act(x), torch.ones_like(x)
    name = next((name for name in ACTIVATIONS if torch.allclose(glu(x, one, name), wanted, atol=1e-6)), None)
    return MlpParts(tuple(entry), linears[2], name) if name else f"its activation {type(act).__name__} is not known"  # type: ignore[arg-type]


def attention_parts(attention: nn.Module) -> AttentionParts | str:
    qkv = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if not isinstance(qkv[0], nn.Linear):
        qkv = [getattr(attention, "qkv_proj", None)]
    out, head_dim = getattr(attention, "o_proj", None), getattr(attention, "head_dim", None)
    name = type(attention).__name__
    if not all(isinstance(layer, nn.Linear) for layer in (*qkv, out)) or not isinstance(head_dim, int):
        return f"{name} is not built from q, k, v and o"
    if any(getattr(attention, a, None) is None for a in ("scaling", "config", "attention_dropout")):
        return f"{name} does not say how it scales"
    config: Any = attention.config
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{name} caps its scores"
    norms = [getattr(attention, n, None) for n in ("q_norm", "k_norm")]
    if any(n is not None for n in norms) and (len(qkv) == 1 or any(_is_wide(n, head_dim) for n in norms)):
        return f"{name} norms more than single heads"
    heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_norms = (norms[0], norms[1]) if norms[0] is not None else None
    return AttentionParts(attention, tuple(qkv), out, heads, head_dim, head_norms)  # type: ignore[arg-type]


def _is_wide(norm: Any, head_dim: int) -> bool:
    weight = getattr(norm, "_parameters", {}).get("weight")
    return weight is None or len(weight) != head_dim
