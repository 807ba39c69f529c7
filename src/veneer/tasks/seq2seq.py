"""Text from text, with an encoder and a decoder (T5, BART).

The decoder is fed the target shifted by one, which each model does in its own way; its logits at a position are held
against the target at that position. At evaluation a few rows are also answered, greedily, because a low loss with
the true prefix given says little about what the model writes by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.data.batch import Batch, collate, pad_id_of
from veneer.data.encode import Encodings
from veneer.data.labelled import encode_pairs
from veneer.data.types import IGNORE, Completion, LossOn, Pair
from veneer.errors import ConfigError
from veneer.tasks.base import TASKS, Judged, Shown, Task
from veneer.tasks.cross_entropy import plain_cross_entropy
from veneer.tasks.metrics import exact_match, rouge_l

__all__ = ["Seq2Seq"]

ANSWERED = 32  # rows of an evaluation that are also generated


@TASKS.register("seq2seq")
class Seq2Seq(Task):
    name = "seq2seq"
    auto_class = "AutoModelForSeq2SeqLM"
    kinds = (Pair, Completion)
    answered = 0

    def encode(self, examples: Sequence[Any], *, loss_on: LossOn = "assistant", **options: Any) -> Encodings:
        return encode_pairs(examples, self.tokenizer, **options)

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        logits = model(**batch.inputs, decoder_input_ids=shifted(model, batch.labels), use_cache=False).logits
        loss = plain_cross_entropy(logits, batch.labels)
        if torch.is_grad_enabled() or self.tokenizer is None or self.answered >= ANSWERED:
            return Judged(loss)
        self.answered += len(batch.labels)
        return Judged(loss, self.answers(model, batch), self._texts(batch.labels))

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        self.answered = 0
        return super().evaluate(model, batches, stop)

    def metrics(self, predicted: Sequence[Any], wanted: Sequence[Any]) -> dict[str, float]:
        return {"exact_match": exact_match(predicted, wanted), "rouge_l": rouge_l(predicted, wanted)}

    def shown(self, model: nn.Module, examples: Sequence[Any]) -> list[Shown]:
        found = []
        for example in examples:
            batch = collate(self.encode([example]).samples, pad_id_of(self.tokenizer)).to(
                next(model.parameters()).device
            )
            asked, wanted = (
                (example.source, example.target) if isinstance(example, Pair) else (example.prompt, example.completion)
            )
            found.append(Shown(asked, wanted, *self.answers(model, batch)))
        return found

    @torch.no_grad()
    def answers(self, model: nn.Module, batch: Batch) -> list[str]:
        longest = int((batch.labels != IGNORE).sum(1).max()) + 8
        generate: Any = model.generate
        out = generate(**batch.inputs, max_new_tokens=longest, do_sample=False, num_beams=1)
        return self.tokenizer.batch_decode(out, skip_special_tokens=True)

    def _texts(self, labels: Tensor) -> list[str]:
        rows = [row[row != IGNORE].tolist() for row in labels]
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def shifted(model: nn.Module, labels: Tensor) -> Tensor:
    """What the decoder is fed: the target behind the start token, in the model's own way."""
    prepare: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None:
        raise ConfigError(
            f"{type(model).__name__} is no encoder-decoder that can be trained on pairs",
            fix="choose a T5 or BART kind of model, or the task causal_lm",
        )
    return prepare(labels=labels)
