"""The loss of each training step on a real model: fused blocks beside plain ones, packed bases beside the base in full.

    python benchmarks/loss_curves.py [--steps 30] [--only NAME ...] [--json FILE]

SmolLM2-135M-Instruct and the demo's data and settings, `veneer.train` from the same start on the same batches; in bf16
on a GPU, in fp32 on a CPU, where 8-bit products that it lacks are formed by the reference, rounded as on a GPU. Rows
are written down as they are finished; benchmarks/page.py lays the curves over each other in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "loss_curves.json"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"fuse": "off"},
    "fused": {"fuse": "on"},
    "fp8": {"fuse": "on", "quant": "fp8"},
    "fp8 not rotated": {"fuse": "on", "quant": "fp8", "quant_rotate": "off"},
    "nf4": {"fuse": "on", "quant": "nf4"},
}


def losses(variant: str, steps: int) -> list[float]:
    import torch

    import veneer
    from veneer.app.demo import SETTINGS
    from veneer.assets import data_file, model_folder

    own = {
        **VARIANTS[variant], "steps": steps, "val": 0, "eval_every": 0, "save_every": 10**6,
        "precision": "bf16" if torch.cuda.is_available() else "fp32",
        "model": str(model_folder("smollm2")), "data": str(data_file("shell", "train")),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        return [row["loss"] for row in veneer.train(**{**SETTINGS, **own}, out=out, name="run").metrics("loss")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("VENEER_KERNELS", "emulate")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    found: dict[str, Any] = {"steps": args.steps, "device": device, "torch": torch.__version__, "losses": {}}
    for variant in args.only:
        own = found["losses"][variant] = losses(variant, args.steps)
        print(f"{variant:16} {own[0]:.4f} -> {own[-1]:.4f}", flush=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
