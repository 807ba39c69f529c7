"""Which characters of a rendered row are trained, and from those which tokens.

| loss_on | text | prompt/completion | conversation |
| --- | --- | --- | --- |
| all | everything | everything | everything |
| completions, assistant | everything | the completion | each assistant turn that answers something |
| last | everything | the completion | the last assistant turn |

A trained turn is its text and the token that ends it; the newline some templates write after that is not the model's to
produce. Turns of a message-list prompt, and turns of weight 0, are context only, and so is an assistant turn that opens
a conversation, since nothing asks for it.

Turns are found by rendering the conversation up to each of them (`Renderer.turn`), never by searching for markers. A
template may render earlier turns otherwise than it did when they were the last (Qwen3 and others drop old reasoning):
then no single text shows every turn as inference will produce it. Such a turn gets a sample of its own, in which it
comes last. That costs tokens and is exact: whatever is trained follows the very text that inference will put before it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from veneer.data.template import Renderer
from veneer.data.types import IGNORE, Chat, Completion, Ids, LossOn, Text
from veneer.errors import DataError

__all__ = ["Rendered", "is_split_token", "labels_for", "rendered", "trained_turns"]


@dataclass
class Rendered:
    """Text to be tokenised and the stretches of it that are trained."""

    text: str
    spans: list[tuple[int, int]] = field(default_factory=list)
    where: str = ""
    id: str = ""
    is_altered: bool = False  # the template left something out of a trained answer
    is_plain: bool = False  # no template wrote it, so BOS is still to be put before it


def rendered(example: Chat | Completion | Text, renderer: Renderer, loss_on: LossOn = "assistant") -> list[Rendered]:
    """The texts of one row: one, or several where the template rewrites earlier turns."""
    if isinstance(example, Chat):
        texts = _conversation(example, renderer, loss_on)
    else:
        texts = [_plain(example, renderer, loss_on)]
    for text in texts:
        text.where, text.id = example.where, example.id
    return texts


def _plain(example: Completion | Text, renderer: Renderer, loss_on: LossOn) -> Rendered:
    if isinstance(example, Text):
        start, text = 0, renderer.finish(example.text)
    else:
        start, text = len(example.prompt), renderer.finish(example.prompt + example.completion)
    return Rendered(text, [(0 if loss_on == "all" else start, len(text))], is_plain=True)


# Conversations


def trained_turns(chat: Chat, loss_on: LossOn) -> list[int]:
    """The places of the assistant turns to be trained."""
    turns = [
        place
        for place, message in enumerate(chat.messages)
        if message["role"] == "assistant" and message.get("weight", 1) and place >= max(chat.prompt_turns, 1)
    ]
    return turns[-1:] if loss_on == "last" else turns


def _conversation(chat: Chat, renderer: Renderer, loss_on: LossOn) -> list[Rendered]:
    _refuse_what_vanishes(chat, renderer)
    if loss_on == "all":
        text = renderer.whole(chat.messages, chat.tools)
        return [Rendered(text, [(0, len(text))])]
    turns = trained_turns(chat, loss_on)
    if not turns:
        raise DataError("no assistant turn to train: all open the conversation, belong to the prompt or have weight 0")
    texts: list[Rendered] = []
    for place in reversed(turns):
        _add_turn(texts, chat, place, renderer)
    return texts[::-1]


def _add_turn(texts: list[Rendered], chat: Chat, place: int, renderer: Renderer) -> None:
    """Mark the turn in the text that holds it just as inference will see it, or in a new one."""
    turn = renderer.turn(chat.messages, place, chat.tools)
    said = chat.messages[place]["content"].strip()
    host = next((text for text in texts if text.text.startswith(turn.text[: turn.end])), None)
    if host is None:
        host = Rendered(turn.text)
        texts.append(host)
    host.spans.insert(0, (turn.start, turn.end))
    host.is_altered |= said not in turn.text[turn.start : turn.end]


def _refuse_what_vanishes(chat: Chat, renderer: Renderer) -> None:
    """What the template would leave out, or read as structure, in silence."""
    if chat.tools and not renderer.takes_tools:
        raise DataError("the chat template leaves tools out", fix="choose template=chatml, or drop the tools")
    if any(message.get("tool_calls") for message in chat.messages) and not renderer.takes_tool_calls:
        why = "ends turns by the next one's marker" if renderer.turn_end_is_next else "leaves them out"
        raise DataError(f"the chat template cannot carry tool calls: it {why}", fix="choose template=chatml")
    if chat.messages[0]["role"] == "system" and not renderer.takes_system:
        raise DataError("the chat template takes no system turn", fix="choose template=gemma, or drop the system turns")
    for place, message in enumerate(chat.messages, 1):
        if token := renderer.forged(message["content"]):
            raise DataError(
                f"turn {place} contains {token}, which the template itself writes around turns",
                fix="take it out of the text: the template adds what is needed",
            )


# Tokens


def labels_for(ids: Ids, offsets: Sequence[tuple[int, int]], spans: Iterable[tuple[int, int]]) -> array[int]:
    """Labels of the tokens that overlap a span, IGNORE elsewhere, and at the first token, which nothing predicts.

    >>> labels_for([7, 8, 9], [(0, 4), (4, 9), (9, 10)], [(4, 10)]).tolist()
    [-100, 8, 9]
    """
    labels = array("i", [IGNORE]) * len(ids)
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    for start, end in spans:
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        labels[first:last] = array("i", ids[first:last])
    labels[:1] = array("i", [IGNORE])
    return labels


def is_split_token(offsets: Sequence[tuple[int, int]], spans: Iterable[tuple[int, int]]) -> bool:
    """Whether a token reaches over the beginning of a span, so that inference, which tokenises the prompt alone, will
    never see the prompt end as it does here. A prompt that ends in a space is the usual cause."""
    inner = [start for start, _ in spans if start > 0]
    ends = [end for _, end in offsets]
    return any(offsets[place][0] < start for start in inner if (place := bisect_right(ends, start)) < len(offsets))
