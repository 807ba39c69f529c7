"""Pictures for docs/benchmarks.md: curves that are to lie on each other, as one SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

Point = tuple[float, float]
WIDE, HIGH, LEFT, TOP = 520, 260, 56, 84
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.t{font-weight:600}.s{font-size:10px;fill:#666}.g{stroke:#e4e4e4}"
    "path{fill:none;stroke-linejoin:round}.c0{stroke:#e07a1f;stroke-width:5;stroke-opacity:.45}"
    ".c1{stroke:#7a5195;stroke-width:3.5;stroke-opacity:.6}.c2{stroke:#0b6e99;stroke-width:2}"
    ".c3{stroke:#2f7d32;stroke-width:1.5;stroke-dasharray:5 3}.c4{stroke:#222;stroke-width:1;stroke-dasharray:2 3}"
)


def overlaid(series: Mapping[str, Sequence[Point]], title: str, x_name: str) -> str:
    """Lines over one pair of axes, the first the broadest, so that each shows where they agree."""
    points = [point for line in series.values() for point in line]
    (x0, x1), (y0, y1) = _span([x for x, _ in points], 0), _span([y for _, y in points], 0.04)

    def place(x: float, y: float) -> str:
        return f"{LEFT + WIDE * (x - x0) / (x1 - x0):.1f} {TOP + HIGH * (1 - (y - y0) / (y1 - y0)):.1f}"

    width, height = LEFT + WIDE + 20, TOP + HIGH + 44
    ink = [f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>']
    ink += [f'<text class="t" x="16" y="24">{title}</text>', *_legend(list(series))]
    for k in range(5):
        y = y0 + (y1 - y0) * k / 4
        at = place(x0, y).split()[1]
        ink.append(f'<line class="g" x1="{LEFT}" x2="{LEFT + WIDE}" y1="{at}" y2="{at}"/>')
        ink.append(f'<text class="s" text-anchor="end" x="{LEFT - 6}" y="{float(at) + 3:.1f}">{y:.2f}</text>')
        x = x0 + (x1 - x0) * k / 4
        across = place(x, y0).split()[0]
        ink.append(f'<text class="s" text-anchor="middle" x="{across}" y="{TOP + HIGH + 16}">{x:,.0f}</text>')
    ink.append(f'<text class="s" text-anchor="middle" x="{LEFT + WIDE / 2}" y="{TOP + HIGH + 34}">{x_name}</text>')
    for k, line in enumerate(series.values()):
        ink.append(f'<path class="c{k}" d="M{" L".join(place(x, y) for x, y in line)}"/>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *ink, "</svg>"]) + "\n"


def _legend(names: Sequence[str]) -> Iterator[str]:
    starts = [16.0]
    for name in names:
        starts.append(starts[-1] + 46 + 6.4 * len(name))
    for k, (x, _) in enumerate(pairwise(starts)):
        yield f'<path class="c{k}" d="M{x:.0f} 48 h22"/><text x="{x + 28:.0f}" y="52">{names[k]}</text>'


def _span(values: Sequence[float], air: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    more = air * (high - low or 1)
    return low - more, high + more if high > low else low + 1
