"""What a training step should keep for its backward pass: all of it where that fits, and no less than must be.

    level      kept of a block             costs, of a step's arithmetic
    none       all that backward needs     nothing
    gate_up    all but gate and up         about a fifth
    middle     its input and its middle    about a third
    input      its input                   about a third
    offload    nothing: its input is on the host meanwhile (GPUs), and the transfer
    tiled      the same (on a CPU its input); what is computed exists for 4,096 tokens at a time

A stock block knows none and input (transformers' own checkpointing). `choose` takes the first level whose
estimate, with a margin, fits what the device has for this process; where the host has too little for the inputs, some
of them stay on the card and count there. An estimate is not a promise: the run tries its
longest batch before the first step and goes one level further where that runs out of memory (train/fast.py).

Recomputing pays for memory with time. What pays with less - fewer rows at once, moments of one byte, a packed base - is
named, and never done unasked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from veneer.advise.memory import Estimate, estimate_memory, gib
from veneer.advise.peak import host_inputs
from veneer.advise.plan import Plan
from veneer.advise.shapes import Shapes

__all__ = ["KNOWN_BLOCKS", "Choice", "choose", "fusing", "levels_of", "longest_row", "recorded", "stays"]

KNOWN_BLOCKS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")  # families whose blocks run fused
NARROW = 768  # hidden numbers below which a CPU is quicker on plain blocks
MARGIN = 0.05  # of the estimate, on top of its own reserve: benchmarks/memory.py finds errors up to that
RECORDS = 0.12  # of the estimate: what CUDA graphs take besides; benchmarks/train_gpu.py finds 0.05 to 0.11


def fusing(width: int | None, device: str) -> tuple[bool, str]:
    """Whether blocks should run fused where an adapter is trained, and why. On two cores fused blocks take 1.04 to 1.14
    times as long as plain ones up to a width of 576, up to 1.04 times at 768 and as long at 1,024 (rows of 128 and 512
    tokens, benchmarks/fused_cpu.py); there all they gain is that they keep less. On a GPU they are faster.

    >>> fusing(576, "cpu")
    (False, 'plain blocks of width 576 are quicker on a CPU')
    """
    if device == "cpu" and width is not None and width < NARROW:
        return False, f"plain blocks of width {width} are quicker on a CPU"
    return True, "an adapter is trained, its base is frozen"


@dataclass(frozen=True)
class Choice:
    """The level, what every level looked at would need, and what would allow an earlier one."""

    level: str
    needs: Mapping[str, int]  # bytes, margin included
    free: int
    instead: tuple[str, ...] = ()
    room: int = 0  # bytes of inputs that stay on the card, of those that would go to the host

    @property
    def fits(self) -> bool:
        return self.needs[self.level] <= self.free

    @property
    def reason(self) -> str:
        has = f"{gib(self.free)} are there for it"
        if self.level == "none" and self.fits:
            return f"all that is kept fits: {gib(self.needs['none'])} needed, {has}"
        others = ", ".join(f"{level} {gib(size)}" for level, size in self.needs.items() if level != self.level)
        mine = f"{gib(self.needs[self.level])} needed ({others})"
        if self.room:
            mine += f" with {gib(self.room)} that the host has no room for"
        return f"{'the first that fits' if self.fits else 'nothing fits, by the estimate'}: {mine}, {has}"


def levels_of(fused: bool, device: str) -> tuple[str, ...]:
    """The levels there are, from the one that keeps everything to the one that keeps nothing."""
    between = ("gate_up", "middle") if fused else ()
    return ("none", *between, "input", *(("offload",) if fused and device == "cuda" else ()), *(("tiled",) * fused))


def choose(shapes: Shapes, plan: Plan, free: int, host: int | None = None) -> Choice:
    """The first level that fits into `free` bytes, and into `host` bytes of the host; the last where none does."""
    needs, plans = {}, {}
    for level in levels_of(plan.fused, plan.device):
        plans[level] = _staying(shapes, replace(plan, recompute=level), host)
        needs[level] = _needed(shapes, plans[level])
        if needs[level] <= free:
            break
    least = min(needs, key=needs.__getitem__)  # the last one where it fits
    all_is_well = least == "none" and needs[least] <= free
    instead = () if all_is_well else tuple(_instead(shapes, plan, free))
    return Choice(least, needs, free, instead, stays(shapes, replace(plan, recompute=least), host))


def _staying(shapes: Shapes, plan: Plan, host: int | None) -> Plan:
    """With as many inputs on the card as the host cannot take."""
    count, each = host_inputs(shapes, plan)
    return plan if host is None or not each else replace(plan, stay=max(0, count - max(0, host) // each))


def stays(shapes: Shapes, plan: Plan, host: int | None) -> int:
    """Bytes of inputs that stay on the card at the level that the plan names."""
    return _staying(shapes, plan, host).stay * host_inputs(shapes, plan)[1]


def recorded(shapes: Shapes, plan: Plan, share: float, is_alone: bool) -> int:
    """Bytes of a run whose blocks are recorded as CUDA graphs, for a `share` of the heaviest batch's tokens. What they
    keep for their backward pass they never give back, so unless they are alone it stands beside another pass."""
    found = _estimated(shapes, plan)
    held = 0 if is_alone else int(share * (found.parts["activations"] + found.parts["workspace"]))
    return int(found.needed_bytes + (MARGIN + RECORDS) * found.total_bytes) + held


def longest_row(shapes: Shapes, plan: Plan, free: int, host: int | None = None) -> tuple[int, Choice] | None:
    """Tokens of the longest single row that can be trained, and how; None where not even a short one can be."""

    def choice(tokens: int) -> Choice:
        return choose(shapes, replace(plan, batch_size=1, max_len=tokens, padded=False), free, host)

    low, high = 0, 1 << 24
    while high - low > max(1, low // 500):
        middle = (low + high) // 2
        low, high = (middle, high) if choice(middle).fits else (low, middle)
    return (low, choice(low)) if low else None


def _instead(shapes: Shapes, plan: Plan, free: int) -> list[str]:
    """Single changes with which nothing need be computed again."""
    rows = plan.batch_size
    tried: list[tuple[str, dict[str, Any]]] = []
    while rows > 1:
        rows //= 2
        tried.append((f"batch_size {rows} (the global batch stays)", {"batch_size": rows}))
    if plan.optimizer == "adamw":
        others = ("adamw8bit", "adamw_host") if plan.device == "cuda" else ("adamw8bit",)
        tried += [(f"optimizer {kind}", {"optimizer": kind}) for kind in others]
    if plan.method == "lora" and plan.quant == "none":
        tried.append(("quant nf4", {"quant": "nf4", "weights": None}))
    kept = replace(plan, recompute="none", padded=plan.has_padding)
    fitting = [(said, change) for said, change in tried if _needed(shapes, replace(kept, **change)) <= free]
    first = next((said for said, change in fitting if "batch_size" in change), None)
    return [said for said, change in fitting if "batch_size" not in change or said == first]


def _needed(shapes: Shapes, plan: Plan) -> int:
    found = _estimated(shapes, plan)
    return int(found.needed_bytes + MARGIN * found.total_bytes)


def _estimated(shapes: Shapes, plan: Plan) -> Estimate:
    return estimate_memory(shapes, **{name: getattr(plan, name) for name in plan.__dataclass_fields__})
