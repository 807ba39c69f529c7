"""All proofs of one adapter, in order, on the model that carries it.

    proof = veneer.prove(model, batch)                         # any nn.Module with an attached adapter
    proof.passed, print(proof.line()), proof.raise_if_failed()

A training loop has more to show - the model before, the samples, the settings, the folder it saved to - and gives it to
`prove_run`. What is not given is left out and said to be. A check that crashes has failed: its error is its statement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.core.model import activate, active_of, adapters, is_merged
from veneer.data.types import Encoded
from veneer.errors import StateError
from veneer.prove.answers import Inputs, Subject, batches, full_precision
from veneer.prove.base import is_as_filed
from veneer.prove.canary import canary_of
from veneer.prove.consumed import every_key_read
from veneer.prove.effect import differs_and_returns
from veneer.prove.found import as_found
from veneer.prove.frozen import Before, frozen_and_learning
from veneer.prove.masks import every_sample_teaches
from veneer.prove.merging import merges_and_returns
from veneer.prove.mixing import adds_up
from veneer.prove.proof import Check, LeftOut, Outcome, Proof
from veneer.prove.reload import reloads_equal
from veneer.quant.layer import rounds_inputs, unrounded

__all__ = ["prove", "prove_run"]

TITLES = {
    "P0": "Settings",
    "P1": "Loss mask",
    "P2": "Frozen and learning",
    "P3": "Reload",
    "P4": "Effect",
    "P5": "Merge",
    "P6": "Mixing",
    "P7": "Base",
}


def prove(
    model: nn.Module,
    inputs: Inputs | list[Any],
    name: str | None = None,
    *,
    folder: str | Path | None = None,
    before: Before | None = None,
    tokenizer: Any | None = None,
    base: str | Path | None = None,
) -> Proof:
    """Prove adapter `name` (the active one) of any module on `inputs`, and leave the model as it was.

    inputs: what forward takes - a mapping of keyword arguments, a tuple, a tensor - or a list of such; a few rows are
    enough. folder: where the adapter was saved, to prove that very file. before: `snapshot(model)` before training.
    base: the folder or hub id of the files that the base is loaded from, to hold it against them.
    """
    name = name or _only_active(model)
    found = is_as_filed(model, base) if base is not None else None
    return prove_run(model, name, inputs=inputs, folder=folder, before=before, tokenizer=tokenizer, base=found)


@full_precision()
def prove_run(
    model: nn.Module,
    name: str = "default",
    *,
    inputs: Inputs | list[Any] | None = None,
    before: Before | None = None,
    folder: str | Path | None = None,
    samples: Iterable[Encoded] | None = None,
    ends: Collection[int] = (),
    may_be_cut: bool = False,
    given: Mapping[str, str] | None = None,
    read: Collection[str] | None = None,
    tokenizer: Any | None = None,
    base: Outcome | None = None,
) -> Proof:
    """P0 to P7 at the end of a training. The live weights must be those that `folder` is said to hold.

    inputs: those of `before` when None, which must then have some. samples, ends, may_be_cut: see
    `every_sample_teaches`. given, read: see `every_key_read`. base: what `is_as_filed` found when the base was loaded;
    P2 holds it from there on. Without adapters P3 to P6 are left out.
    """
    if is_merged(model):
        raise StateError("a merged model holds no adapter to prove", fix="veneer.unmerge(model) first")
    started = time.perf_counter()
    asked = _asked(inputs, before)
    found: list[Outcome] = [
        _settings(given, read),
        _tried("P1", lambda: every_sample_teaches(samples, ends, may_be_cut=may_be_cut)) if samples is not None
        else LeftOut("P1", TITLES["P1"], "No samples were given."),
    ]  # fmt: skip
    with as_found(model):
        found.append(_tried("P2", lambda: frozen_and_learning(model, name, asked, before)))
    canary: dict[str, Any] = {}
    if name in adapters(model):
        with as_found(model):
            subject = Subject.of(model, name, asked)
            found += _of_adapter(subject, before, folder)
            canary = canary_of(subject, tokenizer)
    else:
        found += [LeftOut(id, TITLES[id], "The model carries no adapter.") for id in ("P3", "P4", "P5", "P6")]
    found.append(base or LeftOut("P7", TITLES["P7"], "It was not said which files the base was loaded from."))
    checks = [each for each in found if isinstance(each, Check)]
    left_out = [each for each in found if isinstance(each, LeftOut)]
    return Proof(checks, left_out, name, canary, time.perf_counter() - started)


def _of_adapter(subject: Subject, before: Before | None, folder: str | Path | None) -> list[Outcome]:
    remembered = before.base if before is not None and before.inputs is subject.inputs else ()
    checks: dict[str, Callable[[], Outcome]] = {
        "P3": lambda: reloads_equal(subject, folder),
        "P4": lambda: differs_and_returns(subject, remembered),
        "P5": lambda: merges_and_returns(subject),
        "P6": lambda: _sums(subject),
    }
    found = []
    for id, check in checks.items():
        activate(subject.model, subject.name)  # each begins with the adapter acting, whatever the one before left
        found.append(_tried(id, check))
    return found


def _sums(subject: Subject) -> Outcome:
    """A sum of adapters is computed in another order than one of them. A base that rounds its inputs to 8 bits turns a
    last place into a percent, so it is asked without rounding then, for both."""
    if not rounds_inputs(subject.model):
        return adds_up(subject)
    with unrounded(subject.model):
        return adds_up(Subject.of(subject.model, subject.name, subject.inputs))


def _tried(id: str, check: Callable[[], Outcome]) -> Outcome:
    """A check that raises has failed; only want of memory is no verdict."""
    try:
        return check()
    except torch.OutOfMemoryError:
        return LeftOut(id, TITLES[id], "There was not enough memory for it.")
    except Exception as error:
        said = f"It could not be shown: {type(error).__name__}: {error}"
        return Check(id, TITLES[id], False, said, {"error": str(error)})


def _settings(given: Mapping[str, str] | None, read: Collection[str] | None) -> Outcome:
    if given is None or read is None:
        return LeftOut("P0", TITLES["P0"], "No settings were given.")
    return every_key_read(given, read)


def _asked(inputs: Inputs | list[Any] | None, before: Before | None) -> Sequence[Inputs]:
    """The given inputs, or those of `before`, for which it knows what the base said."""
    if inputs is None:
        if before is None or not before.inputs:
            raise StateError("there are no inputs to prove anything on", fix="give prove_run inputs, or snapshot them")
        return before.inputs
    if isinstance(inputs, list) and not inputs:
        raise StateError("there are no inputs to prove anything on", fix="give at least one batch")
    return batches(inputs)


def _only_active(model: nn.Module) -> str:
    names = active_of(model).names
    if len(names) != 1:
        raise StateError(
            f"{len(names)} adapters are active, and a proof is of one",
            fix='say which: prove(model, inputs, name="...")',
        )
    return names[0]
