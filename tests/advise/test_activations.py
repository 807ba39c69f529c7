"""What backward keeps, piece by piece: the formula against torch's own account on real models with real adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from veneer.advise.activations import Pass, kept
from veneer.advise.shapes import shapes_of
from veneer.core.model import attach, sites
from veneer.core.spec import LoRA

ROWS, TOKENS, RANK = 2, 64, 8
LLAMA = {
    "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 16},
    "gpt2": {"n_embd": 128, "n_inner": 352, "n_head": 8, "vocab_size": 300},
    "bert": {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 8, "vocab_size": 300},
    "distilbert": {"dim": 128, "hidden_dim": 352, "n_heads": 8, "vocab_size": 300},
    "vit": {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 8, "image_size": 64, "patch_size": 8},
    "t5": {"d_model": 128, "d_ff": 352, "num_heads": 8, "d_kv": 16, "vocab_size": 300, "decoder_start_token_id": 0},
    "bart": {"d_model": 128, "encoder_ffn_dim": 352, "decoder_ffn_dim": 352, "encoder_attention_heads": 8,
             "decoder_attention_heads": 8, "vocab_size": 300},
}  # fmt: skip
DEPTH = {
    "gpt2": ["n_layer"],
    "distilbert": ["n_layers"],
    "t5": ["num_layers"],
    "bart": ["encoder_layers", "decoder_layers"],
}
FP32, BF16 = torch.float32, torch.bfloat16


def build(family: str, depth: int, dtype: torch.dtype, method: str, attention: str, spec: dict[str, Any]) -> Any:
    layers = dict.fromkeys(DEPTH.get(family, ["num_hidden_layers"]), depth)
    config = transformers.AutoConfig.for_model(family, **CONFIGS[family], **layers, pad_token_id=0)
    config._attn_implementation = attention
    kind = {"bert": "SequenceClassification", "distilbert": "SequenceClassification", "vit": "ImageClassification"}
    kind |= {"t5": "Seq2SeqLM", "bart": "Seq2SeqLM"}
    make = getattr(transformers, f"AutoModelFor{kind.get(family, 'CausalLM')}")
    model = make.from_config(config, dtype=dtype).train()
    if method == "lora":
        whole = ["classifier"] if "Classification" in kind.get(family, "") else []
        attach(model, LoRA(rank=RANK, alpha=16, modules_to_save=whole, **spec), dtype=FP32)
    return model


def inputs_of(family: str, dtype: torch.dtype, padded: bool) -> dict[str, Any]:
    if family == "vit":
        return {"pixel_values": torch.randn(ROWS, 3, 64, 64, dtype=dtype)}
    ids = torch.randint(3, 299, (ROWS, TOKENS))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, TOKENS // 2 :] = 0
    more = {"labels": ids} if family in ("t5", "bart") else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def saved_bytes(model: Any, inputs: dict[str, Any]) -> int:
    """Bytes of all storages that autograd keeps, parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(size for size, _ in seen.values())


CASES = [
    *((family, FP32, "lora", "sdpa", True, {}) for family in CONFIGS),
    *((family, FP32, "full", "sdpa", True, {}) for family in ("llama", "qwen3", "gpt2", "bert", "vit")),
    *((family, BF16, "lora", "sdpa", True, {}) for family in ("llama", "qwen3", "gpt2", "bert", "vit")),
    ("llama", BF16, "full", "sdpa", False, {}),
    ("llama", FP32, "lora", "sdpa", False, {}),
    ("llama", FP32, "lora", "eager", True, {}),
    ("llama", BF16, "lora", "eager", True, {}),
    ("llama", FP32, "lora", "sdpa", True, {"dropout": 0.1}),
    ("llama", FP32, "lora", "sdpa", True, {"targets": "attention"}),
    ("llama", FP32, "lora", "sdpa", True, {"targets": ["down_proj"]}),
    ("llama", FP32, "lora", "sdpa", True, {"combine": "dora"}),
    ("llama", BF16, "lora", "sdpa", True, {"combine": "dora", "dropout": 0.1}),
]


@pytest.mark.parametrize(
    ("family", "dtype", "method", "attention", "padded", "spec"),
    CASES,
    ids=[
        "-".join(map(str, (*c[:1], str(c[1])[6:], *c[2:4], "padded" if c[4] else "even", *c[5].values())))
        for c in CASES
    ],
)
def test_one_more_block_keeps_what_the_formula_says(
    family: str, dtype: torch.dtype, method: str, attention: str, padded: bool, spec: dict[str, Any]
) -> None:
    sizes = []
    for depth in (2, 3):
        model = build(family, depth, dtype, method, attention, spec)
        sizes.append(saved_bytes(model, inputs_of(family, dtype, padded)))
    shapes = shapes_of(model)
    adapted = set(sites(model)) if method == "lora" else set()
    tokens = shapes.tokens_fixed or TOKENS
    told, casts = 0.0, 0
    for block in shapes.blocks:
        here = [m for m in block.matrices if f"{block.path.format(0)}.{m.name}" in adapted]
        casts += sum(RANK * (m.out + m.n) for m in here) * (dtype.itemsize if dtype.itemsize < 4 else 0)
        how = Pass(
            tokens=tokens,
            width=dtype.itemsize,
            full=method == "full",
            ranks={m.name: RANK for m in here},
            dropout=spec.get("dropout", 0.0),
            dora=spec.get("combine") == "dora",
            attention=attention,
            padded=padded and family != "vit",
        )
        told += sum(kept(block, how).values()) * tokens * ROWS
    assert told + casts == pytest.approx(sizes[1] - sizes[0], rel=0.02)


def test_pieces_of_the_published_table() -> None:
    """180 KiB a token and layer for stock autograd of Llama-3.1-8B with adapters, in bf16 and without a mask."""
    block = shapes_of("8B").blocks[0]
    how = Pass(tokens=2048, width=2, ranks={m.name: 16 for m in block.matrices}, gpu=True)
    assert sum(kept(block, how).values()) / 2**10 == pytest.approx(180, rel=0.01)


def test_recomputation_keeps_eight_kibibytes() -> None:
    assert shapes_of("8B").blocks[0].hidden * 2 / 2**10 == 8
