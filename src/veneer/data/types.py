"""What flows through the data layer, as plain values. Nothing here imports torch.

    file --read--> Row --formats--> Example --template, mask, encode--> Encoded --pack, loader--> Batch (in batch.py)

| kind of row | class | trained by |
| --- | --- | --- |
| alpaca, ShareGPT, messages, prompt/completion as messages | `Chat` | causal LM |
| prompt/completion as strings | `Completion` | causal LM, seq2seq |
| text | `Text` | causal LM |
| input_ids (and labels) | `Tokens` | causal LM |
| text, label | `Labelled` | sequence classification |
| tokens, tags | `Tagged` | token classification |
| source, target | `Pair` | seq2seq |
| image, label | `Pictured` | image classification |
| image, boxes and labels; COCO's JSON | `Boxed` | object detection |
| messages and images; image, question, answer | `Illustrated` | image and text |
| image, caption | `Captioned` | diffusion |

Examples are frozen and hold text only; every one knows the place it came from, so that a complaint made at any later
stage still names file and line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, Required, TypeAlias, TypedDict, runtime_checkable

__all__ = [
    "IGNORE",
    "Box",
    "Boxed",
    "Captioned",
    "Chat",
    "Completion",
    "Encoded",
    "Example",
    "Ids",
    "Illustrated",
    "Label",
    "Labelled",
    "LossOn",
    "Message",
    "Overlong",
    "Pair",
    "Pictured",
    "Row",
    "Tagged",
    "Text",
    "Tokenizer",
    "Tokens",
]

IGNORE = -100  # the label that no loss counts (torch's ignore_index)

Box: TypeAlias = tuple[float, float, float, float]
Ids: TypeAlias = Sequence[int]  # in practice array("i"): four bytes a token instead of forty
Label: TypeAlias = str | int | float | list[str] | list[int]
LossOn: TypeAlias = Literal["all", "completions", "assistant", "last"]
Overlong: TypeAlias = Literal["drop", "truncate", "split", "error"]


class Message(TypedDict, total=False):
    """One turn, in the very form that chat templates read; `role` is system, user, assistant or tool.

    `weight` 0 keeps an assistant turn as context that is not trained (OpenAI's convention).
    """

    role: Required[str]
    content: Required[str]
    reasoning_content: str
    reasoning: str
    thinking: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str
    weight: int


@dataclass(frozen=True)
class Row:
    """One row as it stands in a file, before anything is known about its meaning. `where` is "file:line", `under` the
    folder of the data, which may move with all that lies in it."""

    fields: Mapping[str, Any]
    where: str
    under: str = ""


@dataclass(frozen=True, kw_only=True)
class _Example:
    where: str = ""
    under: str = ""

    @cached_property
    def id(self) -> str:
        """A hash of the content: equal for equal rows, whatever file and line they stand in."""
        content = {name: value for name, value in vars(self).items() if name not in ("where", "under", "id")}
        content["kind"] = type(self).__name__
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Chat(_Example):
    """A conversation. Turns before `prompt_turns` are the prompt of a prompt/completion row: context, never trained
    unless the loss is on everything."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    prompt_turns: int = 0


@dataclass(frozen=True)
class Completion(_Example):
    """Text that follows text; no template is applied, the end-of-text token is appended."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text(_Example):
    text: str


@dataclass(frozen=True)
class Tokens(_Example):
    """Tokenised elsewhere. Without labels every token is trained."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Labelled(_Example):
    """A text and its class; a number for regression; a list of classes for several at once."""

    text: str
    label: Label
    pair: str | None = None


@dataclass(frozen=True)
class Tagged(_Example):
    """Words and one tag for each."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...] | tuple[int, ...]


@dataclass(frozen=True)
class Pair(_Example):
    source: str
    target: str


@dataclass(frozen=True)
class Pictured(_Example):
    """A picture and its class: the path of a file, or what a data set holds (bytes, or an image of PIL or numpy)."""

    image: Any
    label: Label

    @cached_property
    def id(self) -> str:
        """A hash of the label and of the path in the folder of the data, or of the bytes where there is no file."""
        return _hash_of(f"{self.label}\0", self.image, self.under)


@dataclass(frozen=True)
class Boxed(_Example):
    """A picture, boxes in its pixels as x0, y0, x1, y1, and the class of each; without boxes there is nothing on it."""

    image: Any
    boxes: tuple[Box, ...]
    labels: tuple[str, ...]

    @cached_property
    def id(self) -> str:
        return _hash_of(f"{self.boxes}{self.labels}\0", self.image, self.under)


@dataclass(frozen=True)
class Illustrated(_Example):
    """A conversation with pictures, each of which is one character of its texts (`data.illustrated.MARK`)."""

    chat: Chat
    images: tuple[Any, ...]

    @cached_property
    def id(self) -> str:
        told = f"{self.chat.messages}\0"
        for image in self.images:
            told += _hash_of("", image, self.under)
        return _hash_of(told, "")


def _hash_of(said: str, image: Any, under: str = "") -> str:
    """Of a file what the folder of the data is called, and its place in there: it is the same picture wherever that
    folder is moved, and not the one of this name in another."""
    if isinstance(image, str):
        inside = under and Path(image).is_relative_to(under)
        place = f"{Path(os.path.abspath(under)).name}/{Path(image).relative_to(under).as_posix()}" if inside else image
        image = place.encode()
    data = image if isinstance(image, bytes) else image.tobytes()
    return hashlib.sha256(said.encode() + data).hexdigest()[:16]


@dataclass(frozen=True)
class Captioned(_Example):
    """A picture and the words for it; None where nothing says them. `folder` is the name of the folder it lies in."""

    image: Any
    caption: str | None = None
    folder: str = ""

    @cached_property
    def id(self) -> str:
        return _hash_of(f"{self.caption}\0", self.image, self.under)


Example: TypeAlias = (
    Chat | Completion | Text | Tokens | Labelled | Tagged | Pair | Pictured | Boxed | Illustrated | Captioned
)


@dataclass(frozen=True)
class Encoded:
    """One row of token ids with its labels, ready to be batched.

    `layout` says what `labels` are: "token", one per input token (causal LM: NOT shifted, and labels[0] is always
    IGNORE since nothing predicts the first token; token classification); "target", a sequence of its own (seq2seq
    decoder); "row", one value for the row, or one per class when several may hold; "boxes", the class of each of
    `boxes`, which are shares of the picture: centre x, centre y, width, height.

    `segments` are the lengths of the samples inside: one, unless the row was packed.
    """

    input_ids: Ids
    labels: Ids | Sequence[float]
    layout: Literal["token", "target", "row", "boxes"] = "token"
    segments: tuple[int, ...] = ()
    where: str = ""
    id: str = ""  # of the example it came from
    token_type_ids: Ids | None = None  # BERT's, for a pair of texts
    pixels: Callable[[], Any] | None = None  # gives the picture that takes the place of tokens, read when it is needed
    boxes: tuple[Box, ...] = ()
    extras: Callable[[], dict[str, Any]] | None = None  # gives what goes to the model beside the tokens: pictures
    shape: tuple[int, ...] = ()  # of the picture, where a batch should hold pictures of one shape

    def __post_init__(self) -> None:
        if not self.segments:
            object.__setattr__(self, "segments", (len(self.input_ids),))

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def trained_tokens(self) -> int:
        """Labels that the loss counts: the divisor of a mean. A "row" layout counts rows, no boxes count as one."""
        if self.layout == "boxes":
            return max(1, len(self.labels))
        return 1 if self.layout == "row" else sum(label != IGNORE for label in self.labels)

    @property
    def position_ids(self) -> Iterator[int]:
        """Positions, from 0 again at each packed sample."""
        return (position for length in self.segments for position in range(length))


@runtime_checkable
class Tokenizer(Protocol):
    """The part of transformers' tokenizers that we use."""

    bos_token: Any
    eos_token: Any
    chat_template: Any

    def __call__(self, text: Any, **options: Any) -> Any: ...
    def decode(self, token_ids: Any, **options: Any) -> Any: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...
