"""Conversations with pictures, for models that read both (LLaVA, Qwen-VL and their kin).

It is causal language modelling: the same template, mask and loss. Beside the tokens go the pictures, as the model's own
processor makes them (data/illustrated.py); batches are padded and never packed, for a picture belongs to its row.

    --targets all-linear     both towers and what stands between them
    --targets language       the language model alone; vision: the vision tower alone
    --targets '.*language_model.*(q|v)_proj'      any regular expression for whole names

Layers of a vision tower behind the one whose output is used (LLaVA takes the last but one) are left alone, and said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.select import TOWERS, block_index
from veneer.data.batch import Batch
from veneer.data.encode import Encodings
from veneer.data.illustrated import MARK, Spoken, encode_illustrated, pictures_of, processed
from veneer.data.types import IGNORE, Illustrated, LossOn
from veneer.tasks.base import TASKS, Shown
from veneer.tasks.causal_lm import SHOWN_TOKENS, CausalLM
from veneer.tasks.cross_entropy import head_split

__all__ = ["ImageText"]


@TASKS.register("image_text")
class ImageText(CausalLM):
    name = "image_text"
    auto_class = "AutoModelForImageTextToText"
    reader = "AutoProcessor"
    kinds = (Illustrated,)
    packs = False

    @staticmethod
    def speaker(reader: Any) -> Any:
        return Spoken(reader)

    def encode(self, examples: Sequence[Any], *, loss_on: LossOn = "assistant", **options: Any) -> Encodings:
        return encode_illustrated(examples, self.tokenizer, self.known_renderer, loss_on=loss_on, **options)

    def prepare(self, model: nn.Module, batch: Batch) -> str:
        """Whether body and head run apart is tried on words alone: an answer's."""
        answer = batch.inputs["input_ids"][:1][batch.labels[:1] != IGNORE][None]
        self.split = head_split(model, {"input_ids": answer, "attention_mask": torch.ones_like(answer)})
        way = "in chunks, without the logits" if self.split.body is not None else "from whole logits"
        return f"loss {way}: {self.split.why}"

    def rehearsed(self, model: nn.Module, batch: Batch) -> Tensor:
        raise NotImplementedError("where pictures stand among the words is read off the tokens")

    def idle(self, model: nn.Module) -> tuple[str, ...]:
        config: Any = getattr(model, "config", None)
        used, vision = getattr(config, "vision_feature_layer", None), getattr(config, "vision_config", None)
        depth = getattr(vision, "num_hidden_layers", None)
        if used is None or depth is None:
            return ()
        last = max(depth + 1 + each if each < 0 else each for each in ([used] if isinstance(used, int) else used))
        return tuple(
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and set(TOWERS["vision"]).intersection(name.split("."))
            and (block_index(name) or 0) >= last
        )

    @torch.no_grad()
    def shown(self, model: nn.Module, examples: Sequence[Any]) -> list[Shown]:
        """What the model says to the pictures and questions of these rows, greedily."""
        return [self._answered(model, example) for example in examples]

    def _answered(self, model: Any, example: Illustrated) -> Shown:
        messages = example.chat.messages
        last = max((i for i, turn in enumerate(messages) if turn["role"] == "assistant"), default=0)
        asked = next((turn["content"] for turn in reversed(messages[:last]) if turn["role"] == "user"), "")
        seen = sum(turn["content"].count(MARK) for turn in messages[:last])
        text = self.known_renderer.prompt(messages[:last])
        inputs = processed(self.tokenizer, text, pictures_of(example)[:seen])
        device = next(model.parameters()).device
        inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        made = model.generate(
            **inputs, max_new_tokens=SHOWN_TOKENS, do_sample=False, eos_token_id=list(self.ends) or None
        )
        answer = made[0, inputs["input_ids"].shape[1] :].tolist()
        return Shown(asked.replace(MARK, "[picture] ").strip(), messages[last]["content"], self._text(answer))
