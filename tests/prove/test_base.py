"""P7: a base that is not what its files hold is caught, however it came to be so, and a right one passes however it is
stored. Each break is one that leaves all other proofs as they are: they compare the model with itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import veneer
from veneer import LoRA
from veneer.core.host import plain_modules
from veneer.core.model import parameters
from veneer.errors import ProofFailed
from veneer.prove import Check, LeftOut, is_as_filed, prove
from veneer.quant import hf
from veneer.quant.hf import VeneerConfig
from veneer.quant.layer import Packed
from veneer.quant.model import save_energies
from veneer.quant.stack import PackedStack

pytestmark = pytest.mark.filterwarnings(r"ignore:(int8|fp8). .*unpacked for each product")

IDS = torch.arange(20)[None]
Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for p in model.parameters():  # norms of their own, too
        nn.init.normal_(p, mean=float(p.ndim == 1), std=0.05)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "whole"
    torch.manual_seed(0)
    llama().save_pretrained(path, max_shard_size="100KB")
    return path


def read(
    folder: Path, kind: str | None = "nf4", kinds: Any = AutoModelForCausalLM, packing: Any = None, **more: Any
) -> Any:
    told = {"quantization_config": VeneerConfig(kind, **packing or {})} if kind else {}
    return kinds.from_pretrained(folder, **{"dtype": torch.float32} | told | more)


def checked(model: nn.Module, **options: Any) -> Check:
    found = is_as_filed(model, **options)
    assert isinstance(found, Check), found
    return found


# ---------------------------------------------------------------- what is right passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "packing",
    [
        {}, {"kind": "nf4"}, {"kind": "nf4", "double": False, "block": 32}, {"kind": "int8"}, {"kind": "fp8"},
        {"kind": "int8", "rotate": False}, {"kind": "fp8", "rotate": False}, {"kind": "int8", "outliers": 3.0},
        {"kind": "nf4", "embedding": True, "head": True}, {"kind": "fp8", "embedding": True, "head": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_base_as_it_was_read(folder: Path, dtype: torch.dtype, packing: dict[str, Any]) -> None:
    more = dict(packing)
    model = read(folder, more.pop("kind", None), dtype=dtype, packing=more)
    veneer.attach(model, LoRA(rank=2))  # what lies on top is no part of it
    found = checked(model)
    assert found.passed, found
    ends = 2 if packing.get("embedding") else 0
    packed = sum(isinstance(m, Packed) for m in plain_modules(model).values())
    assert packed == (14 + ends if packing else 0)
    assert found.figures["packed"] == packed and found.figures["tensors"] == 21
    assert not found.figures["not_compared"] and not found.figures["unused"]
    assert found.figures["worst"] <= 1 and (found.figures["worst"] > 0.5) == bool(packing)


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_packed_later_and_saved_packed(folder: Path, tmp_path: Path, kind: str) -> None:
    model = read(folder, None)
    veneer.quantize(model, kind)
    assert checked(model).passed
    model.save_pretrained(tmp_path / "packed")
    again = read(tmp_path / "packed", None)
    found = checked(again)
    assert found.passed and found.figures["packed"] == 0 and found.figures["exact"] > 21  # the codes, bit for bit
    assert checked(again, where=folder).passed  # and against what they were made of
    again.get_submodule(UP).parts[1][1] += 1
    assert "up_proj.weight" in checked(again).statement
    assert is_as_filed(model, tmp_path / "nowhere") == LeftOut(
        "P7", "Base", "Its files could not be read anew: There is no such folder."
    )


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_rounded_with_regard_to_inputs(folder: Path, tmp_path: Path, kind: str) -> None:
    whole, path = read(folder, None), tmp_path / "energies.safetensors"
    layers = {n: m for n, m in whole.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    save_energies(whole, layers, [IDS, IDS.flip(1) + 40], path)
    model = read(folder, kind, packing={"energies": str(path)})
    plainly = read(folder, kind)
    assert not torch.equal(model.get_submodule(Q).weight, plainly.get_submodule(Q).weight)
    assert checked(model).passed and checked(model, inputs={}).passed
    for broken in (another_layer, rows_turned_round, halves_exchanged, scales_of_the_next_block, scales_a_fifth_larger):
        model = read(folder, kind, packing={"energies": str(path)})
        name = broken(model)
        for known in (None, {}):
            assert name in checked(model, inputs=known).statement, (broken, known)


@pytest.mark.parametrize("kind", [None, "nf4", "int8", "fp8"])
def test_a_matrix_that_lies_across(tmp_path: Path, kind: str | None) -> None:
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=32, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = read(tmp_path, kind)
    found = checked(model)
    assert found.passed and not found.figures["not_compared"], found
    mlp = model.transformer.h[1].mlp.c_fc
    mlp.weight.data = mlp.weight.data.flip(0)
    assert "h.1.mlp.c_fc.weight" in checked(model).statement


def mixtral(folder: Path) -> Path:
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=12, vocab_size=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    names = load_file(folder / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.11.w1.weight" in names  # the files hold experts one by one
    return folder


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_experts_that_the_files_hold_apart(tmp_path: Path, kind: str | None) -> None:
    model = read(mixtral(tmp_path), kind)
    found = checked(model)
    assert found.passed and not found.figures["not_compared"] and not found.figures["unused"], found
    owner = model.model.layers[1].mlp.experts
    held = owner._parameters["gate_up_proj"]
    if isinstance(held, PackedStack):
        codes = held.parts[0]
        codes[[2, 10]] = codes[[10, 2]]
    else:
        held.data[[2, 10]] = held.data[[10, 2]]
    assert "layers.1.mlp.experts.gate_up_proj" in checked(model).statement


def test_a_head_that_no_file_holds(folder: Path, tmp_path: Path) -> None:
    model = read(folder, None, AutoModelForSequenceClassification, num_labels=3)
    assert "score.weight is in none of the files" in checked(model).statement
    assert checked(model).figures["new"] == ["score"] and checked(model, complete=False).passed
    found = checked(model, fresh=["score"])
    assert found.passed and found.figures["unused"] == ["lm_head.weight"] and "lm_head.weight" in found.statement


def test_names_of_old(tmp_path: Path) -> None:
    """Files of BERT that call a norm's weight gamma, and a task without its heads."""
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=100
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for k, t in load_file(file).items()}  # fmt: skip
    save_file(old, file, {"format": "pt"})
    model = read(tmp_path, None, AutoModelForSequenceClassification)
    found = checked(model, fresh=["classifier", "pooler"])
    assert found.passed and found.figures["tensors"] > 30, found
    model.bert.encoder.layer[1].output.LayerNorm.bias.data += 1e-3
    assert "layer.1.output.LayerNorm.bias differs" in checked(model, fresh=["classifier", "pooler"]).statement


def test_a_table_of_names_that_cannot_be_read_is_no_verdict(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = read(folder, None)
    monkeypatch.delattr("transformers.core_model_loading.rename_source_key")
    found = is_as_filed(model)
    assert isinstance(found, LeftOut) and "could not be told: cannot import name" in found.reason


# ---------------------------------------------------------------- the breaks: the name that must be in the finding

BREAKS: list[Callable[[Any], str]] = []


def breaks(function: Callable[[Any], str]) -> Callable[[Any], str]:
    BREAKS.append(function)
    return function


def codes_of(model: Any, name: str) -> torch.Tensor:
    return model.get_submodule(name)._parameters["weight"].data


@breaks
def another_layer(model: Any) -> str:
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    return UP


@breaks
def a_neighbour_of_the_same_shape(model: Any) -> str:
    mlp = model.model.layers[1].mlp
    mlp.up_proj, mlp.gate_proj = mlp.gate_proj, mlp.up_proj
    return UP


@breaks
def rows_turned_round(model: Any) -> str:
    codes_of(model, UP).copy_(codes_of(model, UP).flip(0).clone())
    return UP


@breaks
def codes_in_another_order(model: Any) -> str:
    codes_of(model, UP).copy_(codes_of(model, UP).T.contiguous().view_as(codes_of(model, UP)))
    return UP


@breaks
def scales_of_the_next_block(model: Any) -> str:
    layer = model.get_submodule(UP)
    layer.parts[1].copy_(layer.parts[1].roll(1))
    return UP


@breaks
def scales_a_fifth_larger(model: Any) -> str:
    for part in model.get_submodule(UP).parts[1:]:
        if part.is_floating_point():
            part *= 1.2
    return UP


@breaks
def never_filled(model: Any) -> str:
    layer = model.get_submodule(UP)
    layer._parameters["weight"] = nn.Parameter(codes_of(model, UP).to("meta"), requires_grad=False)
    return f"{UP}.weight has no values"


@breaks
def filled_with_zeros(model: Any) -> str:
    codes_of(model, UP).zero_()
    return UP


@breaks
def the_norm_of_another_layer(model: Any) -> str:
    one, two = (layer.input_layernorm.weight.data for layer in model.model.layers)
    two.copy_(one)
    return "model.layers.1.input_layernorm.weight differs"


@breaks
def the_embedding_one_row_on(model: Any) -> str:
    w = model.model.embed_tokens.weight.data
    w.copy_(w.roll(1, 0).clone())
    return "model.embed_tokens.weight differs"


@breaks
def the_head_tied_by_mistake(model: Any) -> str:
    model.lm_head.weight = model.model.embed_tokens.weight
    return "lm_head.weight differs"


@breaks
def a_buffer_without_values(model: Any) -> str:
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.to("meta")
    return "model.rotary_emb.inv_freq has no values"


def halves_exchanged(model: Any) -> str:
    """The two weights of each byte."""
    codes = codes_of(model, UP)
    codes.copy_((codes << 4) | (codes >> 4))
    return UP


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("mutate", BREAKS, ids=lambda f: f.__name__)
def test_the_break_is_caught(folder: Path, kind: str, mutate: Callable[[Any], str]) -> None:
    model = read(folder, kind)
    name = mutate(model)
    found = checked(model)
    assert not found.passed and name in found.statement and "TypeError" not in found.statement, found


def test_halves_of_bytes_exchanged(folder: Path) -> None:
    model = read(folder)
    assert halves_exchanged(model) in checked(model).statement


@pytest.mark.parametrize("mutate", [another_layer, the_norm_of_another_layer, the_embedding_one_row_on])
def test_a_base_that_is_not_packed(folder: Path, mutate: Callable[[Any], str]) -> None:
    model = read(folder, None, dtype=torch.bfloat16)
    name = mutate(model)
    assert name in checked(model).statement


def test_all_other_proofs_pass_on_a_wrong_base(folder: Path) -> None:
    """Why there is this one: an adapter on another layer's weights is trained, reloaded and switched as on the right
    ones."""
    model = read(folder)
    name = rows_turned_round(model)
    veneer.attach(model, LoRA(rank=2))
    model(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for p in parameters(model).values():
            p.add_(0.1 * torch.randn_like(p))
    proof = prove(model, {"input_ids": IDS}, base=folder)
    assert [check.id for check in proof.failed] == ["P7"], proof
    assert name in proof["P7"].statement and "P7 failed" in proof.line()


def test_a_parameter_that_was_lost_from_the_files(folder: Path, tmp_path: Path) -> None:
    whole = read(folder, None)
    whole.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = checked(read(tmp_path, None))
    assert "model.layers.0.mlp.down_proj.weight is in none of the files" in found.statement


# ---------------------------------------------------------------- in a run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def train(source: Path, rows: Path, tmp_path: Path, **more: Any) -> Any:
    options = {"steps": 2, "r": 2, "val": 2, "out": str(tmp_path / "run"), "max_len": 64}
    options |= {"quant_rows": 2} if more["quant"] == "nf4" else {}
    return veneer.train(str(source), str(rows), **options | more)


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_a_run_proves_its_base(tiny_folder: Path, rows: Path, tmp_path: Path, quant: str) -> None:
    run = train(tiny_folder, rows, tmp_path, quant=quant)
    proof = json.loads((run.folder / "proof.json").read_text())
    found = next(check for check in proof["checks"] if check["id"] == "P7")
    assert found["passed"] and (found["figures"]["packed"] > 0) == (quant != "none")


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_run_refuses_a_base_that_was_read_wrongly(
    tiny_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    """The loader hands the packer one layer turned round."""
    plain = hf.to_matrix

    def wrong(layer: nn.Module, w: torch.Tensor) -> torch.Tensor:
        return plain(layer, w.flip(0) if "up_proj" in names[id(layer)] else w)

    names: dict[int, str] = {}
    convert = hf.Pack.convert

    def noting(self: Any, given: dict[str, Any], model: Any = None, **more: Any) -> Any:
        names.update({id(module): name for name, module in model.named_modules()})
        return convert(self, given, model=model, **more)

    monkeypatch.setattr(hf, "to_matrix", wrong)
    monkeypatch.setattr(hf.Pack, "convert", noting)
    with pytest.raises(ProofFailed, match=r"P7 Base: model\.layers\.0\.mlp\.up_proj\.weight is off by"):
        train(tiny_folder, rows, tmp_path, quant=quant)
