"""Causal language modelling: every trained token is predicted from those before it.

Labels come unshifted. The loss is taken from the hidden states in chunks where the model allows it, so that logits over
the whole vocabulary never exist for more than a chunk; `prepare` finds out once and says which way it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from veneer.data.batch import Batch
from veneer.data.encode import Encodings, encode
from veneer.data.template import Renderer
from veneer.data.types import Chat, Completion, LossOn, Text, Tokens
from veneer.errors import StateError
from veneer.tasks.base import TASKS, Judged, Shown, Task
from veneer.tasks.cross_entropy import HeadSplit, chunked_cross_entropy, head_split, plain_cross_entropy

__all__ = ["CausalLM", "greedy"]

SHOWN_TOKENS = 32  # of an answer that is only to be looked at


@TASKS.register("causal_lm")
class CausalLM(Task):
    name = "causal_lm"
    auto_class = "AutoModelForCausalLM"
    kinds = (Chat, Completion, Text, Tokens)
    renders = packs = True
    split: HeadSplit = HeadSplit(None, None, "not looked at yet")

    def encode(self, examples: Sequence[Any], *, loss_on: LossOn = "assistant", **options: Any) -> Encodings:
        return encode(examples, self.known_renderer, loss_on=loss_on, **options)

    @property
    def known_renderer(self) -> Renderer:
        if self.renderer is None:
            raise StateError("a conversation needs a renderer", fix="CausalLM(tokenizer, renderer=Renderer(tokenizer))")
        return self.renderer

    @property
    def ends(self) -> tuple[int, ...]:
        return self.renderer.stop_ids if self.renderer is not None else ()

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

    def shown(self, model: nn.Module, examples: Sequence[Any]) -> list[Shown]:
        """What the model makes of the prompts of these rows, greedily."""
        found = []
        for example in examples:
            ids, asked, wanted = self._question(example)
            answer = greedy(model, ids, self.ends, SHOWN_TOKENS)
            found.append(Shown(asked, wanted, self._text(answer)))
        return found

    def _question(self, example: Any) -> tuple[list[int], str, str]:
        """The prompt of a row as tokens and in words, and the right answer: the last turn, the completion, the rest."""
        renderer = self.known_renderer
        if isinstance(example, Chat):
            last = max((i for i, turn in enumerate(example.messages) if turn["role"] == "assistant"), default=0)
            before = example.messages[:last]
            asked = next((turn.get("content", "") for turn in reversed(before) if turn["role"] == "user"), "")
            wanted = example.messages[last].get("content", "")
            return renderer.prompt_ids(before, example.tools), asked, wanted
        if isinstance(example, Completion):
            return renderer.prompt_ids(example.prompt), example.prompt, example.completion.strip()
        ids = renderer.ids(example.text) if isinstance(example, Text) else list(example.input_ids)
        cut = max(1, len(ids) // 3)  # a text that is trained whole: its beginning
        return ids[:cut], self._text(ids[:cut]), self._text(ids[cut : cut + SHOWN_TOKENS])

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


@torch.no_grad()
def greedy(model: nn.Module, prompt: Sequence[int], ends: Sequence[int], limit: int) -> list[int]:
    """The likeliest continuation, token by token, up to one of `ends` (which is left off)."""
    found: list[int] = []
    ids, past = torch.tensor([list(prompt)], device=next(model.parameters()).device), None
    keeps = "past_key_values" in inspect.signature(model.forward).parameters
    while len(found) < limit:
        out = model(input_ids=ids, past_key_values=past, use_cache=True) if keeps else model(input_ids=ids)
        token = int(out.logits[0, -1].argmax())
        if token in ends:
            break
        found.append(token)
        new = ids.new_tensor([[token]])
        ids, past = (new, out.past_key_values) if keeps else (torch.cat([ids, new], 1), None)
    return found
