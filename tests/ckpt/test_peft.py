"""Adapters written by PEFT run the same here, and ours run the same there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ckpt_nets import NETS, batch, logits, spread
from torch import nn

from veneer.ckpt.peft import load, save
from veneer.core.delta import DELTAS
from veneer.core.model import attach, parameters
from veneer.core.spec import LoRA

peft = pytest.importorskip("peft")

ATTENTION = ["q_proj", "v_proj"]
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (net, PEFT's LoraConfig)
    "plain": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}),
    "rank 1": ("llama", {"r": 1, "lora_alpha": 3, "target_modules": ["q_proj"]}),
    "rank 7, alpha 5": ("llama", {"r": 7, "lora_alpha": 5, "target_modules": ["down_proj"]}),
    "causal lm": ("llama", {"r": 4, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}),
    "all-linear": ("llama", {"r": 4, "target_modules": "all-linear"}),
    "regex": ("llama", {"r": 4, "target_modules": r".*\.(q_proj|up_proj)"}),
    "exclude": ("llama", {"r": 4, "target_modules": "all-linear", "exclude_modules": ["layers.1.self_attn.q_proj"]}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "use_rslora": True}),
    "dora": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "use_dora": True}),
    "dora rslora": ("llama", {"r": 4, "target_modules": ["q_proj", "o_proj"], "use_dora": True, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6, "^model.layers.0.self_attn.k_proj": 3},
            "alpha_pattern": {"v_proj": 3, "layers.2.self_attn.q_proj": 16},
        },
    ),
    "layers": ("llama", {"r": 4, "target_modules": ATTENTION, "layers_to_transform": [0, 2]}),
    "one layer": ("llama", {"r": 4, "target_modules": ATTENTION, "layers_to_transform": 1, "layers_pattern": "layers"}),
    "bias lora_only": ("llama", {"r": 4, "target_modules": ATTENTION, "bias": "lora_only"}),
    "bias all": ("bert", {"r": 4, "target_modules": ["query", "value"], "bias": "all"}),
    "bias all, head": ("bert", {"r": 4, "target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "bias dora": ("llama", {"r": 4, "target_modules": ATTENTION, "bias": "lora_only", "use_dora": True}),
    "lora_bias": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "lora_bias": True}),
    "lora_bias and bias": ("llama", {"r": 4, "target_modules": ATTENTION, "lora_bias": True, "bias": "lora_only"}),
    "modules_to_save": ("llama", {"r": 4, "target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}),
    "embedding": ("llama", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "embedding dora": ("llama", {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "head": ("llama", {"r": 4, "target_modules": ["lm_head", "q_proj"]}),
    "gpt2": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2 dora": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "gpt2 bias": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "sequence classifier": ("bert", {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "token head by hand": ("bert", {"r": 4, "target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]}),
    "conv1d": ("conv1d", {"r": 4, "lora_alpha": 6, "target_modules": ["stem", "body", "head"]}),
    "conv2d": ("conv2d", {"r": 4, "lora_alpha": 6, "target_modules": ["stem", "body"], "lora_bias": True}),
    "conv3d": ("conv3d", {"r": 4, "target_modules": ["body"], "bias": "lora_only"}),
    "conv1d dora": ("conv1d", {"r": 4, "target_modules": ["body", "head"], "use_dora": True}),
    "conv2d dora": ("conv2d", {"r": 4, "target_modules": ["body"], "use_dora": True, "use_rslora": True}),
    "conv3d dora": ("conv3d", {"r": 4, "target_modules": ["body", "stem"], "use_dora": True}),
    "no transformers": ("bag", {"r": 4, "target_modules": ["embed", "out"]}),
    "gaussian": ("llama", {"r": 4, "target_modules": ATTENTION, "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"r": 4, "target_modules": ATTENTION, "init_lora_weights": "orthogonal"}),
    "pissa": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "init_lora_weights": "pissa"}),
    "pissa gpt2": (
        "gpt2",
        {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": "pissa"},
    ),
    "olora": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "init_lora_weights": "olora"}),
    "experts": ("mixtral", {"r": 4, "target_modules": ["q_proj"], "target_parameters": STACKS}),
    "one stack": ("mixtral", {"r": 4, "target_modules": [], "target_parameters": STACKS[:1], "use_rslora": True}),
    "transposed stacks": (
        "experts",
        {"r": 4, "lora_alpha": 3, "target_modules": [], "target_parameters": ["experts.down", "experts.up"]},
    ),
}

OURS: dict[str, tuple[str, LoRA]] = {
    "plain": ("llama", LoRA(rank=4, alpha=8, targets=ATTENTION)),
    "preset": ("llama", LoRA(rank=3, targets="minimal")),
    "all-linear": ("llama", LoRA(rank=4)),
    "regex": ("llama", LoRA(rank=4, targets=r".*\.(q_proj|up_proj)")),
    "layers": ("llama", LoRA(rank=4, targets=ATTENTION, layers=[0, -1])),
    "exclude": ("llama", LoRA(rank=4, exclude=["layers.1.self_attn.q_proj"])),
    "rslora": ("llama", LoRA(rank=4, alpha=8, scaling="rslora")),
    "dora": ("llama", LoRA(rank=4, alpha=8, combine="dora")),
    "dora rslora bias": ("llama", LoRA(rank=4, combine="dora", scaling="rslora", bias="lora_only")),
    "overrides": (
        "llama",
        LoRA(rank=4, alpha=8, overrides={"q_proj": {"rank": 2}, "layers.1.mlp.up_proj": {"rank": 6, "alpha": 3}}),
    ),
    "mixed scaling": ("llama", LoRA(rank=4, alpha=8, overrides={"q_proj": {"scaling": "rslora"}})),
    "mixed combine": ("llama", LoRA(rank=4, alpha=8, overrides={"q_proj": {"combine": "dora"}})),
    "whole modules": ("llama", LoRA(rank=4, targets=ATTENTION, modules_to_save=["lm_head", "layers.0.mlp"])),
    "embedding and head": ("llama", LoRA(rank=4, targets=["embed_tokens", "lm_head"])),
    "embedding dora": ("llama", LoRA(rank=4, targets=["embed_tokens"], combine="dora")),
    "pissa": ("llama", LoRA(rank=4, alpha=6, targets=ATTENTION, init="pissa")),
    "pissa rslora": ("llama", LoRA(rank=4, alpha=6, targets=ATTENTION, init="pissa", scaling="rslora")),
    "olora": ("llama", LoRA(rank=4, alpha=6, targets=ATTENTION, init="olora")),
    "orthogonal": ("llama", LoRA(rank=4, targets=ATTENTION, init="orthogonal")),
    "gpt2": ("gpt2", LoRA(rank=4)),
    "gpt2 dora bias": ("gpt2", LoRA(rank=4, combine="dora", bias="lora_only")),
    "gpt2 one projection": ("gpt2", LoRA(rank=4, targets=["attn.c_proj"])),
    "head only by name": ("bert", LoRA(rank=4, targets=["query"], modules_to_save=["classifier"])),
    "no head": ("bert", LoRA(rank=4, targets=["query", "value"])),
    "bias all": ("bert", LoRA(rank=4, targets=["query", "value"], bias="all")),
    "bias all, head": ("bert", LoRA(rank=4, targets=["query"], bias="all", modules_to_save=["classifier"])),
    "conv1d": ("conv1d", LoRA(rank=4, alpha=6, targets=["stem", "body", "head"], bias="all")),
    "conv2d": ("conv2d", LoRA(rank=4, alpha=6, targets=["stem", "body"], combine="dora")),
    "conv3d": ("conv3d", LoRA(rank=4, alpha=6, targets=["stem", "body"], scaling="rslora")),
    "groups": ("grouped", LoRA(rank=3, alpha=6, targets=["stem", "body"])),
    "groups rslora": ("grouped", LoRA(rank=3, alpha=6, targets=["body"], scaling="rslora", bias="lora_only")),
    "groups 1d": ("grouped1d", LoRA(rank=2, alpha=6, targets=["body", "head"])),
    "no transformers": ("bag", LoRA(rank=4, targets=["embed", "out"], combine="dora")),
    "experts": ("mixtral", LoRA(rank=4, targets=["gate_up_proj", "down_proj", "q_proj"])),
    "one stack of one block": ("mixtral", LoRA(rank=4, targets=["layers.1.mlp.experts.down_proj"])),
    "transposed stacks": ("experts", LoRA(rank=4, targets=["up", "down"], scaling="rslora")),
    "q and v in a fused matrix": ("gpt2", LoRA(rank=4, targets="minimal")),
}


def their_adapter(net: str, options: dict[str, Any], folder: Path) -> torch.Tensor:
    """Write an adapter with PEFT, with random values in everything it trains; returns its logits."""
    config = peft.LoraConfig(**options)
    model = peft.get_peft_model(NETS[net](), config)
    spread([p for p in model.parameters() if p.requires_grad])
    model.eval().save_pretrained(str(folder))
    return logits(model, batch(net))


def our_adapter(net: str, spec: LoRA, folder: Path, name: str = "default") -> torch.Tensor:
    model = NETS[net]()
    attach(model, spec, name)
    spread(list(parameters(model, name).values()))
    save(model, folder, name)
    return logits(model.eval(), batch(net))


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, str(folder)).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", THEIRS)
def test_written_by_peft_read_here(case, tmp_path):
    net, options = THEIRS[case]
    expected = their_adapter(net, options, tmp_path)
    model = NETS[net]()
    assert not torch.allclose(logits(model, batch(net)), expected, atol=1e-3)
    load(model, tmp_path)
    torch.testing.assert_close(logits(model, batch(net)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", OURS)
def test_written_here_read_by_peft(case, tmp_path):
    net, spec = OURS[case]
    expected = our_adapter(net, spec, tmp_path)
    base = NETS[net]()
    assert not torch.allclose(logits(base, batch(net)), expected, atol=1e-3)
    torch.testing.assert_close(logits(in_peft(base, tmp_path), batch(net)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", OURS)
def test_written_here_read_here(case, tmp_path):
    net, spec = OURS[case]
    expected = our_adapter(net, spec, tmp_path)
    model = NETS[net]()
    load(model, tmp_path)
    torch.testing.assert_close(logits(model, batch(net)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", THEIRS)
def test_read_from_peft_and_written_again(case, tmp_path):
    net, options = THEIRS[case]
    expected = their_adapter(net, options, tmp_path / "theirs")
    model = NETS[net]()
    load(model, tmp_path / "theirs")
    save(model, tmp_path / "ours")
    torch.testing.assert_close(
        logits(in_peft(NETS[net](), tmp_path / "ours"), batch(net)), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("delta", sorted(DELTAS))
def test_every_kind_of_delta_is_saved_so_that_both_read_it(delta, tmp_path):
    options = {"tokens": {"rows": [3, 5]}, "fused": {"parts": [[0, 16]]}}.get(delta, {})
    targets = ["embed_tokens"] if delta == "tokens" else ["q_proj", "down_proj"]
    expected = our_adapter("llama", LoRA(rank=4, targets=targets, delta=delta, options=options), tmp_path)
    model = NETS["llama"]()
    load(model, tmp_path)
    torch.testing.assert_close(logits(model, batch("llama")), expected, atol=1e-5, rtol=1e-5)
    theirs = in_peft(NETS["llama"](), tmp_path)
    torch.testing.assert_close(logits(theirs, batch("llama")), expected, atol=1e-5, rtol=1e-5)
