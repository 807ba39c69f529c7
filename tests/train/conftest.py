"""`run_tiny`: train at toy size. What else the tests here share lies in train_runs.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # for train_runs: with importlib mode no folder of tests is on the path

from train_runs import ROWS, TINY, Heard

from veneer.tasks import causal_lm
from veneer.train.loop import train
from veneer.train.run import Run


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that nobody reads need not be long."""
    monkeypatch.setattr(causal_lm, "SHOWN_TOKENS", 3)


@pytest.fixture
def run_tiny(
    tmp_path: Path, make_model: Callable[..., nn.Module], tiny_tokenizer: Any
) -> Callable[..., tuple[Run, Heard, nn.Module]]:
    """`train` on a fresh tiny Llama (or `model`) and a dozen rows, in a folder of its own."""
    count = iter(range(100))

    def run(
        rows: Any = ROWS, *, model: Any = None, heard: Heard | None = None, tokenizer: Any = None, **settings: Any
    ) -> tuple[Run, Heard, nn.Module]:
        model = make_model("llama") if model is None else model
        heard = Heard() if heard is None else heard
        where = {} if "resume" in settings else {"out": str(tmp_path / f"run{next(count)}"), **TINY}
        merged = {name: value for name, value in {**where, **settings}.items() if value is not ...}
        made = train(model, rows, tokenizer=tokenizer or tiny_tokenizer, report=heard, **merged)
        return made, heard, model

    return run
