"""Pages of host memory give back what was written into them, and serve again; a pass whose inputs were away, all of
them or some, gives the same gradients."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from veneer.train import offload
from veneer.train.offload import Pages, Ring, offloaded, pinned_bytes, read, write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (16, 16), (128,), (33, 8)])
def test_what_is_written_is_read(dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PAGE", 256)
    pages = Pages(pinned=False)
    t = torch.randn(shape).to(dtype)
    held = pages.take(t.nbytes)
    assert sum(map(len, held)) < 2 * t.nbytes + 1 and sum(map(len, held)) - t.nbytes < 256
    write(held, t)
    back = torch.empty_like(t)
    read(held, back)
    assert torch.equal(back, t)


def test_pages_serve_again_whatever_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a run have many lengths; memory that was kept for each would grow with every new one."""
    monkeypatch.setattr(offload, "PAGE", 1 << 12)
    pages = Pages(pinned=False)
    sizes = range(1, 9 << 12, 777)
    most = 0
    for size in (*sizes, *reversed(sizes)):
        held = pages.take(size)
        most = max(most, sum(map(len, held)))
        assert all(len(page) & (len(page) - 1) == 0 for page in held), "torch pins whole powers of two"
        pages.give_back(held)
    assert pages.taken_bytes <= most + 2 * (1 << 12)


def test_on_a_cpu_nothing_happens() -> None:
    x = torch.randn(1 << 12, requires_grad=True)
    with offloaded(torch.device("cpu"), least_bytes=0, room=0):
        (x * x).sum().backward()
    assert torch.equal(x.grad, 2 * x) and pinned_bytes(torch.device("cpu")) == 0  # type: ignore[arg-type]


class Order:
    """Stands in for a stream and an event, where all is done at once."""

    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None:
        assert event is not None

    def record_event(self) -> Order:
        return self


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Ring:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Order())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Ring, "_leaves", lambda ring, t: not (t.is_leaf and t.requires_grad) and t.nbytes >= ring.least)
    monkeypatch.setattr(offload, "PAGE", 1 << 12)
    return Ring(Order(), 1 << 14, pages=Pages(pinned=False))


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("room", [0, 1, 3, 100])
def test_what_was_away_gives_the_same_gradients(room: int, ahead: bool, at_once: Ring) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(6)))
    x = torch.randn(200, 32)

    def gradients() -> list[torch.Tensor]:
        layers.zero_grad()
        layers(x).square().mean().backward()
        return [p.grad.clone() for p in layers.parameters()]  # type: ignore[union-attr]

    wanted, pinned = gradients(), 0
    at_once.room, at_once.fetches_ahead = room * x.nbytes, ahead
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(at_once.pack, at_once.unpack):
            got = gradients()
        assert at_once.stayed == min(room, 13) * x.nbytes  # x, and of each layer what came out and what the GELU gave
        assert len(at_once.away) == max(0, 13 - room)
        at_once.forget()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        assert pinned in (0, at_once.pages.taken_bytes), "the second pass uses the first one's memory"
        pinned = at_once.pages.taken_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("room", [0, 1, 3, 100])
def test_what_was_away_from_a_gpu_gives_the_same_gradients(room: int, ahead: bool) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda")
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(6))).to(device)
    x = torch.randn(5000, 512, device=device, requires_grad=True)

    def gradients() -> list[torch.Tensor]:
        for p in (x, *layers.parameters()):
            p.grad = None
        layers(x).square().mean().backward()
        return [p.grad for p in (x, *layers.parameters())]  # type: ignore[misc]

    wanted = gradients()
    for _ in range(2):
        with offloaded(device, least_bytes=1 << 20, room=room * x.nbytes, fetches_ahead=ahead):
            got = gradients()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    ring = offload.ring_of(device)
    assert not ring.away and ring.stayed == 0
