"""A sampling setting means here what it means in transformers, and a row's dice are its own."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import logits_process as theirs

from veneer.errors import ConfigError
from veneer.infer.sampling import Sampling, generators, pick, shape

LOGITS = torch.randn(5, 97, generator=torch.Generator().manual_seed(3)) * 3
SEEN = [[1, 5, 5, 90], [0], [2, 3], [96, 1], [7, 8, 9]]


@pytest.mark.parametrize(
    "ours, processor",
    [
        ({"temperature": 0.7}, theirs.TemperatureLogitsWarper(0.7)),
        ({"temperature": 1.0, "top_k": 7}, theirs.TopKLogitsWarper(7)),
        ({"temperature": 1.0, "top_p": 0.8}, theirs.TopPLogitsWarper(0.8)),
        ({"temperature": 1.0, "min_p": 0.05}, theirs.MinPLogitsWarper(0.05)),
        ({"temperature": 1.0, "repetition_penalty": 1.3}, theirs.RepetitionPenaltyLogitsProcessor(1.3)),
    ],
)
def test_each_setting_is_that_of_transformers(ours: dict, processor: object) -> None:
    for logits, seen in zip(LOGITS, SEEN, strict=True):
        expected = processor(torch.tensor([seen]), logits[None].clone())[0]  # type: ignore[operator]
        assert torch.allclose(shape(logits, seen, Sampling(**ours)), expected, atol=1e-6)


def test_greedy_takes_the_likeliest_and_obeys_the_penalty() -> None:
    rows = [list(range(97)) for _ in SEEN]
    dice = generators(Sampling(), 5, LOGITS.device)
    assert pick(LOGITS, SEEN, Sampling(), dice).tolist() == LOGITS.argmax(-1).tolist()
    best = LOGITS.argmax(-1).tolist()
    firm = pick(LOGITS, [[b] for b in best], Sampling(repetition_penalty=100.0), dice).tolist()
    assert all(a != b for a, b in zip(firm, best, strict=True))
    assert len(pick(LOGITS, rows, Sampling(repetition_penalty=1.1), dice)) == 5


def test_a_row_draws_the_same_whoever_stands_beside_it() -> None:
    sampling = Sampling(temperature=1.5, seed=11)
    together = [pick(LOGITS, SEEN, sampling, generators(sampling, 5, LOGITS.device)).tolist()[i] for i in range(5)]
    alone = [
        int(pick(LOGITS[i : i + 1], SEEN[i : i + 1], sampling, generators(sampling, 1, LOGITS.device)))
        for i in range(5)
    ]
    assert together == alone


def test_draws_follow_the_probabilities() -> None:
    sampling = Sampling(temperature=1.0)
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    dice = generators(sampling, 1, logits.device)
    draws = torch.cat([pick(logits, [[]], sampling, dice) for _ in range(4000)])
    assert torch.allclose(draws.bincount(minlength=3) / 4000, logits[0].softmax(-1), atol=0.03)


def test_wrong_settings_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"temperature .*; top_p .*"):
        Sampling(temperature=-1, top_p=0)
    with pytest.raises(ConfigError, match="stop must hold no empty text"):
        Sampling(stop=("",))
