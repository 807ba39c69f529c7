"""A denoiser recorded as CUDA graphs trains as one that is not; on a CPU by test_graphs.py's stand-in for the card."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import test_dit
import torch
from test_graphs import device
from test_image import TARGETS, inputs, model_of
from torch import Tensor

import veneer
from veneer import LoRA
from veneer.kernels.fuse import fuse, unfuse

diffusers = pytest.importorskip("diffusers")
diffusers.UNet2DConditionModel  # noqa: B018  (imported now, before the stand-in replaces torch.cuda.Stream)

__all__ = ["device"]


def moved(model: Any, sides: tuple[int, ...], card: str, inputs: Any = inputs) -> list[Tensor]:
    """Losses of some steps, one for each side of an image, and the parameters after them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    seen = []
    for i, side in enumerate(sides):
        given = {k: v.to(card) if isinstance(v, Tensor) else v for k, v in inputs(model, side).items()}
        if "added_cond_kwargs" in given:
            given["added_cond_kwargs"] = {k: v.to(card) for k, v in given["added_cond_kwargs"].items()}
        loss = (model(**given).sample - i).square().mean()
        loss.backward()
        seen.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, *(p.detach().clone() for p in trained)]


def records(model: Any) -> list[bool]:
    recorder = next(m.fused.recorder for m in model.modules() if "fused" in m.__dict__ and m.fused.recorder)
    return [record.forward_graph is not None for record in recorder.records.values()]


@pytest.mark.parametrize(
    "recompute,build,targets",
    [("none", "sdxl", ["attention"]), ("input", "sd1", ["attention"]), ("none", "sd1", ["convolutions", "queries"])],
)
def test_a_recorded_unet_trains_as_one_that_is_not(recompute: str, build: str, targets: list[str], device: str) -> None:
    asked = [each for name in targets for each in TARGETS[name]]
    ever = model_of(build, torch.float64 if device == "cpu" else torch.float32, asked).to(device)
    graphed = copy.deepcopy(ever)
    fuse(ever, recompute, verbose=False)
    fuse(graphed, recompute, graphs=True, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = moved(graphed, (8, 8, 8, 8), device)
    assert len(records(graphed)) > 8 and all(records(graphed))  # stages, and residual blocks after the first adapter
    for mine, plain in zip(got, moved(ever, (8, 8, 8, 8), device), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9 if device == "cpu" else 1e-3, atol=1e-9)


def test_images_of_another_size_run_as_ever(device: str) -> None:
    ever = model_of("sdxl", torch.float64 if device == "cpu" else torch.float32, TARGETS["attention"]).to(device)
    graphed = copy.deepcopy(ever)
    fuse(ever, verbose=False)
    fuse(graphed, graphs=True, verbose=False)
    sides = (8, 8, 8, 16, 8, 16, 16)
    for mine, plain in zip(moved(graphed, sides, device), moved(ever, sides, device), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9 if device == "cpu" else 1e-3, atol=1e-9)


# ------------------------------------------------------------------ image transformers


def of_transformer(model: Any, words: int) -> dict[str, Any]:
    """The inputs of test_dit.py, with so many words."""
    given = test_dit.inputs(model)
    text = given["encoder_hidden_states"]
    given["encoder_hidden_states"] = torch.cat([text, text.flip(1)], dim=1)[:, :words]
    if "txt_ids" in given:
        given["txt_ids"] = torch.zeros(words, 3)
    if type(model).__name__.startswith("Qwen"):
        mask = torch.ones(2, words, dtype=torch.bool)
        mask[0, 3:] = False
        given["encoder_hidden_states_mask"] = mask
    return given


@pytest.mark.parametrize("build", test_dit.BUILDS)
@pytest.mark.parametrize("recompute,words", [("none", (5,) * 5), ("input", (5, 5, 5, 8, 5, 8, 8))])
def test_a_recorded_transformer_trains_as_one_that_is_not(
    build: str, recompute: str, words: tuple[int, ...], device: str
) -> None:
    dtype = torch.float64 if device == "cpu" else torch.float32
    ever = test_dit.model_of(build, dtype, test_dit.TARGETS["everything in blocks"]).to(device)
    graphed = copy.deepcopy(ever)
    fuse(ever, recompute, verbose=False)
    assert fuse(graphed, recompute, graphs=True, verbose=False).ungraphed in (None, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = moved(graphed, words, device, of_transformer)
    for mine, plain in zip(got, moved(ever, words, device, of_transformer), strict=True):
        torch.testing.assert_close(
            mine, plain, rtol=1e-9 if device == "cpu" else 1e-3, atol=1e-9 if device == "cpu" else 1e-5
        )
    count = sum(test_dit.TAKEN[build].values())
    assert records(graphed) == [True] * count if len(set(words)) == 1 else len(records(graphed)) == count


CPU = "they need a GPU, and the model is on the cpu"


def test_blocks_of_one_stream_hand_on_one_tensor(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of it, which the next block joins again without a copy; also in records, where their gradients then are
    handed back in one place."""
    from veneer.kernels import dit_fuse, graphs

    model = test_dit.model_of("flux", torch.float64 if device == "cpu" else torch.float32).to(device)
    fuse(model, graphs=True, verbose=False)
    followed, joined = [], []
    own, beside = graphs._follows, dit_fuse._beside

    def follows(x: Tensor) -> bool:
        followed.append(own(x))
        return followed[-1]

    def watched(text: Tensor, image: Tensor) -> Tensor:
        both = beside(text, image)
        joined.append(both.data_ptr() == text.data_ptr())
        return both

    monkeypatch.setattr(graphs, "_follows", follows)
    moved(model, (5, 5, 5, 5), device, of_transformer)
    assert followed == [False, True, True, True] * 2  # of four blocks, in two steps that were recorded or replayed
    unfuse(model)
    fuse(model, verbose=False)
    monkeypatch.setattr(dit_fuse, "_beside", watched)
    moved(model, (5,), device, of_transformer)
    assert joined == [False, True]  # the two blocks of one stream


def test_what_a_recorded_transformer_cannot_have_runs_as_ever(device: str) -> None:
    """Adapters on what the time is made of give the time a gradient, which a record has none for."""
    model: Any = test_dit.model_of("flux", torch.float64 if device == "cpu" else torch.float32).to(device)
    veneer.attach(model, LoRA(rank=2, targets=r"time_text_embed.*linear_1"), name="times")
    veneer.activate(model, ["default", "times"])
    test_dit.spread(model)
    ever = copy.deepcopy(model)
    fuse(model, graphs=True, verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*run plainly")
        got = moved(model, (5, 5, 5, 5), device, of_transformer)
    assert not any(records(model))
    for mine, plain in zip(got, moved(ever, (5, 5, 5, 5), device, of_transformer), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-5)
