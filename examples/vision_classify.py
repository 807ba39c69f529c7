"""A probe, LoRA, DoRA and full fine-tuning of one image classifier, and what each leaves of what the base could do.

    python examples/vision_classify.py                                     a tiny ViT on drawn pictures, in seconds
    python examples/vision_classify.py --model vits --data fashion --train 1000 --test 1000 --size 56 --seeds 1
    python examples/vision_classify.py --model vits --data fashion --train 12000 --test 4000 --size 112 \\
        --epochs 3 --batch 64 --grid --seeds 3 --workers 11                              on a GPU

Every method gets the same rows, steps and evaluations; with --grid each of its learning rates is tried with each seed,
and the rate with the best mean accuracy on the validation rows is the one whose test accuracy counts. The test rows are
looked at once for each run, after its end.

The old task: before anything is trained, a probe learns hand-written digits on the base's features. Afterwards the same
probe reads the features of the model as the training left it. With its adapter off, an adapted model gives the features
of the first day, bit for bit. Full fine-tuning has no such switch.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pictures
import torch
from torch import Tensor, nn

import veneer
from veneer import assets
from veneer.data.batch import batches
from veneer.data.dataset import load
from veneer.data.types import Pictured
from veneer.errors import Diverged
from veneer.tasks.image_classification import ImageClassification

METHODS: dict[str, dict[str, Any]] = {
    "probe": {"method": "freeze", "layers": 0},
    "LoRA": {"method": "lora", "r": 8, "alpha": 16},
    "DoRA": {"method": "lora", "r": 8, "alpha": 16, "combine": "dora"},
    "full": {"method": "full"},
}
RATES = {
    "probe": (1e-2, 3e-2, 1e-1, 3e-1),
    "LoRA": (3e-4, 1e-3, 2e-3, 4e-3),
    "DoRA": (3e-4, 1e-3, 2e-3, 4e-3),
    "full": (1e-5, 3e-5, 1e-4, 3e-4),
}
USUAL = {"probe": 3e-2, "LoRA": 1e-3, "DoRA": 1e-3, "full": 5e-5}
FOR_TINY = {"probe": 2e-2, "LoRA": 1e-2, "DoRA": 1e-2, "full": 2e-3}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7, "image_size": 28,
        "initializer_range": 0.2}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="tiny", help="tiny, vits, a folder or a hub id")
    parser.add_argument("--data", default="drawn", help="drawn, fashion or a .npz file (see pictures.py)")
    parser.add_argument("--train", type=int, default=240, help="rows; a sixth of them is the validation part")
    parser.add_argument("--test", type=int, default=60)
    parser.add_argument("--size", type=int, default=28, help="pixels to which pictures are brought")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--grid", action="store_true", help="try every learning rate with every seed")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="probe LoRA DoRA full, or nothing")
    parser.add_argument("--beside", help="show the runs of this file, which --json kept, in the same table")
    parser.add_argument("--linear", action="store_true", help="also the best linear classifier on the base's features")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", help="keep all runs in this file")
    parser.add_argument("--picture", help="draw what LoRA's first seed took for what (PNG)")
    return parser.parse_args()


# ------------------------------------------------------------------ what every run shares


@cache
def folder_of(name: str, size: int) -> str:
    """The base, with a processor that makes pictures of the wanted size."""
    from transformers import AutoImageProcessor, BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tempfile.mkdtemp(prefix="vision-base-")
    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    if name == "tiny":
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(**TINY)).save_pretrained(folder)
        BitImageProcessor(**sizes).save_pretrained(folder)
        return folder
    where = assets.model_folder("vits", say=print) if name == "vits" else Path(name)
    for file in Path(where).iterdir():
        Path(folder, file.name).symlink_to(file.resolve())
    processor = AutoImageProcessor.from_pretrained(where, **sizes)
    Path(folder, "preprocessor_config.json").unlink()
    processor.save_pretrained(folder)
    return folder


def classifier(folder: str, seed: int) -> tuple[nn.Module, Any]:
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    from transformers.utils import logging as told

    told.set_verbosity_error()  # that the head is new is no news
    told.disable_progress_bar()
    torch.manual_seed(seed)
    device, kind = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=10, dtype=kind)
    return model.to(device), AutoImageProcessor.from_pretrained(folder)


@cache
def data_of(data: str, train: int, test: int) -> tuple[Any, Any]:
    """Rows to train on, with the validation part beside them, and the rows of the test."""
    held = pictures.read(data).part(train, test)
    every = pictures.rows(held.train, held.train_labels)
    kept = len(every) // 6
    sets = [load(part, kinds=(Pictured,)) for part in (every[kept:], every[:kept])]
    tested = load(pictures.rows(held.test, held.test_labels), kinds=(Pictured,))
    return replace(sets[0], held_out=sets[1]), tested


# ------------------------------------------------------------------ the old task


@torch.no_grad()
def features(model: Any, pixels: Tensor) -> Tensor:
    """The class token after the last layer."""
    like = next(model.parameters())
    model.eval()
    parts = [model.base_model(pixel_values=part.to(like)).last_hidden_state[:, 0] for part in pixels.split(128)]
    return torch.cat(parts).float()


@cache
def old_pixels(data: str, folder: str) -> tuple[Tensor, Tensor]:
    from PIL import Image
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    found, labels = pictures.digits(data)
    coloured = [Image.fromarray(each).convert("RGB") for each in found]
    return processor(images=coloured, return_tensors="pt")["pixel_values"], torch.from_numpy(labels).long()


class OldProbe:
    """A linear classifier on the base's features: its mean and spread, weights by ridge regression on two thirds."""

    def __init__(self, seen: Tensor, labels: Tensor) -> None:
        cut = 2 * len(labels) // 3
        self.mean, self.spread = seen[:cut].mean(0), seen[:cut].std(0) + 1e-6
        x = self.ready(seen[:cut]).double()
        y = torch.nn.functional.one_hot(labels[:cut], 10).double().to(x.device)
        self.weight = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1], device=x.device).double(), x.T @ y)
        self.labels, self.cut = labels, cut

    def ready(self, seen: Tensor) -> Tensor:
        scaled = (seen - self.mean) / self.spread
        return torch.cat([scaled, torch.ones_like(scaled[:, :1])], 1)

    def accuracy(self, seen: Tensor) -> float:
        guessed = (self.ready(seen[self.cut :]).double() @ self.weight).argmax(1).cpu()
        return float((guessed == self.labels[self.cut :]).double().mean())


# ------------------------------------------------------------------ the best that a linear classifier can do


def best_linear(asked: argparse.Namespace) -> tuple[float, float, float]:
    """Logistic regression on what the head reads, trained to its end: the penalty that is best on the validation rows,
    and the accuracy on those and on the test. No probe of few steps can be better by luck or worse by its rate."""
    train, tested = data_of(asked.data, asked.train, asked.test)
    model, processor = classifier(folder_of(asked.model, asked.size), 0)
    judged = ImageClassification(processor, train.labels)
    parts = [read_by_the_head(model, judged, rows.examples) for rows in (train, train.held_out, tested)]
    mean, spread_ = parts[0][0].mean(0), parts[0][0].std(0) + 1e-6
    (x, y), *others = [((seen - mean) / spread_, labels) for seen, labels in parts]
    found = []
    for penalty in (1e-4, 1e-3, 1e-2, 1e-1):
        head = nn.Linear(x.shape[1], len(train.labels.names))
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

        def loss(head: nn.Linear = head, optimizer: Any = optimizer, penalty: float = penalty) -> Tensor:
            optimizer.zero_grad()
            value = nn.functional.cross_entropy(head(x), y) + penalty * head.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        val, test = (float((head(seen).argmax(1) == labels).double().mean()) for seen, labels in others)
        found.append((val, test, penalty))
    val, test, penalty = max(found)
    return penalty, val, test


@torch.no_grad()
def read_by_the_head(model: Any, judged: ImageClassification, examples: Sequence[Any]) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().cpu()))
    labels = [judged.judge(model.eval(), batch.to(model.device)).wanted for batch in batches(
        judged.encode(examples).samples, 128)]  # fmt: skip
    hook.remove()
    return torch.cat(seen), torch.tensor([label for part in labels for label in part])


# ------------------------------------------------------------------ one run


def one_run(task: tuple[dict[str, Any], str, float, int]) -> dict[str, Any]:
    """Train once and measure. `task`: the arguments, the method, its learning rate and the seed."""
    asked, method, rate, seed = task
    logging.disable(logging.WARNING)
    if asked["workers"] > 1:
        torch.set_num_threads(1)
    folder = asked["folder"]
    train, tested = data_of(asked["data"], asked["train"], asked["test"])
    model, processor = classifier(folder, seed)
    pixels, labels = old_pixels(asked["data"], folder)
    first = features(model, pixels)
    old = OldProbe(first, labels)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vision-run-") as place:
        try:
            run = veneer.train(
                model, train, tokenizer=processor, task="image", out=f"{place}/run", lr=rate, seed=seed,
                epochs=asked["epochs"], batch_size=asked["batch"], warmup=0.1, weight_decay=0.01,
                eval_every=asked["every"], save_every=10**6, **METHODS[method],
            )  # fmt: skip
        except Diverged as error:
            return {"method": method, "rate": rate, "seed": seed, "diverged": str(error).splitlines()[0]}
        seconds = time.perf_counter() - started
        judged = ImageClassification(processor, train.labels)
        model.eval()
        samples = judged.encode(tested.examples).samples
        device = next(model.parameters()).device
        found = judged.evaluate(model, (batch.to(device) for batch in batches(samples, 128)))
        confusion = judged.detail(model, (batch.to(device) for batch in batches(samples, 128)))["confusion"]
        best = min(run.metrics("val_loss")[1:], key=lambda row: row["val_loss"])
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        file = next(iter(sorted(run.adapter.resolve().glob("*model.safetensors"))))
        size = file.stat().st_size
    result = {
        "method": method, "rate": rate, "seed": seed, "val": best["accuracy"], "test": found["accuracy"],
        "top5": found["top5"], "test_loss": found["val_loss"], "trained": trained, "bytes": size, "seconds": seconds,
        "old_before": old.accuracy(first), "old_after": old.accuracy(features(model, pixels)), "confusion": confusion,
    }  # fmt: skip
    if veneer.adapters(model):
        with veneer.disabled(model):
            back = features(model, pixels)
        result |= {"old_off": old.accuracy(back), "off_is_base": torch.equal(back, first)}
    return result


def all_runs(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if wrong := set(asked.methods) - set(METHODS):
        raise SystemExit(f"--methods {' '.join(sorted(wrong))}: there are {', '.join(METHODS)}")
    if not asked.methods:
        return
    rows = asked.train - asked.train // 6
    steps = max(1, round(asked.epochs * -(-rows // asked.batch)))
    told = {**vars(asked), "folder": folder_of(asked.model, asked.size), "every": max(1, steps // 4)}
    usual = FOR_TINY if asked.model == "tiny" else USUAL
    tasks = [
        (told, method, rate, seed)
        for method in reversed(METHODS)  # the slow ones first
        if method in asked.methods
        for rate in (RATES[method] if asked.grid else (usual[method],))
        for seed in range(asked.seeds)
    ]
    if asked.workers == 1:
        yield from map(one_run, tasks)
        return
    with ProcessPoolExecutor(asked.workers, get_context("spawn")) as pool:
        yield from pool.map(one_run, tasks)


# ------------------------------------------------------------------ what is shown


def chosen(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """For each method the runs at the rate that was best on the validation rows, of those at which no seed diverged."""
    lost = {(run["method"], run["rate"]) for run in runs if "diverged" in run}
    runs = [run for run in runs if (run["method"], run["rate"]) not in lost]
    found = {}
    for method in dict.fromkeys(run["method"] for run in sorted(runs, key=lambda run: [*METHODS].index(run["method"]))):
        own = [run for run in runs if run["method"] == method]
        rates = sorted({run["rate"] for run in own})
        best = max(rates, key=lambda rate: statistics.mean(r["val"] for r in own if r["rate"] == rate))
        found[method] = [run for run in own if run["rate"] == best]
    return found


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| method | trained | file | rate | validation | test | old task, tuned | old task, adapter off |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, runs in found.items():
        first = runs[0]
        off = "-"
        if all("old_off" in run for run in runs):
            same = all(run["off_is_base"] for run in runs)
            off = spread([run["old_off"] for run in runs]) + (", bit for bit" if same else ", CHANGED")
        val, test, tuned = (spread([run[key] for run in runs]) for key in ("val", "test", "old_after"))
        trained, size = f"{first['trained']:,}", f"{first['bytes'] / 2**20:.2f} MiB"
        cells = [method, trained, size, f"{first['rate']:.0e}", val, test, tuned, off]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, in percent."""
    shown = f"{100 * statistics.mean(values):.1f}"
    return shown + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def draw(confusion: dict[str, Any], file: str) -> None:
    """Rows: what it is. Columns: what it was taken for. The darker, the more; mistakes in another colour."""
    from PIL import Image, ImageDraw, ImageFont

    names, counts = confusion["classes"], confusion["counts"]
    cell, left, top = 44, 90, 70
    picture = Image.new("RGB", (left + cell * len(names) + 10, top + cell * len(names) + 10), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for i, name in enumerate(names):
        pen.text((left - 8, top + cell * i + cell / 2), name, "black", font, "rm")
        pen.text((left + cell * i + cell / 2, top - 8 - 14 * (i % 2)), name, "black", font, "mb")
        for j, count in enumerate(counts[i]):
            share = count / max(1, sum(counts[i]))
            strong = share if i == j else min(1.0, 4 * share)
            full = (28, 92, 166) if i == j else (196, 78, 52)
            colour = tuple(round(255 - (255 - part) * strong) for part in full)
            box = (left + cell * j, top + cell * i, left + cell * (j + 1) - 2, top + cell * (i + 1) - 2)
            pen.rectangle(box, colour)
            if count:
                ink = "white" if strong > 0.5 else "black"
                pen.text((box[0] + cell / 2, box[1] + cell / 2), str(count), ink, font, "mm")
    picture.save(file)


def outcome(run: dict[str, Any]) -> str:
    if "diverged" in run:
        return f"diverged; its rate is out ({run['diverged']})"
    return f"validation {run['val']:.3f}, test {run['test']:.3f}, {run['seconds']:.0f} s"


def main() -> None:
    asked = arguments()
    runs = json.loads(Path(asked.beside).read_text())["runs"] if asked.beside else []
    started = time.perf_counter()
    for run in all_runs(asked):
        runs.append(run)
        print(f"{run['method']:<6} rate {run['rate']:.0e} seed {run['seed']}: {outcome(run)}", flush=True)
    found = chosen(runs)
    seconds = time.perf_counter() - started
    before = next(iter(found.values()))[0]["old_before"]
    print(f"\n{table(found)}\n\nold task before: {100 * before:.1f}; {seconds:.0f} s in all")
    if asked.linear:
        penalty, val, test = best_linear(asked)
        print(f"best linear classifier (penalty {penalty:g}): validation {100 * val:.1f}, test {100 * test:.1f}")
    if asked.json:
        kept = {name: value for name, value in vars(asked).items() if name not in ("json", "picture", "beside")}
        Path(asked.json).write_text(json.dumps({"asked": kept, "seconds": seconds, "runs": runs}))
    if asked.picture:
        draw(found["LoRA"][0]["confusion"], asked.picture)
    assert all(run["off_is_base"] for run in runs if "off_is_base" in run), "an adapter that is off must leave no trace"
    print("with its adapter off, every adapted model gives the base's features, bit for bit")


if __name__ == "__main__":
    main()
