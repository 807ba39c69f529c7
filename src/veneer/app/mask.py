"""The picture of a mask: one sample, the tokens that are trained standing out from those that are only read.

On a terminal trained text is green and the rest dim, a line to a line; in a log trained stretches stand in [brackets],
all on one line. The sign of the return key shows where lines end, because a mask that is one newline off is just
what one looks for here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.app.text import Signs, printable, share

__all__ = ["Stretch", "picture"]

Stretch = Sequence[Any]  # text, whether it is trained, its tokens: a tuple, or a list where it comes from JSON
TRAINED, CONTEXT, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
WIDTH = 700  # characters of a sample; what is longer loses the middles of its longest stretches


def picture(sample: Sequence[Stretch], signs: Signs, *, colour: bool) -> str:
    """
    >>> from veneer.app.text import ASCII
    >>> picture([("user: hi\\n", False, 3), ("hello", True, 1)], ASCII, colour=False)
    '1 of 4 tokens of this sample are trained (25.0 %)\\nuser: hi\\\\n[hello]'
    """
    trained, tokens = sum(size for _, is_trained, size in sample if is_trained), sum(size for *_, size in sample)
    head = f"{trained:,} of {tokens:,} tokens of this sample are trained ({share(trained / max(tokens, 1))})"
    most = max(24, WIDTH // max(1, len(sample)))
    body = "".join(_stretch(_cut(text, most, signs), is_trained, signs, colour) for text, is_trained, _ in sample)
    return f"{head}\n{body}"


def _cut(text: str, most: int, signs: Signs) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} {signs.ellipsis} {text[-(most // 2) :]}"


def _stretch(text: str, is_trained: bool, signs: Signs, colour: bool) -> str:
    shown = printable(text).replace("\n", signs.newline + ("\n" if colour else ""))
    if not colour:
        return f"[{shown}]" if is_trained else shown
    style = TRAINED if is_trained else CONTEXT
    return "\n".join(f"{style}{line}{PLAIN}" if line else "" for line in shown.split("\n"))
