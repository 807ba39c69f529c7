"""train, check, eval and demo through the command line, on a tiny model: a run from the first word to the last."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from veneer.app.demo import SETTINGS
from veneer.train.run import Run

QUICK = ("--steps", 6, "--batch-size", 2, "--lr", "1e-2", "--r", 2)


@pytest.fixture
def data(own_folder: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
        for i in range(24)
    ]
    path = own_folder / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


# ---------------------------------------------------------------- train


def test_a_run_from_the_command_line(veneer: Callable[..., Any], tiny_folder: Path, data: Path) -> None:
    said = veneer("train", tiny_folder, data, "--name", "a", *QUICK)
    assert said.code == 0, said.err
    for words in (
        "data     ",
        "mask",
        "plan     6 steps",
        "memory   ",
        "step 6/6",
        "proof    ",
        "saved runs/a",
        "val ",
    ):
        assert words in said.out, words
    assert "\x1b" not in said.out and "Loading weights" not in said.err and "display failed" not in said.err
    assert Path("runs/a/report.html").exists() and Run("runs/a").status == "done"
    assert "next:  veneer chat runs/a --vs base" in said.out
    said = veneer("export", "a", "--to", "kohya", "--out", "a.safetensors")
    assert said.code == 2 and "trained for causal_lm" in said.err and "runs/a/adapter is a folder in PEFT's" in said.err


def test_json_lines_and_nothing_else(veneer: Callable[..., Any], tiny_folder: Path, data: Path) -> None:
    lines = veneer("train", tiny_folder, data, "--name", "a", *QUICK, "--json").lines
    kinds = [line.get("event") for line in lines]
    assert kinds[0] == "start" and kinds.count("step") == 6 and "proof" in kinds and kinds[-2] == "done"
    assert lines[-1]["ok"] is True and lines[-1]["run"] == "runs/a" and lines[-1]["result"]["steps"] == 6


def test_a_display_that_fails_does_not_end_the_run(
    veneer: Callable[..., Any], tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.app import progress

    def fails(self: Any, event: Any) -> None:
        if event["event"] == "step":
            raise OSError("the terminal has gone")

    monkeypatch.setattr(progress.Plain, "__call__", fails)
    said = veneer("train", tiny_folder, data, "--name", "a", *QUICK)
    assert said.code == 0 and Run("runs/a").status == "done"
    assert said.err.count("the display failed (OSError: the terminal has gone); the run goes on without it") == 1


def test_foreign_names_are_understood_with_a_notice(veneer: Callable[..., Any], tiny_folder: Path, data: Path) -> None:
    Path("c.yaml").write_text(
        f"base_model: {tiny_folder}\ndataset: {data}\nlora_r: 2\nmax_steps: 2\nlearning_rate: 1e-3\nlogging_steps: 1\n"
    )
    said = veneer("train", "c.yaml", "--name", "a", "micro_batch_size=2")
    assert said.code == 0, said.err
    assert "'lora_r' is called 'r' here" in said.out and "'logging_steps' is not needed" in said.out
    assert "lr: 0.001  # file: c.yaml:5" in Path("runs/a/config.yaml").read_text()


def test_a_stopped_run_says_how_to_go_on_and_does(
    veneer: Callable[..., Any], tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.app import progress

    original = progress.Plain.__call__
    monkeypatch.setattr(
        progress.Plain,
        "__call__",
        lambda self, event: original(self, event) or ("stop" if event.get("step") == 3 else None),
    )
    said = veneer("train", tiny_folder, data, "--name", "a", *QUICK)
    assert said.code == 130 and "stopped runs/a   next:  veneer train --resume runs/a" in said.out
    monkeypatch.setattr(progress.Plain, "__call__", original)
    again = veneer("train", "--resume")
    assert again.code == 0 and "going on after step 3 of 6" in again.out and Run("runs/a").status == "done"
    assert veneer("train", "--resume", "a").code == 2


@pytest.mark.parametrize(
    "words, code, says",
    [
        (["MODEL"], 2, "no data was named"),
        ([], 2, "no model and no data was named"),
        (["MODEL", "none.jsonl"], 2, "none.jsonl"),
        (["nowhere/model", "DATA"], 2, "nowhere/model"),
        (["MODEL", "DATA", "--targets", "q_prj"], 2, "q_proj"),
        (["MODEL", "DATA", "--max-len", "8"], 2, "max_len"),
        (["--resume", "nothing"], 2, "no run at 'nothing'"),
    ],
)
def test_what_goes_wrong_before_a_run(
    words: list[str], code: int, says: str, veneer: Callable[..., Any], tiny_folder: Path, data: Path
) -> None:
    known = {"MODEL": tiny_folder, "DATA": data}
    said = veneer("train", *(known.get(word, word) for word in words))
    assert said.code == code and says in said.err and "Traceback" not in said.err
    assert said.err.splitlines()[-1].startswith("  do: ") or "  - " in said.err


def test_bad_rows_are_told_all_at_once(veneer: Callable[..., Any], tiny_folder: Path) -> None:
    Path("bad.jsonl").write_text(
        '{"prompt": "a", "completion": 3}\n{"prompt": "a"\n{"prompt": "a", "completion": "b"}\n'
    )
    said = veneer("train", tiny_folder, "bad.jsonl")
    assert said.code == 2 and "bad.jsonl:1" in said.err and "bad.jsonl:2" in said.err
    answer = veneer("train", tiny_folder, "bad.jsonl", "--json").lines[-1]
    assert answer["exit"] == 2 and len(answer["error"]["problems"]) == 2


def test_a_failed_run_has_its_report_and_its_traceback(
    veneer: Callable[..., Any], tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.train.loop.Loop.step", lambda self: 1 / 0)
    said = veneer("train", tiny_folder, data, "--name", "a", *QUICK)
    assert said.code == 1 and "ZeroDivisionError: division by zero" in said.err
    assert "the traceback is in runs/a/run.log" in said.err
    assert "Traceback" in Path("runs/a/run.log").read_text() and Path("runs/a/report.html").exists()
    assert "failed" in veneer("runs").out


# ---------------------------------------------------------------- check


def test_check_shows_the_mask_memory_and_plan_and_writes_nothing(
    veneer: Callable[..., Any], tiny_folder: Path, data: Path
) -> None:
    said = veneer("check", tiny_folder, data, "--r", 4)
    assert said.code == 0, said.err
    assert f"next:  veneer train {tiny_folder} {data} --r 4" in said.out
    told = ("lengths", "memory   needs", "a single row could have", "lr ", "ready")
    for words in ("<|im_start|>assistant", "[it is ", "<|im_end|>]", *told):
        assert words in said.out, words
    assert not Path("runs").exists()
    assert veneer("train", tiny_folder, data, "--dry-run").code == 0 and not Path("runs").exists()


def test_check_for_a_program(veneer: Callable[..., Any], tiny_folder: Path, data: Path) -> None:
    said = veneer("check", tiny_folder, data, "--lora_r", 4, "--json").json
    assert said["fits"] is True and said["rows"] == 23 and said["val_rows"] == 1 and 0 < said["trained_share"] < 1
    assert any(run["is_trained"] and run["text"].endswith("<|im_end|>") for run in said["mask"])
    assert (
        said["memory"]["needed_bytes"] > 0 and said["time"]["seconds"] > 0 and said["settings"]["r"] == "flag: --lora-r"
    )


def test_check_exits_3_when_it_would_not_fit(
    veneer: Callable[..., Any], tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.app.preflight.free_memory", lambda device: 10**6)
    said = veneer("check", tiny_folder, data)
    assert said.code == 3 and "this needs" in said.err and "saves" in said.err


def test_check_exits_2_for_what_cannot_be_trained(
    veneer: Callable[..., Any], tiny_folder: Path, data: Path, tokenizer_without_turn_end: Any
) -> None:
    tokenizer_without_turn_end.save_pretrained(tiny_folder)
    said = veneer("check", tiny_folder, data)
    assert said.code == 2 and "never learn to stop" in said.err


# ---------------------------------------------------------------- eval


@pytest.fixture
def run(veneer: Callable[..., Any], tiny_folder: Path, data: Path) -> Run:
    assert veneer("train", tiny_folder, data, "--name", "a", *QUICK, "--val", 4).code == 0
    return Run("runs/a")


def test_eval_measures_what_the_run_measured(run: Run, veneer: Callable[..., Any]) -> None:
    said = veneer("eval", "a", "--json").json
    assert said["samples"] == 4 and "4 held-out rows of a" in said["data"]
    assert said["metrics"]["before"]["loss"] == pytest.approx(run.result["val_before"], rel=1e-4)
    assert said["metrics"]["after"]["loss"] == pytest.approx(run.result["val_after"], rel=1e-4)
    assert {"exact_match", "rouge_l"} <= said["metrics"]["after"].keys() and len(said["rows"]) == 4
    text = veneer("eval", "last", "--show", 1).out
    assert "before" in text and "after" in text and "wanted" in text


def test_eval_on_other_rows_with_patterns_and_choices(run: Run, veneer: Callable[..., Any], own_folder: Path) -> None:
    rows = [{"prompt": f"is {i} even?", "completion": "yes" if i % 2 == 0 else "no"} for i in range(6)]
    (own_folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = veneer("eval", "a", "t.jsonl", "--choices", "yes,no", "--regex", ".", "--answer", 2, "--json").json
    assert said["answered"] == 2 and 0 <= said["metrics"]["after"]["choice_accuracy"] <= 1
    assert said["metrics"]["after"]["matches"] in (0, 0.5, 1)
    assert "wanted answers are not among the choices: 'no'" in veneer("eval", "a", "t.jsonl", "--choices", "yes").err
    assert "not a regular expression" in veneer("eval", "a", "t.jsonl", "--regex", "(").err
    (own_folder / "rows").mkdir()
    (own_folder / "t.jsonl").rename(own_folder / "rows" / "t.jsonl")
    assert veneer("eval", "a", "rows", "--answer", 0, "--json").json["samples"] == 6  # no part is named: all of it


def test_eval_notices_that_the_held_out_rows_are_gone(run: Run, veneer: Callable[..., Any], data: Path) -> None:
    data.write_text(data.read_text().replace("it is", "it was"))
    said = veneer("eval", "a")
    assert said.code == 2 and "4 of 4 held-out rows are no longer in the data" in said.err


def test_eval_of_a_base_needs_data(veneer: Callable[..., Any], tiny_folder: Path, data: Path) -> None:
    assert "no data was named" in veneer("eval", tiny_folder).err
    said = veneer("eval", tiny_folder, data, "--answer", 0, "--limit", 3, "--json").json
    assert list(said["metrics"]) == ["after"] and said["samples"] == 3 and said["rows"] == []


def test_a_classifier_is_judged_and_not_chatted_with(
    veneer: Callable[..., Any], own_folder: Path, make_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    base = own_folder / "bert"
    make_model("bert").save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    rows = [
        {"text": f"{word} {i}", "label": label} for i in range(12) for word, label in (("good", "up"), ("bad", "down"))
    ]
    (own_folder / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("train", base, "l.jsonl", "--task", "classification", "--name", "c", "--val", 4, *QUICK)
    said = veneer(*words)
    assert said.code == 0 and "next:  veneer eval runs/c" in said.out, said.err
    judged = veneer("eval", "c", "--json").json["metrics"]
    assert list(judged) == ["after"] and {"loss", "accuracy", "macro_f1"} == judged["after"].keys()
    assert judged["after"]["loss"] == pytest.approx(Run("runs/c").result["val_after"], rel=1e-4)
    refused = veneer("chat", "c", "-p", "x")
    assert refused.code == 2 and "it has no answers" in refused.err


@pytest.mark.parametrize(
    "kind, head, task, row, metric",
    [
        ("t5", None, "seq2seq", {"source": "say {i}", "target": "it is {i}"}, "rouge_l"),
        ("bert", "token", "ner", {"tokens": ["in", "Rome", "{i}"], "tags": ["O", "B-LOC", "O"]}, "entity_f1"),
    ],
)
def test_other_tasks_from_the_command_line(
    kind: str, head: str | None, task: str, row: dict[str, Any], metric: str,
    veneer: Callable[..., Any], own_folder: Path, make_model: Callable[..., Any], tiny_tokenizer: Any,
) -> None:  # fmt: skip
    make_model(kind, head).save_pretrained(own_folder / kind)
    tiny_tokenizer.save_pretrained(own_folder / kind)
    rows = [json.dumps(row).replace("{i}", str(i)) for i in range(16)]
    (own_folder / "t.jsonl").write_text("\n".join(rows))
    said = veneer("train", kind, "t.jsonl", "--task", task, "--name", "t", "--val", 4, *QUICK)
    assert said.code == 0, said.err
    judged = veneer("eval", "t", "--json").json
    assert metric in judged["metrics"]["after"]
    assert judged["metrics"]["after"]["loss"] == pytest.approx(Run("runs/t").result["val_after"], rel=1e-4)
    chat = veneer("chat", "t", "--vs", "base", "-p", "say 3", "--max-tokens", 4)
    assert chat.code == (0 if task == "seq2seq" else 2)


def test_prompt_completion_runs_are_asked_as_they_were_trained(
    veneer: Callable[..., Any], tiny_folder: Path, own_folder: Path
) -> None:
    (own_folder / "p.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"say {i} ", "completion": "x"}) for i in range(8))
    )
    assert veneer("train", tiny_folder, "p.jsonl", "--name", "p", *QUICK).code == 0
    tokens = veneer("chat", "p", "-p", "say 3 ", "--max-tokens", 2, "--json").json["answers"][0]["prompt_tokens"]
    chat = veneer("chat", "runs/p/adapter", "-p", "say 3 ", "--max-tokens", 2, "--json").json["answers"][0]
    assert tokens < chat["prompt_tokens"]  # an adapter's folder alone does not know; --plain says it
    plain = veneer("chat", "runs/p/adapter", "--plain", "-p", "say 3 ", "--max-tokens", 2, "--json").json["answers"][0]
    assert plain["prompt_tokens"] == tokens


# ---------------------------------------------------------------- full fine-tuning, demo


def test_a_model_trained_whole_is_a_run_like_any_other(
    veneer: Callable[..., Any], tiny_folder: Path, data: Path
) -> None:
    words = (
        "train",
        tiny_folder,
        data,
        "--method",
        "full",
        "--name",
        "f",
        "--steps",
        3,
        "--batch-size",
        2,
        "--lr",
        "1e-3",
    )
    assert veneer(*words).code == 0
    assert veneer("chat", "f", "-p", "hello", "--max-tokens", 3).code == 0
    assert list(veneer("eval", "f", "--json").json["metrics"]) == ["after"]


def test_the_demo_is_a_run_with_its_own_settings(
    veneer: Callable[..., Any], tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.assets.model_folder", lambda name, say: tiny_folder)
    monkeypatch.setattr("veneer.assets.data_file", lambda name, split, say: data)
    said = veneer("demo", "--steps", 2, "--r", 2)
    assert said.code == 0 and "saved runs/demo" in said.out and "proofs hold" in said.out and "wanted" in said.out
    assert veneer("demo", "--steps", 2, "--quiet").code == 0 and Path("runs/demo-2/report.html").exists()
    settings = Run("runs/demo").config().settings
    assert (settings.steps, settings.r, settings.lr, settings.alpha) == (2, 2, SETTINGS["lr"], 32)


def test_pictures_from_the_command_line(veneer: Callable[..., Any], own_folder: Path) -> None:
    """checked, trained, judged; and there is nobody to chat with."""
    image = pytest.importorskip("PIL.Image")
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(own_folder / "vit")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (own_folder / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    for shade, label in ((60, "night"), (200, "day")):
        (own_folder / "pictures" / label).mkdir(parents=True)
        for i in range(12):
            image.new("RGB", (32, 32), (shade + i, shade, shade)).save(own_folder / "pictures" / label / f"{i}.png")
    checked = veneer("check", "vit", "pictures", "--task", "image", "--json")
    assert checked.code == 0 and checked.json["fits"], checked.err
    flags = ("--steps", 8, "--batch-size", 4, "--lr", 1e-2, "--val", 8, "--name", "seen")
    said = veneer("train", "vit", "pictures", "--task", "image", *flags)
    assert said.code == 0 and "proofs hold" in said.out, said.err
    judged = veneer("eval", "seen", "--json").json["metrics"]["after"]
    assert judged["accuracy"] == 1 and judged["loss"] == pytest.approx(Run("runs/seen").result["val_after"], rel=1e-4)
    refused = veneer("chat", "seen", "-p", "hi")
    assert refused.code == 2 and "has no answers" in refused.err
