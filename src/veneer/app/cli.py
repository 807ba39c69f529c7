"""The command line: one table of commands, one place where errors become three lines and an exit code.

    0    done
    1    the run or the check failed
    2    a setting, a flag or the data is wrong
    3    it would not fit into memory
    130  stopped by the user; a run can be resumed

Each command is a module in `commands/` with `configure(parser)` and `run(args, out) -> exit code`, and calls one
function of the layer below. A module is imported when its command runs, and torch only by what it calls, so help
answers at once. The words of the table are all that `veneer --help` needs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast, runtime_checkable

from veneer.app.output import Output
from veneer.core.registry import near
from veneer.errors import ConfigError, DoesNotFit, UserError, VeneerError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "demo": "train a real model on this machine in minutes, prove it, show before and after",
    "train": "adapt a model to data",
    "check": "everything that can go wrong, before training: rows, template, mask, memory, time",
    "chat": "talk to a run, beside its base or another run",
    "eval": "loss, exact match and answers of a run, before and after",
    "merge": "an adapter into its base, or several adapters into one",
    "export": "a run's adapter as kohya, diffusers or PEFT write it",
    "convert": "an adapter's file from one layout into another: kohya, diffusers, PEFT",
    "inspect": "what an adapter is made of: rank, norms, spectrum; or how two compare",
    "recommend": "rank, alpha, learning rate, targets and batch for a task and a model size",
    "runs": "list, compare or remove runs",
    "doctor": "what is wrong with this environment, and the line that mends it",
}
OTHER_WORDS = {  # what other tools call them
    **dict.fromkeys(["finetune", "finetune_lora", "sft", "fit"], "train"),
    **dict.fromkeys(["preprocess", "validate"], "check"),
    **dict.fromkeys(["generate", "inference"], "chat"),
    **dict.fromkeys(["evaluate", "test"], "eval"),
    **dict.fromkeys(["fuse", "merge-lora", "merge_lora"], "merge"),
    **dict.fromkeys(["info", "compare"], "inspect"),
    **dict.fromkeys(["list", "ls"], "runs"),
    **dict.fromkeys(["env", "version"], "doctor"),
    "config": "train --explain",
}

DONE, FAILED, WRONG, TOO_BIG, STOPPED = 0, 1, 2, 3, 130


@runtime_checkable
class Command(Protocol):
    """A module of `commands/`. `EXAMPLES` are shown under its help."""

    EXAMPLES: str

    def configure(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace, out: Output) -> int: ...


class Parser(argparse.ArgumentParser):
    """argparse, with errors that are raised instead of printed and flags that are never guessed from a beginning."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, "command line", f"`{self.prog} --help` shows how it is used")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            name = "/".join(action.option_strings) or action.metavar or action.dest
            fix = f"`{self.prog} --help` shows how it is used"
            raise ConfigError(f"{value!r} is not one of {', '.join(known)}.{near(value, known)}", str(name), fix)

    @property
    def known_flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(_columns(), 110))


def _columns() -> int:
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size().columns
    return int(os.environ.get("COLUMNS", 100))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code comes back, except for --help, which prints and exits 0 itself."""
    _never_fail_at_a_letter()
    words = _general_flags_last(sys.argv[1:] if argv is None else argv)
    out = Output(next((w for w in words if not w.startswith("-")), ""), json="--json" in words)
    try:
        name = _command_name(words)
        return 0 if name is None else _run(name, words[words.index(name) + 1 :], out)
    except KeyboardInterrupt:
        fix = "`veneer train --resume` goes on with it" if out.log else None
        out.error(VeneerError("stopped", fix=fix), STOPPED)
        return STOPPED
    except BrokenPipeError:  # the reader (head, less) has left; nothing is wrong
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it on its way out
        return DONE
    except Exception as error:
        code = exit_code(error)
        out.error(error, code, None if isinstance(error, VeneerError) else out.log or _keep_traceback(error))
        return code


def _never_fail_at_a_letter() -> None:
    """A model may write any letter, and a bare container's stdout knows 128 of them: print a ? rather than die."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _general_flags_last(words: Sequence[str]) -> list[str]:
    """`veneer --json runs` is `veneer runs --json`."""
    general = list(itertools.takewhile(lambda word: word in ("--json", "--quiet", "-q"), words))
    return [*words[len(general) :], *general]


def exit_code(error: BaseException) -> int:
    if isinstance(error, DoesNotFit):
        return TOO_BIG
    return WRONG if isinstance(error, (UserError, FileNotFoundError)) else FAILED


def _command_name(words: Sequence[str]) -> str | None:
    """The command, or None when a general flag has been answered."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(general_help())
        return None
    if words[0] in ("--version", "-V"):
        print(f"veneer {version()}")
        return None
    name = words[0]
    if name.startswith("-"):
        raise ConfigError(f"{name} stands before the command", "command line", f"write veneer COMMAND {name}")
    if name not in COMMANDS:
        meant = f" Here it is `veneer {OTHER_WORDS[name]}`." if name in OTHER_WORDS else near(name, COMMANDS)
        raise ConfigError(f"no command {name!r}.{meant}", "command line", f"commands: {', '.join(COMMANDS)}")
    return name


def general_help() -> str:
    rows = [f"  veneer {name:<11}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "veneer: adapt a model with thin low-rank layers, and prove that it worked",
            "",
            *rows,
            "",
            "Start with `veneer demo`, or with `veneer train MODEL DATA`.",
            "`veneer COMMAND --help` shows the flags; every command takes --json.",
        ]
    )


def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("veneer")
    except PackageNotFoundError:
        return "0+unknown"


def _run(name: str, words: list[str], out: Output) -> int:
    module = cast(Command, importlib.import_module(f"veneer.app.commands.{name}"))
    args = parse(name, module, words)
    out.quiet, out.words = args.quiet, tuple(words)
    with out.guarded(), _terminate_like_interrupt():
        return module.run(args, out)


def parse(name: str, module: Command, words: Sequence[str]) -> argparse.Namespace:
    """The command's arguments. What settings' flags were said is in `args.said` when the command takes them."""
    parser = Parser(
        prog=f"veneer {name}", description=COMMANDS[name], epilog=f"examples:\n{module.EXAMPLES}", add_help=True
    )
    module.configure(parser)
    parser.add_argument("--json", action="store_true", help="the answer as JSON on stdout, and nothing else there")
    parser.add_argument("--quiet", "-q", action="store_true", help="no notices")
    said: dict[str, Any] = {}
    if parser.get_default("takes_settings"):
        from veneer.app.flags import add_help, split

        add_help(parser)
        said, words = split(words)
    words = [_dashed(word) for word in words]
    _refuse_unknown(words, parser)
    args = parser.parse_args(words)
    args.said = said
    return args


def _dashed(word: str) -> str:
    """`--top_p=0.9` is `--top-p=0.9`."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word


def _refuse_unknown(words: Sequence[str], parser: Parser) -> None:
    """Flags that nobody knows, before argparse takes the word behind one for something else."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
    unknown = [flag for flag in flags if flag not in parser.known_flags]
    if unknown:
        known = [*parser.known_flags, *_aliases(parser)]
        what = "; ".join(f"unknown flag {flag}.{near(flag, known)}" for flag in unknown)
        raise ConfigError(what.removesuffix("."), "command line", f"`{parser.prog} --help` lists the flags")


def _aliases(parser: Parser) -> list[str]:
    if not parser.get_default("takes_settings"):
        return []
    from veneer.train.aliases import ALIASES

    return ["--" + alias.replace("_", "-") for alias in ALIASES]


@contextlib.contextmanager
def _terminate_like_interrupt() -> Any:
    """SIGTERM asks as Ctrl-C does, so a run that a scheduler stops is as resumable as one that a person stops."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: whoever called us minds the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _keep_traceback(error: BaseException) -> Path | None:
    """Append the traceback to a log of ours, so that the terminal keeps three lines and nothing is lost."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    for folder in (state / "veneer", Path(tempfile.gettempdir()) / "veneer"):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "error.log", "a", encoding="utf-8") as log:
                log.write("".join(traceback.format_exception(error)) + "\n")
            return folder / "error.log"
    return None


if __name__ == "__main__":
    raise SystemExit(main())
