"""Numbers and small pictures as a person reads them: 269 MB, 2:07, 17.4 M, a curve of ten characters.

Every function is pure and returns text, so each line of the terminal can be tested without one. The signs are Unicode
and fall back to ASCII where the stream cannot carry them (`Signs.of`): a log in a bare container must not die of a
check mark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

__all__ = [
    "ASCII",
    "UNICODE",
    "Signs",
    "bytes_",
    "count",
    "duration",
    "number",
    "plural",
    "printable",
    "share",
    "shorten",
    "spark",
]


@dataclass(frozen=True)
class Signs:
    """The few signs that lines are made of."""

    ok: str
    warn: str
    fail: str
    dot: str
    arrow: str
    down: str
    newline: str
    bars: str
    ellipsis: str
    times: str
    about: str

    @staticmethod
    def of(stream: Any) -> Signs:
        encoding = (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "")
        return UNICODE if encoding.startswith("utf") else ASCII


UNICODE = Signs(
    ok="\u2713",
    warn="!",
    fail="\u2717",
    dot="\u00b7",
    arrow="\u2192",
    down="\u2193",
    newline="\u23ce",
    bars="\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588",
    ellipsis="\u2026",
    times="\u00d7",
    about="\u2248",
)
ASCII = Signs("ok", "!", "x", "-", "->", "v", "\\n", "_.,:-=+*#", "...", "x", "~")


def spark(values: Sequence[float], width: int = 10, signs: Signs = UNICODE) -> str:
    """A curve in `width` characters: each one the mean of its share of the values, scaled to their range.

    >>> spark([4, 3, 2, 1], 4, ASCII)
    '#=:_'
    """
    finite = [v for v in values if v is not None and math.isfinite(v)]
    if not finite:
        return ""
    width = min(width, len(finite))
    edges = [round(i * len(finite) / width) for i in range(width + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    top = len(signs.bars) - 1
    return "".join(signs.bars[round((m - low) / span * top) if span else 0] for m in means)


def count(n: float) -> str:
    """
    >>> count(999), count(17_432_576), count(135e6), count(1.7e9)
    ('999', '17.4 M', '135 M', '1.7 B')
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            scaled = n / size
            return f"{scaled:.0f} {letter}" if abs(scaled) >= 100 else f"{scaled:.1f} {letter}"
    return f"{n:.0f}"


def bytes_(n: float) -> str:
    """Decimal units, as disks and papers count.

    >>> bytes_(512), bytes_(269_060_552), bytes_(9.8e9)
    ('512 B', '269 MB', '9.8 GB')
    """
    if abs(n) < 1000:
        return f"{n:.0f} B"
    return count(n).replace("B", "G") + "B"


def duration(seconds: float) -> str:
    """
    >>> duration(0.42), duration(14), duration(127), duration(7384)
    ('0.4 s', '14 s', '2:07', '2:03:04')
    """
    if not math.isfinite(seconds):
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def share(part: float) -> str:
    """
    >>> share(0.412), share(0.00312), share(1.0)
    ('41.2 %', '0.31 %', '100 %')
    """
    percent = 100 * part
    digits = 0 if percent in (0, 100) else 1 if percent >= 1 else 2
    return f"{percent:.{digits}f} %"


def number(x: float | None, digits: int = 3) -> str:
    """
    >>> number(2.0e-4), number(0.8123), number(1234.5), number(None), number(0)
    ('2.0e-4', '0.812', '1,234', '-', '0')
    """
    if x is None or (isinstance(x, float) and math.isnan(x)):
        return "-"
    if x == 0 or (isinstance(x, int) and abs(x) < 10**6):
        return f"{x:,}" if x else "0"
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    if abs(x) < 1e-3:
        return f"{x:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{x:.{digits}f}" if abs(x) < 100 else f"{x:.1f}"


def plural(n: int, noun: str) -> str:
    """
    >>> plural(1, "row"), plural(2431, "row")
    ('1 row', '2,431 rows')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def printable(text: str) -> str:
    r"""`text` without what a terminal would obey: a model may write escape codes. Line ends and tabs stay.

    >>> printable("a\x1b[31mb\n") == "a\ufffd[31mb\n"
    True
    """
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def shorten(text: str, width: int, signs: Signs = UNICODE) -> str:
    """One line of at most `width` characters.

    >>> shorten("a long line\\nand more", 12, ASCII)
    'a long li...'
    """
    line = text.replace("\n", " ")
    return line if len(line) <= width else line[: width - len(signs.ellipsis)] + signs.ellipsis
