"""Every exception that Veneer raises on purpose.

    VeneerError                      something that Veneer itself noticed; catch this to catch all of them
    |-- UserError (ValueError)       the caller can mend it: bad arguments, files, data      command line: exit 2
    |   |-- ConfigError              a setting is unknown, mistyped or contradictory
    |   |-- DataError                rows that cannot be trained on; `.problems` lists all of them
    |   |-- TargetError              a pattern for layers that matches nothing, or a layer that cannot be adapted
    |   |-- StateError               the right call at the wrong moment (merge twice, activate while merged)
    |   `-- CheckpointError          a file that is missing, corrupt or made for another base
    |-- DoesNotFit                   the run would not fit into memory                       command line: exit 3
    |-- Diverged                     the loss left the ground and one restart did not help   command line: exit 1
    `-- ProofFailed                  the result is not what it claims to be                  command line: exit 1

A message says three things on three lines: what happened, where, and what to do. All problems of one kind are
collected and raised once; whatever was being changed is as it was before the call.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Diverged",
    "DoesNotFit",
    "ProofFailed",
    "StateError",
    "TargetError",
    "UserError",
    "VeneerError",
]

SHOWN = 20  # problems printed in a message; the rest are counted and stay in `.problems`


class VeneerError(Exception):
    """What happened, where, and what to do about it; `problems` holds the single findings when there are several."""

    def __init__(
        self, what: str, where: str | None = None, fix: str | None = None, problems: Iterable[str] = ()
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix
        self.problems = list(problems)

    def __str__(self) -> str:
        listed = [f"  - {problem}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            listed.append(f"  ... and {len(self.problems) - SHOWN} more")
        parts = [self.what, *listed, self.where and f"at: {self.where}", self.fix and f"do: {self.fix}"]
        return "\n".join(part for part in parts if part)

    def __reduce__(self) -> tuple[object, ...]:  # exceptions cross process boundaries; keep every field
        return type(self), (self.what, self.where, self.fix, self.problems)


class UserError(VeneerError, ValueError):
    """The caller can mend it."""


class ConfigError(UserError):
    """A setting is unknown, mistyped or contradicts another."""


class DataError(UserError):
    """Rows that cannot be trained on."""


class TargetError(UserError):
    """A pattern that matches no layer, or a layer that cannot carry the adapter."""


class StateError(UserError):
    """The call makes no sense in the model's present state."""


class CheckpointError(UserError):
    """A file is missing, corrupt, or was made for another base."""


class DoesNotFit(VeneerError):
    """The run would need more memory than there is."""


class Diverged(VeneerError):
    """The loss left the ground, and one restart at a lower learning rate did not help."""


class ProofFailed(VeneerError):
    """A proof at a hand-over failed: the result is not what it claims to be."""
