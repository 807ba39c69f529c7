"""Tokens per second and peak memory of a LoRA training step on one GPU, beside PEFT.

    python benchmarks/train_gpu.py [--table 2x2048] [--shape 8b] [--json FILE] [VARIANT ...]

    table     batch x length   variants
    2x2048    2 x 2048         everything kept: PEFT, PEFT compiled, plain, plain compiled, fused
    4x2048    4 x 2048         fused, keeping less and less; PEFT with full recomputation

Random weights of the true shape, random tokens, r = 16 on all seven linears of every layer, fused AdamW. Every variant
runs in a process of its own: the median of `--steps` steps that follow each other without a wait, the seconds of the
warm-up (compilation among them) apart, peaks allocated and reserved, and the loss of every step, so that the curves can
be laid over each other. The allocator's segments may grow, unless PYTORCH_ALLOC_CONF says something else. The card's
own matrix product is measured before and after; a card that is limited by its power is slower when it is warm.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # new name, old name
ORIGIN: Any = None  # the event from which moments are counted
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(
    shape: str, device: str, storage: str = "", ends: bool = False, head: bool = False, rotate: bool | None = None
) -> nn.Module:
    """Made, and packed where that is wanted, one layer after the other. `ends`: the embedding is packed, too; `head`:
    what gives the logits; `rotate` as in `veneer.quantize`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], use_cache=False, attn_implementation="sdpa", max_position_embeddings=1 << 20)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    torch.manual_seed(0)
    for name, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None:
                w = torch.empty(p.shape, dtype=p.dtype, device=device)
                nn.init.normal_(w, std=0.02) if p.ndim > 1 else nn.init.ones_(w)
                module._parameters[key] = nn.Parameter(w, requires_grad=False)
        own = name.split(".")[-1]
        if storage and (own in TARGETS or (ends and isinstance(module, nn.Embedding)) or (head and own == "lm_head")):
            from veneer.quant.layer import pack_layer
            from veneer.quant.storage import Recipe

            pack_layer(module, Recipe(storage, rotate=rotate), None, None)
        if hasattr(module, "original_inv_freq"):  # not a parameter, and made without values
            module.inv_freq, module.attention_scaling = module.compute_default_rope_parameters(config, device=device)
            module.original_inv_freq = module.inv_freq
    return model.train()


def plain(shape: str, device: str, storage: str = "", **packing: Any) -> nn.Module:
    import veneer
    from veneer import LoRA

    model = base(shape, device, storage, **packing)
    veneer.attach(model, LoRA(rank=16, alpha=32, targets=TARGETS))
    return model


def fused(
    recompute: str = "none",
    storage: str = "",
    graphs: bool = True,
    turned: bool = False,
    **packing: Any,
) -> Callable[[str, str], nn.Module]:
    def build(shape: str, device: str) -> nn.Module:
        import veneer

        model = plain(shape, device, storage, **packing)
        veneer.fuse(model, recompute, graphs=graphs, turned=turned, verbose=False)
        return model

    return build


def peft(shape: str, device: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)
    return get_peft_model(base(shape, device), config, autocast_adapter_dtype=False)


def peft_recomputing(shape: str, device: str) -> nn.Module:
    model = peft(shape, device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def compiled(build: Callable[[str, str], nn.Module]) -> Callable[[str, str], nn.Module]:
    def wrapped(shape: str, device: str) -> nn.Module:
        model = build(shape, device)
        for layer in next(m for n, m in model.named_modules() if n.endswith("layers")):
            layer.compile()
        return model

    return wrapped


def own_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss as the library under test gives it."""
    return model(input_ids=ids, labels=ids).loss


def chunked_loss(model: nn.Module, ids: Tensor) -> Tensor:
    from veneer.tasks.cross_entropy import chunked_cross_entropy

    hidden = model.model(input_ids=ids)[0]
    count = ids[:, 1:].numel()
    return chunked_cross_entropy(hidden[:, :-1], ids[:, 1:], model.lm_head, rows=1024, count=count) / count


def away(model: nn.Module, ids: Tensor) -> Tensor:
    """The same with what blocks keep in the host's memory until it is needed: forward and backward at once, since both
    have to run under `offloaded`. The step's own backward pass then finds nothing left to do."""
    from veneer.train.offload import offloaded

    with offloaded(ids.device):
        loss = chunked_loss(model, ids)
        loss.backward()
    return loss.detach().requires_grad_()


def peft_chunked(model: nn.Module, ids: Tensor) -> Tensor:
    """PEFT with our loss: it has none of its own, and whole logits would decide the comparison."""
    return chunked_loss(model.base_model.model, ids)


Variant = tuple[Callable[[str, str], nn.Module], Callable[[nn.Module, Tensor], Tensor]]
VARIANTS: dict[str, Variant] = {
    "peft": (peft, own_loss),
    "peft-compiled": (compiled(peft), peft_chunked),
    "peft-recompute": (peft_recomputing, peft_chunked),
    "plain": (plain, chunked_loss),
    "plain-compiled": (compiled(plain), chunked_loss),
    "fused": (fused(), chunked_loss),
    "fused-asked": (fused(graphs=False), chunked_loss),
    **{f"fused-{level}": (fused(level), chunked_loss) for level in ("gate_up", "middle", "input")},
    "fused-input-away": (fused("input", graphs=False), away),
    "fp8": (fused(storage="fp8", rotate=False), chunked_loss),
    "fp8-turned": (fused(storage="fp8", turned=True, rotate=False), chunked_loss),
    "fp8-rotated": (fused(storage="fp8", turned=True), chunked_loss),
    "fp8-head": (fused(storage="fp8", turned=True, head=True, rotate=False), chunked_loss),
    "fp8-input-asked": (fused("input", "fp8", graphs=False, rotate=False), chunked_loss),
    "fp8-asked": (fused(storage="fp8", graphs=False, rotate=False), chunked_loss),
    **{f"fp8-{level}": (fused(level, "fp8", rotate=False), chunked_loss) for level in ("gate_up", "middle", "input")},
    "int8": (fused(storage="int8"), chunked_loss),
    "nf4": (fused(storage="nf4"), chunked_loss),
    "nf4-input": (fused("input", "nf4", ends=True), chunked_loss),
    "nf4-input-away": (fused("input", "nf4", graphs=False, ends=True), away),
}
TABLES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "2x2048": (2, 2048, ("peft", "peft-compiled", "plain", "plain-compiled", "fused", "fp8", "fp8-turned")),
    "4x2048": (4, 2048, ("peft-recompute", "fused", "fused-gate_up", "fused-middle", "fused-input", "fp8-input")),
    "tiny": (2, 16, tuple(VARIANTS)),
}


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    global ORIGIN
    if args.back_tile:
        from veneer.kernels import cuda

        cuda.BACK_TILE_ROUNDED = tuple(map(int, args.back_tile.split(","))) if args.back_tile != "0" else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    build, loss_of = VARIANTS[name]
    if device == "cuda":
        ORIGIN = torch.cuda.Event(enable_timing=True)
        ORIGIN.record()
    model = build(args.shape, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, SHAPES[args.shape]["vocab_size"], (args.batch, args.length), generator=draw).to(device)
    losses: list[Tensor] = []
    marks: list[Callable[[], float]] = []
    started = warm = time.perf_counter()
    for i in range(args.warmup + args.steps):
        if i == args.warmup:
            synchronize()
            warm = time.perf_counter()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            marks = [mark()]
        losses.append(step(model, loss_of, ids, optimizer))
        marks.append(mark())
    synchronize()
    times = [each() for each in marks]
    seconds = [after - before for before, after in pairwise(times)]
    peaks = peak_memory() if device == "cuda" else (0, 0)
    spent = profile(lambda: step(model, loss_of, ids, optimizer)) if args.profile and device == "cuda" else None
    return {
        "variant": name,
        "trained": sum(p.numel() for p in trained),
        "tokens_per_second": ids.numel() / statistics.median(seconds),
        "peak_gib": peaks[0] / 2**30,
        "reserved_gib": peaks[1] / 2**30,
        "warmup_seconds": warm - started,
        "losses": [float(loss) for loss in losses],
        "seconds": seconds,
        **({} if spent is None else {"profile": spent}),
    }


def step(model: nn.Module, loss_of: Callable[..., Tensor], ids: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    loss = loss_of(model, ids)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def peak_memory() -> tuple[int, int]:
    """Bytes allocated at the highest point, and reserved. What CUDA graphs hold counts whole, used or not."""
    pools = [s for s in torch.cuda.memory_snapshot() if tuple(s.get("segment_pool_id", (0, 0))) != (0, 0)]
    unused = sum(s["total_size"] - s["allocated_size"] for s in pools)
    return torch.cuda.max_memory_allocated() + unused, torch.cuda.max_memory_reserved()


def profile(run: Callable[[], Any]) -> dict[str, Any]:
    """Prints where the device's time goes in one step, and gives it: ms and number of each kernel, ms between them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run()
        synchronize()
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_device_time_total)
    print(f"device time {sum(row.self_device_time_total for row in rows) / 1e3:.1f} ms", file=sys.stderr)
    for row in rows[:48]:
        print(f"{row.self_device_time_total / 1e3:8.2f} ms {row.count:5} x {row.key[:110]}", file=sys.stderr)
    idle = waits(seen)
    for pool, (total, used) in pools().items():
        print(f"memory of {pool}: {total / 2**30:.2f} GiB reserved, {used / 2**30:.2f} in use", file=sys.stderr)
    return {"kernels": [[row.key, row.self_device_time_total / 1e3, row.count] for row in rows], "idle_ms": idle}


def waits(seen: Any) -> float:
    """Prints for how long the device did nothing, and what it did next. Gives the ms of a step that Python is ahead of:
    each kernel's median wait as often as it came."""
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    end, found = events[0].time_range.end, {}
    cleared = Counter(after.name for before, after in pairwise(events) if before.name.startswith("Memset"))
    for name, count in cleared.most_common(8):
        print(f"memory is cleared before {count} x {name[:90]}", file=sys.stderr)
    for event in events[1:]:
        found.setdefault(event.name, []).append(max(0.0, event.time_range.start - end))
        end = max(end, event.time_range.end)
    idle = sum(map(sum, found.values()))
    print(f"{len(events)} pieces of work, {idle / 1e3:.1f} ms between them; before", file=sys.stderr)
    for name, gaps in sorted(found.items(), key=lambda item: -sum(item[1]))[:24]:
        middle, most = statistics.median(gaps), max(gaps)
        print(
            f"{sum(gaps) / 1e3:8.2f} ms {len(gaps):5} x, median {middle:.1f} us, most {most:.0f} us: {name[:80]}",
            file=sys.stderr,
        )
    return sum(statistics.median(gaps) * len(gaps) for gaps in found.values()) / 1e3


def pools() -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for segment in torch.cuda.memory_snapshot():
        own = tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
        total, used = found.get(name := "graphs" if own else "all else", (0, 0))
        found[name] = total + segment["total_size"], used + segment["allocated_size"]
    return found


def mark() -> Callable[[], float]:
    """The moment at which the device gets here, asked for later: nobody waits for it in between, as in a real run."""
    if not torch.cuda.is_available():
        now = time.perf_counter()
        return lambda: now
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return lambda: ORIGIN.elapsed_time(event) / 1e3


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ceiling() -> float:
    """TFLOP/s of one large bf16 product on this card, now."""
    if not torch.cuda.is_available():
        return float("nan")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * 8192**3 / statistics.median(times[4:]) / 1e12


def apart(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """One variant in a process of its own, of the script that runs; what went wrong, where something did."""
    same = [f"--{k}={getattr(args, k)}" for k in ("shape", "batch", "length", "steps", "warmup")]
    same += ["--profile"] if args.profile else []
    same += [f"--back-tile={args.back_tile}"] if args.back_tile else []
    command = [sys.executable, sys.argv[0], name, "--one", *same]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit, errors="replace")
    except subprocess.TimeoutExpired as slow:
        said = (slow.stderr or b"").decode(errors="replace")
        return {"variant": name, "failed": f"not done after {args.limit} seconds\n{said[-2000:]}"}
    if args.profile or "Warning" in done.stderr:
        print(done.stderr)
    if done.returncode:
        return {"variant": name, "failed": done.stderr[-2000:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def shown(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['variant']}: failed\n{row['failed']}"
    return (
        f"{row['variant']:18} {row['tokens_per_second']:10,.0f} tokens/s  {row['peak_gib']:6.2f} GiB "
        f"(reserved {row['reserved_gib']:.1f})  warm-up {row['warmup_seconds']:.0f} s  "
        f"loss {row['losses'][0]:.3f} -> {row['losses'][-1]:.3f}"
    )


def main(about: str = __doc__) -> None:
    if not any(name in os.environ for name in ALLOCATOR):  # read as torch is loaded, so it must be there before
        os.environ.update(dict.fromkeys(ALLOCATOR, "expandable_segments:True"))
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("variants", nargs="*", choices=[[], *VARIANTS])
    parser.add_argument("--table", choices=TABLES, default="2x2048")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--limit", type=float, help="seconds that one variant may take")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true", help="print where the device's time goes")
    parser.add_argument("--back-tile", help="of the kernel that rounds gradients in a gated unit; 0: rounded apart")
    parser.add_argument("--one", action="store_true", help="measure in this process and print JSON")
    args = parser.parse_args()
    batch, length, names = TABLES[args.table]
    args.batch, args.length = args.batch or batch, args.length or length
    if args.one:
        print(json.dumps(measure(args, args.variants[0])))
        return
    before, rows = ceiling(), []
    for name in args.variants or names:
        rows.append(apart(args, name))
        print(shown(rows[-1]), flush=True)
        write(args, rows, [before])
    after = ceiling()
    print(f"matrix product: {before:.0f} TFLOP/s before, {after:.0f} after")
    write(args, rows, [before, after])


def write(args: argparse.Namespace, rows: list[dict[str, Any]], ceilings: list[float]) -> None:
    """After each variant, so that a run that is stopped leaves what it has found."""
    if args.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
        record = {
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "device": device,
            "torch": torch.__version__,
            "shape": args.shape,
            "batch": args.batch,
            "length": args.length,
            "ceiling_tflops": ceilings,
            "rows": rows,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
