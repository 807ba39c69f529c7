"""What cannot be packed, packed twice, merged or read: one error with all of it and the way out; nothing is changed."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM

import veneer
from veneer import LoRA
from veneer.core.weight import ELSEWHERE
from veneer.errors import ConfigError, StateError, TargetError, VeneerError
from veneer.quant import foreign


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 7), nn.Linear(7, 5), nn.Conv2d(3, 4, 3), nn.Embedding(5, 3))


ALL = ["0", "1", "2", "3"]


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_odd_shapes_are_packed(kind: str) -> None:
    """No side is a multiple of anything: half bytes, short blocks, no rotation."""
    model = net()
    assert veneer.quantize(model, kind, targets=ALL).layers == tuple(ALL)
    assert torch.isfinite(model[1](model[0](torch.randn(4, 13)))).all()


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_weights_of_any_size_stay_finite(kind: str, scale: float) -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    model[0].weight.data *= scale
    veneer.quantize(model, kind, targets=["0"])
    y = model(torch.randn(3, 64))
    assert torch.isfinite(y).all() and (scale > 0 or not y.any())


@pytest.mark.parametrize(
    "options,match",
    [
        ({"kind": "nf5"}, "Did you mean 'nf4'"),
        ({"block": 63}, "block=63 is none of 32, 64"),
        ({"rotate": True}, "rotate=True is for int8 and fp8, not for nf4"),
        ({"dynamic": False}, "dynamic=False is for int8 and fp8"),
        ({"kind": "int8", "block": 128}, "block=128 is for nf4"),
        ({"kind": "fp8", "double": False}, "double=False is for nf4, not for fp8"),
        ({"outliers": 6.0}, "outliers=6.0 is for int8 and fp8, not for nf4"),
        ({"kind": "int8", "outliers": -1.0}, "must be above 0"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], match: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=match):
        veneer.quantize(model, **{"kind": "nf4", **options}, targets=ALL)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_broken_weights_are_all_named_and_nothing_is_changed(value: float) -> None:
    model = net()
    model[0].weight.data[2, 3] = model[2].weight.data[0, 0, 1, 1] = value
    with pytest.raises(TargetError) as told:
        veneer.quantize(model, "nf4", targets=ALL)
    assert all(f"{name} holds NaN or infinite values" in str(told.value) for name in ("0", "2"))
    assert type(model[1]) is nn.Linear


def test_states_in_which_nothing_can_be_packed_or_merged() -> None:
    model = net()
    veneer.attach(model, LoRA(rank=2, targets=["0"]))
    veneer.merge(model)
    with pytest.raises(StateError, match="unmerge"):
        veneer.quantize(model, "nf4", targets=["0"])
    veneer.unmerge(model)
    veneer.quantize(model, "nf4", targets=["0", "1"])
    with pytest.raises(TargetError, match=r"1 is stored as nf4 already; veneer\.dequantize"):
        veneer.quantize(model, "int8", targets=["1", "2"])
    assert type(model[2]) is nn.Conv2d
    with pytest.raises(StateError, match=r"veneer\.dequantize\(model, torch\.float32\) first"):
        veneer.merge(model)
    with pytest.raises(StateError, match="no layer of this model is packed"):
        veneer.dequantize(net())


@pytest.mark.parametrize("package", ELSEWHERE)
def test_a_tensor_of_a_package_that_is_not_here(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    getattr(foreign, f"register_{package}").cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    kind = type("Params9bit", (torch.Tensor,), {"__module__": f"{package}.nn.modules"})
    model = nn.Sequential(nn.Linear(8, 8))
    model[0]._parameters["weight"] = torch.zeros(8, 8).as_subclass(kind)  # type: ignore[assignment]
    with pytest.raises(TargetError, match=f"a weight that {package} packed cannot be read") as told:
        veneer.attach(model, LoRA(rank=2, targets=["0"], combine="dora"))
    assert f"pip install {package}" in str(told.value)


def test_a_checkpoint_that_needs_a_package_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.train.base import _from_pretrained

    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    veneer.quantize(model, "nf4")
    veneer.save_bitsandbytes(model, tmp_path / "theirs")
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    with pytest.raises(VeneerError, match=r"needs a package that is not here.*bitsandbytes"):
        _from_pretrained(LlamaForCausalLM, str(tmp_path / "theirs"))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_linear_layer_that_is_written_out_is_packed_and_one_that_does_more_is_named(kind: str) -> None:
    """Falcon's writes x @ W.T + b; what a layer's own forward does besides would be lost."""
    config = FalconConfig(vocab_size=32, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = FalconForCausalLM(config).eval()
    ids = torch.arange(12)[None]
    wanted = model(ids).logits
    assert len(veneer.quantize(model, kind).layers) == 4
    assert (model(ids).logits - wanted).norm() < 0.1 * wanted.norm()
    veneer.attach(model, LoRA(rank=2))
    model(ids, labels=ids).loss.backward()
    veneer.check_alive(model)

    class Twice(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(TargetError, match="no layer is left to pack") as told:
        veneer.quantize(nn.Sequential(nn.Sequential(Twice(8, 8)), nn.Sequential(Twice(8, 8))), kind)
    assert "0.0: Twice has a forward of its own" in str(told.value)
