"""Folders become something that answers: base, adapters, tokenizer and renderer, with the proof that the adapters act.

    ready = load("SmolLM2", {"sql": Path("runs/sql/adapter")})
    ready.engine.generate([ready.prompt(messages)], adapters=["sql"])

A silent base model is the worst failure of adapters in use: everything runs and nothing was learned. So each adapter
must match the base in every layer (loading refuses otherwise), a proof that lies beside it is replayed - the same
prompts must give the logits they gave when the run ended - and without one the adapter must at least change what the
base says to a probe. What was shown is kept in `evidence`, one sentence for each adapter.

The tokenizer and its chat template come from the adapter's folder when they lie there: what was trained is what is
asked. `Source` says all that has to be known of one word on a command line; who finds it out is not this file's matter.
"""

from __future__ import annotations

import filecmp
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.ckpt import peft
from veneer.ckpt.config import CONFIG, read_config
from veneer.core.model import activate, adapters, disabled
from veneer.data.labels import LabelSet
from veneer.data.template import Renderer
from veneer.data.types import Message
from veneer.errors import CheckpointError, ConfigError, ProofFailed, UserError
from veneer.extras import pip_line, quiet
from veneer.infer.engine import Engine
from veneer.prove.answers import call, first_tensor
from veneer.prove.canary import replay
from veneer.prove.proof import Proof
from veneer.tasks.base import TASKS, Task

__all__ = ["Ready", "Source", "adapter_name", "load", "same_storage", "source_of_folder", "told_by"]

Say = Callable[[str], object]
PEFT_TASKS = {"CAUSAL_LM": "causal_lm", "SEQ_2_SEQ_LM": "seq2seq", "SEQ_CLS": "sequence_classification"}
PEFT_TASKS |= {"TOKEN_CLS": "token_classification"}
PROBE = "The quick brown fox jumps over the lazy dog. 1 + 1 ="


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model that answers comes from. Without `adapter` it is the base itself, or a model trained in full.

    `labels` are the classes of a trained head. `plain`: prompts are continued as they stand, not put into a chat turn.
    """

    label: str
    base: str
    adapter: Path | None = None
    proof: Path | None = None
    template: str | None = None
    system: str | None = None
    task: str = "causal_lm"
    labels: LabelSet | None = None
    plain: bool = False
    quant: Mapping[str, Any] | None = None  # how the base was packed in training, and so is asked

    @property
    def name(self) -> str | None:
        """What the adapter is called inside the model; None for a base."""
        return adapter_name(self.label) if self.adapter is not None else None

    @property
    def tokenizer(self) -> str:
        held = self.adapter is not None and any(self.adapter.glob("tokenizer*"))
        return str(self.adapter) if held else self.base


def adapter_name(label: str) -> str:
    """
    >>> adapter_name("runs/support.v2-a1/")
    'support_v2-a1'
    """
    return re.sub(r"[^\w-]", "_", Path(label).name) or "adapter"


def source_of_folder(where: str, base: str | None = None) -> Source:
    """An adapter's folder, a model's folder, or a model's id. `base` overrides what the adapter says of itself."""
    folder = Path(where).expanduser()
    if folder.name in (CONFIG, peft.WEIGHTS):
        folder = folder.parent
    if not (folder / CONFIG).is_file():
        return Source(label=where, base=where, **told_by(folder))
    config = read_config(folder / CONFIG)
    named = base or config.get("base_model_name_or_path")
    if not named:
        fix = "name it with --base"
        raise CheckpointError("the adapter does not say which base it belongs to", str(folder / CONFIG), fix)
    proof = next((p for p in (folder / "proof.json", folder.parent / "proof.json") if p.is_file()), None)
    told: dict[str, Any] = {"task": PEFT_TASKS.get(config.get("task_type") or "", "causal_lm")} | told_by(folder)
    return Source(label=where, base=named, adapter=folder, proof=proof, **told)


def told_by(folder: Path) -> dict[str, Any]:
    """The task and its classes, as a run leaves them beside the weights."""
    path = folder / "task.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise CheckpointError(f"task.json is damaged: {error}", str(path), "copy it again") from None
    labels = LabelSet(told.get("kind", "one"), tuple(told["labels"])) if "labels" in told else None
    quant = told.get("quant")
    if quant and "energies" in quant:  # a file beside this one
        quant = {**quant, "energies": str(folder / quant["energies"])}
    return {"task": told.get("task", "causal_lm"), "labels": labels, "quant": quant}


@dataclass
class Ready:
    """A model that answers, or judges, in the way that the first of its `sources` was trained to be asked."""

    model: nn.Module
    task: Task
    engine: Engine
    sources: Sequence[Source]
    evidence: dict[str, str]

    @property
    def tokenizer(self) -> Any:
        return self.task.tokenizer

    @property
    def plain(self) -> bool:
        """Whether a prompt is text to go on from, rather than a turn of a conversation."""
        return self.task.renderer is None or self.sources[0].plain

    @property
    def answers(self) -> bool:
        """Whether it writes text at all; a classifier does not."""
        return not self.task.labelled

    def asked_as(self, source: Source) -> Ready:
        """The same model with the tokenizer, template and stops of another of its adapters; itself when they agree."""
        task = _task(source)
        if _manner(task, source) == _manner(self.task, self.sources[0]):
            return self
        return replace(self, task=task, engine=Engine(self.model, task.tokenizer, _stops(task)), sources=(source,))

    def prompt(self, messages: Sequence[Message] | str, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """The tokens after which the model speaks; a plain string is continued as it stands."""
        if self.task.renderer is not None:
            return self.task.renderer.prompt_ids(messages, tools)
        if not isinstance(messages, str):
            raise ConfigError(f"the task {self.task.name} has no conversations", fix="give it one text")
        return list(self.tokenizer(messages)["input_ids"])


def load(sources: Sequence[Source], *, device: str | None = None, dtype: str | None = None, say: Say = print) -> Ready:
    """Load the base that all `sources` share, and every adapter of theirs onto it. `say` hears what is waited for."""
    first = next((source for source in sources if source.adapter is not None), sources[0])
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    say(f"loading {first.base}")
    if TASKS[first.task].paints:
        fix = "paint with it: pipeline = DiffusionPipeline.from_pretrained(...); veneer.load_shared(pipeline, ADAPTER)"
        raise ConfigError(f"{first.label or first.base} paints pictures; it does not answer", first.base, fix)
    _refuse_other_storages(first, sources)
    task = _task(first)
    model = _base(first, task, place, _dtype(dtype, place))
    for source in sources:
        if source.adapter is not None and source.name not in adapters(model):
            say(f"loading adapter {source.label}")
            with _notes(say):
                peft.load(model, source.adapter, str(source.name))
    ready = Ready(model, task, Engine(model, task.tokenizer, _stops(task)), (first,), {})
    for source in sources:
        if source.name is not None:
            ready.evidence[source.name] = _prove(ready.asked_as(source), source)
    return ready


def same_storage(one: Source, other: Source) -> bool:
    """Whether both were trained on the same base as it was stored: in the same way, packed by the same inputs."""
    a, b = dict(one.quant or {}), dict(other.quant or {})
    seen, also = a.pop("energies", None), b.pop("energies", None)
    same_inputs = seen == also or bool(seen and also and filecmp.cmp(seen, also, shallow=False))
    return a == b and same_inputs


def _refuse_other_storages(first: Source, sources: Sequence[Source]) -> None:
    others = [s for s in sources if s.adapter is not None and not same_storage(first, s)]
    if others:
        raise ConfigError(
            f"{first.label} and {others[0].label} were trained on one base in different storages: {_stored(first)}, "
            f"{_stored(others[0])}; neither is right on the other's",
            others[0].base,
            "ask them one at a time; adapters that are to share a packed base are trained with quant_rows 0 or as int8",
        )


def _stored(source: Source) -> str:
    quant = source.quant or {}
    by_inputs = f" packed by what {source.label} saw" if quant.get("energies") else ""
    return f"{quant.get('kind', 'not packed')}{by_inputs}"


def _task(source: Source) -> Task:
    """The task with the tokenizer, the classes and, for conversations, the renderer that it was trained with."""
    kind = TASKS[source.task]
    tokenizer = _tokenizer(source.tokenizer, kind.reader)
    renderer = Renderer(kind.speaker(tokenizer), source.template, source.system) if kind.renders else None
    return kind(tokenizer, source.labels, renderer)


def _manner(task: Task, source: Source) -> tuple[Any, ...]:
    """What has to agree for two adapters to be asked in one batch."""
    written = task.renderer.fingerprint if task.renderer is not None else None
    words = len(task.tokenizer) if hasattr(task.tokenizer, "get_vocab") else 0  # an image processor has none
    return written, _stops(task), source.plain, task.name, words


def _stops(task: Task) -> tuple[int, ...]:
    """What ends an answer: the task's own ends, or the tokenizer's."""
    eos = getattr(task.tokenizer, "eos_token_id", None)
    return task.ends or (() if eos is None else (int(eos),))


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    """fp32 on a CPU, whose bf16 is slow unless it has AMX; bf16 on a GPU that knows it."""
    if name is not None:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def _tokenizer(where: str, reader: str) -> Any:
    import transformers

    with _plain_errors(where, "image processor" if "Image" in reader else "tokenizer"), quiet():
        return getattr(transformers, reader).from_pretrained(where)


def _base(source: Source, task: Task, device: torch.device, dtype: torch.dtype) -> nn.Module:
    import transformers

    from veneer.quant.hf import VeneerConfig  # transformers then also knows a folder that was saved packed

    options = task.model_options() if source.labels is not None else {}
    with _plain_errors(source.base, "model"), quiet():
        config = transformers.AutoConfig.from_pretrained(source.base)
        if source.quant is not None and not hasattr(config, "quantization_config"):  # else it was packed when saved
            options |= {"quantization_config": VeneerConfig(**source.quant), "device_map": {"": device}}
        model = getattr(transformers, task.auto_class).from_pretrained(source.base, dtype=dtype, **options)
    return model.to(device).eval()


@contextmanager
def _plain_errors(where: str, what: str) -> Any:
    """transformers says in ten lines that a name is neither a folder nor a model on the hub."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:  # ours, and plain
        raise
    except ImportError as error:
        short = str(error).strip().splitlines()[0].partition(": `pip")[0]
        raise CheckpointError(
            f"the {what} needs a package that is not here: {short}", where, pip_line(error)
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        here = Path(where).exists()
        short = str(error).strip().splitlines()[0]
        text = f"the {what} cannot be read: {short}" if here else f"there is no such model: {where}"
        fix = "name the folder of a model in transformers' format" if here else "check the path or the hub id"
        raise CheckpointError(text, where, fix) from error


@contextmanager
def _notes(say: Say) -> Any:
    """What loading has to remark, as a line instead of Python's warning with its file and line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        say(str(warning.message))


# ------------------------------------------------------------------ does the adapter act


def _prove(ready: Ready, source: Source) -> str:
    """Replay the canary of the run; without one, look whether the adapter changes anything at all."""
    if source.proof is not None and _has_canary(source.proof):
        check = replay(ready.model, source.proof, ready.tokenizer, name=source.name)
        if not check.passed:
            fix = "load the base and the tokenizer it was trained with; `veneer inspect` compares them"
            raise ProofFailed(f"{source.label}: {check.statement}", str(source.proof), fix)
        return check.statement
    moved = _change(ready, str(source.name))
    if moved == 0:
        fix = "take a later checkpoint; `veneer inspect` shows which layers were trained"
        raise ProofFailed(f"{source.label} changes nothing: the model answers as its base does", fix=fix)
    return f"no canary to replay; it changes the base's logits by up to {moved:.3g}"


def _has_canary(proof: Path) -> bool:
    try:
        return bool(Proof.load(proof).canary.get("rows"))
    except (CheckpointError, json.JSONDecodeError):
        return False


@torch.no_grad()
def _change(ready: Ready, name: str) -> float:
    """How far the adapter moves the logits of a few ordinary words, or of a picture of noise."""
    inputs = _picture(ready.tokenizer) if ready.task.reader == "AutoImageProcessor" else _words(ready)
    activate(ready.model, name)
    with_adapter = first_tensor(call(ready.model, inputs)).float()
    with disabled(ready.model):
        return float((with_adapter - first_tensor(call(ready.model, inputs)).float()).abs().max())


def _words(ready: Ready) -> dict[str, torch.Tensor]:
    ids = torch.tensor([list(ready.tokenizer(PROBE)["input_ids"])[:32]])
    more = {"decoder_input_ids": ids[:, :8]} if getattr(ready.model.config, "is_encoder_decoder", False) else {}
    return {"input_ids": ids, **more}


def _picture(processor: Any) -> dict[str, torch.Tensor]:
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": processor(noise.numpy(), return_tensors="pt")["pixel_values"]}
