"""The laws of an adapted layer over every storage of the frozen base: storage x layer kind x combine x dtype.

packed == unpacked      the layer is the plain layer that holds the weight it unpacks to
adapted == oracle       with an adapter moved to a random place: the plain layer that holds the combined weight
nothing is dead         every trained parameter gets a gradient, no packed one does
the base keeps house    its keys, its classes, its bits
merging refuses         and works after dequantize
"""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from quant_nets import DTYPES, LAYERS, STORAGES, Net, dense_twin, error, make, pack, run_twin, spread, tolerance
from torch import nn

import veneer
from veneer import LoRA
from veneer.core.combine import COMBINES
from veneer.core.delta import DELTAS
from veneer.core.init import INITS, NEEDS
from veneer.core.model import check_alive, disabled, elements, parameters
from veneer.core.observe import Sketch
from veneer.core.weight import is_packed, read_weight
from veneer.errors import ConfigError, StateError, UserError
from veneer.quant import eight
from veneer.quant.inputs import Inputs, summed_up
from veneer.quant.layer import Packed, pack_layer
from veneer.quant.rounding import plan_rounding, round_in_turn
from veneer.quant.storage import Recipe, storage_of

PRODUCT = list(itertools.product(STORAGES, LAYERS, COMBINES, DTYPES))


@pytest.mark.parametrize("storage,kind,combine,precision", PRODUCT, ids=["-".join(p) for p in PRODUCT])
def test_every_combination(storage: str, kind: str, combine: str, precision: str) -> None:
    dtype = DTYPES[precision]
    net, x = make(kind, dtype)
    original = copy.deepcopy(net.layer)
    pack(net, storage)
    near = tolerance(storage, dtype, kind)
    bits = copy.deepcopy(net.state_dict())
    y0 = net(x)
    assert isinstance(net.layer, type(original)) and isinstance(net.layer, Packed) and is_packed(net.layer)
    assert read_weight(net.layer).shape == original.weight.shape and read_weight(net.layer).dtype == dtype
    assert (
        error(read_weight(net.layer), original.weight)
        < {"nf4": 0.12, "int8": 0.01, "fp8": 0.04}[storage[:4].strip("-")]
    )
    assert error(y0, run_twin(dense_twin(net, original), x)) < near

    veneer.attach(net, LoRA(rank=4, alpha=8, targets=["layer"], combine=combine))
    assert torch.equal(net(x), y0)
    spread(net)
    y, wanted = net(x), run_twin(dense_twin(net, original), x)
    assert error(y, y0) > 0.05, "the adapter does nothing"
    assert error(y, wanted) < near
    with torch.no_grad():
        assert error(net(x), wanted) < near

    y.float().square().sum().backward()
    check_alive(net)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters(net).values())
    assert all(p.grad is None for n, p in net.named_parameters() if ".lora." not in n)
    with disabled(net):
        assert torch.equal(net(x), y0)

    with pytest.raises(StateError, match="dequantize"):
        veneer.merge(net)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in bits.items())
    assert torch.equal(net(x), y)

    assert veneer.dequantize(net, torch.float32) == ("layer",)
    veneer.merge(net)
    assert error(net(x.float() if x.is_floating_point() else x), wanted) < max(near, 1e-4)
    veneer.unmerge(net)
    veneer.detach(net)
    assert type(net.layer) is type(original) and vars(net.layer).keys() == vars(original).keys()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", [k for k in LAYERS if not k.startswith("embedding")])
@pytest.mark.parametrize("combine", COMBINES)
def test_gradients_are_those_of_the_dense_weight(storage: str, kind: str, combine: str) -> None:
    net, x = make(kind, torch.float32)
    original = copy.deepcopy(net.layer)
    pack(net, storage)
    dense = Net(copy.deepcopy(original))
    dense.layer.weight = nn.Parameter(read_weight(net.layer).detach().clone())
    for model in (net, dense):
        torch.manual_seed(3)
        veneer.attach(model, LoRA(rank=4, alpha=8, targets=["layer"], combine=combine))
        spread(model)
    found = []
    for model in (net, dense):
        inp = x.clone().requires_grad_()
        y = model(inp)
        torch.manual_seed(2)
        g = torch.randn_like(y)
        found.append(torch.autograd.grad(y, [inp, *parameters(model).values()], g))
    near = 3e-2 if tolerance(storage, torch.float32, kind) > 1e-3 else 1e-5
    for mine, theirs in zip(*found, strict=True):
        assert error(mine, theirs) < near


DELTA_OPTIONS = {"tokens": {"rows": (1, 2, 3, 5)}, "fused": {"parts": [(0, 2), (4, 8)]}}
STARTS = [
    (d, i)
    for d, i in itertools.product(DELTAS, INITS)
    if i not in (*NEEDS, "loftq") and (DELTAS[d].takes_init or i == "kaiming")
]


EVERY = [
    (storage, kind, delta, init, tuple(COMBINES)[(one + two + three) % len(COMBINES)])
    for one, storage in enumerate(["nf4", "fp8"])
    for two, kind in enumerate(LAYERS)
    for three, (delta, init) in enumerate(STARTS)
]


@pytest.mark.parametrize("storage,kind,delta,init,combine", EVERY, ids=["-".join(p) for p in EVERY])
def test_every_delta_and_init(storage: str, kind: str, delta: str, init: str, combine: str) -> None:
    """Rules of combining come in turn, each on one storage. What a plain layer refuses, a packed one does, too."""
    net, x = make(kind, torch.float32)
    original = copy.deepcopy(net.layer)
    options = DELTA_OPTIONS.get(delta, {})
    spec = LoRA(rank=4, alpha=8, targets=["layer"], delta=delta, init=init, combine=combine, options=options)
    try:
        veneer.attach(copy.deepcopy(net), spec)
    except UserError as refused:
        pack(net, storage)
        with pytest.raises(type(refused)):
            veneer.attach(net, spec)
        return
    pack(net, storage)
    y0 = net(x)
    veneer.attach(net, spec)
    assert error(net(x), y0) < 2e-5
    spread(net)
    y = net(x)
    assert error(y, run_twin(dense_twin(net, original), x)) < 2e-5
    y.square().sum().backward()
    check_alive(net)
    veneer.dequantize(net, torch.float32)
    veneer.merge(net)
    assert error(net(x), y) < 1e-4


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_mixed_and_routed_batches(storage: str, kind: str) -> None:
    net, x = make(kind, torch.float32)
    x = torch.cat([x, x])[:3]
    pack(net, storage)
    ys = {}
    for i, name in enumerate(("a", "b")):
        veneer.attach(net, LoRA(rank=2 + i, targets=["layer"]), name)
        spread(net, name)
        veneer.activate(net, name)
        ys[name] = net(x)
    with disabled(net):
        y0 = net(x)
    near = tolerance(storage, torch.float32, kind)
    veneer.activate(net, {"a": 0.5, "b": -2.0})
    assert error(net(x), y0 + 0.5 * (ys["a"] - y0) - 2 * (ys["b"] - y0)) < near
    with veneer.routed(net, ["a", None, "b"]):
        y = net(x)
    assert error(y, torch.stack([ys["a"][0], y0[1], ys["b"][2]])) < near


@pytest.mark.parametrize("storage", STORAGES)
def test_adapters_may_be_there_before(storage: str) -> None:
    net, x = make("linear", torch.float32)
    original = copy.deepcopy(net.layer)
    veneer.attach(net, LoRA(rank=4, targets=["layer"], combine="dora"))
    spread(net)
    pack(net, storage)
    assert type(net.layer).__name__ == "LoRAPackedLinear"
    assert error(net(x), run_twin(dense_twin(net, original), x)) < tolerance(storage, torch.float32, "linear")
    veneer.dequantize(net)
    assert type(net.layer).__name__ == "LoRALinear"


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("adapted", [False, True])
def test_copies_pickles_and_state(storage: str, kind: str, adapted: bool) -> None:
    net, x = make(kind, torch.float32)
    fresh = copy.deepcopy(net)
    pack(net, storage)
    if adapted:
        veneer.attach(net, LoRA(rank=4, targets=["layer"]))
        spread(net)
    y = net(x)
    assert torch.equal(copy.deepcopy(net)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), y)
    if not adapted:
        for p in fresh.parameters():
            p.data.zero_()
        pack(fresh, storage)
        fresh.load_state_dict(net.state_dict())
        assert torch.equal(fresh(x), y)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", LAYERS)
def test_numbers_are_counted_as_numbers(storage: str, kind: str) -> None:
    """Codes of 4 bits lie two to a byte; what is reported, and the learning rate's rule, go by weights."""
    net, _ = make(kind, torch.float32)
    size = sum(p.numel() for p in net.parameters())
    pack(net, storage)
    assert elements(net) == size
    attached = veneer.attach(net, LoRA(rank=2, targets=["layer"]))
    trained = sum(p.numel() for p in parameters(net).values())
    assert (attached.trainable, attached.total) == (trained, size + trained)
    assert (veneer.summary(net).trainable, veneer.summary(net).total) == (trained, size + trained)
    assert elements(net, adapted=False) == size


@pytest.mark.parametrize("storage", STORAGES)
def test_the_parts_keep_their_types(storage: str) -> None:
    """`.to(bfloat16)` changes what the layer unpacks to; scales that were rounded could not be had back."""
    net, x = make("linear", torch.float32)
    pack(net, storage)
    before, y = copy.deepcopy(net.layer.parts), net(x)
    net.to(torch.bfloat16)
    assert read_weight(net.layer).dtype == torch.bfloat16 and net.layer.bias.dtype == torch.bfloat16
    assert net(x.bfloat16()).dtype == torch.bfloat16
    net.float()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, net.layer.parts, strict=True))
    assert error(net(x), y) < 1e-2  # the bias was rounded


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", ["linear", "linear-no-bias", "conv1d", "hf-conv1d"])
def test_no_dense_weight_is_kept_for_the_backward(storage: str, kind: str) -> None:
    net, x = make(kind, torch.float32)
    pack(net, storage)
    veneer.attach(net, LoRA(rank=2, targets=["layer"]))
    dense, seen = read_weight(net.layer), []

    def note(t: torch.Tensor) -> torch.Tensor:
        seen.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        net(x.requires_grad_())
    assert not any(t.is_floating_point() and t.numel() == dense.numel() and t.dtype == dense.dtype for t in seen)


def test_autocast_and_compute_dtype() -> None:
    net, x = make("linear", torch.float32)
    pack(net, "nf4")
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == torch.bfloat16
    other, _ = make("linear", torch.float32)
    veneer.quantize(other, "nf4", targets=["layer"], compute_dtype=torch.bfloat16)
    assert other(x).dtype == torch.float32 and 0 < error(other(x), net(x)) < 1e-2


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_emulated_products_are_products_of_the_rounded_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So quality can be measured as it will be on hardware that this machine is not."""
    net, x = make("linear", torch.float32)
    pack(net, kind)
    unrounded = nn.functional.linear(x, read_weight(net.layer), net.layer.bias)
    monkeypatch.setenv("VENEER_KERNELS", "emulate")
    monkeypatch.setattr(eight, "_against", lambda *_: "none here")
    inp = x.clone().requires_grad_()
    y = net(inp)
    assert 1e-3 < error(y, unrounded) < {"int8": 0.02, "fp8": 0.05}[kind]
    storage = storage_of(net.layer.recipe)
    width = storage.width(24, net.layer.recipe)
    codes, scale = eight.quantize_plain(eight.rotated(x.flatten(0, 1), width), storage.code)
    rounded = eight.rotated(codes.double() * scale[:, None], width).view(x.shape)
    wanted = nn.functional.linear(rounded, read_weight(net.layer).double(), net.layer.bias.double())
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, inp, g)
    assert 1e-3 < error(dx, g @ read_weight(net.layer)) < {"int8": 0.02, "fp8": 0.05}[kind]


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AMX"), reason="no 8-bit products")
def test_what_was_rounded_in_passing_is_found_as_long_as_it_is_as_it_was() -> None:
    x, other, scale = torch.randn(3, 8), torch.randn(3, 8), torch.rand(3)
    codes, columns = torch.zeros(3, 16, dtype=torch.int8), (torch.rand(8), torch.rand(8))
    eight.remember([x], codes[:, :8], scale)
    assert eight.remembered([x], torch.int8)[1] is scale
    assert eight.remembered([x], torch.float8_e4m3fn) is None and eight.remembered([other], torch.int8) is None
    assert eight.remembered([x], torch.int8, 64) is None and eight.remembered([x], torch.int8, of=columns) is None
    eight.remember([x, other], codes, scale, of=columns)
    assert eight.remembered([x, other], torch.int8, of=columns)[0] is codes
    assert eight.remembered([other, x], torch.int8, of=columns) is None
    assert eight.remembered([x, other], torch.int8, of=columns[::-1]) is None
    x.add_(1)
    assert eight.remembered([x, other], torch.int8, of=columns) is None
    eight.remember([x], codes, scale)
    eight.forget()
    assert eight.remembered([x], torch.int8) is None


def test_emulated_int8_is_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = make("linear", torch.float32)
    pack(net, "int8")
    y = net(x)
    monkeypatch.setenv("VENEER_KERNELS", "emulate")
    monkeypatch.setattr(eight, "_against", lambda *_: "none here")
    torch.testing.assert_close(net(x), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rotation_keeps_the_digits_beside_a_large_column(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs as language models have them: a column far larger than the rest, with weights that are as much smaller."""
    monkeypatch.setenv("VENEER_KERNELS", "emulate")
    torch.manual_seed(0)
    w, x = torch.randn(32, 1024), torch.randn(50, 1024)
    x[:, 7] *= 100
    w[:, 7] /= 100
    off = {}
    for rotate in (True, False):
        layer = nn.Linear(1024, 32, bias=False)
        layer.weight.data = w.clone()
        net, inp = Net(layer), x.clone().requires_grad_()
        veneer.quantize(net, kind, targets=["layer"], rotate=rotate)
        y = net(inp)
        off[rotate] = error(y, x @ read_weight(net.layer).T)  # of the inputs' rounding alone
        assert error(read_weight(net.layer), w) < {"int8": 0.012, "fp8": 0.03}[kind]
        g = torch.randn_like(y)
        assert error(torch.autograd.grad(y, inp, g)[0], g @ w) < {"int8": 0.015, "fp8": 0.04}[kind]
    assert off[True] < (0.3 * off[False] if kind == "int8" else 0.1)


@pytest.mark.parametrize("width", eight.WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_rotating_twice_is_rotating_back(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 128).to(dtype)
    assert error(eight.rotated(eight.rotated(x, width), width), x) < {torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype]
    assert torch.equal(eight.hadamard(width, torch.bfloat16, x.device).float() @ torch.eye(width),
                       eight.hadamard(width, torch.float32, x.device))  # fmt: skip


def inputs_of(x: torch.Tensor) -> Inputs:
    sketch = Sketch()
    for batch in x.split(50):
        sketch.see(batch)
    return summed_up({"x": sketch})["x"]


def tilted(rows: int, cols: int) -> torch.Tensor:
    """Inputs as language models have them: a few strong directions, one column far larger, one dead."""
    x = torch.randn(rows, 4) @ torch.randn(4, cols) * 3 + torch.randn(rows, cols)
    x[:, 5] *= 30
    x[:, 2] = 0
    return x


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(48, 128), (7, 13), (33, 40), (64, 200)])
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_nf4_rounds_so_that_products_are_near(double: bool, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Each thing that is known of the inputs helps, on inputs not seen before; the form and its reader are the same."""
    torch.manual_seed(0)
    w, x = torch.randn(shape).to(dtype), tilted(400, shape[1])
    recipe, storage = Recipe("nf4", double=double), storage_of(Recipe("nf4"))
    seen, unseen, off = inputs_of(x[:200]), x[200:], []
    for known in (None, Inputs(seen.energy), seen):
        parts = storage.pack(w, recipe, known)
        assert [(p.shape, p.dtype) for p in parts] == [(p.shape, p.dtype) for p in storage.pack(w, recipe)]
        q = storage.unpack(parts, shape, torch.float32, recipe)
        off.append(error(unseen @ q.T, unseen @ w.float().T))
        assert error(q, w) < 0.2
    assert off[1] < 0.8 * off[0] and off[2] < 0.8 * off[1]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("shape", [(48, 128), (7, 13), (33, 40)])
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_8_bits_round_so_that_products_are_near(
    kind: str, rotate: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Other codes under the same scales: whoever multiplies by them knows of no difference."""
    torch.manual_seed(0)
    w, x = torch.randn(shape).to(dtype), tilted(400, shape[1])
    recipe, storage = Recipe(kind, rotate=rotate), storage_of(Recipe(kind))
    (plain, scale), (codes, same) = (storage.pack(w, recipe, seen) for seen in (None, inputs_of(x[:200])))
    assert codes.dtype == plain.dtype and torch.equal(same, scale) and not torch.equal(codes, plain)
    qs = [storage.unpack((c, scale), shape, torch.float32, recipe) for c in (plain, codes)]
    off = [error(x[200:] @ q.T, x[200:] @ w.float().T) for q in qs]
    assert off[1] < 0.8 * off[0] and error(qs[1], w) < {"int8": 0.02, "fp8": 0.06}[kind]


@pytest.mark.parametrize("width", [1, 4, 64])
def test_inputs_are_turned_as_weights_are(width: int) -> None:
    """Of inputs with no more than the directions that are kept, all is known, and so of what they are turned to."""
    torch.manual_seed(0)
    x = torch.randn(40, 128)
    turned, wanted = eight.turned_alike(inputs_of(x), width), inputs_of(eight.rotated(x, width))
    assert error(turned.energy, wanted.energy) < 1e-2
    assert turned.directions is not None and wanted.directions is not None
    assert error(turned.directions.double().T @ turned.directions.double(),
                 wanted.directions.double().T @ wanted.directions.double()) < 1e-2  # fmt: skip


@pytest.mark.parametrize("what", ["nothing seen", "one row", "zeros", "wide", "no weight"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_rounds_where_little_is_known(kind: str, what: str) -> None:
    """Inputs that say little or nothing, and weights that are 0, cost no more than plain rounding."""
    torch.manual_seed(0)
    x = {"one row": torch.randn(1, 96), "wide": torch.randn(300, 96) * torch.logspace(-12, 12, 96)}.get(what)
    w = torch.randn(16, 96) if what != "no weight" else torch.zeros(16, 96)
    x = torch.zeros(3, 96) if x is None else x
    recipe, storage = Recipe(kind).checked(), storage_of(Recipe(kind))
    known = Inputs(torch.zeros(96)) if what == "nothing seen" else inputs_of(x)
    plain, known = (storage.unpack(storage.pack(w, recipe, i), (16, 96), torch.float32, recipe) for i in (None, known))
    assert bool(torch.isfinite(known).all())
    assert float(((known - w) @ x.T).norm()) <= float(((plain - w) @ x.T).norm()) * 1.01
    assert float((known - w).norm()) <= 2 * float((plain - w).norm())


def test_rounding_in_turn_is_gptq() -> None:
    """With all directions of the inputs known, targets are those of the paper's algorithm on H itself."""
    torch.manual_seed(0)
    n, w, values = 160, torch.randn(8, 160), torch.linspace(-1, 1, 16)
    x = torch.randn(500, n) @ torch.randn(n, n) / 10
    h = (x.T @ x / len(x)).double()
    ev, vectors = torch.linalg.eigh(h)
    plan = plan_rounding(Inputs(h.diagonal().float(), (vectors * ev.clamp_min(0).sqrt()).T.float()))
    codes = round_in_turn(w, torch.full((8 * n,), 3.0), 1, values, plan)
    damped = (h + 0.1 * h.diagonal().mean() * torch.eye(n))[plan.order][:, plan.order]
    u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()
    rest, wanted = w[:, plan.order].clone(), torch.empty(8, n)
    for j in range(n):
        wanted[:, j] = values[(rest[:, j, None] / 3 - values).abs().argmin(1)] * 3
        rest[:, j:] -= ((rest[:, j] - wanted[:, j]) / u[j, j])[:, None] * u[j, j:]
    same = (values[codes.int()] * 3)[:, plan.order] == wanted
    assert float(same.float().mean()) > 0.99
    assert torch.allclose(plan.cost[plan.order], u.diagonal().square().reciprocal(), rtol=1e-3)


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_quantize_looks_at_data(kind: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 16))
    x = torch.randn(100, 64)
    x[:, 3] *= 30
    y, off = net(x).detach(), []
    for data in (None, [x[:50], x[50:]]):
        packed = copy.deepcopy(net)
        veneer.quantize(packed, kind, targets=["0", "2"], data=data)
        off.append(error(packed(x), y))
    assert off[1] < 0.8 * off[0]
    with pytest.raises(ConfigError, match="int8 makes no use of data"):
        veneer.quantize(net, "int8", targets=["0", "2"], data=[x])
    with pytest.raises(ConfigError, match="no batch"):
        veneer.quantize(net, kind, targets=["0", "2"], data=[])
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize("storage", ["nf4", "int8", "fp8"])
def test_adapters_are_fp32_and_multiply_in_bf16(storage: str) -> None:
    """A step moves fp32 values; what is multiplied is their bf16 rounding, and gradients come back in fp32."""
    net, x = make("linear", torch.bfloat16)
    pack(net, storage)
    veneer.attach(net, LoRA(rank=4, targets=["layer"]))
    spread(net)
    y = net(x)
    assert y.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in parameters(net).values())
    with torch.no_grad():
        for p in parameters(net).values():
            p.copy_(p.bfloat16())
    assert torch.equal(net(x), y)
    net(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters(net).values())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_outliers_are_multiplied_as_they_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that are nearly all of the output cost what the others say nothing of its digits."""
    monkeypatch.setenv("VENEER_KERNELS", "emulate")
    torch.manual_seed(0)
    rest, layer = torch.randn(50, 64), nn.Linear(64, 16, bias=False)
    x = rest.clone()
    x[:, 5], x[:, 9] = 100, 60 + 20 * torch.rand(50)
    off = {}
    for outliers in (None, 6.0):
        net = Net(copy.deepcopy(layer))
        veneer.quantize(net, kind, targets=["layer"], rotate=False, outliers=outliers)
        w = read_weight(net.layer)
        off[outliers] = float((net(x) - x @ w.T).norm() / (rest @ w.T).norm())
    assert off[6.0] < 0.1 * off[None] and off[6.0] < {"int8": 0.01, "fp8": 0.04}[kind]


@pytest.mark.parametrize("storage", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("ids", [1, 3, 4, 7, 12])
def test_rows_are_looked_up_a_few_at_a_time(storage: str, ids: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Embedding(20, 128)
    pack_layer(layer, Recipe(storage), None, None)
    asked = torch.randint(0, 20, (2, ids))
    wanted = layer(asked)
    monkeypatch.setattr("veneer.quant.layer.LOOKED_UP", 4)
    assert torch.equal(layer(asked), wanted)
