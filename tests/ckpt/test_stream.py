"""A model merged on disk is the adapted model, whatever it needed of memory, and a merge that fails leaves nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ckpt_nets import NETS, batch, bert, gpt2, llama, logits, spread
from safetensors.torch import load_file, save_file
from torch import nn

from veneer.ckpt import rows, stream
from veneer.ckpt.peft import load, save
from veneer.ckpt.stream import merge_to_disk
from veneer.core.model import activate, attach, detach, merge, parameters
from veneer.core.spec import LoRA
from veneer.errors import CheckpointError, ProofFailed

CASES: dict[str, tuple[str, LoRA]] = {
    "plain": ("llama", LoRA(rank=4, alpha=8)),
    "rslora": ("llama", LoRA(rank=4, alpha=8, scaling="rslora")),
    "dora": ("llama", LoRA(rank=4, alpha=8, combine="dora")),
    "embedding and head": ("llama", LoRA(rank=4, targets=["embed_tokens", "lm_head", "q_proj"])),
    "embedding dora": ("llama", LoRA(rank=4, targets=["embed_tokens"], combine="dora")),
    "bias": ("llama", LoRA(rank=4, targets=["q_proj", "v_proj"], bias="lora_only")),
    "whole modules": ("llama", LoRA(rank=4, targets=["q_proj"], modules_to_save=["lm_head", "norm"])),
    "overrides": ("llama", LoRA(rank=4, overrides={"q_proj": {"rank": 2, "alpha": 3}})),
    "pissa": ("llama", LoRA(rank=4, targets=["q_proj", "down_proj"], init="pissa")),
    "gpt2": ("gpt2", LoRA(rank=4)),
    "gpt2 dora": ("gpt2", LoRA(rank=4, combine="dora", bias="lora_only")),
    "bert head": ("bert", LoRA(rank=4, targets=["query", "value"], modules_to_save=["classifier"], bias="all")),
}


def base_folder(model: Any, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "12KB") -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def adapted(net: str, spec: LoRA, folder: Path, seed: int = 7, dtype: torch.dtype = torch.float32) -> Any:
    """A model with an adapter that has moved, saved to `folder`."""
    model = NETS[net]().to(dtype)
    attach(model, spec)
    spread(list(parameters(model).values()), seed)
    save(model, folder)
    return model.eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_merged_on_disk_is_merged_in_memory_and_adapted(case, dtype, tmp_path):
    net, spec = CASES[case]
    base = base_folder(NETS[net](), tmp_path / "base", dtype)
    model = adapted(net, spec, tmp_path / "adapter", dtype=dtype)
    expected = logits(model.float(), batch(net)) if dtype is torch.float32 else None
    result = merge_to_disk(base, tmp_path / "adapter", tmp_path / "out", prove_logits=True)
    merged = type(model).__mro__[0].from_pretrained(tmp_path / "out", dtype=dtype).eval()
    if expected is not None:
        torch.testing.assert_close(logits(merged, batch(net)), expected, atol=2e-5, rtol=1e-5)
    merge(model, untie=True)
    detach(model)
    theirs, rounding = model.state_dict(), 1e-5 if dtype is torch.float32 else 2**-7
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name].to(dtype), atol=1e-6, rtol=rounding)
    assert result.shards > 3 and len(list((tmp_path / "out").glob("*.safetensors"))) == result.shards
    assert max(result.excess.values()) <= 1 and result.share > 0.99
    assert result.logits_error is not None
