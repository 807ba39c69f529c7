"""Object detection from rows of several shapes to a proved run, and everything that can be wrong with a box."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from veneer.data.batch import collate
from veneer.data.boxes import encode_boxes, of_one_size
from veneer.data.dataset import Dataset, load
from veneer.data.types import IGNORE, Boxed
from veneer.errors import ConfigError, DataError

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("pycocotools")
pytest.importorskip("scipy")

WIDE, HIGH = 40, 30
Made = tuple[Path, list[list[tuple[int, int, int, int]]], list[list[str]]]


def processor() -> Any:
    kind = getattr(transformers, "YolosImageProcessorPil", transformers.YolosImageProcessor)
    return kind(size={"shortest_edge": 28, "longest_edge": 56})


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Pictures with red and blue squares; the last one is empty."""
    rng = np.random.default_rng(0)
    boxes, labels = [], []
    for number in range(8):
        pixels = rng.integers(0, 40, (HIGH, WIDE, 3), dtype=np.uint8)
        own, named = [], []
        for _ in range(0 if number == 7 else 1 + number % 2):
            x, y, red = int(rng.integers(0, WIDE - 12)), int(rng.integers(0, HIGH - 12)), bool(rng.integers(2))
            pixels[y : y + 12, x : x + 12] = (220, 20, 20) if red else (20, 20, 220)
            own.append((x, y, x + 12, y + 12))
            named.append("red" if red else "blue")
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        boxes.append(own)
        labels.append(named)
    return tmp_path, boxes, labels


def as_coco(made: Made) -> Path:
    folder, boxes, labels = made
    pictures = [{"id": i, "file_name": f"{i}.png", "width": WIDE, "height": HIGH} for i in range(len(boxes))]
    found = [
        {"id": 10 * i + k, "image_id": i, "category_id": 1 + (label == "red"), "iscrowd": 0,
         "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
        for i, own in enumerate(boxes)
        for k, (box, label) in enumerate(zip(own, labels[i], strict=True))
    ]  # fmt: skip
    found.append({"id": 999, "image_id": 0, "category_id": 1, "iscrowd": 1, "bbox": [0, 0, 9, 9]})  # a crowd
    content = {
        "images": pictures,
        "annotations": found,
        "categories": [{"id": 1, "name": "blue"}, {"id": 2, "name": "red"}],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    return folder / "coco.json"


def as_rows(made: Made) -> list[dict[str, Any]]:
    folder, boxes, labels = made
    return [
        {"image": str(folder / f"{i}.png"), "boxes": b, "labels": n}
        for i, (b, n) in enumerate(zip(boxes, labels, strict=True))
    ]


def targets(data: Dataset) -> list[tuple[Any, Any]]:
    samples = encode_boxes(data.examples, of_one_size(processor()), data.labels).samples  # type: ignore[arg-type]
    return [(list(sample.labels), sample.boxes) for sample in samples]


# ---------------------------------------------------------------- rows


def test_every_spelling_says_the_same(made: Made) -> None:
    folder, boxes, labels = made
    coco = load(as_coco(made), kinds=(Boxed,))
    assert coco.labels.names == ("blue", "red") and len(coco) == 8 and coco.examples[7].labels == ()  # type: ignore[union-attr]
    objects = [
        {
            "image": row["image"],
            "objects": {"bbox": [[x, y, v - x, w - y] for x, y, v, w in row["boxes"]], "category": row["labels"]},
        }
        for row in as_rows(made)
    ]
    lines = ["file_name,xmin,ymin,xmax,ymax,class"]
    lines += [
        f"{i}.png,{','.join(map(str, box))},{name}"
        for i in range(8)
        for box, name in zip(boxes[i], labels[i], strict=True)
    ]
    (folder / "boxes.csv").write_text("\n".join(lines))
    table = load(folder / "boxes.csv", kinds=(Boxed,))
    wanted = targets(coco)
    assert targets(load(as_rows(made), kinds=(Boxed,))) == targets(load(objects, kinds=(Boxed,))) == wanted
    assert targets(table) == wanted[:7]  # a table of boxes has no line for a picture without any
    assert table.examples[1].where.endswith("boxes.csv:3")


def test_shares_follow_the_picture_to_any_size(made: Made) -> None:
    data = load(as_rows(made), kinds=(Boxed,))
    samples = encode_boxes(data.examples, of_one_size(processor()), data.labels).samples  # type: ignore[arg-type]
    batch = collate(samples)
    assert batch.inputs["pixel_values"].shape == (8, 3, 28, 28)
    assert batch.labels.shape == (8, 2, 5) and (batch.labels[7] == IGNORE).all()
    assert batch.trained_tokens == sum(max(1, len(row["boxes"])) for row in as_rows(made))
    for row, filled in zip(as_rows(made), batch.labels, strict=True):
        for (x0, y0, x1, y1), (_, x, y, wide, high) in zip(row["boxes"], filled.tolist(), strict=False):
            assert np.allclose(
                [x * WIDE, y * HIGH, wide * WIDE, high * HIGH], [(x0 + x1) / 2, (y0 + y1) / 2, 12, 12], atol=1e-4
            )


@pytest.mark.parametrize(
    "boxes,labels,said",
    [
        ([[9, 2, 5, 8]], ["red"], "ends before it begins"),
        ([[5, 2, 5, 8]], ["red"], "has no area"),
        ([[5, 2, 8]], ["red"], "3 numbers; four are expected"),
        ([[5, 2, "x", 8]], ["red"], "no number"),
        ([[5, 2, float("nan"), 8]], ["red"], "no number"),
        ([[5, 2, 8, 9]], ["red", "blue"], "1 boxes but 2 labels"),
    ],
)
def test_wrong_boxes_are_named_with_their_row(made: Made, boxes: Any, labels: Any, said: str) -> None:
    rows = as_rows(made)
    rows[2] |= {"boxes": boxes, "labels": labels}
    rows[3] |= {"boxes": [[0, 0, 1, 1], [3, 3, 2, 2], [4, 4, 4, 4]], "labels": ["red"] * 3}
    with pytest.raises(DataError, match="2 of 8 rows") as caught:
        load(rows, kinds=(Boxed,))
    assert said in caught.value.problems[0] and caught.value.problems[0].startswith("row 3")
    assert "2 ends before it begins" in caught.value.problems[1] and "3 has no area" in caught.value.problems[1]
    assert len(load(rows, kinds=(Boxed,), skip_bad=True)) == 6


def test_boxes_outside_and_unknown_classes_are_found_before_training(made: Made) -> None:
    train = load(as_rows(made), kinds=(Boxed,))
    rows = as_rows(made)[:3]
    rows[0] |= {"boxes": [[0, 0, WIDE + 0.5, HIGH]], "labels": ["red"]}  # rounding
    rows[1] |= {"boxes": [[0, 0, WIDE + 9, HIGH], [1, 1, 5, 5]], "labels": ["red", "bleu"]}
    rows[2] |= {"boxes": [[-4, 0, 8, 8]], "labels": ["blue"]}
    data = load(rows, kinds=(Boxed,))
    with pytest.raises(DataError, match="2 of 3 rows") as caught:
        encode_boxes(data.examples, of_one_size(processor()), train.labels)  # type: ignore[arg-type]
    first, second = caught.value.problems
    assert "reaches out of the picture, which is 40 x 30" in first and "Did you mean 'blue'?" in first
    assert first.startswith("row 2: box 1") and second.startswith("row 3: box 1")


def test_a_spoilt_coco_file_says_what_belongs_nowhere(made: Made) -> None:
    path = as_coco(made)
    content = json.loads(path.read_text())
    content["annotations"][0]["image_id"] = 77
    content["annotations"][1]["category_id"] = 5
    content["annotations"][2]["bbox"] = [1, 2, -3, 4]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        load(path, kinds=(Boxed,))
    told = "\n".join(caught.value.problems)
    assert "image_id 77" in told and "category_id 5" in told and "ends before it begins (1, 2, -2, 6)" in told


# ---------------------------------------------------------------- models


KINDS: dict[str, Any] = {
    "yolos": lambda: transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=[28, 28],
        patch_size=7,
        num_detection_tokens=4, use_mid_position_embeddings=False,
    ),
    "detr": lambda: transformers.DetrConfig(
        d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=4, use_timm_backbone=False, use_pretrained_backbone=False,
        backbone=None, backbone_config=transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage2"]
        ),
    ),
    "rt_detr": lambda: transformers.RTDetrConfig(
        backbone_config=transformers.Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=7, image_size=28,
            out_features=["stage2"],
        ),
        encoder_in_channels=[16], feat_strides=[7], encode_proj_layers=[0], encoder_hidden_dim=16, encoder_ffn_dim=32,
        encoder_attention_heads=2, d_model=16, decoder_in_channels=[16], decoder_ffn_dim=32, num_feature_levels=1,
        decoder_layers=2, decoder_attention_heads=2, num_queries=6, num_denoising=4,
    ),
}  # fmt: skip


@pytest.mark.usefixtures("image_processors")
@pytest.mark.parametrize("kind", KINDS)
def test_a_detector_learns_is_proved_and_left_as_it_was(
    kind: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import veneer

    monkeypatch.chdir(made[0])  # rows are held out by their paths: whole ones are others in each run of this test
    rows = [{**row, "image": Path(row["image"]).name} for row in as_rows(made)]
    torch.manual_seed(0)
    config = KINDS[kind]()
    config.num_labels = 5  # heads for other classes, which are replaced
    model = transformers.AutoModelForObjectDetection.from_config(config)
    model.save_pretrained(tmp_path / "base")
    processor().save_pretrained(tmp_path / "base")
    run = veneer.train(
        str(tmp_path / "base"), rows, task="detection", steps=12, lr=0.01, batch_size=4, val=2, r=4,
        targets="attention", out=str(tmp_path / "run"), eval_every=6, seed=1,
    )  # fmt: skip
    assert run.status == "done"
    judged = run.metrics("val_loss")
    assert judged[-1]["val_loss"] < judged[0]["val_loss"] and {"map", "map50", "map75"} <= set(judged[-1])
    assert set(json.loads(run.path("detail.json").read_text())["average_precision"]) <= {"red", "blue"}
    assert json.loads((run.adapter / "preprocessor_config.json").read_text())["size"] == {"height": 28, "width": 28}
    again = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "base")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_what_is_said_of_boxes_does_not_depend_on_the_cut(made: Made) -> None:
    from veneer.tasks.object_detection import ObjectDetection

    torch.manual_seed(0)
    data = load(as_rows(made), kinds=(Boxed,))
    config = KINDS["yolos"]()
    config.num_labels, config.eos_coefficient = 2, 0.0  # guesses that found nothing apart
    model = transformers.AutoModelForObjectDetection.from_config(config).eval()
    task = ObjectDetection(processor(), data.labels)
    samples = task.encode(data.examples).samples[:7]
    whole = task.loss(model, collate(samples))
    parts = sum(task.loss(model, collate(samples[i : i + 2])) for i in range(0, 7, 2))
    assert torch.allclose(whole, parts, rtol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [range(8), range(6, 8), range(7, 8)])  # boxes of unlike number; with and without any
def test_a_loss_that_is_counted_at_once_is_the_library_s_own(kind: str, rows: range, made: Made) -> None:
    from veneer.tasks.box_loss import joined_loss
    from veneer.tasks.object_detection import ObjectDetection, wanted_of

    torch.manual_seed(0)
    data = load(as_rows(made), kinds=(Boxed,))
    config = KINDS[kind]()
    config.num_labels, config.auxiliary_loss = 2, kind != "yolos"  # which has none
    model = transformers.AutoModelForObjectDetection.from_config(config).train()
    task = ObjectDetection(processor(), data.labels)
    batch = collate([task.encode(data.examples).samples[i] for i in rows])
    assert joined_loss(model.loss_function) is not None
    given, boxes = wanted_of(batch.labels), max(1, int((batch.labels[..., 0] != IGNORE).sum()))

    def outcome(loss: Any) -> list[torch.Tensor]:
        torch.manual_seed(1)  # of what is drawn for denoising
        model.zero_grad()
        found = loss()
        found.backward()
        return [found.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    own = outcome(lambda: model(pixel_values=batch.inputs["pixel_values"], labels=given).loss * boxes)
    ours = outcome(lambda: task.judge(model, batch).loss)
    assert "_loss_function" not in vars(model) and len(own) == len(ours) > 9
    for mine, wanted in zip(ours, own, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("image_processors")
def test_bf16_is_refused_with_the_reason(made: Made, tmp_path: Path) -> None:
    import veneer

    with pytest.raises(ConfigError, match="cannot be computed in bf16"):
        transformers.AutoModelForObjectDetection.from_config(KINDS["yolos"]()).save_pretrained(tmp_path / "base")
        processor().save_pretrained(tmp_path / "base")
        veneer.train(
            str(tmp_path / "base"), as_rows(made), task="detection", precision="bf16", out=str(tmp_path / "run")
        )
