"""The few building blocks that the page repeats: cards, tables, badges, folded parts, figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from veneer.app.markup import Html, tag
from veneer.app.text import number

__all__ = ["Tone", "badge", "brief", "card", "folded", "lead", "spoken", "table"]

Tone = Literal["good", "warn", "bad", "neutral"]


def card(title: str | None, *body: object, aside: object = None, kind: str = "") -> Html:
    head = tag("div", tag("h3", title), aside, class_="head") if title else None
    return tag("div", head, *body, class_=f"card {kind}".strip())


def table(
    columns: Sequence[str], rows: Iterable[Html], *, numbers: Sequence[int] = (), kind: str | None = None
) -> Html:
    """A table that scrolls sideways by itself; `numbers` are the columns set flush right."""
    heads = (tag("th", name, scope="col", class_="n" if i in numbers else None) for i, name in enumerate(columns))
    head = tag("thead", tag("tr", *heads)) if columns else None
    return tag("div", tag("table", head, tag("tbody", *rows), class_=kind), class_="wide", tabindex="0", role="group")


def folded(title: str, *body: object) -> Html:
    return tag("details", tag("summary", title), *body)


def lead(*text: object) -> Html:
    return tag("p", *text, class_="lead")


def badge(tone: Tone, text: str) -> Html:
    return tag("span", text, class_=f"badge {tone}")


def brief(value: float) -> str:
    """Three figures that count.

    >>> brief(11.3), brief(0.6214), brief(754), brief(17432576), brief(0.00021)
    ('11.3', '0.621', '754', '17,432,576', '2.1e-4')
    """
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return number(value) if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def spoken(seconds: float) -> str:
    """
    >>> spoken(41.3), spoken(135), spoken(7505)
    ('41 s', '2 min 15 s', '2 h 05 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
