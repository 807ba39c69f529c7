"""One class per picture, for any image classifier of transformers.

The rows are a folder with one folder for each class, a table of paths and labels, or a data set of a hub. The model's
own processor makes pixels of them (data/images.py). A head that the base brings for other classes is replaced by a new
one, trained whole beside the adapter and saved with it.

    loss       cross entropy, one for each picture
    metrics    accuracy; top-5 where there are more than five classes; macro F1
    detail     which class is taken for which: the confusion that the report draws
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from veneer.data.batch import Batch, collate
from veneer.data.encode import Encodings
from veneer.data.images import encode_pictures
from veneer.data.types import LossOn, Pictured
from veneer.errors import DataError
from veneer.tasks.base import TASKS, Judged, Shown, Task, class_options
from veneer.tasks.metrics import accuracy, macro_f1

__all__ = ["ImageClassification"]

TOP = 5


@TASKS.register("image_classification")
class ImageClassification(Task):
    name = "image_classification"
    auto_class = "AutoModelForImageClassification"
    reader = "AutoImageProcessor"
    kinds = (Pictured,)
    labelled = True

    def model_options(self) -> dict[str, Any]:
        return {**class_options(self.labels), "ignore_mismatched_sizes": True}

    def training_options(self, settings: Any) -> dict[str, Any]:
        return {"augment": settings.augment}

    def encode(self, examples: Sequence[Any], *, loss_on: LossOn = "assistant", **options: Any) -> Encodings:
        if self.known_labels.kind != "one":
            fix = "give each picture one class; numbers that are classes must be whole"
            raise DataError(f"a picture has one class here, and the labels are {self.known_labels}", fix=fix)
        return encode_pictures(examples, self.tokenizer, self.known_labels, **options)

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        """What stands beside the body; inside transformers' wrapper of a model of timm, what timm says it is."""
        inner: Any = getattr(model, "timm_model", None)
        if inner is None:
            return super().heads(model)
        head = inner.get_classifier()
        return tuple(name for name, module in model.named_modules() if module is head)

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Predictions are the classes of the TOP largest logits, the best first."""
        pixels = batch.inputs["pixel_values"]
        kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), pixels.dtype)
        logits = model(pixel_values=pixels.to(kind)).logits.float()
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        best = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices
        return Judged(loss, [tuple(row) for row in best.tolist()], batch.labels.tolist())

    def metrics(self, predicted: Sequence[Any], wanted: Sequence[Any]) -> dict[str, float]:
        first = [row[0] for row in predicted]
        found = {"accuracy": accuracy(first, wanted), "macro_f1": macro_f1(first, wanted)}
        if len(self.known_labels.names) > TOP:
            hits = sum(label in row for row, label in zip(predicted, wanted, strict=True))
            found["top5"] = hits / max(len(wanted), 1)
        return found

    @torch.no_grad()
    def detail(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        """How often each class (row) was taken for each (column)."""
        names = self.known_labels.names
        counts = [[0] * len(names) for _ in names]
        for batch in batches:
            judged = self.judge(model, batch)
            for row, label in zip(judged.predicted, judged.wanted, strict=True):
                counts[label][row[0]] += 1
        return {"confusion": {"classes": list(names), "counts": counts}}

    @torch.no_grad()
    def shown(self, model: nn.Module, examples: Sequence[Any]) -> list[Shown]:
        samples, names = self.encode(examples).samples, self.known_labels.names
        judged = self.judge(model, collate(samples).to(next(model.parameters()).device))
        rows = zip(examples, judged.wanted, judged.predicted, strict=True)
        return [Shown(_told(example), names[wanted], names[found[0]]) for example, wanted, found in rows]


def _told(example: Pictured) -> str:
    return Path(example.image).name if isinstance(example.image, str) else example.where
