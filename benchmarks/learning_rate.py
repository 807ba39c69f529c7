"""Where the best learning rate lies, against what `veneer.advise.lr` says: a sweep on a real model and real rows.

    python benchmarks/learning_rate.py                     a small sweep, for a CPU (about an hour)
    python benchmarks/learning_rate.py --full --jobs 12    every setting and two seeds, for a GPU (about ten minutes)

SmolLM2-135M-Instruct learns shell commands (the demo's rows, answers trained, one epoch of batches of 16, cosine with 3
warm-up steps); the figure is the held-out loss after the run. For every setting the rates are a factor of two apart.
The best rate is the minimum of a parabola through the best three in log rate, so it is finer than the grid. Raw rows go
to benchmarks/results/learning_rate.json.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "learning_rate.json"
RATES = [5e-5 * 2**k for k in range(8)]  # 5e-5 to 6.4e-3


@dataclass(frozen=True)
class Setup:
    """One line of the table: what is trained and how."""

    name: str
    spec: dict[str, Any] = field(default_factory=dict)  # of LoRA
    method: str = "lora"
    batch: int = 16
    rows: int | None = None
    epochs: float = 1.0
    shift: float = 1.0  # the whole grid of rates times this


def lora(rank: int, alpha: float, **more: Any) -> dict[str, Any]:
    return {"rank": rank, "alpha": alpha, **more}


SMALL = [
    Setup("r16 a32", lora(16, 32)),
    Setup("r64 a32", lora(64, 32)),
    Setup("r16 a128", lora(16, 128)),
]
FULL = [
    *SMALL,
    Setup("r4 a32", lora(4, 32)),
    Setup("r1 a32", lora(1, 32)),
    Setup("r128 a32", lora(128, 32)),
    Setup("r16 a8", lora(16, 8), shift=2),
    Setup("r4 a8", lora(4, 8), shift=2),
    Setup("r64 a128", lora(64, 128)),
    Setup("r128 a256", lora(128, 256), shift=0.5),
    Setup("r16 a32 rslora", lora(16, 32, scaling="rslora"), shift=0.5),
    Setup("r64 a16 rslora", lora(64, 16, scaling="rslora")),
    Setup("r16 a32 dora", lora(16, 32, combine="dora")),
    Setup("r16 a32 q,k,v,o", lora(16, 32, targets="attention")),
    Setup("r16 a32 batch 4", lora(16, 32), batch=4),
    Setup("r16 a32 batch 64", lora(16, 32), batch=64),
    Setup("full", method="full", shift=0.1),
    Setup("full batch 64", method="full", shift=0.1, batch=64),
    Setup("freeze last 2", method="freeze", shift=0.2),
    Setup("r16 a32, 40 rows", lora(16, 32), rows=40, epochs=5, batch=8),
    Setup("full, 40 rows", method="full", shift=0.1, rows=40, epochs=5, batch=8),
    Setup("freeze last 2, 40 rows", method="freeze", shift=0.2, rows=40, epochs=5, batch=8),
]


# One run ------------------------------------------------------------------------------------------------------------


def encode(folder: Path, rows: list[dict[str, Any]]) -> list[tuple[list[int], int]]:
    """(ids, where the answer begins) of every row, in the model's own template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(messages: list[dict[str, str]], **more: Any) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **more)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    found = []
    for row in rows:
        messages = row["messages"]
        whole, prompt = ids(messages), ids(messages[:-1], add_generation_prompt=True)
        assert whole[: len(prompt)] == prompt
        found.append((whole[:256], len(prompt)))
    return found


def collate(rows: list[tuple[list[int], int]], device: str) -> tuple[dict[str, Any], Any]:
    import torch

    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in rows])
    labels = torch.full_like(ids, -100)
    for i, (row, start) in enumerate(rows):
        labels[i, start : len(row)] = ids[i, start : len(row)]
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
    return inputs, labels.to(device)


def summed_loss(model: Any, batch: tuple[dict[str, Any], Any]) -> tuple[Any, int]:
    import torch.nn.functional as F

    inputs, labels = batch
    hidden, wanted = model.model(**inputs)[0][:, :-1], labels[:, 1:]
    counted = wanted != -100
    loss = F.cross_entropy(model.lm_head(hidden[counted]).float(), wanted[counted], reduction="sum")
    return loss, int(counted.sum())


def train(base: Any, setup: Setup, rate: float, seed: int, train_rows: Any, val_rows: Any, device: str) -> float:
    """Held-out loss after the run; infinite where it diverged."""
    import copy

    import torch

    from veneer.core.model import attach, parameters
    from veneer.core.spec import LoRA
    from veneer.train.optim import adamw, set_rate

    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    if setup.method == "lora":
        attach(model, LoRA(**setup.spec))
        trained = parameters(model, "default")
    else:
        model.requires_grad_(setup.method == "full")
        for block in model.model.layers[-2:]:
            block.requires_grad_(True)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for parameter in trained.values():
            parameter.data = parameter.data.float()
    optimizer = adamw(trained, lora_plus_ratio=1.0, weight_decay=0.0)
    rows = train_rows[: setup.rows]
    order = [int(i) for _ in range(math.ceil(setup.epochs)) for i in torch.randperm(len(rows))]
    batches = [order[i : i + setup.batch] for i in range(0, len(order) - setup.batch + 1, setup.batch)]
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda" and setup.method != "lora")
    for step, chosen in enumerate(batches):
        warm, along = min(1, (step + 1) / 3), step / len(batches)
        set_rate(optimizer, rate * warm * 0.5 * (1 + math.cos(math.pi * along)))
        with autocast:
            loss, count = summed_loss(model, collate([rows[i] for i in chosen], device))
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return evaluate(model, val_rows, device, autocast)


def evaluate(model: Any, rows: Any, device: str, autocast: Any) -> float:
    import torch

    total, tokens = 0.0, 0
    with torch.no_grad(), autocast:
        for i in range(0, len(rows), 24):
            loss, count = summed_loss(model, collate(rows[i : i + 24], device))
            total, tokens = total + float(loss), tokens + count
    return total / tokens if math.isfinite(total) else math.inf


# All of them --------------------------------------------------------------------------------------------------------


def work(jobs: Any, results: Any, folder: str, data: str, until: float) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    train_rows, val_rows = (
        encode(Path(folder), [json.loads(line) for line in (Path(data) / f"{split}.jsonl").read_text().splitlines()])
        for split in ("train", "val")
    )
    while (job := jobs.get()) is not None and time.time() < until:
        setup, rate, seed = job
        try:
            loss = train(base, setup, rate, seed, train_rows, val_rows, device)
        except RuntimeError as error:  # out of memory beside the others: say so, go on
            print(f"{setup.name} at {rate:.1e}: {error}"[:200], flush=True)
            continue
        finally:
            if device == "cuda":
                torch.cuda.empty_cache()
        results.put((setup.name, rate, seed, loss))
    results.put(None)


def best(points: dict[float, float]) -> tuple[float, float]:
    """Rate and loss at the minimum of a parabola through the best point and its neighbours in log rate."""
    rates = sorted(points)
    losses = [min(points[r], 50.0) for r in rates]
    i = min(range(len(rates)), key=losses.__getitem__)
    if not 0 < i < len(rates) - 1:
        return rates[i], losses[i]
    left, middle, right = losses[i - 1 : i + 2]
    offset = 0.5 * (left - right) / max(left - 2 * middle + right, 1e-9)
    return rates[i] * 2**offset, middle


def main() -> None:
    import sweep  # beside this file

    options = sweep.parser(__doc__, RESULTS).parse_args()
    if options.model is None or options.data is None:
        from veneer.assets import data_file, model_folder

        options.model, options.data = str(model_folder("smollm2")), str(data_file("shell", "train").parent)
    setups = FULL if options.full else SMALL
    seeds = (0, 1) if options.full else (0,)
    wanted = [(s, rate * s.shift, seed) for seed in seeds for s in setups for rate in RATES]
    report(sweep.run(wanted, ("setup", "rate", "seed", "loss"), work, options), setups)


def rule(setup: Setup) -> float:
    """What `lr: auto` would have taken."""
    from veneer.advise.lr import learning_rate

    rows = setup.rows or 761
    steps = max(1, int(rows * setup.epochs / setup.batch))
    spec = {name: value for name, value in setup.spec.items() if name != "targets"}
    return learning_rate(134.5e6, method=setup.method, steps=steps, rows=rows, **spec).value


def report(rows: list[dict[str, Any]], setups: list[Setup]) -> None:
    print(f"{'setup':24} {'best rate':>10} {'loss':>7} {'rule':>9} {'loss there':>10}  loss by rate")
    for setup in setups:
        by_rate: dict[float, list[float]] = defaultdict(list)
        for row in rows:
            if row["setup"] == setup.name:
                by_rate[row["rate"]].append(row["loss"])
        if not by_rate:
            continue
        points = {rate: sum(losses) / len(losses) for rate, losses in by_rate.items()}
        rate, loss = best(points)
        told = rule(setup)
        near = min(points, key=lambda r: abs(math.log(r / told)))
        curve = " ".join(f"{rate:.1e}:{points[rate]:.3f}" for rate in sorted(points))
        print(f"{setup.name:24} {rate:10.2e} {loss:7.3f} {told:9.1e} {points[near]:10.3f}  {curve}", flush=True)


if __name__ == "__main__":
    main()
