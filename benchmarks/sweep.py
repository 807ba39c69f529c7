"""Many short trainings over a few processes: what the sweeps of learning rates and of methods share."""

from __future__ import annotations

import json
import math
import multiprocessing as mp
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["parser", "run"]


def parser(about: str | None, out: Path) -> ArgumentParser:
    found = ArgumentParser(description=about, formatter_class=RawDescriptionHelpFormatter)
    found.add_argument("--model", help="folder of the model (default: the cached one)")
    found.add_argument("--data", help="folder with train.jsonl and val.jsonl (default: the cached one)")
    found.add_argument("--full", action="store_true", help="everything, which is for a GPU")
    found.add_argument("--jobs", type=int, default=1)
    found.add_argument("--seconds", type=float, default=math.inf, help="start nothing new after so long")
    found.add_argument("--out", default=str(out))
    return found


def run(wanted: Sequence[tuple[Any, ...]], fields: Sequence[str], work: Callable[..., None], options: Any) -> list[Any]:
    """Every job over `jobs` processes. Rows are written as they come: a sweep that is stopped keeps what it found.

    `work(jobs, results, model, data, until)` takes jobs until it gets None, and ends with a None of its own.
    """
    context = mp.get_context("spawn")
    jobs, results = context.Queue(), context.Queue()
    for job in wanted:
        jobs.put(job)
    arguments = (jobs, results, options.model, options.data, time.time() + options.seconds)
    workers = [context.Process(target=work, args=arguments) for _ in range(options.jobs)]
    for worker in workers:
        jobs.put(None)
        worker.start()
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    rows: list[Any] = []
    ended = 0
    while ended < len(workers):
        found = results.get()
        if found is None:
            ended += 1
            continue
        rows.append(dict(zip(fields, found, strict=True)))
        Path(options.out).write_text(json.dumps(rows, indent=0) + "\n")
    return rows
