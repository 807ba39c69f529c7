"""How large the tiles of the gated unit's kernels should be on this card, and what the products around them reach.

    python benchmarks/tiles.py [--tokens 4096] [--width 14336] [--hidden 4096] [--rank 16] [--only NAME ...]

Every tile of a small grid is timed on random data; the bytes that have to be read and written over that time say how
near to the card's bandwidth it comes. `beside` rounds gradients in one pass of their own, as is done where the unit's
kernel does not. `products` are those of an 8-bit base, scaled by rows and columns as they are here, or by one number.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

FORWARD = [*itertools.product((16, 32, 64), (64, 128, 256), (4, 8))]
BACK = [*itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))]
BACK_ROUNDED = [
    (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 3), (32, 64, 4, 2), (32, 64, 4, 3), (128, 32, 8, 2),
    (32, 32, 4, 3), (64, 64, 4, 1), (128, 32, 4, 2),
]  # fmt: skip
ROUND = [(64, 128, 4, 3), (64, 128, 4, 2), (32, 256, 4, 2), (32, 128, 4, 3), (64, 256, 8, 2), (128, 128, 8, 2)]
AHEAD = 2_000_000  # cycles for which the card waits, so that it does not wait for Python later
NAMES = ("unit", "rounded", "beside", "products")


class Data:
    def __init__(self, args: argparse.Namespace) -> None:
        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

        self.t, self.m, self.n, r = args.tokens, args.width, args.hidden, args.rank
        torch.manual_seed(0)
        self.gate, self.up, self.g = (drawn(self.t, self.m) for _ in range(3))
        h, self.d = drawn(self.t, 2 * r), drawn(self.t, r)
        self.bs = drawn(self.m, r), drawn(self.m, r)
        self.a = drawn(r, self.m)
        self.pairs = (h[:, :r], self.bs[0]), (h[:, r:], self.bs[1])
        self.into = torch.empty_like(self.g), torch.empty_like(self.g)
        self.columns = tuple(torch.rand(self.m, device="cuda") for _ in range(2))


def median_ms(run: Callable[[], Any]) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def tuned(name: str, grid: Iterable[Any], size: int, run: Callable[[], Any]) -> None:
    """`size`: the bytes that have to be read and written."""
    from veneer.kernels import cuda

    before, found = getattr(cuda, name), []
    for tile in grid:
        setattr(cuda, name, tile)
        try:
            found.append((median_ms(run), tile))
        except Exception as error:
            found.append((float("inf"), (*tile, type(error).__name__)))
    setattr(cuda, name, before)
    said(f"{name} {before}", median_ms(run), size)
    for ms, tile in sorted(found, key=lambda row: row[0])[:6]:
        said(f"    {tile}", ms, size)


def said(name: str, ms: float, size: int) -> None:
    print(f"{name}: {ms * 1e3:.0f} us, {size / ms / 1e9:.2f} TB/s", flush=True)


def unit(data: Data) -> None:
    from veneer.kernels import cuda

    whole = data.t * data.m * 2
    said("copy", median_ms(lambda: data.into[0].copy_(data.g)), 2 * whole)
    tuned("GLU_TILE", FORWARD, 3 * whole, lambda: cuda.thin_glu(data.gate, data.up, "silu", *data.pairs))
    back = data.g, data.gate, data.up, "silu", *data.into, *data.pairs, (data.d, data.a)
    tuned("BACK_TILE", BACK, 5 * whole, lambda: cuda.thin_glu_back(*back))


def rounded(data: Data) -> None:
    """What rounding in passing adds to going back and forth, and the pass that does it."""
    from veneer.kernels import cuda
    from veneer.kernels.pieces import Rounding

    whole, dtype = data.t * data.m * 2, torch.float8_e4m3fn
    back = data.g, data.gate, data.up, "silu", *data.into, *data.pairs, (data.d, data.a)
    rounding = Rounding(dtype, data.columns, data.bs)
    said("back, not rounded", median_ms(lambda: cuda.thin_glu_back(*back)), 5 * whole)
    tuned("BACK_TILE_ROUNDED", BACK_ROUNDED, 8 * whole, lambda: cuda.thin_glu_back(*back, rounding))
    forward = data.gate, data.up, "silu", *data.pairs
    said("forward, not rounded", median_ms(lambda: cuda.thin_glu(*forward)), 3 * whole)
    said("forward, rounded", median_ms(lambda: cuda.thin_glu(*forward, dtype, data.a)), whole * 9 // 2)
    most, two = data.g.abs().amax(1).float(), [data.g, data.up]
    tuned("ROUND_TILE", ROUND, 3 * whole, lambda: cuda.round_thin(two, most, dtype, data.columns, data.bs))
    for programs in (264, 528, 1056, 2112):
        cuda.ROUND_PROGRAMS = programs
        ms = median_ms(lambda: cuda.round_thin(two, most, dtype, data.columns, data.bs))
        said(f"    {programs} programs", ms, 3 * whole)


def beside(data: Data) -> None:
    from veneer.quant import cuda

    dtype, two = torch.float8_e4m3fn, [data.gate, data.up]
    for name, widest in (("beside, read once", cuda.WIDEST), ("beside, read twice", 0)):
        before, cuda.WIDEST = cuda.WIDEST, widest
        ms = median_ms(lambda: cuda.quantize_beside_kernel(two, dtype, data.columns))
        narrow = [data.gate[:, :4096], data.up[:, :1024], data.g[:, :1024]]
        three = [torch.rand(x.shape[1], device="cuda") for x in narrow]
        few = median_ms(lambda x=narrow, c=three: cuda.quantize_beside_kernel(x, dtype, c))
        cuda.WIDEST = before
        said(f"{name} (q, k, v)", few, data.t * 6144 * 3)
        said(name, ms, data.t * data.m * 6)
    d = torch.empty(data.t, 16, device="cuda", dtype=torch.bfloat16)
    said("g B of one", median_ms(lambda: torch.mm(data.gate, data.bs[0], out=d)), data.t * data.m * 2)
    said("product A^T", median_ms(lambda: data.gate @ data.a.T), data.t * data.m * 2)
    codes = torch.zeros(data.m, data.n, device="cuda", dtype=torch.uint8)
    said("turn", median_ms(lambda: cuda.turn(codes)), 2 * codes.numel())


def products(data: Data) -> None:
    """TFLOP/s of an 8-bit product, and of one in bf16 in both layouts of W; `bare`: by one scale, which leaves rows and
    columns to what reads it."""
    from veneer.quant.eight import quantize_rows

    one = torch.ones((), device="cuda")
    shapes = {"gate": (data.n, data.m), "down": (data.m, data.n), "q": (data.n, data.n), "k": (data.n, 1024)}
    for name, (cols, rows) in {**shapes, "gate and up, back": (2 * data.m, data.n)}.items():
        x, w = (torch.randn(k, cols, device="cuda", dtype=torch.bfloat16) for k in (data.t, rows))
        (a, sa), (b, sb) = (quantize_rows(each, torch.float8_e4m3fn) for each in (x, w))
        eight = partial(torch._scaled_mm, a, b.T, out_dtype=torch.bfloat16, use_fast_accum=True)
        ways = {
            "rows": partial(eight, scale_a=sa[:, None], scale_b=sb[None]),
            "bare": partial(eight, scale_a=one, scale_b=one),
            "bf16": partial(torch.mm, x, w.T),
            "bf16, the other layout": partial(torch.mm, x, w.T.contiguous()),
        }
        for way, run in ways.items():
            ms = median_ms(run)
            print(f"{name} {way}: {ms * 1e3:.0f} us, {2 * data.t * rows * cols / ms / 1e9:.0f} TFLOP/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=14336)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES)
    args = parser.parse_args()
    data = Data(args)
    for name in args.only:
        globals()[name](data)


if __name__ == "__main__":
    main()
