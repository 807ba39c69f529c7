"""veneer recommend: settings to start from, with the reason and the source of each, and when LoRA is the wrong tool."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from veneer.app.output import Output
from veneer.app.tables import table
from veneer.app.text import count

if TYPE_CHECKING:
    from rich.console import Console

    from veneer.advise.recommend import Advice

EXAMPLES = """  veneer recommend 8B --task generation --rows 5000 --memory 24GB
  veneer recommend Qwen/Qwen3-1.7B math.jsonl --task reasoning
  veneer recommend small --task classification"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default="medium",
        metavar="MODEL",
        help="a model, a size such as 8B, or small, medium, large [medium]",
    )
    parser.add_argument("data", nargs="?", metavar="DATA", help="count the rows of this data")
    parser.add_argument(
        "--task",
        default="generation",
        help="generation, classification, complex_reasoning, or a usual name of one: chat, ner, math [generation]",
    )
    parser.add_argument("--rows", type=int, metavar="N", help="rows of training data")
    parser.add_argument("--tokens", type=int, metavar="N", help="trained tokens in all rows, each once")
    parser.add_argument("--data", dest="also_data", metavar="DATA", help=argparse.SUPPRESS)
    parser.add_argument("--memory", metavar="SIZE", help="what the device has, as in 24GB; `here` for this machine's")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="where it would train [what this machine has]")
    parser.add_argument("--max-len", type=int, default=2048, metavar="N", help="longest sample, in tokens [2048]")
    parser.add_argument("--method", choices=["lora", "full", "freeze"], help="insist on one")
    parser.add_argument("--labels", type=int, default=2, metavar="N", help="classes, for classification [2]")


def run(args: argparse.Namespace, out: Output) -> int:
    from veneer.advise.device import free_memory, usual_device
    from veneer.advise.recommend import recommend

    data = args.data or args.also_data
    memory = free_memory(args.device or usual_device()) if args.memory == "here" else args.memory
    advice = recommend(
        args.task,
        args.model,
        rows=_rows(data, out) if data else args.rows,
        tokens=args.tokens,
        memory=memory,
        device=args.device,
        max_len=args.max_len,
        method=args.method,
        labels=args.labels,
    )
    if data:
        advice = replace(advice, data=data)
    out.result(advice.to_json(), lambda console: _print(console, advice, out))
    return 0


def _rows(data: str, out: Output) -> int:
    from veneer.data.dataset import load

    with out.wait(f"counting the rows of {data}"):
        return len(load(data))


def _print(console: Console, advice: Advice, out: Output) -> None:
    size = f"{count(advice.parameters)} parameters, a {advice.size} model"
    console.print(f"{advice.task} on {advice.model if advice.model != 'MODEL' else 'a model'} ({size})", markup=False)
    if advice.wrong_tool:
        console.print(f"{out.signs.warn} {advice.wrong_tool}", markup=False, style="yellow")
    console.print()
    console.print(table(["setting", "+value", "+why", "+source"], advice.table()))
    console.print()
    if advice.memory:
        console.print(f"memory: {advice.memory.sentence()}", markup=False)
    for note in advice.assumed:
        console.print(f"assumed: {note}", markup=False, style="dim")
    console.print(f"\n{advice.command()}", markup=False, style="bold", soft_wrap=True)
