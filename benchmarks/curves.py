"""Every method trained on one small real task, beside PEFT where PEFT has it: held-out loss along the way.

    python benchmarks/curves.py [--json FILE] [--steps 80] [--seed 0] [METHOD ...]

all-MiniLM-L6-v2 (22.7 M parameters) learns the sentiment of short film reviews on a CPU: rank 8 on all linear layers of
the encoder, 16 reviews a step, the same order of rows and the same classifier for every run, and the same random start
in both libraries: Veneer's run begins with the numbers that PEFT drew. Each method has one rate, the same in both
libraries and not tuned: the curves show that a method learns and that it learns as its peer does, not which method is
best. Results already in the file are kept, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from beside import METHODS, Common, Method, ours, theirs
from torch import Tensor, nn

from veneer.core.allocate import RankAllocator

RESULTS = Path(__file__).parent / "results" / "curves.json"
TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
BATCH, LONGEST, HELD_OUT, WARMUP, LOOKS = 16, 20, 192, 8, 8
Batch = dict[str, Tensor]


def batches(folder: Path, split: str, count: int, size: int, seed: int) -> Iterator[Batch]:
    """`count` batches of short reviews, in an order that the seed alone says."""
    from transformers import AutoTokenizer

    from veneer.assets import model_folder

    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    ids = AutoTokenizer.from_pretrained(model_folder("minilm"))([r["text"] for r in rows])["input_ids"]
    short = [(i, r["label"]) for i, r in zip(ids, rows, strict=True) if len(i) <= LONGEST]
    dice = torch.Generator().manual_seed(seed)
    order = [
        short[i] for _ in range(count * size // len(short) + 1) for i in torch.randperm(len(short), generator=dice)
    ]
    for k in range(count):
        yield _batch(order[k * size : (k + 1) * size])


def _batch(rows: list[tuple[list[int], str]]) -> Batch:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([r == "positive" for _, r in rows]).long()}


def base(seed: int) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    from veneer.assets import model_folder

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_folder("minilm"), num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model.classifier.reset_parameters()
    return model


def run(library: str, method: Method, start: nn.Module, common: Common, rows: list[Batch], held: list[Batch]) -> Any:
    """The held-out loss by step, and the accuracy at the end."""
    torch.manual_seed(0)
    model: Any = copy.deepcopy(start)
    if method.config is not None:
        model, trained = theirs(model, method, common, rows[:4])
    if library == "veneer":
        like, model = (model, copy.deepcopy(start)) if method.config is not None else (None, model)
        trained = ours(model, method, common, rows[:4], like)
    budget = Budget(library, model, method, common)
    optimizer = torch.optim.AdamW(trained.values(), lr=method.rate, weight_decay=0.0)
    losses, began = [(0, judge(model, held)[0])], time.process_time()
    for step, batch in enumerate(rows, 1):
        rate = method.rate * min(1, step / WARMUP) * 0.5 * (1 + math.cos(math.pi * (step - 1) / len(rows)))
        optimizer.param_groups[0]["lr"] = rate
        (model(**batch).loss + budget.penalty()).backward()
        budget.observe()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        budget.allocate(step)
        optimizer.zero_grad(set_to_none=True)
        if step % (len(rows) // LOOKS) == 0:
            losses.append((step, judge(model, held)[0]))
    count = sum(p.numel() for name, p in trained.items() if "classifier" not in name)
    seconds = time.process_time() - began
    return {"losses": losses, "accuracy": judge(model, held)[1], "parameters": count, "seconds": seconds}


class Budget:
    """AdaLoRA's schedule in either library; nothing for the other methods."""

    def __init__(self, library: str, model: Any, method: Method, common: Common) -> None:
        self.own = self.peft = None
        if method.fields.get("delta") == "adalora" and library == "veneer":
            steps, rank = common.steps, common.rank // 2
            self.own = RankAllocator(
                model, target_rank=rank, total_steps=steps, warmup=steps // 5, final=steps // 3, every=5
            )
        elif method.fields.get("delta") == "adalora":
            self.peft = model.base_model  # whose forward adds the penalty by itself

    def penalty(self) -> Tensor | float:
        return self.own.penalty() if self.own else 0.0

    def observe(self) -> None:
        if self.own:
            self.own.observe()

    def allocate(self, step: int) -> None:
        if self.own:
            self.own.allocate(step)
        elif self.peft:
            self.peft.update_and_allocate(step)


@torch.no_grad()
def judge(model: Any, held: list[Batch]) -> tuple[float, float]:
    model.eval()
    loss = right = total = 0.0
    for batch in held:
        logits, labels = (
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
            batch["labels"],
        )
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
        total += len(labels)
    model.train()
    return loss / total, right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results are kept")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("methods", nargs="*", choices=[[], *METHODS], help="only these, and again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    from veneer.assets import data_file

    folder = data_file("sentiment", "train").parent
    rows = list(batches(folder, "train", args.steps, BATCH, args.seed))
    held = list(batches(folder, "val", HELD_OUT // 64, 64, 0))
    start, common = base(args.seed), Common(8, 16, TARGETS, ("classifier",), args.steps)
    found = json.loads(args.json.read_text()) if args.json.exists() else {"runs": {}}
    for name in args.methods or METHODS:
        for library in ("veneer", "peft") if METHODS[name].config else ("veneer",):
            if not args.methods and library in found["runs"].get(name, {}):
                continue
            result = run(library, METHODS[name], start, common, rows, held)
            found["runs"].setdefault(name, {})[library] = result | {"rate": METHODS[name].rate}
            found["about"] = _about(args)
            args.json.write_text(json.dumps(found, indent=1) + "\n")
            first, last = result["losses"][0][1], result["losses"][-1][1]
            print(
                f"{name:12}{library:8}{result['parameters']:10,} parameters  held-out loss {first:.3f} -> {last:.3f}  "
                f"accuracy {100 * result['accuracy']:.1f} %  {result['seconds']:.0f} s",
                flush=True,
            )


def _about(args: argparse.Namespace) -> dict[str, Any]:
    import transformers

    import peft

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return {"steps": args.steps, "seed": args.seed, "batch": BATCH, "held_out": HELD_OUT, **versions}


if __name__ == "__main__":
    main()
