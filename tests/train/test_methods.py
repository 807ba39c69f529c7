"""Every method from settings to a proved adapter: a tiny model is trained by each, reloaded, and found the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_runs import ROWS, TINY, Heard

import veneer
from veneer.core.delta import DELTAS
from veneer.core.model import adapter_of, sites
from veneer.core.spec import SCALINGS
from veneer.errors import ConfigError
from veneer.train.loop import train
from veneer.train.settings import resolve

METHODS: dict[str, dict[str, Any]] = {
    "adalora": {"method": "adalora", "r": 4, "options": {"target_rank": 2, "warmup": 1, "final": 2, "every": 1}},
    "vera": {"delta": "vera", "options": {"seed": 3, "d_initial": 0.5}},
    "loha": {"delta": "loha"},
    "lokr": {"method": "lokr", "options": "factor=4"},
    "lora_fa": {"method": "lora-fa", "optimizer": "lora_fa"},
    "lora_xs": {"delta": "lora_xs", "r": 8, "lr": 0.1},
    "block": {"delta": "block", "options": {"blocks": 2}},
    "dora": {"method": "dora"},
    "rslora": {"method": "rslora"},
    "constant": {"scaling": "constant", "alpha": 1.5},
    "pissa": {"method": "pissa"},
    "eva": {"init": "eva"},
    "corda": {"init": "corda"},
    "lora_ga": {"init": "lora_ga"},
    "lora+": {"method": "lora+", "optim": "adamw_bnb_8bit"},
    "rows": {"token_rows": "5-7", "targets": ["q_proj"]},
    "tied": {"targets": ["embed_tokens", "v_proj"], "tied": "together", "alpha": 0.25, "lr": 5e-3},
}
BY_HAND = {"fused", "tokens"}  # their options are rows of one model's layers; "rows" above is how tokens are asked for


def test_every_delta_and_scaling_has_a_run() -> None:
    found = [resolve(mapping=own).settings for own in METHODS.values()]
    assert {*DELTAS} - BY_HAND == {s.delta for s in found}
    assert {*SCALINGS} == {s.scaling for s in found}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_is_proved_and_comes_back_from_its_file(
    name: str, make_model: Callable[..., nn.Module], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, heard = make_model("qwen2"), Heard()  # its head is tied
    settings = {**TINY, "lr": 3e-2, "steps": 12, **METHODS[name], "out": str(tmp_path / "run")}
    run = train(model, ROWS, tokenizer=tiny_tokenizer, report=heard, **settings)
    assert run.proof["passed"], run.proof
    assert run.result["val_after"] < run.result["val_before"]
    assert heard.of("save")
    ids = torch.randint(0, 384, (2, 9))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        other = make_model("qwen2")
        veneer.load(other, run.adapter)
        torch.testing.assert_close(other(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_adaloras_ranks_fall_to_the_target_and_only_those_are_saved(
    make_model: Callable[..., nn.Module], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, heard = make_model("llama"), Heard()
    settings = {**TINY, **METHODS["adalora"], "eval_every": 8, "out": str(tmp_path / "run")}
    run = train(model, ROWS, tokenizer=tiny_tokenizer, report=heard, **settings)
    ranks = run.metrics("ranks")[-1]["ranks"]
    assert sum(ranks.values()) == 2 * len(ranks)
    assert any(f"{2 * len(ranks)} of {4 * len(ranks)} ranks are left" in e["text"] for e in heard.of("note"))
    assert ranks == {s: adapter_of(layer).delta.real_rank for s, layer in sites(model).items()}
    from safetensors.torch import load_file

    held = load_file(run.adapter / "adapter_model.safetensors")
    assert sum(t.shape[0] for k, t in held.items() if ".lora_A" in k) == sum(ranks.values())


@pytest.mark.parametrize(
    "settings,match",
    [
        ({"method": "dorra"}, "not one of lora, full, freeze"),
        ({"delta": "lorkr"}, "Did you mean 'lokr'"),
        ({"delta": "lokr", "options": {"facter": 2}}, "Did you mean 'factor'"),
        ({"delta": "lora", "init": "pisa"}, "Did you mean 'pissa'"),
        ({"optimizer": "adamw9bit"}, "Did you mean 'adamw8bit'"),
        ({"optimizer": "lora_fa"}, "is for delta lora_fa"),
        ({"delta": "adalora", "options": {"target_rank": 9}}, "target_rank=9"),
        ({"delta": "adalora", "options": {"warmup": 5, "final": 5}}, "leave no step"),
        ({"token_rows": "5-x"}, "expected token numbers"),
        ({"token_rows": "999"}, "token rows go from 0 to 383"),
        ({"token_rows": "3"}, "no training sample has token 3, so nothing of token_rows would be trained"),
        ({"init": "loftq"}, "starts from what packing the base loses"),
        ({"init": "loftq", "quant": "nf4"}, "name the model by its folder"),
        ({"method": "full", "token_rows": "5"}, "token_rows has no effect with method: full"),
        ({"scaling": "constant", "alpha": 0}, "alpha=0.0 must be a positive number"),
    ],
)
def test_what_makes_no_sense_is_refused(
    settings: dict[str, Any], match: str, make_model: Callable[..., nn.Module], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        train(make_model("llama"), ROWS, tokenizer=tiny_tokenizer, **{**TINY, **settings}, out=str(tmp_path / "run"))
    assert match in str(error.value)
