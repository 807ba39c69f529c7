"""How large the tiles of the gated unit's kernels should be on this card.

    python benchmarks/tiles.py [--tokens 4096] [--width 14336] [--rank 16]

Every tile of a small grid is timed on random data; the bytes that have to be read and written over that time say how
near to the card's bandwidth it comes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from quant_gpu import median_ms

FORWARD = [*itertools.product((16, 32, 64), (64, 128, 256), (4, 8))]
BACK = [*itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))]


def main() -> None:
    from veneer.kernels import cuda

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=14336)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    t, m, r = args.tokens, args.width, args.rank
    torch.manual_seed(0)
    gate, up, g = (torch.randn(t, m, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    h, d = (torch.randn(t, k * r, device="cuda", dtype=torch.bfloat16) for k in (2, 1))
    b1, b2 = (torch.randn(m, r, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a = torch.randn(r, m, device="cuda", dtype=torch.bfloat16)
    pairs = (h[:, :r], b1), (h[:, r:], b2)
    d_gate, d_up = torch.empty_like(g), torch.empty_like(g)
    copy = median_ms(lambda: d_gate.copy_(g))
    print(f"copy: {2 * t * m * 2 / copy / 1e9:.2f} TB/s")
    runs: list[tuple[str, list[Any], int, Callable[[], Any]]] = [
        ("GLU_TILE", FORWARD, 3, lambda: cuda.thin_glu(gate, up, "silu", *pairs)),
        ("BACK_TILE", BACK, 5, lambda: cuda.thin_glu_back(g, gate, up, "silu", d_gate, d_up, *pairs, (d, a))),
    ]
    for name, grid, passes, run in runs:
        before, found = getattr(cuda, name), []
        for tile in grid:
            setattr(cuda, name, tile)
            try:
                found.append((median_ms(run), tile))
            except Exception as error:
                found.append((float("inf"), (*tile, type(error).__name__)))
        setattr(cuda, name, before)
        best = sorted(found, key=lambda row: row[0])[:6]
        now = next(ms for ms, tile in found if tile == before) if before in grid else median_ms(run)
        print(f"{name} {before}: {now * 1e3:.0f} us, {passes * t * m * 2 / now / 1e9:.2f} TB/s")
        for ms, tile in best:
            print(f"    {tile}: {ms * 1e3:.0f} us, {passes * t * m * 2 / ms / 1e9:.2f} TB/s")


if __name__ == "__main__":
    main()
