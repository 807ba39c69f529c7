"""What one wants to know first: how it ended, in a sentence, and the handful of figures that say how well.

Trouble comes before success: a run that failed, or that could not be proved, says so even if its loss is beautiful.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from veneer.app.markup import Html, join, tag
from veneer.app.report.parts import Tone, brief, spoken
from veneer.app.report.record import Record, Row, is_number, within
from veneer.app.svg import smooth
from veneer.app.text import bytes_, count, number, plural, share

__all__ = ["Outcome", "figures", "outcome", "subject", "trouble"]

ENDED: dict[str, tuple[Tone, str]] = {
    "failed": ("bad", "The run failed {at}."),
    "dead": ("bad", "The run's process vanished {at}."),
    "stopped": ("warn", "The run was stopped {at}, and can go on."),
}
PROBLEMS = 20  # single findings shown of an error


@dataclass(frozen=True)
class Outcome:
    """The sentence at the top of the page."""

    tone: Tone
    badge: str
    sentence: str


def outcome(record: Record) -> Outcome:
    planned = record.steps_planned
    at = f"at step {record.steps:,}{f' of {planned:,}' if planned else ''}"
    failed = [str(check.get("id")) for check in record.checks if not check.get("passed")]
    if record.status in ENDED:
        tone, sentence = ENDED[record.status]
        return Outcome(tone, record.status.capitalize(), sentence.format(at=at))
    if failed:
        which = f"proof {failed[0]}" if len(failed) == 1 else f"proofs {', '.join(failed)}"
        return Outcome("bad", "Not proved", f"Training ended, but its result does not hold: {which} failed.")
    if record.status != "done":
        return Outcome("neutral", record.status.capitalize(), f"The run has not ended; it is {at}.")
    return _success(record)


def _success(record: Record) -> Outcome:
    val, train = record.curve("val_loss"), smooth(record.curve("loss"))
    checks = record.checks
    proved = f" All {len(checks)} proofs hold." if checks else " Nothing was proved."
    tone: Tone = "good" if checks else "warn"
    if len(val) > 1:
        (first, start), (step, best) = val[0], min(val, key=lambda p: p[1])
        if step == first:
            return Outcome("warn", "No gain", f"Held-out loss never fell below its start, {number(start)}.{proved}")
        where = f"in {int(step):,} steps" if step == record.steps else f"by step {int(step):,} of {record.steps:,}"
        return Outcome(tone, "Done", f"Held-out loss fell from {number(start)} to {number(best)} {where}.{proved}")
    if len(train) > 1:
        start, end = train[0][1], train[-1][1]
        said = f"Training loss {'fell' if end < start else 'rose'} from {number(start)} to {number(end)}"
        said += "; nothing was held out to check it on." if not val else f", held-out loss is {number(val[0][1])}."
        return Outcome(tone if end < start else "warn", "Done", said + proved)
    return Outcome("warn", "Done", f"The run ended and recorded no loss.{proved}")


def subject(record: Record) -> Html:
    """What was done: method, model, data, machine, time. Each part stays on one line."""
    model, data, rows = record.setting("model"), record.setting("data"), within(record.data, "rows")
    names = [Path(str(each)).name for each in (data if isinstance(data, list | tuple) else [data]) if each]
    parts = [f"{record.setting('method') or 'adapter'} on {Path(str(model)).name}"] if model else []
    parts += [", ".join([*names, *([plural(rows, "row")] if isinstance(rows, int) else [])])] if names else []
    parts += [str(record.info["device"])] if record.info.get("device") else []
    parts += [spoken(record.seconds)] if record.seconds else []
    return join((tag("span", part) for part in parts), " \u00b7 ")


def trouble(record: Record) -> Html:
    """What went wrong, in three lines: what, where, what to do. A failed proof is trouble."""
    error = record.info.get("error")
    proofs = [check for check in record.checks if not check.get("passed")]
    errors = [error if isinstance(error, Mapping) else _parsed(str(error))] if error and not proofs else []
    errors += [
        {"what": check.get("statement"), "where": f"proof {check.get('id')}, {check.get('title')}"} for check in proofs
    ]
    return join(map(_told, errors))


def _parsed(text: str) -> Row:
    """The fields of a VeneerError out of its text, as `str()` of one writes them.

    >>> _parsed("1 row is bad\\n  - a.jsonl:3: no text\\nat: a.jsonl\\ndo: mend it")["where"]
    'a.jsonl'
    """
    found: dict[str, object] = {"what": text.splitlines()[0] if text else ""}
    problems = []
    for line in text.splitlines()[1:]:
        key = {"at: ": "where", "do: ": "fix"}.get(line[:4])
        if key:
            found[key] = line[4:]
        else:
            problems.append(line.strip().removeprefix("- "))
    return {**found, "problems": problems}


def _told(error: Row) -> Html:
    lines = [(word, error.get(key)) for word, key in (("What", "what"), ("Where", "where"), ("Do", "fix"))]
    lines[1:1] = [("", problem) for problem in list(error.get("problems") or ())[:PROBLEMS]]
    return tag(
        "div", *(tag("p", tag("b", word), " ", text) for word, text in lines if text), class_="trouble", role="alert"
    )


def figures(record: Record) -> Html:
    cells = list(_cells(record))
    rows = (tag("div", tag("dt", name), tag("dd", value, tag("small", below))) for name, value, below in cells)
    return tag("dl", *rows, class_="figures") if cells else Html()


def _cells(record: Record) -> Iterator[tuple[str, object, str]]:
    """(name, figure, the small line below)."""
    if val := record.curve("val_loss"):
        step, best = min(val, key=lambda p: p[1])
        yield "Held-out loss", _from_to(val[0][1], best), f"best at step {int(step):,}"
    for key, name in record.task_metrics.items():
        points = record.curve(key)
        yield name, _from_to(points[0][1], points[-1][1]), "held out"
    trained, frozen = (record.event("model").get(key) for key in ("trainable", "frozen"))
    if is_number(trained) and is_number(frozen):
        yield "Trained", count(trained), f"{share(trained / (trained + frozen))} of all parameters"
    if record.steps:
        per_epoch = record.event("plan").get("per_epoch")
        passes = f"{brief(record.steps / per_epoch)} passes over the data" if is_number(per_epoch) and per_epoch else ""
        yield "Steps", f"{record.steps:,}", passes
    if speed := [v for _, v in record.curve("tokens_per_second")]:
        part = [v for _, v in record.curve("trained_tokens_per_second")]
        small = f"{count(sum(part) / len(part))} of them trained" if part else ""
        yield "Tokens a second", count(sum(speed) / len(speed)), small
    if memory := record.curve("memory_bytes"):
        room = record.event("probe").get("total_memory_bytes")
        yield "Peak memory", bytes_(max(v for _, v in memory)), f"of {bytes_(room)}" if is_number(room) else ""
    if checks := record.checks:
        held, rest = sum(bool(check.get("passed")) for check in checks), len(record.proof.get("left_out") or ())
        yield "Proofs", f"{held} of {len(checks)} hold", f"{rest} could not be tested" if rest else ""


def _from_to(start: float, end: float) -> Html:
    return (
        join([number(start), tag("span", "\u2192", class_="to"), number(end)]) if start != end else join([number(end)])
    )
