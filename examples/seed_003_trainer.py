"""Document 003's training flow with HF's Trainer, and what it leaves open: resume, the best model, small checkpoints.

The document was written for transformers 4. Version 5 renamed three of its arguments:

    the document                        transformers 5
    evaluation_strategy="steps"         eval_strategy="steps"
    warmup_ratio=0.1                    warmup_steps=0.1       a value below 1 is a share of all steps
    Trainer(tokenizer=tokenizer)        Trainer(processing_class=tokenizer)

With `from veneer.train.hf import Trainer, TrainingArguments` its code runs as written, with a notice for each. With
transformers' own classes and the new words it runs as well (--plain): all that matters hangs on the model.

Two mistakes of the document are corrected where they stand: it trains on the padding, and it trains the instruction to
be repeated instead of the answer.
"""

from __future__ import annotations

import sys

import transformers
from base import arguments, load, rate, rows, scratch
from torch.utils.data import Dataset

from veneer.peft import LoraConfig, PeftModel, get_peft_model
from veneer.train import hf


class Encoded(Dataset):  # type: ignore[type-arg]
    """What `Dataset.map(prepare_data, batched=True)` gives, without needing the datasets library."""

    def __init__(self, columns: dict[str, list[list[int]]]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return {key: column[i] for key, column in self.columns.items()}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--plain", action="store_true", help="transformers' own Trainer and words")
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    out = scratch()

    lora_config = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.1, bias="none", task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "k_proj", "o_proj"],
    )  # fmt: skip
    model = get_peft_model(model, lora_config)
    model.print_trainable_parameters()

    # prepare the data
    def prepare_data(examples: list[dict[str, str]]) -> Encoded:
        texts = [
            f"{e['instruction']}\n{e['output']}{tokenizer.eos_token}" for e in examples
        ]  # not the instruction alone
        inputs = dict(tokenizer(texts, truncation=True, padding=True, max_length=512))
        inputs["labels"] = [
            [token if seen else -100 for token, seen in zip(ids, mask, strict=True)]  # not ids.copy(): no padding
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        inputs.pop("token_type_ids", None)
        return Encoded(inputs)

    examples = rows(args.model, 64)
    held_out = len(examples) // 6
    train_dataset, eval_dataset = prepare_data(examples[held_out:]), prepare_data(examples[:held_out])

    # training arguments: the document's, but for the numbers
    words = {
        "output_dir": str(out / "lora_output"),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": rate(args.model),
        "logging_steps": 4,
        "save_steps": args.steps // 2,
        "eval_steps": args.steps // 2,
        "save_total_limit": 2,
        "remove_unused_columns": False,
        "max_steps": args.steps,
        "load_best_model_at_end": True,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not sys.modules["torch"].cuda.is_available(),
    }
    if args.plain:
        kind, tokenizer_as = transformers.Trainer, {"processing_class": tokenizer}
        training_args = transformers.TrainingArguments(**words, warmup_steps=0.1, eval_strategy="steps")
    else:
        kind, tokenizer_as = hf.Trainer, {"tokenizer": tokenizer}
        training_args = hf.TrainingArguments(**words, warmup_ratio=0.1, evaluation_strategy="steps")

    # the trainer
    trainer = kind(
        model=model, args=training_args, train_dataset=train_dataset, eval_dataset=eval_dataset, **tokenizer_as
    )

    # start training
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"held-out loss {before:.3f} -> {after:.3f}, best checkpoint {trainer.state.best_model_checkpoint}")

    # a checkpoint holds the adapter, the optimizer and the state of the run; of the base, nothing
    checkpoint = out / "lora_output" / f"checkpoint-{args.steps // 2}"
    for file in sorted(checkpoint.iterdir()):
        print(f"  {checkpoint.name}/{file.name:28} {file.stat().st_size:>10,} bytes")
    base_bytes = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".lora." not in n)
    print(f"  the base would be {base_bytes:,} bytes")

    # resuming from the middle gives the same numbers as never having stopped
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    again = kind(
        model=model, args=training_args, train_dataset=train_dataset, eval_dataset=eval_dataset, **tokenizer_as
    )
    again.train(resume_from_checkpoint=str(checkpoint))
    assert [entry["loss"] for entry in again.state.log_history if "loss" in entry] == losses
    print(f"resumed from {checkpoint.name}: the same losses to the last digit, {losses[-1]} at the end")

    # save the LoRA weights
    model.save_pretrained(out / "lora_weights")
    loaded = PeftModel.from_pretrained(load(args.model)[0], out / "lora_weights")
    print(
        f"saved and loaded again: {sorted(p.name for p in (out / 'lora_weights').iterdir())}, {type(loaded).__name__}"
    )


if __name__ == "__main__":
    main()
