"""report.html: what one run did, on one page that needs nothing but itself.

The page is made from the run directory alone, so it can be written again at any time, for a run that failed at its
first step as well as for one that went to the end. It opens with the outcome in a sentence; everything after it is the
evidence. A part with nothing to show is left out; what is missing for a reason says so.

Whatever stands in a run was written by somebody else. All of it goes through `markup.tag`, which escapes text, and
the page's own policy lets no script run but ours (known by its hash) and nothing load from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from veneer.app.markup import Html, join, raw, tag
from veneer.app.report.change import change
from veneer.app.report.confusion import confusion
from veneer.app.report.evidence import data, proofs, samples
from veneer.app.report.learning import learning, speed
from veneer.app.report.origin import environment, events, reproduce, settings
from veneer.app.report.outcome import figures, outcome, subject, trouble
from veneer.app.report.parts import badge
from veneer.app.report.pictures import pictures
from veneer.app.report.record import Record, is_number, read
from veneer.ckpt.atomic import atomic_write

__all__ = ["SECTIONS", "page", "write_report"]

SECTIONS: list[tuple[str, str, Callable[[Record], Html | None]]] = [
    ("learning", "Learning", learning),
    ("samples", "Before and after", samples),
    ("pictures", "Pictures on the way", pictures),
    ("confusion", "What is taken for what", confusion),
    ("proofs", "Proofs", proofs),
    ("change", "What changed in the model", change),
    ("data", "Data", data),
    ("speed", "Speed and memory", speed),
    ("events", "On the way", events),
    ("settings", "Settings", settings),
    ("environment", "Environment", environment),
    ("reproduce", "Do it again", reproduce),
]
GRAIN = "M1 6q5-5 10 0t10 0M1 11q5-5 10 0t10 0M1 16q5-5 10 0t10 0"


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into the folder of a run, and return its path."""
    target = Path(run_folder) / "report.html"
    atomic_write(target, page(read(run_folder)))
    return target


def page(record: Record) -> str:
    """The whole page, in ASCII."""
    here = files("veneer.app.report")
    style, script = _both_themes(here.joinpath("page.css").read_text()), here.joinpath("page.js").read_text()
    parts = [(id, title, body) for id, title, make in SECTIONS if (body := make(record))]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{record.name}: {outcome(record).badge.lower()} (Veneer report)"),
        tag("style", raw(style)),
    ]
    body = [
        tag("a", "To the content", href="#main", class_="skip"),
        tag(
            "div",
            _top(record),
            _contents(parts),
            tag("main", *_sections(parts), id="main"),
            _foot(record),
            class_="page",
        ),
        tag("script", raw(script)),
    ]
    return f"<!doctype html>\n{tag('html', tag('head', *head), tag('body', *body), lang='en')}\n"


def _policy(script: str) -> str:
    ours = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{ours}'",
        "base-uri 'none'",
    ]
    return "; ".join([*rules, "form-action 'none'"])


def _both_themes(style: str) -> str:
    """The dark colours stand once in the style sheet and hold for the system's wish as well as for the switch."""
    before, _, rest = style.partition("/* @dark")
    colours, _, after = rest.partition("*/")
    wish = f"@media screen and (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ {colours} }} }}"
    return f"{before}{wish}\n@media screen {{ :root[data-theme=dark] {{ {colours} }} }}{after}"


def _top(record: Record) -> Html:
    found, began = outcome(record), record.info.get("started")
    day = datetime.fromtimestamp(began, UTC) if is_number(began) else None
    line = [
        tag("svg", tag("path", d=GRAIN), viewBox="0 0 22 22", class_="grain", aria_hidden="true"),
        tag("strong", record.name),
        badge(found.tone, found.badge),
        tag("span", f"{day.day} {day:%B %Y, %H:%M} UTC" if day else "", class_="push"),
        tag("button", "Light or dark", id="theme", type="button", hidden=True),
    ]
    sentence = tag("h1", found.sentence)
    about = tag("p", subject(record), class_="subject")
    return tag("header", tag("div", *line, class_="top"), sentence, about, trouble(record), figures(record))


def _contents(parts: list[tuple[str, str, Html]]) -> Html:
    return tag("nav", *(tag("a", title, href=f"#{id}") for id, title, _ in parts), aria_label="Parts of this page")


def _sections(parts: list[tuple[str, str, Html]]) -> list[Html]:
    return [
        tag("section", tag("h2", title, id=f"{id}-title"), body, id=id, aria_labelledby=f"{id}-title")
        for id, title, body in parts
    ]


def _foot(record: Record) -> Html:
    version = (record.info.get("versions") or {}).get("veneer", "")
    text = f"Written by veneer {version} from the files in {record.folder.name}/. This page loads nothing."
    return tag("footer", join([text]))
