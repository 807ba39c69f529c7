"""Several short samples in one row, so that little of a row is padding; no sample sees another.

Best fit, longest first: each sample goes where it leaves the least space. For lengths as they occur the rows come out
within a few thousandths of full; the samples of a row stay together for the whole run, the rows are shuffled.

What a packed row needs of a model is that a token looks at its own sample only and counts positions from its start.
Attention can be told so (see batch.py); a recurrent state or a convolution over time cannot, so such models are
refused: `obstacle` before anything is packed, and `isolation.check` by experiment on the model itself.
"""

from __future__ import annotations

import hashlib
import inspect
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from veneer.data.types import Encoded
from veneer.errors import DataError

__all__ = ["obstacle", "pack", "packed_times"]

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def pack(samples: Sequence[Encoded], max_len: int) -> list[Encoded]:
    """Rows of at most `max_len` tokens that hold all samples.

    >>> rows = pack([Encoded([1] * n, [1] * n) for n in (3, 5, 2, 6)], 8)
    >>> [row.segments for row in rows]
    [(6, 2), (5, 3)]
    """
    order = sorted(range(len(samples)), key=lambda place: -len(samples[place]))
    if order and len(samples[order[0]]) > max_len:
        longest = samples[order[0]]
        raise DataError(f"a sample of {len(longest):,} tokens does not fit {max_len:,}", where=longest.where or None)
    if any(sample.layout != "token" or sample.token_type_ids is not None for sample in samples):
        raise DataError("only rows of a causal language model can be packed", fix="switch packing off for this task")
    return [
        _row([samples[place] for place in held]) for held in _best_fit([len(samples[p]) for p in order], order, max_len)
    ]


def _best_fit(lengths: Iterable[int], order: Iterable[int], max_len: int) -> list[list[int]]:
    """Which samples share a row. `spaces` has bit n set while some row has n tokens free: the best fit is its lowest
    set bit at or above the length, found without a search."""
    rows: list[list[int]] = []
    free: dict[int, list[int]] = {}
    spaces = 0
    for length, place in zip(lengths, order, strict=True):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = free[space].pop()
            spaces ^= (not free[space]) << space
        else:
            space, row = max_len, len(rows)
            rows.append([])
        rows[row].append(place)
        left = space - length
        if left:
            free.setdefault(left, []).append(row)
            spaces |= 1 << left
    return rows


def _row(samples: list[Encoded]) -> Encoded:
    if len(samples) == 1:
        return samples[0]
    ids, labels = array("i"), array("i")
    for sample in samples:  # each sample's first label is unset, so nothing predicts across a boundary
        ids.extend(sample.input_ids)
        labels.extend(sample.labels)  # type: ignore[arg-type]
    segments = tuple(length for sample in samples for length in sample.segments)
    where = ", ".join(sample.where for sample in samples[:3])
    id = hashlib.sha256("".join(sample.id for sample in samples).encode()).hexdigest()[:16]
    return Encoded(ids, labels, segments=segments, where=where, id=id)


def packed_times(samples: Sequence[Encoded], rows: Sequence[Encoded]) -> float:
    """How many samples a row holds on average.

    >>> samples = [Encoded([1, 2], [1, 2])] * 6
    >>> packed_times(samples, pack(samples, 6))
    3.0
    """
    return len(samples) / max(len(rows), 1)


def obstacle(model: Any) -> str | None:
    """Why samples of one row could not be kept apart in this model, as far as its class and its config say; or None."""
    config = getattr(model, "config", None)
    kinds = {kind for kind in getattr(config, "layer_types", None) or [] if kind not in ATTENTION}
    if getattr(model, "_is_stateful", False) or kinds:
        found = f" ({', '.join(sorted(kinds))})" if kinds else ""
        return f"it has recurrent layers{found}, whose state runs on from one sample into the next"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, which is not fed rows of several samples"
    if "position_ids" not in inspect.signature(getattr(model, "forward", model)).parameters:
        return "its forward takes no position_ids, so positions cannot start again with each sample"
    return None
