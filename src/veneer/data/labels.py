"""What the labels of a set of rows are: one class, several at once, or a number; and which classes there are.

The training rows decide; every other set (validation, a later evaluation) is encoded with the same `LabelSet`, so that
class 3 is the same class everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from veneer.core.registry import near
from veneer.data.types import Boxed, Label, Labelled, Pictured, Tagged
from veneer.errors import DataError

__all__ = ["LabelSet", "labels_of"]


@dataclass(frozen=True)
class LabelSet:
    """`kind` "one": a class per row or word; "several": any number of classes per row; "number": regression."""

    kind: Literal["one", "several", "number"]
    names: tuple[str, ...] = ()

    def encode(self, label: Label, where: str = "") -> int | float | list[float]:
        """The value a loss takes: a class index, a number, or a 0/1 vector."""
        if self.kind == "number":
            return self._number(label, where)
        if self.kind == "several":
            held = {self.index(item, where) for item in (label if isinstance(label, list) else [label])}
            return [float(index in held) for index in range(len(self.names))]
        if isinstance(label, list):
            raise DataError(f"a list of labels, {label!r}, where one is expected", where=where or None)
        return self.index(label, where)

    def index(self, label: str | int | float, where: str = "") -> int:
        try:
            return self.names.index(_name(label))
        except ValueError:
            known = ", ".join(self.names[:20])
            raise DataError(
                f"the label {label!r} is not among the training labels.{near(_name(label), self.names)}",
                where=where or None,
                fix=f"use one of {known}, or train with rows of that label",
            ) from None

    def _number(self, label: Label, where: str) -> float:
        try:
            return float(label)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise DataError(f"the label {label!r} is not a number", where=where or None) from None

    def __str__(self) -> str:
        if self.kind == "number":
            return "a number to predict"
        shown = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
        return f"{len(self.names)} classes{' (several may hold)' if self.kind == 'several' else ''}: {shown}"


def labels_of(examples: Iterable[Boxed | Labelled | Pictured | Tagged]) -> LabelSet:
    """
    >>> str(labels_of([Labelled("a", "pos"), Labelled("b", "neg")]))
    '2 classes: neg, pos'
    >>> labels_of([Labelled("a", 0.5), Labelled("b", "2")]).kind
    'number'
    """
    labels: list[Label] = []
    several = boxed = False
    for example in examples:
        if isinstance(example, Tagged):
            labels += example.tags
        elif isinstance(example, Boxed):
            boxed = True
            labels += example.labels
        elif isinstance(example.label, list):
            several = True
            labels += example.label
        else:
            labels.append(example.label)
    if not several and not boxed and _are_measurements(labels):
        return LabelSet("number")
    names = _in_order({_name(label) for label in labels})  # type: ignore[arg-type]
    if boxed and not names:
        raise DataError("no picture has a box, so there is nothing to find", fix="check the column of the boxes")
    if len(names) < 2 and not several and not boxed:
        raise DataError(
            f"every row has the same label, {', '.join(names)!r}, so there is nothing to tell apart",
            fix="add rows of another class, or check the label column",
        )
    return LabelSet("several" if several else "one", names)


def _name(label: str | int | float) -> str:
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _are_measurements(labels: Sequence[Label]) -> bool:
    """Numbers of which at least one is no integer. Integers alone are classes: 0/1 is far commoner than a count."""
    try:
        return any(not float(label).is_integer() for label in labels)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False


def _in_order(names: set[str]) -> tuple[str, ...]:
    """Integers by value, without gaps from 0 on if they are class numbers; words from A to Z, "O" (nothing) first."""
    if all(name.lstrip("-").isdigit() for name in names):
        numbers = sorted(map(int, names))
        dense = numbers[0] >= 0 and numbers[-1] < 2 * len(numbers)
        return tuple(map(str, range(numbers[-1] + 1) if dense else numbers))
    return tuple(sorted(names, key=lambda name: (name != "O", name)))
