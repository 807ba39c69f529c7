"""A mixed batch: eight rows with eight adapters, beside the same rows with one adapter, and PEFT's `adapter_names`.

    python benchmarks/mixed.py [--json FILE]

One process, one thread, rounds in turn; the ratios are medians of the ratios within a round. Aim: eight adapters in at
most 1.3 times one adapter's time, in a forward over a sequence, in 16 steps of decoding, and in a training step.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import veneer
from core import TARGETS, llama, peft_config, ratio, rounds
from veneer import LoRA

ROWS = 8
NAMES = [f"a{i}" for i in range(ROWS)]


def ours(width: int, layers: int, trainable: bool) -> nn.Module:
    model = llama(layers, width)
    for name in NAMES:
        veneer.attach(model, LoRA(rank=16, alpha=32, targets=TARGETS), name, trainable=trainable)
    return model


def theirs(width: int, layers: int) -> nn.Module:
    from peft import get_peft_model

    model = get_peft_model(llama(layers, width), peft_config(), NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, peft_config())
    return model.eval()


def measure(width: int, layers: int, tokens: int, grad: bool, count: int) -> dict[str, float]:
    ids = torch.randint(0, 1000, (ROWS, tokens))
    steps = 16 if tokens == 1 else 1  # a batch keeps its adapters for the length of an answer
    mine, other = ours(width, layers, grad), theirs(width, layers)

    def one() -> Any:
        with veneer.routed(mine, [NAMES[0]] * ROWS):
            repeat(lambda: mine(ids))

    def mixed() -> Any:
        with veneer.routed(mine, NAMES):
            repeat(lambda: mine(ids))

    def single() -> Any:
        repeat(lambda: mine(ids))

    def repeat(call: Any) -> None:
        for _ in range(steps):
            finish(call())

    def finish(out: Any) -> None:
        if grad:
            out.logits.square().mean().backward()

    veneer.activate(mine, NAMES[0])
    other.set_adapter(NAMES[0])
    calls = {
        "one": single,
        "one, routed": one,
        "eight": mixed,
        "peft one": lambda: repeat(lambda: other(ids)),
        "peft eight": lambda: repeat(lambda: other(ids, adapter_names=NAMES)),
    }
    if grad:  # PEFT routes in evaluation only
        del calls["peft eight"]
    with torch.set_grad_enabled(grad):
        seconds = rounds(calls, count)
    result = {"veneer eight / one": ratio(seconds["eight"], seconds["one"])}
    result["veneer one, routed / one"] = ratio(seconds["one, routed"], seconds["one"])
    if not grad:
        result["peft eight / one"] = ratio(seconds["peft eight"], seconds["peft one"])
        result["peft eight / veneer eight"] = ratio(seconds["peft eight"], seconds["eight"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--count", type=int, default=9, help="rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "sequence of 64, width 512": measure(512, 8, 64, grad=False, count=args.count),
        "one token, width 512": measure(512, 8, 1, grad=False, count=3 * args.count),
        "one token, width 64": measure(64, 8, 1, grad=False, count=3 * args.count),
        "training, sequence of 64, width 512": measure(512, 8, 64, grad=True, count=args.count),
    }
    for name, row in results.items():
        print(name, *(f"  {key:28} {value:8.3f}" for key, value in row.items()), sep="\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, "torch": torch.__version__, "rows": results}, indent=1))


if __name__ == "__main__":
    main()
