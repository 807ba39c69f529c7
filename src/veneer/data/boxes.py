"""Pictures with boxes, for detection: the rows people have, what a box may be, and samples.

| row | boxes are |
| --- | --- |
| COCO's JSON (`images`, `annotations`, `categories`) | `bbox`: x, y, width, height; crowds (`iscrowd`) are left out |
| image, objects {bbox, category} or [{bbox, category}] | the same, as data sets of a hub have them |
| image, boxes, labels | x0, y0, x1, y1 |
| image, x0, y0, x1, y1, label: a table with a line for each box | x0, y0, x1, y1; the lines of a picture are joined |

All in pixels of the picture. A box without an area, with a corner outside the picture (by more than a pixel, which is
what rounding leaves) or of an unknown class is a problem of its row; all of them are told before training begins.

The decision a reader would question: every picture is brought to one size, that of the processor (a square of its
shortest edge where it names no height), instead of being padded to the largest of a batch. Boxes are kept as shares of
the picture, so they stay true, and what a picture looks like does not depend on its neighbours in a batch.
"""

from __future__ import annotations

import copy
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.data.encode import Encodings, finished
from veneer.data.images import Kept, Pixels, looked_at
from veneer.data.labels import LabelSet
from veneer.data.lengths import Lengths
from veneer.data.turns import RowError, json_list, kind_of
from veneer.data.types import Box, Boxed, Encoded, Row
from veneer.errors import DataError

__all__ = ["corners", "encode_boxes", "from_coco", "is_coco", "joined", "of_objects", "of_one_size"]

SLACK = 1.0  # pixels by which a corner may lie outside: coordinates are rounded in many ways
CLASS_NAMES = ("category", "categories", "category_id", "label", "labels", "class", "classes", "name")
USUAL_SIZE = 512


# ------------------------------------------------------------------ COCO's JSON


def is_coco(value: Mapping[str, Any]) -> bool:
    return all(isinstance(value.get(name), list) for name in ("images", "annotations"))


def from_coco(value: Mapping[str, Any], path: Path) -> Iterator[Row | tuple[str, str]]:
    """A row for each picture, or (where, what) of an annotation that belongs to none."""
    names = {each.get("id"): each.get("name") for each in value.get("categories") or ()}
    held: dict[Any, list[dict[str, Any]]] = {each.get("id"): [] for each in value["images"]}
    for number, each in enumerate(value["annotations"], 1):
        where = f"{path}:annotation {number}"
        if each.get("image_id") not in held:
            yield where, f"image_id {each.get('image_id')!r} is not among the images"
        elif names and each.get("category_id") not in names:
            yield where, f"category_id {each.get('category_id')!r} is not among the categories"
        elif not each.get("iscrowd"):
            named = names.get(each.get("category_id"), each.get("category_id"))
            held[each["image_id"]].append({"bbox": each.get("bbox"), "category": named})
    for number, each in enumerate(value["images"], 1):
        fields = {"image": each.get("file_name"), "objects": held[each.get("id")]}
        yield Row(fields, f"{path}:image {number}")


# ------------------------------------------------------------------ what a box may be


def of_objects(value: Any, field: str) -> tuple[tuple[Box, ...], tuple[str, ...]]:
    """Boxes and classes of `objects`, whose boxes are x, y, width, height."""
    if isinstance(value, Mapping):  # a table: one list for each property
        lists = {name: json_list(value[name], f"{field}.{name}") for name in value if name in ("bbox", *CLASS_NAMES)}
        if len({len(each) for each in lists.values()}) > 1:
            counts = ", ".join(f"{len(each)} {name}" for name, each in lists.items())
            raise RowError(f"field {field!r} does not have one of each for every box: {counts}")
        value = [dict(zip(lists, each, strict=True)) for each in zip(*lists.values(), strict=True)]
    found = json_list(value, field)
    labels = []
    for number, each in enumerate(found, 1):
        if not isinstance(each, Mapping):
            raise RowError(f"{field}[{number}] is {kind_of(each)}; an object with bbox and category is expected")
        named = next((each[name] for name in CLASS_NAMES if each.get(name) is not None), None)
        if named is None:
            raise RowError(f"{field}[{number}] has no class ({', '.join(CLASS_NAMES[:4])}, ...)")
        labels.append(str(named))
    sized = [_four(each.get("bbox"), f"{field}[{number}].bbox") for number, each in enumerate(found, 1)]
    turned = [(x, y, x + width, y + height) for x, y, width, height in sized]
    return corners(turned, f"{field}: bbox"), tuple(labels)


def corners(boxes: Iterable[Any], field: str) -> tuple[Box, ...]:
    """x0, y0, x1, y1 of every box, each with an area. All that is wrong is said at once."""
    found, wrong = [], []
    for number, box in enumerate(boxes, 1):
        x0, y0, x1, y1 = four = _four(box, f"{field} {number}")
        if x1 < x0 or y1 < y0:
            wrong.append(f"{number} ends before it begins ({_said(four)}): x0, y0, x1, y1 are expected")
        elif x1 == x0 or y1 == y0:
            wrong.append(f"{number} has no area ({_said(four)})")
        found.append(four)
    if wrong:
        raise RowError(f"{field} {'; '.join(wrong)}")
    return tuple(found)


def _four(box: Any, field: str) -> Box:
    values = json_list(box, field) if box is not None else []
    if len(values) != 4:
        raise RowError(f"{field} has {len(values)} numbers; four are expected")
    try:
        x, y, right, bottom = (float(value) for value in values)
    except (TypeError, ValueError):
        raise RowError(f"{field} holds something that is no number: {list(values)}") from None
    if not all(math.isfinite(value) for value in (x, y, right, bottom)):
        raise RowError(f"{field} holds something that is no number: {list(values)}")
    return x, y, right, bottom


def _said(box: Box) -> str:
    return ", ".join(f"{value:g}" for value in box)


def joined(examples: Iterable[Boxed]) -> list[Boxed]:
    """The lines of a table that speak of one picture as one example, at the place of the first."""
    held: dict[Any, list[Boxed]] = {}
    for example in examples:
        held.setdefault(example.image if isinstance(example.image, str | bytes) else id(example), []).append(example)
    return [
        Boxed(
            some[0].image,
            tuple(box for each in some for box in each.boxes),
            tuple(label for each in some for label in each.labels),
            where=some[0].where,
            under=some[0].under,
        )
        for some in held.values()
    ]


# ------------------------------------------------------------------ samples


def of_one_size(processor: Any) -> Any:
    """A copy of the processor that brings every picture to one size and pads none."""
    fixed = copy.copy(processor)
    size = dict(getattr(processor, "size", None) or {})
    high, wide = size.get("height"), size.get("width")
    edge = size.get("shortest_edge") or USUAL_SIZE
    fixed.size = {"height": high or edge, "width": wide or edge}
    fixed.do_pad = False
    return fixed


def encode_boxes(
    examples: Sequence[Boxed],
    processor: Any,
    labels: LabelSet,
    *,
    max_len: int | None = None,
    overlong: str = "drop",
    skip_bad: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> Encodings:
    """One sample a picture, its boxes as shares (centre x, centre y, width, height). None is too long."""
    counts: Counter[str] = Counter()
    kept = Kept()
    problems: list[str] = []
    samples = []
    for number, example in enumerate(examples, 1):
        try:
            size = looked_at(example, counts)
            classes, shares = _targets(example, labels, size)
        except DataError as error:
            problems.append(f"{error.where or example.where}: {error.what}")
            continue
        counts["without boxes"] += not classes
        samples.append(
            Encoded(
                array("i", [0]),
                array("i", classes),
                "boxes",
                where=example.where,
                id=example.id,
                pixels=Pixels(example, processor, number, kept),
                boxes=shares,
            )
        )
        if report and number % 256 == 0:
            report(number, len(examples))
    return finished(samples, len(examples), Lengths(array("i", [1] * len(samples))), counts, problems, None, skip_bad)


def _targets(example: Boxed, labels: LabelSet, size: tuple[int, int]) -> tuple[list[int], tuple[Box, ...]]:
    """Class numbers, and boxes as shares of a picture of `size` (width, height)."""
    wide, high = size
    classes, shares, wrong = [], [], []
    for number, (label, (x0, y0, x1, y1)) in enumerate(zip(example.labels, example.boxes, strict=True), 1):
        try:
            classes.append(labels.index(label))
        except DataError as error:
            wrong.append(f"box {number}: {error.what}")
        if min(x0, y0) < -SLACK or x1 > wide + SLACK or y1 > high + SLACK:
            wrong.append(
                f"box {number} ({_said((x0, y0, x1, y1))}) reaches out of the picture, which is {wide} x {high}"
            )
        x0, x1, y0, y1 = max(x0, 0.0) / wide, min(x1, wide) / wide, max(y0, 0.0) / high, min(y1, high) / high
        shares.append(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0))
    if wrong:
        raise DataError("; ".join(wrong), where=example.where or None)
    return classes, tuple(shares)
