"""inspect, merge and recommend, through the command line, on tiny adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from veneer.ckpt.peft import load, save
from veneer.core.model import activate, attach, parameters
from veneer.core.spec import LoRA

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture
def make(tiny_folder: Path, own_folder: Path) -> Callable[..., Path]:
    """make("a", seed=1): an adapter of the tiny model that is away from its start."""

    def build(name: str, seed: int = 0, size: float = 0.3, **spec: Any) -> Path:
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        attach(model, LoRA(**{"rank": 4, "alpha": 8, **spec}))
        dice = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in parameters(model).values():
                parameter.copy_(torch.randn(parameter.shape, generator=dice) * size)
        return save(model, own_folder / name)

    return build


def logits(base: Path, *adapters: Path, weights: tuple[float, ...] = ()) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    for i, folder in enumerate(adapters):
        load(model, folder, f"x{i}")
    if weights:
        activate(model, {f"x{i}": w for i, w in enumerate(weights)})
    with torch.no_grad():
        return model(IDS).logits


# ---------------------------------------------------------------- inspect


def test_inspect_measures_every_layer(make: Callable[..., Path], veneer: Callable[..., Any], tiny_folder: Path) -> None:
    folder = make("a", rank=4, overrides={"q_proj": {"rank": 2}})
    said = veneer("inspect", folder, "--json").json
    assert said["adapter"]["ranks"] == [2, 4] and said["adapter"]["layers"] == 14 == len(said["layers"])
    assert said["adapter"]["base"]["matches"] is True and said["adapter"]["untrained"] == []
    layer = next(row for row in said["layers"] if row["site"].endswith("0.self_attn.q_proj"))
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    load(model, folder)
    dense = model.model.layers[0].self_attn.q_proj.slots["default"].delta.weight()
    assert layer["norm"] == pytest.approx(float(dense.norm()), rel=1e-5)
    assert layer["values"] == pytest.approx(torch.linalg.svdvals(dense)[:2].tolist(), rel=1e-4)
    text = veneer("inspect", folder)
    assert text.code == 0 and "14 layers, rank 2, 4" in text.out and "q_proj" in text.out
    assert "model.layers.1.mlp.down_proj" in veneer("inspect", folder, "--layers").out


def test_inspect_finds_another_base_dead_layers_and_nan(
    make: Callable[..., Path], veneer: Callable[..., Any], tmp_path: Path, make_model: Callable[..., Any]
) -> None:
    folder = make("a")
    make_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "other")
    said = veneer("inspect", folder, "--base", tmp_path / "other")
    assert said.code == 1 and "is another model: num_hidden_layers: 2" in said.out
    dead = veneer("inspect", make("dead", size=0.0))
    assert "untrained (B is 0)" in dead.out and "and 8 more" in dead.out
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    weights[next(iter(weights))].fill_(float("nan"))
    save_file(weights, folder / "adapter_model.safetensors")
    broken = veneer("inspect", folder)
    assert broken.code == 1 and "NaN or infinite" in broken.out


def test_two_adapters_are_compared(make: Callable[..., Path], veneer: Callable[..., Any]) -> None:
    a, b = make("a"), make("b", seed=1, exclude=["down_proj"])
    same = veneer("inspect", a, a, "--json").json
    assert same["cosine"] == pytest.approx(1) and same["difference"] == pytest.approx(0, abs=1e-6)
    other = veneer("inspect", a, b, "--json").json
    assert abs(other["cosine"]) < 0.3 and len(other["layers"]) == 12 and len(other["only_in_a"]) == 2
    text = veneer("inspect", a, b).out
    assert "only in a" in text and "shared inputs" in text


def test_inspect_of_a_file_says_what_makes_a_folder_of_it(veneer: Callable[..., Any], own_folder: Path) -> None:
    (own_folder / "style.safetensors").write_bytes(b"")
    said = veneer("inspect", "style.safetensors")
    assert said.code == 2 and "veneer convert style.safetensors --to peft" in said.err


@pytest.mark.parametrize("words", [["nowhere"], ["."]])
def test_inspect_of_nothing(words: list[str], veneer: Callable[..., Any]) -> None:
    said = veneer("inspect", *words)
    assert said.code == 2 and said.err.count("\n") >= 2


# ---------------------------------------------------------------- merge


def test_one_adapter_goes_into_its_base(
    make: Callable[..., Path], veneer: Callable[..., Any], tiny_folder: Path
) -> None:
    a = make("a")
    said = veneer("merge", a / "adapter_model.safetensors", "--out", "merged", "--prove", "--json").json
    assert said["tensors"] == 14 and said["kept_share"] > 0.99 and said["logits_error"] < 1e-3
    assert torch.allclose(logits(Path("merged")), logits(tiny_folder, a), atol=1e-4)
    assert veneer("chat", "merged", "-p", "hi", "--max-tokens", 3).code == 0  # the tokenizer went along
    assert "nothing is ever overwritten" in veneer("merge", a, "--out", "merged").err


def test_weights_multiply_dw_into_the_base(
    make: Callable[..., Path], veneer: Callable[..., Any], tiny_folder: Path
) -> None:
    a, b = make("a"), make("b", seed=1)
    assert veneer("merge", f"{a}:0.5", f"{b}:-0.25", "--into-base", "--out", "both").code == 0
    assert torch.allclose(logits(Path("both")), logits(tiny_folder, a, b, weights=(0.5, -0.25)), atol=1e-4)


def test_several_adapters_become_one(make: Callable[..., Path], veneer: Callable[..., Any], tiny_folder: Path) -> None:
    a, b = make("a"), make("b", seed=1)
    said = veneer("merge", f"{a}:0.7", f"{b}:0.3", "--out", "mix", "--json").json
    assert said["ranks"] == [8] and said["largest_error"] == 0
    assert torch.allclose(logits(tiny_folder, Path("mix")), logits(tiny_folder, a, b, weights=(0.7, 0.3)), atol=1e-4)
    cut = veneer("merge", a, b, "--method", "svd", "--rank", 4, "--out", "cut", "--json").json
    assert cut["ranks"] == [4] and 0 < cut["largest_error"] < 1
    assert veneer("merge", a, b, "--method", "ties", "--density", 0.3, "--out", "ties").code == 0


def test_adapters_of_bases_that_were_packed_apart(
    make: Callable[..., Path], veneer: Callable[..., Any], tiny_folder: Path
) -> None:
    """Mixing is on dW and goes; asking both on one base would give one of them answers that it was not trained for."""
    a, b = make("a"), make("b", seed=1)
    assert veneer("chat", a, "--vs", b, "-p", "hi", "--max-tokens", 2).code == 0
    for folder, kind in ((a, "int8"), (b, "nf4")):
        (folder / "task.json").write_text(json.dumps({"task": "causal_lm", "quant": {"kind": kind}}))
    said = veneer("chat", a, "--vs", b, "-p", "hi", "--max-tokens", 2)
    assert said.code == 2 and "in different storages: int8, nf4" in said.err
    said = veneer("merge", f"{a}:0.7", f"{b}:0.3", "--out", "mix")
    assert said.code == 0 and "their proofs are not replayed" in said.err
    assert torch.allclose(logits(tiny_folder, Path("mix")), logits(tiny_folder, a, b, weights=(0.7, 0.3)), atol=1e-4)


@pytest.mark.parametrize(
    "words, says",
    [
        (["a", "a", "--out", "x"], "an adapter is named twice"),
        (["a", "b", "--out", "x", "--method", "tise"], "'tise' is not one of"),
        (["a"], "the following arguments are required: --out"),
        (["tiny-llama", "--out", "x"], "no adapter: tiny-llama"),
        (["painter", "--out", "x"], "only models in one folder are merged on disk: painter"),
        (["d.txt", "--out", "x"], "no adapter: d.txt"),
        (["a", "b", "--density", "2", "--method", "ties", "--out", "x"], "density=2.0 must be above 0"),
    ],
)
def test_what_cannot_be_merged(
    words: list[str], says: str, make: Callable[..., Path], veneer: Callable[..., Any]
) -> None:
    make("a")
    make("b", seed=1)
    (make("painter") / "task.json").write_text('{"task": "diffusion"}')
    Path("d.txt").write_text("no folder")
    said = veneer("merge", *words)
    assert said.code == 2 and says in said.err
    assert not Path("x").exists()


# ---------------------------------------------------------------- recommend


def test_recommend_gives_a_value_a_reason_and_a_source(veneer: Callable[..., Any]) -> None:
    said = veneer("recommend", "8B", "--task", "classification", "--rows", 5000, "--json").json
    assert said["settings"]["r"]["value"] == 16 and all(s["source"] for s in said["settings"].values())
    assert said["command"].startswith("veneer train 8B DATA --")
    text = veneer("recommend", "8B", "--rows", 5000, "--memory", "24GB").out
    assert "all-linear" in text and "memory: " in text and "veneer train 8B DATA" in text


def test_recommend_says_when_lora_is_the_wrong_tool(veneer: Callable[..., Any], tiny_folder: Path) -> None:
    said = veneer("recommend", tiny_folder, "--rows", 40)
    assert said.code == 0 and "!" in said.out and ("freeze" in said.out or "full" in said.out)


def test_recommend_counts_rows_itself(veneer: Callable[..., Any], own_folder: Path) -> None:
    (own_folder / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 7)
    for words in (["d.jsonl"], ["--data", "d.jsonl"]):
        said = veneer("recommend", "8B", *words, "--json").json
        assert said["rows"] == 7 and said["command"].startswith("veneer train 8B d.jsonl --")
    assert veneer("recommend", "8B", "--task", "clasification").code == 2


def test_the_recommended_command_is_one_that_train_understands(veneer: Callable[..., Any]) -> None:
    from veneer.app.flags import from_said, split

    for task in ("generation", "classification", "reasoning"):
        command = veneer("recommend", "8B", "--task", task, "--rows", 500, "--json").json["command"]
        said = split(command.split()[2:])
        from_said(said.rest, said.flags, [], None)
