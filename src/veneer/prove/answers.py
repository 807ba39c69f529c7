"""What a model answers to a few inputs, and how far two sets of answers lie apart.

An input is whatever the model's forward takes: a mapping of keyword arguments, a tuple, or one tensor. An answer is the
logits where the output has some, else its first tensor. So the same proofs hold for a language model, a classifier, an
encoder-decoder and any other module.

How close is equal? What must run through the same code with the same numbers (the base, a plain reload) has to agree in
every bit. What is summed in another order (merged against adapted) cannot; there the largest difference may be NOISE of
the largest logit, which is a few times what reordering was measured to do to the logits of 2 to 30 layer transformers.
In bf16 that is too much to find a small fault by, so what can be held to its weights (P3, P5) is held to them as well.
A proof in fp32 is computed in fp32 (full_precision): TF32, which torch allows
convolutions on a GPU, keeps 10 bits of every factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.core.model import activate
from veneer.errors import StateError
from veneer.prove.found import bare

__all__ = ["NOISE", "Answer", "Inputs", "Subject", "answers", "batches", "call", "divergence", "few", "first_tensor"]
__all__ += ["full_precision", "gap", "largest", "limit", "same_bits", "shows_pictures", "tensors_in"]

Inputs = Mapping[str, Any] | Sequence[Any] | Tensor

NOISE = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 1.5e-2, torch.bfloat16: 0.12}
REPEATED = 7  # tokens of a source that a decoder is asked to repeat
ROWS, TOKENS = 4, 64  # of an input that a training batch was cut to
NOT_AN_INPUT = ("labels", "label", "start_positions", "end_positions")  # asking for the loss would only cost memory
PER_TOKEN = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


@dataclass(frozen=True)
class Answer:
    """`values` with padding taken out; `are_logits` says that they stand for probabilities."""

    values: Tensor
    are_logits: bool


@dataclass(frozen=True)
class Subject:
    """One adapter of a model under proof: what the model answers with it alone, and what the untouched base answers."""

    model: nn.Module
    name: str
    inputs: Sequence[Inputs]
    adapted: list[Answer]
    base: list[Answer]

    @classmethod
    def of(cls, model: nn.Module, name: str, inputs: Sequence[Inputs]) -> Subject:
        activate(model, name)
        adapted = answers(model, inputs)
        with bare(model):
            return cls(model, name, inputs, adapted, answers(model, inputs))

    def now(self) -> list[Answer]:
        """What the model answers as it stands at this moment."""
        return answers(self.model, self.inputs)


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products and convolutions in fp32, whatever was allowed before, and that again afterwards.

    torch has an older and a newer way to say so, and refuses to read the older one where somebody used the newer.
    """
    cuda, cudnn = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    try:
        was = torch.get_float32_matmul_precision(), cuda.allow_tf32, cudnn.allow_tf32
    except RuntimeError:
        kinds = (cuda, cudnn.conv, cudnn.rnn)
        allowed = [kind.fp32_precision for kind in kinds]
        try:
            for kind in kinds:
                kind.fp32_precision = "ieee"
            yield
        finally:
            for kind, before in zip(kinds, allowed, strict=True):
                kind.fp32_precision = before
        return
    try:
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(was[0])
        cudnn.allow_tf32 = was[2]


def answers(model: nn.Module, inputs: Sequence[Inputs]) -> list[Answer]:
    with torch.no_grad():
        return [_answer(model, each) for each in inputs]


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output, with the inputs moved to where the model is."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    if isinstance(inputs, Tensor):
        return model(inputs.to(device))
    if isinstance(inputs, Mapping):
        return model(**_with_decoder(model, {k: _to(v, device) for k, v in inputs.items() if k not in NOT_AN_INPUT}))
    return model(*(_to(each, device) for each in inputs))


def _with_decoder(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """An encoder-decoder that is given no target is asked to repeat the beginning of what it reads. Of one token alone
    its attention could say anything: queries and keys would seem to be without effect."""
    config = getattr(model, "config", None)
    start = getattr(config, "decoder_start_token_id", None)
    ids = inputs.get("input_ids")
    known = {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys()
    if not getattr(config, "is_encoder_decoder", False) or known or start is None or not isinstance(ids, Tensor):
        return inputs
    return {**inputs, "decoder_input_ids": torch.cat([ids.new_full((len(ids), 1), start), ids[:, :REPEATED]], 1)}


def first_tensor(output: Any) -> Tensor:
    """The logits, or else the first tensor of an output. A detector that picks its best places before it decodes them
    answers with the scores of all places: which ones it picks, and in which order, may hang on the last bit."""
    places = getattr(output, "enc_outputs_class", None)
    return places if isinstance(places, Tensor) else tensors_in(output)[0]


def tensors_in(output: Any) -> list[Tensor]:
    """The logits alone where there are some, else all tensors of an output. A detector says more than its logits."""
    if isinstance(output, Tensor):
        return [output]
    boxes, logits = getattr(output, "pred_boxes", None), getattr(output, "logits", None)
    if isinstance(logits, Tensor) and not isinstance(boxes, Tensor):
        return [logits]
    held = output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ()
    if found := [each for each in held if isinstance(each, Tensor)]:
        return found
    raise StateError(f"the model's output, a {type(output).__name__}, holds no tensor that proofs could compare")


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _answer(model: nn.Module, inputs: Inputs) -> Answer:
    output = call(model, inputs)
    values = first_tensor(output).detach()
    if not values.is_floating_point():
        raise StateError(f"the model's first output is of type {values.dtype}, which says nothing about its weights")
    logits = isinstance(getattr(output, "logits", None), Tensor) and values.shape[-1] > 1  # one column is a regression
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape == values.shape[:2]:
        values = values[mask.bool().to(values.device)]
    return Answer(values, logits)


# ---- distances -------------------------------------------------------------------------------------------------------


def same_bits(these: Sequence[Answer], those: Sequence[Answer]) -> bool:
    """Equal in every element. NaN equals nothing, so a broken model never passes."""
    return all(torch.equal(a.values.cpu(), b.values.cpu()) for a, b in zip(these, those, strict=True))


def gap(these: Sequence[Answer], those: Sequence[Answer]) -> float:
    """The largest difference of any two elements; infinite where one of them is NaN or the shapes differ."""
    return max((_gap(a.values, b.values) for a, b in zip(these, those, strict=True)), default=0.0)


def _gap(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    found = float((a.cpu().double() - b.cpu().double()).abs().max()) if a.numel() else 0.0
    return found if math.isfinite(found) else math.inf


def largest(these: Sequence[Answer]) -> float:
    return max((float(a.values.abs().max()) for a in these if a.values.numel()), default=0.0)


def limit(these: Sequence[Answer]) -> float:
    """How far answers may lie from `these` and still be called equal after a reordering of sums."""
    return max(NOISE.get(a.values.dtype, NOISE[torch.float32]) for a in these) * max(largest(these), 1e-30)


def divergence(these: Sequence[Answer], those: Sequence[Answer]) -> tuple[str, float]:
    """How much `these` differ in meaning: mean KL(these || those) in nats for logits, else the relative change."""
    if all(a.are_logits for a in these):
        parts = [_kl(a.values, b.values) for a, b in zip(these, those, strict=True)]
        return "KL", float(torch.cat(parts).mean())
    top = sum(float((a.values.double() - b.values.double()).square().sum()) for a, b in zip(these, those, strict=True))
    bottom = sum(float(b.values.double().square().sum()) for b in those)
    return "relative change", math.sqrt(top / bottom) if bottom else math.inf if top else 0.0


def _kl(a: Tensor, b: Tensor) -> Tensor:
    p, q = (each.cpu().double().flatten(0, -2).log_softmax(-1) for each in (a, b))
    return (p.exp() * (p - q)).sum(-1)


# ---- inputs ----------------------------------------------------------------------------------------------------------


def batches(inputs: Inputs | list[Any]) -> list[Inputs]:
    """One input or a list of several as a list, each cut to a few rows."""
    return [few(each) for each in (inputs if isinstance(inputs, list) else [inputs])]


def shows_pictures(inputs: Inputs) -> bool:
    """Whether pictures stand among the tokens."""
    return isinstance(inputs, Mapping) and "input_ids" in inputs and any(key.startswith("pixel_") for key in inputs)


def few(inputs: Inputs, rows: int = ROWS, tokens: int = TOKENS) -> Inputs:
    """The first rows of a batch of token ids, cut to `tokens`: enough to tell two models apart, and cheap.

    Only what is known to run along the tokens is cut; a batch of anything else keeps its rows as they are, and one of
    words and pictures stays whole, for which patches belong to which token is the model's own knowledge. What
    has another number of rows than the ids, or than the first tensor, is the same for all (FLUX's places of patches).
    """
    if isinstance(inputs, Tensor):
        return inputs[:rows]
    if shows_pictures(inputs):
        return {key: value for key, value in inputs.items() if key not in NOT_AN_INPUT}  # type: ignore[union-attr]
    if not isinstance(inputs, Mapping):
        return tuple(each[:rows] if isinstance(each, Tensor) else each for each in inputs)
    held = [inputs.get("input_ids"), *inputs.values()]
    batch = next((each.shape[0] for each in held if isinstance(each, Tensor) and each.ndim), None)
    return {key: _cut(key, value, rows, tokens, batch) for key, value in inputs.items() if key not in NOT_AN_INPUT}


def _cut(key: str, value: Any, rows: int, tokens: int, batch: int | None) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0 or (batch is not None and value.shape[0] != batch):
        return value
    value = value[:rows]
    return value[:, :tokens] if key in PER_TOKEN and value.ndim == 2 else value
