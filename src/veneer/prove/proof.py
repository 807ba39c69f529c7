"""What a proof is: claims that were tested on the model itself, with the figures that decided each.

    P0  every setting that somebody gave was read by the run
    P1  every sample trains at least one token, and the end of each answer is among them
    P2  the frozen weights are the same bits as before; every adapter moved, and learns in every layer
    P3  the file, loaded again, gives the same logits
    P4  the adapter changes the answers, and switching it off gives the base back bit for bit
    P5  merged equals adapted as far as the stored type can tell, and unmerging gives the base back bit for bit
    P6  adapters add up: weight 1 is the adapter itself, shares of one adapter are the adapter, a sum is the joined pair
    P7  the base is what its files hold: a few rows of every tensor, within what packing leaves; seen when it was loaded

A claim that cannot be tested on a model (merging on a base that is stored in four bits) is not counted as passed: it is
left out, with the reason. This module knows no torch, so a report can read a proof without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from veneer.ckpt.atomic import atomic_write
from veneer.errors import CheckpointError, ProofFailed

__all__ = ["Check", "LeftOut", "Outcome", "Proof"]

FILE = "proof.json"


@dataclass(frozen=True)
class Check:
    """One claim and how it fared. `brief` is what a good outcome adds to the one green line."""

    id: str
    title: str
    passed: bool
    statement: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    brief: str = ""

    def __str__(self) -> str:
        return f"{self.id} {self.title}: {'passed' if self.passed else 'FAILED'}. {self.statement}"


@dataclass(frozen=True)
class LeftOut:
    """A claim that this model or this run gives no way to test."""

    id: str
    title: str
    reason: str


Outcome = Check | LeftOut


@dataclass(frozen=True)
class Proof:
    """All checks of one adapter, and the canary: answers to a few prompts, to be replayed wherever it is loaded."""

    checks: Sequence[Check]
    left_out: Sequence[LeftOut] = ()
    adapter: str = "default"
    canary: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    def __getitem__(self, id: str) -> Check:
        return next(check for check in self.checks if check.id == id)

    def line(self, dot: str = " \u00b7 ") -> str:
        """One line for a terminal: what was proved, or what failed.

        >>> Proof([Check("P4", "Effect", True, "It differs.", brief="differs from base (KL 0.62)")]).line(" | ")
        'differs from base (KL 0.62) | 1/1 proofs hold'
        """
        if self.failed:
            return dot.join(f"{check.id} failed: {check.statement.splitlines()[0]}" for check in self.failed)
        briefs = [check.brief for check in self.checks if check.brief]
        return dot.join([*briefs, f"{len(self.checks)}/{len(self.checks)} proofs hold"])

    def __str__(self) -> str:
        skipped = [f"{each.id} {each.title}: not tested. {each.reason}" for each in self.left_out]
        return "\n".join([*map(str, self.checks), *skipped])

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "line": self.line(),
            "adapter": self.adapter,
            "checks": [_plain(asdict(check)) for check in self.checks],
            "left_out": [asdict(each) for each in self.left_out],
            "canary": _plain(self.canary),
            "seconds": round(self.seconds, 3),
        }

    def save(self, folder: str | Path) -> Path:
        path = Path(folder) / FILE
        atomic_write(path, json.dumps(self.to_json(), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Proof:
        """The proof in `path`: its file, or the folder that holds it."""
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            checks = [Check(**check) for check in held["checks"]]
            left_out = [LeftOut(**each) for each in held["left_out"]]
            return cls(checks, left_out, held["adapter"], held["canary"], held["seconds"])
        except FileNotFoundError:
            raise CheckpointError("there is no proof here", str(path), "`veneer train` leaves one in its run") from None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"this is not a proof: {error}", str(path), "take the file the run wrote") from None

    def raise_if_failed(self, where: str | Path | None = None) -> None:
        if self.failed or not self.checks:
            raise ProofFailed(
                "the result is not what it claims to be" if self.checks else "nothing was proved",
                where=str(where) if where is not None else None,
                fix="do not use this adapter before the cause is found; each finding names its layer, file or key",
                problems=[f"{check.id} {check.title}: {check.statement}" for check in self.failed],
            )


def _plain(value: Any) -> Any:
    """JSON has no NaN; a figure that is not finite is written as a word, because it is a finding."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
