"""veneer chat: talk to a run; with --vs, the base or other runs answer beside it.

On a terminal the answers grow in columns. With --prompt, or when the questions come through a pipe, each is answered
and the command ends, so a script can compare two adapters with one line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from veneer.app.flags import add_sampling, sampling_of
from veneer.app.output import Output
from veneer.app.subjects import source_of
from veneer.app.text import number, printable
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from veneer.infer.chat import Chat, Speaker
    from veneer.infer.load import Ready, Source

EXAMPLES = """  veneer chat last --vs base
  veneer chat runs/support-0917-a1 --vs runs/support-0917-a2
  veneer chat runs/sql --prompt "How many orders last week?" --json
  veneer chat org/model                      a model without an adapter"""

NARROW = 60  # columns: below this, answers stand under one another


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run, an adapter's folder, a model, or last")
    parser.add_argument("--vs", action="append", default=[], metavar="base|RUN", help="who answers beside it")
    parser.add_argument("--prompt", "-p", action="append", default=[], metavar="TEXT", help="ask this and end")
    parser.add_argument("--system", metavar="TEXT", help="system prompt [what the run was trained with]")
    parser.add_argument("--plain", action="store_true", help="go on from the text as it stands, without a chat turn")
    parser.add_argument("--base", metavar="MODEL", help="the base model, where an adapter does not say")
    parser.add_argument("--root", default="runs", help="the folder that holds the runs [runs]")
    parser.add_argument("--device", metavar="cpu|cuda", help="where to run [a GPU where there is one]")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="[fp32 on a CPU, bf16 on a GPU]")
    add_sampling(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    sampling = sampling_of(args)
    chat = open_chat(args, out)
    chat.sampling, chat.system = sampling, args.system
    prompts = args.prompt or (None if sys.stdin.isatty() else [line.rstrip("\n") for line in sys.stdin])
    if prompts is not None:
        answer_all(chat, [prompt for prompt in prompts if prompt.strip()], out)
    elif out.json:
        raise ConfigError("--json needs questions", "command line", "add --prompt TEXT, or pipe one question per line")
    else:
        talk(chat, out)
    return 0


# ------------------------------------------------------------------ who speaks


def open_chat(args: argparse.Namespace, out: Output) -> Chat:
    from veneer.infer.chat import Chat

    first = _asked(args.run, args)
    rest = [_opponent(word, first, args) for word in args.vs]
    speakers: list[Speaker] = []
    ready: dict[str, Ready] = {}
    for source in (first, *rest):
        if source.base not in ready:
            same = [other for other in (first, *rest) if other.base == source.base]
            ready[source.base] = _loaded(same, args, out)
        speakers.append(_speaker(source, ready[source.base]))
    return Chat(speakers)


def _asked(word: str, args: argparse.Namespace) -> Source:
    from dataclasses import replace

    source = source_of(word, args.root, args.base)
    return replace(source, plain=True) if args.plain else source


def _opponent(word: str, first: Source, args: argparse.Namespace) -> Source:
    from dataclasses import replace

    if word != "base":
        return _asked(word, args)
    if first.adapter is None:
        raise ConfigError(f"{first.label} has no adapter, so it is its own base", "--vs base", "name another run")
    return replace(first, label="base", adapter=None, proof=None)


def _loaded(sources: list[Source], args: argparse.Namespace, out: Output) -> Ready:
    from veneer.infer.load import load

    with out.wait(f"loading {sources[0].base}"):
        ready = load(sources, device=args.device, dtype=args.dtype, say=lambda line: None)
    if not ready.answers:
        fix = f"`veneer eval {sources[0].label}` judges it"
        raise ConfigError(f"{sources[0].label} does {ready.task.name}: it has no answers", "chat", fix)
    for name, evidence in ready.evidence.items():
        out.note(f"{out.signs.ok} {name}: {evidence}")
    return ready


def _speaker(source: Source, ready: Ready) -> Speaker:
    """An adapter is asked as it was trained to be; the base beside it, as the adapter is."""
    from veneer.infer.chat import Speaker

    return Speaker(source.label, ready if source.name is None else ready.asked_as(source), source.name)


# ------------------------------------------------------------------ questions from a script


def answer_all(chat: Chat, prompts: list[str], out: Output) -> None:
    """Every question on its own, without the ones before it."""
    rows: list[dict[str, Any]] = []
    for prompt in prompts:
        chat.reset()
        for _ in chat.ask(prompt):
            pass
        rows += [_row(prompt, speaker) for speaker in chat.speakers]
    evidence = {name: said for speaker in chat.speakers for name, said in speaker.ready.evidence.items()}
    out.result({"answers": rows, "evidence": evidence}, lambda console: _print_answers(console, rows))


def _row(prompt: str, speaker: Speaker) -> dict[str, Any]:
    answer = speaker.answer
    return {
        "prompt": prompt,
        "speaker": speaker.label,
        "text": answer.text,
        "tokens": len(answer.tokens),
        "prompt_tokens": answer.prompt_tokens,
        "stopped": answer.stopped,
    }


def _print_answers(console: Console, rows: list[dict[str, Any]]) -> None:
    """One speaker: the bare answer, so that it can be piped on. Several: each under its name."""
    several = len({row["speaker"] for row in rows}) > 1
    for row in rows:
        text = f"[{row['speaker']}] {row['text']}" if several else row["text"]
        console.print(text, markup=False, soft_wrap=True)


# ------------------------------------------------------------------ a person at a terminal


def talk(chat: Chat, out: Output) -> None:
    from veneer.infer.chat import Quit

    _history()
    names = f" {out.signs.dot} ".join(speaker.label for speaker in chat.speakers)
    out.console.print(f"{names}     /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves", style="dim")
    try:
        for line in _lines(out):
            if line.startswith("/"):
                out.console.print(chat.command(line), markup=False, style="dim")
            elif line.strip():
                answer(chat, line, out.console)
    except Quit:
        pass


def _history() -> None:
    """Arrow keys and line editing, where Python was built with them."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it is what turns it on


def _lines(out: Output) -> Iterator[str]:
    """What is typed; Ctrl-C at the empty prompt asks once more before it leaves."""
    warned = False
    while True:
        try:
            yield _ask()
            warned = False
        except EOFError:
            out.console.print()
            return
        except KeyboardInterrupt:
            if warned:
                return
            warned = True
            out.console.print("\nonce more to leave", style="dim")


def _ask() -> str:
    """`input` prints its prompt to the real stdout, which is redirected while a command runs."""
    from contextlib import redirect_stdout

    with redirect_stdout(sys.__stdout__):
        return input("\nyou > ")


def answer(chat: Chat, text: str, console: Console) -> None:
    """The answers as they grow; Ctrl-C ends them and keeps what came."""
    side_by_side = len(chat.speakers) > 1 and console.width // len(chat.speakers) >= NARROW // 2
    show = _show_columns if side_by_side else _show_stream
    stream = chat.ask(text)
    try:
        show(chat, stream, console)
    except KeyboardInterrupt:
        stream.close()  # type: ignore[attr-defined]
        console.print("stopped", style="dim")
    for speaker in chat.speakers:
        if speaker.forgotten:
            console.print(
                f"{speaker.label}: the first {speaker.forgotten} turns were dropped to make room", style="dim"
            )


def _show_stream(chat: Chat, stream: Iterator[Any], console: Console) -> None:
    """One speaker after the other; a single one is printed as it speaks."""
    alone = len(chat.speakers) == 1
    for _, piece in stream:
        if alone:
            console.print(printable(piece.text), end="", markup=False, soft_wrap=True)
    if alone:
        console.print()
    for speaker in chat.speakers:
        if not alone:
            console.print(speaker.label, style="bold", markup=False)
            console.print(printable(speaker.answer.text), markup=False)
        console.print(_figures(speaker), style="dim", markup=False)


def _show_columns(chat: Chat, stream: Iterator[Any], console: Console) -> None:
    from rich.live import Live

    with Live(_columns(chat), console=console, refresh_per_second=12, transient=True, vertical_overflow="crop") as live:
        for _ in stream:
            live.update(_columns(chat))
    console.print(_columns(chat, done=True))


def _columns(chat: Chat, done: bool = False) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, expand=True, padding=(0, 3, 0, 0), pad_edge=False)
    for speaker in chat.speakers:
        table.add_column(Text(speaker.label), ratio=1, header_style="bold cyan", overflow="fold")
    table.add_row(*(Text(printable(speaker.answer.text)) for speaker in chat.speakers))
    if done:
        table.add_row(*(Text(_figures(speaker), style="dim") for speaker in chat.speakers))
    return table


def _figures(speaker: Speaker) -> str:
    answer = speaker.answer
    why = {"length": ", cut at max_tokens", "limit": ", the model reads no more"}.get(answer.stopped, "")
    speed = f", {number(answer.tokens_per_second)} per second" if answer.seconds else ""
    return f"{len(answer.tokens)} tokens{speed}{why}"
