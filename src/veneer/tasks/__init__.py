"""What can be learned, one file each. `get` imports the files and returns the task of a name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from veneer.tasks.base import Task

__all__ = ["get"]


def get(name: str) -> type[Task]:
    from veneer.tasks import causal_lm, seq2seq, sequence_classification, token_classification  # noqa: F401
    from veneer.tasks.base import TASKS

    return TASKS[name]
