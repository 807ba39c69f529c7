"""Proofs on every kind of model that they claim to cover, and what they leave behind: nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig

import veneer
import veneer.prove
from veneer.ckpt.peft import save
from veneer.core.combine import COMBINES
from veneer.core.delta import DELTAS
from veneer.core.host import Active
from veneer.core.init import INITS, NEEDS
from veneer.core.model import activate, active_of, adapters, attach, detach, disabled, merge, parameters, unmerge
from veneer.core.spec import LoRA
from veneer.errors import CheckpointError, ProofFailed, StateError
from veneer.prove import Proof, prove, prove_run, replay, snapshot
from veneer.prove.answers import few
from veneer.prove.found import as_found, bare
from veneer.prove.proof import Check

IDS = ["P2", "P3", "P4", "P5", "P6"]


def moved(model: nn.Module, name: str | None = None) -> nn.Module:
    with torch.no_grad():
        for parameter in parameters(model, name).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(rows: int = 2, length: int = 12) -> dict[str, Tensor]:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length - 4 :] = 0
    return {"input_ids": torch.randint(7, 384, (rows, length)), "attention_mask": mask}


def with_targets() -> dict[str, Tensor]:
    return {**tokens(), "decoder_input_ids": torch.randint(7, 384, (2, 5))}


# ---------------------------------------------------------------- which models

MODELS: dict[str, tuple[tuple[Any, ...], dict[str, Any], Callable[[], Any], dict[str, Any]]] = {
    "llama": (("llama",), {}, tokens, {}),
    "tied qwen2 with biases": (("qwen2",), {}, tokens, {"bias": "lora_only"}),
    "gpt2, fused qkv": (("gpt2",), {}, tokens, {"combine": "dora"}),
    "classifier": (("bert",), {"num_labels": 3}, tokens, {"modules_to_save": ["classifier"]}),
    "regression": (("bert",), {"num_labels": 1}, tokens, {"modules_to_save": ["classifier"]}),
    "tagger": (("bert", "token"), {"num_labels": 5}, tokens, {"modules_to_save": ["classifier"], "init": "olora"}),
    "encoder-decoder": (("t5",), {}, with_targets, {}),
    "encoder-decoder without targets": (("t5",), {}, tokens, {"targets": "attention"}),
    "embeddings": (("llama",), {}, tokens, {"targets": ["embed_tokens", "q_proj"], "init": "pissa"}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_sound_adapter_is_proved(make_model: Callable[..., nn.Module], kind: str) -> None:
    which, changes, inputs, spec = MODELS[kind]
    model, batch = make_model(*which, **changes), inputs()
    attach(model, LoRA(rank=4, **spec))
    before = snapshot(model, inputs=batch)
    proof = prove_run(moved(model), before=before)
    assert proof.passed, str(proof)
    assert [check.id for check in proof.checks] == IDS
    assert [each.id for each in proof.left_out] == ["P0", "P1", "P7"]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Attention(nn.Module):
    """A weight that is read, not called; two tensors in a tuple as output."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        h = self.up(x) * scale
        return self.mix(h, h, h, need_weights=True)


@pytest.mark.parametrize(
    "make,inputs,targets",
    [
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(5, 6), "all-linear"),
        (Convolutions, (torch.randn(2, 3, 8, 8),), ["0", "3"]),
        (Attention, {"x": torch.randn(2, 5, 6), "scale": 0.5}, ["up", "out_proj"]),
        (Attention, [(torch.randn(2, 5, 6), 2.0), torch.randn(1, 3, 6)], ["up", "out_proj", "in_proj_weight"]),
    ],
)
def test_any_module_and_any_inputs(make: Callable[[], nn.Module], inputs: Any, targets: Any) -> None:
    model = make()
    attach(model, LoRA(rank=2, targets=targets))
    proof = prove(moved(model), inputs)
    assert proof.passed, str(proof)
    assert proof["P4"].figures["measure"] == "relative change"
    assert not proof.canary


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", [{}, {"combine": "dora"}, {"init": "pissa"}], ids=str)
def test_every_dtype(make_model: Callable[..., nn.Module], dtype: torch.dtype, spec: dict[str, str]) -> None:
    model = make_model("llama").to(dtype)
    attach(model, LoRA(rank=4, **spec))
    proof = prove(moved(model), tokens())
    assert proof.passed, str(proof)


OPTIONS: dict[str, dict[str, Any]] = {  # what some deltas cannot do without
    "tokens": {"targets": ["embed_tokens"], "options": {"rows": tuple(range(7, 384))}},
    "fused": {"targets": ["q_proj"], "options": {"parts": ((0, 16), (16, 32))}},
}


@pytest.mark.parametrize("delta", sorted(DELTAS))
@pytest.mark.parametrize("combine", sorted(COMBINES))
def test_every_delta_and_combine_rule(make_model: Callable[..., nn.Module], delta: str, combine: str) -> None:
    model = make_model("llama")
    attach(model, LoRA(rank=4, delta=delta, combine=combine, **OPTIONS.get(delta, {})))
    before = snapshot(model, inputs=tokens())
    proof = prove_run(moved(model), before=before)
    assert proof.passed, str(proof)


@pytest.mark.parametrize("init", sorted(INITS))
@pytest.mark.parametrize("combine", sorted(COMBINES))
def test_every_init_and_combine_rule(make_model: Callable[..., nn.Module], init: str, combine: str) -> None:
    model, batch = make_model("llama"), tokens()
    data = [{**batch, "labels": batch["input_ids"]}]
    more: dict[str, Any] = {"round_trip": lambda w: w.bfloat16().to(w.dtype)} if init == "loftq" else {}
    attach(model, LoRA(rank=2, init=init, combine=combine), data=data if init in NEEDS else None, **more)
    proof = prove(moved(model), batch)
    assert proof.passed, str(proof)


def test_a_fresh_adapter_is_not_one(make_model: Callable[..., nn.Module]) -> None:
    model = make_model("llama")
    attach(model, LoRA(rank=4))
    proof = prove(model, tokens())
    assert [check.id for check in proof.failed] == ["P2", "P4"]
    assert "did not move" in proof["P2"].statement
    assert "changes nothing" in proof["P4"].statement


def test_one_of_several_adapters_is_proved_and_the_others_count_as_frozen(make_model: Callable[..., nn.Module]) -> None:
    model = make_model("llama")
    attach(model, LoRA(rank=4), "tone")
    attach(moved(model), LoRA(rank=2, targets="minimal"), "sql")
    before = snapshot(model, "sql", tokens())
    moved(model, "sql")
    assert prove_run(model, "sql", before=before).passed
    moved(model, "tone")
    failed = prove_run(model, "sql", before=before).failed
    assert [check.id for check in failed] == ["P2"]
    assert "lora.tone" in failed[0].statement


def test_merging_is_left_out_where_it_would_prove_nothing(make_model: Callable[..., nn.Module]) -> None:
    model = make_model("qwen2")  # its head is tied to its embedding
    attach(model, LoRA(rank=4, targets=["embed_tokens", "q_proj"], tied="apart"))
    proof = prove(moved(model), tokens())
    assert proof.passed
    assert {each.id: "tied" in each.reason for each in proof.left_out}["P5"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_a_run_without_adapters(make_model: Callable[..., nn.Module], method: str) -> None:
    model = make_model("llama")
    model.requires_grad_(method == "full").lm_head.requires_grad_(True)
    before = snapshot(model, inputs=tokens())
    assert not prove_run(model, before=before).passed
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    proof = prove_run(model, before=before)
    assert proof.passed, str(proof)
    assert [check.id for check in proof.checks] == ["P2"]
    if method == "freeze":
        with torch.no_grad():
            model.model.norm.weight.mul_(1.1)
        assert "model.norm.weight" in prove_run(model, before=before)["P2"].statement


# ---------------------------------------------------------------- as found


def everything(model: nn.Module) -> dict[str, Any]:
    active = active_of(model)
    return {
        "state": {key: t.clone() for key, t in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "required": {n: p.requires_grad for n, p in model.named_parameters()},
        "adapters": adapters(model),
        "active": (active.names, active.mix),
        "classes": [type(m) for m in model.modules()],
        "random": torch.get_rng_state(),  # Python's own is moved by the type checks of the test session
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("spec", [{}, {"combine": "dora", "dropout": 0.1}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_is_left_as_found(make_model: Callable[..., nn.Module], spec: dict[str, Any], breaks: bool) -> None:
    model, batch = make_model("llama"), tokens()
    attach(model, LoRA(rank=4, **spec), "a")
    attach(moved(model, "a"), LoRA(rank=2), "b", trainable=False)
    moved(model, "b")
    model.train()
    model.model.layers[0].eval()
    activate(model, {"a": 0.5, "b": 2.0})
    model(**batch).logits.square().mean().backward()
    if breaks:  # a check that crashes in the middle gives everything back too
        model.model.layers[1].self_attn.forward = lambda *args, **kwargs: 1 / 0
    was = everything(model)
    if breaks:
        with pytest.raises(ZeroDivisionError):
            snapshot(model, "a", batch)
        with pytest.raises(ZeroDivisionError):
            prove(model, batch, "a")
    else:
        before = snapshot(model, "a", batch)
        proof = prove_run(model, "b", before=before)
        assert not proof.passed  # it did not move since `before`
        assert replay(model, proof, name="b").passed
    now = everything(model)
    assert [key for key in was if not same(was[key], now[key])] == []


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.pool, self.unused = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.up(x)
        return h, self.pool(h.mean(1)).tanh()


def test_a_layer_that_no_output_needs_is_named() -> None:
    model = Pooled()
    attach(model, LoRA(rank=2))
    proof = prove(moved(model), torch.randn(2, 5, 6))
    assert [check.id for check in proof.failed] == ["P2"]
    assert proof["P2"].statement == "1 get no gradient: unused."


def test_experts_are_proved_too() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=384, num_hidden_layers=2, num_local_experts=4, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    attach(model, LoRA(rank=4, targets=["gate_up_proj", "down_proj", "q_proj"]))
    before = snapshot(model, inputs=tokens())
    proof = prove_run(moved(model), before=before)
    assert proof.passed and not [each for each in proof.left_out if each.id == "P5"], str(proof)


def test_bare_is_the_model_before_attach(make_model: Callable[..., nn.Module]) -> None:
    model, batch = make_model("llama"), tokens()
    before = model(**batch).logits
    attach(model, LoRA(rank=4, modules_to_save=["lm_head"]))
    moved(model)
    with bare(model):
        assert torch.equal(model(**batch).logits, before)
        assert type(model.lm_head) is nn.Linear
    assert not torch.equal(model(**batch).logits, before)
    detach(model)
    with as_found(model):
        assert torch.equal(model(**batch).logits, before)


# ---------------------------------------------------------------- how it is called


def test_the_front_door_is_both_function_and_package(make_model: Callable[..., nn.Module]) -> None:
    model = make_model("llama")
    attach(model, LoRA(rank=4))
    moved(model)
    assert callable(veneer.prove) and veneer.prove(model, tokens()).passed
    assert veneer.prove.prove(model, tokens()).passed


def test_what_cannot_be_proved_is_refused(make_model: Callable[..., nn.Module]) -> None:
    model, batch = make_model("llama"), tokens()
    attach(model, LoRA(rank=4), "a")
    attach(moved(model), LoRA(rank=4), "b")
    moved(model)
    activate(model, ["a", "b"])
    with pytest.raises(StateError, match="2 adapters are active"):
        prove(model, batch)
    with pytest.raises(StateError, match="no inputs"):
        prove(model, [], "a")
    with pytest.raises(StateError, match="no inputs"):
        prove_run(model, "a")
    merge(model, "a")
    with pytest.raises(StateError, match="merged"):
        prove(model, batch, "a")
    unmerge(model)
    assert prove(model, batch, "a").passed


def test_a_saved_adapter_is_proved_from_its_file(make_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = make_model("llama")
    attach(model, LoRA(rank=4), "sql")
    folder = save(moved(model), tmp_path, "sql")
    proof = prove(model, tokens(), folder=folder)
    assert proof.passed and proof["P3"].figures["from"] == "file"
    assert prove(model, tokens())["P3"].figures["from"] == "own copy"


def test_batches_are_cut_to_a_few_rows() -> None:
    batch = {
        "input_ids": torch.ones(9, 300, dtype=torch.long),
        "labels": torch.ones(9, 300),
        "pixels": torch.ones(9, 3, 300),
    }
    cut = few(batch)
    assert {key: tuple(t.shape) for key, t in cut.items()} == {"input_ids": (4, 64), "pixels": (4, 3, 300)}
    assert few(torch.ones(9, 300)).shape == (4, 300)


# ---------------------------------------------------------------- on disk


def test_a_proof_survives_the_disk(make_model: Callable[..., nn.Module], tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("llama")
    attach(model, LoRA(rank=4))
    proof = prove(moved(model), tokens(), tokenizer=tiny_tokenizer)
    path = proof.save(tmp_path)
    assert path == tmp_path / "proof.json"
    for where in (tmp_path, path):
        again = Proof.load(where)
        assert again.to_json() == proof.to_json()
        assert (again.passed, again.line()) == (proof.passed, proof.line())
    assert json.loads(path.read_text())["passed"] is True


def test_figures_that_are_no_numbers_are_still_json(tmp_path: Path) -> None:
    proof = Proof(
        [Check("P4", "Effect", False, "It broke.\nAt length.", {"apart": float("nan"), "by": [float("inf")]})]
    )
    held = json.loads(proof.save(tmp_path).read_text())
    assert held["checks"][0]["figures"] == {"apart": "nan", "by": ["inf"]}
    assert proof.line() == "P4 failed: It broke."
    with pytest.raises(ProofFailed, match="P4 Effect: It broke"):
        proof.raise_if_failed()


def test_no_proof_is_no_success(tmp_path: Path) -> None:
    assert not Proof([]).passed
    with pytest.raises(ProofFailed, match="nothing was proved"):
        Proof([]).raise_if_failed()
    with pytest.raises(CheckpointError, match="no proof here"):
        Proof.load(tmp_path)
    for text in ("{", "[]", '{"checks": [{"id": "P1"}]}'):
        (tmp_path / "proof.json").write_text(text)
        with pytest.raises(CheckpointError, match="not a proof"):
            Proof.load(tmp_path)


# ---------------------------------------------------------------- the canary


@pytest.fixture
def proved(make_model: Callable[..., nn.Module], tiny_tokenizer: Any) -> tuple[nn.Module, Proof]:
    model = make_model("llama")
    attach(model, LoRA(rank=4))
    words = tiny_tokenizer(["list all files in the folder", "sorted by size"], padding=True, return_tensors="pt")
    return model, prove(moved(model), dict(words), tokenizer=tiny_tokenizer)


def test_the_canary_sings_where_the_adapter_is(
    proved: tuple[nn.Module, Proof], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, proof = proved
    proof.save(tmp_path)
    assert len(proof.canary["rows"]) == 2
    assert [row["text"] for row in proof.canary["rows"]] == ["list all files in the folder", "sorted by size"]
    assert replay(model, proof, tiny_tokenizer).passed
    assert replay(model, tmp_path).passed
    merge(model)
    assert replay(model, proof).passed
    unmerge(model)
    assert replay(copy.deepcopy(model).to(torch.bfloat16), proof).passed


def test_the_canary_dies_where_the_adapter_is_not(
    proved: tuple[nn.Module, Proof], make_model: Callable[..., Any]
) -> None:
    model, proof = proved
    check = replay(make_model("llama"), proof)
    assert not check.passed
    assert "base's: the adapter is not applied" in check.statement
    moved(model)
    check = replay(model, proof)
    assert not check.passed
    assert "not those of the proved adapter" in check.statement


def test_the_canary_knows_its_tokenizer(proved: tuple[nn.Module, Proof], make_tokenizer: Callable[..., Any]) -> None:
    model, proof = proved
    other = make_tokenizer()
    other.add_tokens(["files"])
    check = replay(model, proof, other)
    assert not check.passed
    assert "reads 'list all files in the folder' as other tokens" in check.statement


def test_the_canary_of_classifiers_and_pairs(make_model: Callable[..., nn.Module]) -> None:
    for kind, batch in (("bert", tokens()), ("t5", with_targets())):
        model = make_model(kind)
        attach(model, LoRA(rank=4, targets="attention"))
        proof = prove(moved(model), batch)
        assert len(proof.canary["rows"]) == 2
        assert replay(model, proof).passed
        with disabled(model):
            assert replay(model, proof).passed  # it switches the adapter on itself
        detach(model)
        assert not replay(model, proof).passed


def test_a_proof_without_a_canary_says_so() -> None:
    with pytest.raises(StateError, match="no canary"):
        replay(nn.Linear(2, 2), Proof([]))


# ---------------------------------------------------------------- models that make much of a rounding


def chaotic() -> nn.Module:
    """Twelve layers of large weights in bf16: what two orders of a sum differ by grows from layer to layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=384, initializer_range=0.6,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    attach(model, LoRA(rank=4))
    return moved(model)


def test_where_logits_cannot_tell_each_layer_is_asked() -> None:
    torch.manual_seed(0)
    check = prove(chaotic(), {"input_ids": torch.randint(7, 384, (4, 24))})["P6"]
    assert check.figures["largest_difference"] > check.figures["allowed"]
    assert check.passed and "one by one" in check.statement
    assert all(by < 0.5 for by in check.figures["layers"].values())


MIXED_WRONGLY = {
    "squared": lambda ws: [w * w for w in ws],
    "lost": lambda ws: [1.0] * len(ws),
    "without signs": lambda ws: [abs(w) for w in ws],
    "the first alone": lambda ws: [w if i == 0 else 0 * w for i, w in enumerate(ws)],
}


@pytest.mark.parametrize("how", MIXED_WRONGLY)
def test_layers_tell_what_is_wrong(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = chaotic(), Active.weights
    monkeypatch.setattr(Active, "weights", lambda self: MIXED_WRONGLY[how](plain(self)))
    check = prove(model, {"input_ids": torch.randint(7, 384, (4, 24))})["P6"]
    assert not check.passed and max(check.figures["layers"].values()) > 1.5
