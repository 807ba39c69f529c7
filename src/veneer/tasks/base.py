"""What a task is: which model class it loads, which rows it can use, what its loss and its metrics are.

    a row --veneer.data--> Encoded --collate--> Batch --Task.loss--> a sum over everything that is trained
                                                      --Task.judge--> the same sum, predictions, what was wanted

The loss of a task is a *sum* over its trained tokens (or rows); the loop divides by their number in the whole global
batch, so that how a batch was cut into micro-batches cannot change what is learned. One file per task; each registers
itself here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veneer.core.registry import Registry
from veneer.core.spec import LoRA
from veneer.data.batch import Batch, Mould, collate, pad_id_of
from veneer.data.encode import Encodings
from veneer.data.labels import LabelSet
from veneer.data.template import Renderer
from veneer.data.types import Encoded, LossOn
from veneer.errors import ConfigError, StateError

__all__ = ["TASKS", "Judged", "Painted", "Shown", "Task", "class_options", "new_heads"]

TASKS: Registry[type[Task]] = Registry("task")


class Judged(NamedTuple):
    """An evaluated batch: the summed loss, and one prediction per wanted value (none where a task only has a loss)."""

    loss: Float[Tensor, ""]
    predicted: Sequence[Any] = ()
    wanted: Sequence[Any] = ()


class Shown(NamedTuple):
    """One row as people look at it: what is asked, what is right, what the model says."""

    prompt: str
    expected: str
    answer: str


class Painted(NamedTuple):
    """Pictures that the model makes of prompts, as arrays of (height, width, channels) in 0 ... 255."""

    prompts: Sequence[str]
    pictures: Sequence[Any]


class Task(ABC):
    """One kind of learning. `labels` are the classes of the training rows and `renderer` writes conversations, for
    tasks that have such."""

    name: ClassVar[str] = ""
    auto_class: ClassVar[str]  # of transformers
    reader: ClassVar[str] = "AutoTokenizer"  # of transformers: what turns rows into what the model takes
    kinds: ClassVar[tuple[type[Any], ...]]  # of example, in veneer.data.types
    renders: ClassVar[bool] = False  # whether rows are conversations or plain text that a template may write
    packs: ClassVar[bool] = False  # whether several rows may be joined to one
    labelled: ClassVar[bool] = False  # whether rows hold classes, and the model a head for them
    exact: ClassVar[bool] = False  # whether the loss needs fp32
    paints: ClassVar[bool] = False  # whether the base is a pipeline of diffusers, and what it makes are pictures
    drawn: ClassVar[tuple[str, ...]] = ()  # modules as large as there are classes that no answer depends on: left new
    holds_out: ClassVar[bool] = True  # whether rows are held out when nobody says so

    def __init__(self, tokenizer: Any = None, labels: LabelSet | None = None, renderer: Renderer | None = None) -> None:
        self.tokenizer, self.labels, self.renderer = tokenizer, labels, renderer

    @abstractmethod
    def encode(
        self,
        examples: Sequence[Any],
        *,
        max_len: int | None = None,
        overlong: str = "drop",
        skip_bad: bool = False,
        loss_on: LossOn = "assistant",
        report: Callable[[int, int], None] | None = None,
    ) -> Encodings:
        """Token ids and labels of rows, and what was left out. `loss_on` is for tasks that mask a text."""

    @staticmethod
    def speaker(reader: Any) -> Any:
        """What writes conversations for a renderer."""
        return reader

    def training_options(self, settings: Any) -> dict[str, Any]:
        """What `encode` is told about training rows alone."""
        return {}

    def configure(self, settings: Any, tell: Callable[..., Any]) -> None:  # noqa: B027 - most tasks need nothing
        """Take in what of the settings only this task knows, before any row is encoded."""

    def collate(self, samples: Sequence[Encoded], *, by_samples: bool = False, mould: Mould | None = None) -> Batch:
        return collate(samples, pad_id_of(self.tokenizer), by_samples=by_samples, mould=mould)

    def batches(
        self, samples: Sequence[Encoded], rows: int, by_samples: bool = False, mould: Mould | None = None
    ) -> Iterator[Batch]:
        """The samples in micro-batches of `rows`, in their order; the rest: see `veneer.data.batch.collate`."""
        starts = range(0, len(samples), rows)
        return (self.collate(samples[start : start + rows], by_samples=by_samples, mould=mould) for start in starts)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer; none where there are no answers."""
        return ()

    @property
    def known_labels(self) -> LabelSet:
        if self.labels is None:
            raise StateError(
                f"the task {self.name} needs the classes of its rows", fix="give it the training data's labels"
            )
        return self.labels

    # ---------------------------------------------------------------- the model

    def model_options(self) -> dict[str, Any]:
        """What `from_pretrained` needs to know of the task."""
        return {}

    def empty(self, source: str, dtype: torch.dtype) -> nn.Module | str:
        """The model that learns as its configuration has it, on the meta device: no weight is read. Or why not."""
        import transformers

        config = transformers.AutoConfig.from_pretrained(source, **class_options(self.labels))
        with torch.device("meta"):
            return getattr(transformers, self.auto_class).from_config(config, dtype=dtype)

    def rehearsed(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """The loss of a micro-batch, or something that holds as much, of a model that has no numbers."""
        return self.loss(model, batch)

    def beside(self, device: str) -> int:
        """How many numbers lie on the device in models that take no part in a step, where the base is a pipeline."""
        return 0

    def load(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The model that learns, where the base is a pipeline (`paints`)."""
        raise StateError(f"the task {self.name} has one model, which is loaded by its auto_class")

    def aim(self, model: nn.Module, spec: LoRA) -> LoRA:
        """The adapter that was asked for, with what its targets mean on this model."""
        return spec

    def gather(
        self, model: nn.Module, train: list[Encoded], val: Sequence[Encoded], folder: Path, tell: Callable[..., Any]
    ) -> list[Encoded]:
        """The samples to train on, when the model is there to have a part in them. `folder` is the run's."""
        return train

    def asked(self, batch: Batch) -> dict[str, Any]:
        """What the model's forward takes, for the proofs."""
        return batch.inputs

    def prepare(self, model: nn.Module, batch: Batch) -> str:
        """Look at the model once, with a batch at hand; the answer is what was found, for the log."""
        return ""

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        """Modules that are new to the model and must be trained whole."""
        return new_heads(model) if self.labelled else ()

    def filed(self, model: nn.Module, source: str) -> tuple[nn.Module, str]:
        """What of the model was read from files, and where these lie."""
        return model, source

    def idle(self, model: nn.Module) -> tuple[str, ...]:
        """Layers of this model of which nothing that an adapter learns could be seen; they are left alone."""
        return ()

    def unlike(self, samples: Sequence[Encoded]) -> str | None:
        """Why steps on these samples are not all alike, so that blocks cannot be recorded once for all of them."""
        return "rows are of different lengths"

    def better_fused(self) -> str | None:
        """Why the blocks of a denoiser are better fused without being recorded; None where they are not."""
        return None

    # ---------------------------------------------------------------- loss and metrics

    @abstractmethod
    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Loss and predictions of a batch."""

    def loss(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """The summed loss of a batch: what is trained."""
        return self.judge(model, batch).loss

    def shown(self, model: nn.Module, examples: Sequence[Any]) -> list[Shown]:
        """A few rows with the model's answers, for people to look at."""
        return []

    def paint_every(self, steps: int) -> int:
        """How often pictures are painted during a run of `steps`, in steps; 0: only at its ends."""
        return 0

    def painted(self, model: nn.Module) -> Painted:
        """The run's prompts as the model paints them now, for tasks that paint."""
        return Painted((), ())

    def told(self) -> dict[str, Any]:
        """What task.json says besides the task's name."""
        return {}

    def use(self, base: str, run: str) -> str:
        """How the adapter of a run is put to use, in Python."""
        return f'model = AutoModel....from_pretrained({base!r})\nveneer.load(model, "{run}/adapter")'

    def detail(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        """What the report shows of the held-out rows beyond numbers; kept in the run's detail.json."""
        return {}

    def metrics(self, predicted: Sequence[Any], wanted: Sequence[Any]) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """The mean loss over all trained tokens (or rows) and the task's metrics. Empty when `stop` said so."""
        total, counted = 0.0, 0
        predicted: list[Any] = []
        wanted: list[Any] = []
        for batch in batches:
            if stop():
                return {}
            judged = self.judge(model, batch)
            total, counted = total + float(judged.loss), counted + batch.trained_tokens
            predicted += judged.predicted
            wanted += judged.wanted
        return {"val_loss": total / max(counted, 1), **(self.metrics(predicted, wanted) if wanted else {})}


def class_options(labels: LabelSet | None) -> dict[str, Any]:
    """Classes in transformers' words, so that a saved model and its predictions bear their names."""
    if labels is None:
        return {}
    if labels.kind == "number":
        return {"num_labels": 1}
    return {
        "num_labels": len(labels.names),
        "id2label": dict(enumerate(labels.names)),
        "label2id": {name: i for i, name in enumerate(labels.names)},
    }


def new_heads(model: nn.Module) -> tuple[str, ...]:
    """What a model has besides its body: the modules that `from_pretrained` made new for the task.

    >>> body, head = nn.Linear(2, 2), nn.Linear(2, 3)
    >>> model = nn.ModuleDict({"bert": body, "drop": nn.Dropout(), "classifier": head})
    >>> model.base_model_prefix = "bert"
    >>> new_heads(model)
    ('classifier',)
    """
    prefix = getattr(model, "base_model_prefix", "")
    heads = [name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())]
    if not prefix or not hasattr(model, prefix) or not heads:
        raise ConfigError(
            f"{type(model).__name__} does not say which of its modules is the head",
            fix="name it with modules_to_save",
        )
    return tuple(heads)
