"""Runs a command in a terminal of its own and draws what its screen shows at the end: real output, as SVG.

    pip install pyte
    python docs/images/capture.py docs/images/demo.svg veneer demo

A progress bar rewrites its line hundreds of times, so the bytes go through a terminal emulator (pyte) and only the last
state of each line is drawn. The drawing is rich's; its link to a web font is taken out, so the picture asks no server
for anything.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

from veneer.assets import cache_folder

COLUMNS, ROWS = 110, 400
NAMES = {"brown": "yellow", "default": None} | {f"bright{c}": f"bright_{c}" for c in ("black", "red", "green", "blue")}


def run(command: list[str]) -> pyte.Screen:
    """The screen as the command left it."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": str(COLUMNS)}
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # Linux says that the other side has hung up
            break
        if not data:
            break
        stream.feed(data)
    _, status = os.waitpid(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} ended with exit code {code}; no picture was made")
    return screen


def lines(screen: pyte.Screen) -> list[Text]:
    """The lines with their styles, without the empty ones at the end."""
    drawn = [Text.assemble(*runs(screen.buffer[y])) for y in range(ROWS)]
    for line in drawn:
        line.rstrip()
    while drawn and not drawn[-1].plain:
        drawn.pop()
    return drawn


def runs(row: Mapping[int, pyte.screens.Char]) -> Iterator[tuple[str, Style]]:
    """A row as pieces of one style each; cell by cell the picture would be ten times as large."""
    for look, cells in groupby((row[x] for x in range(COLUMNS)), key=style):
        yield "".join(char.data for char in cells), look


def style(char: pyte.screens.Char) -> Style:
    return Style(
        color=color(char.fg), bgcolor=color(char.bg), bold=char.bold, italic=char.italics,
        underline=char.underscore, reverse=char.reverse,
    )  # fmt: skip


def color(name: str) -> str | None:
    return f"#{name}" if re.fullmatch(r"[0-9a-f]{6}", name) else NAMES.get(name, name)


def without_home(line: Text) -> Text:
    """Where the demo's files are kept on this machine is nobody's business: shown as where they are by default."""
    here, start = str(cache_folder()), line.plain.find(str(cache_folder()))
    if start < 0:
        return line
    return Text.assemble(line[:start], "~/.cache/veneer", line[start + len(here) :])


def svg(title: str, drawn: list[Text]) -> str:
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "bold green"), title))
    for line in drawn:
        console.print(without_home(line), overflow="crop", no_wrap=True)
    picture = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title=title), flags=re.DOTALL)
    ElementTree.fromstring(picture)  # is it well-formed
    return "\n".join(line.rstrip() for line in picture.splitlines()) + "\n"


def main() -> None:
    out, *command = sys.argv[1:]
    Path(out).write_text(
        svg(" ".join(Path(word).name if n == 0 else word for n, word in enumerate(command)), lines(run(command)))
    )


if __name__ == "__main__":
    main()
