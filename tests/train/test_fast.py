"""How steps are computed changes nothing that is learned, is written down, and gives way loudly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from train_runs import Heard, same, trained
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import veneer.kernels.fuse as fuse_module
from veneer.advise.keep import fusing
from veneer.data.batch import Batch
from veneer.kernels import graphs
from veneer.kernels.fuse import FusedBlock, is_fused, set_graphs
from veneer.kernels.tiled import Tiled
from veneer.quant import eight
from veneer.tasks.causal_lm import CausalLM
from veneer.train import fast
from veneer.train.loop import Loop
from veneer.train.run import Run

Runs = Callable[..., tuple[Run, Heard, nn.Module]]


@pytest.fixture(autouse=True)
def toys_count_as_wide(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Models as narrow as these are not fused on a CPU, by the rule; here they stand for wide ones."""
    if "narrow" not in request.node.name:
        monkeypatch.setattr("veneer.advise.keep.NARROW", 0)


SHORT: dict[str, Any] = {"steps": 3, "val": 0, "eval_every": ..., "save_every": 100}


def said(heard: Heard, *kinds: str) -> str:
    return "\n".join(event["text"] for kind in kinds for event in heard.of(kind))


def levels_of(model: nn.Module) -> set[str]:
    return {module.fused.recompute for module in model.modules() if isinstance(module, FusedBlock)}


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """(level, attention) of every fused block's pass."""
    seen: list[tuple[str, Any]] = []
    inner = fuse_module.run_block

    def run_block(x: Any, cos: Any, sin: Any, block: Any, level: str) -> Any:
        seen.append((level, x.shape[:2]))
        return inner(x, cos, sin, block, level)

    monkeypatch.setattr(fuse_module, "run_block", run_block)
    return seen


@pytest.mark.parametrize("length,is_masked,usual", [(192, True, False), (192, False, True), (200, True, True)])
def test_masks_of_some_lengths_go_without_the_kernel_whose_gradient_may_be_nan(
    length: int, is_masked: bool, usual: bool
) -> None:
    """On Hopper it is torch's first choice for blocks that run by their own forward."""
    ids = torch.zeros(2, length, dtype=torch.long)
    inputs = {"input_ids": ids} | ({"attention_mask": ids + 1} if is_masked else {})
    way = fast.Way.__new__(fast.Way)
    way.level = "none"
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with way.around(Batch(inputs, ids, 2, ((length,), (length,)))):
        assert torch.backends.cuda.cudnn_sdp_enabled() is usual
    assert torch.backends.cuda.cudnn_sdp_enabled()


# ------------------------------------------------------------------ what is decided


def test_blocks_run_fused_keep_everything_and_it_is_written_down(
    run_tiny: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch)
    run, heard, model = run_tiny(**SHORT)
    assert len(seen) >= 2 * SHORT["steps"] and {level for level, _ in seen} == {"none"}
    assert {rows for _, (rows, _) in seen} == {1}  # samples end to end
    config = run.config()
    assert (config.settings.fuse, config.settings.recompute) == ("on", "none")
    assert config.origins["fuse"].how == config.origins["recompute"].how == "rule"
    assert run.info["fused"]["replaced"]["blocks"] == 2
    assert "fused: 2 blocks" in said(heard, "note") and "all that is kept fits" in said(heard, "note")
    assert not is_fused(model) and model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]


def test_narrow_blocks_run_plainly_on_a_cpu_and_it_is_said(run_tiny: Runs) -> None:
    run, heard, _ = run_tiny(**SHORT)
    assert run.config().settings.fuse == "off" and "fused" not in run.info
    assert "fuse off: plain blocks of width 32 are quicker on a CPU" in said(heard, "note")
    run, heard, _ = run_tiny(**SHORT, fuse="on")
    assert "fused: 2 blocks" in said(heard, "note")
    assert fusing(32, "cuda")[0] and fusing(768, "cpu")[0] and fusing(None, "cpu")[0]


def test_padded_batches_run_fused_too(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come without use_cache, and a configuration that asks for a cache would have every block run plainly."""
    monkeypatch.setattr("veneer.train.prepare.tell_attention", lambda *_: False)
    seen = watched(monkeypatch)
    _, _, model = run_tiny(**SHORT)
    assert {rows for _, (rows, _) in seen} >= {4} and model.config.use_cache  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "settings",
    [{"recompute": level} for level in ("gate_up", "middle", "input", "full", "tiled")] + [{"fuse": "off"}],
    ids=str,
)
def test_no_choice_changes_what_is_learned(run_tiny: Runs, settings: dict[str, Any]) -> None:
    _, heard, one = run_tiny(**SHORT, dropout=0.1)
    _, other, two = run_tiny(**SHORT, dropout=0.1, **settings)
    assert other.losses == pytest.approx(heard.losses, rel=1e-4)
    for name, value in trained(one).items():
        assert torch.allclose(value, trained(two)[name], atol=1e-3), name


def test_blocks_in_tiles_learn_the_same(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    _, heard, one = run_tiny(**SHORT)
    monkeypatch.setattr("veneer.kernels.tiled.TILE", 50)
    seen, inner = [], Tiled.apply
    monkeypatch.setattr(Tiled, "apply", lambda *given: seen.append(len(given[4])) or inner(*given))
    run, other, two = run_tiny(**SHORT, recompute="tiled")
    assert seen and min(seen) > 1 and run.config().settings.recompute == "tiled" and run.proof["passed"]
    assert other.losses == pytest.approx(heard.losses, rel=1e-5)
    for name, value in trained(one).items():
        assert torch.allclose(value, trained(two)[name], atol=1e-4), name


def test_weights_that_are_trained_run_plainly(run_tiny: Runs) -> None:
    run, heard, _ = run_tiny(**SHORT, method="full", r=..., lr=1e-3)
    assert run.config().settings.fuse == "off" and "fused:" not in said(heard, "note", "warning")


def test_a_family_that_is_not_known_runs_plainly_and_says_so(run_tiny: Runs) -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=384, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=128, dropout=0.0,
    )  # fmt: skip
    run, heard, _ = run_tiny(**SHORT, model=OPTForCausalLM(config))
    assert heard.losses[-1] < heard.losses[0] and run.proof["passed"]
    assert "fused: nothing" in said(heard, "note") and "plain: " in said(heard, "note")
    assert "blocks" not in run.info["fused"]["replaced"]


@pytest.mark.parametrize("recompute", ["none", "input"])
def test_blocks_that_drop_out_of_their_residual_stream_learn_the_same_fused(run_tiny: Runs, recompute: str) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=384, n_positions=128, attn_pdrop=0.0)
    model = GPT2LMHeadModel(config)
    settings = {**SHORT, "dropout": 0.1, "recompute": recompute, "init": "gaussian"}
    _, plain, one = run_tiny(**settings, fuse="off", model=copy.deepcopy(model))
    run, heard, two = run_tiny(**settings, model=model)
    assert config.resid_pdrop == 0.1 and run.info["fused"]["replaced"]["blocks"] == 2
    assert heard.losses == pytest.approx(plain.losses, rel=1e-5) and run.proof["passed"]
    assert all(torch.allclose(value, trained(two)[name], atol=1e-4) for name, value in trained(one).items())


def test_a_level_that_needs_fused_blocks_says_so_without_them(run_tiny: Runs) -> None:
    _, heard, _ = run_tiny(**SHORT, fuse="off", recompute="middle")
    assert "recompute middle needs fused blocks: input" in said(heard, "note")
    assert heard.losses == pytest.approx(run_tiny(**SHORT)[1].losses, rel=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_batches_of_one_and_rows_that_do_not_divide(run_tiny: Runs, rows: int) -> None:
    _, whole, _ = run_tiny(**SHORT, batch_size=7)
    _, cut, _ = run_tiny(**SHORT, batch_size=rows, global_batch=7)
    assert cut.losses == pytest.approx(whole.losses, rel=1e-4)


# ------------------------------------------------------------------ what turns out otherwise


def test_memory_that_runs_out_takes_one_level_after_the_other(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain, one = run_tiny(**SHORT)
    inner = CausalLM.loss

    def loss(self: CausalLM, model: nn.Module, batch: Any) -> Any:
        if levels_of(model) & {"none", "gate_up"}:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return inner(self, model, batch)

    monkeypatch.setattr(CausalLM, "loss", loss)
    run, heard, two = run_tiny(**SHORT)
    assert [event["recompute"] for event in heard.of("oom")] == ["gate_up", "middle"]
    assert all("out of memory with recompute" in event["text"] for event in heard.of("oom"))
    assert run.result["micro_batch"] == 4 and run.config().settings.recompute == "middle"
    assert "ran out of memory" in run.config().origins["recompute"].note
    assert heard.losses == pytest.approx(plain.losses, rel=1e-5)
    assert all(torch.allclose(value, trained(two)[name], atol=1e-4) for name, value in trained(one).items())


def test_both_layouts_of_an_8_bit_base_are_kept_where_they_fit_and_given_up_first(
    run_tiny: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "TURNING", ("cpu",))
    kept: list[int] = []
    inner = CausalLM.loss

    def loss(self: CausalLM, model: nn.Module, batch: Any) -> Any:
        kept.append(sum(codes in eight._kept for codes in fuse_module.turnable(model)))
        if len(kept) > 2 and kept[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(self, model, batch)

    _, plain, _ = run_tiny(**SHORT, quant="int8")
    monkeypatch.setattr(CausalLM, "loss", loss)
    run, heard, model = run_tiny(**SHORT, quant="int8")
    assert "both layouts of the 8-bit base are kept" in said(heard, "note")
    assert kept[:3] == [14, 14, 14] and not any(kept[3:]) and len(heard.of("oom")) == 1
    assert run.config().settings.recompute == "none" and heard.losses == plain.losses
    assert not any(codes in eight._kept for codes in fuse_module.turnable(model))


def test_when_no_level_is_left_the_micro_batch_is_halved(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = CausalLM.loss

    def loss(self: CausalLM, model: nn.Module, batch: Any) -> Any:
        if batch.rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(self, model, batch)

    monkeypatch.setattr(CausalLM, "loss", loss)
    run, heard, _ = run_tiny(**SHORT)
    told = [event.get("recompute") or event["micro_batch"] for event in heard.of("oom")]
    assert told == ["gate_up", "middle", "input", "tiled", 2] and run.result["micro_batch"] == 2


def broken(monkeypatch: pytest.MonkeyPatch, tokens: Callable[[int], bool]) -> None:
    inner = fuse_module.run_block

    def run_block(x: Any, *rest: Any) -> Any:
        if tokens(x.shape[1]):
            raise RuntimeError("PTXAS error: no kernel for this card")
        return inner(x, *rest)

    monkeypatch.setattr(fuse_module, "run_block", run_block)


def test_a_block_that_fails_in_the_first_pass_falls_back_once(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain, one = run_tiny(**SHORT, fuse="off")
    broken(monkeypatch, lambda tokens: tokens != fuse_module.TOKENS)
    run, heard, two = run_tiny(**SHORT)
    (warning,) = (event["text"] for event in heard.of("warning") if "first pass" in event["text"])
    assert "no kernel for this card" in warning and "without fused blocks" in warning
    assert heard.losses == plain.losses and same(trained(one), trained(two)) and run.proof["passed"]
    assert run.config().settings.fuse == "off" and run.info["fused"]["replaced"] == {}


def test_a_block_that_fails_when_it_is_tried_out_runs_plainly(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, lambda tokens: True)
    run, heard, _ = run_tiny(**SHORT)
    assert "no kernel for this card" in said(heard, "note") and run.proof["passed"]
    assert "blocks" not in run.info["fused"]["replaced"]


def test_an_error_of_another_kind_is_raised_as_it_is(run_tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(self: CausalLM, model: nn.Module, batch: Any) -> Any:
        raise RuntimeError("mat1 and mat2 cannot be multiplied")

    monkeypatch.setattr(CausalLM, "loss", loss)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run_tiny(**SHORT)


# ------------------------------------------------------------------ graphs


def shapes_of_replays(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    inner = graphs.Record.forward

    def forward(self: Any, x: Any, token: Any) -> Any:
        seen.append(tuple(x.shape[:2]))
        return inner(self, x, token)

    monkeypatch.setattr(graphs.Record, "forward", forward)
    return seen


@pytest.mark.parametrize("packed", [{"packing": "on", "max_len": 90}, {}], ids=["packed", "by samples"])
def test_batches_in_one_shape_are_replayed_and_teach_the_same(
    run_tiny: Runs, graphs_on_cpu: None, monkeypatch: pytest.MonkeyPatch, packed: dict[str, Any]
) -> None:
    monkeypatch.setattr("veneer.train.fast.set_graphs", lambda model, tell: set_graphs(model, tell) and None)
    settings = {**SHORT, "steps": 8, "batch_size": 2, "global_batch": 4, **packed}
    _, plain, one = run_tiny(**settings)
    seen = shapes_of_replays(monkeypatch)
    run, heard, two = run_tiny(**settings, graphs="on")
    assert len(set(seen)) == 1 and len(seen) >= 16  # both blocks, half of the micro-batches and more
    assert "blocks are recorded as CUDA graphs, batches filled up to one shape" in said(heard, "note")
    assert heard.losses == pytest.approx(plain.losses, rel=1e-5)
    assert [event["tokens"] for event in heard.of("step")] == [event["tokens"] for event in plain.of("step")]
    assert all(torch.allclose(value, trained(two)[name], atol=1e-4) for name, value in trained(one).items())
    assert run.proof["passed"] and run.config().settings.graphs == "on"


def test_on_a_cpu_there_are_no_graphs_and_it_is_said_to_who_asked(run_tiny: Runs) -> None:
    run, heard, _ = run_tiny(**SHORT)
    assert run.config().settings.graphs == "off" and run.config().origins["graphs"].note == "they need a GPU"
    assert "graphs" not in said(heard, "note")
    _, heard, _ = run_tiny(**SHORT, graphs="on")
    assert "no CUDA graphs: they need a GPU, and the model is on the cpu" in said(heard, "note")


BY_SAMPLES: dict[str, Any] = {**SHORT, "steps": 12, "batch_size": 2, "global_batch": 4}


@pytest.fixture
def timed(graphs_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], float]], None]:
    """The rule as on a GPU, where passes over n tokens take as long as is said here."""
    monkeypatch.setattr(fast, "RECORDING", ("cpu",))
    monkeypatch.setattr("veneer.train.fast.set_graphs", lambda model, tell: set_graphs(model, tell) and None)

    def timed(seconds: Callable[[int], float]) -> None:
        inner = Loop.seconds

        def spent(self: Loop, samples: Any) -> float:
            assert inner(self, samples) > 0
            assert not any(bool(p.grad.any()) for p in self.job.trained.values() if p.grad is not None)
            return seconds(sum(map(len, samples)))

        monkeypatch.setattr(Loop, "seconds", spent)

    return timed


def test_graphs_are_taken_unasked_where_fillers_cost_nothing(
    run_tiny: Runs, timed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plain, one = run_tiny(**BY_SAMPLES, dropout=0.1, graphs="off")
    timed(lambda tokens: 0.2)
    seen = shapes_of_replays(monkeypatch)
    run, heard, two = run_tiny(**BY_SAMPLES, dropout=0.1)
    note = run.config().origins["graphs"].note
    assert run.config().settings.graphs == "on" and "passes take 1.00 times as long, and replayed ones less" in note
    assert set(seen) == {(1, run.info["one_shape"][0])} and len(seen) >= 2 * BY_SAMPLES["steps"]
    assert "blocks are recorded as CUDA graphs, batches filled up to one shape" in said(heard, "note")
    assert len(heard.losses) == 12 and run.proof["passed"]  # masks are others: they are drawn for fillers, too
    assert trained(one).keys() == trained(two).keys() and heard.losses[0] == pytest.approx(plain.losses[0], rel=0.1)


def test_graphs_are_left_where_the_card_is_busy_and_it_is_written_down(run_tiny: Runs, timed: Any) -> None:
    _, plain, one = run_tiny(**BY_SAMPLES, graphs="off")
    timed(lambda tokens: tokens / 1000)
    run, heard, two = run_tiny(**BY_SAMPLES)
    note = run.config().origins["graphs"].note
    assert run.config().settings.graphs == "off" and "the card is busy with tokens as it is: filled up to one" in note
    assert heard.losses == plain.losses and same(trained(one), trained(two))  # timing it left nothing behind


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_with_graphs_a_resumed_run_is_one_that_was_never_stopped(run_tiny: Runs, timed: Any, dropout: float) -> None:
    timed(lambda tokens: 0.2)
    settings = BY_SAMPLES | {"dropout": dropout, "save_every": 1}
    _, whole, one = run_tiny(**settings)
    stopped, first, _ = run_tiny(**settings, heard=Heard({7: "stop"}))
    assert stopped.config().settings.graphs == "on" and len(first.losses) == 7
    timed(lambda tokens: tokens / 1000)  # what was settled stays so
    run, rest, two = run_tiny(resume=str(stopped.folder))
    assert first.losses + rest.losses == whole.losses and same(trained(one), trained(two)) and run.proof["passed"]


def test_a_recording_that_fails_is_said_and_batches_are_as_they_are(
    run_tiny: Runs, timed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plain, one = run_tiny(**BY_SAMPLES, graphs="off")
    timed(lambda tokens: 0.2)

    def make(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs.Record, "make", make)
    seen = watched(monkeypatch)
    run, heard, two = run_tiny(**BY_SAMPLES)
    why = "recording failed: operation not permitted when stream is capturing"
    assert said(heard, "note").count(why) == 1 and "are not recorded as CUDA graphs, and slower" in said(heard, "note")
    assert run.config().settings.graphs == "off" and why in run.config().origins["graphs"].note
    assert len({shape for _, shape in seen[-20:]}) > 1  # nothing fills them up any more
    assert heard.losses == pytest.approx(plain.losses, rel=1e-5) and run.proof["passed"]
    assert all(torch.allclose(value, trained(two)[name], atol=1e-4) for name, value in trained(one).items())


def test_memory_that_runs_out_takes_the_graphs_before_anything_is_computed_again(
    run_tiny: Runs, timed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(lambda tokens: 0.2)
    inner, replays = CausalLM.loss, shapes_of_replays(monkeypatch)

    def loss(self: CausalLM, model: nn.Module, batch: Any) -> Any:
        if len(replays) > 4 and fast.recorders(model):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(self, model, batch)

    monkeypatch.setattr(CausalLM, "loss", loss)
    run, heard, _ = run_tiny(**BY_SAMPLES)
    (event,) = heard.of("oom")
    assert "going on without CUDA graphs" in event["text"] and run.config().settings.recompute == "none"
    assert run.config().settings.graphs == "off" and run.result["micro_batch"] == 2 and len(heard.losses) == 12


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "few": ({"steps": 3}, "recording is not worth its while for 6 batches"),
    "masks drawn twice": ({"recompute": "input", "dropout": 0.1}, "draw their masks of dropout a second time"),
    "tiled": ({"recompute": "tiled"}, "inputs of blocks are kept on the host"),
    "plain": ({"fuse": "off"}, "only fused blocks are recorded"),
    "no room": ({}, "records do not fit: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_graphs_do_not_fit_a_run_they_are_left_and_it_is_written_down(
    run_tiny: Runs, timed: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    settings, why = REFUSED[case]
    timed(lambda tokens: 0.2)
    if case == "no room":
        monkeypatch.setattr(fast, "available", lambda *_: 2**20)
        settings = {"recompute": "none"}
    run, _, _ = run_tiny(**{**BY_SAMPLES, **settings})
    assert run.config().settings.graphs == "off" and why in run.config().origins["graphs"].note


# ------------------------------------------------------------------ without padding


def test_attention_that_cannot_be_told_pads_and_says_why(run_tiny: Runs, make_model: Callable[..., nn.Module]) -> None:
    _, flat, _ = run_tiny(**SHORT)
    assert "no padding: attention runs within each sample" in said(flat, "note")
    model = make_model("llama")
    model.set_attn_implementation("eager")  # type: ignore[operator]
    _, padded, _ = run_tiny(**SHORT, model=model)
    assert "batches are padded: its attention is eager" in said(padded, "note")
    assert padded.losses == pytest.approx(flat.losses, rel=1e-4)
