"""Blocks recorded as CUDA graphs: replayed = run as ever, to the last bit, whatever happens in between.

A CPU has no graphs; there a stand-in (`graphs_on_cpu` in conftest.py) does the work anew at each replay and puts what
it gives where a graph would, so that everything but the card is tested: what is recorded when, replayed, compared.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import veneer
from veneer import LoRA
from veneer.core.model import parameters
from veneer.kernels.fuse import FusedBlock, fuse, set_recompute, unfuse
from veneer.kernels.graphs import Recorder, state_of

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=[pytest.param("cuda", marks=[gpu, pytest.mark.gpu]), "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("graphs_on_cpu")
    return request.param


def llama(
    device: str = "cpu", dtype: torch.dtype = torch.float32, storage: str | None = None, dropout: float = 0.0
) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, use_cache=False, attn_implementation="eager",  # whose gradients come in one order
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device, dtype).train()
    if storage:
        kind, *plain = storage.split(" ", 1)
        veneer.quantize(model, kind, rotate=False if plain else None)
    veneer.attach(model, LoRA(rank=4, alpha=8, dropout=dropout))
    for p in parameters(model).values():
        nn.init.normal_(p, std=0.1)
    return model


def gpt2(device: str, residual: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_layer=3, n_head=4, vocab_size=97, n_positions=32, use_cache=False, resid_pdrop=residual,
        embd_pdrop=0, attn_pdrop=0, attn_implementation="eager",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(device).train()
    veneer.attach(model, LoRA(rank=4, alpha=8))
    for p in parameters(model).values():
        nn.init.normal_(p, std=0.1)
    return model


def moved(model: nn.Module, steps: int, shapes: Any = ((2, 16),), micro: int = 2) -> list[Tensor]:
    """Losses and final parameters of some steps, `micro` backward passes each."""
    draw = torch.Generator().manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    seen = []
    for i in range(steps):
        for _ in range(micro):
            ids = torch.randint(0, 97, shapes[i % len(shapes)], generator=draw).to(model.device)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            seen.append(loss.detach().clone())
        optimizer.step()
        optimizer.zero_grad(set_to_none=i % 2 == 0)
    return seen + [p.detach().clone() for p in trained]


def records(model: nn.Module) -> int:
    recorder = next(m.fused.recorder for m in model.modules() if isinstance(m, FusedBlock))
    return sum(record.forward_graph is not None for record in recorder.records.values())


def same(one: list[Tensor], other: list[Tensor]) -> None:
    off = [
        (i, float((a - b).abs().max()))
        for i, (a, b) in enumerate(zip(one, other, strict=True))
        if not torch.equal(a, b)
    ]
    assert not off, f"{len(off)} of {len(one)} differ: {off[:8]}"


@pytest.mark.parametrize("recompute", ["none", "gate_up", "middle", "input"])
@pytest.mark.parametrize("storage", [None, "nf4", "fp8", "fp8 as it is"])
def test_a_replay_is_the_same_to_the_last_bit(recompute: str, storage: str | None, device: str) -> None:
    if "fp8" in (storage or "") and device == "cpu":
        pytest.skip("a CPU has no such products")
    ever = llama(device, torch.bfloat16 if device == "cuda" else torch.float32, storage)
    graphed = copy.deepcopy(ever)
    fuse(ever, recompute, verbose=False)
    fuse(graphed, recompute, graphs=True, verbose=False)
    same(moved(graphed, 6), moved(ever, 6))
    assert records(graphed) == 3


@pytest.mark.parametrize("recompute", ["none", "gate_up", "middle"])
@pytest.mark.parametrize("build", ["llama", "gpt2"])
def test_a_replay_draws_the_masks_that_would_be_drawn_as_ever(build: str, recompute: str, device: str) -> None:
    ever = llama(device, dropout=0.3) if build == "llama" else gpt2(device, residual=0.2)
    graphed = copy.deepcopy(ever)
    fuse(ever, recompute, verbose=False)
    fuse(graphed, recompute, graphs=True, verbose=False)
    told: list[str] = []
    next(m.fused.recorder for m in graphed.modules() if isinstance(m, FusedBlock)).tell = told.append
    outcomes = []
    for model in (graphed, ever):
        torch.manual_seed(5)
        outcomes.append(moved(model, 6))
    same(*outcomes)
    again = recompute == "middle"
    assert records(graphed) == (0 if again else 3) and any("masks of dropout a second time" in t for t in told) == again


def test_blocks_without_rotary_positions_are_recorded_too(device: str) -> None:
    ever = gpt2(device)
    graphed = copy.deepcopy(ever)
    fuse(ever, verbose=False)
    fuse(graphed, graphs=True, verbose=False)
    same(moved(graphed, 6), moved(ever, 6))
    assert records(graphed) == 3


def test_batches_that_are_all_unlike_are_named_once(device: str) -> None:
    model = llama(device)
    fuse(model, graphs=True, verbose=False)
    shapes = tuple((2, n) for n in range(4, 30))
    with pytest.warns(UserWarning) as said:
        moved(model, len(shapes), shapes, micro=1)
    (warning,) = [str(each.message) for each in said]
    assert warning.startswith("model.layers.0 and its like are not recorded as CUDA graphs, and slower: ")
    assert "too few batches are of one shape: " in warning and "(2, 26, 64), then (2, 27, 64)" in warning
    assert records(model) == 0


def test_a_block_that_is_unfit_for_recording_is_named(device: str) -> None:
    ever = llama(device)
    graphed = copy.deepcopy(ever)
    fuse(ever, verbose=False)
    fuse(graphed, graphs=True, verbose=False)
    told: list[str] = []
    next(m.fused.recorder for m in graphed.modules() if isinstance(m, FusedBlock)).tell = told.append
    for model in (ever, graphed):
        model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="run plainly"):
        same(moved(graphed, 6), moved(ever, 6))
    wanted = "model.layers.1 and its like are not recorded as CUDA graphs, and slower: a hook hangs on it"
    assert told == [wanted] and records(graphed) == 2


def test_what_keeps_blocks_from_being_replayed_is_said(device: str) -> None:
    model = llama(device)
    fuse(model, graphs=True, verbose=False)
    veneer.attach(model, LoRA(rank=2), name="b")
    with pytest.warns(UserWarning, match="rows of a batch are routed"), veneer.routed(model, ["b", "default"]):
        moved(model, 1)
    watching = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with pytest.warns(UserWarning, match="something looks at what is saved"), watching:
        moved(model, 1)
    with pytest.warns(UserWarning, match="pass use_cache=False"):
        model(input_ids=torch.arange(8, device=device)[None], use_cache=True)
    with pytest.warns(UserWarning, match="entered again before its backward pass"):
        ids = torch.arange(8, device=device)[None]
        sum(model(input_ids=ids, labels=ids).loss for _ in range(28)).backward()


@pytest.mark.filterwarnings("ignore:.*not recorded as CUDA graphs")
def test_shapes_that_come_and_go_switches_and_two_forward_passes_at_once(device: str) -> None:
    ever = llama(device)
    graphed = copy.deepcopy(ever)
    fuse(ever, verbose=False)
    fuse(graphed, graphs=True, verbose=False)
    shapes = ((2, 16), (2, 16), (2, 16), (1, 8))
    same(moved(graphed, 8, shapes), moved(ever, 8, shapes))
    assert records(graphed) == 3
    shapes = ((1, 8),)
    same(moved(graphed, 5, shapes), moved(ever, 5, shapes))
    assert records(graphed) == 3
    for model in (ever, graphed):
        torch.manual_seed(2)
        veneer.attach(model, LoRA(rank=4, alpha=8), name="other")
        nn.init.normal_(model.model.layers[0].self_attn.q_proj.slots["other"].delta.B, std=0.1)
    outcomes = []
    for model in (ever, graphed):
        seen: list[Tensor] = []
        for names in ("default", "other", "default"):
            veneer.activate(model, names)
            for _ in range(4):
                ids = torch.arange(32, device=device).view(2, 16)
                first, second = (model(input_ids=t, labels=t).loss for t in (ids, ids + 1))
                (first + 2 * second).backward()
                seen += [first.detach(), second.detach()]
            with veneer.disabled(model):
                seen.append(model(input_ids=ids).logits.detach())
        outcomes.append(seen + [p.grad for p in model.parameters() if p.grad is not None])
    same(*outcomes)
    set_recompute(graphed, "input"), set_recompute(ever, "input")
    same(moved(graphed, 5), moved(ever, 5))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(graphed)))
    same(moved(twin, 4), moved(ever, 4))
    unfuse(graphed)
    assert not any(isinstance(m, FusedBlock) for m in graphed.modules())


def test_a_weight_that_moved_is_seen(device: str) -> None:
    ever = llama(device)
    graphed = copy.deepcopy(ever)
    fuse(ever, verbose=False)
    fuse(graphed, graphs=True, verbose=False)
    moved(graphed, 4), moved(ever, 4)
    for model in (ever, graphed):
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.data = weight.data * 2
    same(moved(graphed, 8), moved(ever, 8))
    assert records(graphed) == 3


def test_what_was_recorded_is_given_back_at_once(device: str) -> None:
    model = llama(device)
    fuse(model, graphs=True, verbose=False)
    moved(model, 4)
    recorder = next(m.fused.recorder for m in model.modules() if isinstance(m, FusedBlock))
    kept = [weakref.ref(record) for record in recorder.records.values()]
    kept += [weakref.ref(record().y) for record in kept]
    assert len(kept) == 6 and all(each() is not None for each in kept)
    del recorder
    gc.disable()
    try:
        unfuse(model)
        assert all(each() is None for each in kept)
    finally:
        gc.enable()


CHANGES = {
    "a weight elsewhere": lambda m: setattr(m.mlp.up_proj.weight, "data", m.mlp.up_proj.weight.data.clone()),
    "another parameter of the same memory": lambda m: setattr(
        m.mlp.up_proj, "weight", nn.Parameter(m.mlp.up_proj.weight.data)
    ),
    "a mode": lambda m: m.mlp.eval(),
    "a hook": lambda m: m.mlp.register_forward_hook(lambda *_: None),
    "frozen": lambda m: m.mlp.up_proj.slots["default"].delta.A.requires_grad_(False),
    "scaled": lambda m: setattr(m.mlp.up_proj.slots["default"].delta, "scale", 7.0),
    "dropout": lambda m: setattr(m.mlp.up_proj.slots["default"].delta, "dropout", 0.5),
    "a class": lambda m: setattr(m.mlp, "__class__", type("Other", (type(m.mlp),), {})),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_replay_takes_for_granted_is_compared(change: str) -> None:
    block = llama().model.layers[0]
    before = state_of(block)
    assert state_of(block) == before
    CHANGES[change](block)
    assert state_of(block) != before


def test_who_acts_is_compared() -> None:
    model = llama()
    veneer.attach(model, LoRA(rank=2), name="b")
    block, seen = model.model.layers[0], []
    for who in ("default", "b", None, {"default": 0.5, "b": 0.5}):
        veneer.activate(model, who)
        seen.append(state_of(block))
    assert len(set(seen)) == 4


def test_on_a_cpu_graphs_are_asked_for_in_vain_and_copies_share_none() -> None:
    model = llama()
    report = str(fuse(model, graphs=True, verbose=False))
    assert "as CUDA graphs" not in report
    assert "no CUDA graphs: they need a GPU, and the model is on the cpu; kernels are started one by one" in report
    moved(model, 3)
    recorder = next(m.fused.recorder for m in model.modules() if isinstance(m, FusedBlock))
    assert isinstance(recorder, Recorder) and not recorder.records
    twin = copy.deepcopy(model)
    assert next(m.fused.recorder for m in twin.modules() if isinstance(m, FusedBlock)) is not recorder


def test_where_nothing_that_is_fused_can_be_recorded_it_is_said() -> None:
    report = fuse(nn.ModuleList([nn.RMSNorm(8, eps=1e-6)]), graphs=True, verbose=False)
    assert report.replaced["norms"] == 1 and "no CUDA graphs: none of what is fused is recorded" in str(report)
