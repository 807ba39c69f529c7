"""What a row means. One entry per format: the fields it needs, by all the names people give them, and how to read it.

| format | fields ("?": may be missing) |
| --- | --- |
| messages | messages [{role, content, tool_calls?}], tools? |
| sharegpt | conversations [{from, value}], system?, tools? |
| alpaca | instruction, input?, output, system?, history? |
| prompt/completion | prompt, completion: both text, or both lists of messages |
| tokenised | input_ids, labels? |
| pairs (seq2seq) | source, target |
| tagged (token classification) | tokens, tags |
| labelled (sequence classification) | text, label, pair? |
| text | text |
| objects, boxes, box table (object detection) | image, objects; image, boxes, labels; image, x0, y0, x1, y1, label |
| illustrated, picture questions (image and text) | messages with parts, images?; image, question, answer |
| image (image classification) | image (a path, or what a data set holds), label |
| captioned (diffusion) | image, text? |

Detection takes the first format in this file's order that half of the rows fit, and every row is then held to it: a
format found by majority alone would call {text, label} rows plain text as soon as one label is missing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from veneer.core.registry import Registry, near
from veneer.data.boxes import corners, joined, of_objects
from veneer.data.illustrated import with_pictures
from veneer.data.turns import RowError, conversation, json_list, kind_of, tool_list
from veneer.data.types import (
    Boxed,
    Captioned,
    Chat,
    Completion,
    Example,
    Illustrated,
    Labelled,
    Message,
    Pair,
    Pictured,
    Row,
    Tagged,
    Text,
    Tokens,
)
from veneer.errors import DataError

__all__ = ["FORMATS", "Fields", "Format", "RowError", "detect", "example_of"]

ANSWERS = "completion|response|answer|output"


class Fields:
    """A row's fields by their standard names; complaints use the names that stand in the file."""

    def __init__(self, row: Mapping[str, Any], names: Mapping[str, str]) -> None:
        self.row, self.names = row, names

    def name(self, field: str) -> str:
        return self.names.get(field, field)

    def value(self, field: str) -> Any:
        return self.row.get(self.name(field))

    def has(self, field: str) -> bool:
        return not _absent(self.value(field))

    def text(self, field: str, *, may_be_empty: bool = False) -> str:
        value = self.value(field)
        if self.name(field) not in self.row:
            raise RowError(f"field {self.name(field)!r} is missing (there is: {', '.join(self.row) or 'nothing'})")
        if not isinstance(value, str):
            raise RowError(f"field {self.name(field)!r} is {kind_of(value)}; text is expected")
        if not may_be_empty and not value.strip():
            raise RowError(f"field {self.name(field)!r} is empty")
        return value

    def optional_text(self, field: str) -> str:
        return self.text(field, may_be_empty=True) if self.has(field) else ""

    def list(self, field: str) -> list[Any]:
        return json_list(self.value(field), self.name(field))


@dataclass(frozen=True)
class Format:
    """`needs` and `may` hold, per standard field, the column names that are taken for it, the standard one first.
    `join` makes examples of rows where several rows are one."""

    name: str
    kind: type[Any]
    needs: tuple[tuple[str, ...], ...]
    may: tuple[tuple[str, ...], ...]
    parse: Callable[[Fields], Example]
    join: Callable[[Iterable[Any]], Iterable[Any]] = tuple

    @property
    def fields(self) -> str:
        """
        >>> FORMATS["alpaca"].fields
        'instruction, output, input?, system?, history?'
        """
        return ", ".join([*(names[0] for names in self.needs), *(f"{names[0]}?" for names in self.may)])

    def names_in(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
        """Standard name -> name in this row, for the fields that are there."""
        found = {}
        for names in self.needs + self.may:
            accepted = (columns[names[0]],) if names[0] in columns else names
            present = [name for name in accepted if not _absent(row.get(name))]
            found.update({names[0]: present[0]} if present else {})
        return found

    def fits(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
        return {names[0] for names in self.needs} <= self.names_in(row, columns).keys()


FORMATS: Registry[Format] = Registry("data format")


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _format(
    name: str, kind: type[Any], needs: str, may: str = "", join: Callable[[Iterable[Any]], Iterable[Any]] = tuple
) -> Callable[[Callable[[Fields], Example]], Any]:
    def add(parse: Callable[[Fields], Example]) -> Callable[[Fields], Example]:
        groups = [tuple(tuple(names.split("|")) for names in part.split()) for part in (needs, may)]
        FORMATS[name] = Format(name, kind, groups[0], groups[1], parse, join)
        return parse

    return add


def detect(rows: Sequence[Row], columns: Mapping[str, str], kinds: tuple[type[Any], ...] | None = None) -> Format:
    """The format of these rows; `kinds` are the classes of example that the task can use."""
    shapes = Counter(tuple(name for name, value in row.fields.items() if not _absent(value)) for row in rows)
    usable = [form for form in FORMATS.values() if kinds is None or form.kind in (*kinds, _Refused)]
    if not any(_share(form, shapes, columns) for form in usable):  # the columns may be there, and hold nothing
        shapes = Counter(tuple(row.fields) for row in rows)
    fitting = [(form, _share(form, shapes, columns)) for form in usable]
    chosen = next((form for form, share in fitting if share >= 0.5), max(fitting, key=lambda pair: pair[1])[0])
    if _share(chosen, shapes, columns) == 0:
        _unknown(shapes, columns, usable, rows)
    if chosen.kind is _Refused:
        chosen.parse(Fields({}, {}))
    return chosen


def _share(form: Format, shapes: Counter[tuple[str, ...]], columns: Mapping[str, str]) -> float:
    fitting = sum(count for shape, count in shapes.items() if form.fits(dict.fromkeys(shape, ""), columns))
    return fitting / max(shapes.total(), 1)


def _unknown(shapes: Counter[tuple[str, ...]], columns: Mapping[str, str], usable: list[Format], rows: Any) -> NoReturn:
    present = list(dict.fromkeys(name for shape in shapes for name in shape))
    known = [form for form in usable if form.kind is not _Refused]
    wanted = [name for form in known for names in form.needs for name in names]
    gone = [name for name in columns.values() if name not in present]
    raise DataError(
        f"no known format has the columns {', '.join(present) or '(none)'}",
        where=rows[0].where if rows else None,
        fix="rename the columns or map them, such as columns={'prompt': 'question', 'completion': 'reply'}. Known: "
        + "; ".join(f"{form.name} {{{form.fields}}}" for form in known),
        problems=[
            *(f"the mapped column {name!r} is not there.{near(name, present)}" for name in gone),
            *(f"column {name!r} is not known.{near(name, wanted)}" for name in present if _is_near_miss(name, wanted)),
            *(f"for {form.name} rows {missing} is missing" for form in known if (missing := _missing(form, present))),
        ],
    )


def _is_near_miss(name: str, wanted: list[str]) -> bool:
    return name not in wanted and bool(near(name, wanted))


def _missing(form: Format, present: list[str]) -> str:
    """What a format of which half of the fields are there still lacks; nothing for the rest."""
    lacking = [names for names in form.needs if not set(names).intersection(present)]
    return ", ".join(" or ".join(names) for names in lacking) if 0 < 2 * len(lacking) <= len(form.needs) else ""


def example_of(row: Row, form: Format, columns: Mapping[str, str]) -> Example:
    """The example of one row, or a RowError."""
    standard = {names[0]: names[0] for names in form.needs} | dict(columns)
    return replace(
        form.parse(Fields(row.fields, standard | form.names_in(row.fields, columns))), where=row.where, under=row.under
    )


# Refused, with a reason


class _Refused:
    """The kind of formats that are recognised in order to be refused clearly."""


@_format("preference", _Refused, "chosen rejected")
def _preference(fields: Fields) -> NoReturn:
    raise DataError(
        "these are preference rows (chosen, rejected), which need preference training (DPO, ORPO); it is not built yet",
        fix="to train on the preferred answers alone: format='prompt/completion', columns={'completion': 'chosen'}",
    )


@_format("unpaired preference", _Refused, "prompt completion label")
def _unpaired(fields: Fields) -> NoReturn:
    raise DataError(
        "these are unpaired preference rows (prompt, completion, label), which need KTO; it is not built yet",
        fix="keep the rows with a good label, leave the label column out, and they are prompt/completion rows",
    )


# Pictures and words: before the formats of words alone, which would leave the pictures out


IMAGE = "image|img|picture|path|file|file_name|filename|filepath|image_path"
LABEL = "label|labels|class|category|target|fine_label"
TURNS = "messages|conversations|conversation"


@_format("illustrated", Illustrated, f"{TURNS} images|image", "system")
def _illustrated(fields: Fields) -> Illustrated:
    value, name = fields.value("messages"), fields.name("messages")
    messages, images = with_pictures(value, name, _images(fields) if fields.has("images") else ())
    chat = _chat(_with_system(fields.optional_text("system"), messages), fields)
    return Illustrated(chat, images, where=chat.where)


QUESTIONS = "question|prompt|query|instruction"


@_format("picture questions", Illustrated, f"images|{IMAGE} {QUESTIONS} answer|caption|{ANSWERS}", "system")
def _picture_question(fields: Fields) -> Illustrated:
    turns = [
        {"role": "user", "content": fields.text("question")},
        {"role": "assistant", "content": fields.text("answer")},
    ]
    messages, images = with_pictures(turns, "question", _images(fields))
    return Illustrated(_chat(_with_system(fields.optional_text("system"), messages), fields), images)


def _images(fields: Fields) -> tuple[Any, ...]:
    value = fields.value("images")
    held = value if isinstance(value, list | tuple) else [value]
    return tuple(_picture(each, fields.name("images")) for each in held)


# Text to be continued


@_format("tokenised", Tokens, "input_ids", "labels")
def _tokenised(fields: Fields) -> Tokens:
    ids = _integers(fields, "input_ids")
    if not fields.has("labels"):
        return Tokens(ids)
    labels = _integers(fields, "labels")
    if len(labels) != len(ids):
        raise RowError(f"{len(ids)} input_ids but {len(labels)} labels")
    return Tokens(ids, labels)


def _integers(fields: Fields, field: str) -> tuple[int, ...]:
    values = fields.list(field)
    if not values:
        raise RowError(f"field {fields.name(field)!r} is empty")
    wrong = next((value for value in values if not isinstance(value, int) or isinstance(value, bool)), None)
    if wrong is not None:
        raise RowError(f"field {fields.name(field)!r} holds {kind_of(wrong)}; token ids are integers")
    return tuple(values)


@_format("messages", Chat, "messages|dialog|dialogue", "tools|functions system")
def _messages(fields: Fields) -> Chat:
    messages = conversation(fields.value("messages"), fields.name("messages"))
    return _chat(_with_system(fields.optional_text("system"), messages), fields)


@_format("sharegpt", Chat, "conversations|conversation", "tools|functions system")
def _sharegpt(fields: Fields) -> Chat:
    messages = conversation(fields.value("conversations"), fields.name("conversations"))
    return _chat(_with_system(fields.optional_text("system"), messages), fields)


@_format("alpaca", Chat, "instruction output|response|answer|completion", "input|context system history")
def _alpaca(fields: Fields) -> Chat:
    instruction, given = fields.text("instruction", may_be_empty=True), fields.optional_text("input")
    question = "\n".join(part for part in (instruction, given) if part.strip())
    if not question:
        raise RowError(f"field {fields.name('instruction')!r} is empty")
    history = [said for pair in (fields.list("history") if fields.has("history") else []) for said in _exchange(pair)]
    messages = [*history, *_exchange([question, fields.text("output")])]
    return _chat(_with_system(fields.optional_text("system"), tuple(messages)), fields)


def _exchange(pair: Any) -> list[Message]:
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
        raise RowError("field 'history' is a list of [question, answer] pairs of texts")
    return [Message(role="user", content=pair[0]), Message(role="assistant", content=pair[1])]


def _with_system(system: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not system.strip():
        return messages
    if messages[0]["role"] == "system":
        raise RowError("the system prompt is given twice: as a field and as the first turn")
    return (Message(role="system", content=system), *messages)


def _chat(messages: tuple[Message, ...], fields: Fields, prompt_turns: int = 0) -> Chat:
    if not any(message["role"] == "assistant" for message in messages[prompt_turns:]):
        raise RowError("no assistant turn, so there is nothing to learn")
    tools = tool_list(fields.value("tools"), fields.name("tools")) if fields.has("tools") else ()
    return Chat(messages, tools, prompt_turns)


@_format("prompt/completion", Completion, f"prompt|question|query|input {ANSWERS}", "tools|functions")
def _completion(fields: Fields) -> Completion | Chat:
    if not isinstance(fields.value("completion"), str) and not isinstance(fields.value("prompt"), str):
        prompt = conversation(fields.value("prompt"), fields.name("prompt"))
        completion = conversation(fields.value("completion"), fields.name("completion"))
        return _chat(prompt + completion, fields, len(prompt))
    return Completion(fields.text("prompt", may_be_empty=True), fields.text("completion"))


# Other tasks


@_format("pairs", Pair, f"source|prompt|question|document|article|input|text target|summary|{ANSWERS}")
def _pair(fields: Fields) -> Pair:
    return Pair(fields.text("source"), fields.text("target"))


@_format("tagged", Tagged, "tokens|words tags|ner_tags|pos_tags|labels")
def _tagged(fields: Fields) -> Tagged:
    tokens, tags = _words(fields, "tokens"), _words(fields, "tags")
    if len(tokens) != len(tags):
        raise RowError(f"{len(tokens)} tokens but {len(tags)} tags")
    if not tokens:
        raise RowError(f"field {fields.name('tokens')!r} is empty")
    if wrong := [token for token in tokens if not isinstance(token, str)]:
        raise RowError(f"field {fields.name('tokens')!r} holds {kind_of(wrong[0])}; texts are expected")
    if len({type(tag) for tag in tags}) > 1 or not isinstance(tags[0], str | int):
        raise RowError(f"field {fields.name('tags')!r} mixes kinds; all tags are texts, or all are integers")
    return Tagged(tuple(tokens), tuple(tags))


def _words(fields: Fields, field: str) -> list[Any]:
    value = fields.value(field)
    return value.split() if isinstance(value, str) and not value.startswith("[") else fields.list(field)


@_format(
    "labelled",
    Labelled,
    "text|sentence|sentence1|premise|content|review|question1 label|labels|class|category|sentiment|score",
    "pair|text_pair|sentence2|hypothesis|question2",
)
def _labelled(fields: Fields) -> Labelled:
    pair = fields.text("pair") if fields.has("pair") else None
    return Labelled(fields.text("text"), _label(fields), pair)


def _label(fields: Fields) -> Any:
    value = fields.value("label")
    if _absent(value) or (isinstance(value, str) and not value.strip()):
        raise RowError(f"field {fields.name('label')!r} is {'empty' if value == '' else kind_of(value)}")
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int | float | list):
        raise RowError(f"field {fields.name('label')!r} is {kind_of(value)}; a class, a number or a list is expected")
    return value.strip() if isinstance(value, str) else value


@_format("objects", Boxed, f"{IMAGE} objects|annotations")
def _objects(fields: Fields) -> Boxed:
    return Boxed(_image(fields), *of_objects(fields.value("objects"), fields.name("objects")))


@_format("boxes", Boxed, f"{IMAGE} boxes|bboxes labels|label|classes|categories")
def _boxes(fields: Fields) -> Boxed:
    boxes, labels = fields.list("boxes"), fields.list("labels")
    if len(boxes) != len(labels):
        raise RowError(f"{len(boxes)} boxes but {len(labels)} labels")
    return Boxed(_image(fields), corners(boxes, "box"), tuple(map(str, labels)))


CORNERS = ("x0|xmin|x_min|left", "y0|ymin|y_min|top", "x1|xmax|x_max|right", "y1|ymax|y_max|bottom")


@_format("box table", Boxed, f"{IMAGE} {' '.join(CORNERS)} label|class|category|name", join=joined)
def _box(fields: Fields) -> Boxed:
    values = [fields.value(name.partition("|")[0]) for name in CORNERS]
    return Boxed(_image(fields), corners([values], "box"), (str(_label(fields)),))


def _image(fields: Fields) -> Any:
    return _picture(fields.value("image"), fields.name("image"))


def _picture(value: Any, field: str) -> Any:
    if isinstance(value, Mapping):  # as `datasets` keeps pictures that it has not decoded
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes) and not hasattr(value, "tobytes"):
        raise RowError(f"field {field!r} is {kind_of(value)}; a path or an image is expected")
    if isinstance(value, str | bytes) and not value.strip():
        raise RowError(f"field {field!r} is empty")
    return value


@_format("image", Pictured, f"{IMAGE} {LABEL}")
def _pictured(fields: Fields) -> Pictured:
    return Pictured(_image(fields), _label(fields))


@_format("captioned", Captioned, IMAGE, f"text|caption|prompt|description {LABEL}")
def _captioned(fields: Fields) -> Captioned:
    """The class of a picture is no caption by itself: whether it may stand for one is the task's to say."""
    caption = " ".join(fields.optional_text("text").split())
    folder = fields.value("label")
    return Captioned(_image(fields), caption or None, folder if isinstance(folder, str) else "")


_format("illustrated parts", Illustrated, TURNS, "system")(_illustrated)  # pictures in the turns themselves, or none


@_format("text", Text, "text|content|document")
def _text(fields: Fields) -> Text:
    return Text(fields.text("text"))
