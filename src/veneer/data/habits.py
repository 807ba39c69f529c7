"""What a chat template does, found out by looking at what it makes of four small conversations.

    before    user                        <header of user> question <...>
    asked     user, and a prompt          ... question <...> <generation prompt>
    whole     user, assistant             ... question <...> <header of assistant> answer <last>
    longer    user, assistant, user       ... answer <inner> question ...

Templates are programs and no two families' are alike; a list of markers per family is out of date the day it is
written. These habits hold for whatever a template is called (tried on the 70 that ship with llama.cpp):

| habit | seen in | so |
| --- | --- | --- |
| the answer does not begin as the prompt ends | DeepSeek-R1, QwQ, Gemma 4 | `cut` the prompt to where they agree |
| the prompt's last token melts into the answer | Qwen3.5, "ASSISTANT: " | the same |
| there is no generation prompt | old ChatML templates | `add` the header that answers have |
| something follows the turn end when it is the last | Phi-3's EOS | `turn_end` is what the last and the inner share |
| another token ends the last turn | gpt-oss | `turn_end` is the last one's |
| the last turn is left open | Apertus, Apriel | `close` it with what stands behind an inner one |
| turns end only by the marker of the next | GLM | `close` with that marker (`by_next`) |
| a prompt is written whether asked for or not | a template for tool use | refused |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from veneer.data.types import Message
from veneer.errors import ConfigError, DataError

__all__ = ["ANSWER", "LONGER", "QUESTION", "WHOLE", "Habits", "any_of", "observed"]

QUESTION, ANSWER = "veneer-probe-question", "veneer-probe-answer"
WHOLE: tuple[Message, ...] = ({"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER})
LONGER: tuple[Message, ...] = (*WHOLE, {"role": "user", "content": QUESTION})

Render = Callable[..., str]  # messages, generate=False
Tokens = Callable[[Sequence[str]], Iterable[tuple[list[int], list[tuple[int, int]]]]]  # ids and offsets of each text


@dataclass(frozen=True)
class Habits:
    """`cut` is taken off the template's generation prompt, `add` is put behind it; `close` is put behind an answer that
    comes last. `turn_end` None: answers end in no token."""

    turn_end: str | None = None
    cut: str = ""
    add: str = ""
    close: str = ""
    by_next: bool = False


def observed(render: Render, tokens: Tokens | None, control: re.Pattern[str]) -> Habits:
    """The habits of the template behind `render`. `control` matches the tokenizer's control tokens; `tokens` is None
    for a tokenizer that cannot tell which characters its tokens stand for."""
    before, asked, whole = render(WHOLE[:1]), render(WHOLE[:1], generate=True), render(WHOLE)
    answer = whole.find(ANSWER)
    if answer < 0 or QUESTION not in before:
        raise ConfigError("the chat template leaves the text of the turns out", where="template")
    habits = _turn_end(before, asked, _behind(whole, ANSWER), _behind(_longer(render), ANSWER), control)
    shared = _agreed(asked, whole, tokens)
    if shared < len(asked):
        return replace(habits, cut=asked[shared:])
    header = whole[shared:answer] if asked == before else ""
    return replace(habits, add=header if header.strip() else "")


def _longer(render: Render) -> str:
    try:
        return render(LONGER)
    except DataError:
        return ""


# Where the model begins


def _agreed(asked: str, whole: str, tokens: Tokens | None) -> int:
    """How many characters of `asked` are the same tokens in both. A space at its end melts into nearly every word, if
    not into that of the probe."""
    same = _shared(asked, whole)
    if tokens is not None:
        (ids, offsets), (others, _) = tokens([asked, whole])
        shared = _shared(ids, others)
        same = same if shared == len(ids) else (offsets[shared - 1][1] if shared else 0)
    return min(same, len(asked.rstrip(" ")))


# What ends its turn


def _turn_end(before: str, asked: str, last: str, inner: str, control: re.Pattern[str]) -> Habits:
    """From the texts behind an answer that comes `last` and behind an `inner` one: the last control token that both
    have, or that the last one has."""
    stable = last[: _shared(last, inner)]
    if last != stable and asked.endswith(last[len(stable) :]):
        raise ConfigError(
            "the chat template writes a generation prompt whether it is asked for or not",
            where="template",
            fix="choose another: template=chatml (or llama3, gemma, mistral, alpaca, vicuna, a .jinja file)",
        )
    if ends := control.findall(stable) or control.findall(last):
        return Habits(ends[-1])
    return _open_turn_end(before[: before.find(QUESTION)], inner[: max(inner.find(QUESTION), 0)], control)


def _open_turn_end(header: str, onward: str, control: re.Pattern[str]) -> Habits:
    """The end of a turn that is left open when it is the last: what stands between an answer and the header of the next
    user turn or, if nothing does, the control token with which that header begins."""
    pieces = re.compile(f"(?:{control.pattern})|(?s:.)")  # a control token, or a character
    ends_alike = [pieces.findall(text)[::-1] for text in (header, onward)]
    kept = sum(map(len, ends_alike[0][: _shared(*ends_alike)]))
    between = onward[: len(onward) - kept]
    if ends := [*control.finditer(between)]:
        return Habits(ends[-1].group(), close=between[: ends[-1].end()])
    marker = control.match(onward)
    return Habits(marker.group(), close=marker.group(), by_next=True) if marker else Habits()


# Texts


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of them, the longest first; for none, one that never matches."""
    ordered = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _behind(text: str, mark: str) -> str:
    return text[text.rfind(mark) + len(mark) :] if mark in text else ""
