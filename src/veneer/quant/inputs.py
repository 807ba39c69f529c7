"""What is known of a layer's inputs when its weight is packed, and the file in which that is kept.

The mean of x x^T over some rows says what an error E of W costs: |E x|^2 is E (x x^T) E^T on average. In full it is a
square matrix for each layer, 822 MB for one of 14,336 inputs. Inputs of language models have few directions that
matter and a long even tail, so here it is

    x x^T  ~  D + V^T V        D diagonal, V a few directions (64)

which takes 64 numbers a column, and makes rounding cheap as well (rounding.py). Layers that read one input share it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from veneer.core.observe import Sketch

__all__ = ["Inputs", "load_inputs", "save_inputs", "summed_up"]

DIRECTIONS = ".directions"
ALIKE = "alike"  # in the file's metadata: layers whose inputs are another one's


class Inputs(NamedTuple):
    """The mean of x^2 in each column, and the directions whose squares are part of it."""

    energy: Float[Tensor, " cols"]
    directions: Float[Tensor, "k cols"] | None = None


def summed_up(sketches: Mapping[str, Sketch]) -> dict[str, Inputs]:
    """Rounded as in the file, so that packing at once and packing from the file give the same bytes."""
    done: dict[int, Inputs] = {}
    for sketch in sketches.values():
        if id(sketch) not in done:
            energy, directions = sketch.mean()
            done[id(sketch)] = Inputs(energy.float().cpu(), directions.to(torch.bfloat16).cpu().contiguous())
    return {name: done[id(sketch)] for name, sketch in sketches.items()}


def save_inputs(inputs: Mapping[str, Inputs], path: str | os.PathLike[str]) -> None:
    first: dict[int, str] = {}
    alike = {n: first[id(own)] for n, own in inputs.items() if first.setdefault(id(own), n) != n}
    tensors = {name: inputs[name].energy for name in first.values()}
    tensors |= {n + DIRECTIONS: v for n in first.values() if (v := inputs[n].directions) is not None}
    save_file(tensors, path, metadata={ALIKE: json.dumps(alike)})


def load_inputs(path: str | os.PathLike[str]) -> dict[str, Inputs]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        own = (name for name in tensors if not name.endswith(DIRECTIONS))
        found = {name: Inputs(tensors[name], tensors.get(name + DIRECTIONS)) for name in own}
        alike = json.loads((file.metadata() or {}).get(ALIKE, "{}"))
    return found | {name: found[other] for name, other in alike.items()}
