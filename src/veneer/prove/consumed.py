"""P0: every setting that somebody gave was read by the run.

A key that is accepted and then read by nothing is the quietest failure of all. So the run reads its settings through
`watch`, which remembers what was asked for, and at the end the two lists are compared.

    settings = watch(settings)
    ... settings.lr ...
    every_key_read(given={"lr": "flag", "warmup": "file: cfg.yaml:3"}, read=settings.read_keys)     # warmup: not read
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Generic, TypeVar

from veneer.prove.proof import Check

__all__ = ["Watched", "every_key_read", "watch"]

TITLE = "Settings"
S = TypeVar("S")


class Watched(Generic[S]):
    """Reads like the settings it holds, and remembers which keys were read."""

    def __init__(self, settings: S) -> None:
        object.__setattr__(self, "_settings", settings)
        object.__setattr__(self, "_read", set())

    @property
    def read_keys(self) -> frozenset[str]:
        return frozenset(self._read)

    @property
    def unwatched(self) -> S:
        """The settings themselves: for writing them down, which is not using them."""
        return self._settings

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._settings, name)
        if not name.startswith("_"):
            self._read.add(name)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"settings are not changed while they are watched: {name}")

    def __repr__(self) -> str:
        return f"Watched({self._settings!r})"


def watch(settings: S) -> Watched[S]:
    return Watched(settings)


def every_key_read(given: Mapping[str, str], read: Collection[str]) -> Check:
    """`given`: the keys that somebody set, and where; `read`: those the run asked for."""
    unread = {key: where for key, where in given.items() if key not in read}
    said = f"All {len(given)} settings that were given were read by the run."
    if unread:
        told = ", ".join(f"{key} ({where})" if where else key for key, where in unread.items())
        said = f"{len(unread)} of {len(given)} settings were given but nothing read them: {told}."
    return Check("P0", TITLE, not unread, said, {"given": sorted(given), "unread": sorted(unread)})
