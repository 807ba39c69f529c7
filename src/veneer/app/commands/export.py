"""veneer export: the adapter of a run (or an adapter's folder) in the layout of those it is meant for.

The same as `veneer convert`, for what was trained here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from veneer.app.commands.convert import add_options, convert
from veneer.app.output import Output
from veneer.app.subjects import find_run
from veneer.errors import ConfigError

EXAMPLES = """  veneer export last --to diffusers --out style.safetensors
  veneer export runs/style-0917-a1 --to kohya --out style.safetensors
  veneer export adapters/style --to kohya --base sdxl --part unet --out style.safetensors"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN", help="a run, last, or an adapter's folder")
    add_options(parser)
    parser.add_argument("--root", default="runs", help="the folder that holds the runs [runs]")


def run(args: argparse.Namespace, out: Output) -> int:
    found = find_run(args.source, args.root)
    if found is None:
        return convert(Path(args.source), args, out)
    settings = found.config().settings
    if settings.task != "diffusion":
        raise ConfigError(
            f"files that people share hold adapters of image pipelines; {found.name} was trained for {settings.task}",
            str(found.folder),
            f"{found.adapter} is a folder in PEFT's layout as it is: copy it",
        )
    if args.base is None and settings.task == "diffusion" and Path(str(settings.model)).is_dir():
        args.base = str(settings.model)  # the names of its own layers, whatever its shape
    return convert(found.learned, args, out)
