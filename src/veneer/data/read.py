"""Files to rows, one at a time, so that whatever is wrong later can be said with file and line.

| suffix | a row is |
| --- | --- |
| .jsonl .ndjson | a line |
| .json | an item of the array, or of the one list of objects inside an object; an entry of a table of columns; of
COCO's JSON a picture with its boxes |
| .csv .tsv | a record; the first one names the columns |
| .parquet .arrow | a row (needs pyarrow) |
| .txt .md | a block between blank lines; without blank lines, a line; in a folder of such files, a whole file |

each also as .gz, .bz2 or .xz. A `.json` of JSON lines and a `.jsonl` that holds an array are read as what they are.

Why not `datasets`? It infers one type per column for the whole file and stops at the first row that differs, naming
neither file nor line. Here a reader yields a `Problem` where a row cannot be had and goes on with the next, so that
all of them come out at once.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, cast

from veneer.core.registry import Registry, near
from veneer.data.boxes import from_coco, is_coco
from veneer.data.types import Row
from veneer.errors import DataError
from veneer.extras import need

__all__ = ["READERS", "Found", "Problem", "files_in", "read", "suffix_of"]


@dataclass(frozen=True)
class Problem:
    """Something that is not a usable row."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


Found: TypeAlias = Row | Problem
Reader: TypeAlias = Callable[[Path], Iterator[Found]]

READERS: Registry[Reader] = Registry("file type")
OPENERS: dict[str, Callable[[Path, str], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
LISTS = ("input_ids", "tokens", "words")  # fields that are lists in every row
# Lists of objects that are one field of a row; any other list of objects in a JSON object is the list of rows.
ROW_LISTS = {"messages", "conversations", "conversation", "tools", "prompt", "completion", "chosen", "rejected"}
CUT = "(a cut download or copy?)"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
CAPTIONS = (".txt", ".caption")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


def read(path: Path) -> Iterator[Found]:
    """The rows of one file, of whatever kind its suffix says."""
    if not path.exists():
        raise DataError(f"no file {path.name!r}.{_sibling(path)}", where=str(path), fix="check the path of the data")
    suffix = suffix_of(path)
    if suffix not in READERS:
        known = ", ".join(sorted(READERS))
        raise DataError(f"cannot read files of kind {suffix or '(none)'}", where=str(path), fix=f"use one of {known}")
    return READERS[suffix](path)


def suffix_of(path: Path) -> str:
    """The suffix that tells the kind, compression left aside.

    >>> suffix_of(Path("a/b.jsonl.gz"))
    '.jsonl'
    """
    return Path(path.stem if path.suffix.lower() in OPENERS else path.name).suffix.lower()


def files_in(folder: Path, split: str) -> list[Path]:
    """The files of one split: those named after it (train.jsonl, validation/a.csv), or all if none is named so."""
    named = _named(folder)
    if not any(named.values()):
        return list(named) if split == "train" else []
    return [path for path, part in named.items() if part == split]


def parts_in(folder: Path) -> set[str]:
    """The splits that files of a folder are named after."""
    return {part for part in _named(folder).values() if part}


def _named(folder: Path) -> dict[Path, str | None]:
    """The files with rows, and the split that each is named after."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and suffix_of(path) in READERS)
    files = [path for path in files if not path.name.startswith((".", "README", "LICENSE", "dataset_info", "state."))]
    files = _without_captions(files)
    files = [path for path in files if suffix_of(path) not in PICTURES] or files  # a table beside pictures names them
    return {path: _split_of(path.relative_to(folder)) for path in files}


def _without_captions(files: list[Path]) -> list[Path]:
    """A text beside a picture of its name says what that shows. Other texts are documents, unless pictures outnumber
    them: then they are notes."""
    pictures = {path.with_suffix("") for path in files if suffix_of(path) in PICTURES}
    texts = [path for path in files if READERS[suffix_of(path)] is read_text and path.with_suffix("") not in pictures]
    kept = set(texts) if len(texts) >= len(pictures) else set()
    return [path for path in files if READERS[suffix_of(path)] is not read_text or path in kept] if pictures else files


def _split_of(path: Path) -> str | None:
    if suffix_of(path) in PICTURES:  # what a picture is called says nothing: a folder must be named so, and no more
        return next((split for part in path.parts[:-1] for split in SPLITS if part.lower() in SPLITS[split]), None)
    words = {word for part in path.parts for word in part.lower().replace("-", ".").replace("_", ".").split(".")}
    return next((split for split, names in SPLITS.items() if words.intersection(names)), None)


def _sibling(path: Path) -> str:
    return near(path.name, [other.name for other in path.parent.iterdir()]) if path.parent.is_dir() else ""


# Bytes to lines


def _open(path: Path) -> io.BufferedIOBase:
    return cast(io.BufferedIOBase, OPENERS.get(path.suffix.lower(), open)(path, "rb"))


def _lines(path: Path) -> Iterator[tuple[int, str | Problem]]:
    """Numbered lines without their ends. A line that is not UTF-8 comes as a Problem and the next follows."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in _decoded(file, _encoding(path)):
                yield number, line if isinstance(line, str) else Problem(f"{path}:{number}", _undecodable(line))
    except (EOFError, zlib.error, lzma.LZMAError, OSError, UnicodeError) as error:
        yield number + 1, Problem(f"{path}:{number + 1}", f"the file cannot be read any further ({error})")


def _encoding(path: Path) -> str:
    with _open(path) as file:
        start = file.read(3)
    return next((name for bom, name in BOMS.items() if start.startswith(bom)), "utf-8")


def _decoded(file: io.BufferedIOBase, encoding: str) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    if encoding == "utf-16":  # Excel's "Unicode text"; it cannot be cut at newline bytes
        yield from enumerate((line.rstrip("\r") for line in file.read().decode(encoding).split("\n")), 1)
        return
    for number, line in enumerate(file, 1):  # binary files are cut at \n alone, so U+2028 inside a string is safe
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        try:
            yield number, line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield number, error


def _undecodable(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return (
        f"not UTF-8: byte 0x{byte:02x} at column {error.start + 1}. If the file is Windows-1252 or Latin-1, "
        "convert it: iconv -f WINDOWS-1252 -t UTF-8 old > new"
    )


# JSON


class _Json:
    """A JSON decoder that remembers keys which an object held twice (the standard one keeps the last in silence)."""

    def __init__(self) -> None:
        self.twice: list[str] = []
        self.decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            self.twice += sorted({name for name in names if names.count(name) > 1})
        return fields

    def at(self, text: str, position: int) -> tuple[Any, int]:
        self.twice.clear()
        try:
            return self.decoder.raw_decode(text, position)
        except RecursionError:
            raise json.JSONDecodeError("nested too deeply", text, position) from None

    def found(self, value: Any, where: str) -> Found:
        """The row that `value`, decoded last, stands for."""
        if self.twice:
            return Problem(where, f"field {self.twice[0]!r} appears twice in one object")
        if not isinstance(value, dict):
            return Problem(where, f"{_kind(value)} where a row, an object in braces, is expected")
        return Row(value, where)


@READERS.register(".jsonl", ".ndjson", ".json")
def read_json(path: Path) -> Iterator[Found]:
    """JSON lines if the first of several lines is an object by itself, else one JSON text; the suffix decides nothing
    but how a spoilt first line is understood."""
    lines = _lines(path)
    head: list[tuple[int, str | Problem]] = []
    while len(filled := [line for _, line in head if isinstance(line, Problem) or line.strip()]) < 2:
        if (following := next(lines, None)) is None:
            break
        head.append(following)
    reader = _json_text if filled and _opens_a_text(filled, suffix_of(path)) else _json_lines
    return reader(path, chain(head, lines))


def _opens_a_text(head: list[str | Problem], suffix: str) -> bool:
    first = head[0]
    if isinstance(first, Problem):
        return False
    if first.strip() in ("[", "{") or first.lstrip().startswith("["):
        return True
    try:
        return isinstance(json.loads(first), dict) and len(head) == 1
    except (ValueError, RecursionError):
        return suffix == ".json"


def _json_lines(path: Path, lines: Iterable[tuple[int, str | Problem]]) -> Iterator[Found]:
    decoder = _Json()
    pending = None  # the problem of the line before: worded otherwise if that line turns out to be the last
    for number, line in lines:
        if isinstance(line, str) and not line.strip():
            continue
        if pending:
            yield pending[0]
            pending = None
        found, cut = (line, False) if isinstance(line, Problem) else _json_line(decoder, line, f"{path}:{number}")
        if cut:
            pending = found, Problem(f"{path}:{number}", f"the file ends in the middle of a row {CUT}")
        else:
            yield found
    if pending:
        yield pending[1]


def _json_line(decoder: _Json, line: str, where: str) -> tuple[Found, bool]:
    """The row, and whether the line stops before its JSON does."""
    start = len(line) - len(line.lstrip())
    try:
        value, end = decoder.at(line, start)
    except json.JSONDecodeError as error:
        return Problem(where, f"not JSON: {error.msg} at column {error.colno}"), _stops_early(error)
    except ValueError as error:  # an integer of more digits than Python converts
        return Problem(where, f"not JSON that can be read: {error}"), False
    if line[end:].strip():
        return Problem(where, f"more text after the object, from column {end + 1}"), False
    return decoder.found(value, where), False


def _stops_early(error: json.JSONDecodeError) -> bool:
    return error.msg.startswith("Unterminated string") or not error.doc[error.pos :].strip()


def _json_text(path: Path, lines: Iterable[tuple[int, str | Problem]]) -> Iterator[Found]:
    parts: list[str] = []
    for _, line in lines:
        if isinstance(line, Problem):
            yield line
            return
        parts.append(line)
    text = "\n".join(parts)
    start = _skip(text, 0)
    if text.startswith("[", start):
        yield from _items(path, text, start)
    elif text.startswith("{", start):
        yield from _objects(path, text, start)
    elif text.strip():
        yield Problem(f"{path}:1", "neither a JSON array nor a JSON object")


def _items(path: Path, text: str, opening: int) -> Iterator[Found]:
    """The items of the array that opens at `opening`, one by one: a cut file still gives its complete ones."""
    decoder, position, line, counted = _Json(), _skip(text, opening + 1), 1, 0
    for number in range(1, len(text) + 2):
        if text.startswith("]", position):
            return
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        try:
            value, end = decoder.at(text, position)
            following = _skip(text, end)
            if text[following : following + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, following)
        except json.JSONDecodeError as error:
            yield Problem(where, _broken_item(error, number))
            return
        except ValueError as error:
            yield Problem(where, f"item {number} cannot be read: {error}; nor what follows it")
            return
        yield decoder.found(value, where)
        position = _skip(text, following + 1) if text[following] == "," else following


def _broken_item(error: json.JSONDecodeError, number: int) -> str:
    if _stops_early(error):
        return f"the file ends inside item {number} {CUT}; {number - 1} before it are complete"
    return f"item {number} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}; the rest is unread"


def _objects(path: Path, text: str, start: int) -> Iterator[Found]:
    """An object that wraps the rows, a table of columns, or objects one after the other over several lines each."""
    decoder = _Json()
    try:
        value, end = decoder.at(text, start)
    except json.JSONDecodeError as error:
        yield from _cut_wrapper(path, text, start, error)
        return
    if text[end:].strip():
        yield from _concatenated(path, text, start)
    elif is_coco(value):
        yield from (row if isinstance(row, Row) else Problem(*row) for row in from_coco(value, path))
    elif (key := _wrapped(value, path)) is not None:
        yield from _items(path, text, _value_position(text, start, key))
    elif columns := _columns(value):
        yield from (Row(dict(zip(value, row, strict=True)), f"{path}:row {n}") for n, row in enumerate(columns, 1))
    else:
        yield decoder.found(value, f"{path}:1")


def _wrapped(value: dict[str, Any], path: Path) -> str | None:
    """The key under which an object holds its rows; None if it is no wrapper."""
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    lists = [key for key in lists if key not in ROW_LISTS]
    if len(lists) > 1:
        if "train" in lists:
            return "train"
        names = ", ".join(lists)
        raise DataError(f"several lists of rows: {names}", where=str(path), fix="keep one, or name one 'train'")
    return lists[0] if lists else None


def _columns(value: dict[str, Any]) -> list[tuple[Any, ...]] | None:
    """The rows of {"prompt": [...], "completion": [...]}, as `Dataset.to_dict` writes it."""
    if len(value) < 2 or not all(isinstance(column, list) for column in value.values()):
        return None
    if any(key in value and not all(isinstance(item, list) for item in value[key]) for key in LISTS):
        return None  # these are lists in every row, so this is one row
    if any(value.get(key) and isinstance(value[key][0], dict) for key in ROW_LISTS):
        return None  # the turns of one conversation, beside its pictures
    sizes = {len(column) for column in value.values()}
    return list(zip(*value.values(), strict=True)) if len(sizes) == 1 else None


def _concatenated(path: Path, text: str, start: int) -> Iterator[Found]:
    decoder, position = _Json(), start
    while position < len(text):
        where = f"{path}:{text.count(chr(10), 0, position) + 1}"
        try:
            value, end = decoder.at(text, position)
        except ValueError as error:
            yield Problem(where, f"not JSON: {error}; what follows is lost")
            return
        yield decoder.found(value, where)
        position = _skip(text, end)


def _cut_wrapper(path: Path, text: str, start: int, error: json.JSONDecodeError) -> Iterator[Found]:
    """A spoilt object: if it wraps rows, the complete ones and then what is wrong."""
    opening = text.find("[", start)
    if _stops_early(error) and opening >= 0 and text.startswith("{", _skip(text, opening + 1)):
        key = text[start + 1 : opening].strip().rstrip(":").strip().strip('"')
        if key not in ROW_LISTS:
            yield from _items(path, text, opening)
            return
    yield Problem(f"{path}:{error.lineno}", f"not JSON: {error.msg} at column {error.colno}")


def _value_position(text: str, start: int, wanted: str) -> int:
    """Where the value of a key begins in the object that opens at `start` (which is known to be well-formed)."""
    decoder, position = _Json(), _skip(text, start + 1)
    while True:
        key, end = decoder.at(text, position)
        position = _skip(text, _skip(text, end) + 1)
        if key == wanted:
            return position
        _, end = decoder.at(text, position)
        position = _skip(text, _skip(text, end) + 1)


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _kind(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "nothing (null)" if value is None else names.get(type(value), type(value).__name__)


# Tables


@READERS.register(*PICTURES)
def read_picture(path: Path) -> Iterator[Found]:
    """A file of a folder of pictures, whose class is the name of the folder that it stands in. A text of its name
    beside it (x.jpg, x.txt) is its caption."""
    fields = {"image": str(path), "label": path.parent.name}
    beside = next((file for ending in CAPTIONS if (file := path.with_suffix(ending)).is_file()), None)
    lines = [line for _, line in _lines(beside)] if beside is not None else []
    if problem := next((line for line in lines if isinstance(line, Problem)), None):
        yield problem
        return
    if beside is not None:
        fields["text"] = " ".join(str(line).strip() for line in lines).strip()
    yield Row(fields, str(path))


@READERS.register(".csv")
def read_csv(path: Path) -> Iterator[Found]:
    return _table(path, None)


@READERS.register(".tsv")
def read_tsv(path: Path) -> Iterator[Found]:
    return _table(path, "\t")


def _table(path: Path, delimiter: str | None) -> Iterator[Found]:
    spoilt: list[Problem] = []
    lines = _csv_lines(path, spoilt)
    first = next(lines, "")
    delimiter = delimiter or max(",;\t|", key=lambda mark: first.count(mark))  # Excel writes ; in half of Europe
    csv.field_size_limit(2**31 - 1)
    records = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        try:
            cells = next(records, None)
        except csv.Error as error:
            yield Problem(f"{path}:{start}", f"{error}; look for a quote that is not closed or not doubled")
            return
        where, start = f"{path}:{start}", records.line_num + 1
        if spoilt:
            yield from spoilt
            spoilt.clear()
        elif cells is None:
            return
        elif header is None:
            header = [name.strip() for name in cells]
            if repeated := [name for name in header if header.count(name) > 1]:
                raise DataError(f"column {repeated[0]!r} appears twice", where=where, fix="rename one of them")
        elif cells:
            yield _record(header, cells, where)


def _record(header: list[str], cells: list[str], where: str) -> Found:
    if len(cells) != len(header):
        return Problem(where, f"{len(cells)} cells where the header names {len(header)} columns ({', '.join(header)})")
    return Row(dict(zip(header, cells, strict=True)), where)


def _csv_lines(path: Path, spoilt: list[Problem]) -> Iterator[str]:
    """Lines for the csv module, newlines kept: they may stand inside quotes."""
    for _, line in _lines(path):
        if isinstance(line, Problem):
            spoilt.append(line)
            yield "\n"
        else:
            yield line + "\n"


@READERS.register(".parquet")
def read_parquet(path: Path) -> Iterator[Found]:
    return _arrow_rows(path, lambda arrow: arrow.parquet.ParquetFile(path).iter_batches(1024))


@READERS.register(".arrow", ".feather")
def read_arrow(path: Path) -> Iterator[Found]:
    def batches(arrow: Any) -> Iterator[Any]:
        with arrow.memory_map(str(path)) as source:
            try:
                yield from arrow.ipc.open_stream(source)  # what `datasets` writes
            except arrow.ArrowInvalid:
                file = arrow.ipc.open_file(source)
                yield from (file.get_batch(number) for number in range(file.num_record_batches))

    return _arrow_rows(path, batches)


def _arrow_rows(path: Path, batches: Callable[[Any], Iterable[Any]]) -> Iterator[Found]:
    pyarrow: Any = need("pyarrow", extra="data", use=f"read {path.name}")
    need("pyarrow.parquet", extra="data", use=f"read {path.name}")
    number = 0
    try:
        for batch in batches(pyarrow):
            for fields in batch.to_pylist():
                number += 1
                yield Row(fields, f"{path}:row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        yield Problem(f"{path}:row {number + 1}", f"the file is damaged or not what its suffix says ({error})")


# Plain text


@READERS.register(".txt", ".md")
def read_text(path: Path) -> Iterator[Found]:
    lines = list(_lines(path))
    problems = [line for _, line in lines if isinstance(line, Problem)]
    texts = [(number, line) for number, line in lines if isinstance(line, str)]
    filled = [number for number, line in texts if line.strip()]
    has_blocks = bool(filled) and any(not line.strip() for number, line in texts if filled[0] < number < filled[-1])
    yield from problems
    yield from (_blocks(path, texts) if has_blocks else _single_lines(path, texts))


def _single_lines(path: Path, lines: list[tuple[int, str]]) -> Iterator[Found]:
    return (Row({"text": line}, f"{path}:{number}") for number, line in lines if line.strip())


def _blocks(path: Path, lines: list[tuple[int, str]]) -> Iterator[Found]:
    block: list[str] = []
    start = 0
    for number, line in [*lines, (0, "")]:
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield Row({"text": "\n".join(block)}, f"{path}:{start}")
            block = []


def read_documents(paths: list[Path]) -> Iterator[Found]:
    """A folder of text files: each is one document."""
    for path in paths:
        lines = [line for _, line in _lines(path)]
        problems = [line for line in lines if isinstance(line, Problem)]
        if problems:
            yield from problems
        elif text := "\n".join(line for line in lines if isinstance(line, str)).strip():
            yield Row({"text": text}, str(path))
