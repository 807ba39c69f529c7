"""Attention within the samples of one long row, at the cost of the samples and not of the row.

    row      a a a b b c c c c         three samples end to end, no padding
    bounds   0 3 5 9                   where each begins, and the end

A mask over the row would cost tokens x tokens, however little of it counts. Here each sample is a sequence of its own,
so nothing of another can enter: on a GPU in one kernel (torch.nn.attention.varlen), else sample by sample through
scaled_dot_product_attention, which is the specification and, having no mask, the quicker way on a CPU as well.

transformers finds `attention` under NAME in its table of attention functions. The bounds reach it by the names that the
library gives them (cu_seq_lens_q, max_length_q), which its models hand on; a call without them is passed to the usual
function, mask and all, so a model that was switched over (`within`) still evaluates padded rows and generates.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from veneer.errors import StateError

__all__ = ["MARK", "NAME", "attend_each", "attention", "obstacle", "within"]

NAME = "veneer_varlen"
MARK = (1, 1, 1, 1)  # the shape of a mask that says: the bounds are the mask. transformers passes 4-D masks on
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what the usual function might be told, and this one cannot do
WIDEST_HEAD = 256


def attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads t d"],
    key: Float[Tensor, "batch few n d"],
    value: Float[Tensor, "batch few n e"],
    attention_mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch t heads e"], None]:
    """What transformers calls. With bounds: within the samples; without: its own sdpa function."""
    if cu_seq_lens_q is None or max_length_q is None:
        if attention_mask is not None and attention_mask.shape == MARK and query.shape[2] > 1:
            raise StateError(f"{type(module).__name__} was not handed the bounds of the samples in its row")
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        more = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more, **options)
    if told := [name for name in UNKNOWN if options.get(name) is not None]:
        what = f"{type(module).__name__} asks for {', '.join(told)}, which attention by samples does not know"
        raise StateError(what)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if len(cu_seq_lens_q) == 2 and (sliding_window is None or sliding_window >= max_length_q):
        return _one_sample(module, query, key, value, dropout=dropout, scaling=scaling, is_causal=causal)
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]
    o = attend_each(
        *rows, cu_seq_lens_q, max_length_q, scale=scaling, window=sliding_window, causal=causal, dropout=dropout
    )
    return o.view(query.shape[0], query.shape[2], *o.shape[1:]), None


def _one_sample(module: nn.Module, *qkv: Tensor, **options: Any) -> tuple[Tensor, None]:
    """A row that is one sample needs no bounds, and the kernels that know none are quicker (cuDNN's, on Hopper)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, *qkv, None, **options)


def attend_each(
    q: Float[Tensor, "t heads d"], k: Float[Tensor, "t few d"], v: Float[Tensor, "t few e"],
    bounds: Tensor, longest: int, *, scale: float | None = None, window: int | None = None, causal: bool = True,
    dropout: float = 0.0,
) -> Float[Tensor, "t heads e"]:  # fmt: skip
    """Each sample's attention. `window`: a token sees that many, itself and those before it."""
    if window is not None and window >= longest:
        window = None
    if dropout or not _kernel_takes(q, v, causal, window):
        return _one_by_one(q, k, v, bounds, scale, window, causal, dropout)
    from torch.nn.attention.varlen import varlen_attn

    span = (-1, 0) if window is None else (window - 1, 0)
    more = {"enable_gqa": q.shape[1] != k.shape[1]} if "enable_gqa" in _kernel_options() else {}
    q, k, v = (t.contiguous() for t in (q, k, v))
    return varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=span if causal else (-1, -1), **more
    )  # type: ignore[return-value]


@cache
def _kernel_options() -> frozenset[str]:
    """What torch's function can be told, in this version of it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _kernel_takes(q: Tensor, v: Tensor, causal: bool, window: int | None) -> bool:
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or "window_size" not in _kernel_options():
        return False
    size = q.shape[-1]
    if size % 8 or size > WIDEST_HEAD or v.shape[-1] != size or (window is not None and not causal):
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float | None, window: int | None, causal: bool,
    dropout: float,
) -> Tensor:  # fmt: skip
    lengths = [length for length in bounds.diff().tolist() if length]  # a batch may be filled up with empty samples
    found = []
    for parts in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
        one, two, three = (part.transpose(0, 1)[None] for part in parts)
        band = None if window is None or one.shape[2] <= window else _band(one.shape[2], window, causal, q.device)
        o = F.scaled_dot_product_attention(
            one, two, three, attn_mask=band, dropout_p=dropout, is_causal=causal and band is None, scale=scale,
            enable_gqa=one.shape[1] != two.shape[1],
        )  # fmt: skip
        found.append(o[0].transpose(0, 1))
    return torch.cat(found)


def _band(n: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """True where a token of a sample may look."""
    ahead = torch.arange(n, device=device)
    distance = ahead[:, None] - ahead
    return (distance < window) & (distance >= 0) if causal else distance.abs() < window


# ------------------------------------------------------------------ switching a model over


def obstacle(model: nn.Module) -> str | None:
    """Why this model's attention cannot be told the bounds, as far as it says so itself; or None."""
    config = getattr(model, "config", None)
    now = getattr(config, "_attn_implementation", None)
    if now != "sdpa":
        return f"its attention is {now or 'its own'}, which is left as it is"
    able = getattr(model, "_can_set_attn_implementation", None)
    if able is None or not able() or not hasattr(model, "set_attn_implementation"):
        return "its attention is not looked up in transformers' table"
    weight = next(model.parameters())
    if weight.is_cuda and (weight.dtype == torch.float32 or getattr(config, "attention_dropout", 0)):
        return "on a GPU the kernel takes bf16 and no dropout of attention"
    return None


@contextmanager
def within(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """The model's attention looked up under NAME; afterwards as it was."""
    if not wanted:
        yield
        return
    if why := obstacle(model):
        raise StateError(f"attention by samples: {why}")
    _register()
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
