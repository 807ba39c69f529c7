"""Document 000: the method and its relatives, side by side on the same data.

Every row below is the same call with another word in it - delta, combine, init and scaling are separate choices - and
each is held to what the document promises of LoRA: it starts as the base, the base stays untouched, and merged it
answers as it did adapted. "Changing r needs no new learning rate" is checked as well: with alpha / r the first step is
about as large at r = 4 as at r = 16.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from base import arguments, batches, load, rate, rows, train

import veneer
from veneer import LoRA
from veneer.core.model import parameters

VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, A gaussian": {"init": "gaussian"},
    "LoRA, q and v only": {"targets": "minimal"},
    "rsLoRA": {"scaling": "rslora"},
    "DoRA": {"combine": "dora"},
    "PiSSA": {"init": "pissa"},
    "OLoRA": {"init": "olora"},
    "DoRA from PiSSA, rsLoRA": {"combine": "dora", "init": "pissa", "scaling": "rslora"},
}
PLUS = 16  # LoRA+: B learns this many times faster than A (arXiv:2402.12354)


def main() -> None:
    args = arguments(__doc__).parse_args()
    model, tokenizer = load(args.model)
    data = batches(tokenizer, rows(args.model, 24))
    with torch.no_grad():
        base = model(**data[0]).logits
    print(f"{'variant':26} {'trained':>10} {'loss':>16}   merged differs by")
    for name, words in VARIANTS.items():
        print(try_out(name, LoRA(**{"rank": 8, "alpha": 16, **words}), model, data, base, args.model))
    print(lora_plus(model, data, args.model))
    first_steps(model, data, args.model)
    with torch.no_grad():
        assert torch.equal(model(**data[0]).logits, base)
    print("after all of them the base answers as on the first day, bit for bit")


def try_out(name: str, spec: LoRA, model: Any, data: list[Any], base: torch.Tensor, kind: str) -> str:
    torch.manual_seed(0)
    report = veneer.attach(model, spec)
    with torch.no_grad():
        start = float((model(**data[0]).logits - base).abs().max())
        assert start <= 1e-3 * float(base.abs().max()), f"{name} does not start as the base: {start}"
    losses = train(model, data, steps=24, lr=rate(kind) / (4 if "PiSSA" in name or "OLoRA" in name else 1))
    with torch.no_grad():
        adapted = model(**data[0]).logits
        veneer.merge(model)
        apart = float((model(**data[0]).logits - adapted).abs().max())
        veneer.unmerge(model)
    veneer.detach(model)
    assert losses[-1] < losses[0] and apart < 1e-2 * float(adapted.abs().max())
    return f"{name:26} {report.trainable:>10,} {losses[0]:7.3f} -> {losses[-1]:.3f}   {apart:.1e}"


def lora_plus(model: Any, data: list[Any], kind: str) -> str:
    """LoRA+ is no other layer but another optimizer: two groups."""
    torch.manual_seed(0)
    report = veneer.attach(model, LoRA(rank=8, alpha=16))
    named = parameters(model)
    groups = [
        {"params": [p for n, p in named.items() if n.endswith(".A")], "lr": rate(kind) / 4},
        {"params": [p for n, p in named.items() if n.endswith(".B")], "lr": rate(kind) / 4 * PLUS},
    ]
    optimizer, losses = torch.optim.AdamW(groups), []
    for step in range(24):
        loss = model(**data[step % len(data)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    veneer.detach(model)
    return f"{'LoRA+, B faster':26} {report.trainable:>10,} {losses[0]:7.3f} -> {losses[-1]:.3f}"


def first_steps(model: Any, data: list[Any], kind: str) -> None:
    """|dW| after one step of Adam, which moves every entry of B by about the learning rate."""
    sizes = {}
    for rank in (4, 16):
        torch.manual_seed(0)
        veneer.attach(model, LoRA(rank=rank, alpha=16))
        train(model, data, steps=1, lr=rate(kind))
        twin = copy.deepcopy(model)
        sizes[rank] = sum(a.lora["default"].delta.norm() ** 2 for a in hosts(twin)) ** 0.5
        veneer.detach(model)
    ratio = sizes[4] / sizes[16]
    print(f"|dW| after one step, r = 4 against r = 16 at the same alpha and rate: {ratio:.2f} times")
    assert 0.5 < ratio < 8


def hosts(model: Any) -> list[Any]:
    from veneer.core.model import sites

    return list(sites(model).values())


if __name__ == "__main__":
    main()
