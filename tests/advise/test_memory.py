"""Estimates obey their laws, reproduce published figures, and meet a measured peak."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from veneer.advise.memory import PARTS, estimate_memory, gib
from veneer.advise.peak import CHUNK_ROWS
from veneer.advise.plan import CHOICES, Plan
from veneer.advise.shapes import shapes_of, typical
from veneer.errors import ConfigError, TargetError
from veneer.train.settings import KEYS

ROOT = Path(__file__).parents[2]
GIB = 2**30
GPU = {"device": "cuda"}
LLAMA_8B = "8B"


def total(**settings: Any) -> int:
    return estimate_memory(LLAMA_8B, **{**GPU, **settings}).total_bytes


# Laws ---------------------------------------------------------------------------------------------------------------

VARIANTS: list[dict[str, Any]] = [
    {},
    {"recompute": "full"},
    {"quant": "nf4"},
    {"method": "full"},
    {"method": "freeze"},
    {"combine": "dora", "dropout": 0.1},
    {"attention": "eager"},
    {"loss": "plain"},
    {"mode": "infer"},
    {"device": "cpu", "precision": "fp32"},
    {"accumulate": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(
    ("name", "values"), [("batch_size", (1, 2, 3, 8)), ("max_len", (64, 512, 2048)), ("r", (1, 8, 64))]
)
def test_more_is_never_less(variant: dict[str, Any], name: str, values: tuple[int, ...]) -> None:
    sizes = [total(**variant, **{name: value}) for value in values]
    assert sizes == sorted(sizes)
    if name != "r":
        assert len(set(sizes)) == len(sizes) or variant.get("method") in ("full", "freeze")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_parts_sum_to_the_total_and_the_total_is_the_highest_moment(variant: dict[str, Any]) -> None:
    found = estimate_memory(LLAMA_8B, **{**GPU, **variant}, batch_size=2)
    assert tuple(found.parts) == PARTS
    assert sum(found.parts.values()) == found.total_bytes
    assert found.total_bytes == pytest.approx(max(found.moments.values()), abs=len(PARTS))
    assert found.moments[found.peak] == max(found.moments.values())
    assert found.needed_bytes == found.total_bytes + found.reserve_bytes > found.total_bytes
    assert all(size >= 0 for size in found.parts.values())


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ({"recompute": "full"}, {"recompute": "none"}),
        ({"quant": "nf4"}, {"quant": "int8"}),
        ({"quant": "int8"}, {"quant": "none"}),
        ({"precision": "bf16"}, {"precision": "fp32"}),
        ({"method": "lora"}, {"method": "full"}),
        ({"method": "freeze"}, {"method": "full"}),
        ({"loss": "chunked"}, {"loss": "plain"}),
        ({"targets": "minimal"}, {"targets": "attention"}),
        ({"targets": "attention"}, {"targets": "all-linear"}),
        ({"dropout": 0.0}, {"dropout": 0.1}),
        ({"combine": "add"}, {"combine": "dora"}),
        ({"attention": "sdpa"}, {"attention": "eager"}),
        ({"layers": 4}, {"layers": None}),
        ({"padded": False}, {"padded": True}),
        ({"mode": "infer"}, {"mode": "train"}),
        ({"optimizer": "adamw8bit"}, {"optimizer": "adamw"}),
        ({"accumulate": False}, {"accumulate": True}),
        ({"exclude": ["down_proj"]}, {}),
        ({}, {"modules_to_save": ["lm_head"]}),
    ],
    ids=str,
)
def test_each_choice_costs_what_it_should(small: dict[str, Any], large: dict[str, Any]) -> None:
    many = {"batch_size": 8, "max_len": 2048}
    assert total(**many, **small) < total(**many, **large)


def test_gradients_and_states_are_counted_for_what_is_trained_alone() -> None:
    lora = estimate_memory(LLAMA_8B, **GPU, r=16)
    assert lora.trainable == 41_943_040  # every projection of the 8 B shape
    assert lora.parts["adapter"] == 4 * lora.trainable
    assert lora.parts["optimizer"] == 8 * lora.trainable
    assert lora.moments["step"] > lora.parts["weights"] + 16 * lora.trainable - GIB
    full = estimate_memory(LLAMA_8B, **GPU, method="full")
    assert full.trainable == full.parameters
    assert full.parts["adapter"] == 0
    assert full.parts["weights"] == 2 * full.parameters
    assert full.parts["optimizer"] == 12 * full.parameters  # the two moments, and a master in fp32


def test_below_the_first_block_that_learns_nothing_is_kept() -> None:
    def kept(**settings: Any) -> int:
        return estimate_memory(LLAMA_8B, **GPU, batch_size=4, **settings).parts["activations"]

    assert kept(layers=8) < 0.3 * kept()
    assert kept(method="freeze", layers=2) < 0.1 * kept(method="full")
    assert kept(layers=[0]) > 0.7 * kept()  # the gradient still passes through all blocks above


def test_a_classifier_is_trained_whole_beside_the_adapter() -> None:
    bert = {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
            "intermediate_size": 1536, "vocab_size": 30522}  # fmt: skip
    found = estimate_memory(bert, device="cpu", task="sequence_classification", labels=5, r=4)
    blocks = 6 * (4 * 4 * (384 + 384) + 2 * 4 * (384 + 1536)) + 4 * (384 + 384)  # and the pooler
    assert found.trainable == blocks + 5 * 384 + 5


# Published figures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "part", "said", "tolerance"),
    [
        ({}, "weights", 15.0, 0.005),
        ({"quant": "nf4"}, "weights", 5.3, 0.005),
        ({"loss": "plain", "batch_size": 4, "max_len": 2048}, "loss", 11.7, 0.005),
        ({"batch_size": 4, "recompute": "full", "loss": "plain"}, "activations", 2.0, 0.12),  # and the last norm
    ],
)
def test_parts_of_an_8b_model(settings: dict[str, Any], part: str, said: float, tolerance: float) -> None:
    found = estimate_memory(LLAMA_8B, **GPU, **settings)
    assert found.parts[part] / GIB == pytest.approx(said, rel=tolerance)


def test_adapter_gradients_and_adam_of_an_8b_model() -> None:
    found = estimate_memory(LLAMA_8B, **GPU, r=16, accumulate=True)
    assert sum(found.parts[p] for p in ("adapter", "gradients", "optimizer")) / GIB == pytest.approx(0.625)


@pytest.mark.parametrize(
    ("measured", "settings"),
    [
        (43.7, {"batch_size": 2, "loss": "plain"}),  # PEFT
        (29.4, {"batch_size": 4, "loss": "plain", "recompute": "full"}),  # PEFT
        (44.0, {"batch_size": 2, "loss": "plain"}),  # ours, benchmarks/train_gpu.py
        (38.7, {"batch_size": 2, "loss": "chunked"}),  # ours
        (27.9, {"batch_size": 2, "fused": True}),  # ours, as the next three
        (39.6, {"batch_size": 4, "fused": True}),
        (25.7, {"batch_size": 4, "fused": True, "recompute": "gate_up"}),
        (18.9, {"batch_size": 4, "fused": True, "recompute": "input"}),
    ],
)
def test_peaks_of_an_8b_model_on_an_h100(measured: float, settings: dict[str, Any]) -> None:
    assert total(r=16, max_len=2048, padded=False, **settings) / GIB == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(
    ("name", "said"), [("Llama-2-7B", 5.2), ("Llama-33B", 20.4), ("Llama-65B", 38.6), ("Llama-3.1-70B", 43.8)]
)
def test_qlora_at_two_thousand_tokens(name: str, said: float) -> None:
    found = estimate_memory(typical(name), **GPU, quant="nf4", recompute="full", batch_size=1, max_len=2048, r=16)
    assert found.total_bytes / GIB == pytest.approx(said, rel=0.1)


# Does it fit? --------------------------------------------------------------------------------------------------------


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    found = estimate_memory(LLAMA_8B, **GPU, memory="80GB", batch_size=64)
    assert found.fits is False
    rows = found.largest_batch
    assert rows is not None and 1 <= rows < 64
    assert estimate_memory(LLAMA_8B, **GPU, memory="80GB", batch_size=rows).fits
    assert not estimate_memory(LLAMA_8B, **GPU, memory="80GB", batch_size=rows + 1).fits


def test_no_micro_batch_fits_a_card_smaller_than_the_weights() -> None:
    assert estimate_memory(LLAMA_8B, **GPU, memory="8GB").largest_batch == 0


def test_knobs_name_what_saves_most_and_save_it() -> None:
    found = estimate_memory(LLAMA_8B, **GPU, memory="24GB", batch_size=8)
    assert 1 <= len(found.knobs) <= 3
    assert [k.saves_bytes for k in found.knobs] == sorted((k.saves_bytes for k in found.knobs), reverse=True)
    assert found.knobs[0].setting == "recompute input"
    turned = total(batch_size=8, recompute="full")
    assert found.total_bytes - turned == found.knobs[0].saves_bytes
    assert "saves" in str(found.knobs[0])


def test_nothing_is_said_about_fitting_without_a_device() -> None:
    found = estimate_memory(LLAMA_8B, **GPU)
    assert found.fits is None
    assert found.largest_batch is None


# What people get to see ----------------------------------------------------------------------------------------------


def test_an_estimate_reads_as_a_table_and_as_json() -> None:
    found = estimate_memory(LLAMA_8B, **GPU, memory="24GB", batch_size=2)
    text = str(found)
    for word in (*PARTS, "needed", "does not fit", "largest micro-batch", "to save:", "assumed:", "22.35 GiB"):
        assert word in text
    told = json.loads(json.dumps(found.to_json()))
    assert told["total_bytes"] == sum(told["parts"].values())
    assert told["fits"] is False
    assert told["plan"]["max_len"] == 2048
    assert gib(0) == "0"


def test_plan_speaks_the_language_of_the_training_settings() -> None:
    shared = {
        "task",
        "method",
        "r",
        "targets",
        "exclude",
        "modules_to_save",
        "layers",
        "dropout",
        "combine",
        "precision",
    }
    shared |= {"quant", "batch_size", "max_len", "recompute"}
    assert shared <= set(Plan.__dataclass_fields__) & set(KEYS)
    assert set(CHOICES["task"]) <= set(KEYS["task"].choices)  # `veneer check` says of the others that it cannot tell
    for name in (shared & set(CHOICES)) - {"task"}:
        assert set(KEYS[name].choices) - {"auto"} <= set(CHOICES[name]), name


def test_the_chunk_of_the_loss_is_the_one_that_training_uses() -> None:
    from veneer.tasks.cross_entropy import ROWS

    assert ROWS == CHUNK_ROWS


def test_auto_precision_follows_the_device() -> None:
    assert Plan(device="cuda").precision == "bf16"
    assert Plan(device="cpu").precision == "fp32"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "lara"}, "Did you mean 'lora'"),
        ({"quant": "nf5"}, "Did you mean 'nf4'"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number"),
        ({"max_len": -1}, "max_len=-1 must be"),
        ({"dropout": 1.0}, "dropout=1.0 must be"),
        ({"batchsize": 4}, "Did you mean 'batch_size'"),
        ({"task": "casual_lm"}, "Did you mean 'causal_lm'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        estimate_memory(LLAMA_8B, **settings)


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        estimate_memory(LLAMA_8B, r=0, batch_size=0, quant="x")
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("targets", [["q_prj"], ["q_proj", "v_prj"], r"model\.nothing"])
def test_targets_that_match_nothing_are_refused(targets: Any) -> None:
    with pytest.raises(TargetError, match="match none"):
        estimate_memory(LLAMA_8B, targets=targets)


@pytest.mark.parametrize(
    "targets", ["all-linear", "attention", "minimal", ["q_proj", "down_proj"], r".*\.mlp\.up_proj"]
)
def test_targets_adapt_what_attach_adapts(targets: Any) -> None:
    import torch
    import transformers

    from veneer.core.model import attach
    from veneer.core.spec import LoRA

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=99
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    done = attach(model, LoRA(rank=4, targets=targets, layers=(-2, -1)), init=False)
    found = estimate_memory(config, device="cpu", r=4, targets=targets, layers=2)
    assert found.trainable == done.trainable


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from veneer.advise.recommend import recommend; from veneer.advise.memory import estimate_memory;"
        "recommend('chat', '8B', memory='24GB', rows=500); estimate_memory('8B', memory='24GB');"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin"})


# Measured ------------------------------------------------------------------------------------------------------------


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("memory_benchmark", ROOT / "benchmarks" / "memory.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TINY = {"model_type": "llama", "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6,
        "num_key_value_heads": 3, "intermediate_size": 512, "vocab_size": 2048}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 4, "max_len": 96, "precision": "fp32"},
        {"batch_size": 4, "max_len": 96, "precision": "fp32", "recompute": "full"},
        {"batch_size": 2, "max_len": 64, "precision": "fp32", "method": "full"},
        {"batch_size": 4, "max_len": 96, "precision": "fp32", "method": "freeze"},
        {"batch_size": 2, "max_len": 96, "precision": "bf16", "r": 32},
        {"batch_size": 2, "max_len": 96, "precision": "fp32", "combine": "dora", "dropout": 0.1},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
def test_a_real_step_peaks_where_the_estimate_says(settings: dict[str, Any]) -> None:
    module = benchmark()
    case = module.Case("tiny", TINY, settings)
    measured = module.allocated_peak(lambda: module._steps(case, "cpu"))
    estimate = estimate_memory(TINY, device="cpu", **settings)
    assert estimate.total_bytes == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_figures_that_were_published_still_follow_from_the_formula(device: str) -> None:
    """The measured peaks are kept beside the benchmark; a change of the formula must still meet them."""
    cases = benchmark().CASES
    rows = json.loads((ROOT / "benchmarks" / "results" / f"memory_{device}.json").read_text())["rows"]
    assert len(rows) >= 6
    for row in rows:
        case = cases[row["name"]]
        told = estimate_memory(case.config, device=device, **case.settings).total_bytes
        assert told == pytest.approx(row["measured_bytes"], rel=0.1), row["name"]


def test_shapes_of_the_demo_model_are_its_own() -> None:
    smol = typical("SmolLM2-135M")
    assert smol.parameters == 134_515_008
    assert shapes_of("135M").parameters == smol.parameters
