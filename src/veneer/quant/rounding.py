"""Rounding column by column: what has not been rounded yet makes up for the errors made so far.

The output of W x + E x is off by |E x|^2, on average E H E^T with H the mean of x x^T. Rounding every weight to its
nearest code makes E small and E H E^T not at all as small as it can be, for inputs are correlated. So columns are
rounded in turn, those with large inputs first, and each is rounded not from w but from where it would best be, given
the errors of the columns before it (optimal brain surgery, row by row: GPTQ, arXiv:2210.17323, eqs. 2 and 3).

H is D + V^T V here (inputs.py; D includes a share of the mean, see `damped`). All that the errors E of finished columns
do to the rest then goes through the sum c = E V^T, k numbers for each row of W. The rest at its best costs c P c^T
with P = (I + V_r D_r^-1 V_r^T)^-1, V_r and D_r being those of the columns still to come. So for a block b of columns,
with P of those behind it:

    H_b      = D_b + V_b^T P V_b                        what errors in the block cost
    target_b = W_b - c P V_b H_b^-1                      where it should be, given c
    U        = upper Cholesky factor of H_b^-1           within the block: GPTQ, eq. 3
    P       <- P - P V_b H_b^-1 V_b^T P                  for the block before

The paper needs the Cholesky factor of the whole H, of the third power of the width; this is linear in it. Nothing in
the packed form changes, so whoever reads NF4 reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.core.observe import damped
from veneer.quant.inputs import Inputs

__all__ = ["Plan", "off_in_turn", "plan_rounding", "round_in_turn"]

WIDTH = 64  # columns to a block
LOST = 0.5  # the share of a row's sum of squares that may be lost; 0.05 is the most seen of 135M weights in NF4
ROWS = {"cpu": 1 << 20, "cuda": 1 << 26}  # weights at a time, in whole rows


@dataclass(frozen=True)
class Plan:
    """What depends on the inputs alone; columns in the order in which they are rounded."""

    order: Tensor  # (cols,)
    cost: Float[Tensor, " cols"]  # of an error when all later columns make up for it; in W's own order
    directions: Float[Tensor, "k cols"]
    pull: Float[Tensor, "k cols"]  # P V_b H_b^-1: how c moves the targets
    within: Float[Tensor, "cols b"]  # U's rows over their diagonal: how an error moves the rest of its block


def plan_rounding(inputs: Inputs) -> Plan:
    """In fp64 on the CPU, so that it is the same wherever the weights are."""
    d, v = _damped(inputs, torch.empty(0, dtype=torch.float64, device="cpu"))
    n, order = len(d), (d + v.square().sum(0)).argsort(descending=True, stable=True)
    d, v = d[order], v[:, order]
    p = torch.eye(len(v), dtype=torch.float64, device="cpu")
    cost, pull, within = torch.empty_like(d), torch.empty_like(v), d.new_zeros(n, WIDTH)
    for a in reversed(range(0, n, WIDTH)):
        b = slice(a, min(a + WIDTH, n))
        pv = p @ v[:, b]
        inverse = torch.linalg.inv(torch.diag(d[b]) + v[:, b].T @ pv)
        u = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
        cost[b] = u.diagonal().square().reciprocal()
        within[b, : len(u)] = u / u.diagonal()[:, None]
        pull[:, b] = pv @ inverse
        p = p - pull[:, b] @ pv.T
    by_column = torch.empty_like(cost).index_copy_(0, order, cost)
    return Plan(order, by_column.float(), v.float(), pull.float(), within.float())


def _damped(inputs: Inputs, like: Tensor) -> tuple[Float[Tensor, " cols"], Float[Tensor, "k cols"]]:
    """D and V, in the type and the place of `like`."""
    energy = inputs.energy.to(like)
    v = energy.new_zeros(0, len(energy)) if inputs.directions is None else inputs.directions.to(like)
    return damped(energy, v), v


def round_in_turn(
    w: Float[Tensor, "rows cols"], scales: Float[Tensor, " blocks"], block: int, values: Tensor, plan: Plan
) -> Tensor:
    """The index into `values` of each weight, (rows, cols); `scales` belong to `block` weights each, row after row."""
    order, parts = plan.order.to(w.device), [t.to(w.device) for t in (plan.directions, plan.pull, plan.within)]
    rows, cols = w.shape
    step = max(ROWS.get(w.device.type, ROWS["cpu"]) // cols, 1)
    found = torch.empty(rows, cols, dtype=torch.uint8, device=w.device)
    for at in range(0, rows, step):
        piece = w[at : at + step]
        flat = torch.arange(at, at + len(piece), device=w.device)[None] * cols + order[:, None]  # (cols, rows)
        codes = _sweep(piece.T[order].float(), scales[flat // block], values, *parts)
        found[at : at + step, order] = codes.T
    return found


def _sweep(w: Tensor, scales: Tensor, values: Tensor, v: Tensor, pull: Tensor, within: Tensor) -> Tensor:
    """w and scales are (cols, rows) in the plan's order: one column of W is one run of memory."""
    inverse = 1 / torch.where(scales.abs() < 1e-38, 1e-38, scales)
    middles, codes = (values[:-1] + values[1:]) / 2, torch.empty_like(w, dtype=torch.uint8)
    c = w.new_zeros(len(v), w.shape[1])
    for a in range(0, len(w), WIDTH):
        b = slice(a, a + WIDTH)
        target = w[b] - pull[:, b].T @ c
        rounded = torch.empty_like(target)
        for j in range(len(target)):
            index = torch.bucketize(target[j] * inverse[a + j], middles, out_int32=True)
            codes[a + j] = index
            torch.mul(values[index], scales[a + j], out=rounded[j])
            if j + 1 < len(target):
                target[j + 1 :].addr_(within[a + j, j + 1 : len(target)], target[j] - rounded[j], alpha=-1)
        c.addmm_(v[:, b], rounded - w[b])
    return codes


def off_in_turn(w: Tensor, q: Tensor, step: Tensor, inputs: Inputs | None) -> Float[Tensor, " rows"]:
    """How far rows that were rounded in turn are from w, 1 being the most that is allowed.

    A weight may be far from its own value, but a row is mostly itself. And where the inputs are known, its products are
    near: what the errors cost is the sum over columns of cost (target - Q)^2, in which a target is within `step` of its
    code, and no column costs more than its input's energy.
    """
    error = w - q
    off = error.square().sum(1) / (LOST * w.square().sum(1)).clamp_min(1e-30)
    if inputs is None:
        return off
    d, v = _damped(inputs, torch.empty(0, dtype=torch.float32, device=w.device))
    cost = (error.square() * d).sum(1) + (error @ v.T).square().sum(1)
    most = (step.square() * (d + v.square().sum(0))).sum(1)
    return torch.maximum(off, cost / most.clamp_min(1e-30))
