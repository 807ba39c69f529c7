"""veneer doctor: the environment, each problem with its fix line; exit 1 when something does not work."""

from __future__ import annotations

import argparse
import platform
from dataclasses import asdict

from veneer.app.doctor import Finding, examine
from veneer.app.output import Output

EXAMPLES = """  veneer doctor
  veneer doctor --json | jq '.findings[] | select(.level != "ok")'"""


def configure(parser: argparse.ArgumentParser) -> None:
    """It takes nothing but the general flags."""


def run(args: argparse.Namespace, out: Output) -> int:
    with out.wait("examining the environment"):
        findings = list(examine())
    failed = sum(finding.level == "fail" for finding in findings)
    value = {"healthy": not failed, "platform": platform.platform(), "findings": [asdict(f) for f in findings]}
    out.result(value, lambda console: [console.print(line, markup=False) for line in lines(findings, out)])
    return 1 if failed else 0


def lines(findings: list[Finding], out: Output) -> list[str]:
    """One line per finding, and its fix below it."""
    signs = {"ok": out.signs.ok, "warn": out.signs.warn, "fail": out.signs.fail}
    shown: list[str] = []
    for finding in findings:
        shown.append(f"{signs[finding.level]} {finding.subject:<13} {finding.text}")
        if finding.fix:
            shown.append(f"  {'':<13} {out.signs.arrow} {finding.fix}")
    bad = [f for f in findings if f.level != "ok"]
    return [*shown, "", "all is well" if not bad else f"{len(bad)} to look at"]
