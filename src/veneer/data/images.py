"""Pictures to pixels: by PIL and the model's own processor, which decides size, cropping and normalising.

| a picture | becomes |
| --- | --- |
| with one channel, a palette, 16 bits or CMYK | RGB, and it is said how many there were |
| partly transparent | RGB on black, and said |
| of another size than the others | resized by the processor, and said |
| that cannot be read | a problem of the data, with its file |

All files are opened before training begins, so that a broken one is not found in the second hour. What the processor
made of a picture is kept for the next epoch as long as there is room (KEPT_BYTES); beyond that, and where every epoch
shall see another view (`augment`), it is read again when its batch is made. A path in a table is meant from the table's
own folder, or from here.

| augment | a training picture is, each time that it is seen |
| --- | --- |
| none | itself |
| flip | itself or its mirror image |
| crop | a piece of 60 to 100 % of its area, three quarters to four thirds as wide as high; then flip |

The views are drawn from torch's generator, whose state is part of every checkpoint: a resumed run sees the same ones.
"""

from __future__ import annotations

import io
import math
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.data.encode import Encodings, finished
from veneer.data.labels import LabelSet
from veneer.data.lengths import Lengths
from veneer.data.types import Boxed, Encoded, Pictured
from veneer.errors import DataError
from veneer.extras import need

__all__ = ["AUGMENTS", "Kept", "encode_pictures", "in_colours", "looked_at", "name_of", "open_picture", "pixels_of"]

PLAIN = "RGB"
REPORTED = 256  # rows between two reports
KEPT_BYTES = 2 << 30  # of pixels in memory
LEAST_SHARE, LEAST_RATIO, MOST_RATIO = 0.6, 3 / 4, 4 / 3  # of a crop: its area, and its width by its height


def open_picture(example: Any) -> Any:
    """The picture as PIL has it, not read yet; raises DataError if there is none."""
    pil = need("PIL.Image", extra="vision", use="read pictures")
    image = example.image
    try:
        if isinstance(image, str):
            return pil.open(_place(image, example.where))
        if isinstance(image, bytes):
            return pil.open(io.BytesIO(image))
        return image if isinstance(image, pil.Image) else pil.fromarray(image)
    except FileNotFoundError:
        raise DataError("there is no such file", str(image)) from None
    except (OSError, ValueError, TypeError, AttributeError, pil.DecompressionBombError) as error:
        raise DataError(f"it cannot be read as a picture ({_short(error)})", name_of(example)) from None


def _place(path: str, where: str) -> Path:
    """Beside the table that names it, else as it stands."""
    found = Path(path).expanduser()
    beside = Path(where.rpartition(":")[0] or where).parent / found
    return beside if not found.is_absolute() and beside.is_file() else found


def name_of(example: Any) -> str:
    return example.image if isinstance(example.image, str) else example.where


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def in_colours(picture: Any) -> Any:
    """RGB, whatever the file has. Sixteen bits are scaled, for PIL itself would cut them off."""
    if picture.mode == PLAIN:
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":
        import numpy

        values = numpy.asarray(picture, dtype="float64")
        top = 65535 if values.max() > 255 else 255
        pil = need("PIL.Image", extra="vision", use="read pictures")
        picture = pil.fromarray((values.clip(0, top) * (255 / top)).round().astype("uint8"))
    if "A" in picture.mode or "transparency" in picture.info:
        pil = need("PIL.Image", extra="vision", use="read pictures")
        whole = picture.convert("RGBA")
        return pil.alpha_composite(pil.new("RGBA", whole.size, (0, 0, 0, 255)), whole).convert(PLAIN)
    return picture.convert(PLAIN)


@dataclass
class Kept:
    """Pixels that were made before, up to a number of bytes."""

    room: int = KEPT_BYTES
    held: dict[int, Any] = field(default_factory=dict)

    def put(self, number: int, pixels: Any) -> None:
        if pixels.nbytes <= self.room:
            self.room -= pixels.nbytes
            self.held[number] = pixels


@dataclass(frozen=True)
class Pixels:
    """What a sample gives when its batch is made."""

    example: Pictured | Boxed
    processor: Any
    number: int
    kept: Kept
    augment: str = "none"

    def __call__(self) -> Any:
        if (found := self.kept.held.get(self.number)) is not None:
            return found
        picture = AUGMENTS[self.augment](colours_of(self.example))
        found = pixels_of(self.processor, picture)
        if self.augment == "none":
            self.kept.put(self.number, found)
        return found


def colours_of(example: Any) -> Any:
    """The picture in colours, read now."""
    try:
        return in_colours(open_picture(example))
    except OSError as error:
        raise DataError(f"it can no longer be read ({_short(error)})", name_of(example)) from None


def pixels_of(processor: Any, picture: Any) -> Any:
    """What the model's processor makes of one picture: (channels, height, width)."""
    return processor(images=picture, return_tensors="pt")["pixel_values"][0].numpy()


# ------------------------------------------------------------------ other views of a picture


def _itself(picture: Any) -> Any:
    return picture


def _flipped(picture: Any) -> Any:
    pil = need("PIL.Image", extra="vision", use="read pictures")
    return picture.transpose(pil.Transpose.FLIP_LEFT_RIGHT) if _drawn(0, 1) < 0.5 else picture


def _cropped(picture: Any) -> Any:
    wide, high = picture.size
    share, ratio = _drawn(LEAST_SHARE, 1), math.exp(_drawn(math.log(LEAST_RATIO), math.log(MOST_RATIO)))
    w = max(1, min(wide, round((wide * high * share * ratio) ** 0.5)))
    h = max(1, min(high, round((wide * high * share / ratio) ** 0.5)))
    left, top = round(_drawn(0, wide - w)), round(_drawn(0, high - h))
    return _flipped(picture.crop((left, top, left + w, top + h)))


def _drawn(low: float, high: float) -> float:
    import torch

    return low + (high - low) * float(torch.rand(()))


AUGMENTS: dict[str, Callable[[Any], Any]] = {"none": _itself, "flip": _flipped, "crop": _cropped}


# ------------------------------------------------------------------ rows to samples


def encode_pictures(
    examples: Sequence[Pictured],
    processor: Any,
    labels: LabelSet,
    *,
    max_len: int | None = None,
    overlong: str = "drop",
    skip_bad: bool = False,
    augment: str = "none",
    report: Callable[[int, int], None] | None = None,
) -> Encodings:
    """One sample a picture. None is too long, so `max_len` and `overlong` decide nothing."""
    kept = Kept()
    counts: Counter[str] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    problems: list[str] = []
    samples = []
    for number, example in enumerate(examples, 1):
        try:
            label = labels.encode(example.label)
            size = looked_at(example, counts)
        except DataError as error:
            problems.append(f"{error.where or example.where}: {error.what}")
            continue
        sizes[size] += 1
        values = label if isinstance(label, list) else [label]
        pixels = Pixels(example, processor, number, kept, augment)
        samples.append(Encoded(array("i", [0]), values, "row", where=example.where, id=example.id, pixels=pixels))
        if report and (number % REPORTED == 0 or number == len(examples)):
            report(number, len(examples))
    counts["resized"] = len(samples) - max(sizes.values(), default=0)
    return finished(samples, len(examples), Lengths(array("i", [1] * len(samples))), counts, problems, None, skip_bad)


def looked_at(example: Any, counts: Counter[str]) -> tuple[int, int]:
    """Read one picture to its end, so that a file that is cut short is found now."""
    picture = open_picture(example)
    try:
        picture.load()
    except (OSError, ValueError, SyntaxError) as error:
        _close(picture, example)
        raise DataError(f"the picture is damaged ({_short(error)})", name_of(example)) from None
    counts["see-through"] += picture.mode != "LAB" and is_see_through(picture)
    _close(picture, example)
    if picture.mode == "LAB":
        raise DataError("it is in LAB colours, which cannot be turned to RGB here; save it as RGB", name_of(example))
    if min(picture.size) < 1:
        raise DataError("the picture is empty", name_of(example))
    counts["grey"] += picture.mode in ("1", "L", "LA", "I", "F") or picture.mode.startswith("I;")
    counts["inks"] += picture.mode in ("P", "PA", "CMYK", "YCbCr", "HSV")
    return picture.size


def is_see_through(picture: Any) -> bool:
    """Whether something shows through; many pictures have a layer for that in which nothing does."""
    if "A" in picture.mode.upper():
        return picture.getchannel(picture.getbands()[-1]).getextrema()[0] < 255
    return "transparency" in picture.info


def _close(picture: Any, example: Any) -> None:
    """A file that was opened here; a picture that came with its row stays as it is."""
    if isinstance(example.image, str | bytes):
        picture.close()
