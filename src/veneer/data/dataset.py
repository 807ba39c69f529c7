"""From whatever a user names as data to checked examples, and from those to a training and a validation part.

Every row is looked at before anything else happens, and all that is wrong is said at once with file, line and field.
The split goes by a hash of the row's content: it depends on the seed and on nothing else, a row added later moves no
other row, and two equal rows never stand on both sides (where the loss on one would only test memory).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from veneer.data import hub
from veneer.data.formats import FORMATS, Format, RowError, detect, example_of
from veneer.data.labels import LabelSet, labels_of
from veneer.data.read import READERS, Found, Problem, files_in, read, read_documents, read_text, suffix_of
from veneer.data.turns import kind_of
from veneer.data.types import Boxed, Example, Labelled, Pictured, Row, Tagged
from veneer.errors import DataError

__all__ = ["Data", "Dataset", "Split", "as_recorded", "load", "split"]

Data: TypeAlias = str | Path | Iterable[Any]
VALIDATION_SHARE, VALIDATION_CAP = 0.05, 200


@dataclass(frozen=True)
class Dataset:
    """Checked examples of one format. `str()` is the sentence to print."""

    examples: tuple[Example, ...]
    source: str
    format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()  # columns that nothing reads
    skipped: tuple[str, ...] = ()  # the problems of the rows that skip_bad left out
    held_out: Dataset | None = None  # the validation files or split that came with the data

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __str__(self) -> str:
        parts = [f"{self.source}: {len(self):,} rows of {self.format}", f"{len(self.skipped):,} bad left out"]
        parts += [f"{self.duplicates:,} duplicates"] * bool(self.duplicates)
        parts += [f"columns not used: {', '.join(self.unused)}"] * bool(self.unused)
        parts += [f"{len(self.held_out):,} validation rows beside them"] if self.held_out else []
        return ", ".join(part for part in parts if part != "0 bad left out")

    @cached_property
    def hash(self) -> str:
        """Of the contents in their order; the same for the same rows in another container."""
        return hashlib.sha256("".join(example.id for example in self).encode()).hexdigest()

    @cached_property
    def duplicates(self) -> int:
        return len(self) - len({example.id for example in self})

    @cached_property
    def labels(self) -> LabelSet:
        """The classes of labelled or tagged rows."""
        return labels_of(example for example in self if isinstance(example, Boxed | Labelled | Pictured | Tagged))

    def facts(self) -> dict[str, Any]:
        """What data.json records."""
        return {
            "source": self.source,
            "format": self.format,
            "rows": len(self),
            "hash": self.hash,
            "duplicates": self.duplicates,
            "columns": dict(self.columns),
            "unused_columns": list(self.unused),
            "skipped": list(self.skipped),
        }


@dataclass(frozen=True)
class Split:
    """`repeated` counts validation rows that also stand among the training rows (only where the user chose them)."""

    train: Dataset
    validation: Dataset
    seed: int
    repeated: int = 0

    def __str__(self) -> str:
        warning = f" ({self.repeated:,} of them also in train!)" if self.repeated else ""
        return f"{len(self.train):,} rows to train, {len(self.validation):,} to validate{warning}"

    def facts(self) -> dict[str, Any]:
        """What data.json records: enough to tell whether another run saw the same split."""
        sides = {"train": self.train, "validation": self.validation}
        ids = {name: [example.id for example in side] for name, side in sides.items()}
        return {"seed": self.seed, "repeated": self.repeated, **{f"{name}_ids": held for name, held in ids.items()}}


def load(
    data: Data,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    kinds: tuple[type[Any], ...] | None = None,
    skip_bad: bool = False,
    split: str = "train",
    limit: int | None = None,
) -> Dataset:
    """Read, recognise and check `data`: a file, several, a folder, a hub id, or rows (dicts) that are in memory.

    `columns` maps standard fields to the file's columns. `kinds` are the classes of example a task can use: where a row
    may be read in two ways, they decide. `limit` takes the first rows only.
    """
    columns = dict(columns or {})
    name, source = _source(data, split)
    found = list(islice(source, limit))
    rows = [item for item in found if isinstance(item, Row)]
    form = _format(name, found, rows, format, columns, kinds)
    checked = [_checked(item, form, columns) for item in found]
    problems = [str(item) for item in checked if isinstance(item, Problem)]
    examples = tuple(form.join(item for item in checked if not isinstance(item, Problem)))
    if problems and not (skip_bad and examples):
        _refuse(name, problems, f"{len(problems):,} of {len(found):,} rows of {form.name} cannot be used")
    dataset = Dataset(examples, name, form.name, columns, _unused(rows, form, columns), tuple(problems))
    if split != "train" or not (held := _held_out(data)):
        return dataset
    beside = load(held, format=form.name, columns=columns, skip_bad=skip_bad, split="validation")
    return replace(dataset, held_out=beside)


def split(dataset: Dataset, val: float | Data | Dataset | None = None, seed: int = 0) -> Split:
    """Part `dataset`. `val`: a share below 1, a number of rows, data of its own, or 0 for none. By default what came
    with the data for this purpose, else 5 % of the rows and at most 200."""
    if val is None and dataset.held_out is not None:
        val = dataset.held_out
    if val is None or isinstance(val, int | float):
        return _drawn(dataset, _wanted(len(dataset), val), seed)
    held = val if isinstance(val, Dataset) else load(val, format=dataset.format, columns=dataset.columns)
    known = {example.id for example in dataset}
    return Split(dataset, held, seed, repeated=sum(example.id in known for example in held))


def as_recorded(dataset: Dataset, ids: Collection[str]) -> Dataset:
    """The rows under the ids that a run wrote down. A picture's id was once made of its whole path, and a run that was
    begun so goes on with the split that it has."""
    whole = replace(dataset, examples=tuple(replace(each, under="") for each in dataset))
    now, then = (sum(example.id in ids for example in rows) for rows in (dataset, whole))
    return whole if then > now else dataset


# Where rows come from


def _source(data: Data, split: str) -> tuple[str, Iterator[Found]]:
    if isinstance(data, str | Path):
        path = Path(data).expanduser()
        if path.is_dir():
            return str(data), _lying_under(path, _folder(path, split))
        if not path.exists() and hub.is_hub_id(str(data)):
            return str(data), iter(hub.rows_of(hub.table(str(data), split), str(data)))
        return str(data), _lying_under(path.parent, read(path))
    if hasattr(data, "features") and hasattr(data, "column_names"):
        return "the given dataset", iter(hub.rows_of(data, "dataset"))
    items = list(data)
    if items and all(isinstance(item, str | Path) for item in items):
        sources = [_source(item, split) for item in items]
        return ", ".join(name for name, _ in sources), chain.from_iterable(found for _, found in sources)
    return "the given rows", (_in_memory(item, number) for number, item in enumerate(items, 1))


def _lying_under(folder: Path, found: Iterable[Found]) -> Iterator[Found]:
    return (replace(item, under=str(folder)) if isinstance(item, Row) else item for item in found)


def _in_memory(item: Any, number: int) -> Found:
    if isinstance(item, Mapping):
        return Row(item, f"row {number}")
    return Problem(f"row {number}", f"{kind_of(item)} where a mapping is expected")


def _folder(path: Path, split: str) -> Iterator[Found]:
    files = files_in(path, split)
    if not files:
        raise DataError(f"no data files for {split!r} in this folder", where=str(path), fix="name a file, or add one")
    documents = [file for file in files if READERS[suffix_of(file)] is read_text]
    tables = chain.from_iterable(read(file) for file in files if file not in documents)
    return chain(tables, read_documents(documents)) if len(documents) > 1 else chain.from_iterable(map(read, files))


def _held_out(data: Data) -> Data | None:
    """The validation part that a folder or a hub id brings along."""
    if not isinstance(data, str | Path):
        return None
    path = Path(data).expanduser()
    if path.is_dir():
        return data if files_in(path, "validation") else None
    if path.exists() or not hub.is_hub_id(str(data)) or "[" in str(data):
        return None
    return hub.table(str(data), "validation")


# Checking


def _format(
    name: str, found: list[Found], rows: list[Row], wanted: str | None, columns: Mapping[str, str], kinds: Any
) -> Format:
    problems = [str(item) for item in found if isinstance(item, Problem)]
    if not found:
        raise DataError("there is not one row in it", where=name, fix="check that this is the file you mean")
    if not rows:
        raise DataError("not one row can be read", name, "check that this is the file you mean", problems)
    if wanted:
        return FORMATS[wanted]
    try:
        return detect(rows, columns, kinds)
    except DataError as error:
        raise DataError(error.what, error.where or name, error.fix, [*error.problems, *problems]) from None


def _checked(item: Found, form: Format, columns: Mapping[str, str]) -> Example | Problem:
    if isinstance(item, Problem):
        return item
    try:
        return example_of(item, form, columns)
    except RowError as error:
        return Problem(item.where, str(error))


def _refuse(name: str, problems: list[str], what: str) -> NoReturn:
    raise DataError(what, where=name, fix="mend these rows, or leave them out with skip_bad", problems=problems)


def _unused(rows: list[Row], form: Format, columns: Mapping[str, str]) -> tuple[str, ...]:
    """Columns that nothing reads, in the order of their appearance: a question's `context` should not vanish unsaid."""
    names: dict[str, None] = {}
    used: set[str] = set()
    for row in rows:
        names.update(dict.fromkeys(row.fields))
        used.update(form.names_in(row.fields, columns).values())
    return tuple(name for name in names if name not in used)


# Parting


def _wanted(rows: int, val: float | None) -> int:
    if val is None:
        return min(VALIDATION_CAP, max(round(rows * VALIDATION_SHARE), min(rows - 1, 1)))
    if isinstance(val, bool) or not 0 <= val < max(rows, 1) or (isinstance(val, float) and val >= 1):
        raise DataError(f"val = {val} of {rows:,} rows", fix="give a share below 1, fewer rows than all, or data")
    return round(rows * val) if 0 < val < 1 else int(val)


def _drawn(dataset: Dataset, wanted: int, seed: int) -> Split:
    """The `wanted` rows whose hash with the seed is least; all copies of a row together, so it may be a few more."""
    ranks = [hashlib.sha256(f"{seed}:{example.id}".encode()).digest() for example in dataset]
    last = sorted(ranks)[wanted - 1] if wanted else b""
    held = [rank <= last for rank in ranks]
    if all(held) and dataset.examples:
        raise DataError("all rows are equal, so none can be held out", where=dataset.source, fix="set val to 0")
    parts = [
        tuple(example for example, is_held in zip(dataset, held, strict=True) if is_held is side)
        for side in (False, True)
    ]
    train, validation = (replace(dataset, examples=part, skipped=(), held_out=None) for part in parts)
    return Split(replace(train, skipped=dataset.skipped), validation, seed)
