"""Everything before the first step, in the order in which it can go wrong.

    data      read and checked, all rows, before any model is loaded
    tokens    rendered, masked and encoded; what is left out is said
    model     loaded, or taken as it is, in the type the device is fast at
    method    adapters attached, or layers thawed: from here on it is known what trains
    plan      packing, steps and the learning rate, each with its reason

Every choice made here that nobody asked for is a `rule` in config.yaml and is told as it is made. Rules are settled
once: a run that is resumed finds their results in its config.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.advise.lr import learning_rate
from veneer.ckpt.plan import originals
from veneer.core.host import plain_modules
from veneer.core.init import CHANGES_BASE, NEEDS
from veneer.core.model import elements
from veneer.data.dataset import Dataset, Split, as_recorded, load, split
from veneer.data.encode import Encodings
from veneer.data.isolation import check as check_isolation
from veneer.data.pack import obstacle, pack, packed_times
from veneer.data.preview import runs
from veneer.data.template import Renderer
from veneer.data.types import Encoded, Example
from veneer.errors import ConfigError, DataError, StateError
from veneer.kernels import varlen
from veneer.prove.base import is_as_filed, refuse_unless_as_filed
from veneer.prove.proof import Check, Outcome
from veneer.quant.inputs import load_inputs
from veneer.quant.layer import Packed, unrounded
from veneer.quant.model import choose, note_packing, quantize, save_energies
from veneer.quant.storage import EIGHT, STORAGES
from veneer.tasks.base import TASKS, Task
from veneer.train import base
from veneer.train.companions import ENERGIES
from veneer.train.method import lora_of, place
from veneer.train.run import Run
from veneer.train.settings import Reads

__all__ = ["Job", "prepare"]

Tell = Callable[..., Any]
TOO_MANY_LOST = 0.05  # of the samples over-long: beyond this the user is asked
ENOUGH_STEPS = 200  # packing leaves fewer, longer rows; below this many steps it would cost more than it saves
EVALUATIONS = 10  # in a run, when nobody says how often
SAVE_AT_LEAST = 100  # steps
SHOWN = 3
LOOKED_AT = 64  # rows that an init may look at


@dataclass
class Job:
    """What the loop works on."""

    settings: Reads
    task: Task
    model: nn.Module
    train: list[Encoded]
    val: list[Encoded]
    trained: Mapping[str, nn.Parameter]
    samples: list[Encoded]  # the training samples before packing
    shown: list[Example]  # rows that are looked at before and after
    base: Outcome | None = None  # whether the base is what its files hold
    by_samples: bool = False  # batches are one row each, without padding, and attention stays within the samples

    @property
    def device(self) -> torch.device:
        return next(iter(self.trained.values())).device

    @property
    def steps(self) -> int:
        return self.settings.steps


def prepare(run: Run, settings: Reads, model: Any, data: Any, tokenizer: Any, tell: Tell) -> Job:
    """From settings to a job. Afterwards the run's config.yaml holds what the rules worked out, data.json the data."""
    if settings.method == "lora":
        lora_of(settings)  # what cannot be built is said before anything is read
    named = settings.model or ""
    source = model if base.is_loaded(model) else named

    parts = read_data(settings, data, tell, run)
    task = make_task(settings, source, tokenizer, parts, tell)
    settle_length(settings, source)
    refuse_packed_twice(settings, source)
    train, val = encode_rows(task, settings, parts, tell)
    check_token_rows(settings, task, train.samples, tell)

    device = settle_precision(settings, source, tell)
    tell("doing", text="loading the model")
    if task.paints:
        model = task.load(base.DTYPES[settings.precision], device)
        pack_base(run, model, settings, task, train.samples, tell)
    elif isinstance(source, nn.Module):
        model = source
        pack_base(run, model, settings, task, train.samples, tell)
    else:
        model = load_base(run, source, settings, task, train.samples, device, tell)
    filed = hold_to_files(run, model, source, settings, task, tell) if isinstance(source, str) else None
    base.fit_head(model, task)
    if idle := task.idle(model):
        tell("note", text=f"left alone, for nothing they learn could be seen: {', '.join(idle)}")
    seen = to_look_at(settings, task, train.samples, device, tell) | what_was_lost(run, settings, source, model)
    trained = place(model, settings, task.heads(model), idle, task.aim, **seen)
    if not trained:
        raise ConfigError("nothing would be trained", fix="choose other targets or layers")
    tell("model", text=size_of(model, trained), **numbers_of(model, trained))

    by_samples = tell_attention(task, model, tell)
    rows = settle_packing(settings, task, model, train, device, tell)
    rows = task.gather(model, rows, val.samples, run.folder, tell)
    settle_plan(settings, model, len(rows), tell)
    run.write_config(settings.resolved)
    run.write_json("data.json", {**facts(parts, train, val, rows), "preview": previews(task, train.samples)})
    run.update(device=device_name(device), base=named or type(model).__name__)
    shown = (parts.validation.examples or parts.train.examples)[:SHOWN]
    held_out = by_length(val.samples)
    return Job(settings, task, model, rows, held_out, trained, train.samples, list(shown), filed, by_samples)


# ------------------------------------------------------------------ data and tokens


def read_data(settings: Reads, data: Any, tell: Tell, run: Run | None = None) -> Split:
    """All rows, checked, and the part of them that is held out; of a run that was begun, the part that it held out."""
    found = settings.data if settings.data is not None else data
    if found is None:
        raise ConfigError("no data was named", fix="give a file, a folder or a hub id: veneer train MODEL DATA")
    kinds = TASKS[settings.task].kinds
    options = {"columns": settings.columns, "skip_bad": settings.skip_bad}
    try:
        dataset = found if isinstance(found, Dataset) else load(found, kinds=kinds, **options)
    except DataError:
        refuse_kind(settings.task, load(found, **options))  # readable, but for another task? Else it raises as before
        raise
    refuse_kind(settings.task, dataset)
    if run is not None and run.path("data.json").exists():
        held = run.data["split"]
        dataset = as_recorded(dataset, {*held["train_ids"], *held["validation_ids"]})
    tell("data", text=str(dataset), rows=len(dataset))
    val = settings.val
    if isinstance(val, str):
        val = load(val, format=dataset.format, split="validation", **options)
    if val is None and not TASKS[settings.task].holds_out and dataset.held_out is None:
        val = hold_nothing_out(settings)
    parts = split(dataset, val, settings.seed)
    tell("data", text=str(parts), rows=len(parts.train), val_rows=len(parts.validation))
    return parts


def hold_nothing_out(settings: Reads) -> int:
    """Where every row counts and results are judged by eye. Whoever asks for evaluations must say on what."""
    if asked := [name for name in ("patience", "eval_every") if name in settings.given and getattr(settings, name)]:
        what = f"{' and '.join(asked)} need held-out rows, and the task {settings.task} holds none out by itself"
        raise ConfigError(what, "val", "set val to a share or a number of rows, or leave them out")
    settings.settle("val", 0, f"the task {settings.task} trains on every row")
    return 0


def refuse_kind(task: str, dataset: Dataset) -> None:
    """Rows that another task could use are the commonest mistake: say which."""
    kinds = TASKS[task].kinds
    if dataset.examples and not isinstance(dataset.examples[0], kinds):
        fitting = [name for name, other in TASKS.items() if isinstance(dataset.examples[0], other.kinds)]
        raise DataError(
            f"the task {task} cannot use rows of {dataset.format}", dataset.source,
            f"set task: {' or '.join(fitting)}" if fitting else "choose other data",
        )  # fmt: skip


def make_task(settings: Reads, source: Any, tokenizer: Any, parts: Split, tell: Tell) -> Task:
    kind = TASKS[settings.task]
    if kind.paints:
        tokenizer = base.pipeline_of(source, kind)
    elif tokenizer is None:
        tell("doing", text="loading the tokenizer")
        tokenizer = base.tokenizer_of(source, kind.reader)
    labels = parts.train.labels if kind.labelled else None
    renderer = Renderer(kind.speaker(tokenizer), settings.template, settings.system) if kind.renders else None
    if labels is not None:
        tell("note", text=str(labels))
    if renderer is not None:
        tell("note", text=renderer.decision)
        for warning in renderer.warnings:
            tell("warning", text=warning)
    task = kind(tokenizer, labels, renderer)
    task.configure(settings, tell)
    return task


def encode_rows(task: Task, settings: Reads, parts: Split, tell: Tell) -> tuple[Encodings, Encodings]:
    """Training and validation rows as tokens. Losing many of them to their length needs a yes."""
    options = {name: getattr(settings, name) for name in ("max_len", "overlong", "skip_bad", "loss_on")}

    def encoded(part: Dataset, what: str, **more: Any) -> Encodings:
        def report(done: int, total: int) -> None:
            tell("tokenising", what=what, done=done, total=total)

        found = task.encode(part.examples, **options, **more, report=report)
        tell("data", text=f"{what}: {found}", lengths=found.lengths.facts(), trained_share=found.trained_share)
        return found

    train = encoded(parts.train, "train", **task.training_options(settings))
    if not settings.yes and train.lost_share > TOO_MANY_LOST:
        raise DataError(
            f"{train.lost_share:.1%} of the samples are longer than max_len {settings.max_len:,} and would be lost "
            f"({train.lengths})",
            where="max_len",
            fix="raise max_len, choose overlong: split, or say yes: true",
        )
    if not len(parts.validation):
        return train, Encodings([], 0, train.lengths)
    return train, encoded(parts.validation, "held out")


def by_length(samples: list[Encoded]) -> list[Encoded]:
    """Rows of like length side by side: little of an evaluation batch is then padding."""
    return sorted(samples, key=len, reverse=True)


def settle_length(settings: Reads, source: Any) -> None:
    """No row may be longer than the model has positions for."""
    if TASKS[settings.task].paints:
        return
    context = base.context_of(base.config_of(source))
    if context is not None and context < settings.max_len:
        settings.settle("max_len", context, f"the model has {context:,} positions")


def refuse_packed_twice(settings: Reads, source: Any) -> None:
    """A folder that holds packed weights loads as they are, whatever is asked for; then asking is a mistake."""
    if settings.quant == "none" or not isinstance(source, str) or TASKS[settings.task].paints:
        return
    if (held := base.stored_as(base.config_of(source))) is not None:
        raise ConfigError(
            f"{source} is packed already ({held}), so it cannot be packed as {settings.quant}",
            "quant",
            "leave quant out to train on it as it is, or name the folder of the unpacked weights",
        )


# ------------------------------------------------------------------ the model


def load_base(
    run: Run, source: str, settings: Reads, task: Task, samples: Sequence[Encoded], device: torch.device, tell: Tell
) -> nn.Module:
    """The base on its device. Where the storage wants to know its inputs it is read twice: to look at some rows, and
    to be packed with what was seen. A run that goes on finds that in its folder, and so the same base."""
    load = partial(base.load_model, source, task, settings.precision, device, whole=settings.modules_to_save)
    rotate = rotation(settings)
    if not looks_before_packing(settings):
        return load(quant=settings.quant, rotate=rotate)
    path = run.folder / ENERGIES
    if not path.exists():
        rows = rows_to_look_at(settings, task, samples, device, tell)
        look_at_base(lambda kind: load(quant=kind), settings.quant, rows, path, device, tell)
    return load(quant=settings.quant, energies=str(path), rotate=rotate)


def hold_to_files(run: Run, model: nn.Module, source: str, settings: Reads, task: Task, tell: Tell) -> Outcome:
    """What was read, beside its files: every later proof compares the adapter with this base, right or wrong."""
    path, (part, where) = run.folder / ENERGIES, task.filed(model, source)
    inputs, fresh = load_inputs(path) if path.exists() else {}, (*task.heads(model), *task.drawn)
    fresh = (*fresh, *settings.modules_to_save)
    found = is_as_filed(part, where, fresh=fresh, inputs=inputs, complete=settings.method == "lora")
    refuse_unless_as_filed(found, where)
    told = found.statement if isinstance(found, Check) else found.reason
    took = f" ({found.figures['seconds']:.2g} s)" if isinstance(found, Check) else ""
    tell("note", text=f"base: {told.removesuffix('.')}{took}")
    return found


def look_at_base(
    load: Callable[[str], nn.Module], kind: str, rows: list[Any], path: Path, device: torch.device, tell: Tell
) -> None:
    """Inputs are wanted as the whole base would make them. In 8 bits they nearly are, where plain nf4 is off by enough
    to spoil what is made of them; where 8 bits do not fit, 4 have to do."""
    for seen_as in ("int8", kind):
        try:
            model = load(seen_as)
            packed = {name: module for name, module in plain_modules(model).items() if isinstance(module, Packed)}
            with unrounded(model):
                return save_energies(model, packed, rows, path)
        except torch.OutOfMemoryError:
            if seen_as == kind:
                raise
            tell("note", text=f"the base does not fit in 8 bits: its inputs are looked at with the base in {kind}")
        finally:
            model = packed = None
            base.release(device)
    return None


def looks_before_packing(settings: Reads) -> bool:
    return settings.quant != "none" and STORAGES[settings.quant].weighs and settings.quant_rows > 0


def rotation(settings: Reads) -> bool | None:
    """Whether weights and inputs are turned before they are rounded; None where the storage decides."""
    if settings.quant not in EIGHT:
        return None
    return {"auto": None, "on": True, "off": False}[settings.quant_rotate]


def rows_to_look_at(
    settings: Reads, task: Task, samples: Sequence[Encoded], device: torch.device, tell: Tell
) -> list[Any]:
    """One by one, so that none is padded."""
    few = samples[: settings.quant_rows]
    tell("doing", text=f"{settings.quant} looks at {len(few)} rows before it packs")
    return [task.asked(batch.to(device)) for batch in task.batches(few, 1)]


def pack_base(run: Run, model: nn.Module, settings: Reads, task: Task, samples: Sequence[Encoded], tell: Tell) -> None:
    """A model that came loaded is packed where it stands; one that came packed stays as it is."""
    if settings.quant == "none":
        return
    held, rotate = {m.recipe for m in plain_modules(model).values() if isinstance(m, Packed)}, rotation(settings)
    if {recipe.kind for recipe in held} == {settings.quant}:
        if rotate is not None and {recipe.rotate for recipe in held} != {rotate}:
            raise ConfigError(
                f"the model came packed with rotate={not rotate}, and the run asks for quant_rotate: "
                f"{settings.quant_rotate}",
                where="quant_rotate",
                fix="leave quant_rotate out to train on it as it is, or hand over the model before it is packed",
            )
        return
    whole, path, seen = settings.modules_to_save, run.folder / ENERGIES, None
    if looks_before_packing(settings):
        if not path.exists():
            rows = rows_to_look_at(settings, task, samples, next(model.parameters()).device, tell)
            save_energies(model, choose(model, "all-linear", (), False, False, whole)[0], rows, path)
        seen = load_inputs(path)
    tell("note", text=str(quantize(model, settings.quant, whole=whole, energies=seen, rotate=rotate)))
    if seen is not None:
        note_packing(model, whole, str(path))


def settle_precision(settings: Reads, source: Any, tell: Tell) -> torch.device:
    """The device and the type of the arithmetic."""
    exact = TASKS[settings.task].exact
    if exact and settings.precision == "bf16":
        fix = "leave precision out, or say fp32"
        raise ConfigError(f"the loss of {settings.task} cannot be computed in bf16", "precision", fix)
    if settings.precision == "auto":
        why = "fp32", f"the loss of {settings.task} needs it"
        settings.settle("precision", *(why if exact else base.precision_of(source)))
        origin = settings.resolved.origins["precision"]
        tell("note", text=f"precision {settings.precision}: {origin.note}")
    if isinstance(source, str):
        return base.usual_device()
    held, wanted = base.dtype_of(source), base.DTYPES[settings.precision]
    if held != wanted:
        source.to(wanted)
        tell("note", text=f"the model came in {held} and was turned to {wanted}, for precision {settings.precision}")
    return base.device_of(source)


def to_look_at(
    settings: Reads, task: Task, samples: Sequence[Encoded], device: torch.device, tell: Tell
) -> dict[str, Any]:
    """For an init that looks at data: some training rows, one by one so that none is padded, and the loss on them."""
    need = NEEDS.get(settings.init) if settings.method == "lora" else None
    if need is None:
        return {}
    tell("doing", text=f"init {settings.init} looks at {min(LOOKED_AT, len(samples))} rows")
    rows = [batch.to(device) for batch in task.batches(samples[:LOOKED_AT], 1)]
    if need == "gradient":
        return {"data": rows, "loss": lambda model, batch: task.loss(model, batch) / batch.trained_tokens}
    return {"data": [task.asked(batch) for batch in rows]}


def what_was_lost(run: Run, settings: Reads, source: Any, model: nn.Module) -> dict[str, Any]:
    """For an init that starts from what packing lost: the base's own files, which still have it, and what was seen."""
    if settings.method != "lora" or settings.init not in CHANGES_BASE:
        return {}
    if isinstance(source, nn.Module):
        raise ConfigError(
            f"init {settings.init} starts from what packing loses, and a model that is packed in place has lost it",
            fix="name the model by its folder or id instead",
        )
    known = {"inputs": load_inputs(path).get} if (path := run.folder / ENERGIES).exists() else {}
    return {"originals": originals(source, model), **known}


def numbers_of(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> dict[str, int]:
    count = sum(parameter.numel() for parameter in trained.values())
    return {"trainable": count, "frozen": elements(model) - count}


def size_of(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> str:
    count, rest = numbers_of(model, trained).values()
    return f"{type(model).__name__}: {count:,} parameters trained beside {rest:,} ({count / (count + rest):.2%})"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


# ------------------------------------------------------------------ the plan


def check_token_rows(settings: Reads, task: Task, samples: Sequence[Encoded], tell: Tell) -> None:
    """Rows of the vocabulary that no sample uses would stay as they are; attach knows about those beyond it."""
    if not (asked := settings.token_rows):
        return
    named = asked.values() if isinstance(asked, Mapping) else (asked,)
    rows = {row for some in named for row in some if row < len(task.tokenizer)}
    unused = sorted(rows.difference(*(sample.input_ids for sample in samples)))
    if not unused:
        return
    text = f"no training sample has token {', '.join(map(str, unused[:8]))}{' ...' * (len(unused) > 8)}"
    if len(unused) == len(rows):
        raise ConfigError(f"{text}, so nothing of token_rows would be trained", "token_rows", "check the ids")
    tell("warning", text=f"{text}: these rows of token_rows stay as they are")


def tell_attention(task: Task, model: nn.Module, tell: Tell) -> bool:
    """Whether batches go without padding: all samples in one row, and attention within each. Tried out on the model."""
    if not task.packs:
        return False
    if (why := obstacle(model) or varlen.obstacle(model)) is None:
        try:
            with varlen.within(model):
                off = check_isolation(model, by_samples=True)
            tell("note", text=f"no padding: attention runs within each sample of a batch (rounding {off:.1g})")
            return True
        except (StateError, TypeError, ValueError, RuntimeError, KeyError) as error:
            why = str(error).splitlines()[0]
    tell("note", text=f"batches are padded: {why}")
    return False


def settle_packing(
    settings: Reads, task: Task, model: nn.Module, train: Encodings, device: torch.device, tell: Tell
) -> list[Encoded]:
    """The rows to train on: packed, where that was asked for or pays."""
    if settings.packing == "auto":
        settings.settle("packing", *_packing_rule(settings, task, model, train, device))
    reason = settings.resolved.origins["packing"].note
    if settings.packing == "off":
        tell("note", text=f"not packed{f': {reason}' if reason else ''}")
        return train.samples
    off = check_isolation(model)
    rows = pack(train.samples, settings.max_len)
    times = packed_times(train.samples, rows)
    tell(
        "note",
        text=f"packed {times:.1f} samples to a row; on this model they do not see each other (rounding {off:.1g})",
    )
    return rows


def _packing_rule(
    settings: Reads, task: Task, model: nn.Module, train: Encodings, device: torch.device
) -> tuple[str, str]:
    if not task.packs:
        return "off", f"the task {settings.task} keeps its samples apart"
    if (why := obstacle(model)) is not None:
        return "off", why
    if device.type == "cpu":
        return "off", "it pays on a GPU"
    steps = math.ceil(train.tokens / settings.max_len / settings.global_batch) * settings.epochs
    if steps < ENOUGH_STEPS:
        return "off", f"packed, the run would have only about {steps:.0f} steps"
    return "on", "one row holds several samples, and little is padding"


def settle_plan(settings: Reads, model: nn.Module, rows: int, tell: Tell) -> None:
    """Steps, how often to look, and the learning rate."""
    per_epoch = math.ceil(rows / settings.global_batch)
    steps: int = settings.steps or max(1, round(settings.epochs * per_epoch))
    if settings.steps is None:
        why = f"{settings.epochs:g} epochs of {rows:,} rows, {settings.global_batch} to a step"
        settings.settle("steps", steps, why)
    if settings.eval_every is None:
        settings.settle("eval_every", max(1, steps // EVALUATIONS), f"about {EVALUATIONS} times in the run")
    if settings.save_every is None:
        every = min(settings.eval_every or SAVE_AT_LEAST, SAVE_AT_LEAST)
        settings.settle("save_every", every, f"at each evaluation, and at least every {SAVE_AT_LEAST} steps")
    if settings.lr == "auto":
        settings.settle("lr", *_rate_rule(settings, model))
    origins = settings.resolved.origins
    tell(
        "plan", steps=settings.steps, per_epoch=per_epoch, lr=settings.lr, lr_reason=str(origins["lr"]),
        text=f"{settings.steps:,} steps of {settings.global_batch} rows, {settings.batch_size} at a time "
        f"({per_epoch:,} steps an epoch), lr {settings.lr:.2g} ({origins['lr']}), {settings.schedule}",
    )  # fmt: skip


def _rate_rule(settings: Reads, model: nn.Module) -> tuple[float, str]:
    names = ("alpha", "scaling", "combine", "method", "task", "steps")
    found = learning_rate(
        elements(model, adapted=False), rank=settings.r, **{name: getattr(settings, name) for name in names}
    )
    return found.value, found.reason.removeprefix("rule: ")


def previews(task: Task, samples: list[Encoded]) -> list[list[Any]]:
    """The first samples as stretches of trained and untrained text: what the report colours."""
    words = task.renderer.tokenizer if task.renderer is not None else task.tokenizer
    return [list(runs(sample, words)) for sample in samples[:3] if sample.layout == "token"]


def facts(parts: Split, train: Encodings, val: Encodings, rows: list[Encoded]) -> dict[str, Any]:
    """data.json."""
    return {
        **parts.train.facts(),
        "split": parts.facts(),
        "train": train.facts(),
        "validation": val.facts(),
        "packed_rows": len(rows),
        "packed_times": packed_times(train.samples, rows),
    }
