"""Document 001's LoRALinear, what is wrong with it, and the same layer over Veneer.

Its forward has two branches, and the adapter is in only one of them:

    if self.rank > 0 and self.merge:
        output = F.linear(x, self.linear.weight + self.Lora_b @ self.Lora_a * self.scale, self.linear.bias)
        output = self.dropout(output)
    else:
        output = self.linear(x)              # no Lora_a, no Lora_b: the adapter is skipped
        output = self.dropout(output)

So with merge=False - the state one trains in - nothing is ever learned: both factors get no gradient, and the loss does
not move. With merge=True it learns, but forms a whole W + BA for every input, which costs the memory that LoRA saves.
And dropout acts on the output of both branches: half of what the *frozen* layer says is zeroed, where the paper drops
inputs of A alone.

"merge" should not change what a layer computes, only where the sum is taken. That is the law the assertions state.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from base import arguments

import veneer
from veneer import LoRA
from veneer.errors import StateError


class DocumentsLoRALinear(nn.Module):
    """The document's, as it stands."""

    def __init__(self, in_features, out_features, merge, rank=16, lora_alpha=16, dropout=0.5):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.merge = merge
        self.rank = rank
        self.lora_alpha = lora_alpha
        self.dropout_rate = dropout
        # W0
        self.linear = nn.Linear(in_features, out_features)
        if rank > 0:
            self.Lora_b = nn.Parameter(torch.zeros(out_features, rank))
            self.Lora_a = nn.Parameter(torch.zeros(rank, in_features))
            self.scale = self.lora_alpha / self.rank
            self.linear.weight.requires_grad = False

        if self.dropout_rate > 0:
            self.dropout = nn.Dropout(self.dropout_rate)
        else:
            self.dropout = nn.Identity()

        self.initial_weights()

    def initial_weights(self):
        nn.init.kaiming_uniform_(self.Lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.Lora_b)

    def forward(self, x):
        if self.rank > 0 and self.merge:
            output = F.linear(x, self.linear.weight + self.Lora_b @ self.Lora_a * self.scale, self.linear.bias)
            output = self.dropout(output)
            return output
        else:
            output = self.linear(x)
            output = self.dropout(output)
            return output


class LoRALinear(nn.Module):
    """The same arguments over Veneer. `merge` says where the sum is taken, not whether there is one."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        merge: bool = False,
        rank: int = 16,
        lora_alpha: float = 16,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)  # W0; attach freezes it, its bias too
        veneer.attach(self, LoRA(rank=rank, alpha=lora_alpha, dropout=dropout, targets=["linear"]))
        if merge:
            self.merge()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)  # W0 x + bias + s B A dropout(x); or, merged, (W0 + s B A) x + bias

    def merge(self) -> None:
        veneer.merge(self)

    def unmerge(self) -> None:
        veneer.unmerge(self)


def main() -> None:
    arguments(__doc__).parse_args()
    torch.manual_seed(0)
    x, target = torch.randn(64, 32), torch.randn(64, 48)

    broken = DocumentsLoRALinear(32, 48, merge=False, dropout=0.0)
    F.mse_loss(broken(x), target).backward()
    assert broken.Lora_a.grad is None and broken.Lora_b.grad is None
    print("document 001, merge=False: A and B get no gradient at all, so nothing is learned")
    with torch.no_grad():
        broken.Lora_b.normal_()
        skipped = broken(x)
        broken.merge = True
        assert not torch.allclose(broken(x), skipped)
    print(f"  and merging changes the answer: by up to {(broken(x) - skipped).abs().max().item():.2f}")

    noisy = DocumentsLoRALinear(32, 48, merge=True, dropout=0.5).train()
    silenced = float((noisy(x) == 0).float().mean())
    print(f"  its dropout zeroes {100 * silenced:.0f} % of the outputs of the frozen layer")
    assert silenced > 0.4

    layer = LoRALinear(32, 48, dropout=0.5).train()
    frozen = F.linear(x, layer.linear.weight, layer.linear.bias)
    assert torch.equal(layer(x), frozen), "zero start: B = 0, so dropout on the inputs of A cannot be seen either"
    first, *_, last = fit(layer, x, target)
    print(f"over Veneer: starts as the frozen layer bit for bit; trained, the loss falls {first:.3f} -> {last:.3f}")
    veneer.check_alive(layer)
    assert last < first and torch.equal(F.linear(x, layer.linear._parameters["weight"], layer.linear.bias), frozen)

    layer.eval()
    adapted = layer(x)
    layer.merge()
    merged = layer(x)
    layer.unmerge()
    assert torch.allclose(merged, adapted, atol=1e-5) and torch.equal(layer(x), adapted)
    print(
        f"  merged and not merged differ by {(merged - adapted).abs().max().item():.1e}; unmerged is equal to the bit"
    )

    bypassed = LoRALinear(32, 48, dropout=0.0)
    bypassed.linear.forward = lambda x: F.linear(x, bypassed.linear.weight, bypassed.linear.bias)  # the bug, by hand
    F.mse_loss(bypassed(x), target)
    try:
        veneer.check_alive(bypassed)
    except StateError as error:
        print(f"a layer whose adapter is skipped does not go unnoticed here:\n{error}")


def fit(layer: nn.Module, x: torch.Tensor, target: torch.Tensor) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main()
