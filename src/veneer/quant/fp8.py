"""FP8: each row of W as e4m3 floats with one fp32 scale, multiplied as such (Hopper, Ada and later).

e4m3 keeps three bits after the leading one at every size, where INT8 keeps a fixed step; a row with a few large values
suffers less. But every number is off by up to 6 %, on average by 2.6 %, where INT8 with turned inputs is off by less
than 1 % of a typical one: squared, some nine times as much. In training most of what that costs is lost in W
(benchmarks/fp8_parts.py). So W is turned with its inputs, which spreads what a few columns weigh, and rounded with
regard to them wherever they are known. Gradients in e4m3 cost least; e5m2 has one bit less.

The instruction wants its right matrix by columns. W^T is, by nature; W itself is turned for each backward pass, which
costs about a fiftieth of a step and saves a second copy of the codes.

The codes are kept as bytes. As a floating-point type they would be taken for ordinary weights by whoever asks a model
for its type, turns it to another one, or pickles it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from veneer.quant.eight import RowScaled
from veneer.quant.storage import STORAGES

__all__ = ["Fp8"]


class Fp8(RowScaled):
    kind, code, held = "fp8", torch.float8_e4m3fn, torch.uint8
    rotates = True
    weighs = True

    def step(self, q: Tensor, scale: Tensor) -> Tensor:
        """Half of the last of three bits; below the least normal number, 2^-6, a fixed one."""
        return torch.maximum(q.abs() * 2**-4, scale * 2**-10)

    def multiply(self, a: Tensor, rows: Tensor, b: Tensor, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
        columns = _ones(b.shape[1], rows.device) if columns is None else columns
        options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        return torch._scaled_mm(a, b, rows[:, None], columns[None, :], **options).to(dtype)


STORAGES["fp8"] = Fp8()


@cache
def _ones(n: int, device: torch.device) -> Tensor:
    return torch.ones(n, device=device)
