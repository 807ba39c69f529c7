"""No setting is a word without a meaning: each one that is given is read, and each one changes what happens.

For every key there is a value here that is not its default. The run with it must differ from the same run without it:
in what it learns, how often it looks or saves, how much it computes, what it writes, or in being refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from train_runs import WORDS, Heard, figures

from veneer.errors import VeneerError
from veneer.tasks.causal_lm import CausalLM
from veneer.train.loop import train
from veneer.train.run import Run
from veneer.train.settings import KEYS


def chat(word: str, times: int) -> list[dict[str, str]]:
    turns = [[("user", f"say {word}"), ("assistant", f"{word} " * times)] for _ in range(1 + times % 2)]
    return [{"role": role, "content": text} for turn in turns for role, text in turn]


ROWS = [{"messages": chat(word, 1 + i % 4)} for i, word in enumerate(WORDS)]
RENAMED = [{"talk": row["messages"]} for row in ROWS]
WITH_A_BAD_ROW = [*ROWS, {"messages": "nothing"}]
COMMON = {"r": 2, "lr": 5e-3, "batch_size": 4, "val": 2, "steps": 3, "eval_every": 3}

# key -> (a value that is not the default, what else the two runs have in common, their rows)
CASES: dict[str, tuple[Any, dict[str, Any], list[dict[str, Any]]]] = {
    "task": ("token_classification", {}, ROWS),
    "method": ("full", {"r": 16}, ROWS),
    "r": (4, {"alpha": 4}, ROWS),
    "alpha": (32, {}, ROWS),
    "dropout": (0.3, {}, ROWS),
    "targets": (["q_proj", "v_proj"], {}, ROWS),
    "exclude": (["q_proj"], {}, ROWS),
    "modules_to_save": (["model.norm"], {}, ROWS),
    "token_rows": ([3, 4], {}, ROWS),
    "tied": ("together", {"targets": ["q_proj", "embed_tokens"]}, ROWS),
    "layers": (1, {}, ROWS),
    "delta": ("lora_fa", {}, ROWS),
    "options": ({"factor": 2}, {"delta": "lokr"}, ROWS),
    "combine": ("dora", {}, ROWS),
    "init": ("gaussian", {}, ROWS),
    "scaling": ("rslora", {}, ROWS),
    "overrides": ({"q_proj": {"rank": 1}}, {}, ROWS),
    "bias": ("lora_only", {}, ROWS),
    "quant": ("nf4", {}, ROWS),
    "quant_rows": (0, {"quant": "nf4"}, ROWS),
    "quant_rotate": ("off", {"quant": "fp8"}, ROWS),
    "val": (3, {}, ROWS),
    "columns": ({"messages": "talk"}, {}, RENAMED),
    "skip_bad": (True, {}, WITH_A_BAD_ROW),
    "max_len": (30, {"overlong": "truncate", "yes": True}, ROWS),
    "overlong": ("truncate", {"max_len": 40, "yes": True}, ROWS),
    "packing": ("on", {}, ROWS),
    "loss_on": ("last", {}, ROWS),
    "template": ("vicuna", {}, ROWS),
    "system": ("Be brief.", {}, ROWS),
    "lr": (1e-3, {}, ROWS),
    "optimizer": ("lora_fa", {"delta": "lora_fa"}, ROWS),
    "lora_plus_ratio": (8, {}, ROWS),
    "schedule": ("linear", {"steps": 5}, ROWS),
    "warmup": (2, {}, ROWS),
    "epochs": (1, {"steps": None}, ROWS),
    "steps": (2, {}, ROWS),
    "batch_size": (2, {"global_batch": 4, "batch_size": 4}, ROWS),
    "global_batch": (8, {}, ROWS),
    "weight_decay": (0.3, {}, ROWS),
    "clip": (1e-3, {}, ROWS),
    "eval_every": (1, {}, ROWS),
    "patience": (1, {"lr": 5.0, "steps": 6, "eval_every": 1, "warmup": 0}, ROWS),
    "seed": (1, {}, ROWS),
    "precision": ("bf16", {}, ROWS),
    "recompute": ("full", {"fuse": "off"}, ROWS),
    "fuse": ("on", {}, ROWS),
    "ema": (0.5, {}, ROWS),
    "save_every": (1, {}, ROWS),
    "out": ("elsewhere", {}, ROWS),
    "name": ("mine", {}, ROWS),
    "yes": (True, {"max_len": 40}, ROWS),
}
ELSEWHERE = {"model": "test_loop.py", "data": "test_tasks.py and below", "resume": "test_resume.py"}
ELSEWHERE |= {"augment": "test_images.py", "graphs": "test_fast.py"}
ELSEWHERE |= dict.fromkeys((name for name, key in KEYS.items() if key.group == "pictures"), "test_diffusion.py")


@pytest.fixture
def outcome(
    make_model: Callable[..., nn.Module], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """All that can be seen of a run, but for the clock and the echo of its settings; or how it was refused."""
    monkeypatch.chdir(tmp_path)

    def run(rows: Any, settings: dict[str, Any]) -> Any:
        model, heard, calls = make_model("qwen2"), Heard(), [0]
        unit = type(model.model.layers[1].mlp)  # its class, for what hangs on a module keeps a block from running fused
        own = unit.forward

        def counted(self: Any, x: Any) -> Any:
            calls[0] += 1
            return own(self, x)

        monkeypatch.setattr(unit, "forward", counted)
        try:
            made = train(model, rows, tokenizer=tiny_tokenizer, report=heard, **settings)
        except VeneerError as error:
            return type(error).__name__, error.what
        assert made.proof["passed"], settings
        files = sorted(path for path in made.last.iterdir() if path.name not in ("state.pt", "README.md", "proof.json"))
        events = [(event["event"], event.get("step")) for event in heard if event["event"] in ("save", "eval")]
        folder = "a name of its own" if settings.get("out") or settings.get("name") else "a name by rule"
        return figures(made), [path.read_bytes() for path in files], events, calls[0], folder

    return run


def test_every_key_has_a_case() -> None:
    assert {*CASES, *ELSEWHERE} == set(KEYS)
    for name, (value, _, _) in CASES.items():
        assert KEYS[name].read(value) != KEYS[name].default, name


@pytest.mark.parametrize("name", CASES)
def test_a_key_changes_what_happens(outcome: Callable[..., Any], name: str) -> None:
    value, common, rows = CASES[name]
    without = {key: inner for key, inner in {**COMMON, **common}.items() if inner is not None}
    assert outcome(rows, {**without, name: value}) != outcome(rows, without)


def test_a_run_without_a_difference_has_none(outcome: Callable[..., Any]) -> None:
    """The test above would be worthless if two equal runs differed."""
    assert outcome(ROWS, COMMON) == outcome(ROWS, COMMON)


def test_every_key_may_be_said_at_once_and_is_read(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A settings file with all keys in it: proof P0 holds that all of them were read."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    made = train(str(tiny_folder), str(data), **{**COMMON, "name": "first"})
    monkeypatch.setattr(CausalLM, "shown", lambda *_: [])
    from veneer.train.settings import resolve

    again = resolve(made.path("config.yaml"), flags={"name": "second"})
    assert {name for name, origin in again.origins.items() if origin.how == "default"} <= {"resume", "epochs"}
    second = train(resolved=again)
    figures_ = second.proof["checks"][0]["figures"]
    assert second.proof["checks"][0]["id"] == "P0" and not figures_["unread"] and len(figures_["given"]) > 35
    assert figures(second) == figures(made) and isinstance(second, Run)
