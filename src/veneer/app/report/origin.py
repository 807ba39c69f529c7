"""How the run was made: its settings and where each came from, what happened on the way, and how to do it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from veneer.app.markup import Html, join, tag
from veneer.app.report.parts import Tone, badge, card, folded, lead, table
from veneer.app.report.record import Record, Setting, is_number
from veneer.app.text import bytes_, plural

__all__ = ["environment", "events", "reproduce", "settings"]

TONES: dict[str, Tone] = {"warning": "warn", "oom": "warn", "stopping": "warn", "diverged": "bad", "error": "bad"}
TOLD_ELSEWHERE = ("samples", "proof", "done", "step", "eval", "save", "start")


def settings(record: Record) -> Html | None:
    if not record.settings:
        return None
    said = [each for each in record.settings if not each.is_default]
    rest = [each for each in record.settings if each.is_default]
    text = f"{plural(len(said), 'value')} differ from the defaults; each says where it came from."
    shown = card(None, _rows(said)) if said else None
    return join(
        [lead(text), shown, folded(f"The {len(rest)} others, at their defaults", _rows(rest)) if rest else None]
    )


def _rows(settings: Iterable[Setting]) -> Html:
    return table(["Setting", "Value", "Default", "Origin"], map(_row, settings), kind="settings")


def _row(setting: Setting) -> Html:
    name = tag("th", tag("code", setting.key), tag("div", setting.help, class_="sub"), scope="row")
    value, default = tag("td", _value(setting.value), class_="v"), tag("td", _value(setting.default), class_="v tag")
    return tag("tr", name, value, default, tag("td", setting.origin, class_="tag"))


def _value(value: Any) -> str:
    if value in (None, (), {}, []):
        return "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def events(record: Record) -> Html | None:
    shown = [row for row in record.events if row.get("text") and row.get("event") not in TOLD_ELSEWHERE]
    rows = []
    for row in shown:
        kind = str(row.get("event", ""))
        step = f"{row['step']:,}" if is_number(row.get("step")) else ""
        told = badge(TONES.get(kind, "neutral"), kind)
        rows.append(tag("tr", tag("td", step, class_="n"), tag("td", told), tag("td", row["text"])))
    return card(None, table(["Step", "Kind", "What happened"], rows, numbers=[0], kind="events")) if rows else None


def environment(record: Record) -> Html | None:
    versions = record.info.get("versions")
    held = dict(versions) if isinstance(versions, Mapping) else {}
    held |= {key: record.info[key] for key in ("device", "host", "git") if record.info.get(key)}
    room = record.event("probe").get("total_memory_bytes")
    held |= {"memory": bytes_(room)} if is_number(room) else {}
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", value, class_="v")) for name, value in held.items()]
    return card(None, table([], rows, kind="environment")) if rows else None


def reproduce(record: Record) -> Html | None:
    """The command that was typed, and the one that takes every value as it was resolved."""
    argv = record.info.get("argv")
    parts = []
    if isinstance(argv, list) and argv:
        parts.append(_command("typed", "As it was typed", _typed([str(word) for word in argv])))
    if record.settings:
        again = shlex.join(["veneer", "train", str(record.folder / "config.yaml"), "--out", f"{record.folder}-again"])
        parts.append(_command("again", "With every value as it was resolved", again))
    if not parts:
        return None
    seed = record.setting("seed")
    said = f"Seed {seed}: two runs on one machine give the same adapter." if seed is not None else ""
    return join([lead(said) if said else None, *parts])


def _typed(argv: list[str]) -> str:
    """
    >>> _typed(["/usr/bin/veneer", "train", "my rows.jsonl"]), _typed(["runs/tune.py", "8"])
    ("veneer train 'my rows.jsonl'", 'python runs/tune.py 8')
    """
    program, *words = argv
    is_ours = Path(program).name == "veneer" or Path(program).name == "__main__.py"
    return shlex.join(["veneer", *words] if is_ours else ["python", program, *words])


def _command(id: str, title: str, text: str) -> Html:
    copy = tag("button", "Copy", type="button", data_copy=id, hidden=True)
    return card(title, tag("div", tag("pre", text, id=id), copy, class_="command"))
