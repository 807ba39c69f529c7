"""What storing the frozen base in fewer bits costs in quality, on a real model; writes docs/quantisation.md's table.

    python benchmarks/quantisation.py [--steps 100] [--seeds 0 1 2] [--jobs 1] [--only NAME ...] [--write]

SmolLM2-135M-Instruct and the demo's data (plain English -> shell command), with the demo's settings but for the number
of steps; in bf16 on a GPU, in fp32 on a CPU, where 8-bit products that it lacks are formed by the reference, inputs
and gradients rounded as on a GPU. For each storage the whole product runs (`veneer.train(..., quant=...)`, with its
proofs): the held-out loss before the first step is the packed base's, the one after the last step the trained
adapter's, on the base that it was trained on. Same rows, same order, same start for all. Each run has a process of its
own, --jobs of them at a time; what is there already is not run again. --write puts the table into the page.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "quantisation.json"
PAGE = Path(__file__).parent.parent / "docs" / "quantisation.md"
VARIANTS: dict[
    str, dict[str, Any]
] = {  # the run's settings; "pack": options of veneer.quantize, for what has no setting
    "none": {},
    "nf4": {"quant": "nf4"},
    "nf4, 128 rows looked at": {"quant": "nf4", "quant_rows": 128},
    "nf4, LoftQ": {"quant": "nf4", "init": "loftq"},
    "nf4, inputs not looked at": {"quant": "nf4", "quant_rows": 0},
    "int8": {"quant": "int8"},
    "int8, not rotated": {"quant": "int8", "quant_rotate": "off"},
    "fp8": {"quant": "fp8"},
    "fp8, inputs not looked at": {"quant": "fp8", "quant_rows": 0},
    "fp8, not rotated": {"quant": "fp8", "quant_rotate": "off"},
    "fp8, neither looked at nor rotated": {"quant": "fp8", "quant_rotate": "off", "quant_rows": 0},
    "fp8, not rotated, inputs not rounded": {"quant": "fp8", "pack": {"rotate": False, "dynamic": False}},
    "fp8, head too": {"quant": "fp8", "pack": {"head": True}},
}
BEGIN, END = "<!-- table: python benchmarks/quantisation.py --write -->", "<!-- end of table -->"


def measure(variant: str, seed: int, steps: int) -> dict[str, Any]:
    import torch

    import veneer
    from veneer.app.demo import SETTINGS
    from veneer.assets import data_file, model_folder

    started, cuda = time.perf_counter(), torch.cuda.is_available()
    settings = {**SETTINGS, **VARIANTS[variant], "steps": steps, "eval_every": steps, "seed": seed,
                "precision": "bf16" if cuda else "fp32", "model": str(model_folder("smollm2")),
                "data": str(data_file("shell", "train")), "val": str(data_file("shell", "val"))}  # fmt: skip
    if pack := settings.pop("pack", None):
        settings["model"] = packed(settings, pack)
    with tempfile.TemporaryDirectory() as out:
        run = veneer.train(**settings, out=out, name="run")
        losses = [m["val_loss"] for m in run.metrics("val_loss")]
    return {
        "storage": variant, "seed": seed, "steps": steps, "before": losses[0], "after": losses[-1],
        "seconds": time.perf_counter() - started, "device": device(),
    }  # fmt: skip


def device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def packed(settings: dict[str, Any], pack: dict[str, Any]) -> Any:
    """The base, stored with options that a run has no setting for; its inputs are looked at as a run would."""
    import torch
    from transformers import AutoModelForCausalLM

    import veneer
    from veneer.train import prepare
    from veneer.train.settings import Reads, resolve

    def quiet(*_: Any, **__: Any) -> None: ...

    cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16 if cuda else torch.float32)
    model.to("cuda" if cuda else "cpu")
    read = Reads(resolve(mapping=settings))
    if prepare.looks_before_packing(read):
        parts = prepare.read_data(read, None, quiet)
        task = prepare.make_task(read, read.model, None, parts, quiet)
        samples = prepare.encode_rows(task, read, parts, quiet)[0].samples
        pack = {**pack, "data": prepare.rows_to_look_at(read, task, samples, next(model.parameters()).device, quiet)}
    veneer.quantize(model, settings["quant"], **pack)
    return model


def apart(variant: str, seed: int, steps: int) -> dict[str, Any]:
    """The same in a process of its own."""
    env = {"VENEER_KERNELS": "" if Path("/dev/nvidia0").exists() else "emulate", **os.environ}
    command = [sys.executable, "-W", "ignore", __file__, "--one", variant, str(seed), str(steps)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        print(f"{variant} {seed} FAILED\n{done.stderr[-1500:]}", flush=True)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """For each device and number of steps: means over seeds, and how far each storage is from the base in full."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["device"], row["steps"]), []).append(row)
    return "\n\n".join(one_table(own, *key) for key, own in sorted(found.items(), reverse=True))


def one_table(rows: list[dict[str, Any]], device: str, steps: int) -> str:
    found = {variant: [r for r in rows if r["storage"] == variant] for variant in VARIANTS}
    paired = {r["seed"] for r in rows if r["storage"] != "none"} or {r["seed"] for r in rows}
    found["none"] = [r for r in found["none"] if r["seed"] in paired]  # means are over what others are held against
    full = {r["seed"]: r for r in found["none"]}
    dense = "bf16" if device != "cpu" else "fp32"
    lines = [
        f"| base stored as | its held-out loss | against {dense} | loss after training | against {dense} | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for variant, own in found.items():
        if own:
            mean = {key: statistics.mean(r[key] for r in own) for key in ("before", "after")}
            more = {key: [r[key] / full[r["seed"]][key] - 1 for r in own] for key in mean}
            spread = f" ({min(more['after']):+.2%} to {max(more['after']):+.2%})" if len(own) > 1 else ""
            lines.append(
                f"| {dense if variant == 'none' else variant} | {mean['before']:.4f} | "
                f"{statistics.mean(more['before']):+.2%} | {mean['after']:.4f} | "
                f"{statistics.mean(more['after']):+.2%}{'' if variant == 'none' else spread} | {len(own)} |"
            )
    lines += ["", f"{steps} steps of 4 rows, r = 16 on all linear layers, {device if device != 'cpu' else 'a CPU'}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--one", nargs=3, metavar=("NAME", "SEED", "STEPS"), help="one run, in this process, as JSON")
    parser.add_argument("--write", action="store_true", help="only put the table of the kept results into the page")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), int(args.one[2]))))
        return
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    if not args.write:
        known = {(r["storage"], r["seed"], r["steps"]) for r in rows if r["device"] == device()}
        wanted = [(v, seed, args.steps) for seed in args.seeds for v in args.only if (v, seed, args.steps) not in known]
        command = f"python benchmarks/quantisation.py --steps {args.steps} --seeds {' '.join(map(str, args.seeds))}"
        for row in ThreadPoolExecutor(args.jobs).map(lambda each: apart(*each), wanted):
            if row:
                rows.append(row)
                print(row, flush=True)
                RESULTS.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    if args.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
