"""Recommendations start from the published table, cite every source, and never change their mind."""

from __future__ import annotations

import json
from typing import Any

import pytest

from veneer.advise.memory import estimate_memory
from veneer.advise.recommend import STANDS_FOR, TABLE, TASKS, recommend
from veneer.core.spec import LoRA
from veneer.errors import ConfigError
from veneer.train.settings import KEYS, resolve


def get_lora_config_by_task(task_type: str, model_size: str) -> dict[str, int]:
    """The published function, as published."""
    configs = {
        "classification": {
            "small": {"r": 8, "alpha": 16},
            "medium": {"r": 16, "alpha": 32},
            "large": {"r": 32, "alpha": 64},
        },
        "generation": {
            "small": {"r": 16, "alpha": 32},
            "medium": {"r": 32, "alpha": 64},
            "large": {"r": 64, "alpha": 128},
        },
        "complex_reasoning": {
            "small": {"r": 32, "alpha": 64},
            "medium": {"r": 64, "alpha": 128},
            "large": {"r": 128, "alpha": 256},
        },
    }
    return configs.get(task_type, {}).get(model_size, {"r": 16, "alpha": 32})


@pytest.mark.parametrize("size", ["small", "medium", "large"])
@pytest.mark.parametrize("task", ["classification", "generation", "complex_reasoning"])
def test_the_table_is_reproduced(task: str, size: str) -> None:
    assert TABLE[task][size] == get_lora_config_by_task(task, size)
    advice = recommend(task, size, device="cuda")
    assert {"r": advice["r"], "alpha": advice["alpha"]} == get_lora_config_by_task(task, size)
    assert "get_lora_config_by_task" in advice.settings["r"].source


@pytest.mark.parametrize(("word", "size"), STANDS_FOR.items())
def test_the_word_and_the_model_that_stands_for_it_agree(word: str, size: str) -> None:
    assert recommend("generation", size, device="cuda").size == word


QUESTIONS: list[dict[str, Any]] = [
    {"task": task, "model": model, "rows": rows, "memory": memory, "device": device}
    for task in ("classification", "chat", "math", "ner", "summarization")
    for model in ("22M", "135M", "8B", "70B")
    for rows in (None, 40, 2431, 200_000)
    for memory, device in ((None, "cuda"), ("24GB", "cuda"), ("8GB", "cpu"))
]


@pytest.mark.parametrize("question", QUESTIONS[::7], ids=lambda q: "-".join(str(v) for v in q.values()))
def test_every_answer_has_reasons_sources_and_values_that_training_takes(question: dict[str, Any]) -> None:
    advice = recommend(**question)
    assert advice.to_json() == recommend(**question).to_json()  # the same question, the same answer
    for name, setting in advice.settings.items():
        assert setting.reason and setting.source, name
        assert name in KEYS or name == "layer_names"
    json.dumps(advice.to_json())
    settings = resolve(mapping={**advice.values(), "model": "m", "data": "d"}).settings
    assert settings.lr == advice["lr"]
    if advice["method"] == "lora":
        LoRA(rank=settings.r, alpha=settings.alpha, targets=settings.targets, dropout=settings.dropout)
    assert advice["global_batch"] >= advice["batch_size"] >= 1
    text = str(advice)
    assert advice.command() in text and text.count("[") >= len(advice.settings)
    for name, value, reason, source in advice.table():
        assert name in text and value in text and reason in text and source in text


def test_what_is_recommended_for_a_device_fits_it() -> None:
    for size, memory in (("8B", "24GB"), ("8B", "12GB"), ("1.2B", "24GB"), ("70B", "80GB"), ("135M", "4GB")):
        advice = recommend("generation", size, rows=5000, memory=memory, device="cuda")
        assert advice.memory is not None
        assert advice.memory.fits, (size, memory)
        own = {n: advice[n] for n in ("method", "r", "precision", "quant", "recompute", "batch_size")}
        assert estimate_memory(size, memory=memory, device="cuda", padded=True, **own).fits


def test_memory_is_bought_with_time_first_and_exactness_second() -> None:
    def way(memory: str) -> tuple[str, str]:
        advice = recommend("generation", "8B", rows=5000, memory=memory, device="cuda")
        return advice["recompute"], advice["quant"]

    assert way("141GB") == ("none", "none")
    assert way("24GB") == ("full", "none")
    assert way("12GB") == ("full", "nf4")


def test_what_fits_nowhere_says_so() -> None:
    advice = recommend("generation", "405B", rows=5000, memory="24GB", device="cuda")
    assert advice.memory is not None and advice.memory.fits is False
    assert "not one row" in advice.settings["batch_size"].reason
    assert advice.memory.knobs


def test_data_that_outgrow_the_table_raise_the_rank() -> None:
    small = recommend("classification", "8B", tokens=1_000_000, device="cuda")
    large = recommend("classification", "8B", tokens=200_000_000, device="cuda")
    assert small["r"] == 16
    assert large["r"] == 128  # 2.6 M parameters a rank, so 77 are needed
    assert large["alpha"] == 256
    assert "raised" in large.settings["r"].reason and "Tinker" in large.settings["r"].source
    assert large["lr"] < small["lr"]


def test_data_beyond_any_adapter_ask_for_full_fine_tuning() -> None:
    advice = recommend("generation", "135M", tokens=500_000_000, device="cuda", memory="80GB")
    assert advice["method"] == "full"
    assert advice.wrong_tool is not None and "500,000,000 trained tokens" in advice.wrong_tool
    cramped = recommend("generation", "70B", tokens=5_000_000_000, device="cuda", memory="80GB")
    assert (cramped["method"], cramped["r"]) == ("lora", 256)
    assert cramped.wrong_tool is not None and "where it fits" in cramped.wrong_tool


def test_small_models_are_trained_whole_and_the_warning_names_its_source() -> None:
    bert = {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
            "intermediate_size": 1536, "vocab_size": 30522}  # fmt: skip
    advice = recommend("sentiment", bert, rows=1000, device="cpu")
    assert advice["method"] == "full"
    assert advice.wrong_tool is not None
    for word in ("22.7 M", "2025-04-10", "last layers", "MiniLM"):
        assert word in advice.wrong_tool
    assert not {"r", "alpha", "targets", "quant"} & set(advice.settings)
    assert recommend("sentiment", bert, rows=1000, device="cpu", method="lora")["r"] == 8  # asking is enough


def test_tiny_data_are_warned_about() -> None:
    advice = recommend("chat", "135M", rows=40, device="cpu")
    assert advice.wrong_tool is not None
    for word in ("40 rows", "last layers", "2025-04-10", "SmolLM2"):
        assert word in advice.wrong_tool
    assert recommend("chat", "8B", rows=5000, device="cuda").wrong_tool is None


def test_freezing_names_its_layers() -> None:
    advice = recommend("chat", "135M", rows=5000, method="freeze", device="cpu")
    assert advice["layers"] == 2
    assert "last two blocks: 7.08 M" in advice.settings["layers"].reason
    assert "--method freeze" in advice.command()


def test_targets_are_named_as_the_architecture_names_them() -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 50257}
    assert recommend("chat", gpt2, device="cuda")["layer_names"] == ("c_attn", "c_proj", "c_fc")
    llama = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert recommend("chat", "8B", device="cuda")["layer_names"] == llama


def test_an_unknown_architecture_says_what_is_assumed() -> None:
    config = {"model_type": "brandnew", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
              "intermediate_size": 5632, "vocab_size": 32000}  # fmt: skip
    advice = recommend("chat", config, device="cuda")
    assert any("'brandnew' is not known" in note and "Llama-like" in note for note in advice.assumed)


def test_usual_names_of_tasks_are_understood() -> None:
    assert {recommend(name, "small", device="cuda").task for name in TASKS} == set(TABLE)
    assert recommend("Text Classification", "small", device="cuda").task == "classification"
    assert recommend("token-classification", "small", device="cuda")["task"] == "token_classification"
    assert {name for _, name in TASKS.values()} <= set(KEYS["task"].choices)


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({"task": "clasification"}, "Did you mean 'classification'"),
        ({"task": ""}, "Known: classification, generation"),
        ({"rows": 0}, "nothing to learn from nothing"),
        ({"tokens": -3}, "tokens=-3"),
        ({"max_len": 0}, "max_len=0"),
        ({"method": "lor"}, "Did you mean 'lora'"),
        ({"device": "tpu"}, "cpu, cuda"),
        ({"memory": "lots"}, "not an amount of memory"),
        ({"model": "no/such"}, "no config.json"),
    ],
)
def test_questions_without_an_answer_say_why(question: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recommend(**question)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        recommend("x", rows=0, tokens=0, method="y")
    assert len(caught.value.problems) == 4
