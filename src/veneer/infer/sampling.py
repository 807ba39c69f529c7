"""How the next token is picked: the settings, and the arithmetic on logits that they ask for.

`Sampling` is plain data, so the command line can make flags of it before torch is loaded; torch is imported by the
functions that need it. The order is that of transformers' `generate` (penalty, temperature, top-k, top-p, min-p), so a
setting means here what it means there. Every row draws from a generator of its own: what a row answers depends on
the seed and its prompt, never on the other rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from veneer.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["Sampling", "generators", "pick", "shape"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Greedy unless `temperature` says otherwise, so that two adapters can be compared without dice in between."""

    max_tokens: int = field(default=256, metadata={"help": "most tokens of one answer"})
    temperature: float = field(default=0.0, metadata={"help": "0 takes the likeliest token; higher is more varied"})
    top_k: int = field(default=0, metadata={"help": "keep the k likeliest tokens (0: all)"})
    top_p: float = field(default=1.0, metadata={"help": "keep the likeliest tokens up to this share"})
    min_p: float = field(default=0.0, metadata={"help": "drop tokens below this share of the likeliest"})
    repetition_penalty: float = field(default=1.0, metadata={"help": "above 1 makes tokens seen before less likely"})
    seed: int = field(default=0, metadata={"help": "start of the random numbers"})
    stop: tuple[str, ...] = field(default=(), metadata={"help": "text that ends an answer; may be repeated"})

    def __post_init__(self) -> None:
        rules = {
            "max_tokens must be at least 1": self.max_tokens >= 1,
            "temperature must be 0 or more": self.temperature >= 0,
            "top_k must be 0 (off) or more": self.top_k >= 0,
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "min_p must be between 0 and 1": 0 <= self.min_p <= 1,
            "repetition_penalty must be above 0": self.repetition_penalty > 0,
            "stop must hold no empty text": all(self.stop),
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ConfigError("; ".join(broken), "sampling", "see the flags' help for the ranges")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def generators(sampling: Sampling, rows: int, device: torch.device) -> list[torch.Generator]:
    """One stream of random numbers per row. All start at the seed: equal prompts get equal answers."""
    import torch

    return [torch.Generator(device).manual_seed(sampling.seed) for _ in range(rows)]


def penalise(logits: Float[Tensor, " vocab"], seen: Sequence[int], penalty: float) -> Float[Tensor, " vocab"]:
    """Divide positive and multiply negative scores of tokens already there (arXiv:1909.05858, section 4.1)."""
    import torch

    at = torch.tensor(sorted(set(seen)), device=logits.device)
    score = logits[at]
    return logits.index_put((at,), torch.where(score > 0, score / penalty, score * penalty))


def keep_top_k(logits: Float[Tensor, " vocab"], k: int) -> Float[Tensor, " vocab"]:
    kth = logits.topk(min(k, logits.numel())).values[-1]
    return logits.masked_fill(logits < kth, -float("inf"))


def keep_top_p(logits: Float[Tensor, " vocab"], p: float) -> Float[Tensor, " vocab"]:
    """The smallest set of likeliest tokens whose probability reaches p; never empty (arXiv:1904.09751)."""
    ordered, at = logits.sort()
    below = ordered.softmax(-1).cumsum(-1) <= 1 - p  # the unlikely tail
    below[-1] = False
    return logits.index_fill(0, at[below], -float("inf"))


def keep_min_p(logits: Float[Tensor, " vocab"], p: float) -> Float[Tensor, " vocab"]:
    probability = logits.softmax(-1)
    return logits.masked_fill(probability < p * probability.max(), -float("inf"))


def shape(logits: Float[Tensor, " vocab"], seen: Sequence[int], sampling: Sampling) -> Float[Tensor, " vocab"]:
    """The scores that the next token is drawn from; `seen` is the prompt and the answer so far."""
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def pick(
    logits: Float[Tensor, "rows vocab"],
    seen: Sequence[Sequence[int]],
    sampling: Sampling,
    random: Sequence[torch.Generator],
) -> Int[Tensor, " rows"]:
    """The next token of every row."""
    import torch

    if sampling.greedy and sampling.repetition_penalty == 1:
        return logits.argmax(-1)
    shaped = [shape(row, before, sampling) for row, before in zip(logits, seen, strict=True)]
    if sampling.greedy:
        return torch.stack(shaped).argmax(-1)
    drawn = [row.softmax(-1).multinomial(1, generator=dice) for row, dice in zip(shaped, random, strict=True)]
    return torch.cat(drawn)
