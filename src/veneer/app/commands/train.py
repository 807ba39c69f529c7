"""veneer train: settings from flags, a file or both; then one call of the training loop, watched by a display."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from veneer.app.flags import add_settings, from_said
from veneer.app.output import Output
from veneer.app.progress import display, print_samples
from veneer.app.text import number
from veneer.errors import ConfigError
from veneer.train.run import Run
from veneer.train.settings import Resolved, explain

EXAMPLES = """  veneer train Qwen/Qwen3-1.7B support.jsonl
  veneer train config.yaml --lr 1e-4
  veneer train config.yaml --set lr=1e-4 --set r=32
  veneer train --resume                      go on with the last run
  veneer train MODEL DATA --dry-run          everything but the training
  veneer train --explain targets             all about one key"""

STOPPED = 130


def configure(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument("--dry-run", action="store_true", help="check data, mask, memory and plan, then stop")
    parser.add_argument("--explain", metavar="KEY", help="what a setting means, its default and its other names")


def run(args: argparse.Namespace, out: Output) -> int:
    if args.explain:
        text = explain(args.explain)
        out.result({"key": text.partition(":")[0], "text": text}, lambda console: console.print(text, markup=False))
        return 0
    resolved = from_said(args.positional, args.said, args.set, args.config)
    if args.dry_run:
        from veneer.app.commands.check import check

        return check(resolved, out)
    _need_subject(resolved)
    return finish(train(resolved, out), out)


def _need_subject(resolved: Resolved) -> None:
    """Said before torch is loaded, which takes seconds."""
    settings = resolved.settings
    missing = [name for name in ("model", "data") if getattr(settings, name) is None]
    if missing and settings.resume is None:
        fix = "veneer train MODEL DATA, veneer train config.yaml, or veneer train --resume"
        raise ConfigError(f"no {' and no '.join(missing)} was named", "command line", fix)


class Watcher:
    """Stands between loop and display: shows the mask once the run knows it, and keeps the answers for the end.

    A run of hours must not die because a terminal went away: a display that fails is left alone from then on, which
    is said once on stderr.
    """

    def __init__(self, show: Callable[[dict[str, Any]], Any], out: Output) -> None:
        self.show, self.out, self.run = show, out, ""
        self.samples: list[dict[str, Any]] = []
        self.broken = False

    def __call__(self, event: dict[str, Any]) -> Any:
        if self.broken:
            return None
        try:
            return self._shown(event)
        except Exception as error:
            self.broken = True
            with contextlib.suppress(OSError):
                self.out.warn(f"the display failed ({type(error).__name__}: {error}); the run goes on without it")
            return None

    def _shown(self, event: dict[str, Any]) -> Any:
        kind = event["event"]
        if kind == "start":
            self.run = event["run"]
        elif kind == "samples":
            self.samples = event["samples"]
        elif kind == "probe" and (preview := Run(self.run).data.get("preview")):
            self.show({"event": "mask", "sample": preview[0]})
        return self.show(event)


def train(resolved: Resolved, out: Output) -> Run:
    """Run the loop under the display that fits; afterwards what it learned is shown."""
    with display(out) as show:
        watcher = Watcher(show, out)
        if not out.json:
            show({"event": "doing", "text": "starting"})  # loading torch takes seconds
        from veneer.extras import quiet
        from veneer.train.loop import train as loop

        with quiet(), _reported(watcher, out):
            done = loop(report=watcher, resolved=resolved)
    if not out.json and not out.quiet:
        print_samples(out.console, watcher.samples, out.signs)
    return done


@contextlib.contextmanager
def _reported(watcher: Watcher, out: Output) -> Iterator[None]:
    """Whatever becomes of a run, its report is written: a failed one is where a report is needed."""
    try:
        yield
    except BaseException:
        if watcher.run:
            out.log = Run(watcher.run).path("run.log")  # holds the traceback
            with contextlib.suppress(Exception):  # what went wrong first is what has to be told
                _report(watcher.run)
        raise
    _report(watcher.run)


def _report(folder: str) -> None:
    from veneer.app.report import write_report

    write_report(folder)


def finish(done: Run, out: Output) -> int:
    """The last line: what came out and what to do next. 130 when the run was stopped and can be resumed."""
    status, result = done.status, done.result
    if out.json:
        out.line({"ok": status == "done", "command": out.command, "run": str(done.folder), "status": status,
                  "result": result})  # fmt: skip
    elif status == "stopped":
        out.console.print(f"stopped {done.folder}   next:  veneer train --resume {done.folder}", soft_wrap=True)
    else:
        out.console.print(saved_line(done, out), markup=False, soft_wrap=True)
    return STOPPED if status == "stopped" else 0


def saved_line(done: Run, out: Output) -> str:
    before, after = done.result.get("val_before"), done.result.get("val_after")
    fell = f"   val {number(before)} {out.signs.arrow} {number(after)}" if after is not None else ""
    report = f" {out.signs.dot} open {done.path('report.html')}"
    return f"saved {done.folder}{fell}   next:  veneer {next_step(done)}{report}"


def next_step(done: Run) -> str:
    """What people do with a run of this task."""
    settings, folder = done.config().settings, done.folder
    if settings.task == "diffusion":  # no picture is held out, so there is nothing to evaluate
        return f"export {folder} --to kohya --out {folder.name}.safetensors"
    if settings.task in ("causal_lm", "seq2seq"):
        return f"chat {folder}{' --vs base' if settings.method == 'lora' else ''}"
    return f"eval {folder}"
