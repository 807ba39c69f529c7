"""veneer inspect: what an adapter is made of, read from its file alone; with a second one, how the two compare.

Layers are gathered by the last word of their names, since forty lines of q_proj say less than one with a curve over
the depth. `--layers` shows every layer.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.app.output import Output
from veneer.app.subjects import find_run
from veneer.app.tables import table
from veneer.app.text import Signs, bytes_, count, number, plural, share, spark

if TYPE_CHECKING:
    from rich.console import Console

    from veneer.ckpt.inspect import Comparison, Held, Layer

EXAMPLES = """  veneer inspect last
  veneer inspect runs/support-0917-a1 --layers
  veneer inspect adapters/a adapters/b           angle, shared directions and distance, layer by layer
  veneer inspect adapters/a --base models/llama  is this the base it was trained on?"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="A", help="a run, an adapter's folder, a hub id, or last")
    parser.add_argument("other", metavar="B", nargs="?", help="a second one to compare with")
    parser.add_argument("--base", metavar="MODEL", help="the folder of a model: is it the adapter's base?")
    parser.add_argument("--layers", action="store_true", help="every layer instead of one line for each kind")
    parser.add_argument("--root", default="runs", help="the folder that holds the runs [runs]")


def run(args: argparse.Namespace, out: Output) -> int:
    from veneer.ckpt.inspect import compare, describe

    with out.wait("reading"):
        first = _held(args.adapter, args.root)
    if args.other is None:
        with out.wait(f"taking {plural(len(first.factors), 'layer')} apart"):
            layers = [describe(site, factors) for site, factors in first.factors.items()]
        match = base_match(first, args.base)
        value = {"adapter": summary(first, layers, match), "layers": [_plain_layer(layer) for layer in layers]}
        out.result(value, lambda console: _print_one(console, first, layers, match, args.layers, out.signs))
        return 1 if any(not layer.is_finite for layer in layers) or match["matches"] is False else 0
    with out.wait("comparing"):
        second = _held(args.other, args.root)
        rows = compare(first.factors, second.factors)
    value = {"a": str(first.path), "b": str(second.path), **_totals(first, second, rows)}
    value["layers"] = [asdict(row) for row in rows]
    out.result(value, lambda console: _print_two(console, first, second, rows, args.layers, out.signs))
    return 0


def _held(word: str, root: str) -> Held:
    from veneer.ckpt.inspect import read

    found = find_run(word, root)
    return read(found.folder if found else word)


# ------------------------------------------------------------------ one adapter


def base_match(held: Held, base: str | None) -> dict[str, Any]:
    """Whether the model named, or else the one the adapter names, is its base: True, False, or None where unknown."""
    from veneer.ckpt.inspect import base_problems

    where = base or held.base.id
    problems = base_problems(held, where) if where else None
    return {"base": where or None, "matches": None if problems is None else not problems, "problems": problems or []}


def summary(held: Held, layers: Sequence[Layer], match: dict[str, Any]) -> dict[str, Any]:
    ranks = sorted({layer.rank for layer in layers})
    finite = [layer for layer in layers if layer.is_finite]
    return {
        "path": str(held.path),
        "base": match,
        "layers": len(layers),
        "ranks": ranks,
        "alpha": held.spec.alpha,
        "scaling": held.spec.scaling,
        "combine": held.spec.combine,
        "parameters": held.parameters,
        "bytes": held.bytes,
        "norm": math.sqrt(sum(layer.norm**2 for layer in finite)),
        "mean_effective_rank": _mean(layer.effective_rank for layer in finite),
        "untrained": [layer.site for layer in layers if layer.is_dead],
        "not_finite": [layer.site for layer in layers if not layer.is_finite],
        "whole": list(held.whole),
    }


def _plain_layer(layer: Layer) -> dict[str, Any]:
    return {**asdict(layer), "values": [float(f"{value:.6g}") for value in layer.values]}


def _print_one(
    console: Console, held: Held, layers: Sequence[Layer], match: dict[str, Any], every: bool, signs: Signs
) -> None:
    facts = summary(held, layers, match)
    ranks = ", ".join(map(str, facts["ranks"]))
    how = f"{facts['combine']}, " if facts["combine"] != "add" else ""
    lines = [
        f"{held.path}",
        f"  {plural(len(layers), 'layer')}, rank {ranks}, alpha {held.spec.alpha:g} ({how}scaling "
        f"{held.spec.scaling}), {count(held.parameters)} parameters, {bytes_(held.bytes)}",
        f"  |dW| {number(facts['norm'])}, of rank {ranks} about {number(facts['mean_effective_rank'], 1)} used",
        f"  base: {_said_of_base(match, signs)}",
    ]
    if held.whole:
        lines.append(f"  saved whole: {', '.join(held.whole)}")
    if held.spec.combine == "dora":
        lines.append("  DoRA: the figures are those of B A; the learned magnitudes come on top")
    for sign, key, said in (
        (signs.warn, "untrained", "untrained (B is 0)"),
        (signs.fail, "not_finite", "NaN or infinite"),
    ):
        if facts[key]:
            names = ", ".join(facts[key][:6]) + (f" and {len(facts[key]) - 6} more" if len(facts[key]) > 6 else "")
            lines.append(f"{sign} {said}: {names}")
    for line in [*lines, ""]:
        console.print(line, markup=False, soft_wrap=True)
    console.print(_layers_table(layers, signs) if every else _kinds_table(layers, signs))


def _said_of_base(match: dict[str, Any], signs: Signs) -> str:
    if match["base"] is None:
        return "not named in the adapter"
    if match["matches"] is None:
        return f"{match['base']} (not here to compare with; --base names a folder)"
    if match["matches"]:
        return f"{match['base']} {signs.ok} its configuration is the one that was trained on"
    return f"{match['base']} {signs.fail} is another model: {'; '.join(match['problems'][:3])}"


def _kinds_table(layers: Sequence[Layer], signs: Signs) -> Any:
    columns = ["layers", ">n", ">out x in", ">rank", ">mean |dW|", "over depth", ">used rank", ">for 90 %"]
    return table(columns, [_kind_row(name, own, signs) for name, own in gathered(layers)])


def _kind_row(name: str, layers: Sequence[Layer], signs: Signs) -> list[object]:
    shapes = {layer.shape for layer in layers}
    return [
        name,
        len(layers),
        f"{layers[0].shape[0]} x {layers[0].shape[1]}" if len(shapes) == 1 else "several",
        "-".join(map(str, sorted({layer.rank for layer in layers}))),
        number(_mean(layer.norm for layer in layers)),
        spark([layer.norm for layer in layers], 16, signs),
        number(_mean(layer.effective_rank for layer in layers), 1),
        number(_mean(layer.energy_rank_90 for layer in layers), 1),
    ]


def _layers_table(layers: Sequence[Layer], signs: Signs) -> Any:
    columns = [
        "layer",
        ">out x in",
        ">rank",
        ">|dW|",
        ">largest",
        "spectrum",
        ">used rank",
        ">stable rank",
        ">for 90 %",
    ]
    rows = [
        [
            layer.site,
            f"{layer.shape[0]} x {layer.shape[1]}",
            layer.rank,
            number(layer.norm),
            number(layer.spectral_norm),
            spark(layer.values, 16, signs),
            number(layer.effective_rank, 1),
            number(layer.stable_rank, 1),
            layer.energy_rank_90,
        ]
        for layer in layers
    ]
    return table(columns, rows)


def gathered(rows: Iterable[Any]) -> list[tuple[str, list[Any]]]:
    """Rows that have a `site`, by the last word of it (diffusers' `to_out.0`: the last two), in order of appearance."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        first, dot, last = row.site.rpartition(".")
        found.setdefault(f"{first.rpartition('.')[2]}{dot}{last}" if last.isdecimal() else last, []).append(row)
    return list(found.items())


# ------------------------------------------------------------------ two adapters


def _totals(first: Held, second: Held, rows: Sequence[Comparison]) -> dict[str, Any]:
    from veneer.ckpt.inspect import inner

    shared = [row.site for row in rows]
    both = sum(inner(first.factors[site], second.factors[site]) for site in shared)
    sizes = [sum(inner(held.factors[site], held.factors[site]) for site in shared) for held in (first, second)]
    size = math.sqrt(sizes[0] * sizes[1])
    return {
        "cosine": both / size if size else None,
        "difference": math.sqrt(sum(row.difference**2 for row in rows)),
        "norms": [math.sqrt(each) for each in sizes],
        "only_in_a": sorted(set(first.factors) - set(shared)),
        "only_in_b": sorted(set(second.factors) - set(shared)),
    }


def _print_two(
    console: Console, first: Held, second: Held, rows: Sequence[Comparison], every: bool, signs: Signs
) -> None:
    totals = _totals(first, second, rows)
    norms = [number(size) for size in totals["norms"]]
    lines = [
        f"a  {first.path}   |dW| {norms[0]}",
        f"b  {second.path}   |dW| {norms[1]}",
        f"   {plural(len(rows), 'layer')} in both; cosine {number(totals['cosine'])}, |a - b| "
        f"{number(totals['difference'])}. Chance is what unrelated adapters of these ranks would share.",
    ]
    for key, said in (("only_in_a", "only in a, or of another shape"), ("only_in_b", "only in b, or of another shape")):
        if totals[key]:
            lines.append(f"{signs.warn} {said}: {plural(len(totals[key]), 'layer')}, such as {totals[key][0]}")
    for line in [*lines, ""]:
        console.print(line, markup=False, soft_wrap=True)
    columns = [
        "layer" if every else "layers",
        ">n",
        ">cosine",
        ">shared inputs",
        ">shared outputs",
        ">chance",
        ">apart",
    ]
    groups = [(row.site, [row]) for row in rows] if every else gathered(rows)
    console.print(table(columns, [_pair_row(name, own) for name, own in groups]))


def _pair_row(name: str, rows: Sequence[Comparison]) -> list[object]:
    def mean(key: Callable[[Comparison], float]) -> float:
        return _mean(map(key, rows))

    return [
        name,
        len(rows),
        number(mean(lambda row: row.cosine)),
        share(mean(lambda row: row.overlap_in)),
        share(mean(lambda row: row.overlap_out)),
        f"{share(mean(lambda row: row.chance_in))}, {share(mean(lambda row: row.chance_out))}",
        share(mean(lambda row: row.relative_difference)),
    ]


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def folder_of(word: str, root: str) -> Path:
    """The folder of an adapter that a word names."""
    from veneer.ckpt.hub import find

    found = find_run(word, root)
    return find(found.folder if found else word)
