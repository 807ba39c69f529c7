"""Samples of very different lengths, batched in five ways: real tokens per second and peak memory of the training step.

    python benchmarks/packed.py [--shape 8b] [--layers 8] [--json FILE]

    padded, as drawn      8 samples a batch in random order, padded to the longest: what a plain loader does
    padded, by length     the same after sorting
    packed, masked        samples share rows of --length tokens; a block-diagonal mask keeps them apart
    packed, by samples    the same rows end to end, attention within each sample (kernels/varlen.py)
    flat, by samples      the batches of "padded, by length" as one row each, without padding

All five see the same samples, run on fused blocks of the true shape (fewer layers) and alternate in one process; a
figure is the median over passes of all samples' tokens (padding is not counted) by the seconds of the pass. Lengths are
drawn from a log-normal distribution with median 180 and a long tail, cut at --length, as instructions with answers are.
The gradients of all five are compared with those of the samples one by one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from train_gpu import SHAPES, TARGETS, base

import veneer
from veneer import LoRA
from veneer.data.batch import Batch, batches
from veneer.data.pack import pack
from veneer.data.types import IGNORE, Encoded
from veneer.kernels.varlen import within
from veneer.tasks.cross_entropy import chunked_cross_entropy

Ways = dict[str, tuple[bool, list[Batch]]]  # name -> whether attention goes by samples, batches


def samples_of(count: int, longest: int, vocab: int) -> list[Encoded]:
    dice = random.Random(0)
    made = []
    for number in range(count):
        n = max(8, min(longest, round(math.exp(dice.gauss(math.log(180), 0.9)))))
        ids = [dice.randrange(3, vocab) for _ in range(n)]
        made.append(Encoded(ids, [IGNORE] * (n // 3) + ids[n // 3 :], id=str(number)))
    return made


def ways_of(samples: Sequence[Encoded], longest: int, rows: int, device: str) -> Ways:
    ordered = sorted(samples, key=len, reverse=True)
    packed = pack(samples, longest)
    made: Ways = {
        "padded, as drawn": (False, list(batches(samples, 8))),
        "padded, by length": (False, list(batches(ordered, 8))),
        "packed, masked": (False, list(batches(packed, rows))),
        "packed, by samples": (True, list(batches(packed, rows, by_samples=True))),
        "flat, by samples": (True, list(batches(ordered, 8, by_samples=True))),
    }
    return {name: (by_samples, [batch.to(device) for batch in held]) for name, (by_samples, held) in made.items()}


def model_of(shape: str, layers: int, device: str) -> nn.Module:
    SHAPES["cut"] = SHAPES[shape] | {"num_hidden_layers": layers}
    model = base("cut", device)
    veneer.attach(model, LoRA(rank=16, alpha=32, targets=TARGETS))
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(p, std=0.01)
    print(veneer.fuse(model, verbose=False))
    return model


def one_pass(model: Any, held: Sequence[Batch]) -> Tensor:
    """The summed loss of all samples; gradients are added up."""
    total = torch.zeros((), device=held[0].labels.device)
    for batch in held:
        hidden = model.model(**batch.inputs)[0]
        loss = chunked_cross_entropy(hidden[:, :-1], batch.labels[:, 1:], model.lm_head)
        loss.backward()
        total += loss.detach()
    return total


def gradients(model: nn.Module, held: Sequence[Batch]) -> tuple[float, Tensor]:
    model.zero_grad()
    loss = one_pass(model, held)
    return float(loss), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def timed(work: Callable[[], Any], device: str) -> tuple[float, float]:
    """Seconds and peak GiB."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_of(args.shape, args.layers, device)
    samples = samples_of(args.samples, args.length, SHAPES[args.shape]["vocab_size"])
    tokens = sum(map(len, samples))
    ways = ways_of(samples, args.length, args.rows, device)
    loss, exact = gradients(model, [batch.to(device) for batch in batches(samples, 1)])
    rows: dict[str, dict[str, Any]] = {}
    for name, (by_samples, held) in ways.items():
        with within(model, by_samples):
            got, found = gradients(model, held)
        off = float((found - exact).norm() / exact.norm())
        given = sum(batch.inputs["input_ids"].numel() for batch in held)
        rows[name] = {"batches": len(held), "padding": 1 - tokens / given, "off": off, "loss_off": abs(got / loss - 1)}
    found_times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(args.passes):
        for name, (by_samples, held) in ways.items():
            with within(model, by_samples):
                found_times[name].append(timed(lambda held=held: one_pass(model, held), device))
    for name, times in found_times.items():
        seconds = [s for s, _ in times]
        rows[name] |= {
            "tokens_per_second": tokens / statistics.median(seconds), "peak_gib": max(p for _, p in times),
            "seconds": seconds,
        }  # fmt: skip
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__,
        "shape": args.shape, "layers": args.layers, "samples": len(samples), "tokens": tokens,
        "longest": max(map(len, samples)), "length": args.length, "rows_at_once": args.rows, "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=2, help="packed rows at once")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measure(args)
    print(f"{found['samples']} samples, {found['tokens']:,} tokens, {found['device']}, {found['layers']} layers")
    for name, row in found["rows"].items():
        print(
            f"{name:20} {row['tokens_per_second']:10,.0f} tokens/s  {row['peak_gib']:6.2f} GiB  padding "
            f"{row['padding']:5.1%}  gradient off by {row['off']:.2%}, loss by {row['loss_off']:.1e}"
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
