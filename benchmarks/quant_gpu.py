"""A packed base on one GPU: kernels against their references, tokens a second, and models under a memory cap.

    python benchmarks/quant_gpu.py [--json FILE] [--only NAME ...] [--tiny]

Random weights of the true shapes, packed layer by layer as they are made; random tokens; r = 16 (8 where the case says
so) on all seven linears of every layer; fused blocks (veneer.fuse), eager. A step is forward, backward and the
optimiser. Tokens a second are the median of the steps after the warm-up, the peak is the allocator's. A capped case
runs with the allocator held to the cap less 0.5 GiB for the CUDA context, and fails where it needs more. The
allocator's segments may grow (PYTORCH_ALLOC_CONF=expandable_segments:True, unless something else is said): under a cap,
pieces that are free but too small are what runs out first.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {  # hidden, mlp, layers, heads, kv heads, vocabulary
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "33b": (6656, 17920, 60, 52, 52, 32000),
    "70b": (8192, 28672, 80, 64, 8, 128256),
    "tiny": (64, 128, 2, 4, 2, 512),
}
CONTEXT_GIB = 0.5
ALLOCATOR, GROWING = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True"  # new name, old name


@dataclass(frozen=True)
class Case:
    shape: str
    storage: str  # none nf4 int8 fp8
    batch: int
    length: int
    recompute: str = "none"
    embedding: bool = False  # packed, too
    head: bool = False  # packed, too
    optimizer: str = "adamw"
    offload: bool = False  # what blocks keep lies in host memory
    rank: int = 16
    cap_gib: float | None = None
    steps: int = 4

    @property
    def _extras(self) -> tuple[tuple[str, bool], ...]:
        return ("embedding", self.embedding), ("head", self.head), ("offload", self.offload)

    @property
    def name(self) -> str:
        more = "".join(f" {word}" for word, on in self._extras if on)
        more += "" if self.rank == 16 else f" r{self.rank}"
        optimizer = "" if self.optimizer == "adamw" else f" {self.optimizer}"
        return f"{self.shape} {self.storage} {self.batch}x{self.length} {self.recompute}{more}{optimizer}"


CASES = [
    Case("8b", "none", 2, 2048),
    Case("8b", "fp8", 2, 2048),
    Case("8b", "int8", 2, 2048),
    Case("8b", "nf4", 2, 2048),
    Case("8b", "none", 4, 2048, "input"),
    Case("8b", "fp8", 4, 2048, "input"),
    Case("8b", "nf4", 4, 2048, "input"),
    Case("8b", "nf4", 4, 2048, "input", embedding=True, offload=True),
    Case("8b", "int8", 4, 2048, "input"),
    Case("7b", "none", 1, 2048, "input", cap_gib=16, steps=3),
    Case("7b", "nf4", 1, 2048, "input", embedding=True, cap_gib=8, steps=3),
    Case("13b", "nf4", 1, 1024, "input", True, True, "adamw_host", offload=True, rank=8, cap_gib=8, steps=3),
    Case("13b", "nf4", 1, 1024, "input", True, True, "adamw8bit", offload=True, rank=8, cap_gib=8, steps=3),
    Case("13b", "nf4", 1, 1024, "input", True, True, "adamw_host", offload=True, cap_gib=8, steps=3),
    Case("33b", "nf4", 1, 2048, "input", embedding=True, optimizer="adamw8bit", cap_gib=24, steps=3),
    Case("70b", "nf4", 1, 2048, "input", embedding=True, optimizer="adamw8bit", offload=True, cap_gib=48, steps=3),
]


# --- a step ----------------------------------------------------------------------------------------------------------


def stored_as(kind: str) -> Any:
    """fp8 as it is: some per cent faster than turned, and less exact (docs/quantisation.md)."""
    from veneer.quant.storage import Recipe

    return Recipe(kind, rotate=kind == "int8")


def build(case: Case, device: torch.device) -> nn.Module:
    """The model, one layer at a time: no more than one weight is there in full before it is packed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from veneer.core.select import ends_with
    from veneer.quant.layer import pack_layer

    hidden, mlp, layers, heads, kv, vocab = SHAPES[case.shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocab, use_cache=False, attn_implementation="sdpa",
        max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    torch.manual_seed(0)
    for name, layer in model.named_modules():
        for key, p in layer._parameters.items():
            if p is not None:
                w = torch.empty(p.shape, dtype=p.dtype, device=device)
                nn.init.normal_(w, std=0.02) if p.ndim > 1 else nn.init.ones_(w)
                layer._parameters[key] = nn.Parameter(w, requires_grad=False)
        ends = (case.embedding and isinstance(layer, nn.Embedding)) or (case.head and name == "lm_head")
        if (ends or any(ends_with(name, t) for t in TARGETS)) and case.storage != "none":
            pack_layer(layer, stored_as(case.storage), None, None)
        if hasattr(layer, "original_inv_freq"):  # not a parameter, and made on the meta device
            layer.inv_freq, layer.attention_scaling = layer.compute_default_rope_parameters(config, device=device)
            layer.original_inv_freq = layer.inv_freq
    return model.train()


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    import veneer
    from veneer import LoRA
    from veneer.kernels.fuse import fuse
    from veneer.quant.model import weight_bytes
    from veneer.tasks.cross_entropy import chunked_cross_entropy
    from veneer.train.offload import offloaded
    from veneer.train.optim import adamw

    started = time.perf_counter()
    model = build(case, device)
    weights = weight_bytes(model)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what building left in pieces
    attached = veneer.attach(model, LoRA(rank=case.rank, alpha=2 * case.rank, targets=TARGETS))
    fused = fuse(model, case.recompute, verbose=False)
    optimizer = adamw({n: p for n, p in model.named_parameters() if p.requires_grad}, kind=case.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    ids = torch.randint(0, SHAPES[case.shape][-1], (case.batch, case.length), device=device)
    rows = 2048 if case.cap_gib is None else 512
    built, seconds, losses = time.perf_counter() - started, [], []
    warmup = 2
    for i in range(warmup + case.steps):
        synchronize(device)
        if i == warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with offloaded(device) if case.offload else nullcontext():
            hidden = model.model(input_ids=ids)[0]
            loss = chunked_cross_entropy(hidden[:, :-1], ids[:, 1:], model.lm_head, rows) / ids[:, 1:].numel()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        if i >= warmup:
            seconds.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    cuda = device.type == "cuda"
    return {
        "tokens_per_second": ids.numel() / statistics.median(seconds),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0,
        "weights_gib": weights / 2**30,
        "trained": attached.trainable,
        "fused": dict(fused.replaced),
        "not_fused": dict(list(fused.skipped.items())[:3]),
        "build_seconds": built,
        "losses": losses,
        "seconds": seconds,
    }


def run_case(case: Case, device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        share = 1.0 if case.cap_gib is None else (case.cap_gib - CONTEXT_GIB) * 2**30 / total
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
    row: dict[str, Any] = {"case": case.name, **asdict(case)}
    try:
        row |= measure(case, device)
        cap = f"  cap {case.cap_gib:g}" if case.cap_gib is not None else ""
        print(
            f"{case.name:42} {row['tokens_per_second']:9,.0f} tokens/s  peak {row['peak_gib']:6.2f} GiB  weights "
            f"{row['weights_gib']:6.2f}{cap}  loss {row['losses'][-1]:.3f}  "
            f"fused {row['fused']} {row['not_fused'] or ''}  "
            f"built {row['build_seconds']:.0f} s",
            flush=True,
        )
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
        print(f"{case.name:42} FAILED {row['error'][:300]}\n{traceback.format_exc()[-1500:]}", flush=True)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
    return row


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- kernels ---------------------------------------------------------------------------------------------------------


def median_ms(f: Any) -> float:
    for _ in range(3):
        f()
    times = []
    for _ in range(20):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        f()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    return statistics.median(times)


def apart(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def kernels(device: torch.device) -> dict[str, Any]:
    """Each kernel against its reference on random data, then its time and bandwidth."""
    from veneer.quant.cuda import quantize_rows_kernel, turn, unpack_with
    from veneer.quant.eight import quantize_plain
    from veneer.quant.layer import Packed  # noqa: F401 - registers the storages
    from veneer.quant.nf4 import unpack_plain
    from veneer.quant.storage import Recipe, storage_of

    found: dict[str, Any] = {}
    for shape in [(33, 40), (7, 13), (1024, 300), (4096, 14336)]:
        for double in (True, False):
            w = torch.randn(shape, device=device)
            recipe = Recipe("nf4", double=double)
            parts = storage_of(recipe).pack(w, recipe)
            cpu = storage_of(recipe).pack(w.cpu(), recipe)
            same = float((parts[0].cpu() != cpu[0]).float().mean())
            for dtype in (torch.float32, torch.bfloat16):
                got = storage_of(recipe).unpack(parts, shape, dtype, recipe)
                wanted = unpack_plain(parts, 64, w.numel(), dtype).view(shape)
                off = float((got != wanted).float().mean())
                row = {"differs": off, "apart": apart(got, wanted), "codes_off_cpu": same}
                found[f"nf4 {shape} double={double} {dtype}"] = row
    x = torch.randn(333, 4096, device=device, dtype=torch.bfloat16)
    columns = torch.rand(4096, device=device)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        for scale in (None, columns):
            got, wanted = quantize_rows_kernel(x, dtype, scale), quantize_plain(x, dtype, scale)
            off = (got[0].float() != wanted[0].float()).float().mean()
            found[f"rows {dtype} folded={scale is not None}"] = {
                "differs": float(off),
                "apart": apart(got[1], wanted[1]),
            }
    codes = torch.randint(0, 256, (300, 1000), dtype=torch.uint8, device=device)
    found["turn"] = {"differs": float((turn(codes) != codes.T).float().mean())}

    w = torch.randn(14336, 4096, device=device, dtype=torch.bfloat16) * 0.02
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    g = torch.randn(4096, 14336, device=device, dtype=torch.bfloat16)
    exact, exact_back = x.double() @ w.double().T, g.double() @ w.double()
    size = (14336, 4096)
    times = {"bf16": {"forward_ms": median_ms(lambda: x @ w.T), "back_ms": median_ms(lambda: g @ w)}}
    for kind in ("nf4", "int8", "fp8"):
        recipe = stored_as(kind)
        storage = storage_of(recipe)
        parts = storage.pack(w, recipe)
        times[kind] = {
            "forward_ms": median_ms(lambda s=storage, p=parts, r=recipe: s.product(x, p, size, r)),
            "back_ms": median_ms(lambda s=storage, p=parts, r=recipe: s.product_back(g, p, size, r)),
            "unpack_ms": median_ms(lambda s=storage, p=parts, r=recipe: s.unpack(p, size, torch.bfloat16, r)),
            "forward_apart": apart(storage.product(x, parts, size, recipe), exact),
            "back_apart": apart(storage.product_back(g, parts, size, recipe), exact_back),
        }
    n = w.numel()
    times["nf4"]["unpack_gb_per_second"] = n * (2 + 0.516) / times["nf4"]["unpack_ms"] / 1e6
    times["nf4"]["unpack_8b_ms"] = 6.98e9 / n * times["nf4"]["unpack_ms"]
    recipe = Recipe("nf4")
    packed = list(storage_of(recipe).pack(w, recipe))
    for weights in (1024, 2048, 4096, 8192):
        for warps in (2, 4, 8):
            call = lambda a=weights, b=warps: unpack_with(packed, 64, n, torch.bfloat16, a, b)  # noqa: E731
            times[f"nf4 {weights} {warps}"] = {"unpack_ms": median_ms(call)}
    for name, call in (
        ("quantize_rows", lambda: quantize_rows_kernel(g, torch.float8_e4m3fn)),
        ("turn", lambda c=parts[0]: turn(c)),
        ("copy", lambda: x.clone()),
    ):
        times[name] = {"ms": median_ms(call)}
    found["times"] = times
    for name, row in found.items():
        if name != "times" and (row.get("apart", 0) > 1e-6 or row.get("codes_off_cpu", 0) > 1e-5):
            print(f"kernel off: {name} {row}")
    for name, row in times.items():
        print(f"{name:14} " + "  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    found["ceiling_tflops"] = 2 * 8192**3 / median_ms(lambda: a @ b) / 1e9
    print(f"matrix product 8192^3: {found['ceiling_tflops']:.0f} TFLOP/s", flush=True)
    return found


RESULTS = Path(__file__).parent / "results" / "quant_gpu.json"
PAGE = Path(__file__).parent.parent / "docs" / "quantisation.md"
BEGIN, END = "<!-- table: python benchmarks/quant_gpu.py --write -->", "<!-- end of the second table -->"


def table() -> str:
    """Of every case the last run that finished."""
    cases = {c["case"]: c for run in json.loads(RESULTS.read_text())["runs"] for c in run["cases"] if "error" not in c}
    lines = [
        "| model | base | batch | kept | embedding | Adam | offload | cap GiB | tokens/s | peak GiB | weights GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for c in cases.values():
        base = "bf16" if c["storage"] == "none" else c["storage"]
        ends = " + head" if c.get("head") else ""
        ends = base + ends if c["embedding"] else "bf16"
        cap = f"{c['cap_gib']:g}" if c["cap_gib"] else "-"
        rank = f", r = {c['rank']}" if c.get("rank", 16) != 16 else ""
        kept = {"none": "all", "input": "inputs of blocks"}[c["recompute"]]
        lines.append(
            f"| {c['shape']}{rank} | {base} | {c['batch']} x {c['length']} | {kept} | {ends} | {c['optimizer']} | "
            f"{'yes' if c['offload'] else 'no'} | {cap} | {c['tokens_per_second']:,.0f} | {c['peak_gib']:.2f} | "
            f"{c['weights_gib']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of cases; 'kernels' for the kernels")
    parser.add_argument("--tiny", action="store_true", help="every case on a tiny shape, to see that it runs")
    parser.add_argument("--write", action="store_true", help="only put the table of the kept results into the page")
    args = parser.parse_args()
    if args.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")
        return
    if not any(name in os.environ for name in ALLOCATOR):  # read as torch is loaded, so it must be there before
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | dict.fromkeys(ALLOCATOR, GROWING))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = {"command": sys.argv, "torch": torch.__version__, "device": str(device), "cases": []}
    if device.type == "cuda":
        record["device"] = torch.cuda.get_device_name()
        if not args.only or "kernels" in args.only:
            try:
                record["kernels"] = kernels(device)
            except Exception:
                traceback.print_exc()
                os.environ["VENEER_KERNELS"] = "plain"
                print("kernels failed: the rest runs on plain PyTorch", flush=True)
    for case in CASES:
        if args.only and not any(part in case.name for part in args.only):
            continue
        if args.tiny:
            case = Case(**{**asdict(case), "shape": "tiny", "length": 64, "cap_gib": None})
        record["cases"].append(run_case(case, device))
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
