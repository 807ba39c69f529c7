"""A run on a packed base, end to end: read packed, trained, proved, and asked again as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from veneer.infer.load import load, source_of_folder
from veneer.quant.layer import Packed
from veneer.tasks import causal_lm
from veneer.train.loop import train

ROWS = [{"prompt": f"say {word}", "completion": word} for word in ("tar", "find", "grep", "sort", "list", "file") * 2]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_on_a_packed_base(kind: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm, "SHOWN_TOKENS", 3)
    events: list[dict[str, Any]] = []
    run = train(
        str(tiny_folder), ROWS, quant=kind, steps=2, r=4, val=2, batch_size=2, out=str(tmp_path / "out"), lr=1e-2,
        report=events.append,
    )  # fmt: skip
    assert run.status == "done" and run.proof["passed"]
    assert not any(check["id"] == "P5" and not check["passed"] for check in run.proof["checks"])
    told = json.loads((run.best / "task.json").read_text())
    assert told["quant"] == {"kind": kind, "whole": []}
    ready = load([source_of_folder(str(run.best), str(tiny_folder))], device="cpu", say=lambda _: None)
    assert any(isinstance(m, Packed) for m in ready.model.modules())
    assert "answered as when" in next(iter(ready.evidence.values()))
