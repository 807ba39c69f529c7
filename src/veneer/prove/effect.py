"""P4: the adapter says something else than the base, and the base is still there.

The base is answered twice: with the adapters switched off, and with every layer put back into its own class, where no
line of the adapters' code runs. The two must agree in every bit, and with what the base said before the training.
"""

from __future__ import annotations

from collections.abc import Sequence

from veneer.core.model import disabled
from veneer.prove.answers import Answer, Subject, divergence, gap, same_bits
from veneer.prove.proof import Check

__all__ = ["differs_and_returns"]

TITLE = "Effect"
LEAST = {"KL": 1e-9, "relative change": 1e-6}  # nats; well above rounding, well below one careful step of training


def differs_and_returns(subject: Subject, remembered: Sequence[Answer] = ()) -> Check:
    """`remembered`: the base's answers to the same inputs before the training."""
    with disabled(subject.model):
        off = subject.now()
    kind, apart = divergence(subject.adapted, subject.base)
    back = same_bits(off, subject.base) and (not remembered or same_bits(subject.base, remembered))
    drift = max(gap(off, subject.base), gap(subject.base, remembered) if remembered else 0.0)
    said = f"With the adapter the answers differ from the base's ({kind} {apart:.3g})"
    said += "; switched off, the base is back bit for bit." if back else f"; but the base is not back: {drift:.3g} off."
    if not apart > LEAST[kind]:
        said = f"The adapter changes nothing: {kind} {apart:.3g} against the base, at least {LEAST[kind]:g} is needed. "
        said += "It is not applied, or it has not learned."
    return Check(
        "P4", TITLE, back and apart > LEAST[kind], said,
        {"measure": kind, "apart": apart, "base_gap": drift, "largest_change": gap(subject.adapted, subject.base)},
        f"differs from base ({kind} {apart:.2g})",
    )  # fmt: skip
