"""The planner: the first level that fits, monotone in memory; and what fused blocks keep, told and measured."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import transformers

from veneer.advise.activations import Pass, kept_fused
from veneer.advise.keep import MARGIN, choose, levels_of, longest_row, recorded, stays
from veneer.advise.memory import estimate_memory
from veneer.advise.plan import Plan
from veneer.advise.shapes import shapes_of
from veneer.core.model import attach
from veneer.core.spec import LoRA
from veneer.errors import ConfigError
from veneer.kernels.block import LEVELS
from veneer.kernels.fuse import fuse

GIB = 2**30
LLAMA = {
    "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip
BIG = Plan(device="cuda", batch_size=8, max_len=2048, padded=False, fused=True)
SHAPES = shapes_of("8B")


def needed(level: str, **changes: Any) -> float:
    settings = {name: getattr(BIG, name) for name in BIG.__dataclass_fields__} | {"recompute": level} | changes
    found = estimate_memory(SHAPES, **settings)
    return found.needed_bytes + MARGIN * found.total_bytes


def test_the_levels_are_those_of_the_blocks_and_one_more() -> None:
    assert levels_of(True, "cuda") == (*LEVELS[:-1], "offload", "tiled") and levels_of(True, "cpu") == LEVELS
    assert levels_of(False, "cuda") == ("none", "input") == levels_of(False, "cpu")


def test_each_level_needs_less_than_the_one_before() -> None:
    sizes = [needed(level) for level in levels_of(True, "cuda")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_first_level_that_fits_is_taken(fused: bool, device: str) -> None:
    plan = Plan(device=device, batch_size=8, max_len=2048, padded=False, fused=fused)
    levels, before = levels_of(fused, device), -1
    for gib in range(400, 10, -2):
        choice = choose(SHAPES, plan, gib * GIB)
        place = levels.index(choice.level)
        assert place >= before, f"{gib} GiB take less recomputation than more memory did"
        before = place
        if choice.fits:
            assert all(choice.needs[level] > gib * GIB for level in levels[:place])
            assert choice.needs[choice.level] <= gib * GIB
        else:
            assert set(choice.needs) == set(levels) and min(choice.needs.values()) > gib * GIB
    assert before == len(levels) - 1
    assert choose(SHAPES, plan, 400 * GIB).level == "none"


def test_records_count_beside_what_else_is_computed() -> None:
    alone = recorded(SHAPES, BIG, 1.0, is_alone=True)
    halves = [recorded(SHAPES, BIG, share, is_alone=False) for share in (0.0, 0.5, 1.0)]
    assert needed("none") < alone == halves[0] < halves[1] < halves[2]
    found = estimate_memory(SHAPES, **{name: getattr(BIG, name) for name in BIG.__dataclass_fields__})
    assert halves[2] - alone == pytest.approx(found.parts["activations"] + found.parts["workspace"], rel=1e-6)


def test_none_is_preferred_and_nothing_is_suggested_then() -> None:
    choice = choose(SHAPES, BIG, 1000 * GIB)
    assert choice.level == "none" and not choice.instead and choice.reason.startswith("all that is kept fits")
    assert list(choice.needs) == ["none"]


def test_what_would_spare_the_second_computation_is_said_and_true() -> None:
    free = int(needed("gate_up")) + GIB
    choice = choose(SHAPES, BIG, free)
    assert choice.level == "gate_up" and "the first that fits" in choice.reason
    (rows,) = (said for said in choice.instead if said.startswith("batch_size"))
    size = int(rows.split()[1])
    assert needed("none", batch_size=size) <= free < needed("none", batch_size=2 * size)


def test_moments_of_one_byte_are_suggested_where_they_are_what_is_missing() -> None:
    plan = Plan(device="cuda", batch_size=1, max_len=64, r=256, padded=False, fused=True)
    spare = needed("none", batch_size=1, max_len=64, r=256, optimizer="adamw8bit")
    assert spare < needed("none", batch_size=1, max_len=64, r=256) - GIB
    choice = choose(SHAPES, plan, int(spare) + 1)
    assert "optimizer adamw8bit" in choice.instead and plan.optimizer == "adamw"


def test_what_the_host_cannot_take_stays_on_the_card_and_counts_there() -> None:
    long = Plan(device="cuda", r=32, max_len=350_000, padded=False, fused=True, recompute="tiled")
    each = 350_000 * 4096 * 2
    whole = estimate_memory(SHAPES, **vars(long))
    assert whole.host_bytes == 33 * each and stays(SHAPES, long, 33 * each) == 0 == stays(SHAPES, long, None)
    assert stays(SHAPES, long, 33 * each - 1) == each and stays(SHAPES, long, 0) == 33 * each
    some = estimate_memory(SHAPES, **vars(long) | {"stay": 4})
    assert some.host_bytes == 29 * each and some.total_bytes - whole.total_bytes == 4 * each
    choice = choose(SHAPES, long, 80 * GIB, 30 * each)
    assert choice.level == "tiled" and choice.room == 3 * each and "that the host has no room for" in choice.reason


@pytest.mark.parametrize("quant", ["nf4", "none"])
@pytest.mark.parametrize("host", [32, 115, None])
def test_the_longest_row_fits_and_a_longer_one_does_not(quant: str, host: int | None) -> None:
    plan = Plan(device="cuda", precision="bf16", quant=quant, r=32, fused=True, batch_size=4)
    bytes_ = None if host is None else host * GIB
    found = longest_row(SHAPES, plan, 79 * GIB, bytes_)
    assert found is not None and found[1].level == "tiled" and found[1].fits
    one = {name: getattr(plan, name) for name in plan.__dataclass_fields__} | {"batch_size": 1, "padded": False}
    longer = Plan(**one | {"max_len": int(1.005 * found[0])})
    assert not choose(SHAPES, longer, 79 * GIB, bytes_).fits
    assert (found[0] > 342_733) == (host != 32)  # with nf4 and without


def test_no_row_is_the_longest_where_the_weights_do_not_fit() -> None:
    assert longest_row(SHAPES, BIG, 10 * GIB) is None


def test_a_base_that_is_there_counts_as_what_it_is() -> None:
    small = estimate_memory("8B", device="cuda", weights=4 * GIB)
    assert small.parts["weights"] == 4 * GIB
    assert estimate_memory("8B", device="cuda").parts["weights"] > 14 * GIB


def test_levels_of_fused_blocks_need_them() -> None:
    with pytest.raises(ConfigError, match="is for fused blocks"):
        Plan(recompute="gate_up")


# ------------------------------------------------------------------ told and measured

ROWS, TOKENS = 2, 64
CASES: list[tuple[str, dict[str, Any], torch.dtype]] = [
    ("llama", {}, torch.float32),
    ("llama", {}, torch.bfloat16),
    ("llama", {"dropout": 0.1}, torch.float32),
    ("llama", {"targets": ["q_proj", "down_proj"]}, torch.float32),
    ("llama", {"combine": "dora"}, torch.float32),
    ("qwen2", {"combine": "dora"}, torch.float32),  # with biases at q, k and v
    ("qwen3", {}, torch.float32),
]


@pytest.mark.parametrize(("family", "spec", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_one_more_fused_block_keeps_what_the_table_says(
    family: str, spec: dict[str, Any], dtype: torch.dtype, level: str
) -> None:
    sizes = [_left_behind(family, depth, dtype, spec, level) for depth in (2, 3)]
    config = _config(family, 3)
    (block,) = shapes_of(config).blocks
    adapted = [m for m in block.matrices if "targets" not in spec or m.name.endswith(tuple(spec["targets"]))]
    how = Pass(
        tokens=TOKENS, width=dtype.itemsize, ranks={m.name: 8 for m in adapted}, dropout=spec.get("dropout", 0.0),
        dora="combine" in spec,
    )  # fmt: skip
    factors = sum(8 * (m.out + m.n) for m in adapted) * dtype.itemsize + sum(4 * m.out for m in adapted) * how.dora
    state = torch.get_rng_state().nbytes if "dropout" in spec and level in ("middle", "input", "tiled") else 0
    told = kept_fused(block, how, level) * ROWS * TOKENS + factors + state
    assert told == pytest.approx(sizes[1] - sizes[0], rel=0.02)


def _config(family: str, depth: int) -> Any:
    more = {"head_dim": 16} if family == "qwen3" else {}
    return transformers.AutoConfig.for_model(family, **LLAMA, **more, num_hidden_layers=depth)


def _left_behind(family: str, depth: int, dtype: torch.dtype, spec: dict[str, Any], level: str) -> int:
    """Bytes that torch's allocator has given out in a forward pass and not got back at its end."""
    model = transformers.AutoModelForCausalLM.from_config(_config(family, depth), dtype=dtype).train()
    attach(model, LoRA(rank=8, alpha=16, **spec), dtype=torch.float32)
    fuse(model, level, verbose=False)
    ids = torch.randint(3, 299, (ROWS, TOKENS))
    model.model(input_ids=ids, use_cache=False)
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = model.model(input_ids=ids, use_cache=False)[0]
    assert kept.grad_fn is not None
    return sum(e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]")
