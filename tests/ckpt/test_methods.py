"""AdaLoRA, VeRA, LoHa and LoKr in PEFT's own layouts: read what PEFT writes, write what PEFT reads, bit for bit.

The laws: what PEFT wrote gives the same logits here; written again, the file holds the same tensors and a config that
PEFT reads as the same adapter; what was attached here gives the same logits there. What PEFT has no layer for becomes
plain LoRA and is said; what cannot be read says why.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ckpt_nets import NETS, batch, logits, spread
from safetensors.torch import load_file
from torch import Tensor, nn

from veneer.ckpt.config import OTHER_METHODS, parse
from veneer.ckpt.inspect import read
from veneer.ckpt.layout import PREFIX
from veneer.ckpt.methods import METHODS
from veneer.ckpt.peft import load, save
from veneer.ckpt.stream import merge_to_disk
from veneer.core.model import adapter_of, attach, merge, parameters, sites, spec_of
from veneer.core.spec import LoRA
from veneer.errors import CheckpointError

peft = pytest.importorskip("peft")

ATTENTION = ["q_proj", "v_proj"]
CONVS = {"target_modules": ["stem", "body"]}
ADALORA: dict[str, Any] = {"total_step": 10, "lora_alpha": 9}
BY_KIND: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {  # peft_type -> case -> (net, PEFT's config)
    "ADALORA": {
        "plain": ("llama", {**ADALORA, "init_r": 6, "target_modules": ATTENTION}),
        "schedule": ("llama", {**ADALORA, "init_r": 3, "target_modules": ["q_proj"], "tinit": 2, "tfinal": 3}),
        "bias": ("llama", {**ADALORA, "init_r": 2, "target_modules": ATTENTION, "bias": "lora_only"}),
        "gpt2": ("gpt2", {**ADALORA, "init_r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
        "conv": ("conv2d", {**ADALORA, "init_r": 4, **CONVS}),
        "whole modules": ("llama", {**ADALORA, "target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    },
    "VERA": {
        "plain": ("llama", {"r": 8, "target_modules": ["q_proj", "down_proj"]}),
        "rank above the layers'": ("llama", {"r": 64, "target_modules": ["q_proj", "v_proj"]}),
        "bias": ("llama", {"r": 8, "target_modules": ATTENTION, "bias": "vera_only"}),
        "by key": ("llama", {"r": 8, "target_modules": ["q_proj", "up_proj"], "save_projection": False,
                             "projection_prng_key": 7}),
        "gpt2": ("gpt2", {"r": 8, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        "some layers": ("llama", {"r": 8, "target_modules": ATTENTION, "layers_to_transform": [0, 2]}),
    },
    "LOHA": {
        "plain": ("llama", {"r": 3, "alpha": 5, "target_modules": ATTENTION}),
        "patterns": ("llama", {"r": 3, "alpha": 5, "target_modules": ATTENTION, "rank_pattern": {"v_proj": 2},
                               "alpha_pattern": {"q_proj": 7}}),
        "excluded": ("llama", {"r": 3, "target_modules": ATTENTION, "exclude_modules": ["layers.1.self_attn.q_proj"]}),
        "conv": ("conv2d", {"r": 3, "alpha": 5, **CONVS}),
        "conv, effective": ("conv2d", {"r": 3, "alpha": 5, "use_effective_conv2d": True, **CONVS}),
        "conv1d, effective": ("conv1d", {"r": 3, "use_effective_conv2d": True, "target_modules": ["stem", "body"]}),
        "grouped, effective": ("grouped", {"r": 3, "use_effective_conv2d": True, "target_modules": ["body"]}),
    },
    "LOKR": {
        "plain": ("llama", {"r": 2, "alpha": 5, "target_modules": ATTENTION}),
        "whole": ("llama", {"r": 8, "alpha": 5, "target_modules": ATTENTION}),
        "both decomposed": ("llama", {"r": 1, "alpha": 5, "target_modules": ["q_proj", "up_proj"],
                                      "decompose_both": True, "decompose_factor": 4}),
        "a factor above the root": ("llama", {"r": 1, "target_modules": ["q_proj"], "decompose_factor": 16}),
        "conv": ("conv2d", {"r": 1, "alpha": 5, **CONVS}),
        "conv, whole": ("conv2d", {"r": 8, "alpha": 5, **CONVS}),
        "conv, effective": ("conv2d", {"r": 1, "alpha": 5, "use_effective_conv2d": True, **CONVS}),
        "grouped, effective": ("grouped", {"r": 1, "use_effective_conv2d": True, "target_modules": ["body"]}),
        "conv1d": ("conv1d", {"r": 1, "target_modules": ["body"]}),
    },
}  # fmt: skip
CASES = [(kind, case) for kind, cases in BY_KIND.items() for case in cases]
CONFIGS = {"ADALORA": "AdaLoraConfig", "VERA": "VeraConfig", "LOHA": "LoHaConfig", "LOKR": "LoKrConfig"}
pytestmark = pytest.mark.filterwarnings("ignore")


def theirs(kind: str, case: str, folder: Path, change: Callable[[Any], None] = lambda model: None) -> Tensor:
    """Write an adapter with PEFT, moved in everything it trains; returns its logits."""
    net, options = BY_KIND[kind][case]
    model = peft.get_peft_model(NETS[net](), getattr(peft, CONFIGS[kind])(**options))
    spread([p for p in model.parameters() if p.requires_grad])
    change(model)
    model.eval().save_pretrained(str(folder))
    return logits(model, batch(net))


def in_peft(net: str, folder: Path) -> Tensor:
    return logits(peft.PeftModel.from_pretrained(NETS[net](), str(folder)).eval(), batch(net))


def files(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


def same_files(one: Path, other: Path) -> None:
    """Bit for bit the same tensors, and a config that says the same wherever it says something."""
    (a, mine), (b, again) = files(one), files(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    free = {"peft_version", "auto_mapping", "task_type", "inference_mode"}  # and what a method ignores
    ignored = {"ADALORA": {"r", "target_r", *free}}.get(mine["peft_type"], free)
    for key in mine.keys() & again.keys() - ignored - {"alpha", "r", "rank_pattern", "alpha_pattern"}:
        x, y = (sorted(v) if isinstance(v, list) else v for v in (mine[key], again[key]))
        assert x == y or not (x or y), key


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_read_from_peft_and_written_again(kind: str, case: str, tmp_path: Path) -> None:
    expected = theirs(kind, case, tmp_path / "theirs")
    net, _ = BY_KIND[kind][case]
    model = NETS[net]()
    assert not torch.allclose(logits(model, batch(net)), expected, atol=1e-3)
    load(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model, batch(net)), expected, atol=1e-5, rtol=1e-5)
    save(model, tmp_path / "ours")
    same_files(tmp_path / "theirs", tmp_path / "ours")
    torch.testing.assert_close(in_peft(net, tmp_path / "ours"), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("kind", "case"), [(k, c) for k, c in CASES if BY_KIND[k][c][0] in ("llama", "conv2d")])
def test_the_merged_weight_is_pefts(kind: str, case: str, tmp_path: Path) -> None:
    expected = theirs(kind, case, tmp_path)
    net, _ = BY_KIND[kind][case]
    model = NETS[net]()
    load(model, tmp_path)
    merge(model)
    torch.testing.assert_close(logits(model, batch(net)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", METHODS)
def test_merged_on_disk(kind: str, tmp_path: Path) -> None:
    """The streamed merge, which never builds the model, computes the same weight."""
    from transformers import AutoModelForCausalLM

    NETS["llama"]().save_pretrained(tmp_path / "base")
    for case in [c for c, (net, _) in BY_KIND[kind].items() if net == "llama"]:
        expected = theirs(kind, case, tmp_path / case)
        merge_to_disk(tmp_path / "base", tmp_path / case, tmp_path / f"{case} merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"{case} merged").eval()
        torch.testing.assert_close(logits(merged, batch("llama")), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- AdaLoRA's pruned ranks


def prune(model: Any) -> None:
    """Masks as PEFT's own allocator writes them: one layer keeps all, one keeps nothing, the others some."""
    masks = {}
    for i, (name, p) in enumerate((n, p) for n, p in model.base_model.model.named_parameters() if "lora_E" in n):
        masks[name] = [i == 1 or (i != 2 and (i + j) % 3 != 0) for j in range(len(p))]
        p.data[~torch.tensor(masks[name])] = 0
    model.peft_config["default"].rank_pattern = masks


def test_pruned_ranks_there_and_back(tmp_path: Path) -> None:
    expected = theirs("ADALORA", "plain", tmp_path / "theirs", prune)
    model = NETS["llama"]()
    load(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model, batch("llama")), expected, atol=1e-5, rtol=1e-5)
    ranks = {adapter_of(layer).delta.real_rank for layer in sites(model).values()}
    assert {0, 6} < ranks  # ranks as they are left, not as they were asked for
    save(model, tmp_path / "ours")
    same_files(tmp_path / "theirs", tmp_path / "ours")
    (_, mine), (_, again) = files(tmp_path / "theirs"), files(tmp_path / "ours")
    assert mine["rank_pattern"] == again["rank_pattern"]
    torch.testing.assert_close(in_peft("llama", tmp_path / "ours"), expected, atol=1e-6, rtol=1e-6)


def test_a_mask_of_other_tensors_is_refused(tmp_path: Path) -> None:
    theirs("ADALORA", "plain", tmp_path, prune)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["rank_pattern"] = {key: [True, *mask[1:]] for key, mask in config["rank_pattern"].items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"rank_pattern keeps \d of 6 directions"):
        load(NETS["llama"](), tmp_path)


# ---------------------------------------------------------------- VeRA's shared matrices


def test_a_files_own_projection_is_used_and_kept(tmp_path: Path) -> None:
    """Another machine may draw other numbers from the same key: the file's are the ones it was trained with."""

    def other_numbers(model: Any) -> None:
        for name in ("vera_A", "vera_B"):
            held = getattr(model.base_model, name)["default"]
            held.copy_(torch.randn(held.shape, generator=torch.Generator().manual_seed(3)))

    expected = theirs("VERA", "plain", tmp_path / "theirs", other_numbers)
    model = NETS["llama"]()
    load(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model, batch("llama")), expected, atol=1e-5, rtol=1e-5)
    save(model, tmp_path / "ours")
    same_files(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("name", ["vera_A", "vera_B"])
def test_a_projection_that_lacks_or_is_too_small(name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    theirs("VERA", "plain", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    whole = held.pop(f"base_model.{name}")
    save_file(held, file)
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        load(NETS["llama"](), tmp_path)
    save_file({**held, f"base_model.{name}": whole[:5, :5].contiguous()}, file)
    with pytest.raises(CheckpointError, match=f"{name} is \\[5, 5\\], needs"):
        load(NETS["llama"](), tmp_path)


# ---------------------------------------------------------------- written here

OURS: dict[str, tuple[str, LoRA, str]] = {
    "adalora": ("llama", LoRA(rank=4, alpha=6, targets=ATTENTION, delta="adalora", bias="lora_only"), "ADALORA"),
    "adalora, rslora": ("llama", LoRA(rank=4, targets=ATTENTION, delta="adalora", scaling="rslora"), "ADALORA"),
    "adalora, dora": ("llama", LoRA(rank=4, targets=ATTENTION, delta="adalora", combine="dora"), "LORA"),
    "adalora, ranks": (
        "llama",
        LoRA(rank=4, targets=ATTENTION, delta="adalora", overrides={"q_proj": {"rank": 2}}),
        "LORA",
    ),
    "adalora, embedding": ("llama", LoRA(rank=4, targets=["embed_tokens"], delta="adalora"), "LORA"),
    "vera": ("llama", LoRA(rank=4, delta="vera"), "VERA"),
    "vera, key": (
        "llama",
        LoRA(rank=4, targets=ATTENTION, delta="vera", options={"seed": 3, "save_projection": False}),
        "VERA",
    ),
    "loha": ("llama", LoRA(rank=3, alpha=5, targets=ATTENTION, delta="loha"), "LOHA"),
    "loha, ranks": (
        "llama",
        LoRA(rank=3, alpha=5, targets=ATTENTION, delta="loha", overrides={"q_proj": {"rank": 2, "scaling": "rslora"}}),
        "LOHA",
    ),
    "loha, bias": ("llama", LoRA(rank=3, targets=ATTENTION, delta="loha", bias="lora_only"), "LORA"),
    "loha, gpt2": ("gpt2", LoRA(rank=3, targets=["c_attn"], delta="loha"), "LORA"),
    "lokr": ("llama", LoRA(rank=2, alpha=5, targets=ATTENTION, delta="lokr"), "LOKR"),
    "lokr, conv": (
        "conv2d",
        LoRA(rank=1, targets=["stem", "body"], delta="lokr", options={"effective_conv": True, "factor": 4}),
        "LOKR",
    ),
    "lokr, conv3d": ("conv3d", LoRA(rank=1, targets=["body"], delta="lokr"), "LORA"),
    "lokr, whole conv1d": ("conv1d", LoRA(rank=8, targets=["body"], delta="lokr"), "LORA"),
    "two kinds": ("llama", LoRA(rank=3, targets=ATTENTION, overrides={"q_proj": {"delta": "loha"}}), "LORA"),
}


@pytest.mark.parametrize("case", OURS)
def test_written_here_read_by_peft_and_here(case: str, tmp_path: Path) -> None:
    net, spec, kind = OURS[case]
    model = NETS[net]()
    attach(model, spec)
    spread(list(parameters(model).values()))
    expected = logits(model, batch(net))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save(model, tmp_path)
    assert any("as the plain LoRA" in str(w.message) for w in said) == (kind == "LORA")
    assert files(tmp_path)[1]["peft_type"] == kind
    torch.testing.assert_close(in_peft(net, tmp_path), expected, atol=1e-5, rtol=1e-5)
    again = NETS[net]()
    load(again, tmp_path)
    torch.testing.assert_close(logits(again, batch(net)), expected, atol=1e-5, rtol=1e-5)
    if kind != "LORA":
        assert spec_of(again).delta == spec.delta
        save(again, tmp_path / "again")
        same_files(tmp_path, tmp_path / "again")


# ---------------------------------------------------------------- what cannot be read


def test_pefts_mixed_up_kronecker_product_is_refused(tmp_path: Path) -> None:
    net = NETS["conv1d"]()
    model = peft.get_peft_model(net, peft.LoKrConfig(r=8, target_modules=["body"]))
    model.save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="lokr_w2 of a Conv1d"):
        load(NETS["conv1d"](), tmp_path)


def test_inspection_needs_factors_and_says_how_to_get_them(tmp_path: Path) -> None:
    theirs("LOHA", "plain", tmp_path)
    with pytest.raises(CheckpointError, match=r"LOHA(.|\n)*convert\(model"):
        read(tmp_path)


def test_dropouts_that_only_peft_has_are_said_where_they_would_matter(tmp_path: Path) -> None:
    config = peft.LoHaConfig(r=2, target_modules=["q_proj"], rank_dropout=0.2)
    peft.get_peft_model(NETS["llama"](), config).save_pretrained(str(tmp_path))
    assert not load(NETS["llama"](), tmp_path).notes
    assert any("rank_dropout=0.2" in note for note in load(NETS["llama"](), tmp_path, trainable=True).notes)


def test_a_tensor_that_lacks_and_one_of_another_shape(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    theirs("LOHA", "plain", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    site = f"{PREFIX}model.layers.0.self_attn.q_proj"
    held[f"{site}.hada_w1_a"] = held[f"{site}.hada_w1_a"][:8].contiguous()
    del held[f"{site}.hada_w2_b"]
    save_file(held, file)
    with pytest.raises(CheckpointError, match=r"lacks hada_w2_b; hada_w1_a is \[8, 3\], needs \[32, 3\]"):
        load(NETS["llama"](), tmp_path)


def test_every_method_of_pefts_is_read_or_refused_with_a_reason() -> None:
    for kind in {member.value for member in peft.PeftType} - {"LORA", *METHODS}:
        assert kind in OTHER_METHODS, kind
        with pytest.raises(CheckpointError) as caught:
            parse({"peft_type": kind, "r": 4, "target_modules": ["q"]})
        assert OTHER_METHODS[kind] in str(caught.value) and "Way out" in str(caught.value)
    with pytest.raises(CheckpointError, match="Did you mean 'LOKR'"):
        parse({"peft_type": "LOKRR"})


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_key_of_a_config_is_known(kind: str) -> None:
    """PEFT's own defaults must pass, and none of its keys may be news to us."""
    extra = {"total_step": 5} if kind == "ADALORA" else {}
    config = getattr(peft, CONFIGS[kind])(target_modules=["q"], **extra).to_dict()
    parsed = parse({**config, "peft_type": kind, "peft_version": "9.9", "target_modules": ["q"]})
    assert parsed.kind == kind and not parsed.unknown


@pytest.mark.parametrize("value", [True, {"a": 1}, [3]])
def test_a_newer_pefts_new_switch_is_refused_unless_told(value: object) -> None:
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q"], "new_thing": value}
    with pytest.raises(CheckpointError, match=r"PEFT 0\.99\.1, which is newer") as caught:
        parse({**config, "peft_version": "0.99.1"})
    assert "new_thing" in str(caught.value) and "allow_unknown=True" in str(caught.value)
    assert parse({**config, "peft_version": "0.99.1"}, allow_unknown=True).unknown == {"new_thing": value}
    assert parse({**config, "peft_version": "0.21.2"}).unknown == {"new_thing": value}  # no option of that version
    assert parse({**config, "peft_version": "0.99.1", "new_thing": 16}).unknown == {"new_thing": 16}


def test_allow_unknown_loads_it(tmp_path: Path) -> None:
    expected = theirs("LOHA", "plain", tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_version": "9.1", "use_magic": True}))
    model: nn.Module = NETS["llama"]()
    with pytest.raises(CheckpointError, match="use_magic=True"):
        load(model, tmp_path)
    load(model, tmp_path, allow_unknown=True)
    torch.testing.assert_close(logits(model, batch("llama")), expected, atol=1e-5, rtol=1e-5)
    save(model, tmp_path / "again")
    assert files(tmp_path / "again")[1]["use_magic"] is True
