"""q and v alone inside a fused matrix, on the models themselves: the keys that a model caches are the base's to the
bit, the values are not, and the queries alone change the answer too. No layout is taken on trust."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

import veneer
from veneer import LoRA
from veneer.core.fused import LAYOUTS
from veneer.core.model import adapter_of, parameters, sites

SIZES = {
    "vocab_size": 23, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 48} | {
    k: v for k, v in SIZES.items() if k.endswith("_id") or k == "vocab_size"
}
IDS = torch.randint(0, 23, (2, 7), generator=torch.Generator().manual_seed(0))


def config(name: str, **values: Any) -> Callable[[], PretrainedConfig]:
    return lambda: getattr(transformers, name)(**values)


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": config("GPT2Config", **GPT),
    "gpt_bigcode": config("GPTBigCodeConfig", **GPT, multi_query=False),
    "gpt_bigcode-one-kv-head": config("GPTBigCodeConfig", **GPT, multi_query=True),
    "phi3": config("Phi3Config", **SIZES, num_key_value_heads=4),
    "phi3-grouped": config("Phi3Config", **SIZES, num_key_value_heads=2),
    "gpt_neox": config("GPTNeoXConfig", **SIZES),
    "bloom": config("BloomConfig", vocab_size=23, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
    "mpt": config("MptConfig", vocab_size=23, d_model=32, n_layers=2, n_heads=4, max_seq_len=32),
    "dbrx": config(
        "DbrxConfig", vocab_size=23, d_model=32, n_layers=2, n_heads=4, max_seq_len=32,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 2},
    ),
    "persimmon": config("PersimmonConfig", **SIZES, qk_layernorm=False),
    "falcon": config("FalconConfig", **SIZES, new_decoder_architecture=False, multi_query=False, alibi=False),
    "falcon-one-kv-head": config("FalconConfig", **SIZES, multi_query=True, alibi=False),
    "falcon-grouped": config("FalconConfig", **SIZES, new_decoder_architecture=True, num_kv_heads=2, alibi=False),
    "codegen": config("CodeGenConfig", **{**GPT, "n_head": 8}, rotary_dim=4),
}  # fmt: skip


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()


@torch.no_grad()
def answer(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of the first block as they are cached, and the logits."""
    out = model(input_ids=IDS, use_cache=True)
    first = out.past_key_values.layers[0]
    return first.keys, first.values, out.logits


def spread(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in parameters(model).values():
            p.normal_(std=0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_minimal_moves_queries_and_values_and_no_key(family: str) -> None:
    model = build(family)
    keys, values, logits = answer(model)
    report = veneer.attach(model, LoRA(rank=2, targets="minimal"))
    assert len(report.sites) == 2
    spread(model)
    k, v, y = answer(model)
    assert torch.equal(k, keys), "a key moved"
    moved = (v - values).abs().amax((0, 2))  # (heads, head_dim) or (head_dim,)
    assert bool((moved > 0).all()), "a value did not move"
    with torch.no_grad():
        for layer in sites(model).values():
            delta = adapter_of(layer).delta
            delta.B[delta.sizes[0] :] = 0  # what is left moves queries only
    k, v, only_queries = answer(model)
    assert torch.equal(k, keys) and torch.equal(v, values)
    assert not torch.allclose(only_queries, logits, atol=1e-5)
    spread(model)
    veneer.merge(model)
    torch.testing.assert_close(answer(model)[2], y, rtol=1e-3, atol=1e-4)


def test_every_family_with_a_known_layout_that_transformers_has_is_here() -> None:
    known = {*LAYOUTS}
    elsewhere = {"qwen", "chatglm"}  # code that comes with the weights; stacked, as their authors' rows are
    pictures = {
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
    }  # in the vision tower: tests/tasks/test_image_text.py
    alike = {"gpt_neox_japanese", "phi4_multimodal"}  # the same module as their namesakes
    assert known - elsewhere - pictures - alike <= {family.partition("-")[0] for family in FAMILIES}
