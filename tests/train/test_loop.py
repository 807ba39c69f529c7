"""The laws of the loop: what is learned does not depend on how rows were cut, packed, watched or measured."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_runs import ROWS, WORDS, Heard, adapter_bytes, figures, trained

from veneer.core.model import adapters, parameters
from veneer.errors import ConfigError, DataError, Diverged, DoesNotFit, ProofFailed, StateError, TargetError
from veneer.tasks import causal_lm
from veneer.tasks.causal_lm import CausalLM
from veneer.train import resume
from veneer.train.loop import Loop
from veneer.train.run import Run

Runs = Callable[..., tuple[Run, Heard, nn.Module]]


# ---------------------------------------------------------------- it learns


def test_it_overfits_a_tiny_set(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm, "SHOWN_TOKENS", 40)
    settings = {"steps": 60, "lr": 2e-2, "r": 16, "alpha": 16, "modules_to_save": ["lm_head"], "save_every": 100}
    run, heard, _ = run_tiny(ROWS[:4], **settings, val=0, eval_every=...)
    assert heard.losses[0] > 5 and heard.losses[-1] < 0.1
    shown = heard.of("samples")[0]["samples"]
    assert sum(each["after"] == each["expected"] for each in shown) >= 3
    assert not any(each["before"] == each["expected"] for each in shown)
    assert run.status == "done" and run.proof["passed"]


@pytest.mark.filterwarnings("ignore:.*run plainly")  # GPT-2 drops out of its residual stream
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_other_families_train_and_prove(run_tiny: Runs, make_model: Callable[..., nn.Module], kind: str) -> None:
    run, heard, _ = run_tiny(model=make_model(kind))
    assert heard.losses[-1] < heard.losses[0] and run.proof["passed"]


@pytest.mark.parametrize(
    "settings",
    [
        {"combine": "dora"},
        {"init": "pissa"},
        {"scaling": "rslora", "bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"targets": ["q_proj", "lm_head"], "layers": ...},
        {"layers": 1, "lora_plus_ratio": 4, "dropout": 0.1},
        {"overrides": {"q_proj": {"rank": 1}}, "recompute": "full"},
    ],
    ids=str,
)
def test_every_variant_trains_and_proves(run_tiny: Runs, settings: dict[str, Any]) -> None:
    run, heard, _ = run_tiny(**settings)
    assert heard.losses[-1] < heard.losses[0]
    assert {check["id"] for check in run.proof["checks"]} == {f"P{i}" for i in range(7)} and run.proof["passed"]


@pytest.mark.parametrize("method,layers", [("full", ...), ("freeze", 1)])
def test_full_and_partial_fine_tuning(
    run_tiny: Runs, make_model: Callable[..., nn.Module], method: str, layers: Any
) -> None:
    run, heard, model = run_tiny(method=method, layers=layers, r=..., lr=1e-3)
    assert heard.losses[-1] < heard.losses[0] and run.proof["passed"]
    assert (run.adapter / "model.safetensors").exists() and not adapters(model)
    moved = {
        name for name, p in make_model("llama").named_parameters() if not torch.equal(p, model.get_parameter(name))
    }
    if method == "freeze":
        assert moved and all(name.startswith("model.layers.1.") for name in moved)
    else:
        assert "model.layers.0.self_attn.q_proj.weight" in moved


def test_freezing_more_layers_than_there_are(run_tiny: Runs) -> None:
    with pytest.raises(ConfigError, match="the model has 2 blocks"):
        run_tiny(method="freeze", layers=7, r=...)


# ---------------------------------------------------------------- what it does not depend on


def test_two_runs_with_one_seed_are_the_same_run(run_tiny: Runs) -> None:
    (one, *_), (two, *_) = run_tiny(dropout=0.1), run_tiny(dropout=0.1)
    assert adapter_bytes(one) == adapter_bytes(two) and figures(one) == figures(two)


def test_another_seed_is_another_run(run_tiny: Runs) -> None:
    (one, *_), (two, *_) = run_tiny(), run_tiny(seed=1)
    assert adapter_bytes(one) != adapter_bytes(two)


def test_the_callers_random_state_is_left_alone(run_tiny: Runs) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run_tiny(seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_micro_batches_change_nothing(run_tiny: Runs, batch_size: int) -> None:
    """Rows have very different numbers of trained tokens, so any mean of means would show."""
    _, whole, _ = run_tiny(batch_size=8, global_batch=8)
    _, cut, _ = run_tiny(batch_size=batch_size, global_batch=8)
    assert cut.losses == pytest.approx(whole.losses, rel=2e-5)
    assert [e["gnorm"] for e in cut.of("step")] == pytest.approx([e["gnorm"] for e in whole.of("step")], rel=1e-3)


def test_packed_rows_learn_what_single_rows_do(run_tiny: Runs) -> None:
    """All rows in each step: packing then changes only where they lie."""
    _, single, one = run_tiny(packing="off", val=0, eval_every=..., batch_size=12, max_len=64)
    _, packed, two = run_tiny(packing="on", val=0, eval_every=..., batch_size=12, max_len=64)
    assert packed.losses == pytest.approx(single.losses, rel=1e-4)
    assert [e["tokens"] for e in packed.of("step")] == [e["tokens"] for e in single.of("step")]
    assert any("packed" in e["text"] and "do not see each other" in e["text"] for e in packed.of("note"))
    for name, value in trained(one).items():
        assert torch.allclose(value, trained(two)[name], atol=2e-3), name


def test_the_chunked_loss_trains_as_the_plain_one(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    _, chunked, _ = run_tiny()
    monkeypatch.setattr(CausalLM, "prepare", lambda self, model, batch: "plain")
    _, plain, _ = run_tiny()
    assert plain.losses == pytest.approx(chunked.losses, rel=1e-5)


def test_evaluating_and_saving_often_changes_nothing(run_tiny: Runs) -> None:
    (one, *_), (two, *_) = run_tiny(dropout=0.2), run_tiny(dropout=0.2, eval_every=1, save_every=1)
    name = "last/adapter_model.safetensors"
    assert adapter_bytes(one)[name] == adapter_bytes(two)[name]


def test_recomputing_changes_nothing(run_tiny: Runs) -> None:
    (one, *_), (two, *_) = run_tiny(dropout=0.1), run_tiny(dropout=0.1, recompute="full")
    assert adapter_bytes(one) == adapter_bytes(two)


def test_a_folder_trains_as_the_loaded_model(
    run_tiny: Runs, tiny_folder: Any, make_model: Callable[..., nn.Module]
) -> None:
    (loaded, *_), (from_folder, *_) = run_tiny(), run_tiny(model=str(tiny_folder))
    assert figures(loaded) == figures(from_folder)
    assert from_folder.config().settings.model == str(tiny_folder)
    assert json.loads((from_folder.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]


# ---------------------------------------------------------------- memory


def out_of_memory_above(rows: int, kind: type[Exception], text: str) -> Callable[..., Any]:
    """A loss that runs out of memory with more than `rows` rows."""
    inner = CausalLM.judge

    def judge(self: CausalLM, model: nn.Module, batch: Any) -> Any:
        if batch.rows > rows:
            raise kind(text)
        return inner(self, model, batch)

    return judge


OUT = [
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
    (
        RuntimeError,
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried 8 bytes",
    ),
    (MemoryError, ""),
]


@pytest.mark.parametrize("kind,text", OUT, ids=lambda value: getattr(value, "__name__", ""))
def test_running_out_of_memory_halves_the_micro_batch_alone(
    run_tiny: Runs, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], text: str
) -> None:
    plain, heard_plain, _ = run_tiny(batch_size=2, global_batch=8, dropout=0.1, recompute="none")
    monkeypatch.setattr(CausalLM, "judge", out_of_memory_above(2, kind, text))
    run, heard, _ = run_tiny(batch_size=8, global_batch=8, dropout=0.1, recompute="none")
    assert [e["micro_batch"] for e in heard.of("oom")] == [4, 2]
    assert run.result["micro_batch"] == 2 and heard.losses == heard_plain.losses
    assert (
        adapter_bytes(run)["last/adapter_model.safetensors"] == adapter_bytes(plain)["last/adapter_model.safetensors"]
    )


def test_memory_that_runs_out_in_the_middle_of_a_run(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is done again from its start: nothing of the failed attempt stays in gradients or random states."""
    _, whole, _ = run_tiny(batch_size=4, global_batch=4)
    inner, calls = CausalLM.loss, iter(range(10**6))

    def loss(self: CausalLM, model: nn.Module, batch: Any) -> Any:
        if batch.rows > 2 and next(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(self, model, batch)

    monkeypatch.setattr(CausalLM, "loss", loss)
    _, cut, _ = run_tiny(batch_size=4, global_batch=4, recompute="none")
    assert len(cut.of("oom")) == 1 and cut.losses == pytest.approx(whole.losses, rel=1e-5)


def test_one_row_that_does_not_fit(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalLM, "judge", out_of_memory_above(0, torch.OutOfMemoryError, "CUDA out of memory"))
    with pytest.raises(DoesNotFit, match="one row at a time does not fit") as caught:
        run_tiny()
    assert "max_len" in str(caught.value) and "recompute" in str(caught.value)


def test_other_errors_are_not_taken_for_want_of_memory(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalLM, "judge", out_of_memory_above(0, RuntimeError, "mat1 and mat2 cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run_tiny()


# ---------------------------------------------------------------- divergence


def poisoned(at_calls: set[int]) -> Callable[..., Any]:
    """A training loss that is NaN at these calls (the probe is call 0)."""
    inner, calls = CausalLM.loss, iter(range(10**6))

    def loss(self: CausalLM, model: nn.Module, batch: Any) -> Tensor:
        return inner(self, model, batch) * (float("nan") if next(calls) in at_calls else 1.0)

    return loss


def test_a_nan_sends_the_run_back_once_at_half_the_rate(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalLM, "loss", poisoned({4}))
    run, heard, model = run_tiny(schedule="constant", warmup=0)
    (event,) = heard.of("diverged")
    assert event["step"] == 4 and event["back_to"] == 2 and event["lr"] == pytest.approx(2.5e-3)
    assert "the loss is nan" in event["text"] and event["rows"]
    rows = run.metrics("loss")
    assert [row["step"] for row in rows] == list(range(1, 9))  # the lost steps are not written twice
    assert [row["lr"] for row in rows] == pytest.approx([5e-3] * 2 + [2.5e-3] * 6)
    assert run.status == "done" and all(torch.isfinite(p).all() for p in parameters(model).values())


def test_a_second_nan_ends_the_run_and_keeps_the_last_good_state(
    run_tiny: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CausalLM, "loss", poisoned({4, 8}))
    heard = Heard()
    with pytest.raises(Diverged, match="again at half the rate") as caught:
        run_tiny(heard=heard)
    run = Run.open(caught.value.where)
    assert run.status == "failed" and "again at half the rate" in run.info["error"]
    assert caught.value.problems and all(problem.startswith("row ") for problem in caught.value.problems)
    assert (run.last / "adapter_model.safetensors").exists() and len(heard.of("diverged")) == 1


def test_a_loss_that_explodes_is_noticed(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, calls = CausalLM.loss, iter(range(10**6))

    def loss(self: CausalLM, model: nn.Module, batch: Any) -> Tensor:
        return inner(self, model, batch) * (4.0 if next(calls) > 12 else 1.0)

    monkeypatch.setattr(CausalLM, "loss", loss)
    heard = Heard()
    with pytest.raises(Diverged, match="rose from"):
        run_tiny(heard=heard, steps=60)
    (event,) = heard.of("diverged")
    assert event["step"] > event["back_to"] and event["back_to"] <= 12  # not to a state that was already going wrong


def test_weights_that_hold_nan_are_named_before_any_step(run_tiny: Runs, make_model: Callable[..., nn.Module]) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises((Diverged, StateError)) as caught:
        run_tiny(model=model)
    assert "model.layers.1.mlp.up_proj.weight" in str(caught.value)


# ---------------------------------------------------------------- evaluation, best and last


def test_the_best_is_kept_and_put_back(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([9.0, 5.0, 3.0, 2.0, 4.0, 4.5])  # the first is the probe's
    monkeypatch.setattr(CausalLM, "evaluate", lambda *_: {"val_loss": next(losses)})
    run, heard, _model = run_tiny(eval_every=2, save_every=2)
    assert [(e["step"], e["best"]) for e in heard.of("eval")] == [
        (0, False),
        (2, True),
        (4, True),
        (6, False),
        (8, False),
    ]
    assert (run.result["val_before"], run.result["val_after"], run.result["best_step"]) == (5.0, 2.0, 4)
    files = adapter_bytes(run)
    assert files["best/adapter_model.safetensors"] != files["last/adapter_model.safetensors"]
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == files["best/adapter_model.safetensors"]
    assert run.proof["passed"]  # P3: the live model is the best one's file
    assert any("risen twice" in e["text"] for e in heard.of("warning"))


def test_patience_stops_early(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([9.0, 5.0, 3.0, 3.5, 3.6, 1.0])
    monkeypatch.setattr(CausalLM, "evaluate", lambda *_: {"val_loss": next(losses)})
    run, _heard, _ = run_tiny(steps=20, eval_every=2, patience=2)
    assert run.result["steps"] == 6 and run.result["best_step"] == 2 and run.status == "done"


def test_without_held_out_rows_the_last_is_what_was_learned(run_tiny: Runs) -> None:
    run, heard, _ = run_tiny(val=0, eval_every=...)
    assert not run.best.exists() and run.adapter.resolve() == run.last.resolve()
    assert run.result["val_after"] is None and not heard.of("eval") and run.proof["passed"]


def test_held_out_rows_of_their_own(run_tiny: Runs, tmp_path: Any) -> None:
    path = tmp_path / "val.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    _, heard, _ = run_tiny(ROWS[3:], val=str(path))
    assert any(e.get("val_rows") == 3 for e in heard.of("data"))


# ---------------------------------------------------------------- what goes wrong is said


def test_dead_adapters_are_named_at_the_first_backward(run_tiny: Runs, make_model: Callable[..., nn.Module]) -> None:
    model = make_model("llama")
    layer = model.model.layers[0].mlp
    weight = layer.up_proj.weight
    layer.forward = lambda x: layer.down_proj(layer.act_fn(layer.gate_proj(x)) * nn.functional.linear(x, weight))
    with pytest.raises(StateError, match="1 adapters got no gradient") as caught:
        run_tiny(model=model)
    assert "model.layers.0.mlp.up_proj" in str(caught.value)


def test_a_failed_proof_fails_the_run(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Loop.measure

    def meddle(self: Loop, *args: Any) -> None:
        with torch.no_grad():
            self.job.model.model.norm.weight.add_(1e-3)
        step(self, *args)

    monkeypatch.setattr(Loop, "measure", meddle)
    heard = Heard()
    with pytest.raises(ProofFailed, match=r"frozen tensors changed: model\.norm\.weight"):
        run_tiny(heard=heard)
    (event,) = heard.of("proof")
    assert not event["passed"] and "P2" in event["failed"]
    run = Run.open(heard.of("start")[0]["run"])
    assert run.status == "failed" and not run.proof["passed"]


@pytest.mark.parametrize(
    "settings,error,said",
    [
        ({"targets": ["q_prj"]}, TargetError, "q_proj"),
        ({"delta": "lorra"}, ConfigError, "Did you mean 'lora'"),
        ({"val": 12}, DataError, "val = 12 of 12 rows"),
        ({"max_len": 24}, DataError, "longer than max_len 24"),
        ({"task": "ner"}, DataError, "token_classification cannot use rows of prompt/completion"),
        ({"task": "sequence_classification"}, DataError, "set task: causal_lm or seq2seq"),
    ],
)
def test_wrong_settings_are_told_from_what_they_meet(
    run_tiny: Runs, settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    heard = Heard()
    with pytest.raises(error) as caught:
        run_tiny(heard=heard, **settings)
    assert said in str(caught.value)
    run = Run.open(heard.of("start")[0]["run"])
    assert run.status == "failed" and run.info["error"] and "Traceback" in run.path("run.log").read_text()


def test_losing_many_rows_needs_a_yes(run_tiny: Runs) -> None:
    run, heard, _ = run_tiny(max_len=24, yes=True)
    assert any("dropped" in e["text"] for e in heard.of("data")) and run.proof["passed"]


def test_a_model_that_is_not_there(run_tiny: Runs) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        run_tiny(model="/nowhere/at-all")


def test_a_model_without_its_tokenizer(make_model: Callable[..., nn.Module], tmp_path: Any) -> None:
    from veneer.train.loop import train

    with pytest.raises(ConfigError, match="without its tokenizer"):
        train(make_model("llama"), ROWS, out=str(tmp_path / "run"))


def test_no_warning_is_given_on_the_way(run_tiny: Runs) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_tiny()


def test_nothing_that_is_said_names_a_class_or_a_stack(run_tiny: Runs) -> None:
    _, heard, _ = run_tiny()
    texts = [e["text"] for e in heard if "text" in e]
    assert len(texts) > 8 and not any("object at 0x" in text or "Traceback" in text for text in texts)
    assert WORDS


def test_the_package_is_the_function() -> None:
    import veneer
    import veneer.train.run  # makes the package an attribute of veneer

    assert callable(veneer.train) and veneer.train.run.Run is Run  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="unknown setting 'lrr'"):
        veneer.train(None, None, lrr=1)


MIXED: list[dict[str, Any]] = [
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"combine": "dora", "bias": "all"},
    {"targets": ["q_proj", "lm_head"], "dropout": 0.1, "tied": "apart"},
    {"method": "full", "r": ...},
    {"method": "freeze", "r": ..., "layers": 1},
]


@pytest.mark.parametrize("settings", MIXED, ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_base_in_bf16(
    run_tiny: Runs, make_model: Callable[..., nn.Module], kind: str, settings: dict[str, Any]
) -> None:
    """The base in half precision, what is trained stepped in fp32, and every way in which the two meet."""
    run, heard, model = run_tiny(model=make_model(kind), precision="bf16", **settings)
    assert heard.losses[-1] < heard.losses[0] and run.proof["passed"]
    assert model.get_parameter("model.norm.weight").dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in resume.read(run.last)["parameters"].values())


def test_the_probe_leaves_no_trace(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, *_ = run_tiny(dropout=0.2)
    monkeypatch.setattr(Loop, "probe", lambda self: None)
    plain, heard, _ = run_tiny(dropout=0.2)
    assert not heard.of("probe") and adapter_bytes(tried) == adapter_bytes(plain) and figures(tried) == figures(plain)


def test_the_longest_batch_and_one_evaluation_are_tried_first(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []
    judge = CausalLM.judge

    def watched(self: CausalLM, model: nn.Module, batch: Any) -> Any:
        seen.append((max(max(lengths) for lengths in batch.segments), torch.is_grad_enabled()))
        return judge(self, model, batch)

    monkeypatch.setattr(CausalLM, "judge", watched)
    _, heard, _ = run_tiny()
    (event,) = heard.of("probe")
    assert seen[0] == (event["longest_tokens"], True) and seen[1][1] is False
    assert event["longest_tokens"] == max(length for length, trains in seen if trains) and event["memory_bytes"] > 0


def test_a_listener_that_goes_away_does_not_end_the_run(run_tiny: Runs) -> None:
    class Gone(Heard):
        def __call__(self, event: dict[str, Any]) -> str | None:
            if event["event"] == "step":
                raise BrokenPipeError("reader left")
            return super().__call__(event)

    run, heard, _ = run_tiny(heard=Gone())
    assert run.status == "done" and not heard.of("done") and "nobody listens" in run.path("run.log").read_text()


class Plain(nn.Module):
    """A language model that is no transformers model: no config, no head by name, no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(384, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 384)
        self.inner = nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        mixed, _ = self.mix(self.embed(input_ids))
        return SimpleNamespace(logits=self.out(torch.tanh(self.inner(mixed))))


def test_any_module_with_logits_will_do(run_tiny: Runs) -> None:
    run, heard, _ = run_tiny(model=Plain(), targets=["inner", "out"])
    assert heard.losses[-1] < heard.losses[0] and run.proof["passed"]
    assert any("from whole logits" in event["text"] for event in heard.of("note"))


def test_adalora_shares_out_its_ranks(run_tiny: Runs) -> None:
    run, heard, _ = run_tiny(delta="adalora", r=3, lr=2e-2, steps=20)
    ranks = [sum(row["ranks"].values()) for row in run.metrics("ranks")]
    assert ranks[0] == 14 * 3 and ranks[-1] == 14 * 2 and sorted(ranks, reverse=True) == ranks
    assert heard.losses[-1] < heard.losses[0] and run.proof["passed"]


def test_a_run_that_helped_nothing_says_so(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([9.0, 5.0, 6.0, 7.0])
    monkeypatch.setattr(CausalLM, "evaluate", lambda *_: {"val_loss": next(losses)})
    _, heard, _ = run_tiny()
    assert any("is not below the base's 5" in event["text"] for event in heard.of("warning"))
