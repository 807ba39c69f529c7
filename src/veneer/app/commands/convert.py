"""veneer convert: an adapter of an image model from one layout into another: kohya's, diffusers', PEFT's.

No model is loaded. Kohya's names can only be read beside the model's own, so they are looked up in a UNet of the shape
of SD 1.x, 2.x or XL, whichever explains the file, or in the model that --base names.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.app.output import Output
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.ckpt.layers import Shared

EXAMPLES = """  veneer convert style.safetensors --to diffusers --out style-diffusers.safetensors
  veneer convert pytorch_lora_weights.safetensors --to kohya --out style.safetensors
  veneer convert style.safetensors --to peft --out style-peft        a folder; for several models one inside for each
  veneer convert style.safetensors --to diffusers --base models/my-pipeline --out out.safetensors"""

LAYOUTS = ["kohya", "diffusers", "peft"]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FILE", help="a .safetensors file, or an adapter's folder in PEFT's layout")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="the layout to write")
    parser.add_argument("--out", "-o", required=True, metavar="PATH", help="a file (peft: a folder); must not exist")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="sd1, sd2, sdxl, flux, sd3, sd3.5-medium, sd3.5-large, or the folder of a pipeline [what fits]",
    )
    parser.add_argument("--part", metavar="NAME", help="what a folder of PEFT adapts: unet, transformer, text_encoder")
    parser.add_argument("--allow-unknown", action="store_true", help="leave out keys that nobody understands")


def run(args: argparse.Namespace, out: Output) -> int:
    return convert(Path(args.source), args, out)


def convert(source: Path, args: argparse.Namespace, out: Output) -> int:
    target = Path(args.out).expanduser()
    if target.exists():
        raise ConfigError(
            "there is something already, and nothing is ever overwritten", args.out, "choose another --out"
        )
    from veneer.ckpt.shared import read_shared, write_shared
    from veneer.ckpt.unets import known_model

    with out.wait(f"reading {source}"):
        known = known_model(args.base) if args.base else None
        shared = read_shared(source, known, part=args.part, allow_unknown=args.allow_unknown)
    with out.wait(f"writing {target}"):
        written = write_shared(shared, target, args.to, known)
    value = {"out": str(written.path), "layout": written.layout, "layers": dict(written.layers), **_report(shared)}
    lines = [f"{out.signs.ok} read     {shared.coverage}"]
    lines += [f"{out.signs.warn} {note}" for note in shared.coverage.notes]
    if shared.metadata:
        lines.append(f"  kept     metadata: {', '.join(sorted(shared.metadata))}")
    lines.append(f"saved {written}")
    out.result(value, lambda console: [console.print(line, markup=False, soft_wrap=True) for line in lines])
    return 0


def _report(shared: Shared) -> dict[str, Any]:
    """What became of the file's keys."""
    found = shared.coverage
    return {
        "from": found.layout,
        "keys": found.keys,
        "used": found.used,
        "unknown": found.unknown,
        "metadata": shared.metadata,
    }
