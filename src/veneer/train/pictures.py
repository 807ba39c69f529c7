"""What a model paints during a run, as files: one strip for each time, its pictures side by side.

samples/000200.png      step 200; the prompts, from left to right, stand in the event that tells of it
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from veneer.extras import need

__all__ = ["write_strip"]

GAP = 2  # pixels of white between two pictures


def write_strip(pictures: Sequence[Any], folder: Path, step: int) -> str:
    """Write one strip and return its name within the run. Pictures are (height, width, channels) in 0 ... 255."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{step:06d}.png"
    half = path.with_name(f".{path.name}")
    need("PIL.Image", extra="diffusion", use="write pictures").fromarray(_joined(pictures)).save(half, format="PNG")
    half.replace(path)
    return f"{folder.name}/{path.name}"


def _joined(pictures: Sequence[Any]) -> Any:
    gap = np.full((pictures[0].shape[0], GAP, 3), 255, dtype="uint8")
    return np.concatenate([part for picture in pictures for part in (gap, picture)][1:], axis=1)
