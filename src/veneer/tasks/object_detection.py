"""Boxes and their classes on a picture, for detectors of transformers that predict sets: DETR, YOLOS, RT-DETR.

The model's own forward matches its guesses with the boxes (it needs scipy for that) and gives the loss, which
box_loss.py has it count for a batch at once; the rows are those of data/boxes.py. Classes and boxes come from two
heads that are new, or trained on, whole beside the adapter; where the base already finds the very classes of the data,
its own heads are the start.

    loss        the model's, which is a mean over the boxes of a micro-batch, times their number. What is said of boxes
                is so a sum over boxes, however a batch is cut; what is said of guesses that found none is weighted by
                boxes, and depends on the cut a little where pictures hold unlike numbers of them
    metrics     COCO's mAP (IoU 0.5 to 0.95), mAP at 0.5 and at 0.75, by pycocotools
    detail      the average precision of each class

The decision a reader would question: it trains in fp32 and refuses bf16. Half of a box's loss is an overlap, a
difference of products of coordinates, of which bf16 keeps two digits; and the matching has no kernel for it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veneer.data.batch import Batch, collate
from veneer.data.boxes import encode_boxes, of_one_size
from veneer.data.encode import Encodings
from veneer.data.types import IGNORE, Boxed, LossOn
from veneer.extras import need
from veneer.tasks.base import TASKS, Judged, Shown, Task, class_options
from veneer.tasks.box_loss import at_once

__all__ = ["Found", "ObjectDetection", "average_precision"]

SURE = 0.5  # the score from which a guess is shown to people
INSIDE = ("class_embed", "bbox_embed", "enc_score_head", "enc_bbox_head")  # the heads of RT-DETR and its kin
# DETR's decoder begins with a self-attention over zeros: nothing that its projections learn could be seen.
IDLE = {"detr": "model.decoder.layers.0.self_attn", "table-transformer": "model.decoder.layers.0.self_attn"}


class Found(NamedTuple):
    """One box: its class, how sure the model is (1 for what is so), and x, y, width, height in pixels."""

    label: int
    score: float
    box: tuple[float, float, float, float]


@TASKS.register("object_detection")
class ObjectDetection(Task):
    name = "object_detection"
    auto_class = "AutoModelForObjectDetection"
    reader = "AutoImageProcessor"
    kinds = (Boxed,)
    labelled = True
    exact = True
    drawn = ("denoising_class_embed",)  # RT-DETR's: what its training adds to the queries

    def __init__(self, tokenizer: Any = None, labels: Any = None, renderer: Any = None) -> None:
        super().__init__(of_one_size(tokenizer) if tokenizer is not None else None, labels, renderer)

    def model_options(self) -> dict[str, Any]:
        return {**class_options(self.labels), "ignore_mismatched_sizes": True}

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        """Children beside the body; where there are none, the heads that RT-DETR and its kin have in their decoder."""
        inside = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in INSIDE}
        if len(dict(model.named_children())) > 1 or not inside:
            return super().heads(model)
        listed = {
            name: list(dict(m.named_children())) if isinstance(m, nn.ModuleList) else [] for name, m in inside.items()
        }
        return tuple(each for name, held in listed.items() for each in ([f"{name}.{i}" for i in held] or [name]))

    def idle(self, model: nn.Module) -> tuple[str, ...]:
        place = IDLE.get(getattr(getattr(model, "config", None), "model_type", ""))
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return tuple(name for name in linears if place and name.startswith(f"{place}."))

    def encode(self, examples: Sequence[Any], *, loss_on: LossOn = "assistant", **options: Any) -> Encodings:
        need("scipy", extra="detection", use="match boxes")
        need("pycocotools", extra="detection", use="measure how well boxes are found")
        return encode_boxes(examples, self.tokenizer, self.known_labels, **options)

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """The loss; and, where nothing is trained, all guesses of each picture."""
        targets = wanted_of(batch.labels)
        boxes = sum(len(each["class_labels"]) for each in targets)
        with at_once(model):
            out = model(pixel_values=batch.inputs["pixel_values"], labels=targets)
        loss = out.loss * max(1, boxes)
        if torch.is_grad_enabled():
            return Judged(loss)
        high, wide = batch.inputs["pixel_values"].shape[-2:]
        sizes = [(high, wide)] * len(targets)
        guesses = self.tokenizer.post_process_object_detection(out, threshold=0.0, target_sizes=sizes)
        shape = torch.tensor([wide, high, wide, high])
        return Judged(loss, [_guessed(each) for each in guesses], [_wanted(each, shape) for each in targets])

    def rehearsed(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """All that the model says, instead of the loss, whose matching asks for numbers and holds little."""
        found = model(pixel_values=batch.inputs["pixel_values"])
        said = [v for v in found.values() if isinstance(v, Tensor) and v.requires_grad and v.ndim < 5]
        return torch.stack([v.float().sum() for v in said]).sum()

    def metrics(self, predicted: Sequence[Any], wanted: Sequence[Any]) -> dict[str, float]:
        found = average_precision(predicted, wanted, len(self.known_labels.names))
        return {name: found[name] for name in ("map", "map50", "map75")}

    @torch.no_grad()
    def detail(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        """The average precision of each class that there is."""
        names = self.known_labels.names
        judged = [self.judge(model, batch) for batch in batches]
        if not judged:
            return {}
        predicted, wanted = [p for each in judged for p in each.predicted], [w for each in judged for w in each.wanted]
        found = average_precision(predicted, wanted, len(names))["classes"]
        return {"average_precision": {names[i]: value for i, value in found.items()}}

    @torch.no_grad()
    def shown(self, model: nn.Module, examples: Sequence[Any]) -> list[Shown]:
        batch = collate(self.encode(examples).samples).to(next(model.parameters()).device)
        judged = self.judge(model, batch)
        rows = zip(examples, judged.wanted, judged.predicted, strict=True)
        return [Shown(_place(example), self._told(wanted), self._told(found)) for example, wanted, found in rows]

    def _told(self, found: Sequence[Found]) -> str:
        names = self.known_labels.names
        sure = [f"{names[label]} at {box[0]:.0f}, {box[1]:.0f}" for label, score, box in found if score >= SURE]
        return "; ".join(sure) or "nothing"


def _place(example: Boxed) -> str:
    return Path(example.image).name if isinstance(example.image, str) else example.where


def wanted_of(labels: Tensor) -> list[dict[str, Tensor]]:
    """The targets of a batch in transformers' words; rows of IGNORE only fill up."""
    is_box = labels[..., 0] != IGNORE
    counts = is_box.sum(1).tolist()
    rows = labels[is_box]  # of all pictures: one wait for the device instead of one for each
    pairs = zip(rows[:, 0].long().split(counts), rows[:, 1:].split(counts), strict=True)
    return [{"class_labels": classes, "boxes": boxes} for classes, boxes in pairs]


def _guessed(found: dict[str, Tensor]) -> list[Found]:
    boxes = found["boxes"].tolist()
    rows = zip(found["labels"].tolist(), found["scores"].tolist(), boxes, strict=True)
    return [Found(label, score, (x0, y0, x1 - x0, y1 - y0)) for label, score, (x0, y0, x1, y1) in rows]


def _wanted(target: dict[str, Tensor], shape: Tensor) -> list[Found]:
    rows = zip(target["class_labels"].tolist(), (target["boxes"].cpu() * shape).tolist(), strict=True)
    return [Found(label, 1.0, (x - wide / 2, y - high / 2, wide, high)) for label, (x, y, wide, high) in rows]


def average_precision(
    predicted: Sequence[Sequence[Found]], wanted: Sequence[Sequence[Found]], classes: int
) -> dict[str, Any]:
    """COCO's figures, and under "classes" the average precision of each class that is wanted.

    >>> there = [Found(0, 1.0, (10, 10, 20, 20))]
    >>> round(average_precision([[Found(0, 0.9, (10, 10, 20, 20))]], [there], 2)["map"], 3)
    1.0
    >>> average_precision([[Found(1, 0.9, (10, 10, 20, 20))]], [there], 2)["map"]
    0.0
    """
    need("pycocotools", extra="detection", use="measure how well boxes are found")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it talks
        truth: Any = COCO()
        guesses: Any = COCO()
        truth.dataset, guesses.dataset = _coco(wanted, classes), _coco(predicted, classes)
        truth.createIndex()
        guesses.createIndex()
        judge = COCOeval(truth, guesses, "bbox")
        judge.evaluate()
        judge.accumulate()
    precision = torch.from_numpy(judge.eval["precision"])[..., 0, 2]  # (IoU, recall, class), all areas, 100 guesses
    of_class = {i: _mean(precision[..., i]) for i in range(classes) if (precision[..., i] > -1).any()}
    places = {f"map{round(100 * at)}": _mean(precision[i]) for i, at in enumerate(judge.params.iouThrs)}
    return {"map": _mean(precision), "map50": places["map50"], "map75": places["map75"], "classes": of_class}


def _mean(values: Tensor) -> float:
    """Over what is defined: classes that are wanted nowhere are not."""
    held = values[values > -1]
    return float(held.mean()) if held.numel() else 0.0


def _coco(rows: Sequence[Sequence[Found]], classes: int) -> dict[str, Any]:
    boxes = [
        {
            "id": 0, "image_id": picture, "category_id": found.label, "bbox": list(found.box), "score": found.score,
            "area": found.box[2] * found.box[3], "iscrowd": 0,
        }
        for picture, row in enumerate(rows, 1)
        for found in row
    ]  # fmt: skip
    annotations = [{**box, "id": number} for number, box in enumerate(boxes, 1)]
    pictures = [{"id": picture} for picture in range(1, len(rows) + 1)]
    return {"images": pictures, "annotations": annotations, "categories": [{"id": i} for i in range(classes)]}
