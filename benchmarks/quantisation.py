"""What storing the frozen base in fewer bits costs in quality, on a real model; writes docs/quantisation.md's table.

    python benchmarks/quantisation.py [--steps 30] [--seeds 0] [--write]

SmolLM2-135M-Instruct and the demo's data (plain English -> shell command), in fp32 on a CPU, with the demo's settings
but for the number of steps. For each storage the whole product runs (`veneer.train(..., quant=...)`, proofs included):
the held-out loss before the first step is the packed base's, the one after the last step the trained adapter's, on the
base that it was trained on. Same rows, same order, same start for all. --write puts the table into the page.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "quantisation.json"
PAGE = Path(__file__).parent.parent / "docs" / "quantisation.md"
STORAGES = ("none", "nf4", "int8", "fp8")
BEGIN, END = "<!-- table: python benchmarks/quantisation.py --write -->", "<!-- end of table -->"


def measure(storage: str, seed: int, steps: int) -> dict[str, Any]:
    import veneer
    from veneer.app.demo import SETTINGS
    from veneer.assets import data_file, model_folder

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        run = veneer.train(
            **{**SETTINGS, "steps": steps, "eval_every": steps, "precision": "fp32", "quant": storage, "seed": seed},
            model=str(model_folder("smollm2")), data=str(data_file("shell", "train")),
            val=str(data_file("shell", "val")), out=out, name="run",
        )  # fmt: skip
        losses = [m["val_loss"] for m in run.metrics("val_loss")]
    seconds = time.perf_counter() - started
    return {
        "storage": storage, "seed": seed, "steps": steps, "before": losses[0], "after": losses[-1], "seconds": seconds
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, and how far each storage is from the base in full."""
    by: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by.setdefault(row["storage"], []).append(row)
    mean = {s: {k: statistics.mean(r[k] for r in found) for k in ("before", "after")} for s, found in by.items()}
    full = mean["none"]
    lines = [
        "| base stored as | its held-out loss | perplexity | against fp32 | loss after training | against fp32 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for storage, m in mean.items():
        name, base, after = "fp32" if storage == "none" else storage, m["before"], m["after"]
        more = math.exp(m["before"]) / math.exp(full["before"]) - 1
        off = m["after"] / full["after"] - 1
        lines.append(f"| {name} | {base:.4f} | {math.exp(base):.2f} | {more:+.2%} | {after:.4f} | {off:+.2%} |")
    steps, seeds = {r["steps"] for r in rows}, sorted({r["seed"] for r in rows})
    lines += ["", f"{max(steps)} steps of 4 rows, r = 16 on all linear layers, seeds {', '.join(map(str, seeds))}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--write", action="store_true", help="only put the table of the kept results into the page")
    args = parser.parse_args()
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    if not args.write:
        command = f"python benchmarks/quantisation.py --steps {args.steps} --seeds {' '.join(map(str, args.seeds))}"
        for seed in args.seeds:
            for storage in STORAGES:
                if not any((r["storage"], r["seed"], r["steps"]) == (storage, seed, args.steps) for r in rows):
                    rows.append(measure(storage, seed, args.steps))
                    print(rows[-1], flush=True)
                    RESULTS.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    if args.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
