"""A step that is rehearsed without numbers holds what a step holds: beside what torch's own allocator handed out.

The measured runs are whole runs of `veneer.train` - reading, optimiser, everything before the proofs - so whatever the
rehearsal forgets shows.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import veneer
from veneer.advise.rehearsal import Ledger, Rehearsed, Scene, faked, rehearse
from veneer.app.preflight import preflight
from veneer.errors import TargetError
from veneer.train.settings import resolve

Image = pytest.importorskip("PIL.Image")
NEAR = 0.12


def handed_out(work: Callable[[], Any]) -> int:
    """The highest sum of live allocations, as benchmarks/memory.py measures it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded:
        work()
    live = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def photos(folder: Path, side: int, count: int = 4) -> str:
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red dot")
    return str(folder)


def denoiser(tmp_path: Path) -> dict[str, Any]:
    diffusers = pytest.importorskip("diffusers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    held = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<s>", "</s>", "a", "red", "dot"])}, unk_token="</s>")
    )
    held.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(
        tokenizer_object=held,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="</s>",
        model_max_length=77,
    )
    text = CLIPTextConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=32, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=words, unet=unet, safety_checker=None,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(tmp_path / "base")
    return {
        "data": photos(tmp_path / "photos", 64), "task": "diffusion", "resolution": 64, "sample_prompts": "a red dot",
        "sample_steps": 1, "sample_every": 0,
    }  # fmt: skip


def detector(tmp_path: Path) -> dict[str, Any]:
    pytest.importorskip("scipy")
    pytest.importorskip("pycocotools")
    import transformers

    config = transformers.YolosConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=[112, 112],
        patch_size=8, num_detection_tokens=10, num_labels=2,
    )  # fmt: skip
    transformers.AutoModelForObjectDetection.from_config(config).save_pretrained(tmp_path / "base")
    kind = getattr(transformers, "YolosImageProcessorPil", transformers.YolosImageProcessor)
    kind(size={"height": 112, "width": 112}).save_pretrained(tmp_path / "base")
    photos(tmp_path / "photos", 112)
    lines = [f"photos/{i}.png,{name},5,5,60,70" for i in range(4) for name in ("red", "blue")]
    (tmp_path / "boxes.csv").write_text("\n".join(["path,label,x0,y0,x1,y1", *lines]) + "\n")
    return {"data": str(tmp_path / "boxes.csv"), "task": "detection", "val": 1}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {"denoiser": denoiser, "detector": detector}


@pytest.mark.parametrize("case", CASES)
def test_a_rehearsed_step_holds_what_a_run_is_handed(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if case == "detector":
        request.getfixturevalue("image_processors")
    torch.manual_seed(0)
    settings = {**CASES[case](tmp_path), "r": 4, "batch_size": 8, "steps": 2}
    heard: list[dict[str, Any]] = []
    base = str(tmp_path / "base")
    checked = preflight(resolve(mapping={**settings, "model": base}), lambda kind, **facts: heard.append(facts))
    assert isinstance(checked.memory, Rehearsed), heard[-3:]
    assert checked.memory.fits and any("needs" in facts.get("text", "") for facts in heard)
    monkeypatch.setattr("veneer.train.loop.finish", lambda *_: None)  # the proofs, which are no step
    measured = handed_out(lambda: veneer.train(base, out=str(tmp_path / "run"), **settings))
    assert abs(checked.memory.total_bytes / measured - 1) < NEAR, (checked.memory.parts, measured)
    assert checked.to_json()["memory"]["how"] == "rehearsed"


def test_what_cannot_be_rehearsed_says_why() -> None:
    layer = nn.Linear(4, 4)

    def scene(loss: Callable[[], Any]) -> Rehearsed | str:
        return rehearse(lambda: Scene(layer, list(layer.parameters()), loss), "adamw", "cpu", 2**30)

    assert isinstance(scene(lambda: layer(torch.zeros(3, 4)).sum()), Rehearsed)
    asks = scene(lambda: layer(torch.zeros(3, 4)).sum() * float(torch.rand(())))
    assert isinstance(asks, str) and "without numbers" in asks

    def wrong() -> Any:
        raise TargetError("no such layer", fix="another")

    with pytest.raises(TargetError):  # what a run would say is said
        scene(wrong)


def test_the_ledger_knows_what_is_gone() -> None:
    with faked(), Ledger() as ledger:
        one = torch.zeros(1000)
        two = one + 1
        assert ledger.live == 8000
        three = two[10:].view(-1)  # no storage of its own
        del two
        assert ledger.live == 8000
        del three
        assert ledger.live == 4000 and ledger.peak == 8000
