"""`veneer.train` on one GPU with its blocks recorded as CUDA graphs and without: tokens a second, memory, losses.

    python benchmarks/train_graphs.py [--shape 0.5b 8b-4] [--graphs off on auto] [--steps 40] [--json FILE] [--tiny]

A model of Qwen2.5-0.5B's shape, or four layers of Llama-3.1-8B's, with random weights in bf16, r = 16 on all linears;
rows of random tokens whose lengths are spread as those of conversations are. Two ways of training on them:

    packed      rows of 2,048 tokens, 2 at a time: nearly full, so that all can be brought to one shape for little
    by samples  8 rows at a time, end to end: batches differ in length, and are filled up to that of the longest

Each is run with `graphs` off, on and auto, from the same start on the same batches; auto says what it chose, and why.
Tokens are those of the rows, never fillers. Counted are whole steps of the loop after warming up and recording: their
tokens over their seconds, as batches that are not replayed count too. `--tiny`: a toy model in a few seconds, to see
that all of it runs.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "train_graphs.json"
WARM = 10  # steps before those that are counted
WORDS = 4096  # different tokens that rows are made of
SHAPE = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096,
}  # fmt: skip
TOY = SHAPE | {"hidden_size": 224, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": WORDS}
SHAPES = {"0.5b": ("Qwen2Config", SHAPE), "8b-4": ("LlamaConfig", LLAMA), "toy": ("Qwen2Config", TOY)}
WAYS: dict[str, dict[str, Any]] = {
    "packed": {"packing": "on", "max_len": 2048, "batch_size": 2},
    "by samples": {"packing": "off", "max_len": 2048, "batch_size": 8},
}


def model_of(name: str) -> Any:
    import transformers

    kind, shape = SHAPES[name]
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        config = getattr(transformers, kind)(**shape)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def tokenizer_of() -> Any:
    """Of words that are numbers: rows come as tokens, so it has nothing to do."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({"<end>": 0} | {str(i): i for i in range(1, WORDS)}, unk_token="<end>"))
    inner.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>", unk_token="<end>")


def rows_of(count: int) -> list[dict[str, list[int]]]:
    draw = random.Random(0)
    sizes = [min(1024, max(16, round(draw.lognormvariate(4.8, 0.6)))) for _ in range(count)]
    return [{"input_ids": [*(draw.randrange(1, WORDS) for _ in range(size)), 0]} for size in sizes]


def trained(way: str, graphs: str, steps: int, shape: str, rows: list[Any]) -> dict[str, Any]:
    import veneer
    from veneer.tasks import causal_lm

    causal_lm.SHOWN_TOKENS = 1
    seconds, tokens, losses, notes = list[float](), list[int](), list[float](), list[str]()
    at, counted = time.perf_counter(), 0

    def listen(event: dict[str, Any]) -> None:
        nonlocal at, counted
        now = time.perf_counter()
        if event["event"] == "step":
            seconds.append(now - at)
            tokens.append(event["tokens"] - counted)
            losses.append(event["loss"])
            counted = event["tokens"]
        elif event["event"] in ("note", "warning", "oom") and any(
            w in event["text"] for w in ("graph", "fused", "out of")
        ):
            notes.append(event["text"])
        at = time.perf_counter()

    cuda = torch.cuda.is_available()
    gc.collect()  # the last run's model
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        run = veneer.train(
            model_of(shape), rows, tokenizer=tokenizer_of(), report=listen, out=f"{folder}/run", r=16, lr=1e-4, val=0,
            steps=steps, eval_every=0, save_every=10**6, recompute="none", fuse="on", graphs=graphs, precision="bf16",
            **WAYS[way],
        )  # fmt: skip
        config = run.config()
        notes.append(f"graphs {config.settings.graphs}: {config.origins['graphs'].note or 'as asked'}")
    warm = min(WARM, steps // 2)
    return {
        "shape": shape, "way": way, "graphs": graphs, "taken": config.settings.graphs,
        "tokens_per_second": sum(tokens[warm:]) / sum(seconds[warm:]), "tokens": tokens,
        "seconds": seconds, "losses": losses, "notes": notes,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", default=["0.5b"], choices=list(SHAPES))
    parser.add_argument("--graphs", nargs="+", default=["off", "on", "auto"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    into = args.json or (None if args.tiny else RESULTS)  # a toy's figures take nobody's place
    rows = rows_of(200 if args.tiny else 3000)
    found: list[dict[str, Any]] = []
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    for shape, way in itertools.product(["toy"] if args.tiny else args.shape, WAYS):
        first: dict[str, Any] = {}
        for graphs in args.graphs:
            row = trained(way, graphs, args.steps, shape, rows)
            found.append(row)
            first = first or row
            print(told(row, first), flush=True)
            about = {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "device": device}
            if into is None:
                continue
            into.write_text(json.dumps({**about, "torch": torch.__version__, "rows": found}, indent=1) + "\n")


def told(row: dict[str, Any], first: dict[str, Any]) -> str:
    """A row beside the first of its kind."""
    apart = max(abs(a - b) / a for a, b in zip(first["losses"], row["losses"], strict=True))
    memory = f"{row['peak_gib']:.2f} GiB" if row["peak_gib"] is not None else ""
    speed = row["tokens_per_second"]
    times = f"x {speed / first['tokens_per_second']:.2f}, losses differ by {apart:.2g} at most"
    line = f"{row['shape']:6} {row['way']:12} graphs {row['graphs']:5} {speed:10,.0f} tokens/s  {memory}  {times}"
    return "\n".join([line, *(f"    {note}" for note in row["notes"])])


if __name__ == "__main__":
    main()
