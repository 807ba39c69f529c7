"""veneer check: the preflight alone. Exit 0: a run may begin; 2: settings or data are wrong; 3: it would not fit."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from veneer.app.flags import add_settings, from_said
from veneer.app.output import Output
from veneer.app.progress import display
from veneer.errors import ConfigError
from veneer.train.settings import Resolved

EXAMPLES = """  veneer check Qwen/Qwen3-1.7B support.jsonl
  veneer check config.yaml --max-len 4096 --batch-size 4
  veneer check MODEL DATA --json | jq .memory"""


def configure(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    return check(from_said(args.positional, args.said, args.set, args.config), out)


def check(resolved: Resolved, out: Output) -> int:
    if resolved.settings.model is None or resolved.settings.data is None:
        raise ConfigError("a model and data are needed", "command line", "veneer check MODEL DATA")
    for notice in resolved.notices:
        out.note(f"{out.signs.dot} {notice}")
    with display(out) as show:

        def tell(event: str, **fields: Any) -> None:
            if not out.json:
                show({"event": event, **fields})

        tell("start")
        from veneer.app.preflight import preflight
        from veneer.extras import quiet

        with quiet():
            found = preflight(resolved, tell)
    found.raise_if_too_big()
    same = [word for word in out.words if word not in ("--dry-run", "--quiet", "-q")]
    words = shlex.join(["veneer", "train", *same])
    out.result(found.to_json(), lambda console: console.print(f"ready   next:  {words}", markup=False, soft_wrap=True))
    return 0
