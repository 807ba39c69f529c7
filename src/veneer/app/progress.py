"""What a person sees of a run while it goes, made from the events that the loop reports (the table in train/loop.py).

    display(out) -> one of     Terminal    check marks, a bar that moves, keys that act
                               Plain       one line every few seconds, no control codes
                               Lines       every event as JSON, for a program

All three are callables that take an event and may answer "save", "eval" or "stop", which the loop then does. The words
come from `lines_of`, one pure function, so a log and a terminal say the same thing. What takes longer than a second is
named while it lasts: after each event it is known what comes next.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from veneer.app.keys import Keys
from veneer.app.mask import picture
from veneer.app.output import Output
from veneer.app.text import UNICODE, Signs, bytes_, count, duration, number, printable, share, shorten, spark

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["Lines", "Plain", "Progress", "Terminal", "display", "lines_of", "print_samples"]

Event = Mapping[str, Any]

EVERY_SECONDS = 10.0  # between two lines of a log
RECENT_STEPS = 8  # that speed and time left are worked out from
SHOWN_SAMPLES = 3
KEYS_OF_SAMPLES = {"prompt": "prompt", "expected": "wanted", "before": "before", "after": "after"}

NEXT = {  # what is going on once an event has been told
    "start": "reading the data",
    "data": "tokenising",
    "split": "loading the tokenizer",
    "tokens": "loading the model",
    "lengths": "working out the memory",
    "memory": "planning",
    "model": "planning",
    "plan": "trying the longest batch",
    "probe": "answering a few rows as the base does",
    "stopping": "finishing the step",
    "samples": "proving the adapter",
    "proof": "writing it down",
}
ENDINGS = ("stopping", "samples", "proof", "done")
KEYS = {"s": "save", "e": "eval", "q": "stop"}
MARKED = ("data", "split", "tokens", "mask", "lengths", "model", "memory", "plan", "time")
WARNINGS = ("warning", "oom", "diverged", "stopping")


def kind_of(event: Event) -> str:
    """The event's kind, finer than the loop's: of the facts about the data, which."""
    kind = str(event.get("event"))
    if kind == "data":
        return "split" if "val_rows" in event else "tokens" if "trained_share" in event else "data"
    return kind


def lines_of(event: Event, signs: Signs, *, colour: bool = False) -> Iterator[tuple[str, str]]:
    """(style, line) for an event; nothing for those that only move the bar. `colour`: the mask may be painted.

    >>> from veneer.app.text import ASCII
    >>> list(lines_of({"event": "plan", "text": "r16, 60 steps"}, ASCII))
    [('ok', 'ok plan     r16, 60 steps')]
    """
    kind, text = kind_of(event), str(event.get("text", ""))
    if kind == "probe":
        kind, text = "memory", _memory(event)
    elif kind == "mask":
        text = picture(event["sample"], signs, colour=colour)
    if kind in MARKED and text:
        first, *more = text.split("\n")
        yield "ok", f"{signs.ok} {kind:<8} {first}"
        yield from (("more", f"{'':<{len(signs.ok) + 10}}{line}") for line in more)
    elif kind in WARNINGS and text:
        yield "warn", f"{signs.warn} {text}"
    elif kind == "note" and text:
        yield "dim", f"{signs.dot} {text}"
    elif kind == "proof":
        good = bool(event.get("passed"))
        sign = signs.ok if good else signs.fail
        yield "ok" if good else "fail", f"{sign} proof    " + text.replace(UNICODE.dot, signs.dot)


def _total_memory(event: Event) -> int:
    """What the device has: from the event, or asked here."""
    from veneer.advise.device import total_memory, usual_device

    return int(event.get("total_memory_bytes") or total_memory(usual_device()))


def _memory(event: Event) -> str:
    of = f" of {bytes_(_total_memory(event))}"
    rows, longest = int(event.get("micro_batch", 0)), int(event.get("longest_tokens", 0))
    batch = f"the longest batch ({rows} rows, to {longest} tokens)" if longest > 1 else f"a batch of {rows} rows"
    return f"{bytes_(float(event['memory_bytes']))}{of} in use with {batch}"


@dataclass
class Progress:
    """How far the run is, gathered from its events."""

    step: int = 0
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    val: float | None = None
    first_val: float | None = None
    is_best: bool = False
    latest: dict[str, Any] = field(default_factory=dict)
    recent: deque[tuple[float, int, int]] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    total_memory: int | None = None
    in_rows: bool = False  # a row is no tokens, but one whole, like a picture
    doing: str = "starting"
    ended: bool = False
    since: float = field(default_factory=time.monotonic)

    def take(self, event: Event) -> None:
        kind = kind_of(event)
        if kind == "step":
            self._remember(event)
            self.step, self.steps = int(event["step"]), int(event["steps"])
            if event.get("loss") is not None:
                self.losses.append(float(event["loss"]))
        elif kind == "eval" and event.get("val_loss") is not None:
            self.val, self.is_best = float(event["val_loss"]), bool(event.get("best"))
            self.first_val = self.val if self.first_val is None else self.first_val
        elif kind == "probe":
            self.total_memory, self.in_rows = _total_memory(event), event.get("longest_tokens") == 1
        self.ended = self.ended or kind in ENDINGS
        self._now(self._next(kind, event))

    def _remember(self, event: Event) -> None:
        """The step's own figures; tokens are counted from the beginning in the event, and by step here."""
        before, self.latest = self.latest, dict(event)
        if "seconds" in event:
            all_, trained = (int(event.get(key, 0)) - int(before.get(key, 0)) for key in ("tokens", "trained_tokens"))
            self.recent.append((float(event["seconds"]), all_, trained))

    def _next(self, kind: str, event: Event) -> str | None:
        if kind == "doing":
            return str(event["text"])
        if kind == "tokenising":
            return f"tokenising {event.get('what', '')}: {event['done']:,} of {event['total']:,} rows"
        if kind in ("step", "eval", "save", "note") and self.is_training:
            return "training"
        if kind == "step":
            return "answering the same rows again"
        return NEXT.get(kind)

    def _now(self, doing: str | None) -> None:
        if doing and doing != self.doing:
            if doing.partition(":")[0] != self.doing.partition(":")[0]:
                self.since = time.monotonic()
            self.doing = doing

    @property
    def is_training(self) -> bool:
        """Between the first step and the last; an evaluation on the way is a part of it."""
        return 0 < self.step < self.steps and not self.ended

    # ------------------------------------------------------------------ the parts of a line

    def share(self) -> float:
        return self.step / self.steps if self.steps else 0.0

    def left(self) -> str:
        """From the mean of the last steps: a single one says little."""
        if not self.recent:
            return ""
        seconds = sum(row[0] for row in self.recent) / len(self.recent) * (self.steps - self.step)
        return f"{duration(seconds)} left" if self.step < self.steps else ""

    def loss(self) -> str:
        return f"loss {number(self.losses[-1])}" if self.losses else ""

    def held_out(self, signs: Signs) -> str:
        if self.val is None:
            return ""
        return f"val {number(self.val)}{f' {signs.down} best' if self.is_best else ''}"

    def speed(self) -> str:
        seconds = sum(row[0] for row in self.recent)
        if not seconds:
            return ""
        rate, trained = (sum(row[i] for row in self.recent) / seconds for i in (1, 2))
        if self.in_rows:
            return f"{f'{rate:.3g}' if rate < 1000 else count(rate)} rows/s"
        return f"{count(rate)} tok/s ({count(trained)} trained)".replace(" k", "k")

    def memory(self) -> str:
        used = self.latest.get("memory_bytes")
        if used is None:
            return ""
        return f"{bytes_(float(used))}/{bytes_(self.total_memory)}" if self.total_memory else bytes_(float(used))

    def details(self, signs: Signs) -> str:
        """The second line: what only those who look closely want to know."""
        norm, rate = self.latest.get("gnorm"), self.latest.get("lr")
        parts = [self.speed(), self.memory()]
        parts += [f"gnorm {number(float(norm))}"] if norm is not None else []
        parts += [f"lr {number(float(rate))}"] if rate is not None else []
        return f" {signs.dot} ".join(part for part in parts if part)

    def line(self, signs: Signs) -> str:
        """All of it on one line, for a log."""
        head = f"step {self.step}/{self.steps} ({share(self.share())})"
        parts = [head, self.loss(), self.held_out(signs), self.speed(), self.memory(), self.left()]
        return "  ".join(part for part in parts if part)

    def summary(self, signs: Signs) -> str:
        first = f"{number(self.losses[0])} {signs.arrow} " if len(self.losses) > 1 else ""
        last = number(self.losses[-1]) if self.losses else "-"
        curve = spark(self.losses, 12, signs)
        return f"{signs.ok} training {self.step} steps   loss {first}{last} {curve}"


# ------------------------------------------------------------------ for a program


class Lines:
    """Every event as it comes, one JSON object per line."""

    def __init__(self, out: Output) -> None:
        self.out = out

    def __call__(self, event: Event) -> None:
        self.out.line(event)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass


# ------------------------------------------------------------------ for a log


class Plain:
    """Lines without control codes. A timer names what has been going on for over a second without a word."""

    def __init__(self, out: Output, every: float = EVERY_SECONDS, patience: float = 1.0) -> None:
        self.out, self.every, self.patience = out, every, patience
        self.progress = Progress()
        self.printed = 0.0
        self.named = ""  # what goes on and was said to; notes in between do not make it news
        self.timer: threading.Timer | None = None

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        self._quieten()

    def __call__(self, event: Event) -> None:
        self._quieten()
        self.progress.take(event)
        for _, line in lines_of(event, self.out.signs):
            self._print(line)
        self._steps(event)
        if event.get("event") == "done":
            return
        if (doing := self.progress.doing) == self.named:
            return
        self.named = ""
        if doing != "training":
            self.timer = threading.Timer(self.patience, self._name, [doing])
            self.timer.daemon = True
            self.timer.start()

    def _name(self, doing: str) -> None:
        self.named = doing
        self._print(f"{doing} ...")

    def _steps(self, event: Event) -> None:
        kind, p = event.get("event"), self.progress
        due = time.monotonic() - self.printed >= self.every or p.step == 1 or (p.step == p.steps and p.val is None)
        if (kind == "step" and due) or (kind == "eval" and p.steps):
            self._print(p.line(self.out.signs))
            self.printed = time.monotonic()

    def _print(self, line: str) -> None:
        if not self.out.quiet or line.startswith((self.out.signs.warn, self.out.signs.fail)):
            self.out.console.print(line, markup=False, soft_wrap=True)

    def _quieten(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


# ------------------------------------------------------------------ for a person

STYLES = {"ok": "", "more": "", "warn": "yellow", "dim": "dim", "fail": "bold red"}


class Terminal:
    """Check marks that stay, above two lines that move. Keys: s saves now, e evaluates, q stops and can be resumed."""

    def __init__(self, out: Output) -> None:
        self.out, self.progress = out, Progress()
        self.keys = Keys(KEYS)
        self.live: Any = None

    def __enter__(self) -> Terminal:
        from rich.live import Live

        self.keys.start()
        self.live = Live(console=self.out.console, get_renderable=self._moving, refresh_per_second=8, transient=True,
                         redirect_stdout=False, redirect_stderr=False)  # fmt: skip
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.keys.stop()
        if self.live is not None:
            self.live.stop()

    def __call__(self, event: Event) -> str | None:
        was_training = self.progress.is_training
        self.progress.take(event)
        if was_training and not self.progress.is_training:
            self.out.console.print(self._marked("ok", self.progress.summary(self.out.signs)), soft_wrap=True)
        for style, line in lines_of(event, self.out.signs, colour=True):
            self.out.console.print(self._marked(style, line), soft_wrap=True)
        return None if event.get("event") == "warning" else self.keys.take()  # a library's has nobody to hear the key

    def _marked(self, style: str, line: str) -> RenderableType:
        from rich.text import Text

        made = Text.from_ansi(line, style=STYLES[style])  # the mask's preview brings its own colours
        if style == "ok":
            made.stylize("green", 0, len(self.out.signs.ok))
        return made

    def _moving(self) -> RenderableType:
        """The lines below the marks: a spinner before and after the training, the bar during it."""
        from rich.spinner import Spinner

        p = self.progress
        if p.is_training:
            return self._training()
        waited = time.monotonic() - p.since
        return Spinner("dots", f" {p.doing}{f'  {duration(waited)}' if waited > 2 else ''}", style="cyan")

    def _training(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        p, signs, width = self.progress, self.out.signs, self.out.console.width
        curve = spark(p.losses, 10, signs)
        facts = [f"{100 * p.share():.0f} %", f"step {p.step}/{p.steps}", p.left(), p.loss(), curve, p.held_out(signs)]
        text = "  ".join(fact for fact in facts if fact)
        room = max(8, min(28, width - len(text) - 14))
        row = Table.grid(padding=(0, 1))
        row.add_row(Text(" training", style="bold"), ProgressBar(100, 100 * p.share(), width=room), Text(text))
        keys = "[s]ave now  [e]val  [q]uit and resume later" if self.keys.on else ""
        waited = f"  {duration(time.monotonic() - p.since)}"
        below = f"          {p.details(signs) if p.doing == 'training' else p.doing + waited}"
        gap = " " * max(3, width - len(below) - len(keys) - 1)
        shown = below + gap + keys if len(below) + len(keys) + 4 <= width else below
        return Group(row, Text(shorten(shown, width - 1, signs), style="dim"))


@contextlib.contextmanager
def display(out: Output) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """The display that fits who is looking, for the length of a run. What a library warns of is one of its events."""
    shown = Lines(out) if out.json else Terminal(out) if out.is_terminal and not out.quiet else Plain(out)
    before = out.warned
    with shown:
        out.warned = lambda text: shown({"event": "warning", "text": text})
        try:
            yield shown
        finally:
            out.warned = before


# ------------------------------------------------------------------ at the end


def print_samples(
    console: Console, samples: Sequence[Mapping[str, Any]], signs: Signs, most: int = SHOWN_SAMPLES
) -> None:
    """Prompts with what was said before and after the training, side by side."""
    from veneer.app.tables import table

    if not samples:
        return
    cells = [
        [shorten(printable(str(row.get(key) or "-")), 300, signs) for key in KEYS_OF_SAMPLES] for row in samples[:most]
    ]
    console.print(table([f"+{heading}" for heading in KEYS_OF_SAMPLES.values()], ([*row] for row in cells)))
