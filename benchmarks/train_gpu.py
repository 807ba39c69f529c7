"""Tokens per second and peak memory of a LoRA training step on one GPU, beside PEFT and the frozen model.

    python benchmarks/train_gpu.py [--shape 8b] [--batch 2] [--length 2048] [--json FILE] [VARIANT ...]

Random weights of the true shape, random tokens, r = 16 on all seven linears of every layer, fused AdamW. The median of
`--steps` steps after `--warmup`, the seconds of the warm-up apart, the peak as the allocator saw it, and the card's own
matrix product in the same run. Every variant runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(shape: str, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], use_cache=False, attn_implementation="sdpa")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model = model.to_empty(device=device)
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.ones_(p)
    for module in model.modules():
        if hasattr(module, "original_inv_freq"):  # not a parameter: to_empty left it without values
            module.inv_freq, module.attention_scaling = module.compute_default_rope_parameters(config, device=device)
            module.original_inv_freq = module.inv_freq
    return model.train()


def veneer_model(shape: str, device: str) -> nn.Module:
    import veneer
    from veneer import LoRA

    model = base(shape, device)
    veneer.attach(model, LoRA(rank=16, alpha=32, targets=TARGETS))
    return model


def peft_model(shape: str, device: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        base(shape, device),
        LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS),
        autocast_adapter_dtype=False,
    )


def plain_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def chunked_loss(model: nn.Module, ids: Tensor) -> Tensor:
    from veneer.tasks.cross_entropy import chunked_cross_entropy

    hidden = model.model(input_ids=ids)[0]
    return chunked_cross_entropy(hidden[:, :-1], ids[:, 1:], model.lm_head) / ids[:, 1:].numel()


def compiled(model: nn.Module) -> nn.Module:
    layers = next(m for n, m in model.named_modules() if n.endswith("model.layers") or n.endswith(".layers"))
    for layer in layers:
        layer.compile()
    return model


Variant = tuple[Callable[[str, str], nn.Module], Callable[[nn.Module, Tensor], Tensor]]
VARIANTS: dict[str, Variant] = {
    "peft": (peft_model, plain_loss),
    "peft-compiled": (lambda s, d: compiled(peft_model(s, d)), lambda m, i: chunked_loss(m.base_model.model, i)),
    "veneer": (veneer_model, plain_loss),
    "veneer-chunked": (veneer_model, chunked_loss),
    "veneer-compiled": (lambda s, d: compiled(veneer_model(s, d)), chunked_loss),
}  # fmt: skip


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    build, loss_of = VARIANTS[name]
    model = build(args.shape, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, SHAPES[args.shape]["vocab_size"], (args.batch, args.length), device=device)
    started, seconds = time.perf_counter(), []
    for i in range(args.warmup + args.steps):
        synchronize()
        if i == args.warmup:
            warm = time.perf_counter() - started
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        if i >= args.warmup:
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    return {
        "variant": name,
        "trained": sum(p.numel() for p in trained),
        "tokens_per_second": ids.numel() / statistics.median(seconds),
        "peak_gib": peak,
        "warmup_seconds": warm,
        "loss": float(loss.detach()),
        "seconds": seconds,
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variants", nargs="*", choices=[[], *VARIANTS])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", action="store_true", help="measure in this process and print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, args.variants[0])))
        return
    rows = []
    for name in args.variants or VARIANTS:
        same = [f"--{k}={getattr(args, k)}" for k in ("shape", "batch", "length", "steps", "warmup")]
        done = subprocess.run([sys.executable, __file__, name, "--one", *same], capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: failed\n{done.stderr[-2000:]}", flush=True)
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        rows.append(row)
        print(
            f"{name:18} {row['tokens_per_second']:10,.0f} tokens/s  {row['peak_gib']:6.2f} GiB  "
            f"warm-up {row['warmup_seconds']:.0f} s  loss {row['loss']:.4f}",
            flush=True,
        )
    top = ceiling()
    print(f"matrix product: {top:.0f} TFLOP/s")
    if args.json:
        record = {"command": sys.argv, "torch": torch.__version__, "ceiling_tflops": top, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
