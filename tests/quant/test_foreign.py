"""Bases that arrive packed: bitsandbytes' layers and files, torchao's tensors, GPTQ and AWQ layers."""

from __future__ import annotations

import copy
import sys
import types
import warnings

import pytest
import torch
from quant_nets import Net, error, spread
from torch import Tensor, nn

import veneer
from veneer import LoRA
from veneer.core.model import check_alive, disabled, parameters
from veneer.core.weight import is_packed, read_weight
from veneer.errors import StateError, TargetError
from veneer.quant.layer import Packed
from veneer.quant.nf4 import unpack_absmax
from veneer.quant.storage import Recipe, storage_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bnb = pytest.importorskip("bitsandbytes")

SHAPES = [(16, 64), (33, 40), (7, 13), (128, 1024), (64, 300)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_bitsandbytes_nf4(shape: tuple[int, int], double: bool, block: int, dtype: torch.dtype) -> None:
    """Packed here and there, the bytes are the same; and their bytes unpack here to what they unpack to there."""
    w = torch.randn(shape).to(dtype)
    codes, state = bnb.functional.quantize_4bit(w, blocksize=block, compress_statistics=double, quant_type="nf4")
    recipe = Recipe("nf4", block, double)
    ours = storage_of(recipe).pack(w, recipe)
    assert torch.equal(ours[0].flatten(), codes.flatten())
    theirs = (state.absmax, state.state2.absmax, state.offset) if double else (state.absmax,)
    torch.testing.assert_close(unpack_absmax(ours), unpack_absmax((codes, *theirs)), rtol=2e-2, atol=1e-3)  # ties
    unpacked = storage_of(recipe).unpack((ours[0], *theirs), shape, dtype, recipe)
    flat = (
        torch.ops.bitsandbytes.dequantize_4bit.default
    )  # one row: bitsandbytes' CPU kernel errs on rows below a block
    wanted = flat(codes, unpack_absmax((codes, *theirs)), block, "nf4", (w.numel(),), dtype).view(shape)
    torch.testing.assert_close(unpacked, wanted, rtol=1e-6, atol=1e-7)


def bnb_layer(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Net, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(64, 48).to(dtype)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False, threshold=6.0)
        layer.weight = bnb.nn.Int8Params(plain.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(64, 48, quant_type=kind)
        layer.weight = bnb.nn.Params4bit(plain.weight.data.clone(), quant_type=kind, module=layer)
    layer.bias = nn.Parameter(plain.bias.data.clone())
    return Net(layer).to("cpu").requires_grad_(False), plain  # moving is what packs


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("combine", ["add", "dora"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_adapters_on_their_layers(kind: str, combine: str) -> None:
    net, plain = bnb_layer(kind)
    x = torch.randn(5, 64)
    y0, w = net(x), read_weight(net.layer).float()
    assert w.shape == plain.weight.shape and error(w, plain.weight) < 0.13
    veneer.attach(net, LoRA(rank=4, targets=["layer"], combine=combine))
    assert torch.equal(net(x), y0)
    spread(net)
    y = net(x)
    adapter = net.layer.slots["default"]
    assert error(y, nn.functional.linear(x, adapter.weight(w), plain.bias)) < (2e-2 if kind == "int8" else 1e-5)
    y.square().sum().backward()
    check_alive(net)
    assert all(p.grad is not None for p in parameters(net).values())
    assert is_packed(net.layer) == f"bitsandbytes {kind}"
    with pytest.raises(StateError, match="packed, and merging would round dW away"):
        veneer.merge(net)
    with disabled(net):
        assert torch.equal(net(x), y0)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_adopting(kind: str, adapted: bool) -> None:
    net, _ = bnb_layer(kind)
    x = torch.randn(5, 64)
    if adapted:
        veneer.attach(net, LoRA(rank=4, targets=["layer"]))
        spread(net)
    y, w = net(x), read_weight(net.layer)
    assert veneer.adopt(net) == ("layer",)
    assert isinstance(net.layer, Packed) and isinstance(net.layer, nn.Linear)
    assert error(read_weight(net.layer), w) < 1e-6 and error(net(x), y) < 2e-2
    assert "Linear4bit" not in repr(type(net.layer).__mro__)
    veneer.dequantize(net, torch.float32)
    assert type(net.layer).__name__ == ("LoRALinear" if adapted else "Linear")
    assert error(net(x), y) < 2e-2


def test_what_cannot_be_adopted() -> None:
    net, _ = bnb_layer("fp4")
    with pytest.raises(TargetError, match=r"fp4 in torch\.uint8; only nf4"):
        veneer.adopt(net)
    with pytest.raises(TargetError, match="no layer from bitsandbytes"):
        veneer.adopt(nn.Linear(2, 2))
    with pytest.raises(TargetError, match=r"packed already \(bitsandbytes fp4\)"):
        veneer.quantize(net, "int8", targets=["layer"])
    with pytest.raises(StateError, match="adopt"):
        veneer.dequantize(net)


@pytest.mark.filterwarnings("ignore")
def test_torchao_tensors() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    net, x = Net(nn.Linear(64, 48).bfloat16()), torch.randn(5, 64).bfloat16()
    quantize_(net, Int8WeightOnlyConfig())
    w = read_weight(net.layer)
    assert type(w) is Tensor and w.shape == (48, 64) and is_packed(net.layer) == "Int8Tensor"
    veneer.attach(net, LoRA(rank=4, targets=["layer"]))
    spread(net)
    y = net(x)
    assert (
        error(y, nn.functional.linear(x, net.layer.slots["default"].weight(w.float()).bfloat16(), net.layer.bias))
        < 2e-2
    )
    y.sum().backward()
    check_alive(net)
    with pytest.raises(StateError, match="Int8Tensor"):
        veneer.merge(net)


@pytest.mark.filterwarnings("ignore")
def test_torchao_nf4_tensors() -> None:
    pytest.importorskip("torchao")
    from veneer.quant.foreign import NF4_HOMES, _nf4_tensor

    home = next(name for name in NF4_HOMES if _nf4_tensor(name) is not None)
    plain, x = nn.Linear(512, 256, bias=False), torch.randn(5, 512)
    net, w = Net(copy.deepcopy(plain)), plain.weight.detach()
    net.layer.weight = nn.Parameter(sys.modules[home].to_nf4(w.clone()), requires_grad=False)
    q = read_weight(net.layer)
    assert type(q) is Tensor and 0.01 < error(q, w) < 0.13 and is_packed(net.layer) == "NF4Tensor"
    y0 = net(x)
    veneer.attach(net, LoRA(rank=4, targets=["layer"]))
    assert error(net(x), y0) < 1e-6
    spread(net)
    y = net(x)
    assert error(y, nn.functional.linear(x, net.layer.slots["default"].weight(q))) < 1e-5
    y.sum().backward()
    check_alive(net)
    with pytest.raises(StateError, match="NF4Tensor"):
        veneer.merge(net)


class BaseQuantLinear(nn.Module):
    """As gptqmodel's: no nn.Linear, buffers only, the weight (in, out) on demand."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.bias = 12, 10, 4, None
        self.register_buffer("scales", torch.ones(1, 10))
        self.register_buffer("held", torch.randn(12, 10))
        if way == "awq":
            self.awq_weight_dequantize = lambda device, dtype: self.held.to(device, dtype)
        if way == "gptq":
            self.dequantize_weight = lambda num_itr=1: self.held

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.held


@pytest.mark.parametrize("way", ["gptq", "awq"])
def test_gptq_and_awq_layers(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to a stand-in with gptqmodel's interface: the package itself builds for GPUs only."""
    from veneer.quant import foreign

    for name in ("gptqmodel", "gptqmodel.nn_modules", "gptqmodel.nn_modules.qlinear"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kind = type("BaseQuantLinear", (BaseQuantLinear,), {"__module__": "gptqmodel.nn_modules.qlinear"})
    sys.modules["gptqmodel.nn_modules.qlinear"].BaseQuantLinear = kind  # type: ignore[attr-defined]
    foreign.register_gptqmodel.cache_clear()
    net, x = Net(kind(way)), torch.randn(3, 12)
    veneer.attach(net, LoRA(rank=4, targets=["layer"], combine="dora"))
    spread(net)
    w = net.layer.held.T
    assert torch.equal(read_weight(net.layer), w) and is_packed(net.layer) == "gptqmodel, 4 bits"
    assert error(net(x), x @ net.layer.slots["default"].weight(w).T) < 1e-5
    with pytest.raises(TargetError, match="gptqmodel, 4 bits"):
        veneer.quantize(copy.deepcopy(Net(kind(way))), targets=["layer"])
    with pytest.raises(TargetError, match="does not give its weights back"):
        veneer.attach(Net(kind("neither")), LoRA(rank=4, targets=["layer"], combine="dora"))
