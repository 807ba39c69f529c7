"""HTML that cannot carry somebody else's: text is escaped because it is text, not because somebody thought of it.

    tag("td", "a < b")                     <td>a &lt; b</td>
    tag("td", tag("b", "a"), " < b")       <td><b>a</b> &lt; b</td>
    tag("i", class_="q3", data_step=5)     <i class="q3" data-step="5"></i>

What `tag` returns is `Html`, and only `Html` passes through as it is. Prompts, file names, error messages and whatever
else a run brings along are plain strings, so they can become letters on the page and nothing more. The result is ASCII:
no server, mail program or editor can spoil it by guessing an encoding.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

__all__ = ["Html", "escape", "join", "raw", "tag"]

VOID = ("meta", "input", "br", "link", "img")


class Html(str):
    """Markup made here."""


def escape(text: object) -> Html:
    """`text` as letters; markup made here stays what it is.

    >>> escape('<b a="1">'), escape(tag("b"))
    ('&lt;b a=&quot;1&quot;&gt;', '<b></b>')
    """
    if isinstance(text, Html):
        return text
    return Html(html.escape(str(text), quote=True).encode("ascii", "xmlcharrefreplace").decode())


def tag(name: str, /, *inside: object, **attributes: object) -> Html:
    """An element. None and False leave an attribute out, True gives it no value; None leaves a child out.

    >>> tag("button", "Copy", type="button", hidden=True, title=None)
    '<button type="button" hidden>Copy</button>'
    """
    said = []
    for key, value in attributes.items():
        word = key.rstrip("_").replace("_", "-")
        if value is True:
            said.append(f" {word}")
        elif value is not None and value is not False:
            said.append(
                f' {word}="{html.escape(str(value), quote=True).encode("ascii", "xmlcharrefreplace").decode()}"'
            )
    start = f"<{name}{''.join(said)}>"
    return Html(start if name in VOID else f"{start}{join(inside)}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Html:
    """Parts in a row, each escaped if it is text; `between` is text too."""
    return Html(escape(between).join(escape(part) for part in parts if part is not None))


def raw(text: str) -> Html:
    """Markup of our own that is written out: style sheets and scripts, never anything that a run brought along."""
    return Html(text)
