"""Laws of loading and parting: all problems at once, a split that only content and seed decide."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from veneer.data.dataset import load, split
from veneer.data.labels import labels_of
from veneer.data.types import Labelled, Tagged, Text
from veneer.errors import DataError, UserError

ROWS = [{"text": f"row {n}"} for n in range(100)]


@pytest.fixture
def write(tmp_path):
    def write(name: str, rows: list[dict[str, object]]) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def texts(dataset) -> set[str]:
    return {example.text for example in dataset}


def test_all_problems_are_raised_at_once_and_counted(write):
    path = write("a.jsonl", [{"text": ""} if n % 2 else {"text": "x"} for n in range(100)])
    with pytest.raises(DataError) as error:
        load(path)
    assert len(error.value.problems) == 50
    assert error.value.problems[0] == f"{path}:2: field 'text' is empty"
    assert "50 of 100 rows of text cannot be used" in str(error.value)
    assert "... and 30 more" in str(error.value)


def test_problems_come_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\noops\n{"text": 3}\n{"text": "b"}\n')
    with pytest.raises(DataError) as error:
        load(path)
    assert [problem.removeprefix(f"{path}:")[0] for problem in error.value.problems] == ["2", "3", "4"]
    dataset = load(path, skip_bad=True)
    assert texts(dataset) == {"a", "b"} and len(dataset.skipped) == 3
    assert "2 rows of text, 3 bad left out" in str(dataset)


def test_skip_bad_does_not_make_do_with_nothing(write):
    with pytest.raises(DataError, match="2 of 2 rows"):
        load(write("a.jsonl", [{"text": ""}] * 2), skip_bad=True)
    with pytest.raises(DataError, match="not one row in it"):
        load(write("b.jsonl", []))


def test_a_csv_without_the_column_names_those_that_are_there(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,compleson\na,b\n")
    with pytest.raises(DataError, match="no known format has the columns prompt, compleson") as error:
        load(path)
    assert error.value.problems == [
        "column 'compleson' is not known. Did you mean 'completion'?",
        "for prompt/completion rows completion or response or answer or output is missing",
        "for pairs rows target or summary or completion or response or answer or output is missing",
    ]
    assert error.value.where == f"{path}:2"


def test_the_sentence_says_what_is_left_out(write):
    path = write("a.jsonl", [{"question": "q", "context": "c", "answer": "a"}] * 3)
    assert str(load(path)) == f"{path}: 3 rows of prompt/completion, 2 duplicates, columns not used: context"


def test_files_folders_and_lists(write, tmp_path):
    one, two = write("d/train.jsonl", ROWS[:60]), write("d/valid.jsonl", ROWS[60:70])
    assert len(load([one, two])) == 70
    dataset = load(tmp_path / "d")
    assert len(dataset) == 60 and dataset.held_out is not None
    parted = split(dataset)
    assert (len(parted.train), len(parted.validation)) == (60, 10)
    with pytest.raises(DataError, match="no data files"):
        load(tmp_path / "d", split="test")


def test_a_folder_of_texts_is_a_folder_of_documents(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.txt").write_text(f"title {n}\n\nbody {n}\n")
    assert texts(load(tmp_path)) == {f"title {n}\n\nbody {n}" for n in range(3)}


def test_the_hash_is_of_the_content_alone(write, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS))
    assert load(path).hash == load(write("b.jsonl", ROWS)).hash == load(ROWS).hash != load(ROWS[::-1]).hash


def test_the_split_is_five_percent_capped_and_complete():
    dataset = load(ROWS)
    parted = split(dataset)
    assert (len(parted.train), len(parted.validation)) == (95, 5)
    assert texts(parted.train) | texts(parted.validation) == texts(dataset)
    assert not texts(parted.train) & texts(parted.validation)
    many = load([{"text": str(n)} for n in range(5000)])
    assert len(split(many).validation) == 200
    assert len(split(many, 0.1).validation) == 500
    assert len(split(many, 7).validation) == 7
    assert len(split(many, 0).validation) == 0
    assert len(split(load(ROWS[:2])).validation) == 1
    assert len(split(load(ROWS[:1])).validation) == 0


def test_the_split_depends_on_seed_and_content_alone():
    first = split(load(ROWS), 20, seed=1)
    assert texts(split(load(ROWS[::-1]), 20, seed=1).validation) == texts(first.validation)
    assert texts(split(load(ROWS), 20, seed=2).validation) != texts(first.validation)
    grown = split(load([*ROWS, {"text": "one more"}]), 20, seed=1)
    assert len(texts(first.validation) - texts(grown.validation)) <= 1


def test_copies_of_a_row_stay_on_one_side():
    parted = split(load(ROWS * 3), 0.2)
    assert not texts(parted.train) & texts(parted.validation)
    assert len(parted.validation) == 60


def test_validation_data_of_ones_own_is_checked_for_repetition(write):
    parted = split(load(ROWS), write("v.jsonl", [*ROWS[:3], {"text": "new"}]))
    assert (len(parted.train), len(parted.validation), parted.repeated) == (100, 4, 3)
    assert "3 of them also in train" in str(parted)
    assert parted.facts()["validation_ids"] == [example.id for example in parted.validation]


@pytest.mark.parametrize("val", [1.5, -1, 100, True, 1.0])
def test_impossible_splits_are_refused(val):
    with pytest.raises(DataError, match="of 100 rows"):
        split(load(ROWS), val)


def test_limit_and_facts():
    dataset = load(ROWS, limit=10)
    assert len(dataset) == 10 and dataset.facts()["rows"] == 10
    json.dumps(dataset.facts()), json.dumps(split(dataset).facts())


def test_a_path_that_is_not_there_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="no file"):
        load("data/trian.jsonl")
    with pytest.raises(DataError, match="no file"):
        load("nothing.jsonl")


def test_a_hub_id_goes_through_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, name=None, *, revision=None, split=None):
        asked.append((path, name, revision, split))
        if split == "validation":
            raise ValueError('Unknown split "validation"')
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
        )
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset = load("org/name:conf@v1")
    assert [(example.text, example.label) for example in dataset] == [("a", "no"), ("b", "yes")]
    assert asked == [("org/name", "conf", "v1", "train"), ("org/name", "conf", "v1", "validation")]
    load("org/name[train[:5%]]")
    assert asked[2:] == [("org/name", None, None, "train[:5%]")]


def test_without_datasets_a_hub_id_is_answered(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'veneer\[data\]'"):
        load("org/name")


def test_labels():
    one = labels_of([Labelled("a", "pos"), Labelled("b", "neg")])
    assert (one.kind, one.names, one.encode("pos")) == ("one", ("neg", "pos"), 1)
    with pytest.raises(DataError, match=r"the label 'psos' is not among the training labels\. Did you mean 'pos'"):
        one.encode("psos", "f:3")
    assert labels_of([Labelled("a", "0"), Labelled("b", "2")]).names == ("0", "1", "2")
    assert labels_of([Labelled("a", 100), Labelled("b", 900)]).names == ("100", "900")
    several = labels_of([Labelled("a", ["x", "y"]), Labelled("b", [])])
    assert (several.kind, several.encode(["y"])) == ("several", [0.0, 1.0])
    number = labels_of([Labelled("a", 1), Labelled("b", "2.5")])
    assert (number.kind, number.encode("2.5")) == ("number", 2.5)
    assert labels_of([Tagged(("a", "b"), ("O", "B-X")), Tagged(("c",), ("A",))]).names == ("O", "A", "B-X")
    with pytest.raises(DataError, match="every row has the same label"):
        labels_of([Labelled("a", "x"), Labelled("b", "x")])


def test_checking_data_imports_neither_torch_nor_transformers_nor_numpy():
    code = (
        "import sys; from veneer.data.dataset import load; load([{'text': 'a'}]);"
        "print(*{'torch', 'transformers', 'numpy', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_an_id_is_the_content():
    assert Text("a", where="x:1").id == Text("a", where="y:2").id != Text("b").id
