"""The demo's model and data: pinned, checked, made once, and an error of three lines when they cannot be had."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from veneer import assets
from veneer.errors import UserError

SHEET = """# To list the content of an archive:
tar -tvf foo.tar

# Two lines of
# description
tar -x

# Another tool
gzip foo.tar

a line without a description
#no space after the mark
tar -c
"""


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(folder: Path) -> Path:
    """A package of one data file."""
    path = folder / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_data/rows.txt", "one\ntwo\n")
        archive.writestr("some_data/sub/", "")
        archive.writestr("some_data-1.0.dist-info/licenses/LICENSE", "yours")
        archive.writestr("some_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n")
        archive.writestr(
            "some_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("some_data-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def asset(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> assets.Asset:
    """An asset that pip finds in a folder of wheels, as it does on a machine without a network."""
    (tmp_path / "wheels").mkdir()
    digest = hashlib.sha256(wheel(tmp_path / "wheels").read_bytes()).hexdigest()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path / "wheels"), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    made = assets.Asset(package="some-data", version="1.0", sha256=digest, megabytes=1, make=copy_rows)
    monkeypatch.setitem(assets.ASSETS, "some", made)
    return made


def copy_rows(archive: Path, folder: Path) -> None:
    for name, content in assets._read(archive, r"some_data/.*\.txt$").items():
        (folder / name).write_bytes(content)


def test_an_asset_is_made_once(asset: assets.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    folder = assets.fetch("some", say=said.append)["some"]
    assert (folder / "rows.txt").read_text() == "one\ntwo\n"
    assert (folder / "LICENSE").read_text() == "yours"
    assert "some-data 1.0 (1 MB)" in said[0]

    def never(*_: object) -> None:
        raise AssertionError("obtained a second time")

    monkeypatch.setattr(assets, "_download", never)
    assert assets.fetch("some")["some"] == folder


def test_another_sha_is_refused(asset: assets.Asset, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(assets.ASSETS, "some", dataclasses.replace(asset, sha256="0" * 64))
    with pytest.raises(UserError, match="DO NOT MATCH THE HASHES") as caught:
        assets.fetch("some")
    assert len(str(caught.value).splitlines()) == 3
    assert not own_cache.exists() or not list(own_cache.iterdir())


def test_a_package_that_is_not_to_be_had(asset: assets.Asset, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(assets.ASSETS, "some", dataclasses.replace(asset, version="2.0"))
    monkeypatch.setattr("sys.argv", ["assets", "some"])
    assert assets.main() == 2
    what, where, fix = capsys.readouterr().err.splitlines()
    assert "some-data==2.0" in what and "No matching distribution" in what
    assert where.startswith("at: ") and "VENEER_CACHE" in fix


def test_a_failure_while_making_leaves_nothing(asset: assets.Asset, own_cache: Path, monkeypatch) -> None:
    def half(archive: Path, folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("killed")

    monkeypatch.setitem(assets.ASSETS, "some", dataclasses.replace(asset, make=half))
    with pytest.raises(RuntimeError, match="killed"):
        assets.fetch("some")
    assert not list(own_cache.iterdir())


def test_a_misspelt_name_is_answered() -> None:
    with pytest.raises(UserError, match="Did you mean 'smollm2'"):
        assets.fetch("smolm2")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VENEER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_folder() == tmp_path / "veneer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_folder() == tmp_path / ".cache" / "veneer"
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "own"))
    assert assets.cache_folder() == tmp_path / "own"


def test_source_archives_are_read_like_wheels(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("a-1/sheets/tar")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"hi"))
    assert assets._read(tmp_path / "a.tar.gz", r"[^/]+/sheets/[^/]+$") == {"tar": b"hi"}


def test_a_sheet_gives_its_one_line_pairs() -> None:
    [row] = assets.shell_rows("tar", SHEET)
    assert row["messages"] == [
        {"role": "user", "content": "tar: To list the content of an archive"},
        {"role": "assistant", "content": "tar -tvf foo.tar"},
    ]


def test_splits_depend_on_the_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(assets.HELD_OUT, "shell", 3)
    rows: list[assets.Example] = [{"n": n} for n in range(10)]
    for folder, order in {"a": rows, "b": rows[::-1]}.items():
        (tmp_path / folder).mkdir()
        assets._write_splits(tmp_path / folder, "shell", order)
    texts = [{f.name: f.read_text() for f in (tmp_path / name).iterdir()} for name in "ab"]
    assert texts[0] == texts[1]
    assert texts[0]["val.jsonl"] + texts[0]["train.jsonl"] == texts[0]["all.jsonl"]


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_real_shell_pairs(real_shell: tuple[Path, Path]) -> None:
    train, val = map(lines, real_shell)
    assert (len(train), len(val)) == (761, 48)
    assert not set(train) & set(val)
    for row in map(json.loads, train + val):
        question, answer = (turn["content"] for turn in row["messages"])
        assert answer.startswith(question.split(":")[0])


def test_real_sentiment_rows(real_sentiment: tuple[Path, Path]) -> None:
    train, val = map(lines, real_sentiment)
    assert (len(train), len(val)) == (8173, 1000)
    labels = [json.loads(row)["label"] for row in val]
    assert 400 < labels.count("positive") < 600


def test_real_model_is_the_one_it_says(real_smollm2: Path) -> None:
    """Unpacked right: it is a plain Llama of 135 M in bf16, it ends its turns, and it knows where Paris is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_smollm2)
    model = AutoModelForCausalLM.from_pretrained(real_smollm2, dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    turns = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(said)


def test_real_encoder_loads(real_minilm: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(real_minilm)
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
