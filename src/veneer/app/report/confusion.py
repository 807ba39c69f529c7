"""Which class was taken for which, on the held-out rows: a picture for runs that sort things."""

from __future__ import annotations

from collections.abc import Mapping

from veneer.app.markup import Html, join, tag
from veneer.app.report.parts import lead, table
from veneer.app.report.record import Record
from veneer.app.svg import Heat, heat_legend, heat_map
from veneer.app.text import plural, share

__all__ = ["confusion"]

MIXED_UP = 10  # pairs of classes that are named


def confusion(record: Record) -> Html | None:
    found = record.detail.get("confusion")
    if not isinstance(found, Mapping):
        return None
    names, counts = [str(name) for name in found.get("classes") or ()], found.get("counts") or []
    if not names or len(counts) != len(names):
        return None
    totals = [sum(row) for row in counts]
    cells = [[n / total if total else None for n in row] for row, total in zip(counts, totals, strict=True)]

    def tell(i: int, j: int) -> str:
        return f"{names[i]} taken for {names[j]}: {counts[i][j]:,} of {totals[i]:,}"

    right = sum(counts[i][i] for i in range(len(names)))
    said = f"{right:,} of {plural(sum(totals), 'held-out row')} are on the diagonal."
    picture = heat_map(Heat(names, names, cells, 1.0, tell), label=f"Confusion of {len(names)} classes. {said}")
    about = f"Rows: what it is. Columns, in the same order: what it was taken for. {said}"
    return join([lead(about), picture, heat_legend(1.0, share), _worst(names, counts, totals)])


def _worst(names: list[str], counts: list[list[int]], totals: list[int]) -> Html:
    """The commonest mistakes, in words."""
    pairs = [(counts[i][j], i, j) for i in range(len(names)) for j in range(len(names)) if i != j and counts[i][j]]
    rows = [
        tag("tr", *(tag("td", text) for text in (names[i], names[j], f"{n:,}", share(n / totals[i]))))
        for n, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:MIXED_UP]
    ]
    return table(["It is", "Taken for", "Rows", "Share"], rows) if rows else tag("p", "No class was taken for another.")
