"""Packed bases on the command line: what cannot be packed, packed twice or merged into is said with the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import veneer as library

FEW = ("--steps", 1, "--r", 2, "--val", 0, "--lr", "1e-2", "--batch-size", 2)


@pytest.fixture
def data(own_folder: Path) -> Path:
    rows = [{"prompt": f"say {word}", "completion": word} for word in ("tar", "find", "grep", "sort")]
    (own_folder / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return own_folder / "d.jsonl"


@pytest.fixture
def packed_folder(tiny_folder: Path, tiny_tokenizer: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    library.quantize(model, "nf4", data=[{"input_ids": torch.arange(3, 27).view(2, 12)}])
    model.save_pretrained(tiny_folder.parent / "packed")
    tiny_tokenizer.save_pretrained(tiny_folder.parent / "packed")
    return tiny_folder.parent / "packed"


@pytest.mark.parametrize("quant", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_no_numbers_are_named(
    quant: str, value: str, veneer: Callable[..., Any], tiny_folder: Path, data: Path
) -> None:
    weights = load_file(tiny_folder / "model.safetensors")
    broken = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    for name in broken:
        weights[name][0, 1] = float(value)
    save_file(weights, tiny_folder / "model.safetensors", {"format": "pt"})
    said = veneer("train", tiny_folder, data, "--quant", quant, *FEW)
    assert said.code == 2 and "the weights cannot be packed" in said.err
    assert all(f"{name} holds NaN or infinite values" in said.err for name in broken)


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_folder_is_not_packed_twice(
    command: str, quant: str, veneer: Callable[..., Any], packed_folder: Path, data: Path
) -> None:
    """transformers would keep what the folder holds, whatever is asked for."""
    said = veneer(command, packed_folder, data, "--quant", quant, *FEW)
    assert said.code == 2 and f"is packed already (nf4), so it cannot be packed as {quant}" in said.err
    assert "leave quant out" in said.err


def test_a_packed_folder_is_trained_on_and_asked_and_not_merged_into(
    veneer: Callable[..., Any], packed_folder: Path, tiny_folder: Path, data: Path
) -> None:
    assert veneer("train", packed_folder, data, "--out", "run", *FEW).code == 0
    said = veneer("chat", "run", "-p", "hi", "--max-tokens", 2)
    assert said.code == 0 and "quantization_config" not in said.err and "answered as when" in said.err
    said = veneer("merge", "run", "--out", "merged")
    assert said.code == 2 and "up_proj.weight: packed, as torch.uint8" in said.err
    assert "--base on the command line" in said.err and not Path("merged").exists()
    assert veneer("merge", "run", "--base", tiny_folder, "--out", "merged").code == 0


def test_runs_on_a_folder_that_was_packed_once_share_their_base(
    veneer: Callable[..., Any], packed_folder: Path, data: Path
) -> None:
    """Its codes went by the inputs that were looked at then, not by the data of each run."""
    other = data.with_name("other.jsonl")
    other.write_text(data.read_text().replace("say", "name"))
    for rows, run in ((data, "a"), (other, "b")):
        assert veneer("train", packed_folder, rows, "--out", run, *FEW).code == 0
    said = veneer("chat", "a", "--vs", "b", "-p", "hi", "--max-tokens", 2)
    assert said.code == 0 and "packed apart" not in said.err
