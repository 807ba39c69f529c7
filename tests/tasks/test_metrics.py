"""The metrics, against values worked out by hand and, where a well-known package has them, in its words."""

from __future__ import annotations

import pytest

from veneer.tasks.metrics import (
    Span,
    accuracy,
    entity_f1,
    exact_match,
    macro_f1,
    mean_squared_error,
    rouge_l,
    spans,
    spearman,
)


def test_accuracy_and_macro_f1() -> None:
    assert accuracy([1, 0, 1], [1, 1, 1]) == pytest.approx(2 / 3)
    # class 0: precision 1/2, recall 1 -> 2/3; class 1: precision 1, recall 1/2 -> 2/3; class 2: never right -> 0
    assert macro_f1([0, 0, 1, 2], [0, 1, 1, 0]) == pytest.approx((0.5 + 2 / 3 + 0) / 3)
    assert accuracy([], []) == macro_f1([], []) == 0.0


@pytest.mark.parametrize(
    "tags,found",
    [
        ("O O", []),
        ("B-A I-A O", [Span("A", 0, 2)]),
        ("B-A B-A", [Span("A", 0, 1), Span("A", 1, 2)]),
        ("I-A I-A", [Span("A", 0, 2)]),  # conlleval: an I- that continues nothing begins an entity
        ("B-A I-B", [Span("A", 0, 1), Span("B", 1, 2)]),
        ("B-A L-A U-A", [Span("A", 0, 2), Span("A", 2, 3)]),
        ("B-A E-A I-A", [Span("A", 0, 2), Span("A", 2, 3)]),
        ("S-A S-A", [Span("A", 0, 1), Span("A", 1, 2)]),
        ("noun noun verb", [Span("noun", 0, 2), Span("verb", 2, 3)]),
        ("B-A-1 I-A-1", [Span("A-1", 0, 2)]),
    ],
)
def test_spans(tags: str, found: list[Span]) -> None:
    assert spans(tags.split()) == set(found)


def test_an_entity_is_right_only_as_a_whole() -> None:
    wanted = [["B-PER", "I-PER", "O"], ["B-LOC", "O", "B-ORG"]]
    predicted = [["B-PER", "O", "O"], ["B-LOC", "O", "B-LOC"]]
    assert list(entity_f1(predicted, wanted).values()) == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert entity_f1(wanted, wanted)["entity_f1"] == 1.0
    assert entity_f1([["O"]], [["O"]])["entity_f1"] == 0.0


def test_generated_text() -> None:
    assert exact_match(["a b ", "c"], ["a b", "d"]) == 0.5
    assert rouge_l(["police killed the gunman"], ["police kill the gunman"]) == pytest.approx(0.75)
    assert rouge_l(["the gunman kill police"], ["police kill the gunman"]) == pytest.approx(0.5)
    assert rouge_l(["", "x"], ["x", ""]) == 0.0


def test_numbers() -> None:
    assert mean_squared_error([1.0, 2.0], [1.0, 4.0]) == 2.0
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert spearman([1.0, 1.0, 2.0], [5.0, 5.0, 9.0]) == pytest.approx(1)
    assert spearman([1.0, 1.0], [1.0, 2.0]) == 0.0
