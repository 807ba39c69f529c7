"""Everything that can go wrong, looked at before it costs anything: no weights are read and nothing is written.

    rows       all of them are read and checked; every problem with file and line           a DataError, exit 2
    template   the renderer says which it is and what ends a turn
    mask       one sample with its trained tokens marked, and the share of all that is trained
    lengths    how long samples are, and what becomes of those over max_len
    memory     from the model's shapes, against what is free here                            exit 3 when it does not fit
               (denoisers, detectors and models of pictures and words: a step is rehearsed without numbers)
    plan       steps, learning rate and how long it will take

The first steps are the very functions that training uses, so what passes here passes there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from veneer.advise.device import free_memory, usual_device
from veneer.advise.keep import KNOWN_BLOCKS, choose, fusing, levels_of, longest_row
from veneer.advise.lr import learning_rate
from veneer.advise.memory import Estimate, estimate_memory
from veneer.advise.plan import CHOICES, Plan
from veneer.advise.rehearsal import Rehearsed, Scene, placed, rehearse
from veneer.advise.shapes import shapes_of
from veneer.advise.time import Duration, estimate_time
from veneer.app.text import bytes_, count, number, share
from veneer.data.encode import Encodings
from veneer.data.preview import runs
from veneer.errors import ConfigError, DoesNotFit
from veneer.extras import quiet
from veneer.tasks.base import Task
from veneer.train.base import DTYPES, config_of, precision_of, recomputing
from veneer.train.fast import heaviest, host_memory
from veneer.train.method import place, to_train
from veneer.train.prepare import encode_rows, make_task, read_data, refuse_packed_twice, settle_length
from veneer.train.settings import Reads, Resolved

__all__ = ["Checked", "preflight"]

Tell = Callable[..., Any]

# what memory depends on, under one name in the settings and in the estimate
SHARED = (
    "task", "method", "r", "targets", "exclude", "modules_to_save", "layers", "dropout", "combine", "quant",
    "batch_size", "optimizer",
)  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """What was found, with the settings as far as they could be settled."""

    resolved: Resolved
    train: Encodings
    val_rows: int
    mask: list[dict[str, Any]]  # one sample in stretches: text, is_trained, tokens
    template: str
    steps: int
    lr: float
    lr_reason: str
    memory: Estimate | Rehearsed | None  # None where nothing is known before the first step
    free_bytes: int
    longest_row: int | None  # tokens of the longest single row that memory has room for
    duration: Duration | None

    def to_json(self) -> dict[str, Any]:
        return {
            "fits": None if self.memory is None else self.memory.fits,
            "rows": self.train.rows,
            "val_rows": self.val_rows,
            "template": self.template,
            "tokens": self.train.facts(),
            "trained_share": self.train.trained_share,
            "mask": self.mask,
            "plan": {"steps": self.steps, "lr": self.lr, "lr_reason": self.lr_reason},
            "memory": None if self.memory is None else self._memory(self.memory),
            "time": None if self.duration is None else self.duration.to_json(),
            "settings": {
                name: str(origin) for name, origin in self.resolved.origins.items() if origin.how != "default"
            },
        }

    def _memory(self, memory: Estimate | Rehearsed) -> dict[str, Any]:
        told = {name: value for name, value in memory.to_json().items() if name != "plan"}
        more = {"free_bytes": self.free_bytes, "longest_row": self.longest_row}
        return {**told, **more, "knobs": [str(knob) for knob in memory.knobs]}

    def raise_if_too_big(self) -> None:
        if self.memory is not None and self.memory.fits is False:
            raise DoesNotFit(
                f"this needs {bytes_(self.memory.needed_bytes)} and {bytes_(self.free_bytes)} are free",
                f"memory of the {usual_device()}",
                "; ".join(str(knob) for knob in self.memory.knobs) or "take a smaller model",
            )


def preflight(resolved: Resolved, tell: Tell) -> Checked:
    """Look at everything; what is found is told as it is found, in the events of a run."""
    settings = Reads(resolved)
    if settings.model is None or settings.data is None:
        raise ConfigError("a model and data are needed", "command line", "veneer check MODEL DATA")
    parts = read_data(settings, None, tell)
    task = make_task(settings, settings.model, None, parts, tell)
    settle_length(settings, settings.model)
    refuse_packed_twice(settings, settings.model)
    train, _ = encode_rows(task, settings, parts, tell)
    mask = _told_mask(train, task.renderer.tokenizer if task.renderer else task.tokenizer, tell)
    memory, free, longest, duration = None, free_memory(usual_device()), None, None
    if settings.task in CHOICES["task"]:
        memory, free, longest = _memory(settings, train, labels=len(task.labels.names) if task.labels else 2)
        size = memory.parameters
    else:
        memory, size = _rehearsed(settings, task, train, free, tell)
    if memory is not None:
        _tell_memory(memory, free, longest, tell)
    steps, rate, reason = _plan(settings, train, memory, size, tell)
    if isinstance(memory, Estimate):
        duration = _duration(settings, train, steps, memory, tell)
    template = task.renderer.decision if task.renderer is not None else ""
    return Checked(
        settings.resolved, train, len(parts.validation), mask, template, steps, rate, reason, memory, free,
        None if longest is None else longest[0], duration,
    )  # fmt: skip


def _told_mask(train: Encodings, tokenizer: Any, tell: Tell) -> list[dict[str, Any]]:
    """The sample of median length: neither the stub at the top of the file nor the longest."""
    ordered = sorted(train.samples, key=len)
    sample = ordered[len(ordered) // 2]
    found = runs(sample, tokenizer) if sample.layout == "token" else []
    if found:
        tell("mask", sample=[tuple(run) for run in found], where=sample.where)
    if train.has_tokens:
        tell("lengths", text=f"{train.lengths.sketch()}, {train.lengths}")
    return [run._asdict() for run in found]


def _memory(settings: Reads, train: Encodings, labels: int) -> tuple[Estimate, int, tuple[int, str] | None]:
    """With the longest sample there is; and how long a single one could be, keeping what."""
    device = usual_device()
    free = free_memory(device)
    precision = settings.precision if settings.precision != "auto" else precision_of(str(settings.model))[0]
    longest, _ = _lengths(settings, train)
    shapes = shapes_of(config_of(str(settings.model)), settings.task, max(labels, 1))
    wanted = settings.fuse == "on" or (settings.fuse == "auto" and fusing(shapes.hidden, device)[0])
    fused = wanted and settings.method == "lora" and shapes.family in KNOWN_BLOCKS
    known = {
        "device": device, "precision": precision, "labels": max(labels, 1), "max_len": longest, "fused": fused,
        "accumulate": settings.global_batch > settings.batch_size,
        **{name: getattr(settings, name) for name in SHARED},
    }  # fmt: skip
    level, plan = settings.recompute, Plan(**known)
    host = host_memory(torch.device(device))
    if level == "auto":
        level = choose(shapes, plan, free, host).level
    elif level not in levels_of(fused, device):
        level = "input"
    row = longest_row(shapes, plan, free, host) if shapes.tokens_fixed is None else None
    could = None if row is None else (row[0], row[1].level)
    return estimate_memory(shapes, memory=free, recompute=level, **known), free, could


def _rehearsed(settings: Reads, task: Task, train: Encodings, free: int, tell: Tell) -> tuple[Rehearsed | None, int]:
    """Of tasks whose models are of too many builds for a formula, and how many parameters there are. None where it
    cannot be done, and the reason is said."""
    tell("doing", text="rehearsing a step without numbers")
    device, source = usual_device(), str(settings.model)
    precision = settings.precision
    if precision == "auto":
        precision = "fp32" if task.exact else precision_of(source)[0]
    samples = heaviest(train.samples, settings.batch_size)
    batch = task.collate(samples)

    def scene(model: nn.Module, stack: ExitStack) -> Scene:
        placed(model)
        trained = place(model, settings, task.heads(model), task.idle(model), task.aim)
        to_train(model)
        if settings.recompute not in ("none", "auto"):
            stack.enter_context(recomputing(model, True))
        beside = task.beside(device) * DTYPES[precision].itemsize
        return Scene(model, list(trained.values()), lambda: task.rehearsed(model, batch), beside)

    with ExitStack() as stack, quiet():
        empty = task.empty(source, DTYPES[precision])
        size = 0 if isinstance(empty, str) else sum(p.numel() for p in empty.parameters())
        if isinstance(empty, str):
            found = empty
        elif settings.quant != "none":
            found = f"packing to {settings.quant} looks at numbers"
        else:
            found = rehearse(lambda: scene(empty, stack), settings.optimizer, device, free)
    if isinstance(found, str):
        tell("note", text=f"memory not estimated: {found}; the run tries its heaviest batch before the first step")
        return None, size
    tell("note", text=f"memory is that of a step of {len(samples)} rows; how long it takes is told by the run")
    return found, size


def _lengths(settings: Reads, train: Encodings) -> tuple[int, float]:
    """Tokens of the longest row, and of all on the average; a picture has a token for each patch, and one more."""
    if settings.task == "image_classification":
        config = config_of(str(settings.model))
        sizes = getattr(config, "image_size", 224), getattr(config, "patch_size", 16)
        image, patch = (max(size) if isinstance(size, list | tuple) else int(size) for size in sizes)
        return (image // patch) ** 2 + 1, (image // patch) ** 2 + 1
    longest = max((len(sample) for sample in train.samples), default=settings.max_len)
    return longest, train.tokens / max(len(train), 1)


def _tell_memory(memory: Estimate | Rehearsed, free: int, longest: tuple[int, str] | None, tell: Tell) -> None:
    parts = ", ".join(
        f"{name} {bytes_(size)}" for name, size in memory.parts.items() if size >= memory.total_bytes / 50
    )
    verdict = "needs" if memory.fits else "does NOT fit: needs"
    text = f"{verdict} {bytes_(memory.needed_bytes)} of {bytes_(free)} free ({parts})"
    if longest is not None:
        text += f"; a single row could have {longest[0]:,} tokens (recompute {longest[1]})"
    tell("memory" if memory.fits else "warning", text=text)
    for knob in memory.knobs if not memory.fits else ():
        tell("note", text=str(knob))


def _plan(
    settings: Reads, train: Encodings, memory: Estimate | Rehearsed | None, size: int, tell: Tell
) -> tuple[int, float, str]:
    per_epoch = -(-len(train) // settings.global_batch)
    steps = settings.steps if settings.steps is not None else max(1, round(settings.epochs * per_epoch))
    if settings.lr == "auto":
        names = ("alpha", "scaling", "combine", "method", "task")
        given = {name: getattr(settings, name) for name in names}
        rate, reason = learning_rate(size, rank=settings.r, steps=steps, **given)
    else:
        rate, reason = float(settings.lr), str(settings.resolved.origins["lr"])
    text = f"{steps:,} steps of {settings.global_batch} rows, {settings.batch_size} at a time"
    text += f"; lr {number(rate)} ({reason})"
    if memory is not None:
        share_trained = memory.trainable / max(memory.parameters + memory.trainable, 1)
        text += f"; {count(memory.trainable)} parameters trained ({share(share_trained)})"
    tell("plan", text=text, steps=steps, lr=rate)
    return steps, rate, reason


def _duration(settings: Reads, train: Encodings, steps: int, memory: Estimate, tell: Tell) -> Duration:
    tell("doing", text="measuring the speed of this machine")
    _, mean = _lengths(settings, train)
    plan = {name: getattr(settings, name) for name in SHARED} | {
        "max_len": max(1, round(mean)),
        "recompute": memory.plan.recompute,
        "fused": memory.plan.fused,
        "precision": memory.plan.precision,
    }
    found = estimate_time(memory.shapes, steps * settings.global_batch * mean, **plan)
    tell("time", text=str(found))
    return found
