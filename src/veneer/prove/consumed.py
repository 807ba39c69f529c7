"""P0: every setting that somebody gave was read by the run.

A key that is accepted and then read by nothing is the quietest failure of all. So the run remembers which of its
settings it asked for, and at the end the two lists are compared.

    >>> every_key_read(given={"lr": "flag", "warmup": "file: cfg.yaml:3"}, read={"lr", "seed"}).statement
    '1 of 2 settings were given but nothing read them: warmup (file: cfg.yaml:3).'
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from veneer.prove.proof import Check

__all__ = ["every_key_read"]

TITLE = "Settings"


def every_key_read(given: Mapping[str, str], read: Collection[str]) -> Check:
    """`given`: the keys that somebody set, and where; `read`: those the run asked for."""
    unread = {key: where for key, where in given.items() if key not in read}
    said = f"All {len(given)} settings that were given were read by the run."
    if unread:
        told = ", ".join(f"{key} ({where})" if where else key for key, where in unread.items())
        said = f"{len(unread)} of {len(given)} settings were given but nothing read them: {told}."
    return Check("P0", TITLE, not unread, said, {"given": sorted(given), "unread": sorted(unread)})
