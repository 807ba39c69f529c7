"""What the model painted on the way: the same prompts with the same seeds, from before the first step to the last.

The page loads nothing, so the strips that the run wrote are put into it. They are made small: a page of 30 times four
pictures of a megapixel would be one that nobody opens.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

from veneer.app.markup import Html, join, raw, tag
from veneer.app.report.parts import card, lead
from veneer.app.report.record import Record, Row, is_number
from veneer.errors import UserError
from veneer.extras import need

__all__ = ["pictures"]

SIDE, LEAST = 176, 96  # pixels that a picture has at most, and that it is drawn with at least
SHOWN = 12  # strips; more are thinned out, the first and the last stay


def pictures(record: Record) -> Html | None:
    strips = {
        row["step"]: row for row in record.events if row.get("event") == "pictures" and is_number(row.get("step"))
    }
    if not strips:
        return None
    chosen = _thinned(sorted(strips))
    rows = [row for step in chosen if (row := _strip(record.folder, strips[step]))]
    if not rows:
        return lead("The strips of pictures are in samples/; they could not be shown here.")
    prompts = [str(prompt) for prompt in strips[chosen[-1]].get("prompts") or ()]
    names = tag("ol", *(tag("li", prompt) for prompt in prompts), class_="note")
    text = "The same prompts with the same seeds at every time, from left to right:"
    return join([lead(text), names, card(None, *rows)])


def _thinned(steps: list[int]) -> list[int]:
    """At most SHOWN of them, evenly.

    >>> _thinned(list(range(100)))[:3], _thinned([0, 5])
    ([0, 9, 18], [0, 5])
    """
    if len(steps) <= SHOWN:
        return steps
    return [steps[round(i * (len(steps) - 1) / (SHOWN - 1))] for i in range(SHOWN)]


def _strip(folder: Path, row: Row) -> Html | None:
    count = max(len(row.get("prompts") or ()), 1)
    found = _embedded(folder / str(row.get("file", "")), count)
    if found is None:
        return None
    source, width, height = found
    image = tag("img", src=source, alt=f"what the prompts gave at step {row['step']}", width=width, height=height)
    return tag("figure", tag("figcaption", f"step {row['step']:,}", class_="note"), tag("div", image, class_="wide"))


def _embedded(file: Path, count: int) -> tuple[str, int, int] | None:
    """A strip as a data URI, with the size that it is shown at."""
    try:
        pil = need("PIL.Image", extra="diffusion", use="show pictures")
        with pil.open(file) as picture:
            picture.load()
    except (OSError, ValueError, UserError):
        return None
    width, height = picture.size
    scale = min(1.0, SIDE * count / width)
    small = picture if scale == 1 else picture.resize((round(width * scale), round(height * scale)), pil.LANCZOS)
    stream, kind = io.BytesIO(), "png" if max(small.size) <= 400 else "jpeg"
    small.convert("RGB").save(stream, format=kind, quality=85)
    shown = max(1, round(LEAST * count / small.width)) if small.width < LEAST * count else 1
    data = base64.b64encode(stream.getvalue()).decode()
    return raw(f"data:image/{kind};base64,{data}"), small.width * shown, small.height * shown
