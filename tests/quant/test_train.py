"""A run on a packed base, end to end: read packed, trained, proved, and asked again as it was trained."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import veneer
from veneer.errors import ConfigError
from veneer.infer.load import load, source_of_folder
from veneer.quant.hf import VeneerConfig
from veneer.quant.inputs import load_inputs
from veneer.quant.layer import Packed
from veneer.quant.storage import STORAGES
from veneer.tasks import causal_lm
from veneer.train.companions import ENERGIES
from veneer.train.loop import train
from veneer.train.prepare import look_at_base

ROWS = [{"prompt": f"say {word}", "completion": word} for word in ("tar", "find", "grep", "sort", "list", "file") * 2]


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
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
    seen = {"energies": "inputs.safetensors"} if STORAGES[kind].weighs else {}
    assert told["quant"] == {"kind": kind, "whole": [], **seen}
    ready = load([source_of_folder(str(run.best), str(tiny_folder))], device="cpu", say=lambda _: None)
    assert any(isinstance(m, Packed) for m in ready.model.modules())
    assert "answered as when" in next(iter(ready.evidence.values()))


def parts_of(model: nn.Module) -> dict[str, Any]:
    return {
        f"{n} {i}": part for n, m in model.named_modules() if isinstance(m, Packed) for i, part in enumerate(m.parts)
    }


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_a_base_that_was_looked_at_is_the_same_wherever_it_is_packed(
    kind: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """Packed as it is read or handed over as a model, in a run or when it is asked again; unlike one not looked at."""
    common = {"quant": kind, "steps": 1, "r": 2, "val": 2, "batch_size": 2, "lr": 1e-2, "precision": "fp32"}
    run = train(str(tiny_folder), ROWS, out=str(tmp_path / "read"), **common)
    ready = load([source_of_folder(str(run.best), str(tiny_folder))], device="cpu", say=lambda _: None)
    wanted = parts_of(ready.model)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    given = train(model, ROWS, out=str(tmp_path / "given"), **common)
    assert (given.best / "inputs.safetensors").exists()
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    veneer.quantize(plain, kind)
    assert parts_of(plain).keys() == wanted.keys()
    assert any(not torch.equal(t, wanted[n]) for n, t in parts_of(plain).items())
    config = VeneerConfig(kind, energies=str(run.best / ENERGIES))
    again = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=config, dtype=torch.float32)
    assert "energies" not in again.config.quantization_config.to_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in parts_of(again).items())


def test_a_run_that_starts_with_what_packing_lost(tiny_folder: Path, tmp_path: Path) -> None:
    """Its base is the packed one, bit for bit; the adapter starts nearer to the whole one, and the proofs hold."""
    common = {"quant": "nf4", "r": 8, "val": 4, "batch_size": 2, "lr": 1e-3, "steps": 1, "seed": 0}
    whole = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    ids = torch.randint(0, whole.config.vocab_size, (8, 32), generator=torch.Generator().manual_seed(0))
    apart: dict[str, float] = {}
    for name, own in {"kaiming": {}, "loftq": {"init": "loftq"}, "seen": {"init": "loftq", "quant_rows": 4}}.items():
        run = train(str(tiny_folder), ROWS, out=str(tmp_path / name), **{**common, "quant_rows": 0, **own})
        assert run.proof["passed"]
        started = load([source_of_folder(str(run.best), str(tiny_folder))], device="cpu", say=lambda _: None).model
        with torch.no_grad():
            apart[name] = float((started(ids).logits - whole(ids).logits).norm())
    assert apart["loftq"] < 0.9 * apart["kaiming"] and apart["seen"] < 0.9 * apart["kaiming"]


def test_the_base_is_looked_at_in_8_bits_where_they_fit(tmp_path: Path) -> None:
    def load(kind: str) -> nn.Module:
        asked.append(kind)
        if kind in full:
            raise torch.OutOfMemoryError("full")
        net = nn.Sequential(nn.Linear(64, 8))
        veneer.quantize(net, kind, targets=["0"])
        return net

    for full, wanted in ((), ["int8"]), (("int8",), ["int8", "nf4"]):
        asked: list[str] = []
        notes: list[str] = []
        path = tmp_path / f"{len(full)}.safetensors"
        look = partial(look_at_base, load, "nf4", [torch.randn(5, 64)], path, torch.device("cpu"))
        look(lambda event, text, notes=notes: notes.append(text))
        assert asked == wanted and len(notes) == len(full) and load_inputs(path)["0"].directions is not None
    full = ("int8", "nf4")
    with pytest.raises(torch.OutOfMemoryError):
        look(lambda event, text: None)


def test_a_run_leaves_weights_unturned_where_it_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    """However the base comes, and when it is asked again; one that came packed in another way is not taken for it."""
    common: dict[str, Any] = {"quant": "fp8", "quant_rows": 2, "quant_rotate": "off", "steps": 1, "r": 2, "val": 2}
    common |= {"batch_size": 2, "lr": 1e-2, "precision": "fp32"}
    run = train(str(tiny_folder), ROWS, out=str(tmp_path / "read"), **common)
    assert json.loads((run.best / "task.json").read_text())["quant"]["rotate"] is False
    again = load([source_of_folder(str(run.best), str(tiny_folder))], device="cpu", say=lambda _: None).model
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    train(model, ROWS, out=str(tmp_path / "given"), **common)
    assert {m.recipe.rotate for m in (*model.modules(), *again.modules()) if isinstance(m, Packed)} == {False}
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    veneer.quantize(plain, "fp8")
    with pytest.raises(ConfigError, match="came packed with rotate=True"):
        train(plain, ROWS, out=str(tmp_path / "other"), **common)
