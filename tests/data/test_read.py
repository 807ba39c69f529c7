"""Laws of the readers: every row is found with its place; what is not a row is said, never skipped in silence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from veneer.data.read import Problem, files_in, read
from veneer.data.types import Row
from veneer.errors import DataError

ROWS = [{"prompt": f"q{n}", "completion": f"a{n} \u00e9\u2028 x"} for n in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)


def rows_of(path: Path) -> list[dict[str, object]]:
    found = list(read(path))
    assert all(isinstance(item, Row) for item in found), found
    return [dict(item.fields) for item in found if isinstance(item, Row)]


def said(path: Path) -> list[str]:
    return [str(item).removeprefix(str(path)) for item in read(path) if isinstance(item, Problem)]


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


TABLE_OF_COLUMNS = {key: [row[key] for row in ROWS] for key in ROWS[0]}
CONTAINERS = {
    "lines.jsonl": LINES,
    "lines.ndjson": LINES,
    "crlf.jsonl": LINES.replace("\n", "\r\n"),
    "blank.jsonl": "\n\n" + LINES.replace("\n", "\n\n  \n"),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "wide.jsonl": LINES.encode("utf-16"),
    "no_last_newline.jsonl": LINES.rstrip("\n"),
    "lines.json": LINES,
    "array.json": json.dumps(ROWS),
    "array_of_lines.jsonl": "[" + ",\n".join(json.dumps(row) for row in ROWS) + "]",
    "indented.json": json.dumps(ROWS, indent=2),
    "wrapped.json": json.dumps({"version": 2, "data": ROWS}, indent=1),
    "wrapped_short.json": json.dumps({"data": ROWS}),
    "splits.json": json.dumps({"test": ROWS[:1], "train": ROWS}),
    "columns.json": json.dumps(TABLE_OF_COLUMNS),
    "pretty.jsonl": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "table.csv": CSV,
    "table.tsv": CSV.replace(",", "\t"),
    "semicolon.csv": CSV.replace(",", ";"),
    "crlf.csv": CSV.replace("\n", "\r\n"),
    "bom.csv": b"\xef\xbb\xbf" + CSV.encode(),
    "excel.csv": CSV.replace(",", "\t").encode("utf-16"),
    "z.jsonl.gz": gzip.compress(LINES.encode()),
    "z.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "z.csv.xz": lzma.compress(CSV.encode()),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_rows(name, write):
    assert rows_of(write(name, CONTAINERS[name])) == ROWS


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_arrow_files_give_the_same_rows(suffix, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table, path = pyarrow.Table.from_pylist(ROWS), tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    assert rows_of(path) == ROWS
    assert [item.where for item in read(path)][-1] == f"{path}:row 3"


def test_places_are_lines(write):
    lines = write("a.jsonl", "\n" + LINES)
    assert [item.where for item in read(lines)] == [f"{lines}:{n}" for n in (2, 3, 4)]
    array = write("a.json", "[\n" + ",\n\n".join(json.dumps(row) for row in ROWS) + "\n]")
    assert [item.where for item in read(array)] == [f"{array}:{n}" for n in (2, 4, 6)]
    table = write("a.csv", 'prompt,completion\n"two\nlines",x\nq,a\n')
    assert [item.where for item in read(table)] == [f"{table}:{n}" for n in (2, 4)]


def test_one_object_is_one_row(write):
    chat = {"messages": [{"role": "user", "content": "hi"}], "entities": "x"}
    assert rows_of(write("a.json", json.dumps(chat, indent=1))) == [chat]
    assert rows_of(write("a.jsonl", json.dumps(chat))) == [chat]
    lists = {"text": "t", "entities": [{"a": 1}], "links": [{"b": 2}]}
    assert rows_of(write("b.jsonl", f"{json.dumps(lists)}\n" * 2)) == [lists] * 2


SPOILT = {
    "one_bad_line.jsonl": (
        LINES + '{"prompt": "x" "y"}\n' + LINES,
        [":4: not JSON: Expecting ',' delimiter at column 16"],
    ),
    "cut.jsonl": (LINES[:-30], [":3: the file ends in the middle of a row (a cut download or copy?)"]),
    "cut_inside.jsonl": ('{"a": "x\n' + LINES, [":1: not JSON: Unterminated string starting at at column 7"]),
    "two_on_a_line.jsonl": ('{"a": 1} {"b": 2}\n' + LINES, [":1: more text after the object, from column 9"]),
    "not_an_object.jsonl": (
        LINES + "[1, 2]\n3\n",
        [
            ":4: a list where a row, an object in braces, is expected",
            ":5: a number where a row, an object in braces, is expected",
        ],
    ),
    "twice.jsonl": ('{"a": 1, "a": 2}\n' + LINES, [":1: field 'a' appears twice in one object"]),
    "latin1.jsonl": (
        LINES.encode() + '{"a": "caf\u00e9"}\n'.encode("latin-1") + LINES.encode(),
        [
            ":4: not UTF-8: byte 0xe9 at column 11. If the file is Windows-1252 or Latin-1, convert it: "
            "iconv -f WINDOWS-1252 -t UTF-8 old > new"
        ],
    ),
    "cut.json": (
        json.dumps(ROWS, indent=1)[:-40],
        [":10: the file ends inside item 3 (a cut download or copy?); 2 before it are complete"],
    ),
    "cut_wrapped.json": (
        json.dumps({"data": ROWS}, indent=1)[:-40],
        [":11: the file ends inside item 3 (a cut download or copy?); 2 before it are complete"],
    ),
    "bad_item.json": (
        '[{"a": 1},\n{"a": 2},\n{"a" 3}]',
        [":3: item 3 is not JSON: Expecting ':' delimiter at line 3, column 6; the rest is unread"],
    ),
    "deep.jsonl": ("[" * 100_000 + "\n" + LINES, None),
    "huge.jsonl": ('{"a": ' + "9" * 5000 + "}\n" + LINES, None),
    "short.csv": (
        CSV + "only\n" + "a,b,c\n",
        [
            ":5: 1 cells where the header names 2 columns (prompt, completion)",
            ":6: 3 cells where the header names 2 columns (prompt, completion)",
        ],
    ),
    "open_quote.csv": (
        CSV + '"never closed,x\n' * 3,
        [":5: ',' expected after '\"'; look for a quote that is not closed or not doubled"],
    ),
    "latin1.csv": (CSV.encode() + "caf\u00e9,x\n".encode("latin-1"), None),
    "cut.jsonl.gz": (gzip.compress(LINES.encode() * 50)[:-20], None),
    "not_gzip.jsonl.gz": (LINES, None),
    "not.parquet": ("hello", None),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_not_a_row_is_said(name, write):
    content, expected = SPOILT[name]
    found = said(write(name, content))
    assert found if expected is None else found == expected


def test_rows_after_a_bad_line_are_still_found(write):
    found = list(read(write("a.jsonl", LINES + "oops\n" + LINES)))
    assert [type(item) for item in found] == [Row] * 3 + [Problem] + [Row] * 3


def test_text_is_cut_at_blank_lines_or_else_at_lines(write, tmp_path):
    poem = "\n\nfirst\nstill first\n\n\nsecond\n"
    assert rows_of(write("a.txt", poem)) == [{"text": "first\nstill first"}, {"text": "second"}]
    assert [item.where for item in read(tmp_path / "a.txt")] == [f"{tmp_path}/a.txt:{n}" for n in (3, 7)]
    assert rows_of(write("b.txt", "\none\ntwo\n\n")) == [{"text": "one"}, {"text": "two"}]


def test_missing_files_and_unknown_kinds(write, tmp_path):
    write("train.jsonl", LINES)
    with pytest.raises(DataError, match=r"Did you mean 'train\.jsonl'"):
        list(read(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"cannot read files of kind \.xlsx"):
        list(read(write("a.xlsx", "x")))


def test_a_repeated_column_is_refused(write):
    with pytest.raises(DataError, match="column 'a' appears twice"):
        list(read(write("a.csv", "a,b,a\n1,2,3\n")))


def test_a_folder_has_splits_by_name(write, tmp_path):
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl", "README.md"):
        write(name, LINES)
    assert [path.name for path in files_in(tmp_path, "train")] == ["train.jsonl"]
    assert [path.name for path in files_in(tmp_path, "validation")] == ["valid.jsonl"]
    write("other/a.csv", CSV)
    assert [path.name for path in files_in(tmp_path / "other", "train")] == ["a.csv"]
    assert files_in(tmp_path / "other", "validation") == []
