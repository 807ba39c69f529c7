"""Pictures with words: where captions come from, which are missing, and how pictures of all shapes get their size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from veneer.data.captions import Canvas, buckets, encode_captioned, nearest
from veneer.data.dataset import load
from veneer.data.types import Captioned, Pictured
from veneer.errors import ConfigError, DataError

Image = pytest.importorskip("PIL.Image")
SIZES = buckets(64, 8)


def draw(path: Path, size: tuple[int, int] = (20, 20), caption: str | None = None, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, {"L": 90, "RGBA": (9, 9, 9, 255)}.get(mode)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def words(data: Any, **options: Any) -> list[str]:
    rows = load(data if isinstance(data, list) else str(data), kinds=(Captioned,))
    return [sample.pixels.caption for sample in encode_captioned(rows.examples, SIZES, **options).samples]  # type: ignore[union-attr, arg-type]


def problems(data: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        words(data, **options)
    return "\n".join([caught.value.what, *caught.value.problems])


# ---------------------------------------------------------------- where words come from


def test_texts_beside_pictures(tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg", caption="a red\nball ")
    draw(tmp_path / "b.png", caption="a [trigger], blue")
    draw(tmp_path / "c.webp").with_suffix(".caption").write_text("green")
    (tmp_path / "notes.txt").write_text("not a caption, for nothing is called notes")
    assert words(tmp_path, trigger="sks") == ["a red ball", "a sks, blue", "green"]
    assert load(str(tmp_path), kinds=(Pictured,)).unused == ("text",)  # for others they are pictures still


def test_tables_name_pictures_and_words(tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg")
    draw(tmp_path / "deep" / "b.jpg")
    rows = [{"file_name": "a.jpg", "text": "one"}, {"file_name": "deep/b.jpg", "text": "two"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert words(tmp_path) == ["one", "two"]
    table = tmp_path / "table.csv"
    table.write_text("image,caption\na.jpg,three\ndeep/b.jpg,four\n")
    assert words(table) == ["three", "four"]
    held = [{"image": Image.new("RGB", (9, 9)), "prompt": "five"}]
    assert words(held) == ["five"]


def test_folders_repeat_and_name(tmp_path: Path) -> None:
    """Kohya's: 3_red dot is seen three times; where nothing else says what it is, it is a red dot."""
    draw(tmp_path / "3_red dot" / "a.png")
    draw(tmp_path / "1_blue" / "b.png")
    assert words(tmp_path) == ["blue", "red dot", "red dot", "red dot"]
    draw(tmp_path / "3_red dot" / "c.png", caption="a photo of a red dot")
    assert "a.png: it has no caption" in problems(tmp_path) and "b.png" in problems(tmp_path)
    assert words(tmp_path, captions="folders") == ["blue", *["red dot"] * 3, *["a photo of a red dot"] * 3]
    assert words(tmp_path, captions="none").count("") == 4
    assert words(tmp_path, captions="a photo of [trigger]", trigger="sks") == ["a photo of sks"] * 7


def test_what_a_single_folder_is_called_is_no_caption(tmp_path: Path) -> None:
    for name in "ab":
        draw(tmp_path / f"{name}.png")
    said = problems(tmp_path)
    assert "a.png: it has no caption: no text file" in said and "b.png" in said and "captions=folders" in said
    draw(tmp_path / "a.png", caption="  ")
    draw(tmp_path / "b.png", caption="b")
    assert "a.png: it has no caption" in problems(tmp_path)  # an empty text says nothing
    assert words(tmp_path, captions="none") == ["", "b"]


def test_a_trigger_without_a_word_and_bad_texts_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", caption="a [trigger]")
    assert "has a place for a trigger word" in problems(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError) as caught:
        load(str(tmp_path), kinds=(Captioned,))
    assert "a.txt:1: not UTF-8" in "\n".join(caught.value.problems)


def test_a_picture_is_not_held_out_for_its_name(tmp_path: Path) -> None:
    draw(tmp_path / "10_train" / "test-1.png")
    draw(tmp_path / "1_model" / "val.png")
    data = load(str(tmp_path), kinds=(Captioned,))
    assert len(data) == 2 and data.held_out is None
    draw(tmp_path / "val" / "c.png")
    draw(tmp_path / "train" / "d.png")
    parted = load(str(tmp_path), kinds=(Captioned,))
    assert len(parted) == 1 and parted.held_out is not None and len(parted.held_out) == 1


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("side,step", [(512, 64), (1024, 64), (1024, 16), (32, 4), (64, 64)])
def test_buckets_hold_no_more_than_the_square(side: int, step: int) -> None:
    found = buckets(side, step)
    assert (side, side) in found and set(found) == {(h, w) for w, h in found}
    for width, height in found:
        assert width % step == height % step == 0 and 0.7 * side**2 < width * height <= side**2
        assert 1 / 2.2 <= width / height <= 2.2
    assert buckets(side, step, square=True) == ((side, side),)


def test_a_side_that_the_model_cannot_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="no multiple of 64") as caught:
        buckets(500, 64)
    assert "448 or 512" in str(caught.value)


@pytest.mark.parametrize("size", [(20, 20), (10, 200), (200, 10), (333, 250), (64, 64), (7, 5)])
def test_a_picture_covers_its_canvas(size: tuple[int, int], tmp_path: Path) -> None:
    """Its proportions stay, its middle is kept, and its values lie in -1 ... 1."""
    ramp = np.linspace(0, 255, size[0]).astype("uint8")[None, :, None].repeat(size[1], 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    canvas = Canvas(Captioned(image=str(tmp_path / "a.png")), "", nearest(size, SIZES), size)
    found = canvas()
    assert found.shape == (3, canvas.size[1], canvas.size[0]) and found.dtype == np.float32
    assert found.min() >= -1 and found.max() <= 1
    row = found[0].mean(0)
    assert abs(row[0] + row[-1]) < 0.1  # cut evenly on both sides
    assert (np.diff(row) >= -0.02).all()
    kept = [mine / (own * canvas.scale) for mine, own in zip(canvas.size, size, strict=True)]
    assert max(kept) == pytest.approx(1) and min(canvas.crop) >= 0


def test_odd_pictures_are_told_and_broken_ones_listed(tmp_path: Path) -> None:
    draw(tmp_path / "1_a" / "grey.png", (100, 100), "g", "L")
    draw(tmp_path / "1_a" / "wide.png", (200, 100), "w")
    draw(tmp_path / "1_a" / "small.png", (9, 9), "s")
    data = load(str(tmp_path), kinds=(Captioned,))
    found = encode_captioned(data.examples, SIZES)  # type: ignore[arg-type]
    said = str(found)
    assert "1 picture has no colours" in said and "1 picture is smaller" in said and "trained in 2 shapes" in said
    assert len({sample.shape for sample in found.samples}) == 2
    draw(tmp_path / "1_a" / "print.jpg", (100, 100), "p", "CMYK")
    draw(tmp_path / "1_a" / "table.png", (100, 100), "t", "P")
    draw(tmp_path / "1_a" / "opaque.png", (100, 100), "o", "RGBA")  # a layer through which nothing shows
    said = str(encode_captioned(load(str(tmp_path), kinds=(Captioned,)).examples, SIZES))  # type: ignore[arg-type]
    assert "2 pictures have a palette or the colours of print and were turned to RGB" in said
    assert "transparent" not in said
    (tmp_path / "1_a" / "cut.png").write_bytes((tmp_path / "1_a" / "wide.png").read_bytes()[:60])
    (tmp_path / "1_a" / "cut.txt").write_text("c")
    assert "cut.png" in problems(tmp_path)
    assert words(tmp_path, skip_bad=True) == ["g", "o", "p", "s", "t", "w"]
