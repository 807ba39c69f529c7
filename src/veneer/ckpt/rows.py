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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.ckpt.tensorfile import Stored

__all__ = ["Change", "Result", "merged_rows"]

CHUNK = 1 << 19  # elements at a time: 2 MiB in fp32, which the processor's cache holds
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

    def rows(self, i: int, j: int) -> Tensor:
        """dW[i:j] in fp32."""
        return self.left[i:j] @ self.right

    def applied(self, before: Tensor, i: int, j: int) -> Tensor:
        """What this adapter adds to rows i to j of W, its weight included."""
        change = self.rows(i, j)
        if self.magnitude is not None:
            combined = before + change
            change = combined * self._gain(combined, i, j) - before
        return change if self.weight == 1 else change * self.weight

    @property
    def column_gain(self) -> Tensor:
        """DoRA on W^T: one factor for each column of the file."""
        assert self.magnitude is not None and self.norm is not None
        return self.magnitude / self.norm

    def _gain(self, combined: Tensor, i: int, j: int) -> Tensor:
        assert self.magnitude is not None
        if self.transposed:
            return self.column_gain[None, :]
        norm = combined.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        return (self.magnitude[i:j] / norm)[:, None]


@dataclass
class Result:
    """How the merge of one tensor went."""

    wanted: float = 0.0  # |dW|^2
    survived: float = 0.0  # <what changed in the file, dW>
    excess: float = 0.0  # the worst output error in units of what rounding allows
    is_finite: bool = True

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

    def excess(self, before: Tensor, after: Tensor, i: int, j: int, eps: float) -> float:
        base = before @ self.x
        expected = base.clone()
        for change, inner in zip(self.changes, self.inner, strict=True):
            expected += change.weight * (self._output(change, inner, before, base, i, j) - base)
        allowed = (eps / 2 + FP32_SLACK) * torch.linalg.vector_norm(after, 1, dim=1)
        allowed += FP32_SLACK * torch.linalg.vector_norm(before, 1, dim=1)
        error = (after @ self.x - expected).abs()
        return float((error / allowed.clamp_min(torch.finfo(torch.float32).tiny)).max())

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
        return (base + delta) * change.magnitude[i:j] / squared.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def merged_rows(stored: Stored, changes: Sequence[Change], dtype: torch.dtype, result: Result) -> Iterator[Tensor]:
    """The merged tensor in pieces, in the type it is to be stored in; `result` is filled in on the way."""
    w = stored.load()
    w = w.view(len(w), -1)  # (n0, n1)
    pieces = list(_pieces(w))
    _measure_norms(stored, w, changes, pieces)
    signs = torch.randint(0, 2, (w.shape[1],), generator=torch.Generator().manual_seed(0)).float().mul_(2).sub_(1)
    proof, eps = Proof(signs, changes), torch.finfo(dtype).eps
    row_bytes = w.shape[1] * w.element_size()
    for i, j in pieces:
        before = w[i:j].float()
        change = sum((c.applied(before, i, j) for c in changes), torch.zeros(()))
        out = (before + change).to(dtype)
        after = out.float()
        result.is_finite &= bool(torch.isfinite(after.sum()))
        result.excess = max(result.excess, proof.excess(before, after, i, j, eps))
        result.wanted += float(torch.dot(change.flatten(), change.flatten()))
        result.survived += float(torch.dot((after - before).flatten(), change.flatten()))
        stored.forget(i * row_bytes, j * row_bytes)
        yield out


def _pieces(w: Tensor) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // max(1, w.shape[1]))
    for i in range(0, len(w), step):
        yield i, min(i + step, len(w))


def _measure_norms(stored: Stored, w: Tensor, changes: Sequence[Change], pieces: Sequence[tuple[int, int]]) -> None:
    """|W + dW| where a row of W is a column of the file: one more pass over it."""
    todo = [c for c in changes if c.magnitude is not None and c.transposed]
    if not todo:
        return
    squared = [torch.zeros(w.shape[1]) for _ in todo]
    row_bytes = w.shape[1] * w.element_size()
    for i, j in pieces:
        before = w[i:j].float()
        for total, change in zip(squared, todo, strict=True):
            total += (before + change.rows(i, j)).square().sum(0)
        stored.forget(i * row_bytes, j * row_bytes)
    for total, change in zip(squared, todo, strict=True):
        change.norm = total.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
