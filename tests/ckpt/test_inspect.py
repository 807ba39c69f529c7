"""The measures of an adapter against the dense dW that they never form."""

from __future__ import annotations

import math

import pytest
import torch

from veneer.ckpt.inspect import (
    Factors,
    compare,
    cosine,
    describe,
    difference,
    effective_rank,
    energy_rank,
    inner,
    norm,
    overlap,
    spectrum,
    stable_rank,
)


def factors(out: int, n: int, r: int, scale: float = 2.0, seed: int = 0) -> Factors:
    dice = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(r, n, generator=dice), torch.randn(out, r, generator=dice), scale)


def dense(f: Factors) -> torch.Tensor:
    return f.scale * f.b.double() @ f.a.double()


SHAPES = [(20, 30, 4), (30, 20, 8), (5, 40, 8), (40, 5, 8), (16, 16, 1)]  # ranks above a side of dW too


@pytest.mark.parametrize("out, n, r", SHAPES)
def test_the_spectrum_is_that_of_dense_dw(out: int, n: int, r: int) -> None:
    f = factors(out, n, r)
    s = spectrum(f)
    k = min(out, n, r)
    assert torch.allclose(s.values, torch.linalg.svdvals(dense(f))[:k], rtol=1e-10)
    assert torch.allclose(s.u * s.values @ s.v.mT, dense(f), atol=1e-10)
    assert torch.allclose(s.u.mT @ s.u, torch.eye(k, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("out, n, r", SHAPES)
def test_angles_and_differences_are_those_of_dense_dw(out: int, n: int, r: int) -> None:
    f, g = factors(out, n, r), factors(out, n, r + 1, 0.5, seed=1)
    assert inner(f, g) == pytest.approx(float((dense(f) * dense(g)).sum()))
    assert norm(f) == pytest.approx(float(dense(f).norm()))
    assert cosine(f, f) == pytest.approx(1) and cosine(f, f._replace(scale=-2.0)) == pytest.approx(-1)
    assert torch.allclose(dense(difference(f, g)), dense(f) - dense(g), atol=1e-5)


def test_a_tiny_difference_of_two_large_adapters_is_not_lost() -> None:
    f = factors(30, 30, 4)
    moved = f.b.clone()
    moved[3, 2] += 1e-5
    [row] = compare({"x": f}, {"x": f._replace(b=moved)})
    assert row.difference == pytest.approx(float((dense(f) - dense(f._replace(b=moved))).norm()), rel=1e-3)


def test_a_rotation_inside_the_rank_changes_nothing() -> None:
    """The same dW written with other factors is the same adapter."""
    f = factors(24, 18, 4)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    g = Factors(turn.T @ f.a.double(), f.b.double() @ turn, f.scale)
    [row] = compare({"x": f}, {"x": g})
    assert row.cosine == pytest.approx(1) and row.relative_difference == pytest.approx(0, abs=1e-6)
    assert row.overlap_in == pytest.approx(1) and row.overlap_out == pytest.approx(1)


def test_overlap_runs_from_nothing_to_all_and_chance_is_k_over_n() -> None:
    e = torch.eye(8)
    assert overlap(e[:, :3], e[:, 3:5]) == 0
    assert overlap(e[:, :3], e[:, 1:3]) == pytest.approx(1)  # the smaller lies in the larger
    rows = [compare({"x": factors(40, 60, 4, seed=i)}, {"x": factors(40, 60, 4, seed=i + 100)})[0] for i in range(60)]
    assert sum(row.overlap_in for row in rows) / 60 == pytest.approx(rows[0].chance_in, rel=0.2)
    assert sum(row.overlap_out for row in rows) / 60 == pytest.approx(rows[0].chance_out, rel=0.2)


def test_ranks_count_directions() -> None:
    flat, steep = torch.ones(8), torch.tensor([1.0, 1e-6, 1e-6])
    assert effective_rank(flat) == pytest.approx(8) and stable_rank(flat) == pytest.approx(8)
    assert effective_rank(steep) == pytest.approx(1, abs=1e-3) and stable_rank(steep) == pytest.approx(1)
    assert energy_rank(flat, 0.9) == 8 and energy_rank(steep) == 1


def test_an_untouched_and_a_broken_layer_say_so() -> None:
    f = factors(10, 12, 4)
    dead = describe("q", f._replace(b=torch.zeros_like(f.b)))
    assert dead.is_dead and dead.effective_rank == 0 and dead.values == ()
    broken = describe("q", f._replace(a=torch.full_like(f.a, math.nan)))
    assert not broken.is_finite and not broken.is_dead
    assert describe("q", f).shape == (10, 12)


def test_only_layers_that_both_have_are_compared() -> None:
    f, g = factors(10, 12, 4), factors(12, 12, 4)
    assert [row.site for row in compare({"a": f, "b": f, "c": f}, {"b": f, "c": g, "d": f})] == ["b"]
