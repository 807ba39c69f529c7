"""One label per word (names, parts of speech).

A word's label sits on its first piece; the pieces that continue it, and special tokens, carry no label. So predictions
are read where there is a label, and a sequence of words gets exactly as many tags as it has words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from veneer.data.batch import Batch, collate, pad_id_of
from veneer.data.encode import Encodings
from veneer.data.labelled import encode_tagged
from veneer.data.types import IGNORE, LossOn, Tagged
from veneer.tasks.base import TASKS, Judged, Shown, Task, class_options
from veneer.tasks.cross_entropy import plain_cross_entropy
from veneer.tasks.metrics import accuracy, entity_f1

__all__ = ["TokenClassification"]


@TASKS.register("token_classification")
class TokenClassification(Task):
    name = "token_classification"
    auto_class = "AutoModelForTokenClassification"
    kinds = (Tagged,)
    labelled = True

    def model_options(self) -> dict[str, Any]:
        return class_options(self.labels)

    def encode(self, examples: Sequence[Any], *, loss_on: LossOn = "assistant", **options: Any) -> Encodings:
        return encode_tagged(examples, self.tokenizer, self.known_labels, **options)

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        logits = model(**batch.inputs).logits
        if torch.is_grad_enabled():
            return Judged(plain_cross_entropy(logits, batch.labels))
        guesses = logits.detach().argmax(-1)
        rows = zip(guesses, batch.labels, batch.labels != IGNORE, strict=True)
        pairs = [(guess[has].tolist(), label[has].tolist()) for guess, label, has in rows]
        return Judged(plain_cross_entropy(logits, batch.labels), [p for p, _ in pairs], [w for _, w in pairs])

    @torch.no_grad()
    def shown(self, model: nn.Module, examples: Sequence[Any]) -> list[Shown]:
        samples, names = self.encode(examples, overlong="truncate").samples, self.known_labels.names
        judged = self.judge(model, collate(samples, pad_id_of(self.tokenizer)).to(next(model.parameters()).device))
        rows = zip(examples, judged.wanted, judged.predicted, strict=True)
        return [Shown(" ".join(e.tokens), *(" ".join(names[i] for i in tags) for tags in (w, p))) for e, w, p in rows]

    def metrics(self, predicted: Sequence[Any], wanted: Sequence[Any]) -> dict[str, float]:
        names = self.known_labels.names
        said, true = ([[names[tag] for tag in row] for row in rows] for rows in (predicted, wanted))
        per_word = accuracy([tag for row in said for tag in row], [tag for row in true for tag in row])
        return {"accuracy": per_word, **(entity_f1(said, true) if _are_entities(names) else {})}


def _are_entities(names: Sequence[str]) -> bool:
    """Whether the tags mark spans: an O for "none", or prefixes. Parts of speech do not, and have no entity F1."""
    return "O" in names or any(name[1:2] == "-" and name[0] in "BIELSU" for name in names)
