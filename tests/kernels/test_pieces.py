"""The pieces against autograd and, where there is a GPU, its kernels against the pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels import pieces
from veneer.kernels.pieces import ACTIVATIONS, Rounding
from veneer.quant import eight

WIDTHS = [(5, 48), (1, 8), (0, 16), (3, 1000)]


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", WIDTHS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_way_back_through_a_norm_is_its_gradient(shape: tuple[int, int], offset: float) -> None:
    x, g, plus, w = rand(*shape).requires_grad_(), rand(*shape), rand(*shape), rand(shape[1])
    y, rstd = pieces.rms_norm(x, w, 1e-5, offset)
    (wanted,) = torch.autograd.grad(y, x, g)
    got = pieces.rms_norm_back(g, x.detach(), rstd.detach(), w, offset, plus)
    torch.testing.assert_close(got, wanted + plus)
    torch.testing.assert_close(pieces.rms_norm(x, w, 1e-5, offset, rstd)[0], y)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("in_place", [True, False])
def test_the_way_back_through_a_gated_unit_is_its_gradient(act: str, in_place: bool) -> None:
    gate, up = (t.requires_grad_() for t in rand(6, 2 * 20).detach().chunk(2, dim=-1))
    g = rand(6, 20)
    y = pieces.glu(gate, up, act)
    wanted = torch.autograd.grad(y, [gate, up], g)
    d_gate, d_up = g if in_place else torch.empty_like(g), torch.empty_like(g)
    product = pieces.glu_back(g, gate.detach(), up.detach(), act, d_gate, d_up)
    torch.testing.assert_close(product, y)
    torch.testing.assert_close((d_gate, d_up), wanted)


def pair(tokens: int, width: int, rank: int) -> tuple[Tensor, Tensor] | None:
    return (rand(tokens, rank), rand(width, rank)) if rank else None


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("ranks", [(3, 2, 4), (0, 2, 0), (3, 0, 4), (0, 0, 0)])
def test_adapters_inside_a_gated_unit_are_adapters_before_it(act: str, ranks: tuple[int, int, int]) -> None:
    gate, up, g = rand(6, 20), rand(6, 20), rand(6, 20)
    own_gate, own_up = pair(6, 20, ranks[0]), pair(6, 20, ranks[1])
    down = (rand(6, ranks[2]), rand(ranks[2], 20)) if ranks[2] else None
    x, u = (t if own is None else t + own[0] @ own[1].T for t, own in ((gate, own_gate), (up, own_up)))
    torch.testing.assert_close(pieces.thin_glu(gate, up, act, own_gate, own_up)[0], pieces.glu(x, u, act))
    whole = g if down is None else g + down[0] @ down[1]
    wanted = [torch.empty_like(g) for _ in range(2)]
    product = pieces.glu_back(whole, x, u, act, *wanted)
    got = [torch.empty_like(g) for _ in range(2)]
    da, dg, du, _ = pieces.thin_glu_back(g, gate, up, act, *got, own_gate, own_up, down)
    torch.testing.assert_close(got, wanted)
    assert da is None if down is None else torch.allclose(da, down[0].T @ product)
    assert dg is None if own_gate is None else torch.allclose(dg, got[0].T @ own_gate[0])
    assert du is None if own_up is None else torch.allclose(du, got[1].T @ own_up[0])


@pytest.mark.parametrize("onto", [True, False])
def test_a_thin_product_on_top(onto: bool) -> None:
    c, h, b, y = rand(6, 20) if onto else None, rand(6, 3), rand(20, 3), rand(6, 20)
    wanted = y + h @ b.T + (c if c is not None else 0)
    got = pieces.add_product(c, h.float(), b.float(), y.clone())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted.float())
    here = y.clone()
    assert pieces.add_product(c, h, b, here) is here
    torch.testing.assert_close(here, wanted)


@pytest.mark.parametrize("rows", [7, 14])
def test_turning_back_is_the_transpose_of_turning(rows: int) -> None:
    x, g, cos, sin = rand(2, 7, 3, 8).requires_grad_(), rand(2, 7, 3, 8), rand(rows, 8), rand(rows, 8)
    c, s = (t.view(-1, 7, 1, 8) for t in (cos, sin))
    y = x * c + torch.cat([-x[..., 4:], x[..., :4]], -1) * s
    (wanted,) = torch.autograd.grad(y, x, g)
    x = x.detach()
    torch.testing.assert_close(pieces.rotate(x, cos, sin, torch.empty_like(x)), y)
    torch.testing.assert_close(pieces.rotate(g, cos, sin, torch.empty_like(g), back=True), wanted)
    torch.testing.assert_close(pieces.rotate(x, cos, sin, x), y)  # in its own memory


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_logits_become_their_gradient(tokens: int) -> None:
    logits, labels = (rand(tokens, 50) * 3).requires_grad_(), torch.randint(0, 50, (tokens,))
    losses = F.cross_entropy(logits, labels, reduction="none")
    (wanted,) = torch.autograd.grad(losses.sum(), logits)
    held = logits.detach().clone()
    torch.testing.assert_close(pieces.token_losses_(held, labels), losses)
    torch.testing.assert_close(held, wanted)


# ------------------------------------------------------------------ the kernels


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    off = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-9)
    return bool(off < {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype])


def rounded_alike(dtype: torch.dtype, gate: Tensor, up: Tensor, g: Tensor, thins: list[Any], down: Any) -> None:
    """What the unit's kernels round in passing, and the thin products that they give, are what others make of it."""
    from veneer.kernels import cuda

    columns = tuple(torch.rand(gate.shape[1], device="cuda") for _ in range(2))
    bs = tuple(None if thin is None else thin[1] for thin in thins)
    for code in (torch.int8, torch.float8_e4m3fn):
        y, h = cuda.thin_glu(gate, up, "silu", *thins, code, None if down is None else down[1])
        same_codes(eight.remembered([y], code), eight.quantize_plain(y, code))
        assert down is None if h is None else close(h, y @ down[1].T, dtype)
        d = [torch.empty_like(g) for _ in range(2)]
        *_, thin = cuda.thin_glu_back(g.clone(), gate, up, "silu", *d, *thins, down, Rounding(code, columns, bs))
        found = eight.remembered(d, code, of=columns)
        same_codes(found, eight.quantize_plain(torch.cat(d, 1), code, torch.cat(columns)))
        same_codes(eight.quantize_beside(d, code, [c.clone() for c in columns]), found)
        assert close(thin, torch.cat([x @ b for x, b in zip(d, bs, strict=True) if b is not None], 1), dtype)


def same_codes(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got[1], wanted[1])
    off = (got[0].float() - wanted[0].float()).abs()
    assert (off > 0).float().mean() < 1e-3 and (off <= 0.13 * wanted[0].float().abs() + 1).all()  # ties, and no more


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_do_what_the_pieces_say(dtype: torch.dtype) -> None:
    from veneer.kernels import cuda

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    x, g, plus, w = rand(70, 1000), rand(70, 1000), rand(70, 1000), rand(1000)
    for offset in (0.0, 1.0):
        (y, r), (y2, r2) = (k.rms_norm(x, w, 1e-5, offset) for k in (cuda, pieces))
        assert close(y, y2, dtype) and close(r, r2, torch.float32)
        assert close(*(k.rms_norm_back(g, x, r2, w, offset, plus) for k in (cuda, pieces)), dtype)
    gate, up = rand(70, 2000).chunk(2, dim=-1)
    for act in ACTIVATIONS:
        assert close(*(k.glu(gate, up, act) for k in (cuda, pieces)), dtype)
        outs = [[k.glu_back(g, gate, up, act, *(d := [torch.empty_like(g) for _ in "gu"])), *d] for k in (cuda, pieces)]
        assert all(close(a, b, dtype) for a, b in zip(*outs, strict=True))
    q = rand(2, 5, 70, 24).transpose(1, 2)
    for rows in (70, 140):
        cos, sin = rand(rows, 24), rand(rows, 24)
        for back in (False, True):
            assert close(*(k.rotate(q, cos, sin, rand(2, 70, 5, 24), back) for k in (cuda, pieces)), dtype)
    for ranks in ((6, 16, 20), (0, 40, 0)):
        thins = [(rand(70, r), rand(1000, r)) if r else None for r in ranks[:2]]
        down = (rand(70, ranks[2]), rand(ranks[2], 1000)) if ranks[2] else None
        assert close(*(k.thin_glu(gate, up, "silu", *thins)[0] for k in (cuda, pieces)), dtype)
        outs = []
        for k in (cuda, pieces):
            d = [torch.empty_like(g) for _ in range(2)]
            outs.append([*k.thin_glu_back(g.clone(), gate, up, "silu", *d, *thins, down), *d])
        for mine, plain in zip(*outs, strict=True):
            assert plain is None if mine is None else close(mine, plain, dtype)
        rounded_alike(dtype, gate, up, g, thins, down)
    thin = rand(140, 6), rand(5 * 24, 6)
    assert close(*(k.rotate(q, cos, sin, rand(2, 70, 5, 24), thin=thin) for k in (cuda, pieces)), dtype)
    c, h, b = rand(70, 300), rand(70, 6), rand(300, 6)
    assert close(*(k.add_product(c, h, b) for k in (cuda, pieces)), dtype)
    wide = torch.randn(70, 300, device="cuda")
    for old in (c, None):
        for y in (wide, wide.to(dtype)):
            assert close(*(k.add_product(old, h, b, y.clone()) for k in (cuda, pieces)), dtype)
    logits, labels = rand(9, 9001) * 3, torch.randint(0, 9001, (9,), device="cuda")
    mine, plain = logits.clone(), logits.clone()
    assert close(cuda.token_losses_(mine, labels), pieces.token_losses_(plain, labels), torch.float32)
    assert close(mine, plain, dtype)
