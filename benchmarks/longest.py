"""The longest single row that one GPU trains: peak memory and time of true steps, and where the memory goes.

    python benchmarks/longest.py --base nf4 --layers 2 4 --tokens 65536 131072    peaks that grow in a line, and
                                                                                  where it meets the end of the card
    python benchmarks/longest.py --base nf4 --layers 32 --tokens 350000           one whole step of the whole model
    python benchmarks/longest.py --check                                          tiles against whole, on this card
    python benchmarks/longest.py --predict --base nf4 bf16                        what the memory model says

Llama-3.1-8B's shape with its scaled positions, random weights and tokens, r = 32 on all seven linears, `recompute
tiled`: blocks in tiles of tokens, their inputs in the host's pinned memory. nf4 packs the embedding and the head, too.

Attention makes a step at 350,000 tokens take minutes, but every layer needs the same memory. So a step may be run with
a few layers while a block of memory stands in for what the absent ones would hold: weights, adapter, its gradients and
both moments, and inputs that the host has no room for (`--host-gib`). `--layers 2 4` shows that the peak does not
depend on how many are there. Before the step that is measured a short one is made, so the moments are there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import Tensor, nn

from train_gpu import SHAPES, TARGETS, base  # isort: skip

RESULTS = Path(__file__).parent / "results"
RANK, GIB = 32, 2**30
HOSTS = (32, 64, 115, 230)  # GiB that the host has for inputs: of 128 and 256 some are left to everything else
WARM = 5000  # tokens of the step before
ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


# ------------------------------------------------------------------ the model, with some of its layers


def build(args: argparse.Namespace, storage: str, layers: int, device: str) -> nn.Module:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    import veneer
    from veneer.quant.layer import pack_layer
    from veneer.quant.storage import Recipe

    SHAPES["some"] = SHAPES[args.shape] | {"num_hidden_layers": layers, "rope_parameters": dict(ROPE)}
    packed = "" if storage == "bf16" else storage
    model: Any = base("some", device, packed, ends=True)
    if packed:
        pack_layer(model.lm_head, Recipe(packed), None, None)
    rotary = model.model.rotary_emb
    rotary.inv_freq, rotary.attention_scaling = ROPE_INIT_FUNCTIONS["llama3"](model.config, device)
    rotary.original_inv_freq = rotary.inv_freq
    veneer.attach(model, veneer.LoRA(rank=RANK, alpha=RANK, targets=TARGETS))
    veneer.fuse(model, args.recompute, verbose=False)
    for p in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(p, std=0.01)
    return model


def layer_bytes(model: Any) -> tuple[int, int]:
    """Of one layer: its frozen tensors, and its adapters with gradients and both moments, all in fp32."""
    layer = model.model.layers[0]
    trained = [p for p in layer.parameters() if p.requires_grad]
    ours = {id(p) for p in trained}
    frozen = {id(t): t.nbytes for t in (*layer.parameters(), *layer.buffers()) if id(t) not in ours}
    return sum(frozen.values()), 4 * sum(p.nbytes for p in trained)


def inputs(args: argparse.Namespace, tokens: int) -> tuple[int, int]:
    """How many inputs of the whole model's blocks and last norm stay on the card, and bytes of each."""
    shape = SHAPES[args.shape]
    each, count = tokens * shape["hidden_size"] * 2, shape["num_hidden_layers"] + 1
    return max(0, count - int(args.host_gib * GIB) // each), each


# ------------------------------------------------------------------ one step


class Trainer:
    """A model with its optimiser, as `veneer train` sets it up."""

    def __init__(self, model: Any, recompute: str) -> None:
        from veneer.train.optim import Masters, adamw, set_rate

        self.model, self.recompute = model, recompute
        self.masters = Masters({n: p for n, p in model.named_parameters() if p.requires_grad})
        self.optimizer = adamw(self.masters.values, lora_plus_ratio=1.0, weight_decay=0.0)
        set_rate(self.optimizer, 1e-4)

    def step(self, tokens: int, room: int = 0) -> float:
        from veneer.tasks.cross_entropy import chunked_cross_entropy
        from veneer.train.offload import offloaded

        device = next(self.model.parameters()).device
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.model.config.vocab_size, (1, tokens), generator=draw).to(device)
        count = tokens - 1
        with offloaded(device, room=room, fetches_ahead=self.recompute != "tiled"):
            hidden = self.model.model(input_ids=ids)[0]
            loss = chunked_cross_entropy(hidden[:, :-1], ids[:, 1:], self.model.lm_head, count=count) / count
            del hidden
            loss.backward()
        self.masters.collect()
        self.masters.clip(float(self.masters.gradient_norms().norm()), 1.0)
        self.optimizer.step()
        self.masters.publish()
        self.masters.zero_grad()
        return float(loss.detach())


def measure(args: argparse.Namespace, trainer: Trainer, layers: int, tokens: int) -> dict[str, Any]:
    from veneer.train.offload import pinned_bytes

    shape, device = SHAPES[args.shape], next(trainer.model.parameters()).device
    frozen, learned = layer_bytes(trainer.model)
    absent = shape["num_hidden_layers"] - layers
    stay, each = inputs(args, tokens)
    on_card = min(stay, layers + 1)  # the others of these belong to layers that are absent
    stands_in = absent * (frozen + learned) + (stay - on_card) * each
    row: dict[str, Any] = {"layers": layers, "tokens": tokens, "stay": stay}
    try:
        ballast = torch.empty(stands_in, dtype=torch.uint8, device=device)
        restart(device)
        started = time.perf_counter()
        with watched(device, args.watch):
            row["loss"] = trainer.step(tokens, on_card * each)
        row["seconds"] = time.perf_counter() - started
        del ballast
    except torch.OutOfMemoryError as error:
        row["failed"] = str(error).splitlines()[0][:300]
        trainer.masters.zero_grad()
        gc.collect()
    if device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
        row["reserved_bytes"] = torch.cuda.max_memory_reserved()
        torch.cuda.empty_cache()
    row["host_bytes"] = (shape["num_hidden_layers"] + 1 - stay) * each
    row["pinned_bytes"] = pinned_bytes(device)
    return row


@contextmanager
def watched(device: torch.device, every: float) -> Iterator[None]:
    """Says every so many seconds how far a step is: how many inputs have left the card, and what lies on it."""
    if not every or device.type != "cuda":
        yield
        return
    from veneer.train.offload import ring_of

    ring, done, started = ring_of(device), threading.Event(), time.perf_counter()

    def say() -> None:
        while not done.wait(every):
            away = [item for item in ring.away if item.left is not None and item.left.query()]
            held = torch.cuda.memory_allocated(device) / GIB
            back = sum(item.arrived is not None for item in ring.away)
            seconds = time.perf_counter() - started
            print(f"  {seconds:5.0f} s: {len(away)} inputs are away, {back} were fetched, {held:.1f} GiB", flush=True)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def restart(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ------------------------------------------------------------------ what is said about it


def estimated(args: argparse.Namespace, storage: str, tokens: int, stay: int) -> Any:
    from veneer.advise.memory import estimate_memory

    config = SHAPES[args.shape] | {"model_type": "llama", "tie_word_embeddings": False}
    whole = {"quant": "none" if storage == "bf16" else storage, "weights": args.weights.get(storage)}
    return estimate_memory(
        config, device="cuda", precision="bf16", r=RANK, batch_size=1, max_len=tokens, fused=True, padded=False,
        recompute=args.recompute, stay=stay, **whole,
    )  # fmt: skip


def account(args: argparse.Namespace, tokens: int) -> dict[str, int]:
    """What is there at the highest moment, attention's backward pass, besides weights and what is learned."""
    from veneer.kernels.tiled import HEAD_GROUPS

    shape = SHAPES[args.shape]
    stay, stream = inputs(args, tokens)
    head = shape["hidden_size"] // shape["num_attention_heads"]
    keys = tokens * shape["num_key_value_heads"] * head * 2
    parts = min(HEAD_GROUPS, shape["num_key_value_heads"])
    return {
        "x, the block's input": stream,
        "g, the gradient that arrives": stream,
        "d middle, what flows beside the attention": stream,
        "q": stream,
        "k and v": 2 * keys,
        "attention": stream,
        "its gradient": stream,
        "of a part of the heads: d q, that in fp32, d k and d v for each head of q": (5 * stream + 2 * keys) // parts,
        "inputs that stay, for want of room on the host": stay * stream,
    }


def predict(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The longest row by the memory model, its margins included, as `veneer check` works it out."""
    from veneer.advise.keep import longest_row
    from veneer.advise.peak import PACKED_BITS
    from veneer.advise.plan import Plan
    from veneer.advise.shapes import shapes_of

    shapes, found = shapes_of(SHAPES[args.shape] | {"model_type": "llama", "tie_word_embeddings": False}), []
    for storage in args.base:
        packed = storage != "bf16"
        weights = int(shapes.parameters * PACKED_BITS[storage] / 8) if packed else None
        plan = Plan(
            device="cuda", precision="bf16", r=RANK, fused=True, quant=storage if packed else "none", weights=weights
        )
        for host in HOSTS:
            tokens, choice = longest_row(shapes, plan, int(args.card_gib * GIB), host * GIB) or (0, None)
            row = {"base": storage, "host_gib": host, "tokens": tokens, "room": choice.room if choice else 0}
            stays = f"{row['room'] / GIB:.1f} GiB of inputs stay"
            print(f"{storage:5} {host:4} GiB of host memory: {tokens:9,} tokens, {stays}")
            found.append(row)
    return found


def limit_of(rows: list[dict[str, Any]], room: int) -> int | None:
    """Where the line through the shortest and the longest row reaches `room` bytes."""
    rows = sorted((r for r in rows if "failed" not in r and not r["stay"]), key=lambda r: r["tokens"])
    if len(rows) < 2 or rows[0]["tokens"] == rows[-1]["tokens"]:
        return None
    slope = (rows[-1]["peak_bytes"] - rows[0]["peak_bytes"]) / (rows[-1]["tokens"] - rows[0]["tokens"])
    return int(rows[0]["tokens"] + (room - rows[0]["peak_bytes"]) / slope)


def shown(storage: str, row: dict[str, Any]) -> str:
    start = f"{storage:5} {row['layers']:3} layers {row['tokens']:9,} tokens"
    memory = f"peak {row.get('peak_bytes', 0) / GIB:6.2f} GiB, reserved {row.get('reserved_bytes', 0) / GIB:6.2f}"
    host = f"host {row['host_bytes'] / GIB:6.2f} GiB for all layers, {row['stay']} inputs stay"
    if "failed" in row:
        return f"{start}  {memory}  {host}  FAILED: {row['failed']}"
    told = row["estimated_bytes"] / row["peak_bytes"] if row.get("peak_bytes") else float("nan")
    return f"{start}  {memory}  estimate {told:.3f}  {host}  {row['seconds']:6.1f} s  loss {row['loss']:.3f}"


def run(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    found = []
    for storage in args.base:
        own = []
        for layers in args.layers:
            model = build(args, storage, layers, device)
            frozen, _ = layer_bytes(model)
            ends = sum(t.nbytes for n, t in (*model.named_parameters(), *model.named_buffers()) if "layers." not in n)
            args.weights[storage] = ends + SHAPES[args.shape]["num_hidden_layers"] * frozen
            trainer = Trainer(model, args.recompute)
            trainer.step(min(WARM, min(args.tokens)))
            for tokens in args.tokens:
                row = measure(args, trainer, layers, tokens)
                row["base"] = storage
                row["estimated_bytes"] = estimated(args, storage, tokens, row["stay"]).total_bytes
                own.append(row)
                print(shown(storage, row), flush=True)
            del model, trainer
            gc.collect()
            restart(torch.device(device))
        if device == "cuda" and (limit := limit_of(own, int(args.card_gib * GIB))):
            print(f"{storage}: by these, {args.card_gib} GiB are full at {limit:,} tokens, had the host room for all")
        found += own
    return found


# ------------------------------------------------------------------ tiles against whole


def check(args: argparse.Namespace, device: str) -> None:
    """One step in tiles and one whole, from the same weights: how far gradients lie apart."""
    from veneer.kernels.fuse import set_recompute
    from veneer.kernels.tiled import TILE
    from veneer.tasks.cross_entropy import chunked_cross_entropy

    tokens = min(args.tokens) if device == "cpu" else 3 * TILE + 77
    for storage in args.base:
        model: Any = build(args, storage, 2, device)
        learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
        ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
        found: dict[str, dict[str, Tensor]] = {}
        for level in ("input", "tiled", "none"):
            set_recompute(model, level)
            hidden = model.model(input_ids=ids)[0]
            loss = chunked_cross_entropy(hidden[:, :-1], ids[:, 1:], model.lm_head) / tokens
            loss.backward()
            found[level] = {n: p.grad.float() for n, p in learned.items()}
            for p in learned.values():
                p.grad = None
        for level in ("tiled", "none"):
            pairs = [(found[level][n], g) for n, g in found["input"].items()]
            off = [float((a - b).norm() / b.norm()) for a, b in pairs]
            print(
                f"{storage}: gradients with {level} beside input, {tokens:,} tokens: {max(off):.2%} at most, ", end=""
            )
            print(f"{sum(off) / len(off):.3%} on the average; loss {float(loss.detach()):.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", default=["nf4"], choices=["nf4", "bf16", "fp8"])
    parser.add_argument("--layers", nargs="+", type=int, default=[2], help="layers that are there")
    parser.add_argument("--tokens", nargs="+", type=int, default=[65536])
    parser.add_argument("--recompute", default="tiled", choices=["tiled", "input"])
    parser.add_argument("--host-gib", type=float, default=1e6, help="host memory there is for inputs; all, unless said")
    parser.add_argument("--card-gib", type=float, default=78.0, help="of the card, for this process")
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--check", action="store_true", help="compare gradients, and measure nothing")
    parser.add_argument("--watch", type=float, default=0, help="seconds after which to say how far a step is")
    parser.add_argument("--predict", action="store_true", help="print what the memory model says")
    parser.add_argument("--json", type=Path, help="write what was found here")
    args = parser.parse_args()
    args.weights = {}
    if args.predict:
        told = {"about": {"card_gib": args.card_gib, "rank": RANK}, "rows": [], "predicted": predict(args)}
        if args.json:
            args.json.write_text(json.dumps(told, indent=1) + "\n")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.card_gib * GIB / total))
    if args.check:
        check(args, device)
        return
    rows = run(args, device)
    longest = max((row["tokens"] for row in rows if "failed" not in row), default=0)
    if longest:
        print(f"\nat {longest:,} tokens, GiB, besides weights and what is learned:")
        for name, size in account(args, longest).items():
            print(f"  {size / GIB:7.2f}  {name}")
    told = {"tokens": longest, "bytes": account(args, longest)} if longest else {}
    if args.json:
        name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores"
        about = {"device": name, "torch": torch.__version__, "card_gib": args.card_gib, "rank": RANK}
        args.json.write_text(json.dumps({"about": about, "rows": rows, "account": told}, indent=1) + "\n")


if __name__ == "__main__":
    main()
