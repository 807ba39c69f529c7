"""The curves: what was learned, how fast, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from veneer.app.markup import Html, join, tag
from veneer.app.report.parts import brief, card, folded, lead, table
from veneer.app.report.record import Record, Row, is_number
from veneer.app.svg import Point, Series, curves, smooth
from veneer.app.text import bytes_, count, number

__all__ = ["learning", "speed"]

MANY = 24  # points from which on a curve is smoothed
TABLE_ROWS = 40


def learning(record: Record) -> Html | None:
    train, val = record.curve("loss"), record.curve("val_loss")
    if not train and not val:
        return None
    smoothed = len(train) > MANY
    about = "Loss per trained token, in nats." if record.setting("task") in (None, "causal_lm", "seq2seq") else "Loss."
    about += " The pale line is every step, the strong one its running mean." if smoothed else ""
    about += " The ring marks the weights that were kept." if val else ""
    return join([lead(about), _loss(train, val), tag("div", *_small(record), class_="grid2"), _numbers(record)])


def _loss(train: Sequence[Point], val: Sequence[Point]) -> Html:
    smoothed = len(train) > MANY
    series = [Series("every step", train, "train", "faint")] if smoothed else []
    series += [Series("training", smooth(train) if smoothed else train)] if train else []
    series += [Series("held out", val, "val"), Series("measured", val, "val", "dots")] if val else []
    best = min(val, key=lambda p: p[1]) if val else None
    missing = None if val else tag("p", "No rows were held out, so over-fitting would not show here.", class_="note")
    said = "Loss by step. " + in_words("Training loss", train) + in_words("Held-out loss", val)
    return plot("Loss", series, said, missing, kind="tall", mark=best)


def _small(record: Record) -> list[Html]:
    rate, norm = record.curve("lr"), record.curve("gnorm")
    found = [
        plot("Learning rate", [Series("rate", rate, "plain")], in_words("Learning rate", rate), zero=True, write=_rate)
    ]
    title = "Gradient norm, before clipping"
    found += [plot(title, [Series("norm", norm, "plain")], in_words("Gradient norm", norm), write=brief)]
    found = [each for each, points in zip(found, (rate, norm), strict=True) if points]
    for key, name in record.task_metrics.items():
        points = record.curve(key)
        series = [Series("held out", points, "val"), Series("measured", points, "val", "dots")]
        found.append(plot(name, series, in_words(name, points)))
    return found


def speed(record: Record) -> Html | None:
    tokens, part, memory = (record.curve(k) for k in ("tokens_per_second", "trained_tokens_per_second", "memory_bytes"))
    found = []
    if tokens:
        series = [Series("all", smooth(tokens, 8), "plain"), *([Series("trained", smooth(part, 8))] if part else [])]
        found.append(plot("Tokens a second", series, in_words("Tokens a second", tokens), zero=True, write=count))
    if memory:
        said = f"Memory, at most {bytes_(max(v for _, v in memory))}."
        found.append(plot("Memory", [Series("peak so far", memory, "plain")], said, zero=True, write=bytes_))
    return tag("div", *found, class_="grid2") if found else None


def plot(title: str, series: Sequence[Series], said: str, *below: object, kind: str = "", **options: Any) -> Html:
    """A plot under its heading. The legend shows the last value, or the one under the pointer."""
    write = options.get("write", number)
    keys = [_key(s, write(s.points[-1][1])) for s in series if s.kind == "line" and s.points]
    where = tag("span", class_="where", aria_live="polite")
    return card(title, curves(series, label=said, **options), *below, aside=join([where, *keys]), kind=kind)


def _key(series: Series, last: str) -> Html:
    shown = [tag("i"), series.name, " ", tag("output", last)]
    return tag("span", *shown, class_=f"key {series.colour}", data_name=series.name, data_last=last)


def _rate(value: float) -> str:
    """
    >>> _rate(1e-3), _rate(0)
    ('1.0e-3', '0')
    """
    return f"{value:.1e}".replace("e-0", "e-").replace("e+00", "") if value else "0"


def in_words(name: str, points: Sequence[Point]) -> str:
    """A curve for those who do not see it."""
    if not points:
        return ""
    (first, start), (last, end), (at, low) = points[0], points[-1], min(points, key=lambda p: p[1])
    return (
        f"{name} goes from {number(start)} at step {first:g} to {number(end)} at step {last:g}; "
        f"its lowest is {number(low)} at step {at:g}. "
    )


def _numbers(record: Record) -> Html:
    """The curves as numbers, thinned; every evaluation stays."""
    rows = [row for row in record.metrics if "loss" in row or "val_loss" in row]
    names = {"step": "Step", "loss": "Loss", "val_loss": "Held-out loss", **record.task_metrics, "lr": "Learning rate"}
    names |= {"gnorm": "Gradient norm", "tokens_per_second": "Tokens/s"}
    columns = {key: name for key, name in names.items() if any(key in row for row in rows)}
    every = max(1, math.ceil(len(rows) / TABLE_ROWS))
    shown = [row for i, row in enumerate(rows) if i % every == 0 or "val_loss" in row or i == len(rows) - 1]
    body = [tag("tr", *(tag("td", _cell(row, key), class_="n") for key in columns)) for row in shown]
    title = "The curves as numbers" + (f", one step in {every}" if every > 1 else "")
    return folded(title, table(list(columns.values()), body, numbers=range(len(columns))))


def _cell(row: Row, key: str) -> str:
    if key not in row:
        return ""
    if not is_number(row[key]):
        return "not a number"
    return _rate(row[key]) if key == "lr" else number(row[key])
