"""The loss of DETR, YOLOS and RT-DETR, counted for a batch at once where transformers goes picture by picture.

transformers matches guesses with boxes for each picture, and then, for each layer of the decoder and each share of the
loss, collects the matched boxes of each picture by a small index of its own. On a GPU that is some thousand kernels and
transfers a step, each waited for: of 64 pictures it takes longer than the detector. Here the matching stays as it is,
and what follows is told that there is one picture with all the guesses and all the boxes: the same numbers, summed in
another order.

The decision a reader would question: the library's own function is run, with its criterion replaced by a subclass, in
a copy of the function's names. Nothing of the library is touched, and what it changes about the loss stays in force.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["at_once", "joined_loss"]

CRITERIA = {"transformers.loss.loss_rt_detr": "RTDetrLoss", "transformers.loss.loss_for_object_detection": "ImageLoss"}
SHARES = ("labels", "boxes", "vfl", "focal", "bce")  # of the loss, whose sums do not ask which picture a box is on
Pairs = list[tuple[Tensor, Tensor]]
"""Which guess goes with which box, picture by picture."""


@contextmanager
def at_once(model: nn.Module) -> Iterator[None]:
    """The model's loss counted for all pictures together, where that is known to be the same."""
    joined = joined_loss(getattr(model, "loss_function", None))
    if joined is None:
        yield
        return
    before = model.__dict__.get("_loss_function")
    model.loss_function = joined  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del model._loss_function
        else:
            model.loss_function = before


@cache
def joined_loss(own: Any) -> Callable[..., Any] | None:
    """This function of transformers with a criterion that counts at once; None where there is none to be replaced."""
    name = CRITERIA.get(getattr(own, "__module__", None) or "")
    if name is None or not isinstance(own, FunctionType) or name not in own.__code__.co_names:
        return None
    criterion = type(f"Joined{name}", (Joined, own.__globals__[name]), {})
    joined = FunctionType(
        own.__code__, own.__globals__ | {name: criterion}, own.__name__, own.__defaults__, own.__closure__
    )
    joined.__kwdefaults__ = own.__kwdefaults__
    return joined


class Joined:
    """Before a criterion of transformers: a batch is one picture."""

    def get_loss(
        self, loss: str, outputs: dict[str, Any], targets: Any, indices: Pairs, *rest: Any, **more: Any
    ) -> Any:
        if loss in SHARES:
            outputs, targets, indices = as_one(outputs, targets, indices)
        return super().get_loss(loss, outputs, targets, indices, *rest, **more)  # type: ignore[misc]


def as_one(
    outputs: dict[str, Any], targets: Sequence[dict[str, Tensor]], indices: Pairs
) -> tuple[dict[str, Any], list[dict[str, Tensor]], Pairs]:
    """One picture that has all guesses, all boxes and all pairs."""
    logits: Tensor = outputs["logits"]  # (pictures, guesses, classes)
    guesses = {name: outputs[name].flatten(0, 1)[None] for name in ("logits", "pred_boxes")}
    boxes = {name: torch.cat([each[name] for each in targets]) for name in ("class_labels", "boxes")}
    counts = [len(each["boxes"]) for each in targets]
    before = [sum(counts[:i]) for i in range(len(counts))]
    guess = _renumbered([pair[0] for pair in indices], [i * logits.shape[1] for i in range(len(logits))])
    box = _renumbered([pair[1] for pair in indices], before)
    return guesses, [boxes], [(guess.to(logits.device), box.to(logits.device))]


def _renumbered(found: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
    """Numbers within each picture as numbers within all of them."""
    added = torch.tensor(starts).repeat_interleave(torch.tensor([len(each) for each in found]))
    together = torch.cat(list(found))
    return together + added.to(together.device)
