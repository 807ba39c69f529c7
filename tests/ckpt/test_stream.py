"""A model merged on disk is the adapted model, whatever it needed of memory, and a merge that fails leaves nothing."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ckpt_nets import NETS, batch, bert, experts, llama, logits, spread
from safetensors.torch import load_file, save_file
from torch import nn

from veneer.ckpt.peft import load, save
from veneer.ckpt.rows import Change
from veneer.ckpt.stream import merge_to_disk
from veneer.ckpt.tensorfile import Writer
from veneer.core.model import activate, attach, detach, merge, parameters
from veneer.core.spec import LoRA
from veneer.errors import CheckpointError, ProofFailed

PLAIN = LoRA(rank=4, alpha=8, targets=["q_proj", "v_proj"])

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


def test_a_weighted_mixture_is_the_mixture_of_the_live_adapters(tmp_path):
    base = base_folder(llama(), tmp_path / "base")
    adapted("llama", PLAIN, tmp_path / "a", seed=1)
    adapted("llama", LoRA(rank=3, combine="dora"), tmp_path / "b", seed=2)
    mix = {tmp_path / "a": 0.7, tmp_path / "b": -0.4}
    model = llama()
    for name, path in zip("ab", mix, strict=True):
        load(model, path, name)
    activate(model, {"a": 0.7, "b": -0.4})
    merge_to_disk(base, mix, tmp_path / "out", prove_logits=True)
    merged = type(llama()).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged, batch("llama")), logits(model, batch("llama")), atol=2e-5, rtol=1e-5)


def test_what_no_adapter_touches_is_copied_bit_for_bit(tmp_path):
    base = base_folder(llama(), tmp_path / "base", torch.bfloat16)
    adapted("llama", PLAIN, tmp_path / "a", dtype=torch.bfloat16)
    result = merge_to_disk(base, tmp_path / "a", tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(result.kept) and len(changed) == 6
    assert before.keys() == after.keys()


@pytest.mark.parametrize("limit", [1, 30_000, 10**9])
def test_shards_are_divided_as_told_and_transformers_reads_them(limit, tmp_path):
    base = base_folder(llama(), tmp_path / "base")
    expected = logits(adapted("llama", PLAIN, tmp_path / "a"), batch("llama"))
    result = merge_to_disk(base, tmp_path / "a", tmp_path / "out", max_shard_size=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == result.shards and (result.shards == 1) == (limit == 10**9)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (len(files) > 1)
    merged = type(llama()).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged, batch("llama")), expected, atol=2e-5, rtol=1e-5)


def test_another_type_on_disk_is_in_the_config_too(tmp_path):
    base = base_folder(llama(), tmp_path / "base")
    adapted("llama", PLAIN, tmp_path / "a")
    result = merge_to_disk(base, tmp_path / "a", tmp_path / "out", dtype=torch.bfloat16)
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert result.bytes == sum(t.nbytes for t in tensors_of(base).values()) // 2
    assert 0.9 < result.share <= 1.01


def test_a_change_too_small_for_the_type_is_reported(tmp_path):
    base = base_folder(llama(), tmp_path / "base", torch.bfloat16)
    model = llama().to(torch.bfloat16)
    attach(model, PLAIN)
    for p in parameters(model).values():
        nn.init.normal_(p, std=2e-3)
    save(model, tmp_path / "a")
    with pytest.warns(UserWarning, match=r"only \d+ % of dW survived rounding in .*float32 keeps it"):
        result = merge_to_disk(base, tmp_path / "a", tmp_path / "out")
    assert result.share < 0.5
    exact = merge_to_disk(base, tmp_path / "a", tmp_path / "wide", dtype=torch.float32)
    assert exact.share == pytest.approx(1, abs=1e-3)


def test_a_tied_weight_is_refused_or_untied_as_told(tmp_path):
    tied = llama(tie_word_embeddings=True)
    base = base_folder(tied, tmp_path / "base")
    assert "lm_head.weight" not in tensors_of(base)
    attach(tied, LoRA(rank=4, targets=["embed_tokens", "q_proj"], tied="apart"))
    spread(list(parameters(tied).values()))
    save(tied, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight = lm_head.weight.*\n.*\n.*untie=True"):
        merge_to_disk(base, tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_to_disk(base, tmp_path / "a", tmp_path / "out", untie=True, prove_logits=True)
    merged = type(tied).from_pretrained(tmp_path / "out")
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(merged, batch("llama")), logits(tied, batch("llama")), atol=2e-5, rtol=1e-5)


def test_a_tied_weight_that_no_adapter_touches_stays_tied(tmp_path):
    tied = llama(tie_word_embeddings=True)
    base = base_folder(tied, tmp_path / "base")
    attach(tied, PLAIN)
    save(tied, tmp_path / "a")
    merge_to_disk(base, tmp_path / "a", tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")


def test_a_classifier_on_a_base_without_one(tmp_path):
    model = bert()
    base = base_folder(model.bert, tmp_path / "base")  # an encoder alone: no prefix in its files, no head
    assert "encoder.layer.0.attention.self.query.weight" in tensors_of(base)
    attach(model, LoRA(rank=4, targets=["query"], modules_to_save=["classifier"]))
    spread(list(parameters(model).values()))
    save(model, tmp_path / "a")
    with pytest.warns(UserWarning, match="put before the file's names"):
        merge_to_disk(base, tmp_path / "a", tmp_path / "out")
    merged = type(model).from_pretrained(tmp_path / "out")
    assert merged.config.num_labels == 3
    torch.testing.assert_close(logits(merged, batch("bert")), logits(model, batch("bert")), atol=2e-5, rtol=1e-5)


def test_a_model_that_transformers_does_not_know(tmp_path):
    model = experts()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "weights.safetensors")
    attach(model, LoRA(rank=4, targets=["up", "down", "embed"]))
    spread(list(parameters(model).values()))
    save(model, tmp_path / "a")
    with torch.device("meta"):
        skeleton = type(model)()
    merge_to_disk(tmp_path / "base", tmp_path / "a", tmp_path / "out", skeleton=skeleton)
    merged = experts(seed=1)
    merged.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    torch.testing.assert_close(logits(merged, batch("experts")), logits(model, batch("experts")), atol=2e-5, rtol=1e-5)


def test_what_belongs_to_the_model_comes_along(tmp_path, tiny_tokenizer):
    base = base_folder(llama(), tmp_path / "base")
    tiny_tokenizer.save_pretrained(base)
    (base / "README.md").write_text("the base's own card")
    (base / "pytorch_model.bin").write_bytes(b"old")
    adapted("llama", PLAIN, tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ 'trained with this' }}")
    with pytest.warns(UserWarning, match="chat_template.jinja is the adapter's, not the base's"):
        merge_to_disk(base, tmp_path / "a", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert "README.md" not in names and "pytorch_model.bin" not in names
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 'trained with this' }}"


def test_progress_is_told_to_whoever_asks(tmp_path):
    base, events = base_folder(llama(), tmp_path / "base"), []
    adapted("llama", PLAIN, tmp_path / "a")
    result = merge_to_disk(base, tmp_path / "a", tmp_path / "out", report=events.append)
    assert [e["bytes"] for e in events] == sorted(e["bytes"] for e in events)
    assert events[-1]["bytes"] == events[-1]["total_bytes"] == result.bytes
    assert str(result).startswith("6 tensors merged into ")


# ---------------------------------------------------------------- what must not happen


@pytest.mark.parametrize("spec", [PLAIN, LoRA(rank=4, combine="dora")], ids=["add", "dora"])
@pytest.mark.parametrize("net", ["llama", "gpt2"])
def test_the_proof_finds_a_merge_that_is_wrong_by_a_percent(net, spec, tmp_path, monkeypatch):
    spec = spec if net == "llama" else LoRA(rank=4, combine=spec.combine)
    base = base_folder(NETS[net](), tmp_path / "base")
    adapted(net, spec, tmp_path / "a")
    right = Change.rows
    monkeypatch.setattr(Change, "rows", lambda self, i, j, out: right(self, i, j, out).mul_(1.01))
    with pytest.raises(ProofFailed, match="computes something else than the adapted layer"):
        merge_to_disk(base, tmp_path / "a", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


def test_values_that_the_type_cannot_hold_are_refused(tmp_path):
    base = base_folder(llama(), tmp_path / "base", torch.float16)
    model = llama().to(torch.float16)
    attach(model, PLAIN)
    for p in parameters(model).values():
        nn.init.constant_(p, 300.0)
    save(model, tmp_path / "a")
    with pytest.raises(ProofFailed, match=r"values that torch.float16 cannot hold"):
        merge_to_disk(base, tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_the_old_model(tmp_path, monkeypatch):
    base = base_folder(llama(), tmp_path / "base")
    adapted("llama", PLAIN, tmp_path / "a")
    merge_to_disk(base, tmp_path / "a", tmp_path / "out")
    before = tensors_of(tmp_path / "out")

    def full(self: Writer, data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Writer, "_put", full)
    with pytest.raises(CheckpointError, match="The disk is full"):
        merge_to_disk(base, tmp_path / "a", tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base", "out"]


def test_a_disk_that_is_too_small_is_known_before_the_first_byte(tmp_path, monkeypatch, small_disk):
    base = base_folder(llama(hidden_size=512, intermediate_size=1024), tmp_path / "base", shard="100MB")
    save_adapter = llama(hidden_size=512, intermediate_size=1024)
    attach(save_adapter, PLAIN)
    save(save_adapter, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"needs 0.0 GB and 0.0 GB are free"):
        merge_to_disk(base, tmp_path / "a", small_disk / "out")
    assert not list(small_disk.iterdir())


def test_the_base_is_never_its_own_result(tmp_path):
    base = base_folder(llama(), tmp_path / "base")
    adapted("llama", PLAIN, tmp_path / "a")
    with pytest.raises(CheckpointError, match="would replace its own base"):
        merge_to_disk(base, tmp_path / "a", base)


def test_another_base_is_refused(tmp_path):
    base = base_folder(llama(rms_norm_eps=1e-3), tmp_path / "base")
    adapted("llama", PLAIN, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"rms_norm_eps: 1e-06 in the adapter's base, 0.001 here"):
        merge_to_disk(base, tmp_path / "a", tmp_path / "out")


def test_a_base_with_other_values_of_the_same_shape_is_refused(tmp_path):
    other = llama()
    nn.init.normal_(other.model.norm.weight)
    base = base_folder(other, tmp_path / "base")
    adapted("llama", PLAIN, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"model.norm.weight has other values here"):
        merge_to_disk(base, tmp_path / "a", tmp_path / "out")


def test_a_quantised_base_is_refused(tmp_path):
    base = base_folder(llama(), tmp_path / "base", shard="100MB")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 32, dtype=torch.uint8)
    save_file(tensors, base / "model.safetensors")
    adapted("llama", PLAIN, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"q_proj.weight: packed, as torch.uint8"):
        merge_to_disk(base, tmp_path / "a", tmp_path / "out")


def spoil_shard(base: Path) -> str:
    file = next(base.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-5])
    return "5 bytes are missing at its end"


def lose_shard(base: Path) -> str:
    next(base.glob("*.safetensors")).unlink()
    return "Shards are missing"


def spoil_index(base: Path) -> str:
    (base / "model.safetensors.index.json").write_text('{"weight_map": ')
    return "The index of the shards is damaged"


def shrink_index(base: Path) -> str:
    path = base / "model.safetensors.index.json"
    table = json.loads(path.read_text())
    table["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(table))
    return "The shards and their index do not agree"


def only_pickles(base: Path) -> str:
    for path in base.glob("model*.safetensors*"):
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"x")
    return "The weights are pickles"


def lose_config(base: Path) -> str:
    (base / "config.json").unlink()
    return "There is no config.json"


def unknown_kind(base: Path) -> str:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForTelepathy"]}))
    return "the architecture 'LlamaForTelepathy'"


@pytest.mark.parametrize(
    "harm",
    [spoil_shard, lose_shard, spoil_index, shrink_index, only_pickles, lose_config, unknown_kind],
    ids=lambda f: f.__name__,
)
def test_a_damaged_base_is_refused_with_the_reason(harm, tmp_path):
    base = base_folder(llama(), tmp_path / "base")
    adapted("llama", PLAIN, tmp_path / "a")
    reason = harm(base)
    with pytest.raises(CheckpointError) as error:
        merge_to_disk(base, tmp_path / "a", tmp_path / "out")
    assert reason in str(error.value)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- memory

MEASURE = """
import resource, sys, threading, time, torch
torch.set_num_threads(1)
from pathlib import Path
from veneer.ckpt.stream import merge_to_disk, skeleton_of
from veneer.ckpt.hub import find
base, adapter, out = map(Path, sys.argv[1:])
skeleton = skeleton_of(base, [adapter])        # transformers' own modules are in memory before the measurement
def now():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) // 1024
start = now()
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
merge_to_disk(base, adapter, out, skeleton=skeleton)
peak = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) // 1024
print(peak - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_larger_than_the_memory_it_needs(tmp_path):
    """360 MB in seven shards pass through less than 96 MB of memory, adapters included."""
    config = llama().config
    for key, value in {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "vocab_size": 8000,
    }.items():
        setattr(config, key, value)
    config.head_dim, config.dtype = 256, torch.bfloat16
    with torch.device("meta"):
        model = type(llama())(config)
    write_random(model, tmp_path / "base", 7)
    config.save_pretrained(tmp_path / "base")
    model = type(llama()).from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    attach(model, LoRA(rank=8))
    spread(list(parameters(model).values()))
    save(model, tmp_path / "a")
    del model
    run = [sys.executable, "-c", MEASURE, str(tmp_path / "base"), str(tmp_path / "a"), str(tmp_path / "out")]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert size > 300e6 and int(done.stdout) < 96, f"{int(done.stdout)} MiB for a model of {size / 2**20:.0f} MiB"


def write_random(model: nn.Module, folder: Path, shards: int) -> None:
    """A checkpoint of random bfloat16 values in so many shards."""
    folder.mkdir()
    shapes, table = {name: t.shape for name, t in model.state_dict().items()}, {}
    noise = torch.randn(1 << 20).mul_(0.02).bfloat16()
    for i in range(shards):
        part = {
            n: noise.repeat(shapes[n].numel() // len(noise) + 1)[: shapes[n].numel()] for n in list(shapes)[i::shards]
        }
        part = {name: flat.view(shapes[name]).clone() for name, flat in part.items()}
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file)
        table |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def resized(noise: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The same values over and over: making hundreds of millions of random ones is not what is tested."""
    return noise.repeat(shape.numel() // len(noise) + 1)[: shape.numel()].view(shape).clone()
