"""Causal language modelling: every trained token is predicted from those before it.

Labels come unshifted. The loss is taken from the hidden states in chunks where the model allows it, so that logits over
the whole vocabulary never exist for more than a chunk; `prepare` finds out once and says which way it is.
"""

from __future__ import annotations

import torch
from torch import nn

from veneer.data.batch import Batch
from veneer.data.types import Chat, Completion, Text, Tokens
from veneer.tasks.base import TASKS, Judged, Task
from veneer.tasks.cross_entropy import HeadSplit, chunked_cross_entropy, head_split, plain_cross_entropy

__all__ = ["CausalLM"]


@TASKS.register("causal_lm")
class CausalLM(Task):
    auto_class = "AutoModelForCausalLM"
    kinds = (Chat, Completion, Text, Tokens)
    split: HeadSplit = HeadSplit(None, None, "not looked at yet")

    def prepare(self, model: nn.Module, batch: Batch) -> str:
        self.split = head_split(model, batch.inputs)
        way = "in chunks, without the logits" if self.split.body is not None else "from whole logits"
        return f"loss {way}: {self.split.why}"

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        labels = batch.labels[:, 1:]
        if self.split.body is None or self.split.head is None:
            return Judged(plain_cross_entropy(model(**batch.inputs).logits[:, :-1], labels))
        hidden = self.split.body(**batch.inputs)[0][:, :-1]
        return Judged(chunked_cross_entropy(hidden, labels, self.split.head))

    @torch.no_grad()
    def answers(self, model: nn.Module, prompts: list[list[int]], new_tokens: int = 48) -> list[str]:
        """Greedy continuations of token ids, for the samples of a run."""
        found = []
        for ids in prompts:
            inputs = torch.tensor([ids], device=next(model.parameters()).device)
            out = model.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new_tokens, do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )  # fmt: skip
            found.append(self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
        return found
