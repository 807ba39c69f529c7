"""A run directory in memory, as far as it got.

A run can die at any moment, also while it writes, and the page about it must still be made: so every part may be
missing, and what cannot be read counts as missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from veneer.app.svg import Point
from veneer.errors import VeneerError
from veneer.train.run import Run
from veneer.train.settings import KEYS

__all__ = ["Record", "Row", "Setting", "is_number", "read", "within"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """One setting of the run, with where its value came from."""

    key: str
    value: Any
    default: Any
    origin: str
    help: str

    @property
    def is_default(self) -> bool:
        return self.value == self.default or self.origin.partition(":")[0] == "default"


@dataclass(frozen=True)
class Record:
    """What the files of a run say."""

    folder: Path
    status: str = "unknown"
    info: Row = field(default_factory=dict)
    settings: list[Setting] = field(default_factory=list)
    metrics: Sequence[Row] = field(default_factory=list)
    events: Sequence[Row] = field(default_factory=list)
    data: Row = field(default_factory=dict)
    proof: Row = field(default_factory=dict)
    detail: Row = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.info.get("name") or self.folder.resolve().name)

    @property
    def result(self) -> Row:
        found = self.info.get("result")
        return found if isinstance(found, Mapping) else {}

    @property
    def steps(self) -> int:
        return int(max((row["step"] for row in self.metrics if is_number(row.get("step"))), default=0))

    @property
    def steps_planned(self) -> int | None:
        planned = next((row["steps"] for row in reversed(self.metrics) if is_number(row.get("steps"))), None)
        planned = planned or self.info.get("total_steps") or self.setting("steps")
        return int(planned) if is_number(planned) else None

    @property
    def seconds(self) -> float | None:
        began, ended = self.info.get("started"), self.info.get("ended") or self.info.get("heartbeat")
        return ended - began if is_number(began) and is_number(ended) else None

    @property
    def checks(self) -> list[Row]:
        return [check for check in self.proof.get("checks") or () if isinstance(check, Mapping)]

    @property
    def task_metrics(self) -> dict[str, str]:
        """What was measured on held-out rows besides the loss (accuracy, f1), and what to call it."""
        aside = {"step", "steps", "time", "best", "loss", "val_loss", "seconds", "tokens", "trained_tokens", "epoch"}
        keys = (key for row in self.metrics if "val_loss" in row for key in row)
        found = dict.fromkeys(key for key in keys if key not in aside and self.curve(key))
        return {key: key.removeprefix("val_").replace("_", " ").capitalize() for key in found}

    def curve(self, key: str) -> list[Point]:
        rows = (row for row in self.metrics if is_number(row.get(key)) and is_number(row.get("step")))
        return [(float(row["step"]), float(row[key])) for row in rows]

    def setting(self, key: str) -> Any:
        return next((each.value for each in self.settings if each.key == key), None)

    def event(self, kind: str) -> Row:
        """The last event of a kind, or nothing."""
        return next((row for row in reversed(self.events) if row.get("event") == kind), {})


def read(folder: str | Path) -> Record:
    run = Run(folder)
    info = _json(run.path("run.json"))
    return Record(
        run.folder,
        run.status if "status" in info else "unknown",
        info,
        _settings(run),
        run.metrics(),
        run.events(),
        _json(run.path("data.json")),
        _json(run.path("proof.json")),
        _json(run.path("detail.json")),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _settings(run: Run) -> list[Setting]:
    try:
        resolved = run.config()
    except (OSError, ValueError, VeneerError):
        return []
    return [
        Setting(name, getattr(resolved.settings, name), key.default, str(resolved.origins[name]), key.help)
        for name, key in KEYS.items()
        if name != "resume"
    ]


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def within(tree: Any, key: str) -> Any:
    """The value of `key` nearest to the top of nested mappings, or None.

    >>> within({"train": {"lengths": {"p50": 3}}, "p50": 1}, "lengths")
    {'p50': 3}
    """
    level = [tree]
    while level:
        maps = [each for each in level if isinstance(each, Mapping)]
        if found := next((each for each in maps if key in each), None):
            return found[key]
        level = [inner for each in maps for inner in each.values()]
    return None
