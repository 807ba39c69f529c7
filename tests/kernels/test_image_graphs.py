"""A UNet recorded as CUDA graphs trains as one that is not; on a CPU by test_graphs.py's stand-in for the card."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from test_graphs import device
from test_image import TARGETS, inputs, model_of
from torch import Tensor

from veneer.kernels.fuse import fuse

diffusers = pytest.importorskip("diffusers")
diffusers.UNet2DConditionModel  # noqa: B018  (imported now, before the stand-in replaces torch.cuda.Stream)

__all__ = ["device"]


def moved(model: Any, sides: tuple[int, ...], card: str) -> list[Tensor]:
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
    recorder = next(m.fused.recorder for m in model.modules() if "fused" in m.__dict__)
    return [record.forward_graph is not None for record in recorder.records.values()]


@pytest.mark.parametrize("recompute,build", [("none", "sdxl"), ("input", "sd1")])
def test_a_recorded_unet_trains_as_one_that_is_not(recompute: str, build: str, device: str) -> None:
    ever = model_of(build, torch.float64 if device == "cpu" else torch.float32, TARGETS["attention"]).to(device)
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
