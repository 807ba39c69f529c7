"""Document 004: a fine-tuning changes weights by a matrix of low rank, "sometimes as low as 1". Is it so?

Three answers, from the plainest to the real one:

    1  a change that is of rank 1: a LoRA of rank 1 finds all of it; of rank 8: one of rank 1 finds its largest part and
       no more (Eckart and Young: no matrix of rank r is nearer than the first r singular directions)
    2  a model that is fine-tuned whole: how many directions hold nine tenths of what changed in each matrix?
    3  the same data, LoRA of rank 1, 2, 4, 8: what loss do they reach, with how many parameters (2 d r for d x d)?
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
from base import arguments, batches, load, rate, rows, train
from torch import nn

import veneer
from veneer import LoRA


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.manual_seed(0)
    a_change_of_known_rank()
    model, tokenizer = load(args.model)
    data = batches(tokenizer, rows(args.model, 24))
    a_whole_fine_tuning(model, data, args.model)
    ranks_compared(model, data, args.model)


def a_change_of_known_rank(d: int = 64) -> None:
    print(f"1  a {d} x {d} matrix changes by dW; how much of |dW| does a LoRA find?")
    for true_rank in (1, 8):
        change = torch.randn(d, true_rank) @ torch.randn(true_rank, d) / d
        values = torch.linalg.svdvals(change)
        for rank in (1, 8):
            best = float(values[:rank].square().sum() / values.square().sum())
            found = learn(change, rank)
            print(
                f"   dW of rank {true_rank}, LoRA of rank {rank}: {100 * found:5.1f} %   (possible {100 * best:5.1f} %)"
            )
            assert abs(found - best) < 0.02


def learn(change: torch.Tensor, rank: int) -> float:
    """Fit W + s B A to W + dW by gradient descent; returns the share of |dW|^2 that was found."""
    d = change.shape[0]
    net = nn.ModuleDict({"w": nn.Linear(d, d, bias=False)})
    goal = net["w"].weight.detach() + change
    veneer.attach(net, LoRA(rank=rank, alpha=rank, targets=["w"]))
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=2e-2)
    eye = torch.eye(d)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (net["w"](eye).T - goal).square().sum()
        loss.backward()
        optimizer.step()
    return 1 - loss.item() / change.square().sum().item()


def a_whole_fine_tuning(model: Any, data: list[dict[str, torch.Tensor]], name: str) -> None:
    tuned = copy.deepcopy(model)
    losses = train(tuned, data, steps=20, lr=rate(name) / 10)
    needed, widths = [], []
    for (site, before), after in zip(model.named_modules(), tuned.modules(), strict=True):
        if isinstance(before, nn.Linear) and site != "lm_head":
            values = torch.linalg.svdvals((after.weight - before.weight).detach().float())
            held = values.square().cumsum(0) / values.square().sum()
            needed.append(int((held < 0.9).sum()) + 1)
            widths.append(min(before.weight.shape))
    print(
        f"2  all weights trained for 20 steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}: "
        "nine tenths of |dW|^2 of a matrix"
    )
    print(
        f"   lie in {min(needed)} to {max(needed)} directions (median {statistics.median(needed):g}) "
        f"of the {min(widths)} to {max(widths)} there are"
    )
    report = veneer.extract(tuned, copy.deepcopy(model), rank=8)
    errors = sorted(report.errors.values())
    print(
        "   as a LoRA of rank 8 taken out of the two models, a layer's dW is "
        f"{100 * statistics.median(errors):.0f} % off (median), {100 * errors[-1]:.0f} % at worst"
    )


def ranks_compared(model: Any, data: list[dict[str, torch.Tensor]], name: str) -> None:
    print("3  LoRA on all linear layers, 40 steps on the same batches:")
    for rank in (1, 2, 4, 8):
        torch.manual_seed(1)
        report = veneer.attach(model, LoRA(rank=rank, alpha=2 * rank))
        losses = train(model, data, steps=40, lr=rate(name))
        print(f"   rank {rank}: {report.trainable:>9,} parameters, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        assert losses[-1] < losses[0]
        veneer.detach(model)


if __name__ == "__main__":
    main()
