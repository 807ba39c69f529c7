"""Where a command's answer goes: a terminal, a pipe, or a program that reads JSON.

`Output` is the one object that commands write to. Answers go to stdout, and with `--json` they are the only thing
there: one object, or for `train` one object per line while it runs. Notices, waits and errors go to stderr. Whatever a
library prints while a command runs is sent to stderr too, so a stray `print` cannot break a reader's parser; what it
warns of is one line there, without the place in its source, or an event of the display that is on.

rich is imported when the first styled thing is written, never by `--help`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from veneer.app.text import Signs, shorten
from veneer.errors import VeneerError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Output", "Stream", "plain"]

PIPE_WIDTH = 160  # columns of a table that nobody's terminal limits
LONGEST_WARNING = 600  # characters; some libraries print whole configurations


@runtime_checkable
class Stream(Protocol):
    """What is needed of stdout and stderr, so that anything that takes text can stand in for them."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...


def plain(value: Any) -> Any:
    """The same value out of what JSON has: no tuples, paths or dataclasses, and null for what is not a number.

    >>> plain({"loss": float("nan"), "at": (1, 2)})
    {'loss': None, 'at': [1, 2]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    as_number = getattr(value, "item", None)  # what numpy and torch hold
    return plain(as_number()) if as_number and getattr(value, "ndim", 0) == 0 else str(value)


class Output:
    """Knows the streams and who reads them; `command` is the word the user typed."""

    def __init__(
        self,
        command: str = "",
        *,
        json: bool = False,
        quiet: bool = False,
        stdout: Stream | None = None,
        stderr: Stream | None = None,
    ) -> None:
        self.command, self.json, self.quiet = command, json, quiet
        self.stdout, self.stderr = stdout or sys.stdout, stderr or sys.stderr
        self.signs = Signs.of(self.stdout)
        self.words: tuple[str, ...] = ()  # what was typed behind the command
        self.log: Path | None = None  # where the traceback of an error already lies
        self.warned: Callable[[str], object] = self.warn  # what is done with a library's warning

    @property
    def is_terminal(self) -> bool:
        """Whether a person watches stdout. `TERM=dumb` is a terminal that can not draw."""
        return not self.json and self.stdout.isatty() and os.environ.get("TERM") != "dumb"

    @cached_property
    def console(self) -> Console:
        return self._console(self.stdout)

    @cached_property
    def errors(self) -> Console:
        return self._console(self.stderr)

    def _console(self, stream: Stream) -> Console:
        from rich.console import Console

        asked = os.environ.get("COLUMNS", "")
        width = None if stream.isatty() else int(asked) if asked.isdecimal() else PIPE_WIDTH
        return Console(file=cast(IO[str], stream), width=width, highlight=False, soft_wrap=False, emoji=False)

    def result(self, value: Mapping[str, Any], show: Callable[[Console], object]) -> None:
        """The answer: `value` for a program, `show` for a person."""
        if self.json:
            self.line({"ok": True, "command": self.command, **value})
        else:
            show(self.console)

    def line(self, value: Mapping[str, Any]) -> None:
        """One JSON object on one line, at once, so that a reader can follow a long command."""
        print(json.dumps(plain(value), ensure_ascii=False), file=cast(IO[str], self.stdout), flush=True)

    def note(self, text: str) -> None:
        """What is worth knowing but is not the answer."""
        if not self.quiet:
            self.errors.print(text, markup=False, style="dim")

    def warn(self, text: str) -> None:
        self.errors.print(f"{self.signs.warn} {text}", markup=False, style="yellow")

    def error(self, error: BaseException, code: int, log: Path | None = None) -> None:
        """Three lines: what, where, what to do. A program gets the same fields."""
        what, where, fix, problems = described(error, log)
        if self.json:
            fields = {"kind": type(error).__name__, "what": what, "where": where, "fix": fix, "problems": problems}
            self.line({"ok": False, "command": self.command, "exit": code, "error": fields})
        shown = VeneerError(what, where, fix, problems)
        first, *rest = str(shown).split("\n")
        self.errors.print("error: ", style="bold red", end="", markup=False)
        self.errors.print(first, markup=False, style="bold", soft_wrap=True)
        for line in rest:
            self.errors.print(f"  {line}", markup=False, soft_wrap=True)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """While a command runs, `print` anywhere in any library goes to stderr, and a warning is one line."""

        def told(message: Warning | str, *_: object, **__: object) -> None:
            with suppress(Exception):  # a terminal that has gone ends nobody's run
                self.warned(shorten(" ".join(str(message).split()), LONGEST_WARNING, self.signs))

        with redirect_stdout(cast(IO[str], self.stderr)), warnings.catch_warnings():
            warnings.showwarning = told
            yield

    @contextmanager
    def wait(self, what: str) -> Iterator[None]:
        """Say what is waited for: a spinner on a terminal, one line elsewhere, nothing when quiet."""
        if self.quiet:
            yield
        elif self.json or not self.stderr.isatty():
            self.note(f"{what} ...")
            yield
        else:
            with self.errors.status(what, spinner="dots"):
                yield

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[[str], None]]:
        """A wait whose words change as it goes on: the callable says where it stands. Elsewhere than on a terminal
        only a word every ten seconds."""
        if not self.json and not self.quiet and self.stderr.isatty():
            with self.errors.status(what, spinner="dots") as status:
                yield lambda line: status.update(line)
            return
        said = time.monotonic()

        def say(line: str) -> None:
            nonlocal said
            if time.monotonic() - said > 10:
                said = time.monotonic()
                self.note(f"{line} ...")

        yield say


def described(error: BaseException, log: Path | None) -> tuple[str, str | None, str | None, list[str]]:
    """What, where, what to do, and the single problems. For an error of another library, as much as can be said."""
    if isinstance(error, VeneerError):
        return error.what, error.where, error.fix, error.problems
    if isinstance(error, OSError) and error.filename:
        return error.strerror or str(error), str(error.filename), "check the path, its permissions and free space", []
    message = " ".join(str(error).split()) or "no message"
    fix = f"the traceback is in {log}; `veneer doctor` checks the environment" if log else "run `veneer doctor`"
    return f"{type(error).__name__}: {message}", _innermost(error), fix, []


def _innermost(error: BaseException) -> str | None:
    """The last line of ours that the error passed through."""
    ours, trace = None, error.__traceback__
    while trace:
        code = trace.tb_frame.f_code
        if "veneer" in Path(code.co_filename).parts:
            ours = f"{'/'.join(Path(code.co_filename).parts[-3:])}:{trace.tb_lineno}"
        trace = trace.tb_next
    return ours
