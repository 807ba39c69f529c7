"""How long packing one block of a model takes, plainly and with regard to its inputs.

    python benchmarks/pack_time.py [--shape 8b|135m] [--json FILE]

Random weights and inputs of the true shapes, on a GPU where there is one; once to warm up, then the best of two.
Without the pass over a few rows that sees the inputs: that is a forward pass of the packed base for each row.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from veneer.core.observe import Sketch
from veneer.quant.inputs import summed_up
from veneer.quant.nf4 import Nf4
from veneer.quant.storage import Recipe

SHAPES = {
    "8b": (32, [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]),
    "135m": (30, [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    blocks, matrices = SHAPES[args.shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = Recipe("nf4").checked()
    storage, inputs = Nf4(), {}
    for cols in {cols for _, cols in matrices}:
        sketch = Sketch()
        sketch.see(torch.randn(2048, 256, device=device) @ torch.randn(256, cols, device=device))
        inputs[cols] = summed_up({"x": sketch})["x"]

    def seconds(looked: bool) -> float:
        started = time.perf_counter()
        for rows, cols in matrices:
            w = torch.randn(rows, cols, device=device, dtype=torch.bfloat16)
            parts = storage.pack(w, recipe, inputs[cols] if looked else None)
            float(parts[1].float().sum())  # wait for it
        return time.perf_counter() - started

    found = {
        name: min([seconds(looked) for _ in range(3)][1:]) for name, looked in (("plain", False), ("looked", True))
    }
    name = torch.cuda.get_device_name() if device == "cuda" else f"a CPU, {torch.get_num_threads()} threads"
    for what, took in found.items():
        print(f"{args.shape} {what}: {took:.2f} s a block, {took * blocks:.0f} s for {blocks} blocks; {name}")
    if args.json:
        args.json.write_text(json.dumps({"shape": args.shape, "device": name, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
