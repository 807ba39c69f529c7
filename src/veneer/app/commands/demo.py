"""veneer demo: a real model learns something new in minutes, with the proof and the report. See app/demo.py."""

from __future__ import annotations

import argparse

from veneer.app.commands.train import finish, train
from veneer.app.demo import prepare
from veneer.app.output import Output

EXAMPLES = """  veneer demo                         about three minutes on two CPU cores
  veneer demo --steps 20 --name quick
  veneer demo --json"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(takes_settings=True)


def run(args: argparse.Namespace, out: Output) -> int:
    if not out.json and not out.quiet:
        what = "SmolLM2-135M-Instruct learns to answer with a shell command"
        out.console.print(f"{what}: what it says is to be looked at, not to be run\n", markup=False)
    return finish(train(prepare(args.said, out), out), out)
