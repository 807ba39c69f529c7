"""bitsandbytes' files: what is written is what it writes itself, and transformers loads it with bitsandbytes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import veneer
from veneer import LoRA
from veneer.core.weight import read_weight
from veneer.errors import CheckpointError, StateError
from veneer.quant.layer import Packed
from veneer.quant.nf4 import QUANTILES

IDS = torch.arange(20)[None]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=512)).eval()


MODELS = {"llama": llama, "gpt2": gpt2}


def told(state: dict[str, Tensor], name: str) -> dict[str, Any]:
    return json.loads(bytes(state[f"{name}.weight.quant_state.bitsandbytes__nf4"].tolist()))


@pytest.mark.parametrize("double", [True, False])
def test_the_published_layout_of_nf4(tmp_path: Path, double: bool) -> None:
    model, name = llama(), "model.layers.0.mlp.up_proj"
    veneer.quantize(model, "nf4", block=128, double=double)
    layer = model.get_submodule(name)
    before = model(IDS).logits
    assert veneer.save_bitsandbytes(model, tmp_path / "out") == tmp_path / "out"
    assert torch.equal(model(IDS).logits, before) and model.config.quantization_config.quant_method == "veneer"
    state = load_file(tmp_path / "out" / "model.safetensors")
    mine = {key.removeprefix(name): t for key, t in state.items() if key.startswith(name)}
    nested = {".weight.nested_absmax", ".weight.nested_quant_map"} if double else set()
    names = {".weight", ".weight.absmax", ".weight.quant_map", ".weight.quant_state.bitsandbytes__nf4"}
    assert mine.keys() == names | nested
    assert mine[".weight"].shape == (128 * 64 // 2, 1) and mine[".weight"].dtype == torch.uint8
    assert torch.equal(mine[".weight"].flatten(), layer.parts[0].flatten())
    assert torch.equal(mine[".weight.absmax"], layer.parts[1])
    assert mine[".weight.absmax"].dtype == (torch.uint8 if double else torch.float32)
    assert mine[".weight.quant_map"].tolist() == list(QUANTILES)
    facts = {"quant_type": "nf4", "blocksize": 128, "dtype": "float32", "shape": [128, 64]}
    if double:
        facts |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(layer.parts[-1])}
    assert told(state, name) == facts
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_use_double_quant"] is double and config["llm_int8_skip_modules"] == ["lm_head"]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_it_with_bitsandbytes(kind: str, family: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bnb = pytest.importorskip("bitsandbytes")
    model = MODELS[family]()
    veneer.quantize(model, kind, rotate=False)
    veneer.save_bitsandbytes(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu").eval()
    packed = [n for n, m in model.named_modules() if isinstance(m, Packed)]
    theirs = bnb.nn.Linear4bit if kind == "nf4" else bnb.nn.Linear8bitLt
    assert packed == [n for n, m in again.named_modules() if isinstance(m, theirs)]
    near = 1e-5 if kind == "nf4" else 2e-2  # bitsandbytes multiplies 8 bits in fp16
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=near, atol=near)
    weights = [read_weight(model.get_submodule(n)) for n in packed]
    assert sorted(veneer.adopt(again)) == sorted(packed)  # and the way back
    for name, w in zip(packed, weights, strict=True):
        back = read_weight(again.get_submodule(name)).to(w.dtype)
        torch.testing.assert_close(back.T if family == "gpt2" else back, w, rtol=1e-3, atol=1e-4)


def test_what_its_files_cannot_hold(tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = llama()
    with pytest.raises(StateError, match="no layer of this model is packed"):
        veneer.save_bitsandbytes(model, out)
    veneer.quantize(model, "fp8", targets=["q_proj"])
    veneer.quantize(model, "nf4", targets=["k_proj"], embedding=True)
    with pytest.raises(CheckpointError, match="Embedding is no linear layer") as told:
        veneer.save_bitsandbytes(model, out)
    assert "stored as fp8" in str(told.value) and "several ways" in str(told.value)
    model = llama()
    veneer.quantize(model, "int8")
    with pytest.raises(CheckpointError, match="rotate=False"):
        veneer.save_bitsandbytes(model, out)
    model = llama()
    veneer.quantize(model, "nf4")
    veneer.attach(model, LoRA(rank=2))
    with pytest.raises(StateError, match="adapters lie on the model"):
        veneer.save_bitsandbytes(model, out)
    with pytest.raises(StateError, match="no model of transformers"):
        veneer.save_bitsandbytes(nn.Linear(2, 2), out)
    assert not out.exists()
