"""Experts in one parameter: packed in place or as they are read, with and without adapters, and back."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from quant_nets import error
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import veneer
from veneer import LoRA
from veneer.core.leaf import Leaf
from veneer.core.model import check_alive, disabled, parameters
from veneer.core.weight import is_packed, read_weight
from veneer.errors import StateError, TargetError
from veneer.quant.hf import VeneerConfig
from veneer.quant.model import weight_bytes
from veneer.quant.stack import PackedStack
from veneer.quant.storage import Recipe, storage_of

IDS = torch.arange(14).view(2, 7)
EXPERTS = ["gate_up_proj", "down_proj"]
OFF = {"nf4": 0.12, "int8": 0.01, "fp8": 0.04}


def mixtral(implementation: str = "eager") -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=23, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    config._experts_implementation = implementation
    return MixtralForCausalLM(config).eval()


def stacks(model: nn.Module) -> dict[str, PackedStack]:
    return {n: p for n, p in model.named_parameters() if isinstance(p, PackedStack)}


def dense_twin(model: nn.Module) -> nn.Module:
    """The same model with plain weights that hold what the packed ones unpack to."""
    twin = copy.deepcopy(model)
    veneer.dequantize(twin)
    assert not stacks(twin)
    return twin


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", OFF)
def test_packed_is_the_plain_model_with_rounded_weights(kind: str, implementation: str) -> None:
    model = mixtral(implementation)
    whole, before = {n: p.detach().clone() for n, p in model.named_parameters()}, weight_bytes(model)
    report = veneer.quantize(model, kind)
    packed = stacks(model)
    assert len(packed) == 4 and packed.keys() <= set(report.layers)
    assert report.bytes_after == weight_bytes(model) < 0.4 * before
    for name, stack in packed.items():
        w = whole[name]
        assert stack.shape == w.shape and stack.dtype == w.dtype and not stack.requires_grad
        assert (
            error(read_weight(Leaf(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])), w)
            < OFF[kind]
        )
        one = storage_of(stack.recipe).pack(w[2], stack.recipe)  # an expert's bytes are those of its own matrix
        assert all(torch.equal(part[2], alone) for part, alone in zip(stack.parts, one, strict=True))
    near = 2e-5 if kind == "nf4" else 2e-2
    assert error(model(IDS).logits, dense_twin(model)(IDS).logits) < near


@pytest.mark.parametrize("kind", OFF)
@pytest.mark.parametrize("combine", ["add", "dora"])
def test_adapters_on_packed_experts(kind: str, combine: str) -> None:
    model = mixtral()
    veneer.quantize(model, kind, targets=EXPERTS)
    twin = dense_twin(model)
    y0, logits = twin(IDS).logits, {}
    for net in (model, twin):
        torch.manual_seed(3)
        veneer.attach(net, LoRA(rank=4, targets=[*EXPERTS, "q_proj"], combine=combine))
        for p in parameters(net).values():
            torch.manual_seed(p.numel())
            with torch.no_grad():
                p.add_(torch.randn_like(p) * 0.1)
        logits[net] = net(IDS).logits
        logits[net].square().sum().backward()
    check_alive(model)
    assert error(logits[model], y0) > 0.01 and error(logits[model], logits[twin]) < 1e-5
    for (name, mine), theirs in zip(parameters(model).items(), parameters(twin).values(), strict=True):
        assert mine.grad is not None and theirs.grad is not None, name
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    with disabled(model):
        assert error(model(IDS).logits, y0) < (1e-5 if kind == "nf4" else 2e-2)
    with pytest.raises(StateError, match="dequantize"):
        veneer.merge(model)
    names = veneer.dequantize(model, torch.float32)
    assert len(names) == 4
    veneer.merge(model)
    assert error(model(IDS).logits, logits[twin]) < 1e-4


def test_gradients_flow_through_experts_without_adapters() -> None:
    """And the eager loop keeps no dense matrix for the backward pass."""
    model = mixtral()
    veneer.quantize(model, "nf4", targets=EXPERTS)
    twin, grads = dense_twin(model), []
    for net in (model, twin):
        torch.manual_seed(3)
        veneer.attach(net, LoRA(rank=4, targets=["q_proj"]))
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
            y = net(IDS).logits
        y.square().sum().backward()
        grads.append([p.grad for p in parameters(net).values()])
        dense = [
            t
            for t in kept
            if t.is_floating_point() and tuple(t.shape[-2:]) in ((192, 64), (64, 96), (64, 192), (96, 64))
        ]
        assert bool(dense) == (net is twin)
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", OFF)
def test_a_stack_is_copied_pickled_and_turned_to_other_types(kind: str) -> None:
    model = mixtral()
    veneer.quantize(model, kind, targets=EXPERTS)
    y, parts = model(IDS).logits, {n: s.parts for n, s in stacks(model).items()}
    assert torch.equal(copy.deepcopy(model)(IDS).logits, y)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(IDS).logits, y)
    half = copy.deepcopy(model).bfloat16()
    assert half(IDS).logits.dtype == torch.bfloat16 and all(s.dtype == torch.bfloat16 for s in stacks(half).values())
    for name, stack in stacks(half.float()).items():
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(stack.parts, parts[name], strict=True))


@pytest.mark.parametrize("kind", OFF)
def test_experts_are_packed_as_they_are_read(kind: str, tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=VeneerConfig(kind), dtype=torch.float32)
    later = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    veneer.quantize(later, kind)
    assert stacks(read).keys() == stacks(later).keys() and len(stacks(read)) == 4
    assert torch.equal(read.eval()(IDS).logits, later.eval()(IDS).logits)
    for model in (read, later):
        with pytest.raises(ValueError, match="serializable"):
            model.save_pretrained(tmp_path / "again")
        veneer.dequantize(model)
        model.save_pretrained(tmp_path / f"plain {model is read}")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain True", dtype=torch.float32)
    assert torch.equal(again.eval()(IDS).logits, read(IDS).logits)


def test_stacks_that_cannot_be_packed() -> None:
    model = mixtral()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1, 0, 0] = torch.inf
    with pytest.raises(TargetError, match=r"down_proj holds NaN or infinite"):
        veneer.quantize(model, "nf4")
    assert not stacks(model)
    model = mixtral()
    veneer.quantize(model, "nf4", targets=EXPERTS)
    with pytest.raises(TargetError, match="packed already"):
        veneer.quantize(model, "int8", targets=EXPERTS)
    model = mixtral()
    assert not {n for n in veneer.quantize(model, "nf4", exclude=EXPERTS).layers if "experts" in n}
    assert not stacks(model) and veneer.quantize(model, "nf4", targets=EXPERTS).layers
    leaf = Leaf(model.model.layers[0].mlp.experts, "down_proj")
    assert is_packed(leaf) == "nf4"
    assert Recipe("nf4").checked() == leaf.raw.recipe
