"""Images per second and peak memory of a LoRA training step of an SDXL- or FLUX-shaped model on one GPU, beside
diffusers + PEFT.

    python benchmarks/sdxl_gpu.py [--shape sdxl] [--batch 4] [--json FILE] [--profile FOLDER] [VARIANT ...]
    python benchmarks/sdxl_gpu.py --shape flux --batch 2 peft peft-compiled plain fused

sdxl: random weights of SDXL's UNet (2.6 billion), latents of 1024 x 1024 pixels (128 x 128 x 4), 77 words of text,
r = 16 on q, k, v and out of every attention, as diffusers' own training script has it; noise prediction, AdamW.
flux: blocks as wide as FLUX.1's (3072), 4 + 8 of its 19 + 38, 4,096 places of an image of 1024 x 1024 pixels and 512
words, r = 16 on the layers of diffusers' script (attention, and the units of two-stream blocks).
Nothing is computed twice: all of it fits.

    peft             diffusers' training script: adapters in fp32 on a bf16 base, under autocast
    peft-bf16        adapters in bf16, no autocast
    peft-compiled    the same, its transformer blocks compiled (compile_repeated_blocks, as diffusers recommends)
    peft-compiled+   its residual blocks compiled, too, channels last in memory
    plain            veneer.attach
    fused            veneer.attach, veneer.fuse
    fused-gate_up    the same, the unit's gate and up computed again
    fused-graphs     the same as fused, its blocks recorded as CUDA graphs (graphs=True)

FLUX by itself dies of an illegal memory access on Hopper with torch 2.11 (kernels/even.py says why), Veneer's plain
layers and PEFT's alike. So that there is something to compare with, all variants that run by diffusers' own
forward are given even gradients; --as-it-is leaves that out. What dies all the same is run once more without cuDNN's
attention. Each row says which attention ran.

All start from A drawn alike (diffusers' script draws PEFT's four times as large). Every variant runs in a process of
its own: the median of `--steps` steps that follow each other without a wait, the seconds of the warm-up (compilation
among them) apart, peaks allocated and reserved (what CUDA graphs hold counts whole), and the loss of every step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_gpu import ceiling, peak_memory

SHAPES: dict[str, dict[str, Any]] = {
    "sdxl": {"side": 128, "text": 2048, "pooled": 1280, "words": 77},
    "tiny": {"side": 16, "text": 32, "pooled": 32, "words": 7},
    "flux": {
        "side": 64,
        "text": 4096,
        "pooled": 768,
        "words": 512,
        "layers": (4, 8),
        "heads": 24,
        "axes": (16, 56, 56),
    },
    "flux-tiny": {"side": 8, "text": 32, "pooled": 32, "words": 7, "layers": (1, 2), "heads": 2, "axes": (4, 4, 8)},
}
TINY: dict[str, Any] = {
    "cross_attention_dim": 32, "attention_head_dim": [2, 4, 4], "block_out_channels": [32, 64, 64],
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
    "transformer_layers_per_block": [1, 1, 2],
}  # fmt: skip
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
FLUX_TARGETS = [
    *(f"attn.{name}" for name in TARGETS), *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")),
    "attn.to_add_out", *(f"{unit}.net.{layer}" for unit in ("ff", "ff_context") for layer in ("0.proj", "2")),
]  # fmt: skip
CUDA = torch.cuda.is_available()


def is_flux(shape: str) -> bool:
    return shape.startswith("flux")


def empty(shape: str) -> nn.Module:
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    from veneer.ckpt.unets import SDXL

    if not is_flux(shape):
        return UNet2DConditionModel.from_config(SDXL | (TINY if shape == "tiny" else {}))
    size = SHAPES[shape]
    return FluxTransformer2DModel(
        num_layers=size["layers"][0], num_single_layers=size["layers"][1], num_attention_heads=size["heads"],
        attention_head_dim=sum(size["axes"]), axes_dims_rope=size["axes"], joint_attention_dim=size["text"],
        pooled_projection_dim=size["pooled"], guidance_embeds=True,
    )  # fmt: skip


def targets(shape: str) -> list[str]:
    return FLUX_TARGETS if is_flux(shape) else TARGETS


def base(shape: str, device: str) -> nn.Module:
    with torch.device("meta"):
        model = empty(shape).bfloat16()
    model = model.to_empty(device=device)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
        else:
            nn.init.constant_(p, float(name.endswith("weight")))
    return model.requires_grad_(False).train()


def peft(shape: str, device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    from peft import LoraConfig

    model: Any = base(shape, device)
    model.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=targets(shape)))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)
    return model


def peft_usual(shape: str, device: str) -> nn.Module:
    return peft(shape, device, torch.float32)


def peft_compiled(shape: str, device: str) -> nn.Module:
    torch._dynamo.config.recompile_limit = 64
    model: Any = peft(shape, device)
    model.compile_repeated_blocks(dynamic=False)
    return model


def peft_compiled_more(shape: str, device: str) -> nn.Module:
    model = peft_compiled(shape, device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.modules():
        if type(module).__name__ == "ResnetBlock2D":
            module.compile(dynamic=False)
    return model


def plain(shape: str, device: str) -> nn.Module:
    import veneer
    from veneer import LoRA

    model = base(shape, device)
    veneer.attach(model, LoRA(rank=16, alpha=16, targets=targets(shape)))
    return model


def fused(recompute: str, graphs: bool = False) -> Callable[[str, str], nn.Module]:
    def build(shape: str, device: str) -> nn.Module:
        import veneer

        model = plain(shape, device)
        report = veneer.fuse(model, recompute, graphs=graphs, verbose=False)
        print(report, file=sys.stderr)
        return model

    return build


VARIANTS: dict[str, Callable[[str, str], nn.Module]] = {
    "peft": peft_usual,
    "peft-bf16": peft,
    "peft-compiled": peft_compiled,
    "peft-compiled+": peft_compiled_more,
    "plain": plain,
    "fused": fused("none"),
    "fused-gate_up": fused("gate_up"),
    "fused-graphs": fused("none", graphs=True),
}
USUAL = ("peft", "peft-bf16", "peft-compiled", "plain", "fused", "fused-gate_up", "fused-graphs")


def inputs(args: argparse.Namespace, device: str) -> dict[str, Any]:
    size, n = SHAPES[args.shape], args.batch
    draw = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, torch.bfloat16)

    if is_flux(args.shape):
        side, words = size["side"], size["words"]
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack([torch.zeros(side * side), rows.flatten(), columns.flatten()], dim=1)
        return {
            "hidden_states": rand(n, side * side, 64),
            "timestep": torch.rand(n, generator=draw).to(device, torch.bfloat16),
            "guidance": torch.ones(n, device=device),
            "encoder_hidden_states": rand(n, words, size["text"]),
            "pooled_projections": rand(n, size["pooled"]),
            "img_ids": places.to(device),
            "txt_ids": torch.zeros(words, 3, device=device),
            "noise": rand(n, side * side, 64),
        }
    return {
        "sample": rand(n, 4, size["side"], size["side"]),
        "timestep": torch.randint(0, 1000, (n,), generator=draw).to(device),
        "encoder_hidden_states": rand(n, size["words"], size["text"]),
        "added_cond_kwargs": {
            "text_embeds": rand(n, size["pooled"]),
            "time_ids": torch.full((n, 6), 1024.0).to(device),
        },
        "noise": rand(n, 4, size["side"], size["side"]),
    }


def stepper(name: str, model: nn.Module, given: dict[str, Any]) -> Callable[[], Tensor]:
    """One training step, which returns its loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True, capturable=CUDA)
    noise = given.pop("noise").float()
    device = noise.device.type

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=name == "peft"):
            found = model(**given, return_dict=False)[0]
        loss = F.mse_loss(found.float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    from veneer.kernels.even import even_gradients

    device = "cuda" if CUDA else "cpu"
    started = time.perf_counter()
    model = VARIANTS[name](args.shape, device)
    torch.backends.cuda.enable_cudnn_sdp(not args.no_cudnn)
    with nullcontext(0) if args.as_it_is else even_gradients(model) as evened:
        return timed(args, name, model, started) | {"evened": evened}


def timed(args: argparse.Namespace, name: str, model: nn.Module, started: float) -> dict[str, Any]:
    device = "cuda" if CUDA else "cpu"
    built = time.perf_counter()
    step = stepper(name, model, inputs(args, device))
    losses = [step() for _ in range(args.warmup)]
    synchronize()
    warm = time.perf_counter()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    marks = [mark()]
    for _ in range(args.steps):
        losses.append(step())
        marks.append(mark())
    handed = time.perf_counter()
    synchronize()
    seconds = [between(*pair) for pair in pairwise(marks)]
    peaks = peak_memory() if CUDA else (0, 0)
    found = kernels(step)
    if args.profile:
        profile_table(found, args.profile / f"{name}.txt")
    return {
        "variant": name,
        "attention": attention_of(found),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "images_per_second": args.batch / statistics.median(seconds),
        "peak_gib": peaks[0] / 2**30,
        "reserved_gib": peaks[1] / 2**30,
        "build_seconds": built - started,
        "warmup_seconds": warm - built,
        "host_seconds": (handed - warm) / args.steps,  # in which Python hands out a step
        "losses": [float(loss) for loss in losses],
        "seconds": seconds,
    }


def mark() -> Any:
    """The moment at which the device gets here; nobody waits for it in between, as in a real run."""
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(one: Any, other: Any) -> float:
    return one.elapsed_time(other) / 1e3 if CUDA else other - one


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def kernels(step: Callable[[], Tensor]) -> Any:
    """What two steps ask the device for, by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA] if CUDA else [ProfilerActivity.CPU]) as found:
        step()
        step()
        synchronize()
    return found.key_averages()


def profile_table(found: Any, where: Path) -> None:
    order = "self_cuda_time_total" if CUDA else "self_cpu_time_total"
    where.write_text(found.table(sort_by=order, row_limit=60, max_name_column_width=130))


ATTENTIONS = {"cudnn_generated": "cuDNN", "flash_fwd": "flash", "flash_bwd": "flash", "fmha_cutlass": "efficient"}


def attention_of(found: Any) -> list[str]:
    """Whose kernels compute the attention."""
    names = [row.key for row in found]
    return sorted({whose for part, whose in ATTENTIONS.items() if any(part in name for name in names)})


def apart(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """One variant in a process of its own; what went wrong, where something did."""
    same = [f"--{k}={getattr(args, k)}" for k in ("shape", "batch", "steps", "warmup")]
    same += ["--as-it-is"] * args.as_it_is + ["--no-cudnn"] * args.no_cudnn
    if args.profile:
        args.profile.mkdir(parents=True, exist_ok=True)
        same.append(f"--profile={args.profile}")
    done = subprocess.run([sys.executable, __file__, name, "--one", *same], capture_output=True, text=True)
    if done.returncode and "illegal memory access" in done.stderr and not args.no_cudnn:
        without = apart(argparse.Namespace(**vars(args) | {"no_cudnn": True}), name)
        return without | {"died": "of an illegal memory access with cuDNN's attention; this row is without it"}
    if done.returncode:
        return {"variant": name, "failed": done.stderr[-3000:]}
    said = [line for line in done.stderr.splitlines() if line.startswith(("fused:", "plain:"))]
    return json.loads(done.stdout.strip().splitlines()[-1]) | ({"said": said} if said else {})


def shown(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['variant']}: failed{' again' * ('died' in row)}\n{row['failed']}"
    line = (
        f"{row['variant']:15} {row['images_per_second']:7.2f} images/s  {row['peak_gib']:6.2f} GiB "
        f"(reserved {row['reserved_gib']:.1f})  host {1e3 * row['host_seconds']:.0f} ms  "
        f"build {row['build_seconds']:.0f} s, warm-up {row['warmup_seconds']:.0f} s  "
        f"loss {row['losses'][0]:.4f} -> {row['losses'][-1]:.4f}"
    )
    how = f"attention: {', '.join(row['attention']) or 'of no kernel known here'}"
    how += f", {row['evened']} given even gradients" if row["evened"] else ""
    died = [f"died {row['died']}"] if "died" in row else []
    return "\n  ".join([line, how, *died, *row.get("said", [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variants", nargs="*", choices=[[], *VARIANTS])
    parser.add_argument("--shape", choices=SHAPES, default="sdxl")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path, help="write every variant's kernels and their times there")
    parser.add_argument("--as-it-is", action="store_true", help="leave the gradients of attention as they lie")
    parser.add_argument("--no-cudnn", action="store_true", help="without cuDNN's attention")
    parser.add_argument("--one", action="store_true", help="measure in this process and print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, args.variants[0])))
        return
    before, rows = ceiling(), []
    for name in args.variants or USUAL:
        rows.append(apart(args, name))
        print(shown(rows[-1]), flush=True)
        keep(args, [before], rows)
    after = ceiling()
    keep(args, [before, after], rows)
    print(f"matrix product: {before:.0f} TFLOP/s before, {after:.0f} after")


def keep(args: argparse.Namespace, ceilings: list[float], rows: list[dict[str, Any]]) -> None:
    """What is measured by now: a run that is cut off has lost only what it had not finished."""
    if not args.json:
        return
    record = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if CUDA else f"{os.cpu_count()} cores",
        "torch": torch.__version__,
        "shape": args.shape,
        "batch": args.batch,
        "ceiling_tflops": ceilings,
        "rows": rows,
    }
    args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
