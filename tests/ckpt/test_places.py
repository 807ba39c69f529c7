"""Adapters in unusual places, against PEFT: rows of a table, tied weights, packed attention projections.

The laws are those of test_peft.py: what PEFT wrote gives the same logits here and is written again as it was; what is
attached here gives the same logits there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ckpt_nets import batch, llama, logits, spread
from safetensors.torch import load_file
from torch import Tensor, nn

from veneer.ckpt.peft import load, save
from veneer.ckpt.stream import merge_to_disk
from veneer.core.model import attach, merge, parameters, sites
from veneer.core.spec import LoRA
from veneer.errors import CheckpointError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Attention(nn.Module):
    """An nn.MultiheadAttention between two layers; its own projections are packed unless the keys are narrower."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True, **options)
        self.out = nn.Linear(16, 5)
        self.width = options.get("kdim", 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.out(self.attn(h, h[..., : self.width], h, need_weights=False)[0])


def attention(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Attention(**options).eval()


def from_peft(base: nn.Module, x: Tensor, folder: Path, **config: Any) -> Tensor:
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=6, **config))
    spread([p for p in model.parameters() if p.requires_grad])
    model.eval().save_pretrained(str(folder))
    return logits(model, x)


def same(one: Path, other: Path, tolerance: float = 0.0) -> None:
    a, b = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    bases = {key for key in a if key.endswith("base_layer.weight")}  # PEFT's copies of the base: not ours to save
    assert a.keys() - bases == b.keys()
    assert all(torch.allclose(a[key], b[key], rtol=0, atol=tolerance) for key in b)


# ---------------------------------------------------------------- rows of a table

ROWS: dict[str, tuple[bool, Any]] = {
    "input embedding": (False, [5, 2, 39]),
    "by name": (False, {"embed_tokens": [7, 1]}),
    "two tables": (False, {"lm_head": [3, 0], "embed_tokens": [1]}),
    "tied": (True, [5, 2, 39]),
    "tied, by name": (True, {"embed_tokens": [7, 1]}),
}


@pytest.mark.parametrize("case", ROWS)
def test_trained_rows_there_and_back(case: str, tmp_path: Path) -> None:
    tied, rows = ROWS[case]
    x, words = batch("llama"), {"target_modules": ["q_proj"], "trainable_token_indices": rows}
    expected = from_peft(llama(tie_word_embeddings=tied), x, tmp_path / "theirs", **words)
    model = llama(tie_word_embeddings=tied)
    load(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model, x), expected, atol=1e-5, rtol=1e-5)
    save(model, tmp_path / "ours")
    same(tmp_path / "theirs", tmp_path / "ours", 1e-6)  # a change added to the row again: once rounded
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["trainable_token_indices"] == rows
    again = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=tied), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(again, x), expected, atol=1e-5, rtol=1e-5)
    merge(model)
    torch.testing.assert_close(logits(model, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_trained_rows_written_here(tied: bool, tmp_path: Path) -> None:
    model, x = llama(tie_word_embeddings=tied), batch("llama")
    attach(model, LoRA(rank=2, targets=["v_proj"], token_rows=[9, 4]))
    spread(list(parameters(model).values()))
    expected = logits(model, x)
    save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=tied), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs, x), expected, atol=1e-5, rtol=1e-5)
    again = llama(tie_word_embeddings=tied)
    assert load(again, tmp_path).spec.token_rows == (9, 4)
    torch.testing.assert_close(logits(again, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_trained_rows_merged_on_disk(tied: bool, tmp_path: Path) -> None:
    base, x = llama(tie_word_embeddings=tied), batch("llama")
    base.save_pretrained(tmp_path / "base")
    words = {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2]}
    expected = from_peft(llama(tie_word_embeddings=tied), x, tmp_path / "a", **words)
    merge_to_disk(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    merged = type(base).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(merged, x), expected, atol=1e-5, rtol=1e-5)


def test_rows_that_cannot_be_are_refused(tmp_path: Path) -> None:
    words = {"target_modules": ["q_proj"], "trainable_token_indices": [5, 39]}
    from_peft(llama(), batch("llama"), tmp_path, **words)
    with pytest.raises(CheckpointError, match="resize the embeddings first"):
        load(llama(vocab_size=30), tmp_path, allow_other_base=True)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "trainable_token_indices": [5]}))
    with pytest.raises(CheckpointError, match=r"trainable_tokens_delta is \[2, 32\], needs 1 rows"):
        load(llama(), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({**config, "trainable_token_indices": None}))
    with pytest.raises(CheckpointError, match="does not target it"):
        load(llama(), tmp_path)


# ---------------------------------------------------------------- tied weights

TIED: dict[str, dict[str, Any]] = {
    "adapter": {"target_modules": ["embed_tokens", "q_proj"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("case", TIED)
def test_ensure_weight_tying(case: str, tmp_path: Path) -> None:
    x = batch("llama")
    words = {**TIED[case], "ensure_weight_tying": True}
    expected = from_peft(llama(tie_word_embeddings=True), x, tmp_path / "theirs", **words)
    model = llama(tie_word_embeddings=True)
    spec = load(model, tmp_path / "theirs").spec
    assert spec.tied == "together"
    torch.testing.assert_close(logits(model, x), expected, atol=1e-5, rtol=1e-5)
    save(model, tmp_path / "ours")
    same(tmp_path / "theirs", tmp_path / "ours", 1e-6)
    again = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=True), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(again, x), expected, atol=1e-5, rtol=1e-5)


def test_tied_together_here_is_tied_in_peft(tmp_path: Path) -> None:
    model, x = llama(tie_word_embeddings=True), batch("llama")
    attach(model, LoRA(rank=2, targets=["embed_tokens"], tied="together"))
    spread(list(parameters(model).values()))
    expected = logits(model, x)
    save(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["ensure_weight_tying"] is True
    theirs = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=True), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs, x), expected, atol=1e-5, rtol=1e-5)
    again = llama(tie_word_embeddings=True)
    load(again, tmp_path, trainable=True)
    assert len(parameters(again)) == 2  # one change for both
    torch.testing.assert_close(logits(again, x), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- attention with packed projections

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(2))
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank of its own": {"rank_pattern": {"attn": 3}, "alpha_pattern": {"attn": 5}, "use_rslora": True},
}


@pytest.mark.parametrize("case", HEADS)
def test_an_attention_as_one_target(case: str, tmp_path: Path) -> None:
    expected = from_peft(attention(), X, tmp_path / "theirs", target_modules=["attn", "out"], **HEADS[case])
    model = attention()
    assert set(load(model, tmp_path / "theirs").sites) == {"attn.in_proj_weight", "attn.out_proj", "out"}
    torch.testing.assert_close(logits(model, X), expected, atol=1e-5, rtol=1e-5)
    save(model, tmp_path / "ours")
    same(tmp_path / "theirs", tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(attention(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(again, X), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        ({}, ["in_proj_weight", "out_proj", "out"]),
        ({}, ["out_proj"]),
        ({}, ["in_proj_weight", "stem"]),
        ({"kdim": 8}, ["q_proj_weight", "k_proj_weight", "out"]),
    ],
)
def test_projections_written_here(options: dict[str, Any], targets: list[str], tmp_path: Path) -> None:
    model = attention(**options)
    attach(model, LoRA(rank=2, alpha=6, targets=targets))
    spread(list(parameters(model).values()))
    expected, held = logits(model, X), set(sites(model))
    save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(attention(**options), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs, X), expected, atol=1e-5, rtol=1e-5)
    again = attention(**options)
    assert set(load(again, tmp_path).sites) >= held
    torch.testing.assert_close(logits(again, X), expected, atol=1e-5, rtol=1e-5)


def test_what_pefts_one_rank_cannot_say(tmp_path: Path) -> None:
    model = attention()
    attach(model, LoRA(rank=2, targets=["in_proj_weight", "out_proj"], overrides={"out_proj": {"rank": 3}}))
    with pytest.raises(CheckpointError, match="one rank for both projections of attn"):
        save(model, tmp_path)
    other = attention(kdim=8)
    attach(other, LoRA(rank=2, targets=["out_proj"]))
    with pytest.warns(UserWarning, match="separate projections; load this file with veneer"):
        save(other, tmp_path)
