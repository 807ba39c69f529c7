"""LoRA: what to attach, where, and how it starts. One frozen value that travels with the adapter to disk and back."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import veneer.core.deltas  # noqa: F401  (the variants register themselves)
from veneer.core.combine import COMBINES
from veneer.core.delta import DELTAS
from veneer.core.init import INITS
from veneer.core.registry import Registry, near
from veneer.errors import ConfigError

__all__ = ["SCALINGS", "LoRA"]

SCALINGS: Registry[Callable[[float, int], float]] = Registry("scaling")
SCALINGS["lora"] = lambda alpha, rank: alpha / rank  # arXiv:2106.09685, section 4.1
SCALINGS["rslora"] = lambda alpha, rank: alpha / math.sqrt(rank)  # arXiv:2312.03732, theorem 3.2
SCALINGS["constant"] = lambda alpha, rank: alpha  # the scale itself, whatever the rank

BIASES = ("none", "lora", "lora_only", "all")
TIES = ("refuse", "together", "apart")
OVERRIDABLE = ("rank", "alpha", "dropout", "delta", "combine", "init", "scaling", "options")
REGISTRIES = {"delta": DELTAS, "combine": COMBINES, "init": INITS, "scaling": SCALINGS}


@cache
def at_end(pattern: str) -> re.Pattern[str]:
    """A pattern for the end of a module's name, beginning at a dot (PEFT's rule for rank_pattern)."""
    return re.compile(rf"(.*\.)?({pattern})")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A low-rank adapter as one value.

    rank, alpha     dW = s B A with A (rank, in), B (out, rank) and s = alpha / rank
    targets         a preset ("minimal": q and v, "attention": q, k, v and o, "all-linear": all but the head, "language"
                    and "vision": all in one tower), a regular expression for whole module names, or name endings
    exclude         name endings, or one regular expression, for layers to leave alone
    layers          indices of the blocks to adapt, negative ones counted from the end; None for all
    dropout         share of the inputs of A that is zeroed in training
    delta, combine, init     names from the registries of the same name
    scaling         "lora" (above), "rslora" (s = alpha / sqrt(rank)) or "constant" (s = alpha)
    bias            "none", "lora_only" (adapted layers) or "all": which biases get a trained change of their own; or
                    "lora": B has a bias, so that every adapted layer adds one, whether or not it had one
    modules_to_save name endings of modules that are trained whole, in a copy that belongs to the adapter
    token_rows      tokens whose rows of the input embedding are trained, and nothing else of it; or name ending ->
                    tokens, for other tables. A head that is tied to the table shows the same rows
    tied            for targets that share their weight with a layer that is no target (an embedding and its head):
                    "refuse", adapt them "together" with one change for both, or leave the other "apart"
    overrides       name pattern -> fields for the layers whose name ends in it; the first match for a field counts
    options         what only this kind of delta knows, such as lokr's factor; each delta lists its own
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    dropout: float = 0.0
    delta: str = "lora"
    combine: str = "add"
    init: str = "kaiming"
    scaling: str = "lora"
    bias: str = "none"
    modules_to_save: Sequence[str] = ()
    token_rows: Sequence[int] | Mapping[str, Sequence[int]] = ()
    tied: str = "refuse"
    layers: Sequence[int] | None = None
    overrides: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "modules_to_save", "layers"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.modules_to_save, str):
            object.__setattr__(self, "modules_to_save", (self.modules_to_save,))
        object.__setattr__(self, "token_rows", _rows(self.token_rows))
        object.__setattr__(self, "overrides", {k: dict(v) for k, v in self.overrides.items()})
        object.__setattr__(self, "options", dict(self.options))
        problems = list(self._problems())
        if problems:
            raise ConfigError("this LoRA cannot be built", problems=problems)

    @property
    def scale(self) -> float:
        return SCALINGS[self.scaling](self.alpha, self.rank)

    def at(self, name: str) -> LoRA:
        """The values that hold for the layer called `name`."""
        if not self.overrides:
            return self
        found: dict[str, object] = {}
        for pattern, fields in self.overrides.items():
            if at_end(pattern).fullmatch(name):
                found = {**fields, **found}
        return dataclasses.replace(self, overrides={}, **found) if found else self  # type: ignore[arg-type]

    def _problems(self) -> Iterator[str]:
        yield from _value_problems(dataclasses.asdict(self))
        if self.bias not in BIASES:
            yield f"bias={self.bias!r} is none of {', '.join(BIASES)}.{near(str(self.bias), BIASES)}"
        if self.bias == "lora" and self.delta in DELTAS and not DELTAS[self.delta].takes_init:
            yield f"bias='lora' is a bias in B, and delta {self.delta!r} has no such factor; bias='lora_only'"
        if self.tied not in TIES:
            yield f"tied={self.tied!r} is none of {', '.join(TIES)}.{near(str(self.tied), TIES)}"
        if not self.targets and not self.modules_to_save and not self.token_rows:
            yield "targets is empty, so nothing would be adapted"
        yield from _row_problems(self.token_rows)
        if isinstance(self.layers, str) or any(not isinstance(i, int) for i in self.layers or ()):
            yield f"layers={self.layers!r} must be whole numbers"
        for pattern, fields in self.overrides.items():
            try:
                at_end(pattern)
            except re.error as error:
                yield f"overrides[{pattern!r}] is not a regular expression: {error}"
            for key in fields.keys() - set(OVERRIDABLE):
                yield f"overrides[{pattern!r}] sets {key!r}, which cannot differ by layer.{near(key, OVERRIDABLE)}"
            yield from (f"overrides[{pattern!r}]: {problem}" for problem in _value_problems(fields))


def _rows(rows: object) -> object:
    """Tuples instead of lists, so that the value cannot change behind our back."""
    if isinstance(rows, Mapping):
        return {name: _rows(own) for name, own in rows.items()}
    return tuple(rows) if isinstance(rows, Iterable) and not isinstance(rows, str) else rows


def _row_problems(rows: object) -> Iterator[str]:
    for own in rows.values() if isinstance(rows, Mapping) else [rows]:
        if not isinstance(own, tuple) or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in own):
            yield f"token_rows={rows!r} must be numbers of tokens, or name endings with the numbers of each"
            return


def _value_problems(values: Mapping[str, object]) -> Iterator[str]:
    rank, alpha, dropout = values.get("rank", 1), values.get("alpha", 1.0), values.get("dropout", 0.0)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        yield f"rank={rank!r} must be a whole number of at least 1"
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        yield f"alpha={alpha!r} must be a positive number: dW is multiplied by it"
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        yield f"dropout={dropout!r} must be at least 0 and below 1"
    for key, registry in REGISTRIES.items():
        if key in values and values[key] not in registry:
            known = ", ".join(sorted(registry))
            yield f"{key}={values[key]!r} is not known.{near(str(values[key]), registry)} Known: {known}"
    delta, options = values.get("delta", "lora"), values.get("options", {})
    if delta in DELTAS and isinstance(options, Mapping):
        if not DELTAS[str(delta)].takes_init and values.get("init", "kaiming") != "kaiming":
            yield f"init={values['init']!r} does nothing for delta {delta!r}, which has a start of its own"
        allowed = DELTAS[str(delta)].options
        for key in options.keys() - allowed.keys():
            listed = ", ".join(sorted(allowed)) or "none"
            yield f"options[{key!r}]: delta {delta!r} has no such option.{near(key, allowed)} It has: {listed}"
