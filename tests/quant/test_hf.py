"""Loading through transformers: packed as it is read, never held whole, saved and loaded again bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_nets import error
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import veneer
from veneer import LoRA
from veneer.core.model import check_alive
from veneer.errors import CheckpointError
from veneer.quant.hf import VeneerConfig, VeneerQuantizer
from veneer.quant.layer import Packed, pack_layer
from veneer.quant.storage import Recipe

IDS = torch.arange(20)[None]


def llama(tie: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, tie_word_embeddings=tie,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    llama(request.param).save_pretrained(tmp_path / "whole", max_shard_size="100KB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 3
    return tmp_path / "whole"


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("ends", [False, True])
def test_packed_as_read_is_packed_later(folder: Path, tmp_path: Path, kind: str, ends: bool) -> None:
    told = VeneerConfig(kind, embedding=ends, head=ends)
    read = AutoModelForCausalLM.from_pretrained(folder, quantization_config=told, dtype=torch.float32)
    later = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    report = veneer.quantize(later, kind, embedding=ends, head=ends)
    assert len(report.layers) == (16 if ends else 14)
    assert torch.equal(read(IDS).logits, later(IDS).logits)
    for i, model in enumerate((read, later)):  # what is saved loads as it is
        model.save_pretrained(tmp_path / f"packed{i}")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"packed{i}")
        assert torch.equal(again(IDS).logits, read(IDS).logits)
        tied = read.config.tie_word_embeddings
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
        assert isinstance(again.lm_head, Packed) == ends
    saved = sum(f.stat().st_size for f in (tmp_path / "packed0").glob("*.safetensors"))
    assert saved < 0.65 * sum(f.stat().st_size for f in folder.glob("*.safetensors"))

    veneer.attach(again, LoRA(rank=4))
    again(IDS, labels=IDS).loss.backward()
    for p in again.parameters():
        assert p.requires_grad or p.grad is None
    with torch.no_grad():
        for n, p in again.named_parameters():
            if n.endswith("delta.B"):
                p.add_(0.1)
    again.zero_grad()
    again(IDS, labels=IDS).loss.backward()
    check_alive(again)


def test_dequantize_forgets_the_packing(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    veneer.quantize(model, "int8")
    assert json.loads(model.config.to_json_string())["quantization_config"]["kind"] == "int8"
    y = model(IDS).logits
    veneer.dequantize(model)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits) and error(model(IDS).logits, y) < 2e-2


def test_broken_values_in_the_file(folder: Path) -> None:
    shard = next(f for f in sorted(folder.glob("*.safetensors")) if any("q_proj" in k for k in load_file(f)))
    tensors = load_file(shard)
    name = next(k for k in tensors if "q_proj" in k)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"q_proj\.weight holds NaN"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=VeneerConfig("nf4"))


MEASURE = """
import sys, threading, time, torch
from transformers import AutoModelForCausalLM
from veneer.quant.hf import VeneerConfig, VeneerQuantizer
torch.set_num_threads(1)
def anonymous():  # private memory; pages of the mapped file are the system's to take back
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024
before, peak, done = anonymous(), [0.0], False
def watch():
    while not done:
        peak[0] = max(peak[0], anonymous()); time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
options = {"quantization_config": VeneerConfig("nf4"), "device_map": {"": "cpu"}}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, **options)
done = True; thread.join()
print(max(peak[0], anonymous()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the process's memory")
def test_the_full_model_is_never_held(tmp_path: Path) -> None:
    """160 MiB in shards: packed as it is read, the process grows by the packed model and a few tensors."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=1000, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path, max_shard_size="32MB")
    whole = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) / 2**20
    assert whole > 140
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path)]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    allowed = 0.27 * whole + 70  # what packing one tensor needs
    assert grown < allowed, f"{grown:.0f} MiB for a model of {whole:.0f}"


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_what_is_read_is_not_cast_to_codes_before_it_is_packed(folder: Path, kind: str) -> None:
    """transformers before 5.23 gives every tensor the type of its place in the model: codes of a byte, once packed."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).bfloat16()
    quantizer = VeneerQuantizer(VeneerConfig(kind), pre_quantized=False)
    quantizer._process_model_before_weight_loading(model)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype in (torch.uint8, torch.float8_e4m3fn):
        quantizer.get_quantize_ops().convert({name: torch.ones(128, 64).to(dtype)}, model=model)
    with pytest.raises(CheckpointError) as caught:
        quantizer._process_model_after_weight_loading(model)
    assert len(caught.value.problems) == 2 and "came as torch.uint8" in caught.value.problems[0]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_a_layer_without_values_takes_the_parts_of_one_with_values(kind: str, double: bool) -> None:
    for shape in ((5, 7), (1, 1), (3, 64), (600, 512)):
        found = []
        for device in ("meta", "cpu"):
            layer = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=torch.bfloat16)
            pack_layer(layer, Recipe(kind, double=double), None, None)
            found.append([(part.shape, part.dtype) for part in layer.parts])
        assert found[0] == found[1]


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_a_layer_without_values_is_packed_at_once(kind: str) -> None:
    """In pieces, as layers with values are, the skeleton of a 3B model took 10 of the 15 seconds of its loading."""
    calls = []
    for width in (64, 16384):
        with torch.device("meta"):
            layer = nn.Linear(width, width, bias=False)
        with Counting() as counting:
            pack_layer(layer, Recipe(kind), None, None)
        calls.append(counting.calls)
    assert calls[0] == calls[1]
