"""Blocks a tile of tokens at a time are the blocks they were: over builds, what is adapted and how, storages, and rows
that do not divide into tiles. And what a token costs then is what the memory model says."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from test_fuse import ACTING, FUSED_SPECS, WHOLE, agree, distance, home, model_of, outcome, said
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer.advise import activations
from veneer.advise.activations import Pass, fused_workspace, tiled_workspace
from veneer.advise.shapes import shapes_of
from veneer.core.model import parameters
from veneer.kernels import tiled
from veneer.kernels.fuse import fuse, set_recompute
from veneer.kernels.tiled import Tile, Tiled
from veneer.kernels.varlen import within
from veneer.quant.layer import unrounded


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 11 tokens are three tiles, the last of one token."""
    home._said.clear()
    monkeypatch.setattr(tiled, "TILE", 5)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tiles each block was cut into."""
    counts, inner = [], Tiled.apply

    def apply(x: Tensor, cos: Any, sin: Any, block: Any, tiles: list[Tile], *rest: Tensor) -> Tensor:
        counts.append(len(tiles))
        return inner(x, cos, sin, block, tiles, *rest)

    monkeypatch.setattr(Tiled, "apply", apply)
    return counts


@pytest.mark.parametrize("build", WHOLE)
def test_in_tiles_and_plainly_is_one(build: str, ran: list[int]) -> None:
    model = model_of(build)
    wanted = outcome(model)
    fuse(model, "tiled", verbose=False)
    agree(outcome(model), wanted)
    assert ran[-2:] == [6, 6] and not said()  # two blocks, two rows of three tiles


@pytest.mark.parametrize("spec", [name for name in FUSED_SPECS if "dropout" not in name])
@pytest.mark.parametrize("build", ["llama-biased"])
def test_over_deltas_and_rules(spec: str, build: str, ran: list[int]) -> None:
    model = model_of(build, **FUSED_SPECS[spec])
    wanted = outcome(model)
    fuse(model, "tiled", verbose=False)
    agree(outcome(model), wanted)
    assert ran and not said()


@pytest.mark.parametrize("acting", ACTING)
@pytest.mark.parametrize("tile", [4, 12])  # tokens that do not divide, and tiles of one whole row
def test_over_who_acts(acting: str, tile: int, ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE", tile)
    model = model_of("qwen2")
    with ACTING[acting](model):
        wanted = outcome(model)
        fuse(model, "tiled", verbose=False)
        agree(outcome(model), wanted)
    assert ran[-2:] == [{4: 6, 12: 2}[tile]] * 2 and not said()


def test_rows_are_routed_when_several_make_one_tile(ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE", 33)
    model = model_of("llama")
    veneer.attach(model, veneer.LoRA(rank=3, alpha=9, targets="all-linear"), name="second")
    torch.manual_seed(1)
    for p in parameters(model).values():
        nn.init.normal_(p, std=0.2)
    with veneer.routed(model, ["second", "default"]):
        wanted = outcome(model, rows=4)
        fuse(model, "tiled", verbose=False)
        agree(outcome(model, rows=4), wanted)
    assert ran[-2:] == [2, 2]  # three rows and one


@pytest.mark.parametrize("storage", ["nf4", "int8", "fp8"])
def test_over_storages(storage: str, ran: list[int]) -> None:
    model = model_of("mistral")
    veneer.quantize(model, storage)
    with unrounded(model):
        wanted = outcome(model)
        fuse(model, "tiled", verbose=False)
        agree(outcome(model), wanted)
    assert ran


def test_in_half_precision_it_is_as_near_the_truth_as_whole(ran: list[int]) -> None:
    model = model_of("llama", torch.bfloat16)
    exact = outcome(copy.deepcopy(model).double())
    fuse(model, "input", verbose=False)
    whole = distance(outcome(model), exact)
    set_recompute(model, "tiled")
    assert distance(outcome(model), exact) <= 1.2 * whole + 1e-3 and ran


def test_rows_packed_behind_each_other(ran: list[int]) -> None:
    model = model_of("llama")
    bounds = torch.tensor([0, 3, 8, 11], dtype=torch.int32)
    told: dict[str, Any] = {
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 5, "max_length_k": 5,
        "position_ids": torch.tensor([[*range(3), *range(5), *range(3)]]),
    }  # fmt: skip
    with within(model):
        wanted = outcome(model, rows=1, **told)
        fuse(model, "tiled", verbose=False)
        agree(outcome(model, rows=1, **told), wanted)
    assert ran[-2:] == [3, 3]


@pytest.mark.parametrize(
    "build, combine, attention",
    [("llama", "add", 0.0), ("llama", "add", 0.3), ("llama", "dora", 0.3), ("gpt2", "add", 0.0), ("phi", "dora", 0.0)],
)
def test_with_dropout_gradients_are_those_of_what_was_computed(
    build: str, combine: str, attention: float, ran: list[int]
) -> None:
    """Masks are drawn tile by tile, so there is nothing to compare with but the function itself. DoRA takes the rows'
    norms for constants, so of it only the magnitudes are moved."""
    model = model_of(build, dropout=0.3, residual=0.2, combine=combine)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = attention
    fuse(model, "tiled", verbose=False)
    found = outcome(model)
    learned = {n: p for n, p in model.named_parameters() if n in found and (combine == "add" or "magnitude" in n)}
    assert learned
    torch.manual_seed(5)
    ways = {n: torch.randn_like(p) / p.numel() ** 0.5 for n, p in learned.items()}
    slope = sum(float((found[n] * way).sum()) for n, way in ways.items())
    losses = []
    for step in (1e-4, -2e-4):
        with torch.no_grad():
            for n, p in learned.items():
                p.add_(ways[n], alpha=step)
        losses.append(float(outcome(model)["loss"]))
    assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(slope, rel=1e-3)
    assert ran


def test_without_gradients_long_rows_run_in_tiles_and_generation_as_ever(ran: list[int]) -> None:
    model = model_of("llama").eval()
    ids = torch.randint(3, 97, (1, 11))
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        written = model.generate(ids, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
        fuse(model, "tiled", verbose=False)
        ran.clear()
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), written)  # type: ignore[operator]
        assert not ran
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, wanted, rtol=1e-5, atol=1e-6)
        assert ran == [3, 3]


def test_a_batch_of_one_tile_is_computed_whole(ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE", 22)
    model = model_of("llama", dropout=0.3)
    wanted = outcome(model)
    fuse(model, "tiled", verbose=False)
    agree(outcome(model), wanted)
    assert not ran


@pytest.mark.parametrize("tokens,tile", [(11, 5), (10, 5), (5, 5), (3, 5), (2, 5), (1, 5), (7, 1)])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_tiles_hold_every_token_once(rows: int, tokens: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE", tile)
    whole = torch.zeros(rows, tokens, 3)
    for each in tiled._tiles(rows, tokens):
        part = each.of(whole)
        assert part.is_contiguous() and 0 < part.shape[0] * part.shape[1] <= max(tile, 1)
        part.add_(1)
    assert torch.equal(whole, torch.ones_like(whole))


# ------------------------------------------------------------------ memory


def peak(model: nn.Module, tokens: int) -> int:
    """The most bytes that torch has given out at a time, beyond what was there, in a block's forward and backward."""
    x = torch.randn(1, tokens, 64, requires_grad=True)
    g = torch.randn(1, tokens, 64)
    angle = torch.randn(1, tokens, 8)
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        y = model(x, position_embeddings=(angle.cos(), angle.sin()), attention_mask=None)
        y.backward(g)
    live = most = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def test_what_a_token_costs_is_what_the_memory_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles: nothing as wide as the unit, which is 8 times as wide as the model here."""
    monkeypatch.setattr(tiled, "TILE", 64)
    monkeypatch.setattr(activations, "TILE", 64)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=512, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    veneer.attach(model, veneer.LoRA(rank=4, alpha=8))
    block = model.model.layers[0]  # type: ignore[union-attr]
    (shape,) = shapes_of(config).blocks
    how = Pass(tokens=1024, ranks={m.name: 4 for m in shape.matrices})
    peaks = {}
    for level in ("input", "tiled"):
        fuse(model, level, verbose=False)
        peaks[level] = [peak(block, tokens) for tokens in (512, 1024)]
        veneer.unfuse(model)
    assert peaks["input"][1] == pytest.approx(1024 * fused_workspace(shape, how, "input"), rel=0.15)
    assert peaks["tiled"] == pytest.approx([tiled_workspace(shape, how, tokens) for tokens in (512, 1024)], rel=0.15)
