"""Image classification from a folder of pictures to a proved run, on classifiers of four kinds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from veneer.app.commands.eval import held_out
from veneer.data import types
from veneer.data.batch import batches, collate
from veneer.data.dataset import load, split
from veneer.data.images import encode_pictures, in_colours, open_picture
from veneer.data.types import Pictured
from veneer.errors import DataError
from veneer.tasks.image_classification import ImageClassification
from veneer.train.loop import train

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

SIZE = 16


def processor() -> Any:
    kind = transformers.ViTImageProcessorPil if hasattr(transformers, "ViTImageProcessorPil") else None
    kind = kind or transformers.ViTImageProcessor
    return kind(size={"height": SIZE, "width": SIZE}, do_normalize=True)


SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIZE,
    "patch_size": 8,
}
KINDS: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTConfig(**SMALL),
    "dinov2": lambda: transformers.Dinov2Config(**SMALL),
    "swin": lambda: transformers.SwinConfig(
        image_size=SIZE, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
    ),
    "convnext": lambda: transformers.ConvNextConfig(
        image_size=SIZE, patch_size=2, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2
    ),
}


def based(kind: str, tmp_path: Path) -> tuple[Path, Any]:
    """A base in a folder, with a head for other classes, which is replaced."""
    torch.manual_seed(0)
    config = KINDS[kind]()
    config.num_labels = 7
    model = transformers.AutoModelForImageClassification.from_config(config)
    model.save_pretrained(tmp_path / "base")
    processor().save_pretrained(tmp_path / "base")
    return tmp_path / "base", model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes that a straight line parts: red, green and blue, with noise."""
    rng = np.random.default_rng(0)
    for place, name in enumerate(("red", "green", "blue")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 90, (SIZE, SIZE, 3), dtype=np.uint8)
            pixels[..., place] += 150
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


# ---------------------------------------------------------------- rows


def test_a_folder_a_table_and_rows_say_the_same(folder: Path, tmp_path: Path) -> None:
    one = load(folder, kinds=(Pictured,))
    assert len(one) == 36 and one.labels.names == ("blue", "green", "red") and one.format == "image"
    lines = [
        "path,label",
        *(f"{path.relative_to(folder)},{path.parent.name}" for path in sorted(folder.rglob("*.png"))),
    ]
    (folder / "table.csv").write_text("\n".join(lines))
    other = load(folder, kinds=(Pictured,))  # a table beside pictures names them
    assert len(other) == 36 and other.labels == one.labels
    assert other.examples[0].where.startswith(str(folder / "table.csv"))  # type: ignore[union-attr]
    held = [{"image": open_picture(example), "label": example.label} for example in one.examples]  # type: ignore[arg-type, union-attr]
    third = load(held, kinds=(Pictured,))
    sets = [encode_pictures(each.examples, processor(), one.labels).samples for each in (one, other, third)]  # type: ignore[arg-type]
    pixels = [collate(samples).inputs["pixel_values"] for samples in sets]
    order = {label: i for i, label in enumerate(("blue", "green", "red"))}
    assert [s.labels for s in sets[0]] == [[order[e.label]] for e in one.examples]  # type: ignore[union-attr, index]
    assert pixels[0].shape == (36, 3, SIZE, SIZE)
    assert all(torch.equal(pixels[0], each) for each in pixels[1:])


def test_the_split_stays_when_the_folder_moves(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named wholly, in part or after a move: the same are held out. A picture of that name elsewhere is another."""

    def held(data: Any) -> list[str]:
        return [Path(example.image).name for example in split(load(data), 3).validation]  # type: ignore[union-attr]

    first, ids = held(folder), {example.id for example in load(folder)}
    monkeypatch.chdir(folder.parent)
    assert held(folder.name) == first and held(f"./{folder.name}/") == first
    monkeypatch.chdir(folder)
    assert held(".") == first
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "deep" / folder.name)
    assert held(moved) == first and {example.id for example in load(moved)} == ids
    other = shutil.copytree(folder, tmp_path / "others")
    assert not ids & {example.id for example in load(other)}
    assert load([folder, other]).duplicates == 0 and split(load(folder), other).repeated == 0


@pytest.mark.usefixtures("image_processors")
def test_a_run_that_knew_whole_paths_goes_on_with_its_split(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hash_of = types._hash_of
    monkeypatch.setattr(types, "_hash_of", lambda said, image, under="": hash_of(said, image))
    told = {"task": "image", "val": 3, "steps": 4, "out": str(tmp_path / "run")}
    run = train(
        str(based("vit", tmp_path)[0]), str(folder), **told, report=lambda e: "stop" if e.get("step") == 2 else None
    )
    assert run.status == "stopped"
    begun = run.data["split"]["validation_ids"]
    monkeypatch.setattr(types, "_hash_of", hash_of)
    assert set(begun).isdisjoint(example.id for example in load(folder))
    run = train(resume=str(run.folder))
    assert run.status == "done" and run.data["split"]["validation_ids"] == begun
    assert [example.id for example in held_out(run)[0]] == begun


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_every_kind_of_picture_becomes_colours(mode: str, tmp_path: Path) -> None:
    values = np.linspace(0, 255, SIZE * SIZE).reshape(SIZE, SIZE)
    if mode == "I;16":
        picture = Image.fromarray((values * 257).astype("uint16"))
    else:
        picture = Image.fromarray(values.astype("uint8")).convert(mode)
    found = np.asarray(in_colours(picture)).astype(float)
    assert found.shape == (SIZE, SIZE, 3)
    assert np.abs(found.mean(-1) - values).max() <= 4


def test_odd_pictures_are_told_and_broken_ones_refused(folder: Path) -> None:
    Image.new("L", (9, 30), 3).save(folder / "red" / "grey.png")
    Image.new("RGBA", (20, 20), (9, 9, 9, 30)).save(folder / "red" / "glass.png")
    data = load(folder, kinds=(Pictured,))
    found = encode_pictures(data.examples, processor(), data.labels)  # type: ignore[arg-type]
    said = str(found)
    assert "1 picture has no colours" in said and "2 pictures differ in size" in said and "1 picture is partly" in said
    (folder / "blue" / "broken.png").write_bytes((folder / "blue" / "1.png").read_bytes()[:90])
    (folder / "blue" / "words.jpg").write_text("no picture")
    data = load(folder, kinds=(Pictured,))
    with pytest.raises(DataError) as caught:
        encode_pictures(data.examples, processor(), data.labels)  # type: ignore[arg-type]
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 2 and "broken.png" in told and "words.jpg" in told
    kept = encode_pictures(data.examples, processor(), data.labels, skip_bad=True)  # type: ignore[arg-type]
    assert len(kept) == 38 and kept.counts["bad"] == 2


def test_numbers_between_classes_and_a_missing_file_are_refused(folder: Path) -> None:
    rows = [{"image": str(folder / "red" / "1.png"), "label": value} for value in (0.5, 1.5)]
    data = load(rows, kinds=(Pictured,))
    with pytest.raises(DataError, match="one class"):
        ImageClassification(processor(), data.labels).encode(data.examples)
    data = load([{"image": "nowhere.png", "label": "a"}, {"image": "b.png", "label": "b"}], kinds=(Pictured,))
    with pytest.raises(DataError, match="cannot be trained") as caught:
        ImageClassification(processor(), data.labels).encode(data.examples)
    assert "nowhere.png: there is no such file" in caught.value.problems


# ---------------------------------------------------------------- runs


@pytest.mark.usefixtures("image_processors")
@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_learns_is_proved_and_left_as_it_was(kind: str, folder: Path, tmp_path: Path) -> None:
    import veneer

    base, model = based(kind, tmp_path)
    run = veneer.train(
        str(base),
        str(folder),
        task="image",
        steps=30,
        lr=0.01,
        batch_size=8,
        val=9,
        r=4,
        out=str(tmp_path / "run"),
        eval_every=10,
    )
    assert run.status == "done"
    last = run.metrics("val_loss")[-1]
    assert last["accuracy"] >= 0.8 and "top5" not in last
    confusion = json.loads(run.path("detail.json").read_text())["confusion"]
    assert confusion["classes"] == ["blue", "green", "red"] and sum(map(sum, confusion["counts"])) == 9
    assert (run.adapter / "preprocessor_config.json").is_file()
    again = transformers.AutoModelForImageClassification.from_pretrained(base)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_top5_and_the_report(folder: Path) -> None:
    task = ImageClassification(labels=load(folder, kinds=(Pictured,)).labels)
    object.__setattr__(task.labels, "names", tuple("abcdefg"))
    found = task.metrics([(0, 1, 2, 3, 4), (1, 0, 2, 3, 4)], [4, 5])
    assert found["top5"] == 0.5 and found["accuracy"] == 0.0


def test_the_report_draws_the_confusion() -> None:
    from veneer.app.report.confusion import confusion
    from veneer.app.report.record import Record

    counts = [[8, 2], [0, 5]]
    record = Record(Path("x"), detail={"confusion": {"classes": ["cat", "<dog>"], "counts": counts}})
    page = str(confusion(record))
    assert "svg" in page and "&lt;dog&gt;" in page and "<dog>" not in page and "cat" in page and "8 of 10" in page
    assert confusion(Record(Path("x"))) is None


def test_batches_of_pictures_say_what_they_hold(folder: Path) -> None:
    data = load(folder, kinds=(Pictured,))
    samples = encode_pictures(data.examples, processor(), data.labels).samples  # type: ignore[arg-type]
    batch = next(batches(samples, 4))
    assert batch.rows == batch.tokens == batch.trained_tokens == 4 and batch.padding_share == 0.0
    assert list(batch.inputs) == ["pixel_values"] and batch.labels.shape == (4,)


# ---------------------------------------------------------------- other views, and the head alone


def test_views_are_drawn_anew_and_the_held_out_picture_is_itself(folder: Path) -> None:
    data = load(folder, kinds=(Pictured,))
    plain = encode_pictures(data.examples[:1], processor(), data.labels).samples[0]  # type: ignore[arg-type]
    flipped = encode_pictures(data.examples[:1], processor(), data.labels, augment="flip").samples[0]  # type: ignore[arg-type]
    itself = plain.pixels()  # type: ignore[misc]
    assert plain.pixels() is itself  # type: ignore[misc]  # kept for the next epoch
    torch.manual_seed(0)
    views = [flipped.pixels() for _ in range(40)]  # type: ignore[misc]
    mirrored = [bool((view == itself[:, :, ::-1]).all()) for view in views]
    assert all(one or bool((view == itself).all()) for one, view in zip(mirrored, views, strict=True))
    assert 8 < sum(mirrored) < 32
    torch.manual_seed(0)
    again = [flipped.pixels() for _ in range(40)]  # type: ignore[misc]
    assert all(np.array_equal(a, b) for a, b in zip(views, again, strict=True))
    cropped = encode_pictures(data.examples[:1], processor(), data.labels, augment="crop").samples[0]  # type: ignore[arg-type]
    several = [cropped.pixels() for _ in range(5)]  # type: ignore[misc]
    assert all(view.shape == itself.shape for view in several)
    assert len({view.tobytes() for view in several}) == 5


def test_a_probe_trains_the_head_alone_on_views(folder: Path, tmp_path: Path) -> None:
    import veneer

    torch.manual_seed(0)
    config = KINDS["vit"]()
    config.num_labels = 3
    model = transformers.AutoModelForImageClassification.from_config(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"task": "image", "steps": 4, "lr": 0.05, "val": 6, "augment": "crop", "out": str(tmp_path / "run")}
    run = veneer.train(model, str(folder), tokenizer=processor(), method="freeze", layers=0, **options)
    assert run.status == "done"
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_a_frozen_batchnorm_does_not_measure(folder: Path, tmp_path: Path) -> None:
    import veneer

    torch.manual_seed(0)
    small = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    model = transformers.AutoModelForImageClassification.from_config(transformers.ResNetConfig(**small, num_labels=3))
    before = {name: value.clone() for name, value in model.named_buffers()}
    options = {"task": "image", "steps": 3, "lr": 0.01, "val": 6, "out": str(tmp_path / "run")}
    run = veneer.train(model, str(folder), tokenizer=processor(), targets=["convolution"], r=2, **options)
    assert run.status == "done"
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers() if name in before)
