"""Rows of different lengths become tensors. Labels were made before padding, so pad == eos never hides a real EOS.

| rows | what the model is given |
| --- | --- |
| one sample each | input_ids, attention_mask (padding on the right) |
| packed | input_ids, position_ids that start again with each sample; no mask, no cache |
| flat, for attention by samples | one row of all samples without padding, position_ids, where each sample begins |
| the same, in a mould | as many tokens and bounds in every batch: samples of nothing, that no loss counts, fill it up |
| pictures | pixel_values; with boxes the labels are (rows, boxes, 5), filled up with rows of IGNORE |

From positions that start again transformers builds the block-diagonal causal mask itself, in the form that each layer
and each attention kernel needs (sliding windows, flex and varlen kernels included; a 4-D mask of our own would replace
the window of a sliding layer). It does so only without an attention mask and without a cache, hence `use_cache=False`:
a model whose config says otherwise would let samples see each other in silence. `isolation.py` proves it on the model.
Where the model's attention takes bounds (kernels/varlen.py) no mask is built at all: `by_samples`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veneer.data.types import IGNORE, Encoded
from veneer.errors import DataError, StateError
from veneer.kernels.varlen import MARK

__all__ = ["Batch", "Mould", "batches", "collate", "mould_of", "pad_id_of"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `inputs` are keyword arguments of the model's forward; labels are kept apart, unshifted.

    Divide the summed loss by the trained tokens of the whole accumulated batch (`Step.trained_tokens`), never by this
    micro-batch's own. `segments` are, row by row, the lengths of the samples in it.
    """

    inputs: dict[str, Any]
    labels: Tensor  # (rows, tokens), (rows, target tokens), (rows,), (rows, classes) or (rows, boxes, 5)
    trained_tokens: int
    segments: tuple[tuple[int, ...], ...]
    where: tuple[str, ...] = ()

    @property
    def is_packed(self) -> bool:
        return "position_ids" in self.inputs

    @property
    def rows(self) -> int:
        """Samples: packed ones count each."""
        return sum(map(len, self.segments))

    @property
    def tokens(self) -> int:
        """Real ones, without padding."""
        return sum(map(sum, self.segments))

    @property
    def padding_share(self) -> float:
        return 1 - self.tokens / self.inputs["input_ids"].numel() if "input_ids" in self.inputs else 0.0

    def sequence_ids(self) -> Int[Tensor, "rows tokens"]:
        """Which sample of its row each token belongs to; -1 for padding."""
        ids = torch.full(self.inputs["input_ids"].shape, -1)
        for row, lengths in enumerate(self.segments):
            numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            ids[row, : len(numbers)] = numbers
        return ids.to(self.labels.device)

    def block_mask(self) -> Bool[Tensor, "rows 1 tokens tokens"]:
        """True where a token may look: at earlier tokens of its own sample, and itself. The specification that any
        attention must meet, and the mask for models that take one. Padding looks at itself, so no row is empty."""
        ids = self.sequence_ids()
        same = ids[:, :, None] == ids[:, None, :]
        return (same & torch.ones_like(same).tril())[:, None]

    def varlen(self) -> dict[str, Any]:
        """Boundaries for varlen attention kernels, by the names transformers gives them. For one row, not padded."""
        (lengths,) = self.segments
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.labels.device)
        longest = max(lengths)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}

    def to(self, device: torch.device | str) -> Batch:
        moved = {key: _moved(value, device) for key, value in self.inputs.items()}
        return replace(self, inputs=moved, labels=_moved(self.labels, device))


class Mould(NamedTuple):
    """One shape for all batches by samples, so that a GPU can replay what it did for another."""

    tokens: int
    samples: int
    longest: int  # of them, in tokens

    def filling(self, lengths: Sequence[int]) -> list[int] | None:
        """The lengths of the samples that fill up a batch of these; None where it does not fit the mould."""
        missing = self.tokens - sum(lengths)
        if missing < 0:
            return None
        whole, rest = divmod(missing, self.longest)
        found = [self.longest] * whole + [rest] * (rest > 0)
        left = self.samples - len(lengths) - len(found)
        return None if left < 0 or max(lengths) > self.longest else found + [0] * left


def mould_of(samples: Sequence[Encoded], rows: int, most: int | None = None) -> Mould:
    """The smallest that takes any `rows` of these samples or fewer; of `most` tokens, what they leave out apart."""
    sizes, counts = sorted(map(len, samples)), sorted(len(sample.segments) for sample in samples)
    whole = sum(sizes[-rows:])
    tokens = whole if most is None else min(most, whole)
    longest = min(tokens, max(max(sample.segments) for sample in samples))
    return Mould(tokens, sum(counts[-rows:]) + -(-tokens // longest), longest)


def _moved(value: Any, device: torch.device | str) -> Any:
    if not isinstance(value, Tensor) or value.device == torch.device(device):
        return value
    pinned = value.pin_memory() if torch.device(device).type == "cuda" and value.device.type == "cpu" else value
    return pinned.to(device, non_blocking=True)


def collate(
    samples: Sequence[Encoded], pad_id: int = 0, *, flat: bool = False, by_samples: bool = False,
    mould: Mould | None = None,
) -> Batch:  # fmt: skip
    """One batch of these samples. `flat`: all of them in one row, without padding, kept apart as packed samples are.
    `by_samples`: the same for a model whose attention takes the bounds, which stand in for a mask; in the `mould`'s
    shape, where they fit it."""
    if not samples:
        raise StateError("a batch of no samples", fix="give collate at least one")
    if samples[0].pixels is not None:
        return _pictures(samples)
    if by_samples:
        row = collate(samples, pad_id, flat=True)
        bounded = replace(row, inputs={**row.inputs, **row.varlen(), "attention_mask": torch.ones(MARK).bool()})
        filling = None if mould is None else mould.filling(row.segments[0])
        return bounded if mould is None or filling is None else _filled(bounded, filling, mould, pad_id)
    rows = [_joined(samples)] if flat else list(samples)
    width = max(map(len, rows))
    inputs: dict[str, Any] = {"input_ids": _padded([row.input_ids for row in rows], pad_id, width)}
    if flat or any(len(row.segments) > 1 for row in rows):
        inputs |= {"position_ids": _padded([[*row.position_ids] for row in rows], None, width), "use_cache": False}
    else:
        inputs["attention_mask"] = _padded([[1] * len(row) for row in rows], 0, width)
    if any(row.token_type_ids is not None for row in rows):
        inputs["token_type_ids"] = _padded([row.token_type_ids or [0] * len(row) for row in rows], 0, width)
    if any(row.extras is not None for row in rows):
        inputs |= _beside(rows, width)
    trained = sum(sample.trained_tokens for sample in samples)
    places = tuple(sample.where for sample in samples)
    return Batch(inputs, _labels(rows, width), trained, tuple(row.segments for row in rows), places)


def _filled(row: Batch, filling: Sequence[int], mould: Mould, pad_id: int) -> Batch:
    """With samples that count for nothing behind the others. `segments` stay those of the real ones."""
    ids, positions = row.inputs["input_ids"], row.inputs["position_ids"]
    missing = ids.new_full((1, mould.tokens - ids.shape[1]), pad_id)
    places = torch.tensor([place for length in filling for place in range(length)], dtype=positions.dtype)[None]
    ends = torch.tensor([0, *accumulate([*row.segments[0], *filling])], dtype=torch.int32)
    inputs = {
        **row.inputs,
        "input_ids": torch.cat([ids, missing], 1), "position_ids": torch.cat([positions, places], 1),
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": mould.longest, "max_length_k": mould.longest,
    }  # fmt: skip
    return replace(row, inputs=inputs, labels=torch.cat([row.labels, torch.full_like(missing, IGNORE)], 1))


def _pictures(samples: Sequence[Encoded]) -> Batch:
    values = torch.stack([torch.as_tensor(sample.pixels()) for sample in samples if sample.pixels is not None])
    places = tuple(sample.where for sample in samples)
    trained = sum(sample.trained_tokens for sample in samples)
    return Batch({"pixel_values": values}, _labels(samples, 1), trained, tuple(s.segments for s in samples), places)


def _beside(rows: Sequence[Encoded], width: int) -> dict[str, Any]:
    """Pictures of all rows one after the other, and what has a value for each token padded as tokens are."""
    held = [row.extras() if row.extras is not None else {} for row in rows]
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for each in held for name in each):
        parts = [each.get(name) for each in held]
        if all(part is None or part.shape == (1, len(row)) for part, row in zip(parts, rows, strict=True)):
            found[name] = _padded([[] if part is None else part[0].tolist() for part in parts], 0, width)
            continue
        shapes = {tuple(part.shape[1:]) for part in parts if part is not None}
        if len(shapes) > 1:
            fix = "set batch_size: 1 (global_batch stays), or bring the pictures to one shape"
            raise DataError(f"{name} of the pictures in one batch have unlike shapes: {sorted(shapes)}", fix=fix)
        found[name] = torch.cat([part for part in parts if part is not None])
    return found


def batches(samples: Sequence[Encoded], rows: int, pad_id: int = 0, **how: Any) -> Iterator[Batch]:
    """The samples in micro-batches of `rows`, in their order; the rest goes to `collate`."""
    return (collate(samples[start : start + rows], pad_id, **how) for start in range(0, len(samples), rows))


def pad_id_of(tokenizer: Any) -> int:
    """Any id will do: padding is masked by position and never by its id."""
    known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((int(token) for token in known if token is not None), 0)


def _joined(samples: Sequence[Encoded]) -> Encoded:
    ids = [token for sample in samples for token in sample.input_ids]
    labels = [label for sample in samples for label in sample.labels]
    return Encoded(ids, labels, segments=tuple(length for sample in samples for length in sample.segments))


def _padded(rows: Sequence[Sequence[int]], value: int | None, width: int) -> Int[Tensor, "rows width"]:
    """`value` None: counts up from 0, as positions of one more sample that nobody looks at."""
    filled = torch.full((len(rows), width), value or 0)
    for place, row in enumerate(rows):
        filled[place, : len(row)] = torch.tensor(row)
        if value is None:
            filled[place, len(row) :] = torch.arange(width - len(row))
    return filled


def _labels(rows: Sequence[Encoded], width: int) -> Tensor:
    layout = rows[0].layout
    if layout == "boxes":
        return _boxes(rows)
    if layout == "row":
        values = torch.tensor([[*row.labels] for row in rows])
        return values.squeeze(1) if values.shape[1] == 1 else values
    if layout == "target":
        width = max(len(row.labels) for row in rows)
    return _padded([row.labels for row in rows], IGNORE, width)  # type: ignore[misc]


def _boxes(rows: Sequence[Encoded]) -> Float[Tensor, "rows boxes 5"]:
    filled = torch.full((len(rows), max(len(row.labels) for row in rows), 5), float(IGNORE))
    for place, row in enumerate(rows):
        for number, (label, box) in enumerate(zip(row.labels, row.boxes, strict=True)):
            filled[place, number] = torch.tensor([label, *box])
    return filled
