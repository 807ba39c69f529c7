"""What a training step of each method costs: time and memory of every delta with every combine rule, beside PEFT's.

    python benchmarks/methods.py [--layers 2] [--width 1024] [--tokens 256] [--dtype float32] [--device cpu]

A step is a forward and a backward pass of a Llama of the given shape with rank 16 on all seven linears. All candidates
run in one process, in turn, round after round; a ratio is the median of the ratios within a round. Columns:

    step        time of a step, that of plain LoRA (ours) = 1                              DoRA: at most 1.25
    peft        the same for PEFT's, with PEFT's plain LoRA = 1
    peft/ours   PEFT's time over ours
    saved       MiB kept for the backward pass, parameters not counted
    peak        MiB at the highest point of a step, above what lay there before it
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from beside import METHODS, Common, ours, theirs
from torch import Tensor, nn

from core import TARGETS, Peak, llama, ratio
from veneer.core.combine import COMBINES

KINDS = {name: method for name, method in METHODS.items() if method.kind == "delta"}
MIB = 2**20


def candidates(base: nn.Module) -> dict[str, nn.Module]:
    """Models that share the base's parameters: only the adapters are their own."""
    common, found = Common(16, 32, tuple(TARGETS)), {}
    for name, method in KINDS.items():
        for rule in COMBINES:
            model = _twin(base)
            ours(model, replace(method, fields=method.fields | {"combine": rule}), common)
            found[f"{name} {rule}"] = model
        if method.config is not None:
            found[f"peft {name} add"] = theirs(_twin(base), method, common)[0]
    found["peft lora dora"] = theirs(_twin(base), METHODS["dora"], common)[0]
    return found


def _twin(base: nn.Module) -> nn.Module:
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def call() -> None:
        model(inputs_embeds=x).logits.float().square().mean().backward()
        if x.is_cuda:
            torch.cuda.synchronize()

    return call


def in_turn(calls: dict[str, Callable[[], None]], count: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each call, one after the other, `count` times after a round that is not counted.

    On a CPU with one thread the clock is CPU time, which other programs do not move.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(count + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if i:
                seconds[name].append(clock() - start)
    return seconds


def saved_mib(model: nn.Module, x: Tensor) -> float:
    held, own = {}, {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(inputs_embeds=x).logits.float().square().mean()
    total = sum(held.values()) / MIB
    del loss
    return total


def peak_mib(model: nn.Module, x: Tensor) -> float:
    if not x.is_cuda:
        with Peak() as peak:
            step(model, x)()
        return peak.peak / MIB
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(model, x)()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    dtype = getattr(torch, args.dtype)
    base = llama(args.layers, args.width).to(args.device, dtype).requires_grad_(False)
    x = torch.randn(1, args.tokens, args.width, device=args.device, dtype=dtype, requires_grad=True)
    models = {name: model.to(args.device).train() for name, model in candidates(base).items()}
    clock = time.perf_counter if x.is_cuda else time.process_time
    seconds = in_turn({name: step(model, x) for name, model in models.items()}, args.count, clock)
    found = {}
    for name, model in models.items():
        found[name] = {"ms": 1e3 * statistics.median(seconds[name])}
        found[name]["step"] = ratio(seconds[name], seconds["peft lora add" if "peft" in name else "lora add"])
        if f"peft {name}" in seconds:
            found[name]["peft/ours"] = ratio(seconds[f"peft {name}"], seconds[name])
        found[name] |= {"saved MiB": saved_mib(model, x), "peak MiB": peak_mib(model, x)}
    return found


def show(found: dict[str, dict[str, float]]) -> None:
    print(f"{'':16}{'step':>8}{'peft':>8}{'peft/ours':>11}{'saved':>10}{'peft':>8}{'peak':>10}{'peft':>8}")
    for name, own in found.items():
        if name.startswith("peft"):
            continue
        peer = found.get(f"peft {name}", {})
        cells = [own["step"], peer.get("step"), own.get("peft/ours"), own["saved MiB"], peer.get("saved MiB")]
        cells += [own["peak MiB"], peer.get("peak MiB")]
        widths = (8, 8, 11, 10, 8, 10, 8)
        print(
            f"{name:16}",
            *(f"{'' if c is None else f'{c:.2f}':>{w}}" for c, w in zip(cells, widths, strict=True)),
            sep="",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", type=int, default=7, help="rounds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(args)
    show(found)
    if args.json:
        import peft

        device = torch.cuda.get_device_name() if "cuda" in args.device else "one thread of a CPU"
        about = {"torch": torch.__version__, "peft": peft.__version__, "device": device, "command": sys.argv}
        about |= {key: getattr(args, key) for key in ("layers", "width", "tokens", "dtype", "count")}
        args.json.write_text(json.dumps({"about": about, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
