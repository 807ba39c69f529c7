"""Adapters on disk that really change what a tiny model says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from veneer.ckpt.peft import save
from veneer.core.model import attach, parameters
from veneer.core.spec import LoRA
from veneer.infer.load import Ready, load, source_of_folder


@pytest.fixture
def make_adapter(tiny_folder: Path) -> Callable[..., Path]:
    """make_adapter("sql"): a folder with an adapter of tiny_folder's model, away from its start."""

    def make(name: str, seed: int = 0, size: float = 0.3) -> Path:
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        attach(model, LoRA(rank=4, alpha=8))
        dice = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in parameters(model).values():
                parameter.copy_(torch.randn(parameter.shape, generator=dice) * size)
        return save(model, tiny_folder.parent / name)

    return make


@pytest.fixture
def ready(make_adapter: Callable[..., Path]) -> Ready:
    """A tiny model with the adapters a and b."""
    sources = [source_of_folder(str(make_adapter(name, seed))) for seed, name in enumerate("ab")]
    return load(sources, say=lambda line: None)
