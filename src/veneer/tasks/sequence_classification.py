"""One label per text: a class, several classes at once, or a number.

| labels | loss of a row | metrics |
| --- | --- | --- |
| one class | cross entropy | accuracy, macro F1 |
| several | binary cross entropy, mean over the classes | exact sets, macro F1 over classes |
| a number | squared error | mean squared error, rank correlation |

The head is new, so it is trained whole beside the adapter and saved with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from veneer.data.batch import Batch, collate, pad_id_of
from veneer.data.encode import Encodings
from veneer.data.labelled import encode_labelled
from veneer.data.types import Labelled, LossOn
from veneer.tasks.base import TASKS, Judged, Shown, Task, class_options
from veneer.tasks.metrics import accuracy, f1, macro_f1, mean_squared_error, spearman

__all__ = ["SequenceClassification"]

PROBLEMS = {
    "one": "single_label_classification",
    "several": "multi_label_classification",
    "number": "regression",
}  # transformers' words


@TASKS.register("sequence_classification")
class SequenceClassification(Task):
    name = "sequence_classification"
    auto_class = "AutoModelForSequenceClassification"
    kinds = (Labelled,)
    labelled = True

    @property
    def kind(self) -> str:
        return self.labels.kind if self.labels is not None else "one"

    def model_options(self) -> dict[str, Any]:
        return {**class_options(self.labels), "problem_type": PROBLEMS[self.kind]}

    def encode(self, examples: Sequence[Any], *, loss_on: LossOn = "assistant", **options: Any) -> Encodings:
        return encode_labelled(examples, self.tokenizer, self.known_labels, **options)

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        logits, labels = model(**batch.inputs).logits.float(), batch.labels
        if self.kind == "one":
            loss = F.cross_entropy(logits, labels, reduction="sum")
            return Judged(loss, logits.argmax(-1).tolist(), labels.tolist())
        if self.kind == "several":
            loss = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(-1).sum()
            return Judged(loss, (logits > 0).int().tolist(), labels.int().tolist())
        values = logits.squeeze(-1)
        return Judged(F.mse_loss(values, labels.float(), reduction="sum"), values.tolist(), labels.tolist())

    @torch.no_grad()
    def shown(self, model: nn.Module, examples: Sequence[Any]) -> list[Shown]:
        samples = self.encode(examples, overlong="truncate").samples
        judged = self.judge(model, collate(samples, pad_id_of(self.tokenizer)).to(next(model.parameters()).device))
        rows = zip(examples, judged.wanted, judged.predicted, strict=True)
        return [Shown(example.text, self.said(wanted), self.said(predicted)) for example, wanted, predicted in rows]

    def said(self, label: Any) -> str:
        """A label in words."""
        if self.kind == "number":
            return f"{label:.3g}"
        names = self.known_labels.names
        return (
            names[label]
            if self.kind == "one"
            else ", ".join(n for n, has in zip(names, label, strict=True) if has) or "none"
        )

    def metrics(self, predicted: Sequence[Any], wanted: Sequence[Any]) -> dict[str, float]:
        if self.kind == "number":
            return {"mse": mean_squared_error(predicted, wanted), "spearman": spearman(predicted, wanted)}
        if self.kind == "one":
            return {"accuracy": accuracy(predicted, wanted), "macro_f1": macro_f1(predicted, wanted)}
        exact = accuracy([tuple(p) for p in predicted], [tuple(w) for w in wanted])
        scores = [
            _f1_of_class(p, w) for p, w in zip(zip(*predicted, strict=True), zip(*wanted, strict=True), strict=True)
        ]
        return {"accuracy": exact, "macro_f1": sum(scores) / max(len(scores), 1)}


def _f1_of_class(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    both = sum(p and w for p, w in zip(predicted, wanted, strict=True))
    return f1(both, sum(predicted), sum(wanted))
