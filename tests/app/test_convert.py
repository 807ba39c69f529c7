"""convert and export: files of image adapters from one layout into another, through the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture
def file(own_folder: Path) -> Path:
    tensors = {f"{NAME}.lora_down.weight": torch.randn(4, 768), f"{NAME}.lora_up.weight": torch.randn(1280, 4)}
    save_file({**tensors, f"{NAME}.alpha": torch.tensor(2.0)}, own_folder / "a.safetensors", {"ss_steps": "3"})
    return own_folder / "a.safetensors"


def test_there_and_back(veneer: Callable[..., Any], file: Path) -> None:
    said = veneer("convert", file, "--to", "diffusers", "--out", "b.safetensors", "--json").json
    assert said["from"] == "kohya" and said["keys"] == 3 and said["used"] == {"unet": 3} and not said["unknown"]
    assert veneer("convert", "b.safetensors", "--to", "peft", "--out", "c").code == 0
    said = veneer("export", "c", "--to", "kohya", "--out", "d.safetensors", "--json").json
    assert said["metadata"]["ss_steps"] == "3"
    first, last = load_file(file), load_file("d.safetensors")
    assert first.keys() == last.keys() and all(torch.equal(first[key], last[key]) for key in first)
    assert "nothing is ever overwritten" in veneer("export", "c", "--to", "kohya", "--out", "d.safetensors").err


def test_unknown_keys_are_named(veneer: Callable[..., Any], file: Path) -> None:
    save_file({**load_file(file), "bundle_emb.cat": torch.zeros(2)}, "odd.safetensors")
    said = veneer("convert", "odd.safetensors", "--to", "diffusers", "--out", "x.safetensors")
    assert said.code == 2 and "bundle_emb.cat" in said.err and not Path("x.safetensors").exists()
    said = veneer("convert", "odd.safetensors", "--to", "diffusers", "--out", "x.safetensors", "--allow-unknown")
    assert said.code == 0 and "left out: bundle_emb.cat" in said.out and Path("x.safetensors").exists()


def test_a_base_that_nobody_knows(veneer: Callable[..., Any], file: Path) -> None:
    said = veneer("convert", file, "--to", "peft", "--out", "x", "--base", "sdx")
    assert said.code == 2 and "sd1" in said.err
