"""HF's Trainer on adapted models: adapter-only checkpoints, resume without a seam, the best model is the best."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch.utils.data import Dataset

import veneer
from veneer.errors import CheckpointError, ConfigError, StateError
from veneer.peft import LoraConfig, PeftModel, get_peft_model
from veneer.train import hf

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")  # the Trainer's own remarks


class Rows(Dataset):  # type: ignore[type-arg]
    """The same few sentences of tokens every time."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randint(7, 380, (count, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "attention_mask": torch.ones(8, dtype=torch.long), "labels": self.rows[i]}


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """Seed 003's, in transformers 5's words and in small."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0.1,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_total_limit": None,
        "remove_unused_columns": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
        **changes,
    }


def fresh(make_model: Callable[..., Any], **config: Any) -> Any:
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], **config}
    return get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM", **settings))


def trainer(model: Any, folder: Path, kind: Any = transformers.Trainer, **changes: Any) -> Any:
    args = transformers.TrainingArguments(**arguments(folder, **changes))
    return kind(model=model, args=args, train_dataset=Rows(8), eval_dataset=Rows(4, seed=9))


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def state(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if ".lora." in k}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_checkpoint_holds_the_adapter_alone(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = fresh(make_model)
    base = {k: v.clone() for k, v in model.state_dict().items() if ".lora." not in k}
    trainer(model, tmp_path, max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "adapter_config.json").is_file()
    assert not (checkpoint / "config.json").exists()  # so nobody takes it for a whole model
    held: dict[str, set[str]] = {}
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            held[file.name] = set(opened.keys())
    assert held.keys() == {"adapter_model.safetensors", "model.safetensors"}
    assert all(".lora_A." in key or ".lora_B." in key for key in held["adapter_model.safetensors"])
    assert all(".lora.default." in key for key in held["model.safetensors"])  # the live state, to resume from
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert weights < 0.2 * sum(v.numel() * v.element_size() for v in base.values())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
    assert not torch.equal(PeftModel.from_pretrained(make_model("llama"), checkpoint)(torch.arange(9)[None]).logits,
                           make_model("llama")(torch.arange(9)[None]).logits)  # fmt: skip


VARIANTS = {
    "lora": {},
    "pissa": {"init_lora_weights": "pissa", "lora_dropout": 0.0},
    "dora": {"use_dora": True},
    "whole head": {"modules_to_save": ["lm_head"], "use_rslora": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_is_uninterrupted(make_model: Callable[..., Any], tmp_path: Path, variant: str) -> None:
    whole = trainer(fresh(make_model, **VARIANTS[variant]), tmp_path / "whole")
    whole.train()
    assert whole.state.global_step == 6
    torch.manual_seed(99)  # another start: what is resumed must come from the checkpoint
    again = trainer(fresh(make_model, **VARIANTS[variant]), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert same(state(again.model), state(whole.model))
    assert losses(again) == losses(whole)


def test_resume_finds_the_last_checkpoint_itself(make_model: Callable[..., Any], tmp_path: Path) -> None:
    first = trainer(fresh(make_model), tmp_path)
    first.train()
    for file in (tmp_path / "checkpoint-6").iterdir():
        file.unlink()
    (tmp_path / "checkpoint-6").rmdir()
    again = trainer(fresh(make_model), tmp_path)
    again.train(resume_from_checkpoint=True)
    assert same(state(again.model), state(first.model))


def test_the_best_model_is_the_best(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = fresh(make_model, lora_dropout=0.0)
    run = trainer(model, tmp_path, learning_rate=0.5, load_best_model_at_end=True, metric_for_best_model="eval_loss",
                  greater_is_better=False, num_train_epochs=4)  # fmt: skip
    run.train()
    evaluated = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    best = min(evaluated, key=evaluated.__getitem__)
    assert best != max(evaluated), "the run should end worse than its best step, else this shows nothing"
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluated[best], abs=1e-6)
    saved = PeftModel.from_pretrained(make_model("llama"), run.state.best_model_checkpoint)
    tokens = torch.arange(9)[None]
    assert torch.allclose(saved(tokens).logits, model.eval()(tokens).logits, atol=1e-6)


def test_resuming_another_run_is_an_error(make_model: Callable[..., Any], tmp_path: Path) -> None:
    trainer(fresh(make_model), tmp_path, max_steps=2).train()
    other = trainer(fresh(make_model, target_modules=["k_proj"]), tmp_path)
    with pytest.raises(CheckpointError, match="other adapters than the model has") as caught:
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert any("k_proj" in problem for problem in caught.value.problems)


def test_two_adapters_one_trained(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = fresh(make_model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj"]))
    model.set_adapter("second")
    before = state(model)
    trainer(model, tmp_path, max_steps=4).train()  # the first has no rate yet, the second moves B alone
    after = state(model)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if ".second." in key}
    assert (tmp_path / "checkpoint-2" / "second" / "adapter_model.safetensors").is_file()
    again = fresh(make_model)
    again.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj"]))
    again.set_adapter("second")
    trainer(again, tmp_path / "again", max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same({k: v for k, v in state(again).items() if ".second." in k},
                {k: v for k, v in after.items() if ".second." in k})  # fmt: skip


def test_a_model_from_attach(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """veneer.attach, then our Trainer: the same laws; the class is PEFT's on top of the model's own."""

    def run(folder: Path, resume: str | None = None) -> Any:
        model = make_model("llama")
        torch.manual_seed(3)
        veneer.attach(model, veneer.LoRA(rank=4, targets=["q_proj", "v_proj"], dropout=0.1))
        made = trainer(model, folder, kind=hf.Trainer, load_best_model_at_end=True)
        assert made.model is model and isinstance(model, PeftModel)
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run(tmp_path / "whole")
    again = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"))
    assert same(state(again.model), state(whole.model))
    config = json.loads((tmp_path / "whole" / "checkpoint-2" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 32


def test_seed_003s_arguments_in_the_words_of_transformers_4(
    make_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    words = arguments(tmp_path, max_steps=2)
    words["evaluation_strategy"] = words.pop("eval_strategy")
    words["warmup_ratio"] = words.pop("warmup_steps")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        args = hf.TrainingArguments(**words)
    told = [str(w.message) for w in seen]
    assert any("evaluation_strategy is called eval_strategy" in line for line in told)
    assert any("warmup_ratio is called warmup_steps" in line for line in told)
    assert args.eval_strategy == "steps" and args.get_warmup_steps(100) == 10
    run = hf.Trainer(
        model=fresh(make_model), args=args, train_dataset=Rows(8), eval_dataset=Rows(4), tokenizer=tiny_tokenizer
    )
    run.train()
    assert (tmp_path / "checkpoint-2" / "tokenizer.json").is_file()
    with pytest.raises(ConfigError, match="both are given"):
        hf.TrainingArguments(str(tmp_path), evaluation_strategy="steps", eval_strategy="steps")


def test_an_adapter_that_is_not_reached_stops_the_run(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = fresh(make_model)
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = lambda x: x @ layer._parameters["weight"].T  # type: ignore[method-assign]
    with pytest.raises(StateError, match="got no gradient"):
        trainer(model, tmp_path, kind=hf.Trainer).train()


def test_a_model_without_adapters_is_refused(make_model: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter to train"):
        trainer(make_model("llama"), tmp_path, kind=hf.Trainer)


@pytest.mark.slow
def test_trl_takes_the_object(make_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """TRL asks for hidden states through model.base_model and fuses the head with the loss."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"prompt": f"count to {n}", "completion": " ".join(map(str, range(n)))} for n in range(3, 9)]
    args = trl.SFTConfig(
        str(tmp_path), max_steps=2, save_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        disable_tqdm=True, bf16=False, max_length=64, learning_rate=1e-2, warmup_steps=0,
    )  # fmt: skip
    model = fresh(make_model)
    before = state(model)
    data = datasets.Dataset.from_list(rows)
    trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tiny_tokenizer).train()
    assert not same(before, state(model))
    saved = PeftModel.from_pretrained(make_model("llama"), tmp_path / "checkpoint-2")
    tokens = torch.arange(5)[None]
    assert torch.allclose(saved(tokens).logits, model.eval()(tokens).logits, atol=1e-6)


@pytest.mark.slow
def test_trls_dpo_takes_the_object_beside_a_reference(
    make_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """TRL knows PEFT's own class only, so it cannot switch the adapter off to get its reference: that is given, or, for
    a base with a path, TRL loads the base a second time."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"prompt": f"count to {n}", "chosen": "one two", "rejected": " ".join("abc")} for n in range(3, 9)]
    args = trl.DPOConfig(
        str(tmp_path), max_steps=2, save_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        disable_tqdm=True, bf16=False, max_length=64, learning_rate=1e-2, warmup_steps=0, logging_steps=1,
    )  # fmt: skip
    model = fresh(make_model)
    before, base = state(model), make_model("llama")
    data = datasets.Dataset.from_list(rows)
    trainer = trl.DPOTrainer(
        model=model, ref_model=base, args=args, train_dataset=data, processing_class=tiny_tokenizer
    )
    trainer.train()
    assert not same(before, state(model))
    first = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert abs(first - math.log(2)) < 1e-3  # an adapter starts as the base, and so as the reference
    saved = PeftModel.from_pretrained(make_model("llama"), tmp_path / "checkpoint-2")
    tokens = torch.arange(5)[None]
    assert torch.allclose(saved(tokens).logits, model.eval()(tokens).logits, atol=1e-6)
