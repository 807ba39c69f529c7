"""Rows with labels to token ids: classes of texts, tags of words, and pairs of texts for an encoder and a decoder.

| example | input_ids | labels |
| --- | --- | --- |
| Labelled | the text (or pair) with the tokenizer's special tokens | one class, a number, or 0/1 per class |
| Tagged | the words' pieces with special tokens | a word's tag at its first piece, IGNORE elsewhere |
| Pair, Completion | the source with special tokens | the target's tokens with EOS |

Here the tokenizer adds its special tokens itself: no template has written any. What is too long is dropped, cut
(special tokens are kept) or refused; splitting would tear a label from half of what it speaks of.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from veneer.data.encode import Encodings, finished
from veneer.data.labels import LabelSet
from veneer.data.lengths import Lengths
from veneer.data.types import IGNORE, Completion, Encoded, Labelled, Pair, Tagged, Tokenizer
from veneer.errors import ConfigError, DataError

__all__ = ["encode_labelled", "encode_pairs", "encode_tagged"]

CHUNK = 512
E = TypeVar("E")
Report: TypeAlias = Callable[[int, int], None]
Made: TypeAlias = Encoded | str  # a sample, or the problem of its row
Encode: TypeAlias = Callable[[Sequence[Any], Mapping[str, Any]], Sequence[Made]]  # rows, options of the tokenizer


def encode_labelled(
    examples: Sequence[Labelled],
    tokenizer: Tokenizer,
    labels: LabelSet,
    *,
    max_len: int | None = None,
    overlong: str = "drop",
    skip_bad: bool = False,
    report: Report | None = None,
) -> Encodings:
    """For sequence classification. `labels` are the training rows' (`Dataset.labels`), for every set of rows alike."""

    def encode(rows: Sequence[Labelled], options: Mapping[str, Any]) -> Sequence[Made]:
        second = [row.pair or "" for row in rows] if any(row.pair for row in rows) else None
        tokens = tokenizer([row.text for row in rows], text_pair=second, **options)
        types = tokens["token_type_ids"] if second and "token_type_ids" in tokens else [None] * len(rows)
        return [_row(row, ids, kinds, labels) for row, ids, kinds in zip(rows, tokens["input_ids"], types, strict=True)]

    return _encoded(examples, encode, _limit(tokenizer, max_len), overlong, skip_bad, report)


def encode_tagged(
    examples: Sequence[Tagged],
    tokenizer: Tokenizer,
    labels: LabelSet,
    *,
    max_len: int | None = None,
    overlong: str = "drop",
    skip_bad: bool = False,
    report: Report | None = None,
) -> Encodings:
    """For token classification."""

    def encode(rows: Sequence[Tagged], options: Mapping[str, Any]) -> Sequence[Made]:
        tokens = tokenizer([list(row.tokens) for row in rows], is_split_into_words=True, **options)
        words = [tokens.word_ids(place) for place in range(len(rows))]
        made = zip(rows, tokens["input_ids"], words, strict=True)
        return [_sentence(row, ids, places, labels) for row, ids, places in made]

    return _encoded(examples, encode, _limit(tokenizer, max_len), overlong, skip_bad, report)


def encode_pairs(
    examples: Sequence[Pair | Completion],
    tokenizer: Tokenizer,
    *,
    max_len: int | None = None,
    overlong: str = "drop",
    skip_bad: bool = False,
    report: Report | None = None,
) -> Encodings:
    """For encoder-decoders; `max_len` bounds source and target alike."""
    eos = getattr(tokenizer, "eos_token_id", None)

    def encode(rows: Sequence[Pair | Completion], options: Mapping[str, Any]) -> Sequence[Made]:
        texts = [(row.source, row.target) if isinstance(row, Pair) else (row.prompt, row.completion) for row in rows]
        sources = tokenizer([source for source, _ in texts], **options)["input_ids"]
        targets = tokenizer(text_target=[target for _, target in texts], **options)["input_ids"]
        ended = [target if eos is None or target[-1:] == [eos] else [*target, eos] for target in targets]
        return [
            Encoded(array("i", source), array("i", target), "target", where=row.where, id=row.id)
            for row, source, target in zip(rows, sources, ended, strict=True)
        ]

    return _encoded(examples, encode, _limit(tokenizer, max_len), overlong, skip_bad, report)


def _row(row: Labelled, ids: list[int], kinds: list[int] | None, labels: LabelSet) -> Made:
    try:
        label = labels.encode(row.label)
    except DataError as error:
        return f"{row.where}: {error.what}"
    values = label if isinstance(label, list) else [label]
    return Encoded(array("i", ids), values, "row", where=row.where, id=row.id, token_type_ids=kinds)


def _sentence(row: Tagged, ids: list[int], words: Sequence[int | None], labels: LabelSet) -> Made:
    try:
        tags = [labels.index(tag) for tag in row.tags]
    except DataError as error:
        return f"{row.where}: {error.what}"
    before = [None, *words[:-1]]
    wanted = [IGNORE if word in (None, last) else tags[word] for word, last in zip(words, before, strict=True)]
    if all(tag == IGNORE for tag in wanted):
        return f"{row.where}: none of its {len(tags)} words gave a token, so no tag can be trained"
    return Encoded(array("i", ids), array("i", wanted), where=row.where, id=row.id)


def _limit(tokenizer: Tokenizer, max_len: int | None) -> int | None:
    """`max_len`, or fewer tokens if the model was made for fewer (BERT has 512 positions)."""
    most = getattr(tokenizer, "model_max_length", None)
    known = [limit for limit in (max_len, most) if limit is not None and limit < 10**9]
    return min(known, default=None)


def _size(sample: Encoded) -> int:
    return max(len(sample), len(sample.labels) if sample.layout == "target" else 0)


def _encoded(
    examples: Sequence[E], encode: Encode, max_len: int | None, overlong: str, skip_bad: bool, report: Report | None
) -> Encodings:
    if overlong not in ("drop", "truncate", "error"):
        raise ConfigError(
            f"overlong={overlong} does not work for rows with labels", where="overlong", fix="drop, truncate or error"
        )
    counts: Counter[str] = Counter()
    problems: list[str] = []
    samples: list[Encoded] = []
    sizes = array("i")
    for start in range(0, len(examples), CHUNK):
        rows = examples[start : start + CHUNK]
        for row, made in zip(rows, encode(rows, {"verbose": False}), strict=True):
            if isinstance(made, str):
                problems.append(made)
            else:
                sizes.append(_size(made))
                is_short = max_len is None or _size(made) <= max_len
                samples += [made] if is_short else _overlong(row, made, encode, max_len, overlong, counts, problems)
        if report:
            report(min(start + CHUNK, len(examples)), len(examples))
    return finished(samples, len(examples), Lengths(sizes), counts, problems, max_len, skip_bad)


def _overlong(
    row: object,
    made: Encoded,
    encode: Encode,
    max_len: int | None,
    overlong: str,
    counts: Counter[str],
    problems: list[str],
) -> list[Encoded]:
    """What is left of a row that is too long. The tokenizer does the cutting: it knows which tokens must stay."""
    if overlong == "error":
        problems.append(f"{made.where}: {_size(made):,} tokens, over max_len = {max_len:,}")
        return []
    if overlong == "drop":
        counts["dropped"] += 1
        return []
    counts["truncated"] += 1
    cut = encode([row], {"truncation": True, "max_length": max_len, "verbose": False})
    return [sample for sample in cut if isinstance(sample, Encoded)]
