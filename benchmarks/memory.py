"""Estimated against measured peak memory of a training step.

    python benchmarks/memory.py                  the table, and benchmarks/results/memory_cpu.json (or memory_cuda.json)
    python benchmarks/memory.py --one NAME       one configuration, in this process, as JSON

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
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One configuration: the model's config and the settings of the run."""

    name: str
    config: dict[str, Any]
    settings: dict[str, Any]
    tokens: int = 0
    spec: dict[str, Any] = field(default_factory=dict)


LLAMA = {
    "model_type": "llama", "hidden_size": 640, "num_hidden_layers": 10, "num_attention_heads": 10, "num_key_value_heads": 5,
    "intermediate_size": 1792, "vocab_size": 8192, "tie_word_embeddings": False,
}  # fmt: skip
SMOL = {  # SmolLM2-135M, a third of its depth
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 10, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 12, "num_key_value_heads": 4,
    "head_dim": 64, "intermediate_size": 2304, "vocab_size": 8192, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 512, "n_layer": 8, "n_head": 8, "vocab_size": 8192, "n_positions": 512}
BERT = {
    "model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536,
    "vocab_size": 30522,
}  # fmt: skip
VIT = {"model_type": "vit", "hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "intermediate_size": 1536}
T5 = {
    "model_type": "t5", "d_model": 384, "d_ff": 1536, "num_layers": 4, "num_heads": 6, "d_kv": 64, "vocab_size": 8192,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip

CASES = {
    case.name: case
    for case in (
        Case("llama lora fp32", SMOL, {"batch_size": 4, "max_len": 128, "precision": "fp32"}),
        Case("llama lora fp32 recompute", LLAMA, {"batch_size": 8, "max_len": 256, "precision": "fp32", "recompute": "full"}),
        Case("llama lora bf16 long", LLAMA, {"batch_size": 1, "max_len": 1024, "precision": "bf16"}),
        Case("llama full fp32", SMOL, {"batch_size": 2, "max_len": 128, "precision": "fp32", "method": "full"}),
        Case("qwen3 lora bf16 r64", QWEN3, {"batch_size": 2, "max_len": 512, "precision": "bf16", "r": 64}),
        Case("qwen3 dora dropout", QWEN3, {"batch_size": 2, "max_len": 256, "precision": "fp32", "combine": "dora", "dropout": 0.05}),
        Case("qwen3 lora q,v eager", QWEN3, {"batch_size": 2, "max_len": 512, "precision": "fp32", "targets": "minimal", "attention": "eager"}),
        Case("gpt2 full recompute", GPT2, {"batch_size": 4, "max_len": 256, "precision": "fp32", "method": "full", "recompute": "full"}),
        Case("gpt2 lora fp32", GPT2, {"batch_size": 4, "max_len": 256, "precision": "fp32"}),
        Case("bert lora classify", BERT, {"batch_size": 16, "max_len": 128, "precision": "fp32", "task": "sequence_classification"}),
        Case("vit lora classify", VIT, {"batch_size": 8, "max_len": 197, "precision": "fp32", "task": "sequence_classification"}),
        Case("llama freeze last 2", LLAMA, {"batch_size": 4, "max_len": 256, "precision": "fp32", "method": "freeze"}),
        Case("t5 lora seq2seq", T5, {"batch_size": 4, "max_len": 128, "precision": "fp32", "task": "seq2seq"}),
    )
}  # fmt: skip


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

    from veneer.train.optim import adamw, clip_, gradient_norms, set_rate

    model = _model(case, device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = adamw(trained, lora_plus_ratio=1.0, weight_decay=0.0)
    set_rate(optimizer, 1e-4)
    batch = _batch(case, model, device)
    for _ in range(count):
        _loss(model, batch).backward()
        clip_(trained.values(), float(gradient_norms(trained.values()).norm()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()


def _model(case: Case, device: str) -> Any:
    import torch
    import transformers

    from veneer.core.model import attach
    from veneer.core.spec import LoRA

    settings = case.settings
    kind = {"sequence_classification": "AutoModelForSequenceClassification", "seq2seq": "AutoModelForSeq2SeqLM"}
    task = kind.get(settings.get("task", ""), "AutoModelForCausalLM")
    task = "AutoModelForImageClassification" if case.config["model_type"] == "vit" else task
    config = transformers.AutoConfig.for_model(**case.config)
    config._attn_implementation = settings.get("attention", "sdpa")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["precision"]]
    with torch.device(device):
        model = getattr(transformers, task).from_config(config, dtype=dtype)
    model.train()
    if settings.get("recompute") == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    method = settings.get("method", "lora")
    if method == "lora":
        whole = ["classifier"] if "classification" in settings.get("task", "") else []
        own = {"rank": settings.get("r", 16), "alpha": 32, "targets": settings.get("targets", "all-linear")}
        own |= {key: settings[key] for key in ("dropout", "combine") if key in settings}
        attach(model, LoRA(**own, modules_to_save=whole), dtype=torch.float32)
    elif method == "freeze":
        model.requires_grad_(False)
        for block in model.model.layers[-2:]:
            block.requires_grad_(True)
        model.model.norm.requires_grad_(True)
    return model


def _batch(case: Case, model: Any, device: str) -> dict[str, Any]:
    import torch

    rows, length = case.settings["batch_size"], case.settings["max_len"]
    classify = "classification" in case.settings.get("task", "")
    if case.config["model_type"] == "vit":
        pixels = torch.randn(rows, 3, 224, 224, device=device, dtype=model.dtype)
        return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.long, device=device)}
    ids = torch.randint(3, case.config["vocab_size"], (rows, length), device=device)
    mask = torch.ones_like(ids)
    if rows > 1:  # rows of unequal length, as in life
        mask[0, length - 1] = 0
    labels = torch.zeros(rows, dtype=torch.long, device=device) if classify else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _loss(model: Any, batch: dict[str, Any]) -> Any:
    from veneer.train.loss import chunked_cross_entropy, head_split

    inputs = {key: value for key, value in batch.items() if key != "labels"}
    split = head_split(model, inputs) if model.get_output_embeddings() is not None else None
    if split is None or split.body is None or split.head is None:
        return model(**batch).loss
    hidden = split.body(**inputs)[0]
    labels = batch["labels"][:, 1:]
    return chunked_cross_entropy(hidden[:, :-1], labels, split.head) / labels.numel()


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
    parser.add_argument("--only", help="those whose name contains this")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(CASES[options.one])))
        return
    print(f"{'configuration':28} {'estimate':>10} {'measured':>10} {'ratio':>6} {'rss':>10}  peak at  (MiB)", flush=True)
    rows = []
    for name in CASES:
        if options.only and options.only not in name:
            continue
        row = measure(name)
        rows.append(row)
        mib = {key: row[f"{key}_bytes"] / 2**20 for key in ("estimated", "measured", "rss")}
        print(
            f"{name:28} {mib['estimated']:10.1f} {mib['measured']:10.1f} {row['ratio']:6.3f} {mib['rss']:10.1f}  {row['peak']}",
            flush=True,
        )
    if not options.only:
        _write(rows)


def _write(rows: list[dict[str, Any]]) -> None:
    import torch
    import transformers

    device = rows[0]["device"]
    card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "device": card}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"memory_{device}.json"
    path.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    worst = max(abs(row["ratio"] - 1) for row in rows)
    print(f"largest error {100 * worst:.1f} % over {len(rows)} configurations; {path}")


if __name__ == "__main__":
    main()
