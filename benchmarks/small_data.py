"""Adapter, whole model or last layers: which wins on a small encoder, and from how many rows.

    python benchmarks/small_data.py                           a small grid, for a CPU (about half an hour)
    python benchmarks/small_data.py --full --jobs 12          every cell, two seeds, for a GPU (about five minutes)

all-MiniLM-L6-v2 (22.7 M parameters) learns the sentiment of film reviews from 40 to 4,000 rows; the figure is the
accuracy on 1,000 others, at the best of five rates for each method. It is what `veneer.advise.recommend` knows of small
models and small data, beside what has been written about them. Raw rows go to benchmarks/results/small_data.json.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "small_data.json"
RATES = {
    "lora r8": [2e-4, 5e-4, 1e-3, 2e-3, 4e-3],
    "lora r32": [2e-4, 5e-4, 1e-3, 2e-3, 4e-3],
    "full": [2e-5, 5e-5, 1e-4, 2e-4, 4e-4],
    "freeze 2": [5e-5, 1e-4, 2e-4, 5e-4, 1e-3],
    "head": [5e-4, 1e-3, 2e-3, 5e-3, 1e-2],
}
ROWS = {40: 8, 200: 6, 1000: 4, 4000: 2}  # rows -> epochs
BATCH = 16


def place(model: Any, method: str) -> dict[str, Any]:
    from veneer.core.model import attach, parameters
    from veneer.core.spec import LoRA

    if method.startswith("lora"):
        rank = int(method.split("r")[-1])
        attach(model, LoRA(rank=rank, alpha=2 * rank, modules_to_save=["classifier"]))
        return parameters(model, "default")
    model.requires_grad_(method == "full")
    model.classifier.requires_grad_(True)
    if method == "freeze 2":
        for block in model.bert.encoder.layer[-2:]:
            block.requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(base: Any, method: str, rate: float, count: int, seed: int, rows: Any, val: Any, device: str) -> float:
    """Accuracy after the run."""
    import copy

    import torch
    import torch.nn.functional as F

    from veneer.train.optim import adamw, set_rate

    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    model.classifier.reset_parameters()
    trained = place(model, method)
    optimizer = adamw(trained, lora_plus_ratio=1.0, weight_decay=0.0)
    chosen = torch.randperm(len(rows[1]))[:count]
    order = torch.cat([chosen[torch.randperm(count)] for _ in range(ROWS[count])])
    steps = math.ceil(len(order) / BATCH)
    for step in range(steps):
        some = order[step * BATCH : (step + 1) * BATCH].to(device)
        set_rate(optimizer, rate * min(1, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / steps)))
        F.cross_entropy(logits(model, rows[0], some), rows[1][some]).backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        parts = torch.arange(len(val[1]), device=device).split(250)
        right = sum(int((logits(model, val[0], part).argmax(-1) == val[1][part]).sum()) for part in parts)
    return right / len(val[1])


def logits(model: Any, encoded: dict[str, Any], some: Any) -> Any:
    longest = int(encoded["attention_mask"][some].sum(1).max())
    return model(**{name: value[some, :longest] for name, value in encoded.items()}).logits.float()


def read(folder: str, path: Path, device: str) -> tuple[dict[str, Any], Any]:
    import torch
    from transformers import AutoTokenizer

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer([r["text"] for r in rows], padding=True, truncation=True, max_length=96, return_tensors="pt")
    labels = torch.tensor([int(r["label"] == "positive") for r in rows], device=device)
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}, labels


def work(jobs: Any, results: Any, folder: str, data: str, until: float) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    base = loaded.to(device).train()
    rows, val = (read(folder, Path(data) / f"{split}.jsonl", device) for split in ("train", "val"))
    while (job := jobs.get()) is not None and time.time() < until:
        results.put((*job, train(base, *job, rows, val, device)))
    results.put(None)


def main() -> None:
    import sweep  # beside this file

    options = sweep.parser(__doc__, RESULTS).parse_args()
    if options.model is None or options.data is None:
        from veneer.assets import data_file, model_folder

        options.model, options.data = str(model_folder("minilm")), str(data_file("sentiment", "train").parent)
    sizes = sorted(ROWS) if options.full else [40, 200]
    seeds = (0, 1, 2) if options.full else (0,)
    wanted = [(m, rate, n, seed) for n in sizes for seed in seeds for m, rates in RATES.items() for rate in rates]
    report(sweep.run(wanted, ("method", "rate", "rows", "seed", "accuracy"), work, options))


def report(rows: list[dict[str, Any]]) -> None:
    cells: dict[tuple[int, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["rows"], row["method"]][row["rate"]].append(row["accuracy"])
    print(f"{'rows':>5}  {'method':9} {'best rate':>9} {'accuracy':>8}  accuracy by rate")
    for (count, method), rates in sorted(cells.items()):
        means = {rate: sum(found) / len(found) for rate, found in rates.items()}
        best = max(means, key=lambda r: means[r])
        curve = " ".join(f"{rate:.0e}:{100 * means[rate]:.1f}" for rate in sorted(means))
        print(f"{count:5}  {method:9} {best:9.0e} {100 * means[best]:8.1f}  {curve}", flush=True)


if __name__ == "__main__":
    main()
