"""What an init or a storage may want to see before it starts: what flows into each layer, or how the loss would move
its weight.

    need         what is kept for each layer                          who asks
    spectrum     top right singular vectors of its inputs, and how    eva
                 much of their variance each explains
    covariance   X^T X / n over all inputs seen, (in, in), fp32       corda
    sketch       X^T X / n as a diagonal and a few directions         nf4 (layers that never run are left out)
    gradient     dL/dW summed over the batches, (out, in), fp32       lora_ga

The model runs in evaluation mode with its adapters off, and is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veneer.core.op import LinearOp, op_of
from veneer.errors import ConfigError, TargetError

__all__ = ["Sketch", "Spectrum", "damped", "observe"]

Loss = Callable[[nn.Module, Any], Tensor]
SPARE = 16  # singular vectors kept beyond the ones needed, so that cutting after each batch costs no accuracy
DAMPED = 0.1  # of the mean energy, in every column
DIRECTIONS, PROBES = 64, 128  # of a sketch: what is kept, and random vectors that find it


@dataclass
class Spectrum:
    """The top of an SVD of all rows seen, updated batch by batch without keeping the rows."""

    size: int
    basis: Tensor | None = None  # S V^T, (k, in)
    total: float = 0.0  # |X|^2 of everything seen

    def see(self, rows: Float[Tensor, "t in"]) -> None:
        rows = rows.float()
        self.total += float(rows.double().square().sum())
        stacked = rows if self.basis is None else torch.cat([self.basis, rows])
        _, s, vh = torch.linalg.svd(stacked, full_matrices=False)
        self.basis = s[: self.size, None] * vh[: self.size]

    @property
    def directions(self) -> Float[Tensor, "k in"]:
        assert self.basis is not None
        return self.basis / self.basis.norm(dim=1, keepdim=True).clamp_min(1e-30)

    @property
    def explained(self) -> Float[Tensor, " k"]:
        """Share of the inputs' energy along each direction."""
        assert self.basis is not None
        return self.basis.square().sum(1) / max(self.total, 1e-30)


def damped(energy: Float[Tensor, " in"], directions: Float[Tensor, "k in"]) -> Float[Tensor, " in"]:
    """D of X^T X / n ~ D + V^T V, with a share of the mean on top: fine-tuning moves inputs, and no column is free."""
    return (energy - directions.square().sum(0)).clamp_min(0) + DAMPED * (float(energy.mean()) or 1.0)


@cache
def probes(size: int, device: torch.device) -> Float[Tensor, "in p"]:
    """The same random vectors for every layer of this width, in every process."""
    drawn = torch.Generator("cpu").manual_seed(0)
    return torch.randn(size, min(PROBES, size), generator=drawn, device="cpu").to(device)


@dataclass
class Sketch:
    """C = X^T X in one pass, keeping neither X nor C but its product with random vectors, which nearly spans the top
    of C (Nystrom's method; arXiv:1706.05736, algorithm 3)."""

    energy: Float[Tensor, " in"] | float = 0.0
    product: Float[Tensor, "in p"] | float = 0.0
    rows: int = 0

    def see(self, x: Float[Tensor, "t in"]) -> None:
        x = x.float()
        self.energy = x.square().sum(0) + self.energy
        self.product = x.T @ (x @ probes(x.shape[1], x.device)) + self.product
        self.rows += len(x)

    def mean(self) -> tuple[Float[Tensor, " in"], Float[Tensor, "k in"]]:
        """The diagonal of C / n; and V, the directions with V^T V nearest to it."""
        assert isinstance(self.energy, Tensor) and isinstance(self.product, Tensor)
        n, y = max(self.rows, 1), self.product.double()
        values, vectors = torch.linalg.eigh(probes(len(y), y.device).double().T @ y)
        sound = values > 1e-6 * values[-1]  # fewer rows than random vectors leave some empty
        root = (y @ vectors[:, sound]) / values[sound].sqrt()
        _, top = torch.linalg.eigh(root.T @ root)
        return self.energy / n, ((root @ top[:, -DIRECTIONS:]) / n**0.5).T


def observe(
    model: nn.Module, layers: Mapping[str, nn.Module], need: str, batches: Iterable[Any], loss: Loss, rank: int
) -> dict[str, Any]:
    """Run the batches and return for every layer what `need` says. Raises before running if a layer cannot serve."""
    odd = [f"{n}: {type(m).__name__}" for n, m in layers.items() if not isinstance(op_of(m), LinearOp)]
    if odd:
        raise TargetError("an init that looks at data serves linear layers only", problems=odd, fix="exclude them")
    seen: dict[str, Any] = {}
    with _quiet(model):
        count = (_gradients if need == "gradient" else _inputs)(model, layers, need, batches, loss, rank, seen)
    if not count:
        raise ConfigError("there was no batch to look at", where="attach(..., data=batches)")
    missing = [n for n in layers if n not in seen]
    if missing and need != "sketch":
        raise TargetError("these layers never ran on the batches given", problems=missing, fix="exclude them")
    return seen


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    state = vars(model).get("_veneer")
    before = state and (state.active.names, state.active.mix)
    model.eval()
    if state:
        state.active.change(())
    try:
        yield
    finally:
        for module in training:
            module.training = True
        if state:
            state.active.change(*before)


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _inputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    need: str,
    batches: Iterable[Any],
    loss: Loss,
    rank: int,
    seen: dict[str, Any],
) -> int:
    last: tuple[Any, str] = None, ""  # q, k and v read one input: it is sketched once

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            if need == "spectrum":
                seen.setdefault(name, Spectrum(2 * rank + SPARE)).see(x)
            elif need == "sketch":
                nonlocal last
                if args[0] is last[0] and seen.setdefault(name, seen[last[1]]) is seen[last[1]]:
                    return
                seen.setdefault(name, Sketch()).see(x)
                last = args[0], name
            else:
                x = x.float()
                seen[name] = x.T @ x + seen.get(name, 0.0)

        return hook

    handles = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
    count = 0
    try:
        with torch.no_grad():
            for batch in batches:
                _run(model, batch)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    return count


def _gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    need: str,
    batches: Iterable[Any],
    loss: Loss,
    rank: int,
    seen: dict[str, Any],
) -> int:
    weights = {name: layer._parameters["weight"] for name, layer in layers.items()}
    flags = {p: p.requires_grad for p in model.parameters()}
    count = 0
    try:
        for p in flags:
            p.requires_grad_(False)
        for w in weights.values():
            w.requires_grad_(True)  # type: ignore[union-attr]
        for batch in batches:
            grads = torch.autograd.grad(loss(model, batch), list(weights.values()), allow_unused=True)
            for name, g in zip(weights, grads, strict=True):
                if g is not None:
                    seen[name] = op_of(layers[name]).to_matrix(layers[name], g).float() + seen.get(name, 0.0)
            count += 1
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
    return count


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a transformers model gives itself when the batch holds labels."""
    loss = getattr(_run(model, batch), "loss", None)
    if loss is None:
        raise ConfigError(
            "the model gives no loss for these batches", fix="put labels into them, or attach(..., loss=function)"
        )
    return loss
