"""What a training step should keep for its backward pass: all of it where that fits, and no less than must be.

    level      kept of a block             costs, of a step's arithmetic
    none       all that backward needs     nothing
    gate_up    all but gate and up         about a fifth
    middle     its input and its middle    about a third
    input      its input                   about a third
    offload    nothing: its input is on the host meanwhile (GPUs), and the transfer

A stock block knows none and input (transformers' own checkpointing). `choose` takes the first level whose
estimate, with a margin, fits what the device has for this process. An estimate is not a promise: the run tries its
longest batch before the first step and goes one level further where that runs out of memory (train/fast.py).

Recomputing pays for memory with time. What pays with less - fewer rows at once, moments of one byte, a packed base - is
named, and never done unasked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from veneer.advise.memory import Estimate, estimate_memory, gib
from veneer.advise.plan import Plan
from veneer.advise.shapes import Shapes

__all__ = ["KNOWN_BLOCKS", "Choice", "choose", "levels_of"]

KNOWN_BLOCKS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")  # families whose blocks run fused
MARGIN = 0.05  # of the estimate, on top of its own reserve: benchmarks/memory.py finds errors up to that


@dataclass(frozen=True)
class Choice:
    """The level, what every level looked at would need, and what would allow an earlier one."""

    level: str
    needs: Mapping[str, int]  # bytes, margin included
    free: int
    instead: tuple[str, ...] = ()

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
        return f"{'the first that fits' if self.fits else 'nothing fits, by the estimate'}: {mine}, {has}"


def levels_of(fused: bool, device: str) -> tuple[str, ...]:
    """The levels there are, from the one that keeps everything to the one that keeps nothing."""
    between = ("gate_up", "middle") if fused else ()
    return ("none", *between, "input", *(("offload",) if fused and device == "cuda" else ()))


def choose(shapes: Shapes, plan: Plan, free: int) -> Choice:
    """The first level that fits into `free` bytes; the last where none does."""
    needs: dict[str, int] = {}
    for level in levels_of(plan.fused, plan.device):
        needs[level] = _needed(shapes, replace(plan, recompute=level))
        if needs[level] <= free:
            break
    least = min(needs, key=needs.__getitem__)  # the last one where it fits
    all_is_well = least == "none" and needs[least] <= free
    return Choice(least, needs, free, () if all_is_well else tuple(_instead(shapes, plan, free)))


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
    found: Estimate = estimate_memory(shapes, **{name: getattr(plan, name) for name in plan.__dataclass_fields__})
    return int(found.needed_bytes + MARGIN * found.total_bytes)
