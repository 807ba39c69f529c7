"""Which output rows of a fused q-k-v matrix are q, which are k and which are v.

    layout        rows                                             families (config.model_type)
    stacked       all q, all k, all v                              gpt2, mpt, qwen, phi3, dbrx, gpt_bigcode, chatglm
    interleaved   q, k and v of the first head, of the second ...  gpt_neox, bloom

The preset "minimal" means q and v, so inside a fused matrix it adapts those rows only. A family whose layout is not
known here is refused by the preset, never guessed.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.core.op import op_of
from veneer.errors import TargetError

__all__ = ["INTERLEAVED", "STACKED", "fused_parts"]

Ranges = list[tuple[int, int]]

STACKED = ("gpt2", "mpt", "qwen", "phi3", "phi4_multimodal", "dbrx", "gpt_bigcode", "chatglm")
INTERLEAVED = ("gpt_neox", "gpt_neox_japanese", "bloom")


def fused_parts(model: nn.Module, name: str, layer: nn.Module) -> dict[str, Ranges]:
    """{"q": row ranges, "k": ..., "v": ...} for the fused layer `name` of a transformers model."""
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    out, width = op_of(layer).shape(layer)
    if family in INTERLEAVED:
        return _interleaved(out, _first(config, "num_attention_heads", "n_head"))
    if family in STACKED:
        heads = _first(config, "num_attention_heads", "n_head", "n_heads")
        return _stacked(out, heads, _first(config, "head_dim", "kv_channels") or width // heads)
    raise TargetError(
        f"{name} holds q, k and v in one matrix, and how {family or type(model).__name__} orders them is not known",
        fix="targets=['" + name.rsplit(".", 1)[-1] + "'] adapts the whole matrix; delta='fused' with "
        "options={'parts': [...]} adapts the rows you name",
    )


def _first(config: Any, *names: str) -> int:
    return next((int(v) for n in names if (v := getattr(config, n, None))), 0)


def _stacked(out: int, heads: int, head: int) -> dict[str, Ranges]:
    q = heads * head
    kv = (out - q) // 2
    return {"q": [(0, q)], "k": [(q, q + kv)], "v": [(q + kv, out)]}


def _interleaved(out: int, heads: int) -> dict[str, Ranges]:
    head = out // (3 * heads)
    return {
        part: [(3 * head * i + offset * head, 3 * head * i + (offset + 1) * head) for i in range(heads)]
        for offset, part in enumerate("qkv")
    }
