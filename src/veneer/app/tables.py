"""Tables in one style: no boxes, two spaces between columns, numbers to the right, nothing cut off in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["table"]


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> Table:
    """`columns` are headings; one that begins with ">" is set to the right, one with "+" may break into lines."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title, title_justify="left", title_style="bold")
    for heading in columns:
        wraps, right = heading.startswith("+"), heading.startswith(">")
        made.add_column(
            heading.lstrip(">+"),
            justify="right" if right else "left",
            header_style="dim",
            no_wrap=not wraps,
            overflow="fold" if wraps else "ellipsis",
        )
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return made
