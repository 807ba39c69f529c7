"""What was learned from, what the model says now, and what was proved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from veneer.app import svg
from veneer.app.markup import Html, join, tag
from veneer.app.report.parts import badge, brief, card, folded, lead, table
from veneer.app.report.record import Record, Row, is_number, within
from veneer.app.text import bytes_, count, number, plural, share

__all__ = ["data", "proofs", "samples"]

PAIRS = 6  # generations shown open; the rest fold away
PREVIEWS = 3
FIGURES = 3  # of a check, beside its statement


# ---- before and after ------------------------------------------------------------------------------------------------


def samples(record: Record) -> Html | None:
    pairs = [row for row in record.event("samples").get("samples") or () if isinstance(row, Mapping)]
    if not pairs:
        return None
    text = "The same prompts, answered before the training and after."
    text += " They were held out." if record.curve("val_loss") else " They are among the rows that were trained on."
    rest = folded(f"{len(pairs) - PAIRS} more", *map(_pair, pairs[PAIRS:])) if len(pairs) > PAIRS else None
    return join([lead(text), *map(_pair, pairs[:PAIRS]), rest])


def _pair(row: Row) -> Html:
    said = [
        ("Before", row.get("before"), ""),
        ("After", row.get("after"), "after"),
        ("Expected", row.get("expected"), ""),
    ]
    blocks = [_said(name, text, kind) for name, text, kind in said if text is not None]
    return card(None, _said("Prompt", row.get("prompt", ""), "asked"), tag("div", *blocks, class_="pair"))


def _said(name: str, text: object, kind: str) -> Html:
    shown = tag("p", text, class_="said") if text else tag("p", "(nothing)", class_="said note")
    return tag("div", tag("h4", name), shown, class_=kind or None)


# ---- proofs ----------------------------------------------------------------------------------------------------------


def proofs(record: Record) -> Html | None:
    if not record.checks:
        why = {
            "failed": "The run failed before there was anything to prove.",
            "stopped": "A stopped run is not proved.",
        }
        return lead(why.get(record.status, "Nothing was proved in this run.")) if record.info else None
    rows = [_claim(check, _numbers(check), _verdict(check)) for check in record.checks]
    rows += [_claim(each, None, badge("neutral", "Not tested")) for each in record.proof.get("left_out") or ()]
    text = "Each claim was tested on the model itself when training ended; the model was left as it was."
    if prompts := len(within(record.proof, "rows") or ()):
        text += (
            f" Its answers to {plural(prompts, 'prompt')} are kept, to be asked again wherever the adapter is loaded."
        )
    columns = ["Id", "Claim", "Figures", "Verdict"]
    return join([lead(text), card(None, table(columns, rows, numbers=[2], kind="proofs"))])


def _claim(row: Row, figures: Html | None, verdict: Html) -> Html:
    said = tag("div", row.get("statement", row.get("reason", "")), class_="sub")
    id = tag("th", row.get("id", ""), scope="row")
    return tag("tr", id, tag("td", row.get("title", ""), said), tag("td", figures, class_="n"), tag("td", verdict))


def _verdict(check: Row) -> Html:
    return badge("good", "Holds") if check.get("passed") else badge("bad", "Fails")


def _numbers(check: Row) -> Html:
    """The plain numbers of a check, one a line."""
    held = [(key, value) for key, value in (check.get("figures") or {}).items() if is_number(value)][:FIGURES]
    return join(
        tag("div", key.replace("_", " "), " ", tag("b", _figure(key, value)), class_="sub") for key, value in held
    )


def _figure(key: str, value: float) -> str:
    return bytes_(value) if key.endswith("bytes") else share(value) if "share" in key else brief(value)


# ---- data ------------------------------------------------------------------------------------------------------------


def data(record: Record) -> Html | None:
    cards = [each for each in (_lengths(record), _trained(record)) if each]
    if not cards:
        return None
    held = within(record.data, "validation_ids")
    text = f"{plural(len(held), 'row')} were held out and never trained on." if held else "No rows were held out."
    return join([lead(text), tag("div", *cards, class_="grid2")])


def _lengths(record: Record) -> Html | None:
    lengths = within(record.data, "lengths")
    bins = lengths.get("histogram") if isinstance(lengths, Mapping) else None
    if not bins:
        return None
    edges = [bins[0][0] - 1, *(end for _, end, _ in bins)]
    limit = record.setting("max_len")
    shown = limit if is_number(limit) and limit < edges[-1] else None
    named = {"median": lengths.get("p50"), "99 %": lengths.get("p99"), "longest": lengths.get("longest")}
    marks = ", ".join(f"{name} {number(value)}" for name, value in named.items() if is_number(value))
    label = f"Histogram of the samples' lengths in tokens: {marks}."
    plot = svg.bars(edges, [n for _, _, n in bins], label=label, x_name="tokens", limit=shown)
    note = tag("p", f"Dashed: max_len {shown:,}.", class_="note") if shown else None
    return card("Length of samples", plot, note, aside=tag("span", marks, class_="key"))


def _trained(record: Record) -> Html | None:
    """The share of trained tokens, and a few samples as the model reads them, what is trained marked."""
    tokens, trained = within(record.data, "tokens"), within(record.data, "trained_tokens")
    if not is_number(tokens) or not is_number(trained) or not tokens:
        return None
    bar = tag("div", tag("i", style=f"width:{100 * trained / tokens:.1f}%"), class_="share", aria_hidden="true")
    text = f"{count(trained)} of {count(tokens)} tokens count in the loss; the others are read as context."
    counts = within(record.data, "counts")
    left = "; ".join(f"{n:,} {name}" for name, n in counts.items()) if isinstance(counts, Mapping) else ""
    notes = [tag("p", each, class_="note") for each in (text, f"Of the samples: {left}." if left else "") if each]
    aside = tag("span", share(trained / tokens), class_="key")
    return card("What is trained", bar, *notes, _preview(within(record.data, "preview")), aside=aside)


def _preview(shown: Any) -> Html | None:
    if not isinstance(shown, Sequence) or not shown:
        return None
    texts = [tag("p", *_marked(_pieces(each)), class_="said mask") for each in list(shown)[:PREVIEWS]]
    return tag("div", *texts, class_="preview", tabindex="0", role="group", aria_label="Samples, trained text marked")


def _pieces(sample: Any) -> list[tuple[str, bool]]:
    pieces = sample.get("pieces", ()) if isinstance(sample, Mapping) else sample
    return [(str(text), bool(trained)) for text, trained, *_ in pieces]


def _marked(pieces: Iterable[tuple[str, bool]]) -> Iterable[Html]:
    for text, trained in pieces:
        lines = _with_returns(text)
        yield tag("mark", lines) if trained else lines


def _with_returns(text: str) -> Html:
    """Line ends are tokens too, so they are shown."""
    lines = text.split("\n")
    return join([*(part for line in lines[:-1] for part in (line, tag("s", "\u21b5"), "\n")), lines[-1]])
