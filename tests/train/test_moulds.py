"""Which shape batches are brought to: the largest that costs next to nothing, by what passes were timed at."""

from __future__ import annotations

import random

import pytest

from veneer.data.batch import mould_of
from veneer.data.types import Encoded
from veneer.train.moulds import COST, Timing, fits, micro_batches, timing_of, tokens_of


def samples_of(count: int, seed: int = 0) -> list[Encoded]:
    draw = random.Random(seed)
    return [Encoded([5] * n, [5] * n) for n in (round(draw.lognormvariate(3, 0.7)) + 1 for _ in range(count))]


SAMPLES = samples_of(203)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_batches_are_those_of_an_epoch_and_all_fit_the_largest_shape(rows: int) -> None:
    batches = micro_batches(SAMPLES, 8, rows, seed=4)
    assert sum(map(len, batches)) == len(SAMPLES) and max(map(len, batches)) == rows
    sizes = [tokens_of(batch) for batch in batches]
    largest = fits(sizes)[0]
    assert largest.share == 1 and largest.tokens == max(sizes)
    assert largest.filling == pytest.approx(1 - sum(sizes) / (max(sizes) * len(sizes)))
    for fit in fits(sizes):
        mould = mould_of(SAMPLES, rows, fit.tokens)
        taken = [b for b in batches if mould.filling([len(sample) for sample in b]) is not None]
        assert len(taken) / len(batches) == fit.share  # a last batch of fewer rows among them


SPENT = {
    "Python is waited for": (lambda n: 0.2, True),
    "nearly": (lambda n: 0.2 + n / 1e6, True),
    "the card is busy": (lambda n: n / 1000, False),
    "busy but on short batches": (lambda n: max(0.01, n / 1e3), False),
}


@pytest.mark.parametrize("seconds, is_free", SPENT.values(), ids=SPENT)
def test_fillers_cost_nothing_where_python_is_waited_for(seconds: object, is_free: bool) -> None:
    batches = micro_batches(SAMPLES, 8, 8, seed=0)
    timing = timing_of(batches, lambda batch: seconds(tokens_of(batch)))  # type: ignore[operator]
    found = fits([tokens_of(batch) for batch in batches], timing)
    assert (found[0].cost <= COST) == is_free and found[0].filling > 0.2
    assert [fit.tokens for fit in found] == sorted({fit.tokens for fit in found}, reverse=True)


def test_the_quicker_of_two_passes_counts_and_the_first_counts_for_nothing() -> None:
    batches, asked = micro_batches(SAMPLES, 8, 8, seed=0), list[int]()

    def seconds(batch: list[Encoded]) -> float:
        asked.append(tokens_of(batch))
        return {1: 60.0, 2: 60.0, 3: 0.3, 4: 0.5, 5: 0.2, 6: 0.6}[len(asked)]

    timing = timing_of(batches, seconds)
    assert asked[:2] == asked[2:4] == asked[4:] and asked[1] == max(map(tokens_of, batches))
    assert (timing.seconds, timing.most_seconds) == (0.2, 0.5)


def test_a_time_that_falls_with_length_is_noise() -> None:
    timing = Timing(100, 0.3, 200, 0.2)
    assert timing.at(50) == timing.at(100) == timing.at(400) == 0.3
    assert [fit.cost for fit in fits([50, 100, 150, 200], timing)] == [0, 0]
