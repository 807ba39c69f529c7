"""Merging on disk: time, speed beside a plain copy of the same files, and memory above the start.

    python benchmarks/merge_stream.py                 # 14 GB in bfloat16; needs 42 GB of free disk
    python benchmarks/merge_stream.py --gb 2 --combine dora --folder /scratch

A Llama-7B shape with as many blocks as the size asks for, random values, shards of at most 5 GB, a rank-16 adapter on
all linear layers. Both the copy and the merge end with their data on the disk (fsync), and before each the page cache
is dropped where the system lets us, so that both read from the disk. The merge runs in a process of its own; its
memory is the peak of its resident set minus what it was when everything was imported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from veneer.ckpt.tensorfile import Writer, writing

WIDTH, MLP, VOCAB, SHARD = 4096, 11008, 32000, 5_000_000_000


def shapes(blocks: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama with so many blocks."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for i in range(blocks):
        at = f"model.layers.{i}"
        found |= {f"{at}.self_attn.{p}_proj.weight": (WIDTH, WIDTH) for p in "qkvo"}
        found |= {f"{at}.mlp.{p}_proj.weight": (MLP, WIDTH) for p in ("gate", "up")}
        found[f"{at}.mlp.down_proj.weight"] = (WIDTH, MLP)
        found |= {f"{at}.{n}_layernorm.weight": (WIDTH,) for n in ("input", "post_attention")}
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}


def size_of(names: dict[str, tuple[int, ...]]) -> int:
    return sum(2 * torch.Size(shape).numel() for shape in names.values())


def write_model(folder: Path, names: dict[str, tuple[int, ...]]) -> None:
    """Shards of random bfloat16 values: one block of noise over and over, for disks do not care and we do not wait."""
    folder.mkdir(parents=True)
    noise = torch.randn(1 << 22).mul_(0.02).bfloat16()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in names.items():
        if size_of(shards[-1]) + size_of({name: shape}) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    table: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        table |= dict.fromkeys(shard, file)
        with writing(folder / file, {n: (torch.bfloat16, s) for n, s in shard.items()}) as writer:
            for name, shape in shard.items():
                fill(writer, name, torch.Size(shape).numel(), noise)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "vocab_size": VOCAB}
    config |= {"intermediate_size": MLP, "num_attention_heads": 32, "num_key_value_heads": 32}
    config |= {"num_hidden_layers": sum(".input_layernorm" in n for n in names), "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))


def fill(writer: Writer, name: str, count: int, noise: torch.Tensor) -> None:
    while count:
        writer.write(name, noise[: min(count, len(noise))])
        count -= min(count, len(noise))


def write_adapter(folder: Path, base: Path, rank: int, combine: str) -> None:
    """A rank-r adapter of every linear layer but the head, without attaching it to a model of this size."""
    from veneer.ckpt.tensorfile import save_tensors

    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes(json.loads((base / "config.json").read_text())["num_hidden_layers"]).items():
        if "_proj" in name:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, shape[1]) / shape[1] ** 0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(shape[0], rank) * 0.01
            if combine == "dora":
                tensors[f"{key}.lora_magnitude_vector"] = torch.full((shape[0],), 0.02 * shape[1] ** 0.5)
    folder.mkdir()
    save_tensors(folder / "adapter_model.safetensors", tensors)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": combine == "dora"}))


def forget_cache() -> bool:
    """Make the next read come from the disk; needs root."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def copy_seconds(base: Path, target: Path) -> float:
    """A plain copy of the same files, on the disk when it is over."""
    began = time.monotonic()
    target.mkdir()
    for path in sorted(base.iterdir()):
        with open(path, "rb") as source, open(target / path.name, "wb") as copy:
            shutil.copyfileobj(source, copy, 16 << 20)
            copy.flush()
            os.fsync(copy.fileno())
    seconds = time.monotonic() - began
    shutil.rmtree(target)
    return seconds


MERGE = """
import sys, time, json, warnings
from pathlib import Path
from veneer.ckpt.skeleton import skeleton_of
from veneer.ckpt.stream import merge_to_disk
base, adapter, out = map(Path, sys.argv[1:])
skeleton = skeleton_of(base, [adapter])
def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024
start = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
began, cpu = time.monotonic(), time.process_time()
result = merge_to_disk(base, adapter, out, skeleton=skeleton)
print(json.dumps({"seconds": time.monotonic() - began, "cpu": time.process_time() - cpu, "kept": result.share,
                  "mib": status("VmHWM") - start, "bytes": result.bytes, "excess": max(result.excess.values())}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=14.0, help="size of the model in GB")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--combine", choices=["add", "dora"], default="add")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary folder unless given")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    one_block = size_of(shapes(1)) - size_of(shapes(0))
    names = shapes(max(1, round((given.gb * 1e9 - size_of(shapes(0))) / one_block)))
    free = shutil.disk_usage(given.folder or tempfile.gettempdir()).free
    if free < 2.2 * size_of(names):
        sys.exit(f"needs {2.2 * size_of(names) / 1e9:.0f} GB of free disk, there are {free / 1e9:.0f}")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        found = measure(Path(folder), names, given.rank, given.combine)
    show(found)
    if given.json:
        given.json.write_text(json.dumps({"command": sys.argv} | found, indent=1) + "\n")


def measure(folder: Path, names: dict[str, tuple[int, ...]], rank: int, combine: str) -> dict[str, Any]:
    base, adapter = folder / "base", folder / "adapter"
    write_model(base, names)
    write_adapter(adapter, base, rank, combine)
    cold = forget_cache()
    copied = copy_seconds(base, folder / "copy")
    forget_cache()
    run = [sys.executable, "-c", MERGE, str(base), str(adapter), str(folder / "out")]
    merged = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    return {
        "bytes": size_of(names),
        "tensors": len(names),
        "largest_mib": max(2 * torch.Size(shape).numel() for shape in names.values()) / 2**20,
        "rank": rank,
        "combine": combine,
        "cache_dropped": cold,
        "threads": torch.get_num_threads(),
        "copy_seconds": copied,
        "merge_seconds": merged["seconds"],
        "merge_cpu_seconds": merged["cpu"],
        "merge_mib_above_start": merged["mib"],
        "worst_output_error": merged["excess"],
        "share_kept": merged["kept"],
    }


def show(found: dict[str, Any]) -> None:
    size, copied, merged = found["bytes"], found["copy_seconds"], found["merge_seconds"]
    print(
        f"model    {size / 1e9:.2f} GB in bfloat16, {found['tensors']} tensors, largest {found['largest_mib']:.0f} MiB"
    )
    print(f"cache    {'dropped before each' if found['cache_dropped'] else 'not dropped: reads may come from memory'}")
    print(f"copy     {copied:.1f} s, {size / 2**20 / copied:.0f} MiB/s")
    print(f"merge    {merged:.1f} s, {size / 2**20 / merged:.0f} MiB/s ({merged / copied:.2f} x the copy's time)")
    print(f"         {found['merge_cpu_seconds']:.1f} s of processor time on {found['threads']} threads")
    print(f"memory   {found['merge_mib_above_start']:.0f} MiB above the start at its peak")
    print(f"proof    worst output error {found['worst_output_error']:.2f} of what rounding allows; ", end="")
    print(f"{found['share_kept']:.1%} of dW kept")


if __name__ == "__main__":
    main()
