"""The demo: a real model learns to answer with a shell command, on this machine, without a GPU and without a hub.

SmolLM2-135M-Instruct, asked in plain English for a command, chats. After a hundred steps on a few hundred examples
it answers with the command alone. Three things are then shown: the same questions before and after, the proof that the
adapter is what it claims to be, and the report. The format is learned; many of the commands are wrong, as one expects
of so small a model. They are for looking at, not for running.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from veneer.app.output import Output
from veneer.train.settings import Resolved, resolve

__all__ = ["SETTINGS", "prepare"]

SETTINGS: dict[str, Any] = {
    "r": 16,
    "alpha": 32,
    "lr": 1.6e-3,
    "steps": 100,
    "batch_size": 4,
    "eval_every": 25,
    "system": "Answer with one shell command.",
    "warmup": 0.05,
    "max_len": 256,
}


def prepare(flags: dict[str, Any], out: Output) -> Resolved:
    """The demo's settings with whatever was said on the command line on top; obtains model and data first."""
    from veneer.assets import data_file, model_folder
    from veneer.extras import quiet

    with quiet(), out.progress("looking for the demo's model") as say:
        given = {
            **SETTINGS,
            "model": str(model_folder("smollm2", say)),
            "data": str(data_file("shell", "train", say)),
            "val": str(data_file("shell", "val", say)),
        }
    given = {key: value for key, value in given.items() if not _said(key, flags)}
    if not {"--name", "--out", "--resume"} & flags.keys():
        given["name"] = free_name(Path("runs"))
    return resolve(mapping=given, flags=flags)


def _said(key: str, flags: dict[str, Any]) -> bool:
    """Whether the command line says this itself: epochs, too, are a way to say how many steps."""
    said = {flag.lstrip("-").replace("-", "_") for flag in flags}
    return key in said or (key == "steps" and "epochs" in said)


def free_name(root: Path) -> str:
    """demo, demo-2, demo-3: a run never overwrites another."""
    names = ("demo", *(f"demo-{number}" for number in range(2, 1000)))
    return next(name for name in names if not (root / name).exists())
