"""Which settings to start from, with the reason and the source of each.

The start is a published table, task x size of model (TABLE, reproduced as it stands):

    r / alpha             small        medium       large
    classification         8 / 16      16 / 32      32 / 64
    generation            16 / 32      32 / 64      64 / 128
    complex_reasoning     32 / 64      64 / 128     128 / 256

Rules then change what the table cannot know: how much data there is, what memory there is, what the architecture
calls its layers. Each rule is one function below, takes and returns settings, and cites where it comes from;
`judgement` means ours. When a low-rank adapter is the wrong tool, `wrong_tool` says so and `method` names the better
one. Nothing here is random and nothing imports torch: the same question always gets the same answer, at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.advise.device import usual_device
from veneer.advise.lr import learning_rate
from veneer.advise.memory import Estimate, estimate_memory, gib
from veneer.advise.peak import trained_base
from veneer.advise.plan import Plan
from veneer.advise.shapes import Shapes, bytes_of, shapes_of
from veneer.core.registry import near
from veneer.errors import ConfigError

__all__ = ["SIZES", "TABLE", "TASKS", "Advice", "Setting", "recommend"]

TABLE: Mapping[str, Mapping[str, Mapping[str, int]]] = {
    "classification": {
        "small": {"r": 8, "alpha": 16},
        "medium": {"r": 16, "alpha": 32},
        "large": {"r": 32, "alpha": 64},
    },
    "generation": {
        "small": {"r": 16, "alpha": 32},
        "medium": {"r": 32, "alpha": 64},
        "large": {"r": 64, "alpha": 128},
    },
    "complex_reasoning": {
        "small": {"r": 32, "alpha": 64},
        "medium": {"r": 64, "alpha": 128},
        "large": {"r": 128, "alpha": 256},
    },
}
SIZES = {"small": 3e9, "medium": 20e9, "large": math.inf}  # parameters below which a model is called so
STANDS_FOR = {"small": "1.2B", "medium": "8B", "large": "70B"}  # whose shapes stand in when only the word is given

TASKS = {  # what people say -> (row of the table, task of the training settings)
    **dict.fromkeys(
        ("classification", "sequence_classification", "text_classification", "sentiment", "intent"),
        ("classification", "sequence_classification"),
    ),
    **dict.fromkeys(("token_classification", "ner", "extraction"), ("classification", "token_classification")),
    **dict.fromkeys(
        ("generation", "causal_lm", "sft", "chat", "instruction", "style", "text_generation"),
        ("generation", "causal_lm"),
    ),
    **dict.fromkeys(("seq2seq", "summarization", "translation"), ("generation", "seq2seq")),
    **dict.fromkeys(("complex_reasoning", "reasoning", "math", "code"), ("complex_reasoning", "causal_lm")),
}

# Sources, as they are printed
TABLE_SOURCE = "table task x size (get_lora_config_by_task)"
REGRET = "LoRA Without Regret (Schulman et al., 2025)"
TINKER = "Tinker's LoRA primer"
NOTES = "LoRA: principles and implementation (blog, 2025-04-10)"
TOOLS = "what Axolotl, LLaMA-Factory and Unsloth ship"
RULE = "veneer.advise.lr"
SUMS = "veneer.advise.memory"
FOUND = "benchmarks/small_data.py"
JUDGEMENT = "judgement"

LARGEST_RANK = 256  # the largest rank "LoRA Without Regret" and vLLM both treat as ordinary
SMALL_MODEL = 100e6  # parameters: full fine-tuning of less takes under 2 GB
FEW_ROWS, SOME_ROWS, MANY_ROWS = 100, 1000, 50_000
TOKENS_A_ROW = 256  # when only rows are given


@dataclass(frozen=True)
class Setting:
    """A value to start from, why, and who says so."""

    value: Any
    reason: str
    source: str


@dataclass(frozen=True)
class Advice:
    """Settings under the names of the training settings, and what they were worked out from."""

    task: str
    size: str
    parameters: int
    settings: dict[str, Setting]
    rows: int | None
    tokens: int | None
    wrong_tool: str | None = None
    memory: Estimate | None = None
    model: str = "MODEL"
    data: str = "DATA"
    assumed: tuple[str, ...] = field(default=())

    def __getitem__(self, name: str) -> Any:
        """The bare value of a setting.

        >>> recommend("generation", "8B")["r"]
        32
        """
        return self.settings[name].value

    def values(self) -> dict[str, Any]:
        """Settings as `veneer.train` takes them."""
        return {name: s.value for name, s in self.settings.items() if name != "layer_names"}

    def table(self) -> list[tuple[str, str, str, str]]:
        """(setting, value, reason, source)."""
        return [(name, _shown(s.value), s.reason, s.source) for name, s in self.settings.items()]

    def command(self) -> str:
        """The command line that trains with this advice."""
        own = {n: v for n, v in self.values().items() if v is not None and _says_something(n, v)}
        return " ".join(
            [
                f"veneer train {self.model} {self.data}",
                *(f"--{n.replace('_', '-')} {_shown(v)}" for n, v in own.items()),
            ]
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "size": self.size,
            "parameters": self.parameters,
            "rows": self.rows,
            "tokens": self.tokens,
            "wrong_tool": self.wrong_tool,
            "settings": {
                n: {"value": s.value, "reason": s.reason, "source": s.source} for n, s in self.settings.items()
            },
            "memory": self.memory.to_json() if self.memory else None,
            "command": self.command(),
            "assumed": list(self.assumed),
        }

    def __str__(self) -> str:
        rows = self.table()
        wide = [max(len(row[i]) for row in rows) for i in (0, 1)]
        lines = [f"{self.task} on a {self.size} model ({self.parameters / 1e9:.3g} B parameters)"]
        lines += [f"wrong tool? {self.wrong_tool}"] if self.wrong_tool else []
        lines += [f"  {n:{wide[0]}}  {v:{wide[1]}}  {reason} [{source}]" for n, v, reason, source in rows]
        lines += [f"memory {self.memory.sentence()}"] if self.memory else []
        lines += [f"assumed: {note}" for note in self.assumed]
        return "\n".join([*lines, self.command()])


DEFAULTS = {"task": "causal_lm", "method": "lora", "dropout": 0.0, "combine": "add", "scaling": "lora", "quant": "none"}
DEFAULTS |= {"recompute": "none", "targets": "all-linear", "schedule": "cosine", "warmup": 0.03}


def _says_something(name: str, value: Any) -> bool:
    return name not in DEFAULTS or DEFAULTS[name] != value


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < value < 0.01 else f"{value:g}"
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


# The question -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is known when the rules begin."""

    row: str  # of TABLE
    task: str  # of the training settings
    shapes: Shapes
    size: str
    rows: int | None
    tokens: int | None  # trained ones, each once
    memory: int | None
    device: str
    max_len: int
    method: str | None  # asked for

    @property
    def plan(self) -> dict[str, Any]:
        """What memory needs to know and no rule decides."""
        return {"task": self.task, "max_len": self.max_len, "device": self.device, "padded": True}


Settings = dict[str, Setting]


def recommend(
    task: str = "generation",
    model: Any = "medium",
    *,
    rows: int | None = None,
    tokens: int | None = None,
    memory: str | int | None = None,
    device: str | None = None,
    max_len: int = 2048,
    method: str | None = None,
    labels: int = 2,
) -> Advice:
    """Settings to start from.

    task: generation, classification, complex_reasoning, or a usual name of one of them (chat, ner, math ...).
    model: small, medium, large, a size ("8B"), or whatever estimate_memory takes. rows, tokens: of the training data;
    tokens counts trained ones, each once. memory: what the device has ("24GB"). device: cpu or cuda, None for what this
    machine has. method: insist on lora, full or freeze.

    >>> advice = recommend("classification", "small")
    >>> advice["r"], advice["alpha"]
    (8, 16)
    """
    case = _case(task, model, rows, tokens, memory, device or usual_device(), max_len, method, labels)
    settings: Settings = {}
    for rule in (_task, _rank, _alpha, _dropout, _targets, _method, _epochs, _batches, _storage, _rate, _rest):
        settings = rule(case, settings)
    wrong = _wrong_tool(case, settings)
    estimate = _estimate(case, settings) if case.memory is not None else None
    return Advice(
        task=case.row,
        size=case.size,
        parameters=case.shapes.parameters,
        settings=settings,
        rows=rows,
        tokens=case.tokens,
        wrong_tool=wrong,
        memory=estimate,
        model=str(model) if isinstance(model, (str, Path)) and model not in SIZES else "MODEL",
        assumed=(*_assumed(case, rows, tokens), *(estimate.assumed if estimate else case.shapes.assumed)),
    )


def _case(
    task: str,
    model: Any,
    rows: int | None,
    tokens: int | None,
    memory: Any,
    device: str,
    max_len: int,
    method: str | None,
    labels: int,
) -> Case:
    problems = []
    key = str(task).lower().replace("-", "_").replace(" ", "_")
    if key not in TASKS:
        problems.append(f"no task {task!r}.{near(key, TASKS)} Known: {', '.join(TABLE)}, and usual names of these")
    for name, value in (("rows", rows), ("tokens", tokens), ("max_len", max_len)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            problems.append(
                f"{name}={value!r} must be a whole number of at least 1: there is nothing to learn from nothing"
            )
    if method not in (None, "lora", "full", "freeze"):
        problems.append(
            f"method={method!r} is none of lora, full, freeze.{near(str(method), ('lora', 'full', 'freeze'))}"
        )
    if device not in ("cpu", "cuda"):
        problems.append(f"device={device!r} is none of cpu, cuda")
    if problems:
        raise ConfigError("no recommendation for this", problems=problems)
    row, training_task = TASKS[key]
    word = isinstance(model, str) and model in SIZES
    shapes = shapes_of(STANDS_FOR[model] if word else model, training_task, labels)
    if tokens is None and rows is not None:
        tokens = rows * (TOKENS_A_ROW if row != "classification" else 1)
    return Case(
        row=row,
        task=training_task,
        shapes=shapes,
        size=str(model) if word else next(s for s, limit in SIZES.items() if shapes.parameters < limit),
        rows=rows if rows is not None or tokens is None else max(1, tokens // TOKENS_A_ROW),
        tokens=tokens,
        memory=bytes_of(memory) if memory is not None else None,
        device=device,
        max_len=shapes.tokens_fixed or max_len,
        method=method,
    )


def _assumed(case: Case, rows: int | None, tokens: int | None) -> list[str]:
    notes = []
    if rows is not None and tokens is None and case.row != "classification":
        notes.append(f"{TOKENS_A_ROW} trained tokens in a row: give tokens to be exact")
    if rows is None and tokens is not None:
        notes.append(f"about {case.rows:,} rows of {TOKENS_A_ROW} tokens: give rows to be exact")
    if rows is None and tokens is None:
        notes.append("neither rows nor tokens were given, so no rule about the amount of data was used")
    return notes


# The rules, in order ------------------------------------------------------------------------------------------------


def _task(case: Case, s: Settings) -> Settings:
    return s | {"task": Setting(case.task, f"{case.row} is trained so", JUDGEMENT)}


def _rank(case: Case, s: Settings) -> Settings:
    """The table's rank, raised where the data would not fit into it."""
    rank = TABLE[case.row][case.size]["r"]
    told = Setting(rank, f"{case.row} on a {case.size} model", TABLE_SOURCE)
    wanted = math.ceil((case.tokens or 0) / _per_rank(case))
    if wanted > rank:
        raised = min(LARGEST_RANK, 1 << (wanted - 1).bit_length())
        reason = f"table {rank}; raised so that the adapter has a parameter for each of {case.tokens:,} trained tokens"
        told = Setting(max(rank, raised), reason, f"{TABLE_SOURCE}; {TINKER}")
    return s | {"r": told}


def _per_rank(case: Case) -> int:
    """Adapter parameters that one unit of rank adds, on all linears."""
    return sum(m.out + m.n for _, m, block, _ in case.shapes.linears() if block is not None)


def _alpha(case: Case, s: Settings) -> Settings:
    alpha = 2 * s["r"].value
    same = alpha == TABLE[case.row][case.size]["alpha"]
    reason = f"{case.row} on a {case.size} model" if same else "twice the rank, as everywhere in the table"
    return s | {"alpha": Setting(alpha, reason, TABLE_SOURCE)}


def _dropout(case: Case, s: Settings) -> Settings:
    if case.rows is None or case.rows >= SOME_ROWS:
        return s | {"dropout": Setting(0.0, "it slows training, and enough data needs no regularising", TOOLS)}
    value = 0.1 if case.rows < FEW_ROWS else 0.05
    return s | {"dropout": Setting(value, f"{case.rows:,} rows are seen several times and learned by heart", TOOLS)}


def _targets(case: Case, s: Settings) -> Settings:
    names = tuple(dict.fromkeys(m.name.rsplit(".", 1)[-1] for _, m, block, _ in case.shapes.linears() if block))
    told = Setting(
        "all-linear", "all layers, the MLP most of all: attention alone is clearly worse at equal size", REGRET
    )
    return s | {
        "targets": told,
        "layer_names": Setting(names, f"what all-linear means in {case.shapes.family}", "config.json"),
    }


def _method(case: Case, s: Settings) -> Settings:
    """An adapter, unless the data outgrow it or the model is so small that it saves nothing."""
    if case.method is not None:
        return s | {"method": Setting(case.method, "asked for", "you")}
    small = case.shapes.parameters < SMALL_MODEL
    if _beyond_capacity(case) and _fits(case, s, method="full", recompute="full", batch_size=1) is not False:
        return s | {"method": Setting("full", "the data outgrow what a low-rank adapter can hold", REGRET)}
    if small and _fits(case, s, method="full", batch_size=1) is not False:
        reason = "a model this small is trained whole at little cost, and learns more from few rows that way"
        return s | {"method": Setting("full", reason, f"{NOTES}; {FOUND}")}
    if small:
        return s | {"method": Setting("freeze", "small, but too large here to train whole", NOTES)}
    return s | {"method": Setting("lora", "as good as full fine-tuning while the adapter can hold the data", REGRET)}


def _is_tiny(case: Case) -> bool:
    return case.rows is not None and case.rows < FEW_ROWS


def _beyond_capacity(case: Case) -> bool:
    return case.tokens is not None and case.tokens > LARGEST_RANK * _per_rank(case)


def _wrong_tool(case: Case, s: Settings) -> str | None:
    """Why an adapter is not the tool, also when it was asked for or nothing else fits."""
    if _beyond_capacity(case):
        most = LARGEST_RANK * _per_rank(case)
        full = "use full fine-tuning"
        if s["method"].value != "full":
            full = "full fine-tuning learns more of them, where it fits"
        return (
            f"{case.tokens:,} trained tokens are more than a rank-{LARGEST_RANK} adapter has parameters ({most:,}): "
            f"{full} ({REGRET})"
        )
    if case.shapes.parameters < SMALL_MODEL:
        return (
            f"with {case.shapes.parameters / 1e6:.3g} M parameters an adapter saves little, and for small models the "
            f"advice is to train all or the last layers ({NOTES}). Found with MiniLM (22.7 M): from 200 rows whole "
            "80.2 %, adapter 79.1, last two blocks 77.7; from 1,000 rows 84.4, 84.1, 82.3; from 4,000 rows adapter and "
            f"whole are equal ({FOUND}). An adapter still makes sense where many tasks share one model or a small file "
            "counts"
        )
    if _is_tiny(case):
        return (
            f"{case.rows} rows are few for any training, and for small data the advice is to train the last layers or "
            f"all of them instead ({NOTES}). Found with 40 rows on SmolLM2-135M: adapter 2.60, whole 2.62, last two "
            "blocks 2.95, untrained 3.67 (held-out loss, benchmarks/learning_rate.py), so the adapter stays the first "
            "thing to try. Hold rows out, and compare with the untrained model given examples in its prompt"
        )
    return None


def _epochs(case: Case, s: Settings) -> Settings:
    if case.rows is not None and case.rows >= MANY_ROWS:
        return s | {"epochs": Setting(1, f"{case.rows:,} rows say most of what they say in one pass", JUDGEMENT)}
    if case.rows is not None and case.rows < SOME_ROWS:
        return s | {
            "epochs": Setting(
                5, f"{case.rows:,} rows need several passes; the best checkpoint is kept", "litgpt's default"
            )
        }
    return s | {
        "epochs": Setting(
            3, "the usual number; the best checkpoint is kept", "the LoRA guide's example (num_train_epochs=3)"
        )
    }


def _batches(case: Case, s: Settings) -> Settings:
    """Rows per optimiser step; how many of them at once is memory's business."""
    wanted = 8 if case.rows is not None and case.rows < SOME_ROWS else 32 if (case.rows or 0) >= MANY_ROWS else 16
    told = Setting(wanted, "large batches hurt adapters more than they hurt full fine-tuning", REGRET)
    return s | {"global_batch": told}


def _storage(case: Case, s: Settings) -> Settings:
    """The cheapest way that fits: first nothing given up, then time, then exactness."""
    precision = "bf16" if case.device == "cuda" else "fp32"
    batch = min(8, s["global_batch"].value)
    plain = {
        "precision": Setting(precision, "the type the device is fast at", "PyTorch on such devices"),
        "quant": Setting("none", "nothing to gain by rounding the base", JUDGEMENT),
        "recompute": Setting("none", "a third more time for nothing when memory is there", SUMS),
        "batch_size": Setting(batch, "the whole step, or 8 rows of it, at once", JUDGEMENT),
    }
    if case.memory is None:
        return s | plain
    tried = s | plain
    for change, cost in _ladder(s["method"].value):
        tried = s | plain | {n: Setting(v, cost, SUMS) for n, v in change.items()}
        rows = min(s["global_batch"].value, _estimate(case, tried).largest_batch or 0)
        if rows >= 1:
            why = f"{rows} rows fit beside the rest in {gib(case.memory)}"
            return tried | {"batch_size": Setting(1 << (rows.bit_length() - 1), why, SUMS)}
    why = f"not one row of {case.max_len} tokens fits: see memory for what would save most"
    return tried | {"batch_size": Setting(1, why, SUMS)}


def _ladder(method: str) -> list[tuple[dict[str, str], str]]:
    steps: list[tuple[dict[str, str], str]] = [
        ({}, ""),
        ({"recompute": "full"}, "does not fit otherwise; a third more time"),
    ]
    if method == "lora":
        cost = "does not fit otherwise; 4-bit base"
        steps += [({"quant": "nf4"}, cost), ({"quant": "nf4", "recompute": "full"}, f"{cost}, and a third more time")]
    return steps


def _rate(case: Case, s: Settings) -> Settings:
    steps = None
    if case.rows is not None:
        steps = max(1, math.ceil(case.rows * s["epochs"].value / s["global_batch"].value))
    value, reason = learning_rate(
        case.shapes.parameters,
        rank=s["r"].value,
        alpha=s["alpha"].value,
        method=s["method"].value,
        task=case.task,
        steps=steps,
        rows=case.rows,
    )
    return s | {"lr": Setting(value, reason, RULE)}


def _rest(case: Case, s: Settings) -> Settings:
    """What is the same for everybody, and what each method has no use for."""
    s = s | {
        "schedule": Setting("cosine", "falls to nothing by the end", TOOLS),
        "warmup": Setting(0.03, "a short warm-up", TOOLS),
        "combine": Setting(
            "add", "DoRA is a little better and keeps twice the activations", "benchmarks/learning_rate.py"
        ),
        "scaling": Setting("lora", "the learning-rate rule is made for alpha / r; rsLoRA moves with it", RULE),
    }
    if s["method"].value == "lora":
        return s
    unused = ("r", "alpha", "dropout", "targets", "layer_names", "combine", "scaling", "quant")
    kept = {name: setting for name, setting in s.items() if name not in unused}
    if s["method"].value == "freeze":
        trained = trained_base(case.shapes, Plan(method="freeze", **case.plan))
        kept["layers"] = Setting(2, f"the last two blocks: {trained / 1e6:.3g} M of the parameters", NOTES)
    return kept


def _plan_of(case: Case, s: Settings) -> dict[str, Any]:
    named = ("method", "r", "dropout", "targets", "precision", "quant", "recompute", "batch_size")
    return case.plan | {n: s[n].value for n in named if n in s}


def _estimate(case: Case, s: Settings) -> Estimate:
    return estimate_memory(case.shapes, memory=case.memory, **_plan_of(case, s))


def _fits(case: Case, s: Settings, **changes: Any) -> bool | None:
    """Whether it fits; None when nobody said how much memory there is."""
    if case.memory is None:
        return None
    plan = {n: v for n, v in _plan_of(case, s).items() if n not in changes}
    return estimate_memory(case.shapes, memory=case.memory, **plan, **changes).fits
