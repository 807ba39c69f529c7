"""Where 8-bit products lose: in W, in what is multiplied by it, or in the gradients; turned or as they are.

    python benchmarks/fp8_parts.py [--only NAME ...] [--trained] [--steps 30] [--seed 0]

SmolLM2-135M-Instruct and the demo's data, in fp32 on a CPU; each part is rounded to e4m3 as a GPU would, or left as it
is. For each case how far the base's answers are from the whole base's (KL, in nats a token, over the demo's 48 held-out
rows). --trained: also an adapter trained on the first 561 rows, and its loss on the other 200. "kept apart": the 16
input columns of each layer with the largest share in its output are multiplied in full (fp8 does no such thing; it is
here to show what it would bring).
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from rounding import answers, prepared, train
from torch import Tensor, nn

from veneer.quant.eight import in_turn, quantize_plain, rotated, turned_alike
from veneer.quant.inputs import Inputs
from veneer.quant.model import choose, look

TRAINED_ON = 561
CODES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}
E = {"w": "e4m3", "x": "e4m3", "g": "e4m3"}
CASES: dict[str, dict[str, Any]] = {
    "nothing rounded": {},
    "W changed by 0.1 %": {"noise": 1e-3},
    "W": {"w": "e4m3"},
    "inputs": {"x": "e4m3"},
    "gradients": {"g": "e4m3"},
    "all": E,
    "W, looked at": {"w": "e4m3", "looked": True},
    "all, looked at": {**E, "looked": True},
    "all, looked at, 16 columns kept apart": {**E, "looked": True, "apart": 16},
    "W, turned": {"w": "e4m3", "turned": True},
    "inputs, turned": {"x": "e4m3", "turned": True},
    "all, turned": {**E, "turned": True},
    "all, turned, looked at": {**E, "turned": True, "looked": True},
    "int8: all, turned": {"w": "int8", "x": "int8", "g": "int8", "turned": True},
}


def rounded(x: Tensor, kind: str | None) -> Tensor:
    """Row by row, there and back."""
    if kind is None:
        return x
    codes, scale = quantize_plain(x, CODES[kind])
    return codes.float() * scale[:, None]


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Parted) -> Tensor:
        ctx.layer, ctx.shape, rows = layer, x.shape, x.flatten(0, -2)
        rest = rows.index_fill(1, layer.apart, 0)
        y = rounded(rotated(rest, layer.width), layer.case.get("x")) @ layer.q.T
        y += rows[:, layer.apart] @ layer.weight[:, layer.apart].T
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        layer, rows = ctx.layer, g.flatten(0, -2)
        kind = layer.case.get("g")
        rows = rows if kind is None else rounded(rows * layer.scale, kind) / layer.scale
        dx = rotated(rows @ layer.q, layer.width)
        dx[:, layer.apart] = rows @ layer.weight[:, layer.apart]
        return dx.view(ctx.shape), None


class Parted(nn.Linear):
    case: dict[str, Any]
    width: int  # how many columns are turned together
    apart: Tensor  # columns that are multiplied in full
    q: Tensor  # W as it is multiplied
    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self)  # type: ignore[return-value]

    def part(self, case: dict[str, Any], inputs: Inputs) -> None:
        w, kind = self.weight.data, case.get("w")
        self.case, self.width = case, 64 if case.get("turned") else 1
        weighs = inputs.energy if case.get("apart") else inputs.energy[:0]
        self.apart = weighs.topk(case.get("apart", 0)).indices
        turned = rotated(w.index_fill(1, self.apart, 0), self.width)
        self.q, self.scale = rounded(turned, kind), turned.abs().amax(1).clamp_min(1e-12)
        if kind is not None and case.get("looked"):
            codes, scale = in_turn(turned, CODES[kind], turned_alike(inputs, self.width))
            self.q = codes.float() * scale[:, None]


def parted(whole: nn.Module, case: dict[str, Any], inputs: dict[str, Inputs]) -> nn.Module:
    model = copy.deepcopy(whole)
    torch.manual_seed(1)
    for name, seen in inputs.items():
        layer = model.get_submodule(name)
        if "noise" in case:
            layer.weight.data *= 1 + case["noise"] * torch.randn_like(layer.weight)
        elif case:
            layer.__class__ = Parted
            layer.part(case, seen)  # type: ignore[operator]
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    task, rows, val, whole = prepared()
    held = sorted(rows[TRAINED_ON:], key=len, reverse=True)
    batches = [task.asked(batch) for batch in task.batches(rows[:32], 1)]
    inputs = look(whole, choose(whole, "all-linear", (), False, False)[0], batches)
    full, first = answers(whole, task, val)[0], None
    for name in ["nothing rounded", *(name for name in args.only if name != "nothing rounded")]:
        model = parted(whole, CASES[name], inputs)
        found = answers(model, task, val)[0]
        line = f"{name:40} KL {(full.exp() * (full - found)).sum(1).mean():.4f}"
        if args.trained:
            train(model, task, rows[:TRAINED_ON], args.steps, args.seed)
            logs, tokens = answers(model, task, held)
            loss = float(-logs.gather(1, tokens[:, None]).mean())
            first = first or loss
            line += f"  after training {loss:.4f} {loss / first - 1:+.2%}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
