"""A checkpoint packed as it is read: how fast, beside reading it plainly, and what it takes beside the packed model.

    python benchmarks/load_quant.py [--shape 3b] [--kinds none nf4 int8 fp8] [--json FILE]

A folder of random bf16 weights in shards of 2 GB is written once; each load runs in a process of its own, onto the GPU
where there is one. "read" is the time to read the same files into memory and no more, taken right before each load,
so that both find the files equally warm; "held to files" is what proof P7 takes afterwards. Memory: on a GPU the
allocator's peak; on a CPU the growth of the process's anonymous memory (mapped files are the system's to take back),
sampled every 2 ms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SHAPES = {  # hidden, mlp, layers, heads, kv heads, vocabulary
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "small": (1024, 2816, 12, 8, 8, 8192),
    "tiny": (64, 128, 2, 4, 2, 512),
}


def write(folder: Path, shape: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, mlp, layers, heads, kv, vocab = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocab, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2GB")


def read(folder: Path) -> int:
    """Every byte of every shard, through one buffer."""
    buffer, total = bytearray(1 << 24), 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as f:
            while n := f.readinto(buffer):
                total += n
    return total


def load(folder: Path, kind: str) -> dict[str, Any]:
    import torch
    import transformers

    from veneer.prove import Check, is_as_filed
    from veneer.quant.hf import VeneerConfig
    from veneer.quant.model import weight_bytes

    transformers.utils.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.zeros(1, device=device)
    options: dict[str, Any] = {} if kind == "none" else {"quantization_config": VeneerConfig(kind)}
    start = time.perf_counter()
    size = read(folder)
    plain = time.perf_counter() - start
    with Peak(cuda) as peak:
        start = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map={"": device}, **options
        )
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    start = time.perf_counter()
    found = is_as_filed(model, folder)
    assert isinstance(found, Check) and found.passed, found
    held = time.perf_counter() - start
    return {
        "kind": kind, "device": torch.cuda.get_device_name() if cuda else "cpu", "file_bytes": size,
        "read_seconds": plain, "load_seconds": seconds, "held_seconds": held,
        "model_bytes": weight_bytes(model), "peak_bytes": peak.bytes,
    }  # fmt: skip


class Peak:
    """The most memory that was held at once inside the block, beyond what was held before."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.bytes, self.done = cuda, 0, False

    def __enter__(self) -> Peak:
        self.before = self._held()
        if not self.cuda:
            self.thread = threading.Thread(target=self._watch)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done = True
        if not self.cuda:
            self.thread.join()
        self.bytes = max(self.bytes, self._held() - self.before)

    def _watch(self) -> None:
        while not self.done:
            self.bytes = max(self.bytes, self._held() - self.before)
            time.sleep(0.002)

    def _held(self) -> int:
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| stored as | read s | load s | held to files s | GB/s of the file | packed GiB | peak above it GiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        more = (row["peak_bytes"] - row["model_bytes"]) / 2**30
        lines.append(
            f"| {row['kind']} | {row['read_seconds']:.1f} | {row['load_seconds']:.1f} | {row['held_seconds']:.2f} | "
            f"{row['file_bytes'] / row['load_seconds'] / 1e9:.2f} | {row['model_bytes'] / 2**30:.2f} | {more:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--kinds", nargs="*", default=["none", "nf4", "int8", "fp8"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "KIND"), help="one load, here, as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(load(Path(args.one[0]), args.one[1])))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.shape)
        for kind in args.kinds:
            command = [sys.executable, __file__, "--one", folder, kind]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, "shape": args.shape, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
