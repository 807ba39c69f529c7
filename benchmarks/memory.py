"""Estimated against measured peak memory of a training step.

    python benchmarks/memory.py                  the table, and benchmarks/results/memory_cpu.json (or memory_cuda.json)
    python benchmarks/memory.py --one NAME       one configuration, in this process, as JSON
    python benchmarks/memory.py --jobs 4         four at a time

Every configuration runs in its own process: a model built from its config with random weights, two optimiser steps
with the parts that `veneer train` uses (attach, chunked loss, clipping, fused AdamW).

    measured   CUDA: torch.cuda.max_memory_allocated.  CPU: the same thing, the sum of all allocations that torch's own
               allocator reports to its profiler, from before the model is built to after the second step. Inner
               buffers of kernels count; nothing is sampled.
    rss        beside it, on a CPU: growth of the process's high-water mark (VmHWM), which also holds heap fragments and
               code that is paged in on first use.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One configuration: the model's config and the settings of the run."""

    name: str
    config: dict[str, Any]
    settings: dict[str, Any]
    gpu: bool = False  # too large for a CPU's patience


LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3B = {
    "model_type": "llama", "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 640, "num_hidden_layers": 10, "num_attention_heads": 10,
    "num_key_value_heads": 5, "intermediate_size": 1792, "vocab_size": 8192, "tie_word_embeddings": False,
}  # fmt: skip
SMOL = {  # SmolLM2-135M, a third of its depth
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 10, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 2304, "vocab_size": 8192,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 512, "n_layer": 8, "n_head": 8, "vocab_size": 8192, "n_positions": 512}
BERT = {
    "model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 1536, "vocab_size": 30522,
}  # fmt: skip
VIT = {
    "model_type": "vit",
    "hidden_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
}
T5 = {
    "model_type": "t5", "d_model": 384, "d_ff": 1536, "num_layers": 4, "num_heads": 6, "d_kv": 64, "vocab_size": 8192,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip

CLASSIFY = "sequence_classification"


def case(
    name: str, config: dict[str, Any], batch_size: int, max_len: int, precision: str, gpu: bool = False, **more: Any
) -> Case:
    return Case(name, config, {"batch_size": batch_size, "max_len": max_len, "precision": precision, **more}, gpu)


CASES = {
    each.name: each
    for each in (
        case("llama lora fp32", SMOL, 4, 128, "fp32"),
        case("llama lora fp32 recompute", LLAMA, 8, 256, "fp32", recompute="full"),
        case("llama lora bf16 long", LLAMA, 1, 1024, "bf16"),
        case("llama full fp32", SMOL, 2, 128, "fp32", method="full"),
        case("llama full bf16", LLAMA, 2, 256, "bf16", method="full"),
        case("llama freeze last 2", LLAMA, 4, 256, "fp32", method="freeze"),
        case("qwen3 lora bf16 r64", QWEN3, 2, 512, "bf16", r=64),
        case("qwen3 dora dropout", QWEN3, 2, 256, "fp32", combine="dora", dropout=0.05),
        case("qwen3 lora q,v eager", QWEN3, 2, 512, "fp32", targets="minimal", attention="eager"),
        case("llama fused fp32", SMOL, 4, 128, "fp32", fused=True),
        case("llama fused gate_up", LLAMA, 4, 256, "fp32", fused=True, recompute="gate_up"),
        case("llama fused middle dropout", LLAMA, 4, 256, "fp32", fused=True, recompute="middle", dropout=0.1),
        case("qwen3 fused bf16 r64", QWEN3, 2, 512, "bf16", fused=True, r=64),
        case("qwen3 fused dropout", QWEN3, 4, 256, "fp32", fused=True, dropout=0.05),
        case("qwen3 fused input", QWEN3, 4, 256, "fp32", fused=True, recompute="input"),
        case("llama fused tiled", LLAMA, 1, 6000, "fp32", fused=True, recompute="tiled"),
        case("gpt2 full recompute", GPT2, 4, 256, "fp32", method="full", recompute="full"),
        case("gpt2 lora fp32", GPT2, 4, 256, "fp32"),
        case("bert lora classify", BERT, 16, 128, "fp32", task=CLASSIFY),
        case("vit lora classify", VIT, 8, 197, "fp32", task=CLASSIFY),
        case("t5 lora seq2seq", T5, 4, 128, "fp32", task="seq2seq"),
        case("8B lora bf16", LLAMA_8B, 2, 2048, "bf16", gpu=True),
        case("8B lora bf16 recompute", LLAMA_8B, 4, 2048, "bf16", gpu=True, recompute="full"),
        case("8B fused bf16", LLAMA_8B, 2, 2048, "bf16", gpu=True, fused=True),
        case("8B fused gate_up", LLAMA_8B, 4, 2048, "bf16", gpu=True, fused=True, recompute="gate_up"),
        case("8B fused middle", LLAMA_8B, 4, 2048, "bf16", gpu=True, fused=True, recompute="middle"),
        case("8B fused input", LLAMA_8B, 4, 2048, "bf16", gpu=True, fused=True, recompute="input"),
        case("8B fused offload", LLAMA_8B, 4, 2048, "bf16", gpu=True, fused=True, recompute="offload"),
        case("8B fused tiled", LLAMA_8B, 1, 32768, "bf16", gpu=True, fused=True, recompute="tiled"),
        case("8B lora bf16 r64 one row", LLAMA_8B, 1, 4096, "bf16", gpu=True, r=64),
        case("3B full bf16", LLAMA_3B, 1, 2048, "bf16", gpu=True, method="full", recompute="full"),
        case("3B lora bf16", LLAMA_3B, 1, 2048, "bf16", gpu=True, recompute="full"),
    )
}


# One configuration --------------------------------------------------------------------------------------------------


def run(case: Case) -> dict[str, Any]:
    """Two training steps, measured."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _warm(device)
    before = _high_water()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        _steps(case, device)
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = allocated_peak(lambda: _steps(case, device))
    return {"name": case.name, "device": device, "measured_bytes": peak, "rss_bytes": _high_water() - before}


def allocated_peak(work: Callable[[], None]) -> int:
    """The highest sum of live allocations that torch's CPU allocator reported while `work` ran."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # garbage of earlier work, freed while this one runs, would count as less than nothing
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _warm(device: str) -> None:
    """Load libraries and kernels, so that rss does not charge them to the model."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(
        "llama", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=64
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(device)
    model(input_ids=torch.zeros(1, 8, dtype=torch.long, device=device)).logits.sum().backward()


def _high_water() -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _steps(case: Case, device: str, count: int = 2) -> None:
    import torch

    from veneer.kernels.fuse import fuse
    from veneer.train.base import recomputing
    from veneer.train.offload import offloaded
    from veneer.train.optim import Masters, adamw, set_rate

    task = _task(case)
    model = _model(case, device, task.auto_class)
    trained = _place(case, model, task)
    masters = Masters(trained)
    optimizer = adamw(masters.values, lora_plus_ratio=1.0, weight_decay=0.0)
    set_rate(optimizer, 1e-4)
    batch = _batch(case, model, device)
    task.prepare(model, batch)
    model.config.use_cache = False  # as while training
    level, is_fused = case.settings.get("recompute", "none"), case.settings.get("fused", False)
    if is_fused:
        fuse(model, "input" if level == "offload" else level, verbose=False)
    with recomputing(model, level == "full"):
        for _ in range(count):
            away = offloaded(torch.device(device), fetches_ahead=level == "offload")
            with away if level in ("offload", "tiled") else nullcontext():
                (task.loss(model, batch) / batch.trained_tokens).backward()
            masters.collect()
            masters.clip(float(masters.gradient_norms().norm()), 1.0)
            optimizer.step()
            masters.publish()
            masters.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()


def _task(case: Case) -> Any:
    from importlib import import_module

    from veneer.tasks.base import TASKS

    name = case.settings.get("task", "causal_lm")
    import_module(f"veneer.tasks.{name}")
    task = TASKS[name]()
    if case.config["model_type"] == "vit":
        task.auto_class = "AutoModelForImageClassification"
    return task


def _model(case: Case, device: str, auto_class: str) -> Any:
    import torch
    import transformers

    settings = case.settings
    config = transformers.AutoConfig.for_model(**case.config)
    config._attn_implementation = settings.get("attention", "sdpa")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["precision"]]
    with torch.device(device):
        model = getattr(transformers, auto_class).from_config(config, dtype=dtype)
    return model.train()


def _place(case: Case, model: Any, task: Any) -> dict[str, Any]:
    """What trains, as `veneer train` sets it up."""
    from veneer.train.method import place
    from veneer.train.settings import resolve

    own = {key: value for key, value in case.settings.items() if key not in ("attention", "fused", "recompute")}
    return place(model, resolve(mapping=own).settings, task.heads(model))


def _batch(case: Case, model: Any, device: str) -> Any:
    import torch

    from veneer.data.batch import Batch

    rows, length = case.settings["batch_size"], case.settings["max_len"]
    zeros = torch.zeros(rows, dtype=torch.long, device=device)
    if case.config["model_type"] == "vit":
        pixels = torch.randn(rows, 3, 224, 224, device=device, dtype=model.dtype)
        return Batch({"pixel_values": pixels}, zeros, rows, ((length,),) * rows)
    ids = torch.randint(3, model.config.vocab_size, (rows, length), device=device)
    mask = torch.ones_like(ids)
    if rows > 1:  # rows of unequal length, as in life
        mask[0, length - 1] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "classification" in case.settings.get("task", ""):
        return Batch(inputs, zeros, rows, ((length,),) * rows)
    return Batch(inputs, ids, rows * length, ((length,),) * rows)


# All of them --------------------------------------------------------------------------------------------------------


def measure(name: str) -> dict[str, Any]:
    """One case in a process of its own, with a heap that gives large blocks back at once."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--one", name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found | _estimated(CASES[name], found["device"], found["measured_bytes"])


def _estimated(case: Case, device: str, measured: int) -> dict[str, Any]:
    from veneer.advise.memory import estimate_memory

    estimate = estimate_memory(case.config, device=device, **case.settings)
    ratio = estimate.total_bytes / measured
    return {"estimated_bytes": estimate.total_bytes, "ratio": ratio, "peak": estimate.peak, "parts": estimate.parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help="run this configuration here and print JSON")
    parser.add_argument("--only", default="", help="those whose name contains this")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(CASES[options.one])))
        return
    print(
        f"{'configuration':28} {'estimate':>10} {'measured':>10} {'ratio':>6} {'rss':>10}  peak at  (MiB)", flush=True
    )
    gpu = Path("/dev/nvidia0").exists()
    names = [name for name, each in CASES.items() if options.only in name and (gpu or not each.gpu)]
    rows = []
    for name, row in zip(names, ThreadPoolExecutor(options.jobs).map(measure, names), strict=True):
        rows.append(row)
        mib = {key: row[f"{key}_bytes"] / 2**20 for key in ("estimated", "measured", "rss")}
        sizes = f"{mib['estimated']:10.1f} {mib['measured']:10.1f} {row['ratio']:6.3f} {mib['rss']:10.1f}"
        print(f"{name:28} {sizes}  {row['peak']}", flush=True)
    _write(rows)
    held = {row["name"]: row["measured_bytes"] for row in rows}
    for name, size in held.items():
        if (full := held.get(name.replace("lora", "full"))) and "lora" in name:
            print(f"{name}: {size / full:.1%} of the memory of full fine-tuning", flush=True)


def _write(rows: list[dict[str, Any]]) -> None:
    """Into the file of results, in place of what was there of the same cases."""
    import torch
    import transformers

    device = rows[0]["device"]
    card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "device": card}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"memory_{device}.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    known = {row["name"]: row for row in (*before, *rows) if row["name"] in CASES}
    rows = [known[name] for name in CASES if name in known]
    path.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    worst = max(abs(row["ratio"] - 1) for row in rows)
    print(f"largest error {100 * worst:.1f} % over {len(rows)} configurations; {path}")


if __name__ == "__main__":
    main()
