"""What a proof is worth is what it catches. Each row breaks one hand-over on purpose; the named proof must fail for it.

The model is trained for real (a few steps), so the proofs pass before the break: the first test holds that, for
otherwise all others would pass for nothing.
"""

from __future__ import annotations

import copy
import json
import shutil
import types
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from veneer.ckpt.peft import save
from veneer.core import model as core
from veneer.core.host import Active
from veneer.core.model import adapter_of, attach, parameters, put, sites, tensors
from veneer.core.spec import LoRA
from veneer.data.types import IGNORE, Encoded
from veneer.errors import ProofFailed
from veneer.prove import Before, Proof, prove_run, snapshot
from veneer.prove import effect as effect_module

END = 4  # <|im_end|> in the tests' tokenizer
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass
class Case:
    """A trained adapter with everything a training loop hands to `prove_run`."""

    model: nn.Module
    before: Before
    folder: Path
    samples: list[Encoded]
    given: dict[str, str] = field(default_factory=lambda: {"lr": "flag", "r": "file: a.yaml:2"})
    read: set[str] = field(default_factory=lambda: {"lr", "r", "seed"})
    start: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    @property
    def site(self) -> nn.Module:
        return next(iter(sites(self.model).values()))

    def prove(self) -> Proof:
        return prove_run(
            self.model, before=self.before, folder=self.folder, samples=self.samples, ends=[END], given=self.given,
            read=self.read,
        )  # fmt: skip


def sample(*labels: int) -> Encoded:
    return Encoded([9] * len(labels), list(labels), where=f"rows.jsonl:{len(labels)}")


def train(model: nn.Module, batch: dict[str, torch.Tensor], steps: int = 4) -> None:
    optimizer = torch.optim.AdamW(parameters(model).values(), lr=3e-2)
    for _ in range(steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def build(model: nn.Module, folder: Path, **spec: Any) -> Case:
    model.register_buffer("statistics", torch.ones(3))
    batch = {"input_ids": torch.randint(7, 384, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    attach(model, LoRA(rank=4, **spec))
    start = {key: t.detach().clone() for key, t in tensors(model).items()}
    before = snapshot(model, inputs=batch)
    train(model, batch)
    samples = [sample(IGNORE, IGNORE, 11, 12, END), sample(IGNORE, 11, END, IGNORE, IGNORE, 13, END)]
    return Case(model, before, save(model, folder), samples, start=start)


BUILT: dict[str, Case] = {}  # trained once; every test breaks a copy of its own


@pytest.fixture
def make_case(
    make_model: Callable[..., nn.Module], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Case]:
    def make(dtype: torch.dtype = torch.float32, **spec: Any) -> Case:
        key = f"{dtype} {spec}"
        if key not in BUILT:
            BUILT[key] = build(make_model("llama").to(dtype), tmp_path_factory.mktemp("case") / "adapter", **spec)
        case = BUILT[key]
        shutil.copytree(case.folder, tmp_path / "adapter")
        model = copy.deepcopy(case.model)
        return replace(
            case, model=model, folder=tmp_path / "adapter", samples=list(case.samples), given=dict(case.given)
        )

    return make


@pytest.fixture
def case(make_case: Callable[..., Case]) -> Case:
    return make_case()


def test_without_a_break_all_proofs_hold(case: Case) -> None:
    proof = case.prove()
    assert proof.passed, str(proof)
    assert [check.id for check in proof.checks] == ["P0", "P1", "P2", "P3", "P4", "P5", "P6"]
    assert [each.id for each in proof.left_out] == ["P7"]  # test_base.py has its breaks
    proof.raise_if_failed()


# ---------------------------------------------------------------- the breaks

BREAKS: list[tuple[str, Callable[..., Any]]] = []


def breaks(id: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        BREAKS.append((id, function))
        return function

    return add


@breaks("P0")
def a_key_that_nothing_reads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.given["lora_dropout"] = "flag"


@breaks("P1")
def a_sample_without_a_trained_token(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.samples.append(sample(IGNORE, IGNORE, IGNORE))


@breaks("P1")
def the_end_of_turn_masked(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.samples.append(sample(IGNORE, 11, 12, IGNORE))


@breaks("P1")
def one_of_two_turns_without_its_end(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.samples.append(sample(IGNORE, 11, IGNORE, IGNORE, 12, END))


@breaks("P1")
def a_packed_sample_without_a_trained_token(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.samples.append(replace(sample(IGNORE, 11, END, IGNORE, IGNORE), segments=(3, 2)))


@breaks("P1")
def an_end_borrowed_from_the_packed_neighbour(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.samples.append(replace(sample(IGNORE, 11, 12, IGNORE, 13, END), segments=(3, 3)))


@breaks("P1")
def no_samples_at_all(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.samples.clear()


@breaks("P2")
def a_frozen_weight_nudged_by_one_ulp(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    w = case.model.get_parameter("model.layers.1.mlp.up_proj.weight")
    w.data[3, 5] = torch.nextafter(w.data[3, 5], torch.tensor(9.0))


@breaks("P2")
def two_frozen_rows_exchanged(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    w = case.model.get_parameter("model.embed_tokens.weight")
    w.data[[20, 30]] = w.data[[30, 20]]


@breaks("P2")
def a_statistic_of_the_base_drifted(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.model.get_buffer("statistics").mul_(1.01)


@breaks("P2")
def nothing_was_learned(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    put(case.model, "default", case.start)


@breaks("P2")
def one_layer_did_not_move(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(iter(sites(case.model)))
    put(
        case.model, "default", {key: case.start[key] if key[0] == name else t for key, t in tensors(case.model).items()}
    )


@breaks("P2")
def one_layer_forward_replaced(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.site.forward = types.MethodType(nn.Linear.forward, case.site)


@breaks("P2")
def one_layer_cut_from_the_gradient(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_of(case.site)
    adapter._quick, change = False, adapter.change
    monkeypatch.setattr(adapter, "change", lambda *args: change(*args).detach())


@breaks("P2")
def a_gradient_that_overflows(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = list(sites(case.model).values())[-1]
    layer.register_full_backward_hook(lambda module, given, out: tuple(g * torch.inf for g in given))


@breaks("P2")
def a_nan_in_the_adapter(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter_of(case.site).delta.A.data[0, 0] = float("nan")


def rewrite(case: Case, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    from safetensors import safe_open

    file = case.folder / WEIGHTS
    with safe_open(file, "pt") as held:
        metadata = held.metadata()
    values = load_file(file)
    change(values)
    save_file(values, file, metadata)


@breaks("P3")
def the_file_zeroed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(case, lambda values: [t.zero_() for t in values.values()])


@breaks("P3")
def one_layer_of_the_file_zeroed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(case, lambda values: values[min(k for k in values if "lora_B" in k)].zero_())


@breaks("P3")
def one_layer_missing_from_the_file(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(case, lambda values: [values.pop(k) for k in list(values) if "layers.0.self_attn.q_proj" in k])


@breaks("P3")
def two_layers_of_the_file_exchanged(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange(values: dict[str, torch.Tensor]) -> None:
        one, two = (k for k in sorted(values) if k.endswith("q_proj.lora_A.weight"))
        values[one], values[two] = values[two], values[one]

    rewrite(case, exchange)


@breaks("P3")
def the_file_rounded(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(case, lambda values: values.update({k: t.bfloat16().float() for k, t in values.items()}))


@breaks("P3")
def the_file_truncated(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    file = case.folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


@breaks("P3")
def the_file_gone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    (case.folder / WEIGHTS).unlink()


@breaks("P3")
def another_alpha_in_the_config(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    file = case.folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 33}))


@breaks("P3")
def a_file_from_before_the_last_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    train(case.model, case.before.inputs[0], steps=1)


@breaks("P4")
def the_adapter_never_applied(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in sites(case.model).values():
        layer.forward = types.MethodType(nn.Linear.forward, layer)


@breaks("P4")
def the_scale_lost(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in sites(case.model).values():
        adapter_of(layer).delta.scale = 0.0


@breaks("P4")
def switching_off_does_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effect_module, "disabled", lambda model: nullcontext())


@breaks("P4")
def switching_off_leaves_a_hundredth(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def leaking(model: nn.Module) -> Any:
        core.activate(model, {"default": 0.01})
        yield
        core.activate(model, "default")

    monkeypatch.setattr(effect_module, "disabled", leaking)


@breaks("P4")
def another_base_than_before(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.model.get_parameter("lm_head.weight").data[50] *= 1.01


def merging(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    whole = core._merge_layer
    calls: list[nn.Module] = []

    def broken(layer: nn.Module, acting: Any, kept: Any, done: Any) -> float:
        calls.append(layer)
        return (
            change(partial(whole, done=done), layer, acting, kept)
            if len(calls) == 3
            else whole(layer, acting, kept, done)
        )

    monkeypatch.setattr(core, "_merge_layer", broken)


@breaks("P5")
def a_merge_that_lost_one_layer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    merging(monkeypatch, lambda whole, layer, acting, kept: 1.0)


@breaks("P5")
def a_layer_merged_twice(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    merging(monkeypatch, lambda whole, layer, acting, kept: [whole(layer, acting, kept), whole(layer, acting, None)][0])


@breaks("P5")
def a_layer_merged_at_nine_tenths(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    merging(monkeypatch, lambda whole, layer, acting, kept: whole(layer, [(a, 0.9 * w) for a, w in acting], kept))


@breaks("P5")
def an_unmerge_that_forgot_one_layer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    merging(monkeypatch, lambda whole, layer, acting, kept: whole(layer, acting, None))


@breaks("P6")
def weights_that_are_squared(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Active.weights
    monkeypatch.setattr(Active, "weights", lambda self: [w * w for w in plain(self)])


@breaks("P6")
def weights_that_are_lost(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Active, "weights", lambda self: [1.0] * len(self.names))


@breaks("P6")
def signs_that_are_lost(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Active.weights
    monkeypatch.setattr(Active, "weights", lambda self: [abs(w) for w in plain(self)])


@breaks("P6")
def a_second_adapter_that_is_forgotten(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Active.weights
    monkeypatch.setattr(Active, "weights", lambda self: [w if i == 0 else 0.0 for i, w in enumerate(plain(self))])


@pytest.mark.parametrize("id,mutate", BREAKS, ids=[f"{id}-{mutate.__name__}" for id, mutate in BREAKS])
def test_the_break_is_caught(case: Case, monkeypatch: pytest.MonkeyPatch, id: str, mutate: Callable[..., Any]) -> None:
    mutate(case, monkeypatch)
    proof = case.prove()
    assert not proof[id].passed, str(proof)
    assert "TypeError" not in proof[id].statement  # a break that no longer fits what it breaks would be caught, too
    assert not proof.passed
    assert f"{id} failed" in proof.line()
    with pytest.raises(ProofFailed) as caught:
        proof.raise_if_failed("runs/x")
    assert any(problem.startswith(f"{id} ") for problem in caught.value.problems)


@pytest.mark.parametrize("id", [f"P{n}" for n in range(7)])
def test_every_proof_has_breaks_that_it_must_catch(id: str) -> None:
    assert sum(found == id for found, _ in BREAKS) >= (1 if id == "P0" else 4)


@pytest.mark.parametrize("mutate", [a_merge_that_lost_one_layer, a_layer_merged_twice], ids=lambda f: f.__name__)
def test_a_lost_layer_shows_in_bf16_where_logits_cannot_tell(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, mutate: Callable[..., Any]
) -> None:
    case = make_case(torch.bfloat16)
    assert case.prove()["P5"].passed
    mutate(case, monkeypatch)
    assert not case.prove()["P5"].passed


@pytest.mark.parametrize(
    "spec", [{"combine": "dora"}, {"init": "pissa"}, {"bias": "all"}, {"scaling": "rslora"}], ids=str
)
def test_a_variant_is_held_to_its_own_weights(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, spec: dict[str, str]
) -> None:
    case = make_case(**spec)
    proof = case.prove()
    assert proof.passed, str(proof)
    one_layer_of_the_file_zeroed(case, monkeypatch)
    a_merge_that_lost_one_layer(case, monkeypatch)
    proof = case.prove()
    assert [check.id for check in proof.failed] == ["P3", "P5"]


def test_a_failed_proof_names_what_is_wrong(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    a_key_that_nothing_reads(case, monkeypatch)
    the_end_of_turn_masked(case, monkeypatch)
    one_layer_forward_replaced(case, monkeypatch)
    one_layer_of_the_file_zeroed(case, monkeypatch)
    a_merge_that_lost_one_layer(case, monkeypatch)
    proof = case.prove()
    assert "lora_dropout (flag)" in proof["P0"].statement
    assert "rows.jsonl:4" in proof["P1"].statement
    assert "get no gradient: model.layers.0.self_attn.q_proj" in proof["P2"].statement
    a_gradient_that_overflows(case, monkeypatch)
    assert "get a gradient that is NaN or infinite: model.layers.0.self_attn.k" in case.prove()["P2"].statement
    assert "dW of model.layers.0." in proof["P3"].statement
    assert "is not W + dW in model.layers.0.self_attn.v_proj" in proof["P5"].statement
