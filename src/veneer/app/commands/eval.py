"""veneer eval: a run (or adapter, or model) on its held-out rows or on other data, before and after side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from veneer.app.flags import add_sampling, sampling_of
from veneer.app.output import Output
from veneer.app.subjects import find_run, source_of
from veneer.app.tables import table
from veneer.app.text import number, plural, printable, shorten
from veneer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from veneer.data.types import Example, LossOn
    from veneer.infer.evaluate import Evaluation
    from veneer.train.run import Run

EXAMPLES = """  veneer eval last                                   its held-out rows
  veneer eval runs/support-0917-a1 test.jsonl --answer 100
  veneer eval runs/labels test.jsonl --choices yes,no
  veneer eval runs/sql test.jsonl --regex '^SELECT ' --json"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run, an adapter's folder, a model, or last")
    parser.add_argument("data", nargs="?", metavar="DATA", help="rows to judge it on [those the run held out]")
    parser.add_argument("--answer", type=int, default=32, metavar="N", help="rows that are also answered [32]")
    parser.add_argument("--regex", metavar="PATTERN", help="the share of answers in which this is found")
    parser.add_argument("--choices", metavar="A,B,C", help="the likeliest of these answers, and how often it is right")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="answers to print [3]")
    parser.add_argument("--limit", type=int, metavar="N", help="judge the first N rows only")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at once [8]")
    parser.add_argument("--base", metavar="MODEL", help="the base model, where an adapter does not say")
    parser.add_argument("--root", default="runs", help="the folder that holds the runs [runs]")
    parser.add_argument("--device", metavar="cpu|cuda", help="where to run [a GPU where there is one]")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="[fp32 on a CPU, bf16 on a GPU]")
    add_sampling(parser)
    parser.set_defaults(max_tokens=64)


def run(args: argparse.Namespace, out: Output) -> int:
    from veneer.infer.evaluate import evaluate
    from veneer.infer.load import load

    sampling, found = sampling_of(args), find_run(args.run, args.root)
    source = source_of(args.run, args.root, args.base)
    with out.wait("reading the data"):
        examples, origin = rows_of(found, args.data, source.task)
    with out.wait(f"loading {source.base}"):
        ready = load([source], device=args.device, dtype=args.dtype, say=lambda line: None)
    for evidence in ready.evidence.values():
        out.note(f"{out.signs.ok} {evidence}")
    settings = found.config().settings if found else None
    with out.progress("judging") as say:
        judged = evaluate(
            ready,
            examples[: args.limit],
            answer=args.answer,
            pattern=args.regex,
            choices=args.choices.split(",") if args.choices else (),
            sampling=sampling,
            batch_size=args.batch_size,
            max_len=settings.max_len if settings else None,
            loss_on=cast("LossOn", settings.loss_on) if settings else "assistant",
            say=say,
        )
    value = {
        "subject": source.label,
        "data": origin,
        "samples": judged.samples,
        "metrics": judged.metrics,
        "answered": judged.answered,
        "rows": [asdict(row) for row in judged.rows],
        "evidence": ready.evidence,
    }
    out.result(value, lambda console: _print(console, judged, source.label, origin, args.show, out))
    return 0


def rows_of(run: Run | None, data: str | None, task: str) -> tuple[Sequence[Example], str]:
    """The rows to judge on, and what to call them."""
    from veneer.data.dataset import load
    from veneer.tasks.base import TASKS

    kinds = TASKS[task].kinds
    if data is not None:
        columns = run.config().settings.columns if run else None
        return load(data, kinds=kinds, columns=columns, split=_part_of(data)).examples, data
    if run is None:
        raise ConfigError("no data was named, and this is no run that held some out", "command line", "add DATA")
    return held_out(run)


def _part_of(data: str) -> str:
    """Of a folder or a data set the held-out part is meant; of a folder without parts all of it."""
    from veneer.data.read import parts_in

    folder = Path(data).expanduser()
    return "train" if folder.is_dir() and not parts_in(folder) else "validation"


def held_out(run: Run) -> tuple[Sequence[Example], str]:
    """The very rows that the run held out, told by their hashes: a changed file is noticed."""
    from veneer.train.prepare import read_data
    from veneer.train.settings import Reads

    parts = read_data(Reads(run.config()), None, lambda event, **fields: None, run)
    wanted = run.data.get("split", {}).get("validation_ids", [])
    rows = (
        [example for example in parts.validation if example.id in set(wanted)] if wanted else parts.validation.examples
    )
    if len(rows) < len(wanted):
        lost = f"{len(wanted) - len(rows)} of {len(wanted)} held-out rows are no longer in the data"
        raise DataError(lost, str(parts.train.source), "name the data to judge it on")
    if not rows:
        raise DataError(f"{run.name} held no rows out", str(run.folder), "name the data to judge it on")
    return rows, f"{plural(len(rows), 'held-out row')} of {run.name}"


def _print(console: Console, judged: Evaluation, label: str, origin: str, show: int, out: Output) -> None:
    answered = f", {plural(judged.answered, 'row')} answered" if judged.answered else ""
    console.print(f"{label} on {origin} ({plural(judged.samples, 'sample')}{answered})\n", markup=False, soft_wrap=True)
    has_before = "before" in judged.metrics
    columns = ["metric", *([">before"] if has_before else []), ">after" if has_before else ">value"]
    rows = [[name, *([number(before)] if has_before else []), number(after)] for name, before, after in judged.table()]
    console.print(table(columns, rows))
    if judged.rows and show:
        console.print()
        console.print(table(*_answers(judged, show, has_before, out)))


def _answers(judged: Evaluation, show: int, has_before: bool, out: Output) -> tuple[list[str], list[list[Any]]]:
    columns = ["+prompt", "+wanted", *(["+before"] if has_before else []), "+after" if has_before else "+answer"]
    sides = ["before", "after"] if has_before else ["after"]

    def cell(text: str) -> str:
        return shorten(printable(text), 300, out.signs)

    rows = [
        [cell(row.prompt), cell(row.wanted), *(cell(row.answers[side]) for side in sides)] for row in judged.rows[:show]
    ]
    return columns, rows
