"""Everything a run needs to go on as if nothing had happened, in one file beside the adapter: state.pt.

    progress     step, place in the data, best so far, what the watchdog has seen, micro-batch, where metrics.jsonl ends
    parameters   what is trained, raw: the adapter's own file may hold it in another form or type
    optimizer    AdamW's moments
    average      the moving average of the parameters, where one is kept; the adapter's file holds it then
    random       the states of Python, NumPy and PyTorch

A checkpoint is one folder that appears whole or not at all, so a process killed at any moment, also while it saves,
leaves the last one. Going on from it repeats the steps since then, with the same data, the same dropout masks and the
same sums: the result is the uninterrupted run's, bit for bit (on one device and with one number of threads).

state.pt is PyTorch's format but is read with weights_only: it can hold tensors and plain values, never code.
"""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from veneer.ckpt.atomic import atomic_folder
from veneer.errors import CheckpointError

__all__ = [
    "STATE",
    "Progress",
    "apply",
    "capture",
    "checkpoint",
    "put_learned",
    "put_values",
    "random_state",
    "read",
    "restore_random",
    "same_random",
    "values_of",
]

STATE = "state.pt"
VERSION = 1


@dataclass
class Progress:
    """How far a run is. Plain values only."""

    step: int = 0  # optimiser steps done
    tokens: int = 0
    trained_tokens: int = 0
    micro_batch: int = 0  # rows in memory at once, after any halving
    rate_scale: float = 1.0  # halved by a restart after a divergence
    restarts: int = 0
    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0  # evaluations since the best one
    evaluated: int = -1  # the last step at which the model was evaluated
    painted: int = -1  # and at which it painted
    metrics_position: int = 0
    loader: dict[str, Any] = field(default_factory=dict)
    watchdog: dict[str, Any] = field(default_factory=dict)

    def is_better(self, loss: float) -> bool:
        return self.best_loss is None or loss < self.best_loss


def capture(
    progress: Progress, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The whole state as plain values and tensors."""
    return {
        "progress": asdict(progress),
        **values_of(parameters),
        "optimizer": optimizer.state_dict(),
        "random": random_state(),
    }


def values_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """The trained values alone: enough for the best checkpoint, which nobody goes on from."""
    return {"version": VERSION, "parameters": {name: parameter.detach() for name, parameter in parameters.items()}}


def checkpoint(folder: Path, write_model: Callable[[Path], None], state: Mapping[str, Any]) -> None:
    """Write the model's files and the state as one folder. What neither writes (the tokenizer) is carried over."""
    with atomic_folder(folder, keep=True) as temp:
        write_model(temp)
        _save(dict(state), temp / STATE)


class _File(io.BufferedWriter):
    """A file that remembers why a write failed: torch's writer says only that it did."""

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


def _save(state: dict[str, Any], path: Path) -> None:
    with _File(io.FileIO(path, "wb")) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if file.failed is None:
                raise
            raise OSError(file.failed.errno, file.failed.strerror, str(path)) from error


def read(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in a checkpoint. Random states are always on the CPU."""
    path = folder / STATE
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError("there is nothing to go on from", str(path), "start the run anew") from None
    except Exception as error:  # torch raises many kinds for a file that is cut short or is something else
        raise CheckpointError(
            f"the state of the run cannot be read ({error})", str(path), "start the run anew"
        ) from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise CheckpointError(
            "the state is of another version of Veneer", str(path), "go on with the version that wrote it"
        )
    return state


def apply(
    state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, where: Path
) -> Progress:
    """Put a state back: values into the parameters, moments into the optimiser, the random states into place."""
    put_values(state, parameters, where)
    optimizer.load_state_dict(state["optimizer"])
    restore_random(state["random"])
    return Progress(**state["progress"])


def put_learned(state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], where: Path) -> None:
    """Put back what the adapter's file holds: the average where one is kept, else the parameters themselves."""
    put_values({**state, "parameters": state.get("average") or state["parameters"]}, parameters, where)


def put_values(state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], where: Path) -> None:
    """Copy saved values into the parameters; on any misfit nothing is copied."""
    saved = state["parameters"]
    problems = [f"{name}: in the checkpoint, not in the model" for name in saved.keys() - parameters.keys()]
    problems += [f"{name}: in the model, not in the checkpoint" for name in parameters.keys() - saved.keys()]
    problems += [
        f"{name}: {tuple(saved[name].shape)} in the checkpoint, {tuple(parameter.shape)} in the model"
        for name, parameter in parameters.items()
        if name in saved and saved[name].shape != parameter.shape
    ]
    if problems:
        raise CheckpointError(
            "the checkpoint does not fit the model",
            str(where),
            "go on with the model the run began with",
            sorted(problems),
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


# ------------------------------------------------------------------ random states


def random_state() -> dict[str, Any]:
    """The states of all generators, as plain values and tensors."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])


@contextlib.contextmanager
def same_random(seed: int | None = None) -> Iterator[None]:
    """Afterwards all generators are where they were; inside they start from `seed` where one is given."""
    before = random_state()
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
    try:
        yield
    finally:
        restore_random(before)
