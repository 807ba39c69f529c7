"""The law of the core, over the whole product of its axes: every layer kind x delta x combine x init x scaling x dtype.

    starts as the base     bit for bit where B A is zero bit for bit
    forward == weight      the layer's output is the output of a plain layer that holds the combined weight
    nothing is dead        every trained parameter gets a gradient, and no frozen one does
    the base keeps house   its keys, its classes and its values
    merged == adapted      and unmerge gives the very same bits back

A new variant enters by existing: the product reads the registries. All parameters are moved first; with B = 0
everything would pass.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.core.combine import COMBINES
from veneer.core.delta import DELTAS
from veneer.core.init import CHANGES_BASE, INITS, NEEDS
from veneer.core.model import (
    attach,
    check_alive,
    detach,
    disabled,
    merge,
    parameters,
    put,
    sites,
    spec_of,
    tensors,
    unmerge,
)
from veneer.core.op import OPS, op_for, op_of
from veneer.core.spec import SCALINGS, LoRA

Make = Callable[[], nn.Module]

LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 10), (3, 5, 12)),
    "linear-large": (lambda: nn.Linear(12, 10), (40, 100, 12)),  # large enough for the single autograd function
    "linear-no-bias": (lambda: nn.Linear(12, 10, bias=False), (5, 12)),
    "hf-conv1d": (lambda: Conv1D(10, 12), (3, 5, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 9)),
    "conv1d-dilated": (lambda: nn.Conv1d(6, 8, 3, dilation=2, padding="same", padding_mode="circular"), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 8, (3, 2), padding=(1, 0), padding_mode="reflect"), (2, 4, 6, 6)),
    "conv2d-grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, bias=False), (2, 8, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 2, stride=(1, 2, 1), groups=2), (2, 4, 4, 5, 4)),
    "embedding": (lambda: nn.Embedding(14, 8, padding_idx=0), (3, 5)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
STARTS_EXACTLY = {"kaiming", "gaussian", "eva", "eva_uniform"}


class Net(nn.Module):
    """One layer under a name, as in a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def make(kind: str, dtype: torch.dtype) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    net = Net(build()).to(dtype)
    for p in net.parameters():  # biases start at zero in some layers; a forgotten bias must show
        nn.init.normal_(p, std=0.5)
    x = torch.randint(0, 14, shape) if kind == "embedding" else torch.randn(shape).to(dtype)
    return net, x


def spread(net: nn.Module, name: str | None = None) -> None:
    """Move every adapter parameter to a random place of moderate size."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in parameters(net, name).values():
            p.add_(torch.randn_like(p) * 0.3)


def dense_oracle(net: Net, original: nn.Module, x: Tensor) -> Tensor:
    """The same layer, plain, in double precision, holding the combined weight by the papers' formulas."""
    spec, layer = spec_of(net), sites(net)["layer"]
    adapter = layer.slots["default"]
    op, plain = op_of(original), copy.deepcopy(original).double()
    a, b = (f.detach().double() for f in adapter.delta.factors())
    w = op.to_matrix(plain, plain.weight) + adapter.delta.scale * b @ a
    if spec.combine == "dora":
        w = adapter.combine.magnitude.detach().double()[:, None] * w / w.norm(dim=1, keepdim=True)
    plain.weight = nn.Parameter(op.to_weight(plain, w).contiguous())
    return plain(x if original_is_lookup(original) else x.double()).detach()


def original_is_lookup(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding)


def close(y: Tensor, oracle: Tensor, dtype: torch.dtype) -> bool:
    error = (y.detach().double() - oracle.double()).norm() / oracle.double().norm()
    return bool(error < TOLERANCE[dtype])


def finely(w: Tensor) -> Tensor:
    """A storage for inits that ask for one: a grid far finer than what these tests tolerate."""
    return (w * 2**19).round() / 2**19


OPTIONS: dict[str, dict[str, object]] = {"tokens": {"rows": (1, 2, 3, 5)}, "fused": {"parts": [(0, 2), (4, 8)]}}
PRODUCT = [
    (kind, delta, *rest)
    for kind, delta, *rest in itertools.product(LAYERS, DELTAS, COMBINES, INITS, SCALINGS, DTYPES)
    if (DELTAS[delta].takes_init or rest[1] == "kaiming")
    and (rest[1] not in NEEDS or kind in ("linear", "linear-no-bias", "hf-conv1d"))
    and (rest[2] != "constant" or rest[3] == "fp32")  # a number instead of a formula: no type can round it otherwise
]


@pytest.mark.parametrize("kind,delta,combine,init,scaling,precision", PRODUCT, ids=["-".join(p) for p in PRODUCT])
def test_every_combination(kind: str, delta: str, combine: str, init: str, scaling: str, precision: str) -> None:
    dtype = DTYPES[precision]
    net, x = make(kind, dtype)
    original, keys = copy.deepcopy(net.layer), list(net.state_dict())
    with torch.no_grad():
        y0 = net(x)
    options = OPTIONS.get(delta, {})
    spec = LoRA(rank=4, alpha=8, targets=["layer"], delta=delta, combine=combine, init=init, scaling=scaling)
    spec, need = dataclasses.replace(spec, options=options), {"data": [x], "loss": lambda m, b: m(b).square().sum()}
    attach(net, spec, **need, round_trip=finely)
    assert torch.equal(net(x), y0) if init in STARTS_EXACTLY else close(net(x), y0, dtype)
    if init in CHANGES_BASE:  # from here on the law is about the base that this init has left
        original.weight.data.copy_(net.layer._parameters["weight"])
        with disabled(net), torch.no_grad():
            y0 = net(x)

    spread(net)
    y = net(x)
    oracle = dense_oracle(net, original, x)
    assert not torch.equal(y, y0), "the adapter does nothing"
    assert close(y, oracle, dtype)
    with torch.no_grad():
        assert close(net(x), oracle, dtype)  # without gradients another path may run

    y.float().square().sum().backward()
    check_alive(net)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters(net).values())
    assert all(p.grad is None for n, p in net.named_parameters() if ".lora." not in n)

    assert [k for k in net.state_dict() if ".lora." not in k] == keys
    assert isinstance(net.layer, type(original))
    with disabled(net):
        assert torch.equal(net(x), y0)

    merge(net)
    assert close(net(x), oracle, dtype)
    unmerge(net)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in Net(original).state_dict().items())
    assert torch.equal(net(x), y)

    detach(net)
    assert type(net.layer) is type(original)
    assert vars(net.layer).keys() == vars(original).keys()
    assert torch.equal(net(x), y0)


@pytest.mark.parametrize("kind", [k for k in LAYERS if k != "embedding"])
@pytest.mark.parametrize("combine", COMBINES)
def test_gradients_are_those_of_the_dense_weight(kind: str, combine: str) -> None:
    """Autograd through the combined weight is the reference for every hand-written backward. DoRA's norm is a constant
    of the backward pass (arXiv:2402.09353, section 4.3), in the reference as in the layer."""
    net, x = make(kind, torch.float64)
    original = copy.deepcopy(net.layer)
    attach(net, LoRA(rank=4, alpha=8, targets=["layer"], combine=combine))
    spread(net)
    x = x.requires_grad_()
    mine = list(parameters(net).values())
    g = torch.randn_like(net(x))
    got = torch.autograd.grad(net(x), [x, *mine], g)

    adapter, op = net.layer.slots["default"], op_of(original)
    w = adapter.weight(op.to_matrix(original, original.weight.detach())) if combine == "dora" else None
    if w is None:
        w = op.to_matrix(original, original.weight.detach()) + adapter.delta.weight()
    state = {k: v.detach() for k, v in original.state_dict().items()} | {"weight": op.to_weight(original, w)}
    wanted = torch.autograd.grad(torch.func.functional_call(original, state, (x,)), [x, *mine], g)
    for mine_, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine_, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [7, 4096])
@pytest.mark.parametrize("bias", [True, False])
def test_the_single_function_equals_its_reference(tokens: int, bias: bool) -> None:
    """Small and large inputs take different paths; both are the one-line reference, forwards and backwards."""
    from veneer.core.lowrank import low_rank_linear, reference

    torch.manual_seed(0)
    x, w, a, b = (torch.randn(*s, dtype=torch.float64) for s in ((2, tokens, 12), (10, 12), (4, 12), (10, 4)))
    v = torch.randn(10, dtype=torch.float64) if bias else None
    leaves = [t.requires_grad_() for t in (x, a, b)]
    got, wanted = low_rank_linear(x, w, v, a, b, 0.7), reference(x, w, v, a, b, 0.7)
    torch.testing.assert_close(got, wanted)
    g = torch.randn_like(wanted)
    for mine, theirs in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(low_rank_linear(x, w, v, a, b, 0.7), wanted)


def test_the_single_function_passes_gradcheck() -> None:
    from veneer.core.lowrank import LowRankLinear

    torch.manual_seed(0)
    x, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (2, 5), (4, 2)))
    w, v = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, a, b: LowRankLinear.apply(x, w, v, a, b, 1.5), (x, a, b))


@pytest.mark.parametrize("kind,combine,precision", list(itertools.product(LAYERS, COMBINES, DTYPES)))
def test_mixing_is_a_sum_of_changes_of_the_weight(kind: str, combine: str, precision: str) -> None:
    """{"a": w, "b": v} runs W + w dWa + v dWb; a routed batch gives every row what it would get alone."""
    from veneer.core.model import activate, routed

    dtype = DTYPES[precision]
    net, x = make(kind, dtype)
    x = torch.cat([x, x])[:3] if x.shape[0] < 3 else x[:3]
    original = copy.deepcopy(net.layer)
    changes: dict[str, Tensor] = {}
    op = op_of(original)
    base = op.to_matrix(original, original.weight.detach()).double()
    for i, name in enumerate(("a", "b")):
        attach(net, LoRA(rank=2 + i, alpha=4, targets=["layer"], combine=combine), name)
        spread(net, name)
        adapter = net.layer.slots[name].double()
        changes[name] = (adapter.weight(base) - base).detach()
        net.layer.slots[name].float()

    def dense(mix: dict[str, float]) -> Tensor:
        plain = copy.deepcopy(original).double()
        plain.weight = nn.Parameter(
            op.to_weight(plain, base + sum(w * changes[n] for n, w in mix.items())).contiguous()
        )
        return plain(x if original_is_lookup(original) else x.double()).detach()

    for mix in ({"a": 0.7, "b": -0.3}, {"a": 1.0, "b": 1.0}, {"b": 2.0}):
        activate(net, mix)
        assert close(net(x), dense(mix), dtype)
    activate(net, ["a", "b"])
    assert close(net(x), dense({"a": 1, "b": 1}), dtype)
    merge(net, {"a": 0.5, "b": 0.25})
    assert close(net(x), dense({"a": 0.5, "b": 0.25}), dtype)
    unmerge(net)

    with routed(net, ["a", None, {"a": 0.5, "b": 2.0}]):
        y = net(x)
    for row, mix in enumerate(({"a": 1.0}, {}, {"a": 0.5, "b": 2.0})):
        assert close(y[row], dense(mix)[row], dtype)
    with disabled(net):
        assert torch.equal(y[1], net(x)[1])


def test_values_survive_tensors_and_put() -> None:
    net, x = make("linear", torch.float32)
    attach(net, LoRA(rank=4, targets=["layer"], combine="dora", bias="all"))
    spread(net)
    y = net(x)
    other, _ = make("linear", torch.float32)
    attach(other, LoRA(rank=4, targets=["layer"], combine="dora", bias="all"), init=False)
    put(other, "default", tensors(net))
    assert torch.equal(other(x), y)


def test_every_layer_kind_is_in_the_product() -> None:
    covered = {op_for(type(build())) for build, _ in LAYERS.values()}
    elsewhere = {OPS["veneer.core.leaf.Leaf"]}  # read, not called: test_leaf.py
    elsewhere |= {op for kind, op in OPS.items() if kind.startswith("gptqmodel.")}  # a foreign storage: tests/quant
    assert covered | elsewhere == set(OPS.values())


@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 0, 12), (1, 12), (5, 3, 2, 12)])
@pytest.mark.parametrize("grad", [True, False])
def test_odd_shapes_of_the_input(shape: tuple[int, ...], grad: bool) -> None:
    from veneer.core.lowrank import low_rank_linear, reference

    torch.manual_seed(0)
    w, v, a, b = (torch.randn(*s) for s in ((10, 12), (10,), (4, 12), (10, 4)))
    x = torch.randn(shape)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(low_rank_linear(x, w, v, a, b, 0.5), reference(x, w, v, a, b, 0.5))
        turned = torch.randn(12, 7, 3).permute(2, 1, 0)
        torch.testing.assert_close(low_rank_linear(turned, w, v, a, b, 0.5), reference(turned, w, v, a, b, 0.5))
