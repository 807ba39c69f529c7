"""Will it fit? Bytes from shapes, before anything loads.

A training step holds the same things all the time (weights, adapter, optimiser states) and others in turn, so its peak
is the largest of a few moments, not the sum of everything:

    loss         every block's activations, and the logits of one chunk with their gradient
    backward i   the activations of blocks 0..i, the gradients of those behind it, one block's own scratch
    step         all gradients, no activations

Full fine-tuning peaks at the step or late in the backward, LoRA at the loss; recomputation trades the sum over blocks
for one block's worth at a time. `estimate_memory` works the moments out and reports the highest, by part. What one
block keeps is in activations.py. The estimates are held to measured peaks by benchmarks/memory.py (docs/benchmarks.md):
"measured" there is what the allocator handed out, which is what a GPU runs out of; the interpreter, libraries and the
CUDA context come on top and are the `reserve` here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from veneer.advise.activations import Pass, backward_workspace, kept, kept_outside
from veneer.advise.device import free_memory, usual_device
from veneer.advise.shapes import Block, Shapes, bytes_of, shapes_of
from veneer.core.registry import near
from veneer.errors import ConfigError, TargetError

__all__ = ["PARTS", "Estimate", "Knob", "Plan", "adapter_bytes", "estimate_memory", "free_memory", "gib"]

PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "loss", "workspace")

FLOAT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PACKED_BITS = {"int8": 8.0, "fp8": 8.0, "nf4": 4.127}  # nf4: 4 bits, an fp8 scale for 64, an fp32 scale for 64 * 256
CHUNK_ROWS = 2048  # train/loss.py: tokens whose logits exist at a time
LOGIT_BYTES = 12  # cross entropy in fp32: log-probabilities, the gradient that reaches them, the gradient of the logits
CUDA_RESERVE = 0.6 * 2**30  # context, cuBLAS workspaces
CUDA_FRAGMENTS = 0.03  # what the caching allocator cannot use
CPU_RESERVE = 0.7 * 2**30  # interpreter, torch, transformers, tokenizer

CHOICES = {
    "task": ("causal_lm", "sequence_classification", "token_classification", "seq2seq"),
    "method": ("lora", "full", "freeze"),
    "precision": ("fp32", "bf16", "fp16"),
    "quant": ("none", "nf4", "int8", "fp8"),
    "recompute": ("none", "full"),
    "attention": ("sdpa", "eager"),
    "loss": ("chunked", "plain"),
    "combine": ("add", "dora"),
    "device": ("cpu", "cuda"),
    "mode": ("train", "infer"),
    "optimizer": ("adamw", "adamw8bit", "sgd"),
}
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "sgd": 0}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings that decide how much memory a run takes, under the names of the training settings."""

    task: str | None = None
    labels: int = 2
    method: str = "lora"
    r: int = 16
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    layers: int | Sequence[int] | None = None
    dropout: float = 0.0
    combine: str = "add"
    precision: str = "auto"  # bf16 on a GPU, fp32 on a CPU
    quant: str = "none"
    batch_size: int = 1
    max_len: int = 2048
    accumulate: bool = False  # several micro-batches to a step: gradients live through all of them
    recompute: str = "none"
    attention: str = "sdpa"
    loss: str = "chunked"
    padded: bool | None = None  # rows of unequal length; None: when there are several
    optimizer: str = "adamw"
    device: str = field(default_factory=usual_device)
    mode: str = "train"

    def __post_init__(self) -> None:
        if self.precision == "auto":
            object.__setattr__(self, "precision", "bf16" if self.device == "cuda" else "fp32")
        problems = [p for name, known in CHOICES.items() if (p := _choice_problem(name, getattr(self, name), known))]
        for name in ("r", "batch_size", "max_len", "labels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                problems.append(f"{name}={value!r} must be a whole number of at least 1")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout={self.dropout!r} must be at least 0 and below 1")
        if problems:
            raise ConfigError("memory cannot be estimated for these settings", problems=problems)

    @property
    def width(self) -> int:
        return FLOAT_BYTES[self.precision]

    @property
    def autocast(self) -> bool:
        """Weights that are trained stay in fp32, so a narrower precision is autocast's."""
        return self.method != "lora" and self.width < 4

    @property
    def has_padding(self) -> bool:
        return self.batch_size > 1 if self.padded is None else self.padded


def _choice_problem(name: str, value: object, known: Sequence[str]) -> str | None:
    if value in known or (name == "task" and value is None):
        return None
    return f"{name}={value!r} is none of {', '.join(known)}.{near(str(value), known)}"


@dataclass(frozen=True)
class Knob:
    """One setting to turn when memory is short."""

    setting: str
    saves_bytes: int
    cost: str

    def __str__(self) -> str:
        return f"{self.setting} saves {gib(self.saves_bytes)} ({self.cost})"


@dataclass(frozen=True)
class Estimate:
    """Bytes at the highest moment, by part; `moments` holds the total of every moment looked at."""

    parts: dict[str, int]
    peak: str
    moments: dict[str, int]
    parameters: int
    trainable: int
    reserve_bytes: int
    plan: Plan
    shapes: Shapes
    device_bytes: int | None = None
    knobs: tuple[Knob, ...] = ()
    largest_batch: int | None = None
    assumed: tuple[str, ...] = field(default=())

    @property
    def total_bytes(self) -> int:
        """What the allocator hands out at the peak."""
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> int:
        """What the device must have: the peak and the reserve."""
        return self.total_bytes + self.reserve_bytes

    @property
    def fits(self) -> bool | None:
        """None when no device was named."""
        return None if self.device_bytes is None else self.needed_bytes <= self.device_bytes

    def sentence(self) -> str:
        """One line: what is needed, of how much, and where it goes."""
        shown = " + ".join(f"{n} {gib(b)}" for n, b in self.parts.items() if b >= 0.01 * self.total_bytes)
        of = f" of {gib(self.device_bytes)}" if self.device_bytes is not None else ""
        verdict = {True: "fits", False: "does not fit", None: "estimated"}[self.fits]
        return f"{verdict}: needs {gib(self.needed_bytes)}{of} ({shown} + reserve {gib(self.reserve_bytes)})"

    def rows(self) -> list[tuple[str, str, str]]:
        """(part, size, what it is), for a table."""
        told = _told(self)
        return [
            *((name, gib(size), told[name]) for name, size in self.parts.items()),
            ("reserve", gib(self.reserve_bytes), "libraries, device context, fragmentation"),
            ("needed", gib(self.needed_bytes), f"peak at the {self.peak}"),
        ]

    def to_json(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("plan", "shapes", "knobs")}
        more = {"total_bytes": self.total_bytes, "needed_bytes": self.needed_bytes, "fits": self.fits}
        return own | more | {"knobs": [asdict(k) for k in self.knobs], "plan": asdict(self.plan)}

    def __str__(self) -> str:
        lines = [f"{name:12} {size:>10}  {what}" for name, size, what in self.rows()]
        lines.append(self.sentence())
        if self.largest_batch is not None:
            lines.append(f"largest micro-batch that fits: {self.largest_batch}")
        lines += [f"to save: {knob}" for knob in self.knobs]
        lines += [f"assumed: {note}" for note in self.assumed]
        return "\n".join(lines)


def gib(size: float) -> str:
    """
    >>> gib(0), gib(5 * 2**20), gib(1.5 * 2**30)
    ('0', '5.0 MiB', '1.50 GiB')
    """
    if size < 2**19:
        return "0" if not size else f"{size / 2**10:.1f} KiB"
    return f"{size / 2**20:.1f} MiB" if size < 2**29 else f"{size / 2**30:.2f} GiB"


def estimate_memory(model: Any, *, memory: str | int | None = None, **settings: Any) -> Estimate:
    """Peak bytes of training (or generating with) a model, from its shapes.

    model: a folder, config.json, cached hub id, config, model, or a size such as "8B". memory: what the device has, as
    in "24GB". settings: the fields of Plan, which are the training settings of the same names.

    >>> e = estimate_memory("8B", device="cuda", r=16, batch_size=2, recompute="full")
    >>> round(e.parts["weights"] / 2**30, 1), e.fits
    (15.0, None)
    """
    unknown = settings.keys() - {f.name for f in fields(Plan)}
    if unknown:
        names = [f.name for f in fields(Plan)]
        raise ConfigError(
            "estimate_memory takes other settings", problems=[f"no {u!r}.{near(u, names)}" for u in sorted(unknown)]
        )
    plan = Plan(**settings)
    shapes = shapes_of(model, plan.task, plan.labels)
    found = _estimate(shapes, plan)
    if memory is None:
        return found
    device = bytes_of(memory)
    known = replace(found, device_bytes=device, largest_batch=_largest_batch(shapes, plan, device))
    return replace(known, knobs=_knobs(known))


# Parts that are always there ----------------------------------------------------------------------------------------


def adapter_bytes(
    matrices: Sequence[tuple[int, int]], r: int, *, param: int = 4, grad: int = 4, moments: int = 8
) -> int:
    """Bytes to train one adapter: parameters, gradients and Adam's two moments.

    >>> layer = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    >>> adapter_bytes(layer * 32, r=16) / 2**30  # every projection of Llama-3-8B, GiB
    0.625
    """
    return sum(r * (out + n) for out, n in matrices) * (param + grad + moments)


def weight_bytes(shapes: Shapes, plan: Plan) -> int:
    """Bytes of the base as it is stored. Weights that are trained are kept in fp32."""
    if plan.quant == "none":
        return shapes.parameters * plan.width if plan.method == "lora" else _trained_base_bytes(shapes, plan)
    scales = (
        0 if plan.quant == "nf4" else 4 * sum(b.count * m.copies * m.out for b in shapes.blocks for m in b.matrices)
    )
    packed = shapes.packable * PACKED_BITS[plan.quant] / 8 + scales
    return int(packed + (shapes.parameters - shapes.packable) * plan.width)


def _trained_base_bytes(shapes: Shapes, plan: Plan) -> int:
    trained = trained_base(shapes, plan)
    return (
        4 * trained + plan.width * (shapes.parameters - trained)
        if plan.mode == "train"
        else plan.width * shapes.parameters
    )


def trained_base(shapes: Shapes, plan: Plan) -> int:
    """Parameters of the base that are trained: none, all, or the last blocks of each stack and a new head."""
    if plan.method == "full":
        return shapes.parameters
    if plan.method == "lora":
        return 0
    blocks = sum(len(_chosen(block, plan)) * block.parameters for block in shapes.blocks)
    return blocks + sum(m.parameters for m in shapes.tail if _is_new(m.name))


def _chosen(block: Block, plan: Plan) -> set[int]:
    """Indices in one stack that `layers` names: a number is that many from the end, None all (two under freeze)."""
    chosen = 2 if plan.layers is None and plan.method == "freeze" else plan.layers
    if chosen is None:
        return set(range(block.count))
    if isinstance(chosen, int):
        return set(range(max(0, block.count - chosen), block.count))
    return {i % block.count for i in chosen if -block.count <= i < block.count}


def _is_new(name: str) -> bool:
    """A task's head: made new for the task, so it is always trained whole."""
    return name.split(".")[0] in ("classifier", "score", "pre_classifier")


def ranks(shapes: Shapes, plan: Plan) -> dict[str, int]:
    """Full name of every adapted layer -> its rank. Raises TargetError for targets that match nothing."""
    if plan.method != "lora":
        return {}
    rows = list(shapes.linears())
    whole = set(_saved_whole(shapes, plan))
    names = [name for name, *_ in rows if name not in whole]
    wanted = _matching(names, plan.targets, "targets")
    refused = _matching(names, plan.exclude, "exclude") if plan.exclude else set()
    return {
        name: min(plan.r, matrix.out, matrix.n)
        for name, matrix, block, i in rows
        if name in wanted - refused and (plan.layers is None or (block is not None and i in _chosen(block, plan)))
    }


def _matching(names: Sequence[str], patterns: str | Sequence[str], what: str) -> set[str]:
    """The names that targets or exclude mean: a preset, a regular expression for whole names, or name endings."""
    if patterns == "all-linear":
        return set(names)
    from veneer.core.select import PRESETS, ends_with  # imports torch, so only where a pattern needs it

    preset = PRESETS.get(patterns) if isinstance(patterns, str) else None
    if isinstance(patterns, str) and preset is None:
        found = {patterns: {n for n in names if re.fullmatch(patterns, n)}}
    else:
        endings = preset or tuple(patterns)
        found = {e: {n for n in names if ends_with(n, e)} for e in endings}
    together = set().union(*found.values())
    missing = [] if preset and together else [pattern for pattern, hits in found.items() if not hits]
    if missing and what == "targets":
        tails = {n.rsplit(".", 1)[-1] for n in names}
        raise TargetError(
            f"{what} match none of {len(names)} linear layers",
            problems=[f"{m!r} matches none.{near(m.rsplit('.', 1)[-1], tails)}" for m in missing],
            fix=f"there are: {', '.join(sorted(tails))}",
        )
    return together


def _saved_whole(shapes: Shapes, plan: Plan) -> dict[str, int]:
    """Modules trained whole beside the adapter -> parameters. A classifier is new, so it always is."""
    known = {m.name: m.parameters for m in shapes.tail}
    if shapes.head is not None:
        known |= {"lm_head": shapes.head.parameters, "embed_tokens": shapes.embeddings}
    new = [n for n in known if _is_new(n)]
    asked = [n for n in known for ending in plan.modules_to_save if n == ending or n.endswith("." + ending)]
    return {name: known[name] for name in (*new, *asked)}


# The moments --------------------------------------------------------------------------------------------------------


@dataclass
class _Layer:
    """One block's share of a step, in bytes."""

    kept: float
    entry: float  # its input, all that recomputation keeps
    workspace: float
    gradients: float


def _estimate(shapes: Shapes, plan: Plan) -> Estimate:
    found = ranks(shapes, plan) if plan.mode == "train" or plan.method == "lora" else {}
    matrices = {name: m for name, m, *_ in shapes.linears()}
    dora = sum(matrices[n].out for n in found) if plan.combine == "dora" else 0
    whole = sum(_saved_whole(shapes, plan).values()) if plan.method == "lora" else 0
    adapter = sum(r * (matrices[n].out + matrices[n].n) for n, r in found.items()) + dora + whole
    trainable = adapter + trained_base(shapes, plan)
    always: dict[str, float] = {"weights": weight_bytes(shapes, plan), "adapter": adapter * 4}
    if plan.mode == "infer":
        moments = {"prefill": always | _inference(shapes, plan)}
        trainable = 0
    else:
        always["optimizer"] = trainable * OPTIMIZER_BYTES[plan.optimizer]
        moments = _training(shapes, plan, found, always, trainable)
    peak = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: int(moments[peak].get(name, 0)) for name in PARTS}
    return Estimate(
        parts=parts,
        peak=peak,
        moments={name: int(sum(parts.values())) for name, parts in moments.items()},
        parameters=shapes.parameters,
        trainable=trainable,
        reserve_bytes=_reserve(plan, sum(parts.values())),
        plan=plan,
        shapes=shapes,
        assumed=(*shapes.assumed, *_length_note(shapes, plan)),
    )


def _length_note(shapes: Shapes, plan: Plan) -> tuple[str, ...]:
    if shapes.tokens_fixed in (None, plan.max_len):
        return ()
    return (f"an image is {shapes.tokens_fixed} tokens, so max_len does not count",)


def _reserve(plan: Plan, total: int) -> int:
    return int(CUDA_RESERVE + CUDA_FRAGMENTS * total if plan.device == "cuda" else CPU_RESERVE)


def _training(
    shapes: Shapes, plan: Plan, found: Mapping[str, int], always: dict[str, float], trainable: int
) -> dict[str, dict[str, float]]:
    tokens = plan.batch_size * (shapes.tokens_fixed or plan.max_len)
    layers = _layers(shapes, plan, found, tokens)
    outside = _outside(shapes, plan, tokens) + _casts(shapes, plan, found)
    behind = 4 * trainable - sum(layer.gradients for layer in layers)  # head, embedding, tail
    held = 4 * trainable if plan.accumulate else 0
    keeps = [layer.entry if plan.recompute == "full" else layer.kept for layer in layers]
    loss = _loss(shapes, plan, tokens)
    moments = {
        "loss": always
        | {"gradients": held + loss["gradients"], "activations": sum(keeps) + outside, "loss": loss["loss"]}
    }
    done = behind
    for i in reversed(range(len(layers))):
        again = layers[i].kept if plan.recompute == "full" else 0
        moments[f"backward of block {i}"] = always | {
            "gradients": max(held, done),
            "activations": sum(keeps[: i + 1]) + again + _casts(shapes, plan, found),
            "workspace": layers[i].workspace + (done and _largest(shapes) * 4 if plan.accumulate else 0),
        }
        done += layers[i].gradients
    moments["step"] = always | {"gradients": 4 * trainable}
    return moments


def _layers(shapes: Shapes, plan: Plan, found: Mapping[str, int], tokens: int) -> list[_Layer]:
    """Blocks in order. Below the first one that learns, no gradient flows and nothing is kept."""
    layers, cache, reached = [], {}, False
    for block in shapes.blocks:
        for i in range(block.count):
            own = tuple((m.name, found.get(f"{block.path.format(i)}.{m.name}", 0)) for m in block.matrices)
            full = plan.method == "full" or (plan.method == "freeze" and i in _chosen(block, plan))
            learns = full or any(rank for _, rank in own)
            key = (id(block), own, full, reached)
            if key not in cache:
                cache[key] = _layer(block, dict(own), full, learns or reached, reached, plan, shapes, tokens)
            layers.append(cache[key])
            reached = reached or learns
    return layers


def _layer(
    block: Block, own: dict[str, int], full: bool, flows: bool, reached: bool, plan: Plan, shapes: Shapes, tokens: int
) -> _Layer:
    if not flows:
        return _Layer(0, 0, 0, 0)
    how = Pass(
        tokens=shapes.tokens_fixed or plan.max_len,
        width=plan.width,
        full=full,
        autocast=plan.autocast,
        ranks=own,
        dropout=plan.dropout,
        dora=plan.combine == "dora",
        attention=plan.attention,
        padded=plan.has_padding and shapes.tokens_fixed is None,
        gpu=plan.device == "cuda",
    )
    per_token = sum(kept(block, how).values())
    if not reached and not full and block.pre_norm:  # nothing before it learns: its first norm needs no derivative
        per_token -= block.hidden * (4 if block.norm == "rms" else how.width)
    trained = block.parameters if full else sum(r * (m.out + m.n) for m in block.matrices if (r := own[m.name]))
    unpacked = max(m.out * m.n for m in block.matrices) * plan.width if plan.quant != "none" else 0
    return _Layer(
        kept=per_token * tokens,
        entry=block.hidden * (4 if plan.autocast else plan.width) * tokens,
        workspace=backward_workspace(block, how) * tokens + unpacked,
        gradients=4 * trained,
    )


def _outside(shapes: Shapes, plan: Plan, tokens: int) -> float:
    block = shapes.blocks[-1]
    how = Pass(tokens=plan.max_len, width=plan.width, full=plan.method == "full", autocast=plan.autocast)
    per_token = kept_outside(shapes.hidden, block.norm, block.head_dim, block.rope, plan.batch_size, how)
    encoder = kept_outside(shapes.hidden, block.norm, block.head_dim, False, 1, how) if block.cross else 0
    return (per_token + encoder + (shapes.hidden * plan.width if block.cross else 0)) * tokens


def _casts(shapes: Shapes, plan: Plan, found: Mapping[str, int]) -> int:
    """What is trained is kept in fp32 and multiplies in the activations' type: a rounded copy lives until backward."""
    if plan.width == 4:
        return 0
    if plan.method == "lora":
        return plan.width * sum(found[n] * (m.out + m.n) for n, m, *_ in shapes.linears() if n in found)
    share = trained_base(shapes, plan) / shapes.parameters
    return int(plan.width * share * (shapes.packable + (shapes.head.parameters if shapes.head else 0)))


def _largest(shapes: Shapes) -> int:
    return max(m.out * m.n for b in shapes.blocks for m in b.matrices)


def _loss(shapes: Shapes, plan: Plan, tokens: int) -> dict[str, float]:
    """What the loss holds at its highest, and gradients it has made by then."""
    if shapes.head is None or shapes.task not in ("causal_lm", "seq2seq"):
        return {"loss": tokens * shapes.hidden * plan.width, "gradients": 0}
    head = shapes.head.out * shapes.head.n
    trains_head = plan.method == "full" or "lm_head" in plan.modules_to_save
    if plan.loss == "plain" or shapes.task == "seq2seq":
        return {"loss": tokens * shapes.vocab * LOGIT_BYTES, "gradients": 0}
    rows = min(CHUNK_ROWS, tokens)
    hidden = 3 * tokens * shapes.hidden * plan.width  # the last norm's output, the trained rows of it, their gradient
    logits = rows * shapes.vocab * LOGIT_BYTES
    if not trains_head:
        return {"loss": hidden + logits, "gradients": 0}
    # The head's gradient is summed over chunks; a chunk's share is made when only the logits' gradient is left.
    return {"loss": hidden + max(logits, rows * shapes.vocab * 4 + 4 * head), "gradients": 4 * head}


def _inference(shapes: Shapes, plan: Plan) -> dict[str, float]:
    """A prefill of batch_size x max_len tokens with its cache of keys and values; logits of the last token alone."""
    tokens = plan.batch_size * (shapes.tokens_fixed or plan.max_len)
    cache = sum(2 * b.count * b.kv_heads * b.head_dim * plan.width for b in shapes.blocks if b.causal) * tokens
    widest = max(b.mid * (3 if b.gated else 2) + 2 * b.hidden for b in shapes.blocks)
    logits = plan.batch_size * shapes.vocab * (plan.width + 4)
    return {"activations": cache, "loss": logits, "workspace": widest * plan.width * tokens}


# What to do about it ------------------------------------------------------------------------------------------------


def _largest_batch(shapes: Shapes, plan: Plan, device: int) -> int:
    """The largest micro-batch that fits, 0 when not even one row does."""

    def fits(rows: int) -> bool:
        return _estimate(shapes, replace(plan, batch_size=rows)).needed_bytes <= device

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= 1 << 16 and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _knobs(estimate: Estimate, count: int = 3) -> tuple[Knob, ...]:
    """The settings that would save most, one change each."""
    plan, shapes = estimate.plan, estimate.shapes
    tried: list[tuple[str, dict[str, Any], str]] = []
    if plan.batch_size > 1:
        half = plan.batch_size // 2
        tried.append(
            (
                f"batch_size {half}",
                {"batch_size": half, "padded": plan.has_padding},
                "same global batch, more steps of it",
            )
        )
    if plan.mode == "train" and plan.recompute == "none":
        tried.append(("recompute full", {"recompute": "full"}, "about a third more time"))
    if plan.method != "lora":
        tried.append(("method lora", {"method": "lora"}, "trains adapters instead of the base"))
    if plan.method == "lora" and plan.quant == "none":
        tried.append(("quant nf4", {"quant": "nf4"}, "4-bit base: slower, a little less exact"))
    if plan.precision == "fp32" and plan.quant == "none":
        tried.append(("precision bf16", {"precision": "bf16"}, "rounds the base; slow on CPUs without AMX"))
    if plan.max_len >= 256 and shapes.tokens_fixed is None:
        tried.append((f"max_len {plan.max_len // 2}", {"max_len": plan.max_len // 2}, "longer rows are dropped or cut"))
    if plan.dropout:
        tried.append(("dropout 0", {"dropout": 0.0}, "each adapter keeps its own masked input with it"))
    found = [
        Knob(label, estimate.total_bytes - _estimate(shapes, replace(plan, **change)).total_bytes, cost)
        for label, change, cost in tried
    ]
    return tuple(sorted((k for k in found if k.saves_bytes > 0), key=lambda k: -k.saves_bytes)[:count])


def _told(estimate: Estimate) -> dict[str, str]:
    plan, shapes = estimate.plan, estimate.shapes
    kind = plan.precision if plan.quant == "none" else f"{plan.quant}, head and embedding {plan.precision}"
    rows = shapes.tokens_fixed or plan.max_len
    share = 100 * estimate.trainable / max(estimate.parameters, 1)
    return {
        "weights": f"{estimate.parameters / 1e9:.3g} B parameters, {kind}",
        "adapter": f"rank {plan.r}, fp32" if plan.method == "lora" else "none",
        "gradients": f"{estimate.trainable / 1e6:.3g} M trained ({share:.2g} %), fp32",
        "optimizer": plan.optimizer,
        "activations": f"{plan.batch_size} x {rows} tokens, recompute {plan.recompute}, {plan.attention}"
        if plan.mode == "train"
        else f"keys and values of {plan.batch_size} x {rows} tokens",
        "loss": f"{plan.loss}, vocabulary {shapes.vocab}" if shapes.vocab else "classification",
        "workspace": "scratch of one block",
    }
