"""Numbers that say how good predictions are. Plain functions on plain lists, so that they can be read and trusted.

accuracy, macro F1        classes
entity F1                 spans of tags, as in CoNLL: right only when type and both ends are
exact match, ROUGE-L      generated text
mean squared error, Spearman   numbers
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

__all__ = [
    "Span",
    "accuracy",
    "entity_f1",
    "exact_match",
    "macro_f1",
    "mean_squared_error",
    "rouge_l",
    "spans",
    "spearman",
]


class Span(NamedTuple):
    kind: str
    first: int
    end: int  # one past the last word


def accuracy(predicted: Sequence[Hashable], wanted: Sequence[Hashable]) -> float:
    return sum(p == w for p, w in zip(predicted, wanted, strict=True)) / max(len(wanted), 1)


def f1(right: int, predicted: int, wanted: int) -> float:
    """Harmonic mean of precision and recall: 0 where nothing was right."""
    return 2 * right / (predicted + wanted) if predicted + wanted else 0.0


def macro_f1(predicted: Sequence[Hashable], wanted: Sequence[Hashable]) -> float:
    """The mean of the F1 of all classes that are wanted or predicted: rare ones weigh as much as common ones.

    >>> round(macro_f1([0, 0, 1, 1], [0, 0, 0, 1]), 4)
    0.7333
    """
    classes = set(predicted) | set(wanted)
    pairs = list(zip(predicted, wanted, strict=True))
    return sum(
        f1(sum(p == w == c for p, w in pairs), sum(p == c for p, _ in pairs), sum(w == c for _, w in pairs))
        for c in classes
    ) / max(len(classes), 1)


def spans(tags: Sequence[str]) -> set[Span]:
    """The entities in BIO (or BILOU, IOBES) tags, read as conlleval does: an I- that continues nothing begins one.

    Tags without a prefix are taken as I-: neighbours of one kind are one entity.

    >>> sorted(spans(["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "I-ORG"]))[-1]
    Span(kind='PER', first=0, end=2)
    """
    found: set[Span] = set()
    kind, first, closed = "", 0, True
    for i, tag in enumerate([*tags, "O"]):
        prefix, inner = _parts(tag)
        goes_on = bool(inner) and inner == kind and prefix in "IEL" and not closed
        if not goes_on:
            if kind:
                found.add(Span(kind, first, i))
            kind, first = inner, i
        closed = prefix in "ELSU"
    return found


def _parts(tag: str) -> tuple[str, str]:
    """Prefix and kind of a tag; both are empty-like for O."""
    if tag == "O":
        return "O", ""
    prefix, dash, kind = tag.partition("-")
    return (prefix, kind) if dash and prefix in "BIELSU" else ("I", tag)


def entity_f1(predicted: Iterable[Sequence[str]], wanted: Iterable[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 over all entities of all sequences."""
    right = of_predicted = of_wanted = 0
    for p, w in zip(predicted, wanted, strict=True):
        guessed, true = spans(p), spans(w)
        right, of_predicted, of_wanted = right + len(guessed & true), of_predicted + len(guessed), of_wanted + len(true)
    return {
        "entity_precision": right / max(of_predicted, 1),
        "entity_recall": right / max(of_wanted, 1),
        "entity_f1": f1(right, of_predicted, of_wanted),
    }


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def exact_match(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """The share of answers that are the wanted text, white space at the ends aside."""
    return accuracy([p.strip() for p in predicted], [w.strip() for w in wanted])


def rouge_l(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """The mean F1 of the longest common subsequence of words (lower case, no stemming).

    >>> rouge_l(["the cat sat"], ["the cat lay"])
    0.6666666666666666
    """
    scores = [
        f1(_longest(p, w), len(p), len(w)) for p, w in zip(map(_words, predicted), map(_words, wanted), strict=True)
    ]
    return sum(scores) / max(len(scores), 1)


def _longest(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        above_left = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = above_left + 1 if word == other else max(above, row[j - 1])
            above_left = above
    return row[-1]


def mean_squared_error(predicted: Sequence[float], wanted: Sequence[float]) -> float:
    return sum((p - w) ** 2 for p, w in zip(predicted, wanted, strict=True)) / max(len(wanted), 1)


def spearman(predicted: Sequence[float], wanted: Sequence[float]) -> float:
    """Correlation of the ranks, ties at their mean rank; 0 where one side is constant.

    >>> spearman([1.0, 2.0, 3.0], [10.0, 20.0, 15.0])
    0.5
    """
    a, b = _ranks(predicted), _ranks(wanted)
    mean = (len(a) - 1) / 2
    together = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    apart = (sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)) ** 0.5
    return together / apart if apart else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            ranks[i] = (start + end - 1) / 2
        start = end
    return ranks
