"""Models of pictures and words: adapters in both towers, and conversations whose mask knows where pictures stand."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import veneer
from veneer import LoRA
from veneer.app.preflight import preflight
from veneer.data.batch import collate
from veneer.data.dataset import load
from veneer.data.illustrated import MARK, carried
from veneer.data.template import Renderer
from veneer.data.types import IGNORE, Illustrated
from veneer.errors import DataError, StateError, TargetError
from veneer.tasks.image_text import ImageText
from veneer.train.settings import resolve

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "tie_word_embeddings": False,
}  # fmt: skip
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28}
PICTURE = 399  # the token of a patch


def llava(image: int = PICTURE) -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP, patch_size=7),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=image,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen() -> Any:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32, "patch_size": 7,
        "window_size": 28, "fullatt_block_indexes": [1], "spatial_merge_size": 2,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=PICTURE,
        vision_start_token_id=397,
        vision_end_token_id=398,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def asked(kind: str) -> dict[str, Any]:
    """One row: a picture of 16 places (LLaVA) or 4 (Qwen, which joins four), then words."""
    torch.manual_seed(3)
    words, places = torch.randint(5, 300, (1, 6)), 16 if kind == "llava" else 4
    ids = torch.cat([torch.tensor([[397]]), torch.full((1, places), PICTURE), torch.tensor([[398]]), words], 1)
    if kind == "llava":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 28, 28)}
    pixels = torch.randn(16, 3 * 2 * 7 * 7)
    more = {"mm_token_type_ids": (ids == PICTURE).int(), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **more}


MODELS: dict[str, Callable[[], Any]] = {"llava": llava, "qwen2_5_vl": qwen}
PARTS = {"llava": ("vision_tower", "language_model"), "qwen2_5_vl": ("visual", "language_model")}


def spread(model: Any) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("kind", MODELS)
def test_both_towers_learn_and_come_back_from_disk(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    inputs = asked(kind)
    first = model(**inputs).logits
    idle = ImageText().idle(model)
    assert bool(idle) == (kind == "llava")  # it reads the last layer but one
    veneer.attach(model, LoRA(rank=2, exclude=idle))
    spread(model)
    out = model(**inputs).logits
    out.float().square().sum().backward()
    veneer.check_alive(model)
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert all(any(part in name.split(".") for name in reached) for part in PARTS[kind])
    veneer.save(model, tmp_path / "adapter")
    with veneer.disabled(model):
        assert torch.equal(model(**inputs).logits, first)
    torch.manual_seed(0)
    again = MODELS[kind]().eval()
    veneer.load(again, tmp_path / "adapter")
    assert torch.equal(again(**inputs).logits, out)
    veneer.merge(model)
    assert torch.allclose(model(**inputs).logits, out, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("kind", MODELS)
def test_peft_reads_what_is_written(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    veneer.attach(model, LoRA(rank=2, exclude=ImageText().idle(model)))
    spread(model)
    out = model(**asked(kind)).logits
    veneer.save(model, tmp_path / "adapter")
    torch.manual_seed(0)
    theirs = peft.PeftModel.from_pretrained(MODELS[kind](), str(tmp_path / "adapter")).eval()
    assert torch.allclose(theirs(**asked(kind)).logits, out, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_towers_by_preset_by_pattern_and_by_mistake(kind: str) -> None:
    vision, language = PARTS[kind]
    for preset, inside, outside in (("vision", vision, language), ("language", language, vision)):
        model = MODELS[kind]()
        names = list(veneer.attach(model, LoRA(rank=2, targets=preset)).sites)
        assert names and all(inside in n.split(".") and outside not in n.split(".") for n in names)
        veneer.detach(model)
        pattern = rf".*\.{inside}\..*"
        linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and inside in n.split(".")]
        assert set(names) == set(linears)
        with pytest.raises(TargetError, match=r"Near|There are"):
            veneer.attach(model, LoRA(rank=2, targets=pattern.replace(inside, inside + "s") + "q_prj"))
    with pytest.raises(TargetError, match=r"Near: .*vision"):
        veneer.attach(MODELS[kind](), LoRA(rank=2, targets="visoin"))
    with pytest.raises(TargetError, match="'vision' matches none"):
        veneer.attach(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)), LoRA(rank=2, targets="vision"))


def test_minimal_means_q_and_v_in_the_vision_towers_fused_matrix_too() -> None:
    model = qwen().eval()
    inputs = asked("qwen2_5_vl")
    report = veneer.attach(model, LoRA(rank=2, targets="minimal"))
    assert {name.rsplit(".", 1)[-1] for name in report.sites} == {"q_proj", "v_proj", "qkv"}
    spread(model)
    layer = model.model.visual.blocks[0].attn.qkv
    change = layer.lora["default"].delta.weight()
    assert (change[32:64] == 0).all() and (change[:32] != 0).any() and (change[64:] != 0).any()
    adapted = model(**inputs).logits
    veneer.merge(model)
    assert torch.allclose(model(**inputs).logits, adapted, atol=1e-4)


def test_layers_behind_the_one_that_is_read_would_be_found_dead() -> None:
    model = llava()
    veneer.attach(model, LoRA(rank=2))
    model(**asked("llava")).logits.sum().backward()
    with pytest.raises(StateError, match="got no gradient"):
        veneer.check_alive(model)


# ---------------------------------------------------------------- rows and masks


@pytest.fixture
def processor(make_tokenizer: Any) -> Any:
    tokenizer = make_tokenizer(TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<image>"]})
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    pixels = kind(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return transformers.LlavaProcessor(
        pixels, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip


def task_of(processor: Any) -> ImageText:
    return ImageText(processor, None, Renderer(ImageText.speaker(processor)))


def some_picture(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)


def test_only_the_answers_are_trained(processor: Any, tmp_path: Path) -> None:
    for number in range(2):
        Image.fromarray(some_picture(number)).save(tmp_path / f"{number}.png")
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A coat."},
        {"role": "user", "content": "And <image> this?"},
        {"role": "assistant", "content": "A shoe."},
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": talk, "images": ["0.png", "1.png"]}) + "\n")
    data = load(tmp_path / "rows.jsonl", kinds=(Illustrated,))
    task = task_of(processor)
    [sample] = task.encode(data.examples).samples
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert list(sample.input_ids).count(token) == 32
    trained = [t for t, label in zip(sample.input_ids, sample.labels, strict=True) if label != IGNORE]
    assert processor.tokenizer.decode(trained) == "A coat.<|im_end|>A shoe.<|im_end|>"
    assert all(label in (IGNORE, t) for t, label in zip(sample.input_ids, sample.labels, strict=True))
    inside = [dict(turn) for turn in talk]  # the same, spelt otherwise
    inside[0]["content"] = [
        {"type": "image", "image": str(tmp_path / "0.png")},
        {"type": "text", "text": "What is this?"},
    ]
    inside[2]["content"] = ["And ", {"type": "image", "path": str(tmp_path / "1.png")}, " this?"]
    [other] = task.encode(load([{"messages": inside}], kinds=(Illustrated,)).examples).samples
    assert (list(other.input_ids), list(other.labels)) == (list(sample.input_ids), list(sample.labels))
    batches = [collate([each, each]).inputs for each in (sample, other)]
    assert batches[0]["pixel_values"].shape == (4, 3, 28, 28)
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
    [last] = task.encode(data.examples, loss_on="last").samples
    assert sum(label != IGNORE for label in last.labels) < sample.trained_tokens


def test_labels_are_carried_over_whatever_grows() -> None:
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(5) for _ in range(rng.randrange(1, 30))]
        labels = [t if t and rng.random() < 0.4 else IGNORE for t in ids]
        whole, wanted = [], []
        for t, label in zip(ids, labels, strict=True):
            times = rng.randrange(2, 6) if t == 0 else 1
            whole += [t] * times
            wanted += [label] * times
        assert carried(ids, labels, whole) == wanted


def test_a_mask_is_never_guessed() -> None:
    with pytest.raises(DataError, match="cannot be told"):
        carried([7, 9, 4, 5], [IGNORE, IGNORE, 4, 5], [7, 9, 9, 9, 4, 6, 5])
    with pytest.raises(DataError, match="a picture's token"):
        carried([7, 9, 4, 9], [IGNORE, IGNORE, 4, 9], [7, 9, 9, 9, 4, 9])
    # text around a picture that is written otherwise does no harm before the answer
    assert carried([7, 9, 3, 4, 5], [IGNORE, IGNORE, IGNORE, 4, 5], [7, 9, 9, 8, 4, 5])[-2:] == [4, 5]


def test_wrong_rows_are_named(processor: Any) -> None:
    good = {"image": some_picture(), "question": "What is it?", "answer": "a coat"}
    talk = [{"role": "user", "content": "<image><image> What?"}, {"role": "assistant", "content": "A coat."}]
    rows = [good, {**good, "image": 3}, {**good, "answer": " "}, {**good, "image": ""}]
    with pytest.raises(DataError, match="3 of 4 rows") as caught:
        load(rows, kinds=(Illustrated,))
    assert "a number (3)" in caught.value.problems[0] and "'answer' is empty" in caught.value.problems[1]
    with pytest.raises(DataError) as caught:
        load([{"messages": talk, "images": [some_picture()]}] * 2, kinds=(Illustrated,))
    assert "2 places for pictures in 'messages', but 1 pictures" in caught.value.problems[0]
    data = load([{**good, "image": "nowhere.png"}, good], kinds=(Illustrated,))
    with pytest.raises(DataError, match="1 of 2 rows") as caught:
        task_of(processor).encode(data.examples)
    assert "there is no such file" in caught.value.problems[0]


def test_a_picture_without_a_place_opens_the_question(processor: Any) -> None:
    talk = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A coat."}]
    data = load([{"messages": talk, "image": some_picture()}], kinds=(Illustrated,))
    assert data.examples[0].chat.messages[0]["content"] == MARK + "What is it?"  # type: ignore[union-attr]


def test_a_run_learns_is_proved_and_leaves_the_base(processor: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llava(processor.tokenizer.convert_tokens_to_ids("<image>"))
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    rows = [{"image": some_picture(k), "question": "What is it?", "answer": "a coat"} for k in range(10)]
    run = veneer.train(
        str(tmp_path / "base"), rows, task="image-text", steps=8, lr=0.01, batch_size=4, val=2, r=2,
        out=str(tmp_path / "run"),
    )  # fmt: skip
    assert run.status == "done"
    losses = [row["val_loss"] for row in run.metrics("val_loss")]
    assert losses[-1] < losses[0]
    assert (run.adapter / "chat_template.jinja").is_file() and (run.adapter / "tokenizer_config.json").is_file()
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


QWEN = TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


class Films:
    """In the place of the part for films, which needs torchvision."""

    _auto_class = None

    def save_pretrained(self, *_: Any, **__: Any) -> list[str]:
        return []


class Pictures(transformers.Qwen2_5_VLProcessor):
    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        return Films if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict(*args, **kwargs).items() if k != "video_processor"}


@pytest.fixture
def qwen_processor(make_tokenizer: Any) -> Any:
    """Its pictures have as many places as their size gives: image_grid_thw says how they lie."""
    tokenizer = make_tokenizer(QWEN)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    kind = getattr(transformers, "Qwen2VLImageProcessorPil", transformers.Qwen2VLImageProcessor)
    pixels = kind(patch_size=7, merge_size=2, size={"shortest_edge": 14 * 14, "longest_edge": 42 * 42})
    return Pictures(pixels, tokenizer, Films(), chat_template=QWEN)


def test_qwen_through_its_processor(qwen_processor: Any, tmp_path: Path) -> None:
    """From pictures of two sizes to a proved run: tokens, patches and grids belong together row by row."""
    tokenizer = qwen_processor.tokenizer
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in MARKS}
    shown = [np.full((14 + 28 * (k % 2), 28, 3), 20 * k, np.uint8) for k in range(10)]
    rows = [{"image": picture, "question": "What is it?", "answer": "a coat"} for picture in shown]
    task = task_of(qwen_processor)
    samples = task.encode(load(rows, kinds=(Illustrated,)).examples).samples
    for sample in samples:
        trained = [t for t, label in zip(sample.input_ids, sample.labels, strict=True) if label != IGNORE]
        assert tokenizer.decode(trained) == "a coat<|im_end|>"
    inputs = task.collate(samples[:2]).inputs
    grids, places = inputs["image_grid_thw"], (inputs["input_ids"] == ids["<|image_pad|>"]).sum(1)
    assert grids.tolist() == [[1, 2, 4], [1, 6, 4]] and places.tolist() == [2, 6]  # four patches to a place
    assert len(inputs["pixel_values"]) == int(grids.prod(1).sum())

    torch.manual_seed(0)
    model: Any = qwen()
    model.config.text_config.eos_token_id = model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.config.image_token_id = ids["<|image_pad|>"]
    model.config.vision_start_token_id, model.config.vision_end_token_id = (
        ids["<|vision_start|>"],
        ids["<|vision_end|>"],
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = veneer.train(
        model, rows, tokenizer=qwen_processor, task="image-text", steps=8, lr=0.01, batch_size=4, val=2, r=2,
        out=str(tmp_path / "run"),
    )  # fmt: skip
    assert run.status == "done" and run.proof["passed"]
    losses = [row["val_loss"] for row in run.metrics("val_loss")]
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)


def test_check_says_that_memory_is_not_estimated_and_why(processor: Any, tmp_path: Path) -> None:
    model = llava(processor.tokenizer.convert_tokens_to_ids("<image>"))
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    rows = []
    for k in range(6):
        Image.fromarray(some_picture(k)).save(tmp_path / f"{k}.png")
        rows.append(json.dumps({"image": f"{k}.png", "question": "What is it?", "answer": "a coat"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    said: list[str] = []
    settings = {"model": str(tmp_path / "base"), "data": str(tmp_path / "rows.jsonl"), "task": "image-text", "r": 2}
    checked = preflight(resolve(mapping=settings), lambda kind, **facts: said.append(str(facts.get("text", ""))))
    assert checked.memory is None and checked.to_json()["fits"] is None
    assert any("memory not estimated" in text and "read off the tokens" in text for text in said)
    assert 0 < checked.lr < 0.1 and "77.3 k" in checked.lr_reason  # the rule knows the model's size
