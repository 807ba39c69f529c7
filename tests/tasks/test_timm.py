"""Models of timm, where it is installed: by themselves, and through transformers' wrapper in a whole run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import veneer
from veneer import LoRA

timm = pytest.importorskip("timm", exc_type=ImportError)  # it imports torchvision, which may be missing or another's

SIZE = 32
SMALL: dict[str, Callable[[], Any]] = {
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3
    ),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=SIZE, patch_size=2, window_size=4, embed_dim=16, depths=(1, 1),
        num_heads=(2, 2), num_classes=3,
    ),
    "convnext": lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=3),
    "dinov2": lambda: timm.create_model(
        "vit_small_patch14_dinov2", img_size=28, embed_dim=24, depth=2, num_heads=2, num_classes=3, init_values=1.0
    ),
}  # fmt: skip


def spread(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)


@pytest.mark.parametrize("preset", ["all-linear", "attention", "minimal"])
@pytest.mark.parametrize("kind", SMALL)
def test_adapted_is_merged_and_comes_back_from_disk(kind: str, preset: str, tmp_path: Path) -> None:
    if kind == "convnext" and preset != "all-linear":
        pytest.skip("it has no attention")
    torch.manual_seed(0)
    model = SMALL[kind]().eval()
    x = torch.randn(2, 3, 28 if kind == "dinov2" else SIZE, 28 if kind == "dinov2" else SIZE)
    first = model(x)
    veneer.attach(model, LoRA(rank=2, alpha=4, targets=preset, modules_to_save=()))
    spread(model)
    adapted = model(x)
    assert (adapted - first).abs().max() > 1e-4
    veneer.save(model, tmp_path / "adapter")
    veneer.merge(model)
    assert torch.allclose(model(x), adapted, atol=1e-5)
    veneer.unmerge(model)
    with veneer.disabled(model):
        assert torch.equal(model(x), first)
    torch.manual_seed(0)
    again = SMALL[kind]().eval()
    veneer.load(again, tmp_path / "adapter")
    assert torch.equal(again(x), adapted)


def test_minimal_changes_q_and_v_alone() -> None:
    model = SMALL["vit"]()
    veneer.attach(model, LoRA(rank=2, targets="minimal"))
    spread(model)
    layer = model.blocks[0].attn.qkv
    change = layer.lora["default"].delta.weight()
    assert change.shape == (72, 24) and (change[24:48] == 0).all()
    assert (change[:24] != 0).any() and (change[48:] != 0).any()


def test_a_run_on_a_wrapped_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=5, pretrained_cfg={"input_size": (3, SIZE, SIZE)},
        model_args={"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    )  # fmt: skip
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "base")
    rng = np.random.default_rng(0)
    rows = []
    for place, name in enumerate(("red", "green", "blue") * 8):
        pixels = rng.integers(0, 90, (SIZE, SIZE, 3), dtype=np.uint8)
        pixels[..., place % 3] += 150
        rows.append({"image": pixels, "label": name})
    run = veneer.train(
        str(tmp_path / "base"),
        rows,
        task="image",
        steps=20,
        lr=0.01,
        batch_size=8,
        val=6,
        r=4,
        out=str(tmp_path / "run"),
    )
    assert run.status == "done" and run.metrics("val_loss")[-1]["accuracy"] > 0.5
