"""Rows with more numbers than 32 bits can count: 350,000 tokens of a unit 14,336 wide are 5.0e9.

On any machine the sources are read: in every kernel, what is multiplied by the distance between rows is 64 bits wide.
On a large GPU (80 GB; `python tests/kernels/test_long.py` runs this file without pytest) each kernel is tried on that
many, its first and last rows beside the reference.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from veneer.kernels import pieces

SOURCES = ("kernels/cuda.py", "quant/cuda.py")
SMALL = {  # products that cannot be large, with the reason
    "_thin: b_row": "a row of B for each channel",
    "_thin: b_column": "the same, transposed",
    "_add_product: b_row": "the same",
    "_round_thin: b_row": "the same",
    "_round_thin: b_column": "the same",
    "_add_parts: size": "a few parts of r numbers for each token",
    "_keep: n": "sums over tokens: a few hundred parts, r rows of each",
}
DISTANCE = re.compile(r"(\w+_)?(row|batch|head|size|cols|column)\d?|n\d?")


def kernels() -> Iterator[tuple[str, ast.FunctionDef]]:
    root = Path(inspect.getfile(veneer)).parent
    for source in SOURCES:
        for node in ast.walk(ast.parse((root / source).read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                yield source, node


def narrow_products(kernel: ast.FunctionDef) -> Iterator[str]:
    """Distances between rows that are multiplied by something that is not 64 bits wide."""
    wide = (
        {a.arg for a in kernel.args.args if a.arg in ("rows", "row", "to")} if kernel.name.startswith(INNER) else set()
    )
    for node in ast.walk(kernel):
        if isinstance(node, ast.Assign) and _is_wide(node.value, wide):
            wide |= {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    for product in ast.walk(kernel):
        if isinstance(product, ast.BinOp) and isinstance(product.op, ast.Mult) and not _is_wide(product, wide):
            yield from (n for n in map(ast.unparse, (product.left, product.right)) if DISTANCE.fullmatch(n))


INNER = ("_thin", "_write", "_larger")  # called by kernels, with rows or addresses that these made wide


def _is_wide(node: ast.AST, wide: set[str]) -> bool:
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return "tl.int64" in ast.unparse(node) or bool(names & wide)


@pytest.mark.parametrize(("source", "kernel"), [*kernels()], ids=lambda each: getattr(each, "name", each))
def test_addresses_are_counted_in_64_bits(source: str, kernel: ast.FunctionDef) -> None:
    found = {f"{kernel.name}: {name}" for name in narrow_products(kernel)}
    assert found <= SMALL.keys(), f"{source}: {found - SMALL.keys()}"


def test_the_reader_sees_a_narrow_product() -> None:
    text = "def k(x, n):\n    r = tl.program_id(0)\n    tl.store(x + r * n, tl.load(x + r.to(tl.int64) * n))"
    (kernel,) = ast.parse(text).body
    assert isinstance(kernel, ast.FunctionDef) and list(narrow_products(kernel)) == ["n"]


# ------------------------------------------------------------------ on a card with room for it

ENDS = 64  # rows at the beginning and at the end
SEEN = 2**31


def few(t: Tensor) -> Tensor:
    return torch.cat([t[:ENDS], t[-ENDS:]])


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def near(got: Tensor, wanted: Tensor, bound: float = 1e-2) -> None:
    off = (got.float() - wanted.float()).norm() / wanted.float().norm()
    assert off < bound, f"off by {float(off):.2%}"


def norms(cuda: Any) -> None:
    x, w = random(SEEN // 4096 + 99, 4096), random(4096)
    y, rstd = cuda.rms_norm(x, w, 1e-5)
    near(few(y), pieces.rms_norm(few(x), w, 1e-5)[0])
    near(
        few(cuda.rms_norm_back(y, x, rstd, w, plus=x)), pieces.rms_norm_back(few(y), few(x), few(rstd), w, plus=few(x))
    )
    near(few(cuda.rms_norm(x, w, 1e-5, plus=y)[0]), few(cuda.rms_norm(x, w, 1e-5, rstd=None)[0]))  # x is the sum now


def units(cuda: Any) -> None:
    t = SEEN // 14336 + 99
    gate, up = random(t, 14336), random(t, 14336)
    h, b = random(t, 32), random(14336, 32)
    near(few(cuda.glu(gate, up, "silu")), pieces.glu(few(gate), few(up), "silu"))
    pairs, own = ((h, b), (h, b)), ((few(h), b), (few(h), b))
    near(few(cuda.thin_glu(gate, up, "silu", *pairs)[0]), pieces.thin_glu(few(gate), few(up), "silu", *own)[0])


def units_back(cuda: Any) -> None:
    t = SEEN // 14336 + 99
    gate, up, g = random(t, 14336), random(t, 14336), random(t, 14336)
    h, b = random(t, 32), random(14336, 32)
    d_up, wanted = torch.empty_like(g), [few(g), torch.empty_like(few(g))]
    da = pieces.thin_glu_back(few(g), few(gate), few(up), "silu", *wanted, (few(h), b), None, (few(h), b.T))
    g[ENDS:-ENDS] = 0  # so that sums over tokens are those of the ends
    gate[ENDS:-ENDS] = 0
    up[ENDS:-ENDS] = 0
    h[ENDS:-ENDS] = 0
    got = cuda.thin_glu_back(g, gate, up, "silu", g, d_up, (h, b), None, (h, b.T.contiguous()))
    for mine, theirs in ((few(g), wanted[0]), (few(d_up), wanted[1]), (got[0], da[0]), (got[1], da[1])):
        near(mine, theirs)


def rotations(cuda: Any) -> None:
    t = SEEN // 4096 + 99
    x, angle = random(1, t, 32, 128), torch.arange(t, device="cuda")[:, None] * torch.rand(64, device="cuda")
    angle = torch.cat([angle, angle], -1)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    wanted = pieces.rotate(few(x[0])[None], few(cos), few(sin), torch.empty_like(few(x[0])[None]))
    near(few(cuda.rotate(x, cos, sin, x)[0]), wanted[0])


def thin_products(cuda: Any) -> None:
    t = SEEN // 4096 + 99
    c, h, b = random(t, 4096), random(t, 32), random(4096, 32)
    near(few(cuda.add_product(c, h, b)), pieces.add_product(few(c), few(h), b))


def losses(cuda: Any) -> None:
    t, v = SEEN // 128256 + 99, 128256
    logits, labels = random(t, v), torch.randint(0, v, (t,), device="cuda")
    rest = few(logits)
    near(few(cuda.token_losses_(logits, labels)), pieces.token_losses_(rest, few(labels)))
    near(few(logits), rest)


def attention(cuda: Any) -> None:
    """The last queries of a row beside the same by hand: forwards, and the gradient of q. The last heads of many, as
    tiled.py takes them."""
    from veneer.kernels.parts import quickest

    t = SEEN // 4096 + 99
    q, k, v = (random(1, t, 8 * n, 128)[:, :, -n:].transpose(1, 2).requires_grad_() for n in (4, 1, 1))
    with quickest(q):
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    g = torch.randn_like(o)
    found = torch.autograd.grad(o, (q, k, v), g)
    last = q[:, :, -8:].detach().float().requires_grad_()
    scores = last @ k.detach().float().transpose(-1, -2) / 128**0.5
    scores = scores + torch.full_like(scores, -torch.inf).triu(t - 7)
    own = scores.softmax(-1) @ v.detach().float()
    near(o[:, :, -8:], own, 3e-2)
    near(found[0][:, :, -8:], torch.autograd.grad(own, last, g[:, :, -8:].float())[0], 5e-2)
    assert all(torch.isfinite(d).all() for d in found)


LONG: dict[str, Callable[[Any], None]] = {
    "norms": norms,
    "units": units,
    "units back": units_back,
    "rotations": rotations,
    "thin products": thin_products,
    "losses": losses,
    "attention": attention,
}


def _is_large() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 70 * 2**30


@pytest.mark.gpu
@pytest.mark.skipif(not _is_large(), reason="needs a GPU of 80 GB")
@pytest.mark.parametrize("name", LONG)
def test_more_numbers_than_32_bits_count(name: str) -> None:
    from veneer.kernels import cuda

    LONG[name](cuda)


if __name__ == "__main__":
    import time
    import traceback

    from veneer.kernels import cuda

    for name, each in LONG.items():
        started = time.perf_counter()
        try:
            each(cuda)
            torch.cuda.synchronize()
            print(f"{name}: right ({time.perf_counter() - started:.1f} s)", flush=True)
        except Exception:
            print(f"{name}: WRONG\n{traceback.format_exc()}", flush=True)
        torch.cuda.empty_cache()
