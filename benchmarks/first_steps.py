"""Whose first steps are right: training steps in bf16 against the same steps in fp32.

    python benchmarks/first_steps.py [--shape small] [--json FILE] [PATH ...]

LoRA starts at B = 0 and AdamW moves every number of B by the learning rate, so after the first steps a layer's change
s B A x is far below the spacing of bf16 numbers around W x. A path that rounds W x to bf16 and adds the change to that
gets W x back: what was learned does not reach the output until it has grown. A path that adds before it rounds hands
it on, in the mean. The script shows it on a Llama with random weights and random tokens:

    peft       PEFT, eager, adapters in bf16
    peft-32    PEFT, eager, adapters in fp32
    plain      Veneer's layers in transformers' blocks
    fused      veneer.fuse
    compiled   PEFT again, every block through torch.compile
    exact      Veneer's layers in fp32, with the very weights of the others

At every step the gradient is held against what `exact` gives for the adapter as that path has trained it so far.
`arrives` is the share of the exact change of the last hidden states (against B = 0) that the path's own change has:
1 says all of it, 0 none; `noise` is what else has changed, in units of the exact change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from train_gpu import SHAPES, TARGETS, base, chunked_loss, compiled

SHAPES["small"] = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "vocab_size": 2048}  # fmt: skip
SHAPES["8b-4"] = SHAPES["8b"] | {"num_hidden_layers": 4}
RATE = 1e-4


def peft(dtype: torch.dtype) -> Callable[[str, str], nn.Module]:
    def build(shape: str, device: str) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(base(shape, device), LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
        for p in model.parameters():
            p.data = p.data.to(dtype) if p.requires_grad else p.data
        return model.base_model.model

    return build


def plain(shape: str, device: str) -> nn.Module:
    import veneer
    from veneer import LoRA

    model = base(shape, device)
    veneer.attach(model, LoRA(rank=16, alpha=32, targets=TARGETS))
    return model


def fused(shape: str, device: str) -> nn.Module:
    import veneer

    model = plain(shape, device)
    veneer.fuse(model, verbose=False)
    return model


PATHS: dict[str, Callable[[str, str], nn.Module]] = {
    "peft": peft(torch.bfloat16),
    "peft-32": peft(torch.float32),
    "plain": plain,
    "fused": fused,
    "compiled": compiled(peft(torch.bfloat16)),
}


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of every layer, under names that all libraries share."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            layer, _, rest = name.replace("_orig_mod.", "").partition(".lora")
            found[f"{layer}.{'A' if 'A' in rest else 'B'}"] = p
    return found


def put(model: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in factors(model).items():
            p.copy_(values[name])


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in factors(model).items()}


def off(got: dict[str, Tensor], wanted: dict[str, Tensor], kind: str) -> tuple[float, float]:
    """The relative distance and the cosine of all gradients of one kind."""
    g, w = (torch.cat([t[n].flatten() for n in sorted(wanted) if n.endswith(kind)]) for t in (got, wanted))
    if not float(w.norm()):
        return float("nan"), float("nan")
    return float((g - w).norm() / w.norm()), float(g @ w / (g.norm() * w.norm()))


class Exact:
    """The same model in fp32, where next to nothing is lost."""

    def __init__(self, shape: str, device: str, ids: Tensor) -> None:
        self.model = plain(shape, device).float()
        self.ids = ids
        draw = torch.Generator().manual_seed(2)
        for name, p in factors(self.model).items():
            nn.init.zeros_(p) if name.endswith("B") else p.data.copy_(_start(p.shape, draw))
        self.start = values(self.model)
        self.at_start = hidden(self.model, ids)

    def gradients(self, at: dict[str, Tensor]) -> dict[str, Tensor]:
        put(self.model, at)
        return gradients(self.model, self.ids)[1]

    def change(self, at: dict[str, Tensor]) -> Tensor:
        """Of the last hidden states, against B = 0."""
        put(self.model, at)
        return hidden(self.model, self.ids) - self.at_start


def _start(shape: torch.Size, draw: torch.Generator) -> Tensor:
    """Kaiming's uniform numbers, representable in bf16 so that every path begins in the same place."""
    return ((torch.rand(shape, generator=draw) * 2 - 1) / shape[1] ** 0.5).bfloat16()


def hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """With gradients on, for fused blocks run as such only then."""
    return model.model(input_ids=ids)[0].detach().float()


def gradients(model: nn.Module, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    for p in factors(model).values():
        p.grad = None
    loss = chunked_loss(model, ids)
    loss.backward()
    return float(loss.detach()), {name: p.grad.detach().float().clone() for name, p in factors(model).items()}


def run(model: nn.Module, exact: Exact, steps: int, compared: int) -> dict[str, Any]:
    """Train for some steps; in the first ones look at what every step rests on."""
    put(model, exact.start)
    before = hidden(model, exact.ids)
    optimizer = torch.optim.AdamW(factors(model).values(), lr=RATE, fused=True)
    losses, rows = [], []
    for step in range(steps):
        loss, found = gradients(model, exact.ids)
        losses.append(loss)
        if step < compared:
            at = values(model)
            wanted, change = exact.gradients(at), exact.change(at)
            own = hidden(model, exact.ids) - before
            share = float((own * change).sum() / change.square().sum()) if step else float("nan")
            noise = float((own - share * change).norm() / change.norm()) if step else float("nan")
            (a, a_cos), (b, b_cos) = (off(found, wanted, kind) for kind in "AB")
            rows.append({"A": a, "A cosine": a_cos, "B": b, "B cosine": b_cos, "arrives": share, "noise": noise})
        optimizer.step()
    return {"losses": losses, "steps": rows}


def one_layer(width: int, move: float) -> dict[str, float]:
    """The share of a change that a rounded output has, by where the rounding is, for a layer of this width whose B has
    moved by `move` everywhere."""
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, width, generator=draw).bfloat16().double() for n in (64, 512))
    a, h_to_y = _start(torch.Size((16, width)), draw).double(), torch.randn(512, 16, generator=draw).sign() * move
    y, change = x @ (w * 0.02).T, 2 * (x @ a.T) @ h_to_y.double().T
    rounded = y.bfloat16()
    ways = {"rounded, then added": rounded + change.bfloat16(), "added, then rounded": (y + change).bfloat16()}
    return {way: float(((got - rounded).double() * change).sum() / change.square().sum()) for way, got in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="*", choices=[[], *PATHS])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--compared", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, SHAPES[args.shape]["vocab_size"], (args.batch, args.length), generator=draw).to(device)
    print("one layer: the share of s B A x that W x + s B A x has")
    for width, move in product((256, 1024, 4096), (RATE, 5 * RATE)):
        shares = ", ".join(f"{way} {share:.2f}" for way, share in one_layer(width, move).items())
        print(f"    width {width:4}, B moved by {move:g}: {shares}")
    exact, found = Exact(args.shape, device, ids), {}
    print(f"\n{'path':10} step   error of dA  cosine   error of dB  cosine   arrives   noise")
    for name in args.paths or PATHS:
        found[name] = run(PATHS[name](args.shape, device), exact, args.steps, args.compared)
        for step, row in enumerate(found[name]["steps"]):
            print(
                f"{name:10} {step:4}   {row['A']:11.4f}  {row['A cosine']:6.4f}   {row['B']:11.4f}  "
                f"{row['B cosine']:6.4f}   {row['arrives']:7.3f}  {row['noise']:6.2f}",
                flush=True,
            )
    found["exact"] = run(exact.model, exact, args.steps, 0)
    print("\nloss of each step")
    for name, each in found.items():
        print(f"{name:10} " + " ".join(f"{loss:7.4f}" for loss in each["losses"]))
    if args.json:
        record = {
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU", "paths": found,
        }  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
