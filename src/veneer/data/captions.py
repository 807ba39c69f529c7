"""Pictures with words to samples: which caption each has, how large it will be, how often it is seen.

| a caption comes from | as |
| --- | --- |
| the table that names the picture | its column text, caption or prompt |
| `x.txt` (or `x.caption`) beside `x.jpg` | the whole text |
| the name of the folder | `cats` -> cats; kohya's `10_my dog` -> my dog, and each picture counts ten times |

Which of them hold is said by `captions`:

    auto       files and tables where one picture has such a caption, and then every picture must; else folder names,
               where there are several or kohya's
    files      files and tables alone
    folders    the same, and the folder's name where a picture has neither
    none       the same as files, and no words at all where there are none
    other      one text for all pictures, such as "a photo of [trigger] dog"

`[trigger]` in a caption becomes the trigger word. A picture that is left without words where words are wanted is a
problem of the data, listed with all others.

Pictures keep their proportions: each goes to the bucket that is nearest to its own shape, of those whose sides are
multiples of what the model needs and whose area is no more than that of the square. What stands over is cut off evenly.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.data.encode import Encodings, finished
from veneer.data.images import in_colours, looked_at, name_of, open_picture
from veneer.data.lengths import Lengths
from veneer.data.read import CAPTIONS
from veneer.data.types import Captioned, Encoded
from veneer.errors import ConfigError, DataError
from veneer.extras import need

__all__ = ["TRIGGER", "WAYS", "Canvas", "buckets", "encode_captioned", "nearest", "place_trigger"]

WAYS = ("auto", "files", "folders", "none")
TRIGGER = "[trigger]"
REPEATS = re.compile(r"(\d+)_(.+)")
REPORTED = 256  # pictures between two reports
WIDEST = 2.0  # the sides of a bucket have at most this ratio


@dataclass(frozen=True)
class Canvas:
    """One picture as it will be trained: its words, the size it is brought to, and how much its loss counts."""

    example: Captioned
    caption: str
    size: tuple[int, int]  # width, height
    original: tuple[int, int]
    weight: float = 1.0

    @property
    def scale(self) -> float:
        """From the file's pixels to ours: the picture covers the canvas."""
        return max(mine / own for mine, own in zip(self.size, self.original, strict=True))

    @property
    def crop(self) -> tuple[int, int]:
        """Left and top of what is kept, in pixels of the resized picture."""
        width, height = (round(side * self.scale) for side in self.original)
        return (width - self.size[0]) // 2, (height - self.size[1]) // 2

    def __call__(self) -> Any:
        """Values in -1 ... 1 as (channels, height, width)."""
        import numpy

        pil = need("PIL.Image", extra="diffusion", use="read pictures")
        try:
            picture = in_colours(open_picture(self.example))
        except OSError as error:
            raise DataError(f"it can no longer be read ({error})", name_of(self.example)) from None
        picture = picture.resize([round(side * self.scale) for side in picture.size], pil.LANCZOS)
        left, top = self.crop
        picture = picture.crop((left, top, left + self.size[0], top + self.size[1]))
        return numpy.asarray(picture, dtype="float32").transpose(2, 0, 1) / 127.5 - 1


# ---------------------------------------------------------------- sizes


def buckets(side: int, step: int, *, square: bool = False) -> tuple[tuple[int, int], ...]:
    """Widths and heights in multiples of `step`, of no more than side x side pixels.

    >>> buckets(512, 64)[:3], buckets(512, 64, square=True)
    (((320, 704), (384, 640), (448, 576)), ((512, 512),))
    """
    if side % step:
        fix = f"choose {side // step * step or step} or {(side // step + 1) * step}"
        raise ConfigError(f"resolution {side} is no multiple of {step}, which this model needs", "resolution", fix)
    if square:
        return ((side, side),)
    found = set()
    for one in range(step, side + 1, step):
        other = min(side * side // one // step * step, math.floor(one * WIDEST * 1.1 / step) * step)
        if one <= other <= one * WIDEST * 1.1 and one * other > (side * side) * 0.7:
            found |= {(one, other), (other, one)}
    return tuple(sorted(found | {(side, side)}))


def nearest(size: tuple[int, int], known: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket of the most similar shape; of equals the largest.

    >>> nearest((300, 200), [(512, 512), (640, 384), (384, 640)])
    (640, 384)
    """
    shape = math.log(size[0] / size[1])
    return min(known, key=lambda each: (abs(math.log(each[0] / each[1]) - shape), -each[0] * each[1]))


# ---------------------------------------------------------------- words


def place_trigger(caption: str, trigger: str | None) -> str:
    """The caption with the trigger word in its place.

    >>> place_trigger("a photo of [trigger] dog", "sks")
    'a photo of sks dog'
    """
    if TRIGGER in caption and trigger is None:
        raise DataError(f"{caption!r} has a place for a trigger word, and none is set (trigger: WORD, --trigger WORD)")
    return caption.replace(TRIGGER, trigger or "")


def _folder_of(example: Captioned) -> tuple[int, str]:
    """(repeats, name) of the folder that a picture lies in."""
    found = REPEATS.fullmatch(example.folder)
    return (int(found[1]), found[2].strip()) if found else (1, example.folder)


def _rule(how: str, examples: Sequence[Captioned]) -> Callable[[Captioned], str | None]:
    """A picture's words, or None where it has none that count."""
    if how not in WAYS:
        return lambda example: how
    if how == "auto":
        names = {example.folder for example in examples}
        said = len(names) > 1 or any(REPEATS.fullmatch(name) for name in names)  # a single folder is only a place
        how = "folders" if said and not any(example.caption for example in examples) else "files"
    if how == "folders":
        return lambda example: example.caption or _folder_of(example)[1] or None
    return lambda example: example.caption or ("" if how == "none" else None)


# ---------------------------------------------------------------- samples


def encode_captioned(
    examples: Sequence[Captioned],
    sizes: Sequence[tuple[int, int]],
    *,
    captions: str = "auto",
    trigger: str | None = None,
    weight: float = 1.0,
    skip_bad: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> Encodings:
    """One sample for each time that a picture is seen in an epoch. All pictures are opened, so that a broken one is
    found now; no pixels are kept."""
    words = _rule(captions, examples)
    counts: Counter[str] = Counter()
    problems: list[str] = []
    samples: list[Encoded] = []
    for number, example in enumerate(examples, 1):
        try:
            canvas = _canvas(example, words(example), trigger, sizes, counts, weight)
        except DataError as error:
            problems.append(f"{error.where or name_of(example)}: {error.what}")
            continue
        samples += _repeated(canvas, counts)
        if report and (number % REPORTED == 0 or number == len(examples)):
            report(number, len(examples))
    counts["shapes"] = len(found) if len(found := {sample.shape for sample in samples}) > 1 else 0
    return finished(samples, len(examples), Lengths(array("i", [1] * len(samples))), counts, problems, None, skip_bad)


def _canvas(
    example: Captioned,
    caption: str | None,
    trigger: str | None,
    sizes: Sequence[tuple[int, int]],
    counts: Counter[str],
    weight: float,
) -> Canvas:
    original = looked_at(example, counts)
    if caption is None:
        beside = "no text file of its name beside it" if isinstance(example.image, str) else "no column with its text"
        if (empty := _text_beside(example)) is not None:
            beside = f"{empty} is empty"
        fix = "write one; or captions=folders takes the folder's name, captions=none trains it without words"
        raise DataError(f"it has no caption: {beside} ({fix})", name_of(example))
    size = nearest(original, sizes)
    canvas = Canvas(example, place_trigger(caption, trigger), size, original, weight)
    counts["enlarged"] += canvas.scale > 1
    counts["wordless"] += not caption
    counts["foldernames"] += not example.caption and caption == _folder_of(example)[1]
    return canvas


def _text_beside(example: Captioned) -> str | None:
    """The name of the text file that lies beside a picture."""
    if not isinstance(example.image, str):
        return None
    files = (Path(example.image).with_suffix(suffix) for suffix in CAPTIONS)
    return next((file.name for file in files if file.is_file()), None)


def _repeated(canvas: Canvas, counts: Counter[str]) -> Iterator[Encoded]:
    example, (repeats, _) = canvas.example, _folder_of(canvas.example)
    counts["repeats"] += repeats - 1
    one = Encoded(
        array("i", [0]), [1.0], "row", where=name_of(example), id=example.id, pixels=canvas, shape=canvas.size
    )
    return (one for _ in range(repeats))
