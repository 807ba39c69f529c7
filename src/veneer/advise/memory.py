"""Will it fit? The peak of a run in bytes, from shapes, before anything loads.

`estimate_memory` says what the highest moment of a step holds, part by part, whether that fits a device, which
settings would save most, and the largest micro-batch that fits. The moments are worked out in peak.py, what a block
keeps for its backward in activations.py. All of it is held to measured peaks by benchmarks/memory.py
(docs/benchmarks.md): "measured" there is what torch's allocator handed out, which is what a GPU runs out of.
The interpreter, the libraries and the CUDA context come on top and are the `reserve` here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from veneer.advise.device import free_memory
from veneer.advise.peak import PARTS, adapter_bytes, host_inputs, moments
from veneer.advise.plan import Plan
from veneer.advise.shapes import Shapes, bytes_of, shapes_of
from veneer.core.registry import near
from veneer.errors import ConfigError

__all__ = ["PARTS", "Estimate", "Knob", "Plan", "adapter_bytes", "estimate_memory", "free_memory", "gib"]

CUDA_RESERVE = 0.5 * 2**30  # the context, outside the allocator
CUDA_FRAGMENTS = 0.03  # what the caching allocator cannot use
CPU_RESERVE = 0.7 * 2**30  # interpreter, torch, transformers, tokenizer


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

    @property
    def host_bytes(self) -> int:
        """What lies in the host's pinned memory meanwhile."""
        count, each = host_inputs(self.shapes, self.plan)
        return count * each

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
        more["host_bytes"] = self.host_bytes
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


def _estimate(shapes: Shapes, plan: Plan) -> Estimate:
    found = moments(shapes, plan)
    peak = max(found.parts, key=lambda name: sum(found.parts[name].values()))
    parts = {name: int(found.parts[peak].get(name, 0)) for name in PARTS}
    return Estimate(
        parts=parts,
        peak=peak,
        moments={name: int(sum(held.values())) for name, held in found.parts.items()},
        parameters=shapes.parameters,
        trainable=found.trainable,
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
        tried.append(("recompute input", {"recompute": "input"}, "about a third more time"))
    if plan.mode == "train" and plan.optimizer == "adamw":
        tried.append(("optimizer adamw8bit", {"optimizer": "adamw8bit"}, "moments of one byte, rounded at random"))
    if plan.mode == "train" and plan.optimizer in ("adamw", "adamw8bit") and plan.device == "cuda":
        tried.append(("optimizer adamw_host", {"optimizer": "adamw_host"}, "its moments cross the bus at each step"))
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
    away = f", {gib(estimate.host_bytes)} on the host" if estimate.host_bytes else ""
    share = 100 * estimate.trainable / max(estimate.parameters, 1)
    return {
        "weights": f"{estimate.parameters / 1e9:.3g} B parameters, {kind}",
        "adapter": f"rank {plan.r}, fp32" if plan.method == "lora" else "none",
        "gradients": f"{estimate.trainable / 1e6:.3g} M trained ({share:.2g} %), fp32",
        "optimizer": plan.optimizer,
        "activations": f"{plan.batch_size} x {rows} tokens, recompute {plan.recompute}, {plan.attention}{away}"
        if plan.mode == "train"
        else f"keys and values of {plan.batch_size} x {rows} tokens",
        "loss": f"{plan.loss}, vocabulary {shapes.vocab}" if shapes.vocab else "classification",
        "workspace": "scratch of one block",
    }
