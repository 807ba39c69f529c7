"""Laws of the loader: each sample once an epoch, the same steps for the same seed, resumable after any of them."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from veneer.data.batch import batches, collate, pad_id_of
from veneer.data.loader import Loader
from veneer.data.types import IGNORE, Encoded
from veneer.errors import StateError

random_ = random.Random(0)
SAMPLES = [
    Encoded([5] * length, [IGNORE] * (length // 2) + [5] * (length - length // 2), where=f"row {n}", id=str(n))
    for n, length in enumerate(random_.randint(2, 80) for _ in range(203))
]


def ids(steps) -> list[list[str]]:
    return [[sample.id for sample in step.samples] for step in steps]


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("global_batch", [1, 4, 8, 203, 500])
def test_each_sample_comes_once_an_epoch(global_batch, shuffle, group):
    loader = Loader(SAMPLES, global_batch, shuffle=shuffle, group=group)
    for epoch in range(2):
        steps = list(loader)
        assert len(steps) == len(loader)
        assert Counter(sample.id for step in steps for sample in step.samples) == Counter(s.id for s in SAMPLES)
        assert [(step.epoch, step.number) for step in steps] == [(epoch, n) for n in range(len(steps))]
        assert all(len(step.samples) == min(global_batch, 203) for step in steps[:-1])


def test_the_seed_decides_and_epochs_differ():
    def course(seed: int) -> list[list[str]]:
        loader = Loader(SAMPLES, 8, seed=seed)
        return ids(loader) + ids(loader)

    assert course(1) == course(1) != course(2)
    first = course(1)
    assert first[:26] != first[26:]
    assert not {tuple(sorted(batch)) for batch in first[:25]} & {tuple(sorted(batch)) for batch in first[26:51]}


@pytest.mark.parametrize("done", [0, 1, 7, 26, 27, 40])
def test_resuming_after_any_step_goes_on_as_if_nothing_had_happened(done):
    whole = ids(Loader(SAMPLES, 8, seed=3).steps(60))
    first = Loader(SAMPLES, 8, seed=3)
    assert ids(first.steps(done)) == whole[:done]
    second = Loader(SAMPLES, 8, seed=3)
    second.load_state_dict(first.state_dict())
    assert ids(second.steps(60 - done)) == whole[done:]


def test_resuming_with_other_data_or_settings_is_refused_with_what_changed():
    state = Loader(SAMPLES, 8, seed=3).state_dict()
    for other, key in [
        (Loader(SAMPLES, 8, seed=4), "seed: was 3, is 4"),
        (Loader(SAMPLES, 16, seed=3), "global_batch: was 8, is 16"),
        (Loader(SAMPLES[:-1], 8, seed=3), "samples: was 203, is 202"),
        (Loader([*SAMPLES[1:], SAMPLES[0]], 8, seed=3), "content: was"),
    ]:
        with pytest.raises(StateError, match=key):
            other.load_state_dict(state)


def test_the_counts_of_a_step_are_those_of_its_samples():
    for step in Loader(SAMPLES, 8):
        assert step.trained_tokens == sum(sample.trained_tokens for sample in step.samples)
        assert step.tokens == sum(map(len, step.samples))
        made = list(batches(step.samples, 3))
        assert sum(batch.trained_tokens for batch in made) == step.trained_tokens
        assert sum(batch.tokens for batch in made) == step.tokens
        assert sum(batch.rows for batch in made) == len(step.samples)


def test_how_a_step_is_cut_changes_nothing_but_the_cuts():
    step = next(iter(Loader(SAMPLES, 8)))
    for rows in (1, 2, 3, 8, 100):
        flat = [row for batch in batches(step.samples, rows) for row in batch.where]
        assert flat == [sample.where for sample in step.samples]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_share_a_step_without_overlap_and_agree_on_its_divisor(world):
    ranks = [list(Loader(SAMPLES, 8, rank=rank, world=world)) for rank in range(world)]
    alone = list(Loader(SAMPLES, 8))
    for number, step in enumerate(alone):
        parts = [steps[number] for steps in ranks]
        assert {part.trained_tokens for part in parts} == {step.trained_tokens}
        assert all(part.samples for part in parts)
        shared = [sample for part in parts for sample in part.samples if sample.trained_tokens]
        assert Counter(sample.id for sample in shared) == Counter(sample.id for sample in step.samples)


def test_grouping_spares_padding():
    def padding(group: bool) -> float:
        made = [batch for step in Loader(SAMPLES, 16, group=group) for batch in batches(step.samples, 4)]
        return 1 - sum(batch.tokens for batch in made) / sum(batch.inputs["input_ids"].numel() for batch in made)

    assert padding(True) < padding(False) / 2


def test_the_longest_batch_is_an_upper_bound():
    loader = Loader(SAMPLES, 8)
    longest = loader.longest_batch(4).inputs["input_ids"].numel()
    made = [batch.inputs["input_ids"].numel() for step in loader for batch in batches(step.samples, 4)]
    assert max(made) <= longest == 4 * max(map(len, SAMPLES))


def test_nothing_to_load_is_said():
    with pytest.raises(StateError, match="nothing to load"):
        Loader([], 8)


# Collation


def test_padding_never_hides_a_real_end_of_text():
    eos = 2
    batch = collate([Encoded([5, 6, eos], [IGNORE, 6, eos]), Encoded([5], [IGNORE])], pad_id=eos)
    assert batch.labels.tolist() == [[IGNORE, 6, eos], [IGNORE, IGNORE, IGNORE]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.inputs["input_ids"].tolist() == [[5, 6, eos], [5, eos, eos]]
    assert batch.trained_tokens == 2 and batch.tokens == 4 and batch.padding_share == pytest.approx(1 / 3)


def test_packed_rows_carry_positions_and_no_mask():
    batch = collate([Encoded([1, 2, 3, 4], [IGNORE, 2, IGNORE, 4], segments=(2, 2)), Encoded([7], [IGNORE])])
    assert batch.is_packed and "attention_mask" not in batch.inputs and batch.inputs["use_cache"] is False
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]
    assert batch.sequence_ids().tolist() == [[0, 0, 1, 1], [0, -1, -1, -1]]
    assert batch.rows == 3


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([[3], [0]], torch.tensor([3, 0])), ([[0.5], [2.0]], torch.tensor([0.5, 2.0])),
     ([[0.0, 1.0], [1.0, 1.0]], torch.tensor([[0.0, 1.0], [1.0, 1.0]]))],
)  # fmt: skip
def test_labels_of_rows_keep_their_kind(labels, expected):
    batch = collate([Encoded([1, 2], label, "row") for label in labels])
    torch.testing.assert_close(batch.labels, expected)
    assert batch.trained_tokens == 2


def test_targets_are_padded_by_themselves():
    batch = collate([Encoded([1, 2, 3], [4], "target"), Encoded([1], [4, 5, 6, 7], "target")])
    assert batch.labels.tolist() == [[4, *[IGNORE] * 3], [4, 5, 6, 7]]
    assert batch.inputs["input_ids"].shape == (2, 3)


def test_a_pad_id_is_always_found():
    class Bare:
        pad_token_id = None
        eos_token_id = 7

    assert pad_id_of(Bare()) == 7 and pad_id_of(object()) == 0


def test_moving_a_batch_moves_its_tensors_only():
    batch = collate([Encoded([1, 2], [IGNORE, 2], segments=(1, 1))]).to("meta")
    assert batch.labels.device.type == "meta" and batch.inputs["input_ids"].device.type == "meta"
    assert batch.inputs["use_cache"] is False
