"""Tokens per second and peak memory of other libraries' LoRA training step, beside Veneer's in the same run.

    pip install unsloth bitsandbytes
    python benchmarks/peers_gpu.py [--table 2x2048] [--shape 8b] [--limit SECONDS] [--json FILE] [VARIANT ...]

    table     batch x length   variants
    2x2048    2 x 2048         everything kept, base in bf16: Unsloth, PEFT compiled, ours
    4x2048    4 x 2048         kept and recomputed, bf16 and nf4: Unsloth ("unsloth" checkpointing), PEFT, ours

`unsloth` and `unsloth-nf4-kept` keep everything; `unsloth-recompute` and `unsloth-nf4` recompute every layer, and so do
PEFT's rows on nf4.

Both libraries are measured beside Veneer, never used by it, and only a process that measures one imports it. The
measurement is `train_gpu.py`'s, and what each library recommends for speed is on. Unsloth has its own loss (in pieces,
fused with the head), its fp32 adapters under autocast as its trainer runs them, and its kernels. PEFT has layers
compiled or recomputed, adapters in bf16 without autocast, and our loss in pieces: whole logits would decide the
comparison. `peft-nf4-own` keeps the loss of transformers. `peft-nf4-prepared` adds the fp32 norms, embeddings and
adapters of `prepare_model_for_kbit_training` under autocast, as PEFT's guide to QLoRA has it.

Unsloth and bitsandbytes load from a folder. One with random weights of the shape is written below the temporary
directory (TMPDIR) where it is missing, 16 GB for the 8B shape, and stays there for the next variant and the next run.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import train_gpu
from torch import Tensor, nn
from train_gpu import SHAPES, TARGETS, Variant, own_loss, peft_chunked

# Read by these libraries at import: nothing is fetched or reported, generated code goes where the model is.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_COMPILE_LOCATION": str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache"),
}


def checkpoint(shape: str, device: str) -> str:
    """A folder as `from_pretrained` wants it: config, random weights in bf16 layer by layer, a tokenizer of numbers."""
    folder = Path(tempfile.gettempdir()) / f"random-llama-{shape}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as part:
            write_weights(Path(part), shape, device)
            with contextlib.suppress(OSError):  # another process was quicker
                Path(part).rename(folder)
    return str(folder)


def write_weights(folder: Path, shape: str, device: str) -> None:
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=131072, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    torch.manual_seed(0)
    files: dict[str, dict[str, Tensor]] = {}
    for name, like in state.items():
        w = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
        nn.init.normal_(w, std=0.02) if w.ndim > 1 else nn.init.ones_(w)
        layer = name.split(".")[2] if ".layers." in name else "ends"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = w
    for file, tensors in files.items():
        save_file({name: w.cpu() for name, w in tensors.items()}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path, size: int) -> None:
    """A word for every id. Nothing is encoded with it; Unsloth does not load a model without one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<pad>", *map(str, range(size - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def unsloth(recompute: str | bool, four_bit: bool = False) -> Any:
    def build(shape: str, device: str) -> nn.Module:
        from unsloth import FastLanguageModel  # before transformers, which it patches

        model, _ = FastLanguageModel.from_pretrained(
            checkpoint(shape, device),
            max_seq_length=2048,
            dtype=torch.bfloat16,
            load_in_4bit=four_bit,
            local_files_only=True,
            use_gradient_checkpointing=recompute,
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=16,
            lora_alpha=32,
            lora_dropout=0,
            bias="none",
            target_modules=TARGETS,
            use_gradient_checkpointing=recompute,
        )
        # The layers come in evaluation mode, in which nothing is recomputed and a cache is filled.
        return FastLanguageModel.for_training(model)

    return build


def peft_nf4(prepared: bool = False) -> Any:
    """PEFT on bitsandbytes' Linear4bit, every layer recomputed."""

    def build(shape: str, device: str) -> nn.Module:
        from transformers import BitsAndBytesConfig, LlamaForCausalLM

        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        packing = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        place = torch.cuda.current_device() if device == "cuda" else device
        model = LlamaForCausalLM.from_pretrained(
            checkpoint(shape, device), quantization_config=packing, dtype=torch.bfloat16, device_map={"": place}
        )
        again: dict[str, Any] = {"use_reentrant": False}
        if prepared:
            model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=again)
        config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)
        model = get_peft_model(model, config, autocast_adapter_dtype=prepared)
        model.gradient_checkpointing_enable(again)
        return model.train()

    return build


def autocast(loss_of: Any) -> Any:
    def wrapped(model: nn.Module, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16):
            return loss_of(model, ids)

    return wrapped


PEERS: dict[str, Variant] = {
    "unsloth": (unsloth(False), autocast(own_loss)),
    "unsloth-recompute": (unsloth("unsloth"), autocast(own_loss)),
    "unsloth-nf4": (unsloth("unsloth", four_bit=True), autocast(own_loss)),
    "unsloth-nf4-kept": (unsloth(False, four_bit=True), autocast(own_loss)),
    "peft-nf4": (peft_nf4(), peft_chunked),
    "peft-nf4-own": (peft_nf4(), own_loss),
    "peft-nf4-prepared": (peft_nf4(prepared=True), autocast(own_loss)),
}
UNSLOTH = ("unsloth", "unsloth-recompute", "unsloth-nf4", "unsloth-nf4-kept")
TABLES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "2x2048": (2, 2048, ("unsloth", "peft-compiled", "fused", "fp8")),
    "4x2048": (4, 2048, (*UNSLOTH, "peft-nf4", "fused", "fused-input", "nf4-input")),
    "tiny": (2, 16, tuple(PEERS)),
}

if __name__ == "__main__":
    os.environ.update(QUIET)
    train_gpu.VARIANTS.update(PEERS)
    train_gpu.TABLES.clear()
    train_gpu.TABLES.update(TABLES)
    train_gpu.main(__doc__)
