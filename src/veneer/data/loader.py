"""Which samples each step trains on: decided by the seed, the epoch and nothing else, and resumable at any step.

    for step in Loader(samples, global_batch, seed=0):            # one epoch, or what is left of it
        for batch in batches(step.samples, rows, pad_id): ...     # micro-batches of whatever size fits
        # divide the summed loss by step.trained_tokens, which counts the whole global batch

A global batch is drawn first and cut afterwards, so running out of memory and halving the micro-batch changes nothing
that is learned, and every rank knows the divisor without asking the others. Samples of like length share a global
batch (drawn from a shuffled pool some batches deep, so that batches differ from epoch to epoch), and the samples of a
step are ordered by length, so that little of a micro-batch is padding.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from veneer.data.batch import Batch, batches, collate
from veneer.data.types import IGNORE, Encoded
from veneer.errors import StateError

__all__ = ["Loader", "Step", "batches"]

POOL = 16  # global batches whose samples are sorted together


@dataclass(frozen=True)
class Step:
    """One optimizer step's samples: this rank's share, longest first; the counts are those of all ranks together."""

    epoch: int
    number: int  # within the epoch, from 0
    samples: tuple[Encoded, ...]
    trained_tokens: int
    tokens: int


class Loader:
    """Iterating gives the rest of the current epoch and moves on to the next. `state_dict()` is where it stands: the
    steps already given out count as done, so take it after a step is complete."""

    def __init__(
        self,
        samples: Sequence[Encoded],
        global_batch: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        group: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if global_batch < 1 or not samples:
            raise StateError(f"nothing to load: {len(samples)} samples in batches of {global_batch}")
        self.samples, self.global_batch, self.seed = samples, global_batch, seed
        self.shuffle, self.group, self.rank, self.world = shuffle, group, rank, world
        self.epoch = self.cursor = 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.samples) // self.global_batch)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Step]:
        order = self._order(self.epoch)
        while self.cursor < len(order):
            places = order[self.cursor]
            self.cursor += 1
            yield self._step(self.epoch, self.cursor - 1, places)
        self.epoch, self.cursor = self.epoch + 1, 0

    def steps(self, number: int) -> Iterator[Step]:
        """The next `number` steps, across epochs."""
        while number > 0:
            for step in self:
                yield step
                number -= 1
                if not number:
                    break

    # Order

    def _order(self, epoch: int) -> list[list[int]]:
        """The places of the samples of each global batch."""
        random_ = random.Random(f"{self.seed}:{epoch}")
        places = list(range(len(self.samples)))
        if self.shuffle:
            random_.shuffle(places)
        if self.group:
            places = self._grouped(places)
        order = [places[start : start + self.global_batch] for start in range(0, len(places), self.global_batch)]
        if self.shuffle:
            whole = [batch for batch in order if len(batch) == self.global_batch]
            random_.shuffle(whole)
            order = whole + order[len(whole) :]  # a last batch that is not full stays last
        return order

    def _grouped(self, places: list[int]) -> list[int]:
        """Sorted by length within pools. At least four pools if there are shuffled batches enough: with a single one,
        every epoch would consist of the same batches."""
        pool = self.global_batch * (max(1, min(POOL, len(self) // 4)) if self.shuffle else len(self))
        full = len(places) - len(places) % self.global_batch if self.shuffle else len(places)
        pools = [places[start : min(start + pool, full)] for start in range(0, full, pool)]
        by_length = [sorted(held, key=lambda place: _size(self.samples[place])) for held in pools]
        return [place for held in by_length for place in held] + places[full:]

    def _step(self, epoch: int, number: int, places: list[int]) -> Step:
        samples = sorted((self.samples[place] for place in places), key=_size)
        trained = sum(sample.trained_tokens for sample in samples)
        mine = tuple(samples[self.rank :: self.world]) or (_untrained(samples[-1]),)
        return Step(epoch, number, mine, trained, sum(map(len, samples)))

    # Memory

    def longest_batch(self, rows: int, pad_id: int = 0, *, flat: bool = False) -> Batch:
        """The micro-batch of `rows` that needs the most memory: of the longest samples. None is larger."""
        return collate(sorted(self.samples, key=len, reverse=True)[:rows], pad_id, flat=flat)

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "cursor": self.cursor, "identity": self.identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` stood. Raises if the same steps would not follow, and says what differs."""
        mine, theirs = self.identity(), state["identity"]
        changed = [f"{key}: was {theirs.get(key)}, is {mine[key]}" for key in mine if mine[key] != theirs.get(key)]
        if changed:
            raise StateError(
                "the data does not go on as it was when this state was saved",
                where="resume",
                fix="resume with the same data and settings, or begin a new run",
                problems=changed,
            )
        self.epoch, self.cursor = int(state["epoch"]), int(state["cursor"])

    def identity(self) -> dict[str, Any]:
        """What decides the order of samples: the same identity gives the same steps."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(f"{sample.id}:{len(sample)}:{sample.trained_tokens};".encode())
        chosen = {"seed": self.seed, "global_batch": self.global_batch, "shuffle": self.shuffle, "group": self.group}
        return {**chosen, "samples": len(self.samples), "content": digest.hexdigest()[:16]}


def _size(sample: Encoded) -> tuple[int, tuple[int, ...]]:
    """The longest first; pictures of one shape side by side."""
    return -len(sample), sample.shape


def _untrained(sample: Encoded) -> Encoded:
    """For a rank that a last, small batch leaves without a sample: it must run along, and add nothing."""
    return replace(sample, labels=[IGNORE] * len(sample.labels))
