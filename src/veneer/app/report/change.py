"""Where in the model the change sits: |dW| by module and layer, and how it grew."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.app import svg
from veneer.app.markup import Html, join, tag
from veneer.app.report.parts import brief, card, lead
from veneer.app.report.record import Record, Row, is_number

__all__ = ["change"]

SNAPSHOTS = 6  # small pictures of the past
FRAMES = 60  # steps of the slider
WIDTH, WIDEST, NARROWEST = 850, 34, 11  # pixels: of a map, and of a cell

Frame = tuple[int, Row]


def change(record: Record) -> Html | None:
    frames = [
        (int(row["step"]), row["dw"]) for row in record.metrics if isinstance(row.get("dw"), Mapping) and row["dw"]
    ]
    if not frames:
        return None
    step, last = frames[-1]
    top = max((v for _, norms in frames for v in norms.values() if is_number(v)), default=0.0)
    most = max(last, key=lambda site: last[site] if is_number(last[site]) else -1.0)
    said = f"The size of each layer's change, |dW| (Frobenius norm), after step {step:,}. "
    stacks = stacks_of(list(last))
    maps = [_map(stack, frames, top, named=len(stacks) > 1) for stack in stacks]
    return join([lead(said, f"The largest is {_told(last[most])}, in {most}."), *maps])


@dataclass(frozen=True)
class Stack:
    """The adapted layers of one numbered stack of a model, as modules x blocks; None where there is no layer."""

    name: str
    modules: list[str]
    blocks: list[str]
    sites: list[list[str | None]]

    def heat(self, norms: Row, top: float) -> svg.Heat:
        cells = [[None if site is None else _norm(norms.get(site)) for site in row] for row in self.sites]
        return svg.Heat(self.modules, self.blocks, cells, top, lambda i, j: f"{self.sites[i][j]}: {_told(cells[i][j])}")


def stacks_of(sites: Sequence[str]) -> list[Stack]:
    """
    >>> [(s.name, s.modules, s.blocks) for s in stacks_of(["layers.0.q", "layers.1.q", "layers.1.mlp.up", "head"])]
    [('layers', ['q', 'up'], ['0', '1']), ('other layers', ['head'], [''])]
    """
    found: dict[str, dict[str, dict[int, str]]] = {}
    for site in sites:
        stack, block, module = _parsed(site)
        found.setdefault(stack, {}).setdefault(module, {})[block] = site
    return [_stack(name, modules) for name, modules in found.items()]


def _stack(name: str, modules: Mapping[str, Mapping[int, str]]) -> Stack:
    blocks = sorted({block for row in modules.values() for block in row})
    sites = [[row.get(block) for block in blocks] for row in modules.values()]
    return Stack(name, _short(list(modules)), [str(block) if block >= 0 else "" for block in blocks], sites)


def _parsed(site: str) -> tuple[str, int, str]:
    """Stack, block and module of a layer's name, by its first number."""
    parts = site.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return "other layers", -1, site
    return ".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]) or "layer"


def _short(modules: Sequence[str]) -> list[str]:
    """The last part of each name, or all of it where that would be ambiguous."""
    tails = [module.rpartition(".")[2] for module in modules]
    return [tail if tails.count(tail) == 1 else module for tail, module in zip(tails, modules, strict=True)]


def _map(stack: Stack, frames: Sequence[Frame], top: float, named: bool) -> Html:
    heats = [(step, stack.heat(norms, top)) for step, norms in spread(frames, FRAMES)]
    last = heats[-1][1]
    cell = max(NARROWEST, min(WIDEST, WIDTH // len(stack.blocks)))
    picture = svg.heat_map(last, label=f"{stack.name}: size of the change. {_in_words(last)}", cell=(cell, 26))
    legend = [svg.heat_legend(top, _told), tag("span", "across: blocks \u00b7 down: modules", class_="note")]
    thumbs = [_thumbnail(step, heat) for step, heat in spread(heats[:-1], SNAPSHOTS)] if len(heats) > 2 else []
    return card(
        stack.name if named else None, picture, tag("div", *legend, _slider(heats), class_="bottom"),
        tag("div", *thumbs, class_="thumbs") if thumbs else None,
    )  # fmt: skip


def _slider(heats: Sequence[tuple[int, svg.Heat]]) -> Html | None:
    if len(heats) < 2:
        return None
    frames = json.dumps([{"step": step, "levels": heat.levels()} for step, heat in heats])
    end = len(heats) - 1
    knob = tag("input", type="range", min=0, max=end, value=end, step=1, aria_label="Step of the heat map")
    shown = tag("output", f"step {heats[-1][0]:,}")
    return tag("div", tag("label", "Look back ", knob), shown, class_="scrub push", hidden=True, data_frames=frames)


def _thumbnail(step: int, heat: svg.Heat) -> Html:
    picture = svg.heat_thumbnail(heat, label=f"The same after step {step}")
    return tag("figure", picture, tag("figcaption", f"step {step:,}"))


def _in_words(heat: svg.Heat) -> str:
    means = []
    for name, row in zip(heat.rows, heat.cells, strict=True):
        held = [v for v in row if v is not None]
        means.append(f"{name} {_told(sum(held) / len(held))}" if held else name)
    return f"Mean by module: {', '.join(means)}."


def _norm(value: object) -> float:
    return float(value) if is_number(value) else math.nan


def _told(value: object) -> str:
    return brief(value) if is_number(value) and math.isfinite(value) else "not a number"


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spread, the first and the last among them.

    >>> spread("abcdefg", 3)
    ['a', 'd', 'g']
    """
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
