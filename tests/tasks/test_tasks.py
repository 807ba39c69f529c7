"""Every task, from rows to a proved adapter: what is loaded, what is trained, what is counted, what is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from veneer.ckpt.peft import load
from veneer.data.batch import batches, collate
from veneer.data.labels import LabelSet
from veneer.data.types import IGNORE, Encoded, Labelled, Pair, Tagged
from veneer.errors import ConfigError, ProofFailed, StateError
from veneer.tasks.base import TASKS, new_heads
from veneer.tasks.causal_lm import greedy
from veneer.tasks.seq2seq import Seq2Seq, shifted
from veneer.tasks.sequence_classification import SequenceClassification
from veneer.tasks.token_classification import TokenClassification
from veneer.train.loop import train
from veneer.train.run import Run

SMALL: dict[str, Any] = {"r": 4, "lr": 1e-2, "batch_size": 8, "val": 4, "steps": 12, "eval_every": 12}
GOOD, BAD = ("good", "fine", "fast", "new"), ("bad", "poor", "slow", "old")
LABELLED = [{"text": f"the {noun} is {word}", "label": "up" if word in GOOD else "down"}
            for noun in ("dog", "fox", "file", "folder") for word in GOOD + BAD]  # fmt: skip
TAGGED = [{"tokens": ["The", name, "runs", "over", place], "tags": ["O", "B-PER", "O", "O", "B-LOC"]}
          for name in ("quick", "brown", "lazy", "size") for place in ("files", "folders", "archives")]  # fmt: skip
PAIRS = [
    {"source": f"list {word}", "target": f"{word} files"} for word in ("all", "the", "quick", "brown", "lazy", "size")
]


@pytest.fixture
def trained(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., tuple[Run, list[dict[str, Any]]]]:
    def run(model: Any, rows: Any, **settings: Any) -> tuple[Run, list[dict[str, Any]]]:
        events: list[dict[str, Any]] = []
        folder = str(tmp_path / f"run{len(list(tmp_path.iterdir()))}")
        made = train(model, rows, tokenizer=tiny_tokenizer, report=events.append, out=folder, **{**SMALL, **settings})
        return made, events

    return run


def evaluations(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "eval"]


# ---------------------------------------------------------------- sequence classification


def test_sentences_are_sorted_into_classes(trained: Callable[..., Any], make_model: Callable[..., nn.Module]) -> None:
    model = make_model("bert", num_labels=2)
    run, events = trained(model, LABELLED, task="classification", steps=60, eval_every=20)
    first, *_, last = evaluations(events)
    assert last["val_loss"] < first["val_loss"] and {"accuracy", "macro_f1"} <= set(last) and last["accuracy"] > 0.7
    assert run.proof["passed"]
    assert json.loads((run.adapter / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    told = json.loads((run.adapter / "task.json").read_text())
    assert told == {"task": "sequence_classification", "labels": ["down", "up"], "kind": "one"}
    samples = json.loads(run.path("samples", "samples.json").read_text())
    assert samples[0]["expected"] in ("up", "down") and samples[0]["after"] in ("up", "down")


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_new_head_is_made_from_a_folder_and_comes_back_with_the_adapter(
    trained: Callable[..., Any], make_model: Callable[..., nn.Module], tiny_tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    """The base has no such head: it is made anew at each load, and the adapter's file brings the trained one."""
    folder = tmp_path / "base"
    body = make_model(kind, "causal" if kind == "llama" else "sequence", tie_word_embeddings=False)
    (body.bert if kind == "bert" else body).save_pretrained(folder)  # type: ignore[union-attr]
    tiny_tokenizer.save_pretrained(folder)
    run, events = trained(str(folder), LABELLED, task="sequence_classification")
    assert run.proof["passed"] and "2 classes: down, up" in [event.get("text") for event in events]
    again = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    load(again, run.adapter)
    task = SequenceClassification(tiny_tokenizer, LabelSet("one", ("down", "up")))
    rows = task.encode([Labelled(row["text"], row["label"]) for row in LABELLED]).samples
    held_out = [row for row in rows if row.id in run.data["split"]["validation_ids"]]
    found = task.evaluate(again, batches(held_out, 8, tiny_tokenizer.pad_token_id))
    assert len(held_out) >= 4 and found["val_loss"] == pytest.approx(run.result["val_after"], rel=1e-4)


def test_a_part_that_no_file_holds_is_not_trained_upon_in_silence(
    trained: Callable[..., Any], make_model: Callable[..., nn.Module], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """A BERT that was saved without its pooler: each load would draw another one under the same adapter."""
    make_model("bert", "token").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ProofFailed, match=r"pooler\.dense\.weight is in none of the files") as error:
        trained(str(tmp_path), LABELLED, task="sequence_classification")
    assert error.value.fix is not None and error.value.fix.endswith("modules_to_save: [bert.pooler.dense]")
    run, _ = trained(
        str(tmp_path), LABELLED, task="sequence_classification", modules_to_save=["bert.pooler.dense"], steps=2
    )
    assert run.proof["passed"]


def test_numbers_and_several_labels(trained: Callable[..., Any], make_model: Callable[..., nn.Module]) -> None:
    numbers = [{"text": row["text"], "label": 0.5 + (row["label"] == "up")} for row in LABELLED]
    run, events = trained(make_model("bert", num_labels=1), numbers, task="sequence_classification")
    assert {"mse", "spearman"} <= set(evaluations(events)[-1]) and run.proof["passed"]
    several = [
        {"text": row["text"], "label": [row["label"], "dog"] if "dog" in row["text"] else [row["label"]]}
        for row in LABELLED
    ]
    run, events = trained(make_model("bert", num_labels=3), several, task="sequence_classification")
    assert {"accuracy", "macro_f1"} <= set(evaluations(events)[-1]) and run.proof["passed"]


def test_losses_are_those_of_transformers(make_model: Callable[..., nn.Module]) -> None:
    ids = torch.randint(7, 384, (4, 9))
    wanted: dict[str, tuple[int, Tensor]] = {
        "one": (3, torch.tensor([0, 2, 1, 1])),
        "several": (3, torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])),
        "number": (1, torch.tensor([0.5, 2.0, -1.0, 0.0])),
    }
    for kind, (classes, labels) in wanted.items():
        task = SequenceClassification(None, LabelSet(kind, ("a", "b", "c")))  # type: ignore[arg-type]
        model = make_model("bert", num_labels=classes, problem_type=task.model_options()["problem_type"])
        values = [[label] if labels.ndim == 1 else label for label in labels.tolist()]
        rows = [Encoded(row, value, "row") for row, value in zip(ids.tolist(), values, strict=True)]
        theirs = model(input_ids=ids, labels=labels).loss.detach()
        assert float(task.loss(model, collate(rows)).detach() / 4) == pytest.approx(float(theirs), rel=1e-5), kind


def test_a_head_of_another_size_is_refused(trained: Callable[..., Any], make_model: Callable[..., nn.Module]) -> None:
    with pytest.raises(ConfigError, match="head has 2 outputs, the data 3 classes"):
        rows = [{"text": row["text"], "label": i % 3} for i, row in enumerate(LABELLED)]
        trained(make_model("bert", num_labels=2), rows, task="sequence_classification")


@pytest.mark.parametrize("method,extra", [("full", {}), ("freeze", {"layers": 1})])
def test_baselines_train_the_head_too(
    trained: Callable[..., Any], make_model: Callable[..., nn.Module], method: str, extra: dict[str, Any]
) -> None:
    model = make_model("bert", num_labels=2)
    before = model.classifier.weight.clone()
    run, _ = trained(model, LABELLED, task="sequence_classification", method=method, **extra, r=16)
    assert not torch.equal(model.classifier.weight, before) and run.proof["passed"]


# ---------------------------------------------------------------- token classification


def test_words_are_tagged(trained: Callable[..., Any], make_model: Callable[..., nn.Module]) -> None:
    run, events = trained(make_model("bert", "token", num_labels=3), TAGGED, task="ner", steps=40, eval_every=40)
    first, last = evaluations(events)
    assert {"accuracy", "entity_precision", "entity_recall", "entity_f1"} <= set(last)
    assert last["val_loss"] < first["val_loss"] and last["entity_f1"] > first["entity_f1"] and run.proof["passed"]
    assert json.loads((run.adapter / "task.json").read_text())["labels"] == ["O", "B-LOC", "B-PER"]


def test_a_word_has_one_label_whatever_its_pieces(tiny_tokenizer: Any) -> None:
    task = TokenClassification(tiny_tokenizer, LabelSet("one", ("O", "B-PER")))
    (row,) = task.encode([Tagged(("unutterably", "quick"), ("B-PER", "O"))]).samples
    assert len(row) > 4 and [label for label in row.labels if label != IGNORE] == [1, 0]


def test_metrics_of_tags_that_mark_no_entities() -> None:
    task = TokenClassification(None, LabelSet("one", ("NOUN", "VERB")))
    assert task.metrics([[0, 1]], [[0, 0]]) == {"accuracy": 0.5}


# ---------------------------------------------------------------- seq2seq


def test_text_from_text(trained: Callable[..., Any], make_model: Callable[..., nn.Module]) -> None:
    run, events = trained(make_model("t5"), PAIRS, task="seq2seq", val=2)
    first, last = evaluations(events)
    assert last["val_loss"] < first["val_loss"] and {"exact_match", "rouge_l"} <= set(last) and run.proof["passed"]
    samples = json.loads(run.path("samples", "samples.json").read_text())
    assert samples[0]["prompt"].startswith("list ") and samples[0]["expected"].endswith("files")


def test_its_loss_is_that_of_transformers(make_model: Callable[..., nn.Module], tiny_tokenizer: Any) -> None:
    model, task = make_model("t5"), Seq2Seq(tiny_tokenizer)
    rows = task.encode([Pair(row["source"], row["target"]) for row in PAIRS]).samples
    batch = collate(rows, tiny_tokenizer.pad_token_id)
    theirs = model(**batch.inputs, labels=batch.labels).loss.detach()
    assert float(task.loss(model, batch).detach() / batch.trained_tokens) == pytest.approx(float(theirs), rel=1e-5)


def test_a_decoder_is_no_encoder_decoder(make_model: Callable[..., nn.Module]) -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM is no encoder-decoder"):
        shifted(make_model("llama"), torch.ones(1, 2, dtype=torch.long))


# ---------------------------------------------------------------- what all share


def test_tasks_know_their_rows_and_classes() -> None:
    for name, kind in TASKS.items():
        assert kind.name == name and kind.kinds
        assert kind.paints or kind.auto_class.startswith("AutoModelFor")
    with pytest.raises(ConfigError, match="Did you mean 'seq2seq'"):
        TASKS["seq2sec"]
    with pytest.raises(StateError, match="needs the classes"):
        SequenceClassification(None).encode([])


def test_heads_that_nobody_names() -> None:
    with pytest.raises(ConfigError, match="does not say which of its modules is the head"):
        new_heads(nn.Linear(2, 2))


def test_greedy_answers_are_those_of_generate(make_model: Callable[..., nn.Module]) -> None:
    for kind in ("llama", "gpt2"):
        model = make_model(kind)
        prompt = [9, 30, 200, 17]
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert greedy(model, prompt, (), 8) == theirs[0, 4:].tolist()
        assert greedy(model, prompt, (int(theirs[0, 4]),), 8) == []
