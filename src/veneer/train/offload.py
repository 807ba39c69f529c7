"""What the backward pass needs, kept in the host's pinned memory meanwhile.

With recomputation a block keeps its input only. On an 8B model that is 64 MiB a block for 8,192 tokens: 2 GiB of a GPU,
or 1.3 ms a block over the bus, which a side stream does while the next block runs. In the backward pass each input is
fetched one block ahead of its use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["offloaded"]

LEAST_BYTES = 1 << 22  # what is smaller stays: it costs a launch and saves nothing


AHEAD = 2  # tensors on their way out at a time


@dataclass
class Away:
    """One tensor in host memory, on its way there or back."""

    host: Tensor
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
    away: list[Away] = field(default_factory=list)
    spare: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = field(default_factory=dict)

    def pack(self, t: Tensor) -> Tensor | int:
        is_weight = t.is_leaf and t.requires_grad
        again = torch._C._current_graph_task_id() != -1  # computed again in the backward pass, and used at once
        if again or is_weight or not t.is_cuda or not t.is_floating_point() or t.nbytes < self.least:
            return t
        spare = self.spare.get((t.shape, t.dtype))
        host = spare.pop() if spare else torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
        item = Away(host, t.device, t.detach())
        here = torch.cuda.current_stream(t.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            host.copy_(t, non_blocking=True)
            item.left = self.stream.record_event()
        self.away.append(item)
        if len(self.away) > AHEAD:
            self._let_go(self.away[-1 - AHEAD], here)
        return len(self.away) - 1

    def unpack(self, kept: Tensor | int) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        item = self.away[kept]
        here = torch.cuda.current_stream(item.device)
        for leaving in self.away:
            self._let_go(leaving, here)
        self._fetch(kept, here)
        back, item.back = item.back, None
        here.wait_event(item.arrived)
        if kept:
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
        item.back = torch.empty_like(item.host, device=item.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            item.back.copy_(item.host, non_blocking=True)
            item.arrived = self.stream.record_event()

    def forget(self) -> None:
        for item in self.away:
            self.spare.setdefault((item.host.shape, item.host.dtype), []).append(item.host)
        self.away.clear()


_rings: dict[torch.device, Ring] = {}


@contextmanager
def offloaded(device: torch.device, least_bytes: int = LEAST_BYTES) -> Iterator[None]:
    """Around a forward pass and its backward pass: large tensors that autograd keeps lie in host memory in between.

    On a device that is no GPU nothing happens. Frozen weights that autograd keeps would travel as well; packed ones and
    those of fused blocks are not kept by it.
    """
    if device.type != "cuda":
        yield
        return
    ring = _rings.get(device) or _rings.setdefault(device, Ring(torch.cuda.Stream(device), least_bytes))
    ring.least = least_bytes
    with torch.autograd.graph.saved_tensors_hooks(ring.pack, ring.unpack):
        try:
            yield
        finally:
            torch.cuda.current_stream(device).wait_stream(ring.stream)
            ring.forget()
