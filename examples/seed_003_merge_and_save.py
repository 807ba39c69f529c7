"""Document 003's two ways to merge, and the checks that a merge needs.

Method 1 merges in memory; method 2 loads base and adapter, merges and writes a plain model. Afterwards nothing is left
of the adapter but other weights, so this is the moment to check that the merged model answers as the adapted one did.
"""

from __future__ import annotations

import copy

import torch
from base import arguments, batches, folder_of, load, rate, rows, scratch, train
from transformers import AutoModelForCausalLM

from veneer.peft import LoraConfig, PeftModel, get_peft_model


def main() -> None:
    args = arguments(__doc__).parse_args()
    model, tokenizer = load(args.model)
    out = scratch()
    targets = ["q_proj", "v_proj", "k_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    losses = train(model, batches(tokenizer, rows(args.model, 24)), steps=12, lr=rate(args.model))
    print(f"a short training, so that there is something to merge: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    model.save_pretrained(out / "lora_weights")
    inputs = tokenizer("Show the old file\n", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        adapted = model(**inputs).logits

    # method 1: merge for the moment (here on a copy, because method 2 wants to see the same adapter)
    merged_model = copy.deepcopy(model).merge_and_unload()
    print("method 1", compare(merged_model, inputs, adapted))

    # a merge can be taken back to the last bit as long as the model keeps its adapter
    model.merge_adapter()
    model.unmerge_adapter()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, adapted)
    print("merge_adapter, then unmerge_adapter: the same logits, bit for bit")

    # method 2: merge for good and save
    base_model = AutoModelForCausalLM.from_pretrained(folder_of(args.model), dtype=torch.float32)
    model = PeftModel.from_pretrained(base_model, out / "lora_weights")
    merged_model = model.merge_and_unload()
    merged_model.save_pretrained(out / "merged_model")
    tokenizer.save_pretrained(out / "merged_model")
    from_disk = AutoModelForCausalLM.from_pretrained(out / "merged_model")
    print("method 2", compare(from_disk, inputs, adapted))
    adapter = sum(f.stat().st_size for f in (out / "lora_weights").glob("*.safetensors"))
    merged = sum(f.stat().st_size for f in (out / "merged_model").glob("*.safetensors"))
    print(f"adapter {adapter:,} bytes, merged model {merged:,} bytes: {merged / adapter:.0f} times as much to hand on")

    # inference with the merged model
    outputs = from_disk.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    print(f"it answers {tokenizer.decode(outputs[0], skip_special_tokens=True)!r}")


def compare(model: torch.nn.Module, inputs: dict[str, torch.Tensor], adapted: torch.Tensor) -> str:
    with torch.no_grad():
        apart = float((model(**inputs).logits - adapted).abs().max())
    assert apart < 1e-3 * float(adapted.abs().max()), apart
    assert not isinstance(model, PeftModel)
    return f"gives a plain {type(model).__name__}; logits differ from the adapted model's by at most {apart:.1e}"


if __name__ == "__main__":
    main()
