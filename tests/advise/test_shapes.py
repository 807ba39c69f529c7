"""Shapes are the shapes of the model that transformers builds: every parameter and every linear layer by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from veneer.advise.shapes import FAMILIES, TYPICAL, bytes_of, shapes_of, typical
from veneer.core.op import op_for
from veneer.errors import ConfigError

SMALL = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 500,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
OWN = {  # where a family calls things otherwise
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 500},
    "opt": {"hidden_size": 64, "ffn_dim": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 500},
    "distilbert": {"dim": 64, "hidden_dim": 160, "n_layers": 3, "n_heads": 4, "vocab_size": 500},
    "electra": {**SMALL, "embedding_size": 32},
    "t5": {"d_model": 64, "d_ff": 160, "num_layers": 3, "num_heads": 4, "d_kv": 16, "vocab_size": 500},
    "mt5": {"d_model": 64, "d_ff": 160, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 500},
    "bart": {"d_model": 64, "encoder_ffn_dim": 160, "decoder_ffn_dim": 128, "encoder_layers": 3, "decoder_layers": 2,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 500},
    "vit": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4},
    "dinov2": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    "mixtral": {**SMALL, "num_local_experts": 4},
    "qwen3_moe": {**SMALL, "num_experts": 4, "moe_intermediate_size": 32},
}  # fmt: skip
OWN |= {"mbart": OWN["bart"], "deit": OWN["vit"]}
CLASSES = {
    "causal_lm": transformers.AutoModelForCausalLM,
    "sequence_classification": transformers.AutoModelForSequenceClassification,
    "token_classification": transformers.AutoModelForTokenClassification,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "image": transformers.AutoModelForImageClassification,
}
DECODERS = "llama granite mistral qwen2 qwen3 smollm3 gemma gemma2 gemma3_text phi3 starcoder2 mixtral qwen3_moe"
ENCODERS = "bert roberta xlm-roberta camembert electra distilbert"
CASES = [(family, "causal_lm") for family in (*DECODERS.split(), "gpt2", "gpt_neox", "opt")]
CASES += [(family, "sequence_classification") for family in (*ENCODERS.split(), "llama", "gpt2", "qwen3")]
CASES += [(family, "token_classification") for family in ("bert", "roberta", "electra", "distilbert", "llama", "gpt2")]
CASES += [(family, "seq2seq") for family in ("t5", "mt5", "bart", "mbart")]
CASES += [("vit", "image"), ("dinov2", "image")]
IN_NAME_ONLY = {"deit", "deberta-v2"}  # share a builder, and differ from it in a few vectors


def skeleton(family: str, task: str) -> tuple[Any, Any]:
    config = transformers.AutoConfig.for_model(family, **OWN.get(family, SMALL))
    with torch.device("meta"):
        return config, CLASSES[task].from_config(config)


OLDER = {  # what transformers 5.17 calls a layer of DINOv2, and what later ones do
    "attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
}  # fmt: skip


def linears(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    found = {}
    for name, module in model.named_modules():
        if name.startswith("dinov2."):
            name = next((name.replace(old, new) for old, new in OLDER.items() if name.endswith(old)), name)
        op = op_for(type(module))
        plain = op is not None and not op.looks_up and not hasattr(module, "kernel_size")
        if plain and isinstance(getattr(module, "weight", None), torch.nn.Parameter) and name != "lm_head":
            found[name] = op.shape(module)
    return found


@pytest.mark.parametrize(("family", "task"), CASES)
def test_every_parameter_is_counted_and_every_linear_layer_has_its_name(family: str, task: str) -> None:
    config, model = skeleton(family, task)
    shapes = shapes_of(config, "sequence_classification" if task == "image" else task)
    assert shapes.parameters == sum(p.numel() for p in model.parameters())
    own = {name: (matrix.out, matrix.n) for name, matrix, *_ in shapes.linears()}
    experts = {name for name in linears(model) if name not in own and ".gate" in name}  # routers
    assert {n: s for n, s in linears(model).items() if n not in experts} == own


def test_every_family_is_held_to_its_model() -> None:
    assert set(FAMILIES) == {family for family, _ in CASES} | IN_NAME_ONLY


@pytest.mark.parametrize("row", TYPICAL, ids=lambda row: row[0])
def test_the_models_that_stand_for_a_size_have_that_size(row: tuple[Any, ...]) -> None:
    name = row[0]
    said = float(name.split("-")[-1][:-1]) * (1e9 if name.endswith("B") else 1e6)
    assert typical(name).parameters == pytest.approx(said, rel=0.25)


def test_a_config_a_mapping_a_folder_and_a_model_say_the_same(tmp_path: Path) -> None:
    config, model = skeleton("llama", "causal_lm")
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    ways = (config, config.to_dict(), model, tmp_path, str(tmp_path), tmp_path / "config.json")
    assert len({shapes_of(way).parameters for way in ways}) == 1


def test_the_task_is_read_from_the_architecture() -> None:
    config, _ = skeleton("llama", "sequence_classification")
    told = {**config.to_dict(), "architectures": ["LlamaForSequenceClassification"]}
    assert shapes_of(told).task == "sequence_classification"
    assert shapes_of(told).vocab == 0


def test_a_hub_id_is_found_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = skeleton("llama", "causal_lm")
    folder = tmp_path / "models--some--thing" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert shapes_of("some/thing").parameters == shapes_of(config).parameters


def test_what_is_assumed_is_said() -> None:
    config, _ = skeleton("llama", "causal_lm")
    strange = shapes_of({**config.to_dict(), "model_type": "lama"})
    assert strange.parameters == shapes_of(config).parameters
    assert "'lama' is not known (near: llama)" in strange.assumed[0]
    assert "Llama-3.1-8B" in shapes_of("8B").assumed[0]
    assert "read from the name" in shapes_of("org/Some-7B-Instruct").assumed[0]
    picture = {"model_type": "llava", "text_config": config.to_dict()}
    assert "only the text part" in shapes_of(picture).assumed[0]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("no/such-model", "no config.json"),
        ("./nowhere", "no config.json"),
        ({"model_type": "llama"}, "no hidden_size"),
        ({"model_type": "llama", "hidden_size": "wide"}, "must be a whole number"),
        ("0.1M", "a model of 100000 parameters"),
        (object(), "cannot read shapes from object"),
        (None, "cannot read shapes from NoneType"),
    ],
)
def test_what_cannot_be_read_says_so(model: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shapes_of(model)


@pytest.mark.parametrize("text", ["", "[1]", "{broken"])
def test_a_broken_config_names_its_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        shapes_of(tmp_path)
    assert caught.value.where == str(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("said", "meant"), [("24GB", 24e9), ("24 GiB", 24 * 2**30), ("24", 24 * 2**30), ("512m", 512e6), (1000, 1000)]
)
def test_sizes_are_read_as_people_write_them(said: Any, meant: float) -> None:
    assert bytes_of(said) == meant


@pytest.mark.parametrize("said", ["much", "-1GB", 0, -5, float("nan"), float("inf"), "24 GB of it"])
def test_sizes_that_are_none_are_refused(said: Any) -> None:
    with pytest.raises(ConfigError, match="not an amount of memory"):
        bytes_of(said)
