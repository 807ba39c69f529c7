"""Blocks on a CPU, fused and plain, by their width: what the rule of `fuse: auto` for CPUs was made from.

    python benchmarks/fused_cpu.py [--rounds 15] [--json FILE]

Four Llama-shaped blocks in fp32 with r = 16 on all linears, four samples end to end, forwards and backwards on two
threads. Both kinds take their steps in turn, so what else the machine does meets both alike; a ratio is the median over
rounds of a plain step's processor seconds by a fused one's in the same round. Above 1 the fused one is quicker.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

RESULTS = Path(__file__).parent / "results" / "fused_cpu.json"
WIDTHS, TOKENS, WARM = (64, 128, 256, 384, 576, 768, 1024), (128, 512), 3


def model_of(width: int) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    import veneer
    from veneer import LoRA

    heads = max(1, width // 64)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3 // 8 * 8, num_hidden_layers=4, num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads, vocab_size=1000, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    veneer.attach(model, LoRA(rank=16, alpha=32))
    return model.train()


def inputs_of(tokens: int) -> dict[str, Any]:
    from veneer.data.batch import collate
    from veneer.data.types import IGNORE, Encoded

    draw = random.Random(0)
    rows = [draw.choices(range(1000), k=tokens // 4) for _ in range(4)]
    return collate([Encoded(row, [IGNORE, *row[1:]]) for row in rows], by_samples=True).inputs


def ratio(width: int, tokens: int, rounds: int) -> tuple[float, float]:
    """Plain by fused, and the seconds of a plain step."""
    from veneer.kernels.fuse import fuse
    from veneer.kernels.varlen import within

    plain, inputs = model_of(width), inputs_of(tokens)
    fused = copy.deepcopy(plain)
    assert fuse(fused, verbose=False).replaced["blocks"] == 4
    found: dict[int, list[float]] = {id(plain): [], id(fused): []}
    with within(plain), within(fused):
        for number in range(rounds + WARM):
            for model in (plain, fused) if number % 2 else (fused, plain):
                begun = time.process_time()
                model.base_model(**inputs)[0].sum().backward()  # type: ignore[operator]
                found[id(model)].append(time.process_time() - begun)
    one, other = (found[id(model)][WARM:] for model in (plain, fused))
    return statistics.median(a / b for a, b in zip(one, other, strict=True)), statistics.median(one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    found = []
    for tokens in TOKENS:
        for width in WIDTHS:
            times, seconds = ratio(width, tokens, args.rounds)
            found.append({"width": width, "tokens": tokens, "ratio": times, "seconds": seconds})
            print(f"{tokens:4} tokens, width {width:4}: fused x {times:.2f}, plain {1000 * seconds:.0f} ms", flush=True)
    args.json.write_text(json.dumps({"torch": torch.__version__, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
