"""The kinds of AdamW and the one buffer, each held to PyTorch's AdamW on the same parameters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer import LoRA
from veneer.core.model import adapter_of, parameters
from veneer.errors import ConfigError
from veneer.train import eight_bit, host_adam
from veneer.train.eight_bit import BLOCK, CODES, AdamW8bit, pack, unpack
from veneer.train.host_adam import AdamWHost
from veneer.train.optim import KINDS, Masters, Projection, adamw, set_rate

WIDTH = 96


def net(delta: str = "lora", dtype: torch.dtype = torch.float32, **spec: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)).to(dtype)
    veneer.attach(model, LoRA(rank=48, alpha=48, delta=delta, **spec))
    return model


def task() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(256, WIDTH)
    return x, torch.tanh(x @ torch.randn(WIDTH, WIDTH) / WIDTH**0.5)


def run(
    model: nn.Module, masters: Masters, optimizer: torch.optim.Optimizer, steps: int, start: int = 0
) -> list[float]:
    (x, y), losses = task(), []
    for step in range(start, start + steps):
        rows = slice(step % 8 * 32, step % 8 * 32 + 32)
        loss = (model(x[rows].to(next(model.parameters()).dtype)).float() - y[rows]).square().mean()
        loss.backward()
        masters.collect()
        masters.clip(masters.norm(), 1.0)
        set_rate(optimizer, 3e-3)
        optimizer.step()
        masters.publish()
        masters.zero_grad()
        losses.append(float(loss.detach()))
    return losses


# ---------------------------------------------------------------- one buffer


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora_fa"])  # which projects B's gradient besides
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_buffer_takes_the_steps_that_many_parameters_take(kind: str, dtype: torch.dtype) -> None:
    results = []
    for flat in (False, True):
        model = net(combine="dora", bias="lora_only", modules_to_save=["3"], dtype=dtype)
        masters = Masters(parameters(model), flat=flat)
        optimizer = adamw(masters, lora_plus_ratio=4.0, weight_decay=0.01, kind=kind)
        losses = run(model, masters, optimizer, 12)
        results.append((losses, {n: p.detach().clone() for n, p in masters.values.items()}))
    (losses, one), (others, two) = results
    assert one.keys() == two.keys()
    if kind != "adamw8bit":
        torch.testing.assert_close(losses, others, rtol=1e-3 if dtype is torch.bfloat16 else 1e-5, atol=0)
        assert all(torch.allclose(one[n], two[n], atol=1e-3 if dtype is torch.bfloat16 else 1e-5) for n in one)
    else:
        assert abs(losses[-1] - others[-1]) < 0.05 * losses[0]  # other blocks, other roundings


def test_parameters_in_a_buffer_are_still_the_models_own(tmp_path: Path) -> None:
    model = net()
    before = parameters(model)
    values = {n: p.detach().clone() for n, p in before.items()}
    masters = Masters(before, flat=True)
    optimizer = adamw(masters)
    assert [len(moved) for moved in masters.moved.values()] == [1, 1]
    assert len(masters.buffers) == 2
    assert all(p is before[n] and torch.equal(p, values[n]) for n, p in parameters(model).items())
    assert all(
        p.data_ptr() % 256 == buffer.whole.data_ptr() % 256 for buffer in masters.buffers for p, _ in buffer.members
    )
    run(model, masters, optimizer, 3)
    x = torch.randn(4, WIDTH)
    y = model(x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    veneer.merge(model)
    torch.testing.assert_close(model(x), y)
    veneer.unmerge(model)
    veneer.activate(model, None)
    veneer.activate(model, "default")
    assert torch.equal(model(x), y)
    veneer.save(model, tmp_path)
    other = net()
    veneer.detach(other)
    veneer.load(other, tmp_path)
    assert torch.equal(other(x), y)
    twin = copy.deepcopy(model)
    run(model, masters, optimizer, 1)
    assert torch.equal(twin(x), y) and not torch.equal(model(x), y)
    model.load_state_dict(state)
    assert torch.equal(model(x), y), "values that are put back reach the buffer"
    masters.release()
    places = {p.untyped_storage().data_ptr() for p in parameters(model).values()}
    assert len(places) == len(before) and torch.equal(model(x), y)


def test_gradients_from_elsewhere_come_home() -> None:
    model = net()
    masters = Masters(parameters(model), flat=True)
    first, second, *_ = parameters(model).values()
    first.grad, second.grad = torch.ones_like(first), None
    masters.collect()
    assert masters.norm() == pytest.approx(first.numel() ** 0.5)
    masters.zero_grad()
    assert masters.norm() == 0 and not first.grad.any()


# ---------------------------------------------------------------- moments of one byte


@pytest.mark.parametrize("key", CODES)
def test_a_code_is_near_and_right_on_average(key: str) -> None:
    torch.manual_seed(0)
    values = torch.randn(64, BLOCK).pow(3) if key == "first" else torch.randn(64, BLOCK).pow(6)
    generator, total = torch.Generator().manual_seed(0), torch.zeros_like(values)
    largest = values.abs().amax(1, keepdim=True)
    for _ in range(400):
        code, scale = pack(key, values, generator)
        assert code.dtype == torch.uint8
        found = unpack(key, code, scale)
        total += found
        assert bool((found.sign() * values.sign() >= 0).all())
        assert bool(((found - values).abs() <= 0.04 * largest).all())
    wide = values.abs() > 1e-4 * largest
    error = (total / 400 - values)[wide] / values[wide]
    assert float(error.abs().mean()) < 0.02 and abs(float(error.mean())) < 2e-3
    if key == "second":
        assert bool((found > 0).all()), "it is divided by"


@pytest.mark.parametrize("flat", [False, True])
def test_the_curve_is_that_of_fp32_moments(flat: bool) -> None:
    curves = {}
    for kind in ("adamw", "adamw8bit"):
        model = net()
        masters = Masters(parameters(model), flat=flat)
        curves[kind] = torch.tensor(run(model, masters, adamw(masters, kind=kind), 120))
    full, short = curves["adamw"], curves["adamw8bit"]
    assert full[-8:].mean() < 0.5 * full[:8].mean(), "there must be something to learn"
    assert float((full - short).abs().max()) < 0.05 * float(full[0])
    assert abs(float(full[-8:].mean() - short[-8:].mean())) < 0.05 * float(full[-8:].mean())


def test_a_run_that_goes_on_from_its_state_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, Masters, torch.optim.Optimizer]:
        model = net()
        masters = Masters(parameters(model), flat=True)
        return model, masters, adamw(masters, kind="adamw8bit", weight_decay=0.01)

    whole, masters, optimizer = fresh()
    run(whole, masters, optimizer, 10)
    first, masters, optimizer = fresh()
    run(first, masters, optimizer, 6)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second, masters, optimizer = fresh()
    second.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert all(s[key].dtype == torch.uint8 for s in optimizer.state.values() for key in CODES)
    run(second, masters, optimizer, 4, start=6)
    for (name, one), two in zip(parameters(whole).items(), parameters(second).values(), strict=True):
        assert torch.equal(one, two), name


def test_moments_take_a_quarter_of_the_memory_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(torch.randn(1 << 16))
    optimizer = AdamW8bit([p])
    p.grad = torch.randn_like(p)
    optimizer.step()
    kept = sum(t.numel() * t.element_size() for t in optimizer.state[p].values())
    assert kept < 0.27 * 8 * p.numel()
    monkeypatch.setattr(eight_bit, "CHUNK", {})
    other = nn.Parameter(torch.randn(1000, 70).T)  # not contiguous, and no whole number of blocks
    twin, plain = AdamW8bit([other], weight_decay=0.1), nn.Parameter(other.detach().clone())
    reference = torch.optim.AdamW([plain], lr=1e-3, weight_decay=0.1)
    other.grad = torch.randn_like(other)
    plain.grad = other.grad.clone()
    twin.step()
    reference.step()
    torch.testing.assert_close(other, plain)  # the first step uses moments that were never rounded


# ---------------------------------------------------------------- moments in host memory

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("piece", [1 << 21, 1000])
def test_moments_in_host_memory_change_no_bit(device: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's fused AdamW, through a save and a load in both directions."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setattr(host_adam, "PIECE", piece)
    shapes, settings = [(33, 70), (5,), (4096,)], {"lr": 3e-3, "weight_decay": 0.1}
    started = [torch.randn(shape, device=device) for shape in shapes] + [torch.randn(70, 33, device=device).T]
    ours, theirs = ([nn.Parameter(t.clone()) for t in started] for _ in range(2))
    optimizer, reference = AdamWHost(ours, **settings), torch.optim.AdamW(theirs, **settings, fused=True)

    def step(count: int) -> None:
        for _ in range(count):
            for p, q in zip(ours, theirs, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            optimizer.step()
            reference.step()

    step(4)
    held, usual = optimizer.state_dict(), reference.state_dict()
    assert all(state[name].device.type == "cpu" for state in held["state"].values() for name in host_adam.MOMENTS)
    optimizer, reference = AdamWHost(ours, **settings), torch.optim.AdamW(theirs, **settings, fused=True)
    optimizer.load_state_dict(usual)  # AdamW's moments go on in host memory
    reference.load_state_dict(copy.deepcopy(usual))
    step(3)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    again = AdamWHost(ours, **settings)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer = again
    step(2)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert all(state["step"] == 9 for state in optimizer.state.values())


@pytest.mark.gpu
def test_moments_in_host_memory_take_none_of_the_gpus() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    p = nn.Parameter(torch.randn(1 << 24, device="cuda"))
    p.grad = torch.randn_like(p)
    optimizer = AdamWHost([p])
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        optimizer.step()
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before <= 4 * 4 * host_adam.PIECE + 1024
    assert all(optimizer.state[p][name].is_pinned() for name in host_adam.MOMENTS)


# ---------------------------------------------------------------- LoRA-FA


@pytest.mark.parametrize("flat", [False, True])
def test_the_projected_gradient_is_the_best_step_that_a_frozen_a_allows(flat: bool) -> None:
    model = nn.Sequential(nn.Linear(12, 10).double())
    veneer.attach(model, LoRA(rank=3, alpha=12, delta="lora_fa", targets=["0"]))
    delta = adapter_of(model[0]).delta
    masters = Masters(parameters(model), flat=flat)
    x, w = torch.randn(7, 12, dtype=torch.float64), model[0]._parameters["weight"].requires_grad_()
    loss = (torch.nn.functional.linear(x, w) + delta.scale * (x @ delta.A.T) @ delta.B.T).square().sum()
    loss.backward()
    g = w.grad
    Projection(model).apply()
    wanted = torch.linalg.lstsq((delta.scale * delta.A).T, g.T).solution.T  # min |d s A - G|
    torch.testing.assert_close(delta.B.grad, wanted)
    assert masters.norm() == pytest.approx(float(wanted.norm()))


def test_a_projection_needs_a_frozen_a() -> None:
    with pytest.raises(ConfigError, match="delta='lora_fa'"):
        Projection(net())
