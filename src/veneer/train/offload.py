"""What the backward pass needs, kept in the host's pinned memory meanwhile.

With recomputation a block keeps its input only. On an 8B model that is 64 MiB a block for 8,192 tokens: 2 GiB of a GPU,
or 1.3 ms a block over the bus, which a side stream does while the next block runs. In the backward pass each input is
fetched one block ahead of its use, or, where rows are so long that a second one in flight is dear, when it is used.

Where the host has too little for all of them, the first ones stay on the card: `room` says how many bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["PAGE", "Pages", "offloaded", "pinned_bytes"]

LEAST_BYTES = 1 << 22  # what is smaller stays: it costs a launch and saves nothing
PAGE = 1 << 26  # bytes of host memory taken at a time
AHEAD = 2  # tensors on their way out at a time


@dataclass
class Pages:
    """Host memory in pages that serve tensors of any shape, one after the other.

    torch pins whole powers of two: a tensor of 2.7 GiB in one piece would take 4. And rows of a run have many lengths:
    memory that is kept for each shape would grow with every new one.
    """

    pinned: bool = True
    spare: dict[int, list[Tensor]] = field(default_factory=dict)  # by size
    taken_bytes: int = 0  # all that there are

    def take(self, size: int) -> list[Tensor]:
        """Pages for `size` bytes: whole ones, and a last one that is a power of two."""
        whole, rest = divmod(size, PAGE)
        return [self._page(PAGE) for _ in range(whole)] + ([self._page(1 << (rest - 1).bit_length())] if rest else [])

    def _page(self, size: int) -> Tensor:
        if kept := self.spare.get(size):
            return kept.pop()
        self.taken_bytes += size
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)

    def give_back(self, pages: list[Tensor]) -> None:
        for page in pages:
            self.spare.setdefault(len(page), []).append(page)


def write(pages: list[Tensor], t: Tensor) -> None:
    for page, part in zip(pages, _bytes(t).split(PAGE), strict=True):
        page[: len(part)].copy_(part, non_blocking=True)


def read(pages: list[Tensor], into: Tensor) -> None:
    for page, part in zip(pages, _bytes(into).split(PAGE), strict=True):
        part.copy_(page[: len(part)], non_blocking=True)


def _bytes(t: Tensor) -> Tensor:
    return t.view(-1).view(torch.uint8)


@dataclass
class Away:
    """One tensor in host memory, on its way there or back."""

    pages: list[Tensor]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    leaving: Tensor | None = None  # held until it has left
    left: Any = None
    back: Tensor | None = None
    arrived: Any = None


@dataclass
class Ring:
    """All tensors of one forward pass, in the order in which they left; pinned memory is used again.

    All memory on the device is taken and given back in the order of the main stream, which waits for the copies:
    what another stream still uses could be given away late only, and then as many copies as there are blocks exist.
    """

    stream: Any
    least: int
    room: int = 0  # bytes that may stay on the device
    fetches_ahead: bool = True
    stayed: int = 0
    away: list[Away] = field(default_factory=list)
    pages: Pages = field(default_factory=Pages)

    def pack(self, t: Tensor) -> Tensor | int:
        if not self._leaves(t):
            return t
        if self.stayed + t.nbytes <= self.room:
            self.stayed += t.nbytes
            return t
        leaving = t.detach().contiguous()
        item = Away(self.pages.take(t.nbytes), t.shape, t.dtype, t.device, leaving)
        here = torch.cuda.current_stream(t.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            write(item.pages, leaving)
            item.left = self.stream.record_event()
        self.away.append(item)
        if len(self.away) > AHEAD:
            self._let_go(self.away[-1 - AHEAD], here)
        return len(self.away) - 1

    def _leaves(self, t: Tensor) -> bool:
        is_weight = t.is_leaf and t.requires_grad
        again = torch._C._current_graph_task_id() != -1  # computed again in the backward pass, and used at once
        return not again and not is_weight and t.is_cuda and t.is_floating_point() and t.nbytes >= self.least

    def unpack(self, kept: Tensor | int) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        item = self.away[kept]
        here = torch.cuda.current_stream(item.device)
        if item.leaving is not None:  # it need not come back
            item.back, item.arrived = item.leaving, item.left
        for leaving in self.away:
            self._let_go(leaving, here)
        self._fetch(kept, here)
        back, item.back = item.back, None
        here.wait_event(item.arrived)
        if kept and self.fetches_ahead:
            self._fetch(kept - 1, here)
        assert back is not None
        return back

    def _let_go(self, item: Away, here: Any) -> None:
        if item.leaving is not None:
            here.wait_event(item.left)
            item.leaving = None

    def _fetch(self, index: int, here: Any) -> None:
        item = self.away[index]
        if item.back is not None:
            return
        item.back = torch.empty(item.shape, dtype=item.dtype, device=item.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            read(item.pages, item.back)
            item.arrived = self.stream.record_event()

    def forget(self) -> None:
        for item in self.away:
            self.pages.give_back(item.pages)
        self.away.clear()
        self.stayed = 0


_rings: dict[torch.device, Ring] = {}


def ring_of(device: torch.device) -> Ring:
    return _rings.get(device) or _rings.setdefault(device, Ring(torch.cuda.Stream(device), LEAST_BYTES))


def pinned_bytes(device: torch.device) -> int:
    """What this process has pinned for a device already, and uses again."""
    return _rings[device].pages.taken_bytes if device in _rings else 0


@contextmanager
def offloaded(
    device: torch.device, least_bytes: int = LEAST_BYTES, room: int = 0, fetches_ahead: bool = True
) -> Iterator[None]:
    """Around a forward pass and its backward pass: large tensors that autograd keeps lie in host memory in between, but
    for the first `room` bytes of them.

    On a device that is no GPU nothing happens. Frozen weights that autograd keeps would travel as well; packed ones and
    those of fused blocks are not kept by it.
    """
    if device.type != "cuda":
        yield
        return
    ring = ring_of(device)
    ring.least, ring.room, ring.fetches_ahead = least_bytes, room, fetches_ahead
    with torch.autograd.graph.saved_tensors_hooks(ring.pack, ring.unpack):
        try:
            yield
        finally:
            torch.cuda.current_stream(device).wait_stream(ring.stream)
            ring.forget()
