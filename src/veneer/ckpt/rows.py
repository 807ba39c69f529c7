"""W + dW for one tensor, a few rows at a time, with a proof that the result is what the adapter computes.

A tensor on disk is a matrix of n0 rows, stored one after the other. For most layers these are the rows of W (out, in);
HF's Conv1D and embeddings store W transposed, so that a row of the file is a column of W. With the factors turned the
same way once, everything else is one piece of code:

    stored as W      dW[i:j] = s B[i:j] A          left = s B,    right = A
    stored as W^T    dW[i:j] = s A[:, i:j]^T B^T   left = s A^T,  right = B^T

Sums are formed in fp32 and rounded once. DoRA needs |W + dW| for every row of W: known within the piece in the first
case, and in the second summed up in a pass of its own before.

The proof. A random x of signs meets the result, and meets the adapted layer computed as a layer computes it: W x plus
s B (A x), never forming dW. Rounding each weight to the stored type can move an output by at most eps/2 |row|_1, and
nothing else may. So `Result.excess` is the worst error in units of what rounding allows: at most 1, or the merge is
wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.ckpt.tensorfile import Stored

__all__ = ["Change", "Result", "merged_rows"]

CHUNK = 1 << 18  # elements at a time: six buffers of 1 MiB, which the processor's cache holds
TINY = torch.finfo(torch.float32).tiny
FP32_SLACK = 2.0**-16  # errors of sums in fp32, in units of |row|_1


@dataclass
class Change:
    """One adapter's change of one stored tensor, in the tensor's own orientation."""

    left: Tensor  # (n0, r), the scale in it
    right: Tensor  # (r, n1)
    weight: float = 1.0
    magnitude: Tensor | None = None  # DoRA: one value for each row of W
    transposed: bool = False  # the file stores W^T
    norm: Tensor | None = None  # DoRA on W^T: |W + dW| by column of the file, from the first pass

    def rows(self, i: int, j: int, out: Tensor) -> Tensor:
        """dW[i:j] in fp32."""
        return torch.mm(self.left[i:j], self.right, out=out)

    def applied(self, before: Tensor, i: int, j: int, out: Tensor, spare: Tensor) -> Tensor:
        """What this adapter adds to rows i to j of W, its weight included."""
        change = self.rows(i, j, out)
        if self.magnitude is not None:
            combined = torch.add(before, change, out=spare)
            change = torch.sub(combined.mul_(self._gain(combined, i, j)), before, out=out)
        return change if self.weight == 1 else change.mul_(self.weight)

    @property
    def column_gain(self) -> Tensor:
        """DoRA on W^T: one factor for each column of the file."""
        assert self.magnitude is not None and self.norm is not None
        return self.magnitude / self.norm

    def _gain(self, combined: Tensor, i: int, j: int) -> Tensor:
        assert self.magnitude is not None
        if self.transposed:
            return self.column_gain[None, :]
        return (self.magnitude[i:j] / combined.norm(dim=1).clamp_min_(TINY))[:, None]


@dataclass
class Result:
    """How the merge of one tensor went."""

    wanted: float = 0.0  # |dW|^2
    survived: float = 0.0  # <what changed in the file, dW>
    excess: float = 0.0  # the worst output error in units of what rounding allows

    def add(self, moved: Tensor, change: Tensor) -> None:
        moved, change = moved.view(-1), change.reshape(-1)
        self.wanted += float(torch.dot(change, change))
        self.survived += float(torch.dot(moved, change))

    @property
    def is_finite(self) -> bool:
        """An infinite weight makes an infinite sum; a finite one never does in fp32 at these sizes."""
        return math.isfinite(self.survived)

    @property
    def kept(self) -> float:
        """The share of dW that survived rounding to the stored type."""
        return self.survived / self.wanted if self.wanted else 1.0


@dataclass
class Proof:
    """Outputs of the merged rows and of the adapted layer for the same x."""

    x: Tensor  # (n1,) of signs
    changes: Sequence[Change]
    inner: list[Tensor] = field(default_factory=list)  # right @ x for each change, (r,)

    def __post_init__(self) -> None:
        for change in self.changes:
            x = self.x
            if change.magnitude is not None and change.transposed:
                x = x * change.column_gain
            self.inner.append(change.right @ x)

    def excess(self, before: Tensor, after: Tensor, i: int, j: int, eps: float, spare: Tensor) -> float:
        base = before @ self.x
        expected = base.clone()
        for change, inner in zip(self.changes, self.inner, strict=True):
            expected += change.weight * (self._output(change, inner, before, base, i, j) - base)
        error = (after @ self.x - expected).abs_()
        allowed = (eps / 2 + FP32_SLACK) * torch.abs(after, out=spare).sum(1)
        if bool((error > allowed).any()):  # a weight far larger than what is left of it has its own rounding in fp32
            allowed += FP32_SLACK * torch.abs(before, out=spare).sum(1)
        return float((error / allowed.clamp_min_(TINY)).max())

    def _output(self, change: Change, inner: Tensor, before: Tensor, base: Tensor, i: int, j: int) -> Tensor:
        """These rows of the adapted layer's output, dW never formed (DoRA's norm neither: the core's formula)."""
        delta = change.left[i:j] @ inner
        if change.magnitude is None:
            return base + delta
        if change.transposed:
            return before @ (self.x * change.column_gain) + delta
        left, right = change.left[i:j], change.right
        squared = before.square().sum(1) + 2 * ((before @ right.T) * left).sum(1)
        squared += ((left @ (right @ right.T)) * left).sum(1)
        return (base + delta) * change.magnitude[i:j] / squared.clamp_min(TINY).sqrt()


class Scratch:
    """Memory for one piece, used again for the next: fresh pages would cost more than all the arithmetic."""

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        self.stored, self.columns = stored, math.prod(stored.shape[1:])
        self.step = max(1, min(CHUNK // max(1, self.columns), stored.shape[0]))
        self.raw = torch.empty(self.step, self.columns, dtype=stored.dtype)
        self.fp32 = [torch.empty(self.step, self.columns) for _ in range(5)]
        self.out = torch.empty(self.step, self.columns, dtype=dtype)

    def pieces(self) -> Iterator[tuple[int, int, list[Tensor]]]:
        """Rows i to j of the stored matrix in fp32, and four more places for as many."""
        rows = self.stored.shape[0]
        for i in range(0, rows, self.step):
            j = min(i + self.step, rows)
            places = [t[: j - i] for t in self.fp32]
            places[0].copy_(self.stored.read(self.raw[: j - i], i * self.columns))
            yield i, j, places


def merged_rows(stored: Stored, changes: Sequence[Change], dtype: torch.dtype, result: Result) -> Iterator[Tensor]:
    """The merged tensor in pieces, in the type it is to be stored in; `result` is filled in on the way.

    A piece is only good until the next one is asked for.
    """
    scratch = Scratch(stored, dtype)
    _measure_norms(changes, scratch)
    signs = torch.randint(0, 2, (scratch.columns,), generator=torch.Generator().manual_seed(0))
    proof, eps = Proof(signs.float().mul_(2).sub_(1), changes), torch.finfo(dtype).eps
    for i, j, (before, change, after, more, spare) in scratch.pieces():
        out = scratch.out[: j - i]
        changes[0].applied(before, i, j, change, spare)
        for other in changes[1:]:
            change += other.applied(before, i, j, more, spare)
        out.copy_(torch.add(before, change, out=after))
        after.copy_(out)  # what is stored, back in fp32
        result.excess = max(result.excess, proof.excess(before, after, i, j, eps, spare))
        result.add(torch.sub(after, before, out=spare), change)
        yield out


def _measure_norms(changes: Sequence[Change], scratch: Scratch) -> None:
    """|W + dW| where a row of W is a column of the file: one more pass over it."""
    todo = [c for c in changes if c.magnitude is not None and c.transposed]
    squared = [torch.zeros(scratch.columns) for _ in todo]
    for i, j, (before, combined, *_) in scratch.pieces() if todo else ():
        for total, change in zip(squared, todo, strict=True):
            total += change.rows(i, j, combined).add_(before).square_().sum(0)
    for total, change in zip(squared, todo, strict=True):
        change.norm = total.sqrt_().clamp_min_(TINY)
