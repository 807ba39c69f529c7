"""A fingerprint for a tensor: two sums over its raw bits, so that one changed bit anywhere changes the result.

The bits are read as integers where they lie (a GPU adds its own) and summed modulo 2^64, once plainly and once by
position, so that neither a nudge of one unit in the last place nor two rows exchanged goes unseen. This guards against
accidents, not against forgery. It costs one pass at memory speed; of more bytes than `budget`, evenly spread blocks are
read, and the share that was read is part of the result.

    >>> w = torch.ones(3)
    >>> before = fingerprints({"w": w})
    >>> w[1] = torch.nextafter(w[1], torch.tensor(2.0))
    >>> fingerprints({"w": w}).differing(before)
    ['w']
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Fingerprints", "fingerprints"]

BUDGET_BYTES = {"cpu": 8 << 30, "cuda": 1 << 40}  # about five seconds of one CPU core; a GPU reads all of its memory
BLOCK = {"cpu": 1 << 16, "cuda": 1 << 23}  # elements summed at once; small enough for a CPU's cache
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # spreads positions over 64 bits; the golden ratio, as a signed integer


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints by name, and the share of all bytes that was read for them."""

    values: Mapping[str, tuple[int, int]]
    share: float
    total_bytes: int

    def differing(self, before: Fingerprints) -> list[str]:
        """Names that are new, gone or changed since `before`."""
        names = {**before.values, **self.values}
        return [name for name in names if self.values.get(name) != before.values.get(name)]

    def combined(self) -> str:
        """One short word for all of them, to be written down."""
        told = "".join(f"{name}:{a}:{b};" for name, (a, b) in sorted(self.values.items()))
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def fingerprints(tensors: Mapping[str, Tensor], budget: int | None = None) -> Fingerprints:
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    device = next((t.device.type for t in tensors.values()), "cpu")
    budget = BUDGET_BYTES.get(device, BUDGET_BYTES["cpu"]) if budget is None else budget
    every = max(1, -(-total // budget)) if budget else 1
    return Fingerprints({name: _sums(t, every) for name, t in tensors.items()}, 1 / every, total)


def _sums(tensor: Tensor, every: int) -> tuple[int, int]:
    plain = placed = 0
    for part in _plain_parts(tensor.detach()):
        block = BLOCK.get(part.device.type, BLOCK["cpu"])
        a, b = _part_sums(part.contiguous().view(INTEGERS[part.element_size()]).flatten(), block, every)
        plain, placed = plain * 31 + a, placed * 31 + b
    return plain % (1 << 64), placed % (1 << 64)


def _part_sums(bits: Tensor, block: int, every: int) -> tuple[int, int]:
    weights = torch.arange(1, min(block, max(1, bits.numel())) + 1, dtype=torch.int64, device=bits.device) * ODD
    plain = torch.zeros((), dtype=torch.int64, device=bits.device)
    placed = plain.clone()
    for k in range(0, -(-bits.numel() // block), every):
        words = bits[k * block : (k + 1) * block].to(torch.int64)
        plain += words.sum()
        placed = placed * 31 + (words * weights[: len(words)]).sum()  # integers wrap around, which is the modulus
    return int(plain), int(placed)


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors that a tensor is made of: itself, or what a quantised or sharded one holds inside."""
    if tensor.device.type == "meta":
        return
    if hasattr(tensor, "_local_tensor"):
        yield from _plain_parts(tensor._local_tensor)  # type: ignore[attr-defined]
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from _plain_parts(getattr(tensor, name))
    elif tensor.is_complex():
        yield torch.view_as_real(tensor)
    elif tensor.numel():
        yield tensor
