"""Plots as short pieces of markup: curves, bars and heat maps, without a plotting library.

A plot has to be sharp on a phone and on a wide screen, in light and in dark, on paper and without a network. An SVG
that scales as a whole fails the first: its letters shrink with it. So here only the *ink* is SVG, stretched to its
frame (`preserveAspectRatio="none"`, strokes that do not scale), and every letter is HTML placed by percentages. A dot
that stays round in a stretched picture is a line of no length with round ends. Colours are classes; the page's style
sheet decides what they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from veneer.app.markup import Html, join, tag
from veneer.app.text import number

__all__ = ["LEVELS", "Heat", "Point", "Series", "bars", "curves", "heat_legend", "heat_map", "heat_thumbnail", "smooth"]
__all__ += ["thin"]

LEVELS = 12  # steps of the heat scale: as many as the eye can match with a legend
POINTS = 500  # a curve keeps about this many points, however long the run was

Point = tuple[float, float]
Write = Callable[[float], str]


# ---- points and scales -----------------------------------------------------------------------------------------------


def finite(points: Iterable[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thin(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most about `most` points that keep every peak: of each stretch the lowest and the highest stay.

    >>> thin([(float(x), float(x == 7)) for x in range(100)], 10)[:3]
    [(0.0, 0.0), (7.0, 1.0), (20.0, 0.0)]
    """
    if len(points) <= most:
        return list(points)
    width = math.ceil(2 * len(points) / most)
    kept = [points[0], points[-1]]
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        kept += [min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])]
    return sorted(set(kept))


def smooth(points: Sequence[Point], span: float | None = None) -> list[Point]:
    """An exponential mean over about `span` points (a twelfth of the run), not pulled towards zero at its start.

    >>> smooth([(0.0, 4.0), (1.0, 4.0), (2.0, 4.0)])[-1]
    (2.0, 4.0)
    """
    keep = 1 - 1 / max(2.0, span or len(points) / 12)
    mean = weight = 0.0
    out: list[Point] = []
    for x, y in finite(points):
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        out.append((x, mean / weight))
    return out


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round values between `low` and `high`.

    >>> ticks(0, 141), ticks(2.1, 3.7)
    ([0.0, 50.0, 100.0], [2.5, 3.0, 3.5])
    """
    rough = (high - low) / about
    if rough <= 0 or not math.isfinite(rough):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda m: abs(math.log(m * power / rough)))
    first = math.ceil(low / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Scale:
    """From values to 0..1000, the width and height of every picture."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(v, self.low)) for v in (value, low, high))
        return round(1000 * (value - low) / ((high - low) or 1), 1)

    def ticks(self, about: int) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high, about)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        inside = [10.0**p for p in powers if self.low <= 10.0**p <= self.high]
        return inside if len(inside) > 1 else [self.low, self.high]


def scale(values: Sequence[float], zero: bool = False) -> Scale:
    """A scale with a little air at both ends; logarithmic when a few values dwarf the rest."""
    low, high = min(values), max(values)
    middle = sorted(values)[len(values) // 2]
    if low > 0 and high > 30 * middle:
        return Scale(low / 1.2, high * 1.2, log=True)
    air = (high - low or abs(high) or 1.0) * 0.06
    return Scale(0.0 if zero and low >= 0 else low - air, high + air)


# ---- curves and bars -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One line of a plot. Its colour says what it is, the same in every plot of a page. Only lines have a legend."""

    name: str
    points: Sequence[Point]
    colour: Literal["train", "val", "plain"] = "train"
    kind: Literal["line", "faint", "dots"] = "line"


def curves(
    series: Sequence[Series],
    *,
    label: str,
    x_name: str = "step",
    zero: bool = False,
    mark: Point | None = None,
    write: Write = number,
) -> Html:
    """Lines over a common x. `mark` rings one point; `write` says a y value, at the axis and under the pointer."""
    drawn = [Series(s.name, thin(finite(s.points)), s.colour, s.kind) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return tag("p", "Nothing was recorded.", class_="note")
    xs = [x for s in drawn for x, _ in s.points]
    across = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)
    up = scale([y for s in drawn for _, y in s.points], zero)
    ink = [_ink(s, across, up) for s in drawn]
    if mark is not None:
        ink.append(tag("path", class_="ring", d=_dot(across(mark[0]), 1000 - up(mark[1]))))
    told = [
        {"name": s.name, "x": [x for x, _ in s.points], "text": [write(y) for _, y in s.points]}
        for s in drawn
        if s.kind == "line"
    ]
    data = json.dumps({"low": across.low, "high": across.high, "x": x_name, "series": told})
    return _frame(ink, across, up, label, x_name, _tick if write is number else write, data)


def bars(edges: Sequence[float], counts: Sequence[int], *, label: str, x_name: str, limit: float | None = None) -> Html:
    """A histogram: `counts[i]` values lie between `edges[i]` and `edges[i + 1]`. `limit`: a line, as at max_len."""
    across = Scale(min(edges), max([*edges, limit or edges[0]]))
    up = Scale(0, max(counts) * 1.06 or 1)
    ink = []
    for (left, right), n in zip(pairwise(edges), counts, strict=True):
        x, end, y = across(left), across(right), up(n)
        title = tag("title", f"{number(left)} to {number(right)} {x_name}: {number(n)}")
        kind = "bar over" if limit is not None and left >= limit else "bar"
        ink.append(tag("rect", title, class_=kind, x=x + 2, y=1000 - y, width=max(end - x - 4, 2), height=y))
    if limit is not None:
        ink.append(tag("path", class_="limit", d=f"M{across(limit)} 0V1000"))
    return _frame(ink, across, up, label, x_name, _tick)


def _ink(series: Series, across: Scale, up: Scale) -> Html:
    spots = [(across(x), round(1000 - up(y), 1)) for x, y in series.points]
    if series.kind == "dots" or len(spots) == 1:
        return tag("path", class_=f"dots {series.colour}", d="".join(_dot(x, y) for x, y in spots))
    return tag("path", class_=f"{series.kind} {series.colour}", d="M" + "L".join(f"{x:g} {y:g}" for x, y in spots))


def _dot(x: float, y: float) -> str:
    return f"M{x:g} {y:g}h0"


def _tick(value: float) -> str:
    return number(value) if abs(value) >= 1e4 or 0 < abs(value) < 1e-3 else f"{value:g}"


def _frame(
    ink: Iterable[Html], across: Scale, up: Scale, label: str, x_name: str, write: Write, data: str | None = None
) -> Html:
    rows, columns = up.ticks(4), [v for v in across.ticks(5) if v == int(v)]  # no half steps, no half tokens
    grid = [tag("path", class_="grid", d=f"M0 {1000 - up(v):g}H1000") for v in rows]
    letters = [tag("span", write(v), class_="y", style=f"bottom:{up(v) / 10:g}%") for v in rows]
    letters += [tag("span", _tick(v), class_="x", style=f"left:{across(v) / 10:g}%") for v in columns]
    picture = tag("svg", *grid, *ink, viewBox="0 0 1000 1000", preserveAspectRatio="none", role="img", aria_label=label)
    around = tag("div", *letters, tag("span", x_name, class_="unit"), aria_hidden="true")
    return tag("div", picture, around, class_="plot", tabindex="0" if data else None, data_curves=data)


# ---- heat maps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heat:
    """Values in rows and columns; None where there is no layer. `tell` describes a cell in words."""

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[float | None]]
    top: float
    tell: Callable[[int, int], str]

    def levels(self) -> str:
        """One character per cell, row by row."""
        return "".join(level(value, self.top) for row in self.cells for value in row)


def level(value: float | None, top: float) -> str:
    """A level in base 36, `.` where there is nothing, `!` for what is not a number.

    >>> "".join(level(v, 1.0) for v in (0.0, 0.49, 1.0, None, float("nan")))
    '05b.!'
    """
    if value is None:
        return "."
    if not math.isfinite(value):
        return "!"
    return "0123456789ab"[min(LEVELS - 1, max(0, int(LEVELS * value / top)))] if top > 0 else "0"


def heat_map(heat: Heat, *, label: str, cell: tuple[int, int] = (24, 24)) -> Html:
    """Row names stay in sight while the cells scroll; column names stand below, thinned when they would touch."""
    wide, high = cell
    names = tag("ol", *(tag("li", name, style=f"height:{high}px") for name in heat.rows), aria_hidden="true")
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * wide >= 22)
    foot = [
        tag("text", name, x=(j + 0.5) * wide, y=len(heat.rows) * high + 15)
        for j, name in enumerate(heat.columns)
        if j % every == 0
    ]
    width, height = len(heat.columns) * wide, len(heat.rows) * high + 20
    picture = tag("svg", _cells(heat, wide, high, 2), *foot, width=width, height=height, role="img", aria_label=label)
    return tag("div", names, tag("div", picture, class_="scroll", tabindex="0", role="group"), class_="heat")


def heat_thumbnail(heat: Heat, *, label: str) -> Html:
    """A small one without letters, stretched to the room there is."""
    wide, high = len(heat.columns), len(heat.rows)
    return tag(
        "svg", _cells(heat, 1, 1, 0), viewBox=f"0 0 {wide} {high}", preserveAspectRatio="none", role="img",
        aria_label=label, style=f"height:{7 * high}px",
    )  # fmt: skip


def heat_legend(top: float, write: Write = number) -> Html:
    steps = (tag("i", class_=f"q{level((k + 0.5) / LEVELS, 1.0)}") for k in range(LEVELS))
    words = (tag("span", text) for text in ("0", write(top / 2), write(top)))
    return tag("div", tag("b", *steps), *words, class_="scale")


def _cells(heat: Heat, wide: int, high: int, gap: int) -> Html:
    out = []
    for i, row in enumerate(heat.cells):
        for j, value in enumerate(row):
            code = level(value, heat.top)
            title = tag("title", heat.tell(i, j)) if gap and value is not None else None
            kind = {".": "qnone", "!": "qbad"}.get(code, f"q{code}")
            box = {"x": j * wide, "y": i * high, "width": wide - gap, "height": high - gap, "rx": 3 if gap else None}
            out.append(tag("rect", title, class_=kind, **box))
    return join(out)
