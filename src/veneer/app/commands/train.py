"""veneer train: settings from flags, file or both; then one call of the training loop."""

from __future__ import annotations

import argparse

from veneer.app.flags import from_said
from veneer.app.output import Output
from veneer.train.settings import explain

EXAMPLES = """  veneer train Qwen/Qwen3-1.7B support.jsonl
  veneer train config.yaml --lr 1e-4
  veneer train config.yaml --set lr=1e-4 --set r=32
  veneer train --resume                      go on with the last run
  veneer train MODEL DATA --dry-run          everything but the training
  veneer train --explain targets             all about one key"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(takes_settings=True)
    parser.add_argument("positional", nargs="*", metavar="MODEL DATA", help="or one YAML file of settings")
    parser.add_argument("--config", "-c", metavar="FILE", help="settings as YAML; flags win over it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, by any of its names"
    )
    parser.add_argument("--dry-run", action="store_true", help="check data, mask, memory and plan, then stop")
    parser.add_argument("--explain", metavar="KEY", help="what a setting means, its default and its other names")


def run(args: argparse.Namespace, out: Output) -> int:
    if args.explain:
        text = explain(args.explain)
        out.result({"key": text.partition(":")[0], "text": text}, lambda console: console.print(text, markup=False))
        return 0
    resolved = from_said(args.positional, args.said, args.set, args.config)
    raise NotImplementedError(resolved)
