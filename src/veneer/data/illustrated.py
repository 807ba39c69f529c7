"""Conversations with pictures, for models that read both: rows, tokens, and a mask that knows where pictures stand.

| row | |
| --- | --- |
| messages (or conversations) with parts {type: image} or <image>, and images | what most data sets have |
| messages whose parts hold their pictures: {type: image, image: path} | |
| image (or images), question, answer | one turn each |

A picture is one character in the text of a turn (MARK) until the processor's template writes its place, and one token
there until the processor makes as many of it as the picture has patches. Which tokens are trained is decided before
that, on text without patches, as for any conversation (mask.py), and carried over:

    u   ... <image> What is it ? </s> A coat </s>          labels from the mask
    e   ... <image> <image> <image> ... What is it ? </s> A coat </s>      what the model is given

`carried` finds u's stretches in e. Where it cannot, the row is refused; a mask is never guessed. No token of a picture
is ever trained.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from veneer.data.encode import OVERLONG, Encodings, finished, fit
from veneer.data.images import colours_of, looked_at
from veneer.data.lengths import Lengths
from veneer.data.mask import labels_for, rendered
from veneer.data.template import Renderer
from veneer.data.turns import RowError, conversation, json_list
from veneer.data.types import IGNORE, Encoded, Illustrated, LossOn, Message, Pictured
from veneer.errors import ConfigError, DataError

__all__ = ["MARK", "Spoken", "carried", "encode_illustrated", "with_pictures"]

MARK = "\ufffc"  # Unicode's "object replacement character": here stands a picture
WRITTEN = "<image>"  # how people write it
PROBE = "veneer probe"


# ------------------------------------------------------------------ rows


def with_pictures(value: Any, field: str, images: Sequence[Any]) -> tuple[tuple[Message, ...], tuple[Any, ...]]:
    """The messages of a list of turns, each picture a MARK in its text, and the pictures in that order."""
    held: list[Any] = []
    turns = [_marked(turn, held) for turn in json_list(value, field)]
    messages = conversation(turns, field)
    if held and images:
        raise RowError(f"pictures stand in {field!r} and in a column of their own; which are meant?")
    pictures = tuple(held or images)
    places = sum(str(message["content"]).count(MARK) for message in messages)
    if pictures and not places:  # given, and nowhere named: they are what the first question is about
        first = next((k for k, message in enumerate(messages) if message["role"] == "user"), 0)
        opened = Message(**{**messages[first], "content": MARK * len(pictures) + messages[first]["content"]})
        return (*messages[:first], opened, *messages[first + 1 :]), pictures
    if places != len(pictures):
        raise RowError(f"{places} places for pictures in {field!r}, but {len(pictures)} pictures")
    return messages, pictures


def _marked(turn: Any, held: list[Any]) -> Any:
    """A turn whose content is one text; pictures that stand in its parts go to `held`."""
    if not isinstance(turn, Mapping):
        return turn  # `conversation` says what is wrong with it
    key = next((name for name in ("content", "value") if turn.get(name) is not None), None)
    if key is None:
        return turn
    content = turn[key]
    if isinstance(content, str):
        return {**turn, key: content.replace(WRITTEN, MARK)}
    if not isinstance(content, Sequence):
        return turn
    return {**turn, key: [_part(part, held) for part in content]}


def _part(part: Any, held: list[Any]) -> Any:
    if not isinstance(part, Mapping) or part.get("type") not in ("image", "image_url"):
        return part
    found = next((part[name] for name in ("image", "path", "url", "image_url") if part.get(name) is not None), None)
    if isinstance(found, Mapping):
        found = found.get("url") or found.get("bytes") or found.get("path")
    if found is not None:
        held.append(found)
    return MARK


# ------------------------------------------------------------------ templates


class Spoken:
    """A processor's tokenizer, for a Renderer: texts with MARKs become what the processor's template reads."""

    def __init__(self, processor: Any) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.chat_template = getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        self.image_token = str(getattr(processor, "boi_token", None) or getattr(processor, "image_token", WRITTEN))
        self.reads_parts = bool(self.chat_template) and self._reads_parts()

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, text: Any, **options: Any) -> Any:
        return self.tokenizer(text, **options)

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        own = options.get("chat_template") in (None, self.chat_template)
        spell = _in_parts if own and self.reads_parts else self._in_text
        told = [{**message, "content": spell(message["content"])} for message in conversation]
        chosen = self.chat_template if own else options["chat_template"]
        return self.tokenizer.apply_chat_template(told, **{**options, "chat_template": chosen})

    def _in_text(self, content: str) -> str:
        return content.replace(MARK, self.image_token)

    def _reads_parts(self) -> bool:
        try:
            asked = [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]
            said = self.tokenizer.apply_chat_template(asked, chat_template=self.chat_template, tokenize=False)
        except Exception:  # templates are programs: they raise whatever they like
            return False
        return PROBE in said and "'text'" not in said


def _in_parts(content: str) -> list[dict[str, str]]:
    """
    >>> _in_parts("What is this?")
    [{'type': 'text', 'text': 'What is this?'}]
    >>> [part["type"] for part in _in_parts("\\ufffcand\\ufffc")]
    ['image', 'text', 'image']
    """
    parts: list[dict[str, str]] = []
    for number, text in enumerate(content.split(MARK)):
        parts += [{"type": "image"}] * (number > 0)
        parts += [{"type": "text", "text": text}] * bool(text)
    return parts or [{"type": "text", "text": ""}]


# ------------------------------------------------------------------ samples


@dataclass(frozen=True)
class Inputs:
    """What a sample gives beside its tokens when its batch is made."""

    text: str
    pictures: tuple[Pictured, ...]
    processor: Any

    def __call__(self) -> dict[str, Any]:
        found = processed(self.processor, self.text, self.pictures)
        return {name: value for name, value in found.items() if name not in ("input_ids", "attention_mask")}


def processed(processor: Any, text: str, pictures: Sequence[Pictured]) -> dict[str, Any]:
    images = [colours_of(picture) for picture in pictures]
    more = {"images": [images]} if images else {}
    return dict(processor(text=[text], **more, return_tensors="pt", add_special_tokens=False))


def encode_illustrated(
    examples: Sequence[Illustrated],
    processor: Any,
    renderer: Renderer,
    *,
    loss_on: LossOn = "assistant",
    max_len: int | None = None,
    overlong: str = "drop",
    skip_bad: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> Encodings:
    """Samples of at most `max_len` tokens, patches among them. What is too long is dropped or refused: half of a
    picture cannot be given."""
    if overlong not in ("drop", "error"):
        raise ConfigError(f"overlong={overlong} would cut through a picture", "overlong", "choose drop or error")
    assert overlong in OVERLONG
    counts: Counter[str] = Counter()
    problems: list[str] = []
    samples: list[Encoded] = []
    for number, example in enumerate(examples, 1):
        try:
            for picture in pictures_of(example):
                looked_at(picture, counts)
            made = _samples(example, processor, renderer, loss_on)
        except DataError as error:
            problems.append(f"{example.where}: {error.what}" + (f" ({error.fix})" if error.fix else ""))
            continue
        counts["own samples"] += len(made) - 1
        samples += made
        if report:
            report(number, len(examples))
    lengths = Lengths(array("i", map(len, samples)))
    kept = fit(samples, max_len, overlong, counts, problems)
    return finished(kept, len(examples), lengths, counts, problems, max_len, skip_bad)


def pictures_of(example: Illustrated) -> tuple[Pictured, ...]:
    return tuple(Pictured(image, "", where=example.where) for image in example.images)


def _samples(example: Illustrated, processor: Any, renderer: Renderer, loss_on: LossOn) -> list[Encoded]:
    spoken: Any = renderer.tokenizer
    texts = rendered(example.chat, renderer, loss_on)
    found = []
    for text, (ids, offsets) in zip(texts, renderer.tokens(each.text for each in texts), strict=True):
        pictures = pictures_of(example)[: text.text.count(spoken.image_token)]
        if text is texts[-1] and len(pictures) != len(example.images):
            raise DataError(
                "the chat template leaves pictures out", fix="choose another template, or name it in theirs"
            )
        labels = labels_for(ids, offsets, text.spans)
        whole = processed(processor, text.text, pictures)["input_ids"][0].tolist()
        marked = carried(ids, labels, whole)
        if all(label == IGNORE for label in marked):
            raise DataError("no token is trained")
        inputs = Inputs(text.text, pictures, processor)
        found.append(Encoded(array("i", whole), array("i", marked), where=example.where, id=example.id, extras=inputs))
    return found


def carried(ids: Sequence[int], labels: Sequence[int], whole: Sequence[int]) -> list[int]:
    """The labels of `ids` at their places in `whole`, in which some tokens have become many.

    >>> carried([1, 9, 4, 5, 2], [-100, -100, -100, 5, 2], [1, 9, 9, 9, 4, 5, 2])
    [-100, -100, -100, -100, -100, 5, 2]
    """
    ids, labels, whole = list(ids), list(labels), list(whole)
    grown = {token for token, count in Counter(whole).items() if 0 < ids.count(token) < count}
    marked = [IGNORE] * len(whole)
    if any(label in grown for label in labels):
        raise DataError("an answer holds a picture's token", fix="take it out of the answer")
    at = 0
    for start, stop in _stretches(ids, grown):
        last = stop == len(ids)
        found = len(whole) - (stop - start) if last else _find(ids[start:stop], whole, at)
        if found < at or whole[found : found + stop - start] != ids[start:stop]:
            start, found = _from_its_answer(ids, labels, start, stop, whole, at)
        marked[found : found + stop - start] = labels[start:stop]
        at = found + stop - start
    return marked


def _stretches(ids: Sequence[int], grown: set[int]) -> list[tuple[int, int]]:
    """Where tokens stand between those that have become many."""
    edges = [-1, *(place for place, token in enumerate(ids) if token in grown), len(ids)]
    return [(left + 1, right) for left, right in pairwise(edges) if right > left + 1]


def _find(part: Sequence[int], whole: Sequence[int], start: int) -> int:
    size = len(part)
    return next((k for k in range(start, len(whole) - size + 1) if whole[k : k + size] == part), -1)


def _from_its_answer(
    ids: Sequence[int], labels: Sequence[int], start: int, stop: int, whole: Sequence[int], at: int
) -> tuple[int, int]:
    """A stretch whose edges the processor has written otherwise: what is trained of it must still be there, once."""
    trained = [place for place in range(start, stop) if labels[place] != IGNORE]
    if not trained:
        return stop, at
    part = ids[trained[0] : stop]
    found = _find(part, whole, at)
    if found < 0 or _find(part, whole, found + 1) >= 0:
        raise DataError(
            "the processor writes text around pictures otherwise than the template, and where the tokens of the answer "
            "stand cannot be told", fix="put pictures before the first answer, each on a line of its own",
        )  # fmt: skip
    return trained[0], found
