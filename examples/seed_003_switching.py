"""Document 003's adapter switching, and the two things it leads to: one adapter for each row, and several at once.

model.set_adapter(adapter_name)
outputs = model.generate(**inputs, max_length=512)
"""

from __future__ import annotations

import time

import torch
from base import arguments, batches, load, rate, rows, scratch, train

import veneer
from veneer.peft import LoraConfig, PeftModel, get_peft_model


def main() -> None:
    args = arguments(__doc__).parse_args()
    base, tokenizer = load(args.model)
    out = scratch()

    # two adapters for two tasks: commands, and the same commands in capitals
    examples = rows(args.model, 24)
    loud = [{**row, "output": row["output"].upper()} for row in examples]
    model = base
    for name, data in (("commands", examples), ("loud", loud)):
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(load(args.model)[0], config, adapter_name=name)
        losses = train(model, batches(tokenizer, data), steps=100, lr=rate(args.model))
        model.save_pretrained(out)
        print(f"{name:8} trained: loss {losses[0]:.3f} -> {losses[-1]:.3f}, saved in {out / name}")

    model = PeftModel.from_pretrained(base, out / "commands", adapter_name="commands")
    model.load_adapter(out / "loud", adapter_name="loud")

    # the document's function
    def inference_with_adapter_switching(text: str, adapter_name: str) -> str:
        # switch to the named adapter
        model.set_adapter(adapter_name)
        inputs = tokenizer(text, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        outputs = model.generate(**inputs, max_length=64, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        return tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    question = f"{examples[0]['instruction']}\n"
    answers = {name: inference_with_adapter_switching(question, name) for name in ("commands", "loud")}
    with model.disable_adapter():
        answers["none"] = inference(model, tokenizer, question)
    for name, answer in answers.items():
        print(f"  {name:8} {question.strip()!r} -> {answer[:60]!r}")
    assert answers["commands"] != answers["loud"]

    # the cost of a switch does not depend on the model: it is one assignment
    began = time.perf_counter()
    for _ in range(1000):
        veneer.activate(model, "loud")
        veneer.activate(model, "commands")
    microseconds = (time.perf_counter() - began) / 2000 * 1e6
    print(
        f"veneer.activate: {microseconds:.1f} microseconds; set_adapter also makes the adapter trainable, as PEFT does"
    )

    # one batch, one adapter for each row: no switching at all
    inputs = tokenizer([question] * 3, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["commands", "loud", "__base__"]).logits
        for row, name in enumerate(("commands", "loud")):
            veneer.activate(model, name)
            assert torch.allclose(mixed[row], model(**inputs).logits[row], atol=1e-4)
        with model.disable_adapter():
            assert torch.allclose(mixed[2], model(**inputs).logits[2], atol=1e-4)
    print("adapter_names=['commands', 'loud', '__base__']: every row answers as if its adapter alone were active")

    # and both at once: a weighted sum of what they change
    model.add_weighted_adapter(["commands", "loud"], [0.5, 0.5], "between", combination_type="cat")
    model.set_adapter("between")
    with torch.no_grad():
        cat = model(**inputs).logits
        veneer.activate(model, {"commands": 0.5, "loud": 0.5})
        assert torch.allclose(model(**inputs).logits, cat, atol=1e-4)
    print("half of each, as one adapter of rank 16 or as a mixture of two: the same logits")


def inference(model: PeftModel, tokenizer: object, text: str) -> str:
    inputs = tokenizer(text, return_tensors="pt")  # type: ignore[operator]
    inputs.pop("token_type_ids", None)
    outputs = model.generate(**inputs, max_length=64, do_sample=False, pad_token_id=tokenizer.pad_token_id)  # type: ignore[attr-defined]
    return tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
