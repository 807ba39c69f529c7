"""Which output rows of a fused q-k-v matrix are q, which are k and which are v.

    layout        rows                                                families (config.model_type)
    stacked       all q, all k, all v                                 gpt2, mpt, qwen, phi3, dbrx, chatglm; falcon and
                                                                      gpt_bigcode with one k and v for all heads;
                                                                      and timm's, told by the class that holds them
    interleaved   q, k and v of the first head, of the second ...     gpt_neox, bloom, persimmon; gpt_bigcode and falcon
                                                                      with a k and v for each head
    grouped       the q of all heads that share a k and v, these      falcon's new architecture
    quarters      a quarter of all q, of all v, of all k; four times  codegen

Each is a number of groups, and what follows what inside one. The preset "minimal" means q and v, so inside a fused
matrix it adapts those rows only. A family whose layout is not known here is refused by the preset, never guessed;
tests/laws/test_fused.py holds each one to the keys that the model itself caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from veneer.core.op import op_of
from veneer.errors import TargetError

__all__ = ["LAYOUTS", "Layout", "fused_parts"]

Ranges = list[tuple[int, int]]


class Layout(NamedTuple):
    """`groups` times the same sequence of parts, each with so many rows."""

    groups: int
    rows: dict[str, int]  # in the order in which they stand

    def ranges(self, part: str) -> Ranges:
        names, step = list(self.rows), sum(self.rows.values())
        start = sum(self.rows[name] for name in names[: names.index(part)])
        return [(i * step + start, i * step + start + self.rows[part]) for i in range(self.groups)]


def _stacked(config: Any, out: int, width: int) -> Layout:
    heads = _heads(config)
    q = heads * (_first(config, "head_dim", "kv_channels") or width // heads)
    return Layout(1, {"q": q, "k": (out - q) // 2, "v": (out - q) // 2})


def _interleaved(config: Any, out: int, width: int) -> Layout:
    return Layout(_heads(config), dict.fromkeys("qkv", out // (3 * _heads(config))))


def _bigcode(config: Any, out: int, width: int) -> Layout:
    return (_stacked if config.multi_query else _interleaved)(config, out, width)


def _falcon(config: Any, out: int, width: int) -> Layout:
    if not config.new_decoder_architecture:
        return _bigcode(config, out, width)
    groups = config.num_kv_heads
    head = out // (_heads(config) + 2 * groups)
    return Layout(groups, {"q": head * _heads(config) // groups, "k": head, "v": head})


def _codegen(config: Any, out: int, width: int) -> Layout:
    return Layout(4, dict.fromkeys("qvk", out // 12))


def _vision(config: Any, out: int, width: int) -> Layout:
    """The vision towers of these keep q, k and v in one matrix; their language models do not."""
    return Layout(1, dict.fromkeys("qkv", out // 3))


LAYOUTS: dict[str, Callable[[Any, int, int], Layout]] = {
    **dict.fromkeys(("gpt2", "mpt", "qwen", "phi3", "phi4_multimodal", "dbrx", "chatglm"), _stacked),
    **dict.fromkeys(("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"), _interleaved),
    "gpt_bigcode": _bigcode,
    "falcon": _falcon,
    "codegen": _codegen,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _vision),
}


def fused_parts(model: nn.Module, name: str, layer: nn.Module) -> dict[str, Ranges]:
    """{"q": row ranges, "k": ..., "v": ...} for the fused layer `name` of a transformers model."""
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if type(model.get_submodule(name.rpartition(".")[0])).__module__.partition(".")[0] == "timm":
        out, _ = op_of(layer).shape(layer)
        return {part: Layout(1, dict.fromkeys("qkv", out // 3)).ranges(part) for part in "qkv"}
    if family in LAYOUTS:
        layout = LAYOUTS[family](config, *op_of(layer).shape(layer))
        return {part: layout.ranges(part) for part in "qkv"}
    raise TargetError(
        f"{name} holds q, k and v in one matrix, and how {family or type(model).__name__} orders them is not known",
        fix="targets=['" + name.rsplit(".", 1)[-1] + "'] adapts the whole matrix; delta='fused' with "
        "options={'parts': [...]} adapts the rows you name",
    )


def _heads(config: Any) -> int:
    return _first(config, "num_attention_heads", "n_head", "n_heads")


def _first(config: Any, *names: str) -> int:
    return next((int(v) for n in names if (v := getattr(config, n, None))), 0)
