"""Write docs/benchmarks.md from the raw results in benchmarks/results/.

    python benchmarks/page.py

No figure on that page is typed by hand: each comes from a JSON file that a script in this folder wrote, and the page
names the command. A file that is missing leaves its section out.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "benchmarks.md"
GIB = 2**30

HEAD = """\
# Benchmarks

Made by `benchmarks/page.py` from the raw results in `benchmarks/results/`; each section names the command that measured
it. On a CPU only ratios count: all candidates run in turn in one process, and a ratio is the median of the ratios
within a round. Absolute times on a CPU are there to give an idea of the order.
"""


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [" | ".join(head), " | ".join(["---"] + ["---:"] * (len(head) - 1))]
    lines += [" | ".join(str(cell) for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def short(x: float) -> str:
    """
    >>> short(1.0551), short(15.31), short(1893.3)
    ('1.06', '15', '1,893')
    """
    return f"{x:.2f}" if x < 10 else f"{x:,.0f}"


def core(found: dict[str, Any]) -> str:
    rows, v = found["rows"], found["versions"]
    aims = [
        ("forward of one 32 x 32 layer, by hand = 1", "layer", "veneer / by hand", "peft / by hand", "at most 1.3"),
        ("attach to a Llama-3.1-8B shape, PEFT's time / ours", "attach", "peft / veneer", None, "at least 5"),
        ("load a file into 16 layers x 1024, PEFT's time / ours", "files", "load: peft / veneer", None, "at least 5"),
        ("save the same, PEFT's time / ours", "files", "save: peft / veneer", None, ""),
        ("switch between two adapters, PEFT's time / ours", "activate", "peft / veneer", None, "at least 20"),
        (
            "load with many adapters on the model, with 5 = 1",
            "growth",
            next((k for k in rows.get("growth", {}) if k.startswith("load")), ""),
            None,
            "flat",
        ),
        (
            "switch with many adapters, with 5 = 1",
            "growth",
            next((k for k in rows.get("growth", {}) if k.startswith("act")), ""),
            None,
            "flat",
        ),
        ("merge for good, PEFT's time / ours", "merge", "time: peft / veneer", None, ""),
        ("training step, frozen model = 1", "step", "veneer / frozen", "peft / frozen", "at most 1.04"),
        ("the same, LoRA by hand", "step", "by hand / frozen", None, ""),
        ("the same, frozen model + the products with A and B alone", "step", "floor / frozen", None, ""),
        ("the same with DoRA", "step", "veneer dora / frozen", "peft dora / frozen", ""),
    ]
    body = [
        (what, short(rows[row][key]), short(rows[row][other]) if other else "", aim)
        for what, row, key, other, aim in aims
        if row in rows and key in rows[row]
    ]
    saved = [(k.removesuffix(" MiB"), f"{x:.1f}") for k, x in rows.get("saved", {}).items()]
    merged = [(k.removesuffix(" MiB"), f"{x:.1f}") for k, x in rows.get("merge", {}).items() if k.endswith("MiB")]
    return "\n\n".join(
        [
            "## The core, beside PEFT and by hand",
            f"`python benchmarks/core.py`, one thread; torch {v['torch']}, transformers {v['transformers']}, "
            f"PEFT {v['peft']}.",
            table(["what", "Veneer", "PEFT", "aim"], body),
            "Extra memory at the peak of a merge, the largest layer beside it:",
            table(["", "MiB"], merged),
            "Kept for the backward pass, 4 layers x 256 tokens in bf16, parameters not counted:",
            table(["", "MiB"], saved),
        ]
    )


def mixed(found: dict[str, Any]) -> str:
    rows = [
        (name, *(f"{r[k]:.2f}" if k in r else "" for k in ("veneer eight / one", "peft eight / one")))
        for name, r in found["rows"].items()
    ]
    return "\n\n".join(
        [
            "## Eight rows with eight adapters",
            "`python benchmarks/mixed.py`: time of a batch in which every row has its own adapter, the same rows with "
            "one adapter = 1. The aim is at most 1.3. PEFT routes rows only outside training.",
            table(["", "Veneer", "PEFT"], rows),
        ]
    )


def memory(found: dict[str, Any]) -> str:
    rows = [
        (r["name"], f"{r['estimated_bytes'] / GIB:.3f}", f"{r['measured_bytes'] / GIB:.3f}", f"{r['ratio']:.3f}")
        for r in found["rows"]
    ]
    return "\n\n".join(
        [
            f"## Memory, estimated before and measured after: {found['about']['device']}",
            f"`python benchmarks/memory.py`, torch {found['about']['torch']}. The estimate knows shapes only; the aim "
            "is 10 %.",
            table(["", "estimated GiB", "measured GiB", "ratio"], rows),
        ]
    )


def memory_printed(found: dict[str, Any]) -> str:
    rows = []
    for line in found["printed"]:
        name, estimated, measured, ratio = re.fullmatch(r"(.+?)\s{2,}([\d.]+)\s+([\d.]+)\s+([\d.]+)\s.*", line).groups()
        rows.append((name, f"{float(estimated) / 1024:.3f}", f"{float(measured) / 1024:.3f}", ratio))
    return "\n\n".join(
        [
            f"## The same for 8B: {found['device']}",
            f"{_commands(found)}, torch {found['torch']}, as printed; `fused` rows keep what the name says.",
            table(["", "estimated GiB", "measured GiB", "ratio"], rows),
        ]
    )


def _commands(found: dict[str, Any]) -> str:
    """A command or several, as they were given, without where the result went."""
    each = [part.strip().partition(" --json")[0] for part in found["command"].split(";")]
    return ", ".join(f"`python benchmarks/{command}`" for command in each)


SHAPES = {"8b": "Llama-3.1-8B", "1b": "Llama-3.2-1B", "0.5b": "Qwen2.5-0.5B"}
TRAIN = """\
`python benchmarks/train_gpu.py --table 2x2048`, `--table 4x2048`, or with the names of variants and `--shape`, and
`benchmarks/peers_gpu.py` for `unsloth` and `peft-nf4`; random weights and tokens, r = 16 on all seven linears, fused
AdamW, median of 8 steps that follow each other. `fused` is `veneer.fuse(model, graphs=True)`, `asked` the same without
CUDA graphs; fp8, nf4 and int8 are the stored base (of nf4 the embedding too), otherwise bf16. gate_up, middle and input
say what is computed again instead of kept, `away` that what blocks keep waits in the host's memory, `turned` that the
transposes of an 8-bit base are kept as well (`fuse(..., turned=True)`), and `fp8-head` that besides the head is in fp8
(`quantize(..., head=True)`), `rotated` that inputs and weights are turned (`rotate=True`). The chunked loss is ours in
all rows but `peft` and Unsloth's. Rows of one run, on one card, have one letter; each run says what the card's own
product of two 8192 x 8192 matrices gave before and after. Memory is what is allocated at the highest point, all that
graphs hold included.
"""


AIMS = [  # setting, rows of the batch, variants, tokens/s, GiB
    ("bf16, 2 x 2048, nothing computed again", 2, ("fused",), 17500, 28),
    ("bf16, 4 x 2048, on 80 GB", 4, ("fused",), 18000, 80),
    ("bf16, 4 x 2048, at most 18 GiB", 4, ("fused-input-away",), 12500, 18),
    ("nf4, 4 x 2048, at most 8 GiB", 4, ("nf4-input-away",), 11500, 8),
    ("fp8, 2 x 2048, nothing computed again", 2, ("fp8", "fp8-turned", "fp8-head"), 24000, 80),
    ("fp8, 4 x 2048, at most 13 GiB", 4, ("fp8-input", "fp8-input-asked"), 16500, 13),
]
PUBLISHED = 342_733  # tokens of one row on 80 GB: QLoRA, r = 32, batches of one (unsloth.ai/blog/llama3-3)


def named(pattern: str) -> dict[str, Any]:
    """Raw results by the names of their files."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{pattern}.json"))}


def letters_of(runs: dict[str, Any]) -> dict[str, str]:
    return {name: chr(97 + i) for i, name in enumerate(runs)}


def measured() -> list[dict[str, Any]]:
    """Every variant of the 8B that was timed: the run's letter, or that it is a printed line, the card, the figures."""
    runs, found = named("train_gpu_*"), []
    letters = letters_of(runs)
    for printed in named("peers_printed").values():
        for size, lines in printed["printed"].items():
            for line in lines:
                variant, speed, _, peak, *_ = line.split()
                figures = {"tokens_per_second": float(speed.replace(",", "")), "peak_gib": float(peak)}
                found.append(
                    {"variant": variant, "batch": int(size[0]), "run": "", "device": printed["device"], **figures}
                )
    for name, run in runs.items():
        own = {"batch": run["batch"], "run": f"{letters[name]}: ", "device": run["device"]}
        found += [{**r, **own} for r in run["rows"] if run["shape"] == "8b" and "failed" not in r]
    return found


def aims() -> str:
    """What was aimed at on one H100, and what the last run of each variant gave: on that card, if any."""
    rows, every = [], measured()
    for setting, batch, variants, speed, memory in AIMS:
        for variant in variants:
            found = [r for r in every if (r["batch"], r["variant"]) == (batch, variant)]
            if found:
                r = max(found, key=lambda each: ("H100" in each["device"], each["run"] != "", every.index(each)))
                reached = r["tokens_per_second"] >= speed and r["peak_gib"] <= memory
                aim = f"{speed:,} tokens/s" + (f" in {memory} GiB" if memory < 80 else "")
                card = f"{r['run']}{r['device'].split()[1]}"
                got = f"{r['tokens_per_second']:,.0f} in {r['peak_gib']:.1f} GiB"
                rows.append((f"{setting}: `{variant}`", aim, got, card, "yes" if reached else "no"))
    for run in named("longest_whole").values():
        for r in run["rows"]:
            got = f"{r['tokens']:,} in {r['peak_bytes'] / GIB:.1f} GiB, {r['host_bytes'] / GIB:.0f} GiB of the host"
            aim, reached = f"more than {PUBLISHED:,} tokens", "yes" if r["tokens"] > PUBLISHED else "no"
            rows.append(("the longest row, nf4", aim, got, run["about"]["device"].split()[1], reached))
    for run in named("longest_predicted").values():
        bf16 = max(
            (r for r in run["predicted"] if r["base"] == "bf16" and r["host_gib"] <= 128), key=lambda r: r["tokens"]
        )
        got = f"{bf16['tokens']:,} with {bf16['host_gib']} GiB of the host, worked out"
        rows.append(("the longest row, bf16", "to be said", got, "", "-"))
    for run in named("train_cpu").values():
        from train_cpu import ratios

        reached = ratios(run["rows"], "cpu")["veneer"]
        aim = "1.5 x the tokens/s of PEFT with Trainer"
        rows.append(
            ("SmolLM2-135M on two CPU cores", aim, f"{reached:.2f} x", "CPU", "yes" if reached >= 1.5 else "no")
        )
    return "\n\n".join(
        [
            "## What the fast path was to reach, and what it reaches",
            "Training steps of LoRA on Llama-3.1-8B's shape, r = 16 on all seven linears (the longest row: 32), were "
            "to be "
            "as quick, and as small, as the first columns say, on one H100. What the last run of each variant gave, "
            "on an "
            "H100 where there was one; the letters are those of the runs below, a card without one was printed and not "
            "written down. The names are explained there, too.",
            table(["", "aim", "measured", "run", "reached"], rows),
            *_limits(),
        ]
    )


def _limits() -> list[str]:
    """Where the time of a step goes, in words: of the bf16 step that was profiled."""
    found = [(run, r) for run in named("train_gpu_*").values() for r in run["rows"] if "profile" in r]
    found = [pair for pair in found if pair[1]["variant"] == "fused"]
    if not found:
        return []
    run, r = found[-1]
    sums, tokens = by_kind(r["profile"]["kernels"]), run["batch"] * run["length"]
    products, attention = sums[REST[0]], sums["attention"]
    spent = sum(sums.values()) + r["profile"]["idle_ms"]
    aim = 1e3 * tokens / 17500
    products_flops = 4 * 6.98e9 + 4 * 128256 * 4096  # of a token: the seven linears and the head, forwards and back
    rate = products_flops * tokens / products / 1e9
    return [
        f"**Why bf16 stays below.** A step of {tokens:,} tokens takes {spent:.0f} ms under the profiler. "
        f"{products:.0f} ms "
        f"of them are products with the frozen weights, which nobody can leave out; they run at {rate:.0f} TFLOP/s, "
        f"and a "
        f"single large product alone gave {run['ceiling_tflops'][0]:.0f} on this card, held back by its power. "
        f"Attention "
        f"takes {attention:.0f} ms. With these two alone a step would give "
        f"{1e3 * tokens / (products + attention):,.0f} "
        f"tokens/s. All else - activations, thin products, norms, rotation, loss, optimiser, gaps - takes "
        f"{spent - products - attention:.0f} ms, and 17,500 tokens/s leave {aim - products - attention:.0f} ms for it. "
        "At 4 x 2048 each token meets the same products. A base and a head in 8 bits take half the time for them, and "
        "there the aim is met.",
        "**Why the CPU stays below** is told in its section: padding and the head are all that could be left out.",
    ]


KINDS = {  # what a kernel does, by a piece of its name; the first that fits
    "attention": ("sdpa", "fmha", "cudnn", "flash"),
    "8-bit products": ("qqtst", "ovscale", "s8"),
    "the gated unit": ("_glu",),
    "rounding to 8 bits, with the unit's thin products": ("_round_thin", "_add_parts", "_quantize"),
    "transposing codes": ("_turn",),
    "norms and rotation": ("_rms", "_rotate"),
    "the loss": ("_token_losses",),
}
LONG = 0.04  # ms: a product that takes longer is one with a frozen weight
REST = "16-bit products, long", "16-bit products, short (thin)", "all else"


def spent(runs: list[dict[str, Any]]) -> list[str]:
    """Where the time of a step goes, of the runs that were profiled."""
    found = [(run, r) for run in runs for r in run["rows"] if "profile" in r]
    if not found:
        return []
    head = ["ms of a step", *(r["variant"] for _, r in found)]
    sums = [by_kind(r["profile"]["kernels"]) for _, r in found]
    rows = [[kind, *(f"{s[kind]:.1f}" if s[kind] else "" for s in sums)] for kind in (*KINDS, *REST)]
    rows = [row for row in rows if any(row[1:])]
    rows.append(["between kernels", *(f"{r['profile']['idle_ms']:.1f}" for _, r in found)])
    rows.append(["kernels", *(f"{sum(n for *_, n in r['profile']['kernels']):,}" for _, r in found)])
    run = found[0][0]
    floors = [s["attention"] + s["8-bit products"] + s[REST[0]] for s in sums]
    tokens = run["batch"] * run["length"]
    rows.append(
        ["tokens/s if only attention and long products took time", *(f"{1e3 * tokens / f:,.0f}" for f in floors)]
    )
    return [
        f"**Where the time of a step goes**, {SHAPES[run['shape']]}'s shape, {run['batch']} x {run['length']} tokens, "
        "one step of each under the profiler, the same run as above (`--profile`). Products by frozen weights run at "
        "the rate that the card's power allows, whatever is around them.",
        table(head, rows),
    ]


def by_kind(kernels: list[tuple[str, float, int]]) -> dict[str, float]:
    sums = dict.fromkeys((*KINDS, *REST), 0.0)
    for name, ms, count in kernels:
        kind = next((kind for kind, pieces in KINDS.items() if any(piece in name for piece in pieces)), None)
        if kind is None:
            is_product = any(piece in name for piece in ("nvjet", "gemm", "cutlass", "splitK"))
            kind = REST[2] if not is_product else REST[0] if ms / count > LONG else REST[1]
        sums[kind] += ms
    return sums


def train_gpu(runs: list[dict[str, Any]]) -> str:
    """Of all runs: a table for each shape and batch."""
    lines = ["## Training steps on one GPU", TRAIN.strip()]
    sizes = sorted({(r["shape"], r["batch"], r["length"]) for r in runs}, key=lambda s: (-float(s[0][:-1]), s[1]))
    letters = {id(run): chr(97 + i) for i, run in enumerate(runs)}
    for shape, batch, length in sizes:
        own = [run for run in runs if (run["shape"], run["batch"], run["length"]) == (shape, batch, length)]
        rows = [
            (
                r["variant"] + (" (1)" if "note" in r else ""),
                f"{letters[id(run)]}: {run['device'].replace('NVIDIA ', '').replace(' 80GB HBM3', '')}",
                f"{r['tokens_per_second']:,.0f}",
                f"{r['peak_gib']:.1f}",
                f"{r['warmup_seconds']:.0f}",
                f"{r['losses'][0]:.3f}",
                f"{r['losses'][7]:.3f}",
            )
            for run in own
            for r in run["rows"]
            if "failed" not in r
        ]
        rows.sort(key=lambda row: -float(row[2].replace(",", "")))
        cards = ", ".join(
            f"{letters[id(run)]} {' and '.join(f'{x:.0f}' for x in run['ceiling_tflops'])}" for run in own
        )
        lines += [
            f"**{SHAPES[shape]}'s shape, {batch} x {length} tokens.** TFLOP/s of the card before and after: {cards}.",
            table(["", "run", "tokens/s", "peak GiB", "warm-up s", "loss", "step 8"], rows),
        ]
    lines += spent(runs)
    if any("note" in r for run in runs for r in run["rows"]):
        lines.append("(1) From a run that waited for the device after each step, which costs a few per cent.")
    lines.append(
        "The loss starts alike everywhere. On these random weights it then falls faster with compiled and "
        "with fused blocks than with eager ones, PEFT's and ours, because those round the first steps away "
        "(below, whose first steps are right)."
    )
    return "\n\n".join(lines)


PAIRS = [  # of rows, theirs, ours
    (2, "unsloth", "fused"),
    (2, "peft-compiled", "fused"),
    (4, "unsloth-recompute", "fused-input-away"),
    (4, "unsloth-nf4", "nf4-input-away"),
    (4, "peft-nf4", "nf4-input-away"),
]


def peers(found: dict[str, Any]) -> str:
    """Theirs and ours from one card: of two runs, one was stopped before it wrote its figures down."""
    letter = letters_of(named("train_gpu_*")).get(found["beside"], "?")
    every = measured()
    for each in every:  # the printed lines of 2 x 2048 are of the card, and the minutes, of that run
        each["where"] = f"{letter}: " if not each["run"] and each["batch"] == 2 else each["run"] or "printed: "
    rows = []
    for batch, theirs, ours in PAIRS:
        for their in (r for r in every if (r["batch"], r["variant"]) == (batch, theirs)):
            same = [r for r in every if (r["batch"], r["variant"], r["where"]) == (batch, ours, their["where"])]
            for our in same[-1:]:
                card = their["device"].removeprefix("NVIDIA ").split()[0]
                speeds = [f"{r['tokens_per_second']:,.0f}" for r in (their, our)]
                sizes = [f"{r['peak_gib']:.1f}" for r in (their, our)]
                times = f"{our['tokens_per_second'] / their['tokens_per_second']:.2f}"
                at = f"{their['where']}{card}"
                rows.append((f"`{theirs}`, `{ours}`", f"{batch} x 2048", at, *speeds, times, *sizes))
    head = ["theirs, ours", "batch", "run", "theirs, tokens/s", "ours", "ratio", "theirs, GiB", "ours"]
    return "\n\n".join(
        [
            f"## Beside Unsloth {found['unsloth']} and PEFT",
            "`python benchmarks/peers_gpu.py`: each pair is of one card and one run. `unsloth` is its trainer's model "
            "with "
            'everything kept, `unsloth-recompute` and `unsloth-nf4` with its own checkpointing ("unsloth"); ours '
            "beside "
            f"them keep no more. Of one run, on an H100, there are the lines that it printed: it was stopped before it "
            f"wrote its JSON. What it has of 2 x 2048 is beside run {letter}, of the same card and minutes.",
            table(head, rows),
        ]
    )


LINE = re.compile(  # of longest.py
    r"(\w+) +(\d+) layers +([\d,]+) tokens +peak +([\d.]+) GiB.*estimate ([\d.]+) +host +([\d.]+) GiB.* (\d+) inputs "
    r"stay +([\d.]+) s"
)


def _read(line: str) -> dict[str, Any]:
    """A row as longest.py prints it."""
    match = LINE.match(line)
    assert match is not None, line
    base, layers, tokens, peak, ratio, host, stay, seconds = match.groups()
    return {
        "base": base, "layers": int(layers), "tokens": int(tokens.replace(",", "")), "peak_bytes": float(peak) * GIB,
        "estimated_bytes": float(ratio) * float(peak) * GIB, "host_bytes": float(host) * GIB, "stay": int(stay),
        "seconds": float(seconds),
    }  # fmt: skip


def longest(runs: list[dict[str, Any]]) -> str:
    for run in runs:  # of one there are the lines that it printed
        run.setdefault("rows", [_read(line) for line in run.get("printed", ())])
    rows = sorted(
        ({**run["about"], **row} for run in runs for row in run["rows"] if "failed" not in row),
        key=lambda row: (row["base"], row["tokens"], row["layers"]),
    )
    body = [
        (
            f"{row['base']}, {row['tokens']:,}", f"{row['layers']}", f"{row['peak_bytes'] / GIB:.2f}",
            f"{row['estimated_bytes'] / row['peak_bytes']:.3f}", f"{row['host_bytes'] / GIB:.1f}", str(row["stay"]),
            f"{row['seconds']:.1f}", row["device"].removeprefix("NVIDIA "),
        )
        for row in rows
    ]  # fmt: skip
    about = rows[0]
    head = ["base, tokens", "layers there", "peak GiB", "estimate / peak", "host GiB", "stay", "s", "card"]
    return "\n\n".join(
        [
            "## The longest row on one card",
            f"`python benchmarks/longest.py`: true steps on one row, Llama-3.1-8B's shape, r = {about['rank']} on all "
            "seven linears, AdamW, `recompute tiled`; random weights, of nf4 the embedding and the head, too; "
            f"torch {about['torch']}. Peak and estimate are those of all 32 layers: where fewer are there, a block of "
            "memory holds what the others would. The seconds are those of a first step, which pins the host's memory; "
            "later ones use it again. The host holds the inputs of all blocks and of the last norm, but for "
            "those that stay on the card for want of room there. The longest published elsewhere is 342,733 tokens on "
            "80 GB (QLoRA, r = 32, batches of one; unsloth.ai/blog/llama3-3).",
            table(head, body),
            *_account(runs),
            *_predicted(runs),
        ]
    )


def _predicted(runs: list[dict[str, Any]]) -> list[str]:
    rows = [(run["about"]["card_gib"], row) for run in runs for row in run.get("predicted", ())]
    body = [(f"{r['base']}, {r['host_gib']} GiB", f"{r['tokens']:,}", f"{r['room'] / GIB:.1f}") for _, r in rows]
    told = (
        f"`--predict`: the longest row by the memory model with its margins, on {rows[0][0] if rows else 0:.0f} GiB of "
        "a card, worked out, not run. Mostly the host's memory decides it; inputs stay on the card until that is full:"
    )
    return [told, table(["base, host memory", "tokens", "GiB of inputs that stay"], body)] if rows else []


def _account(runs: list[dict[str, Any]]) -> list[str]:
    """Where the memory goes, in the run with the longest row."""
    told = max((run["account"] for run in runs if run.get("account")), key=lambda each: each["tokens"], default=None)
    if told is None:
        return []
    rows = [(name, f"{size / GIB:.2f}") for name, size in told["bytes"].items() if size]
    what = "What is there at the highest moment, the backward pass of a block's attention, besides weights and what is "
    return [f"{what}learned, at {told['tokens']:,} tokens:", table(["", "GiB"], rows)]


WHAT_WAS_STEPPED = {
    "sdxl": (
        "SDXL's UNet",
        "the true shape in bf16 (2.6 B parameters), random weights and latents, r = 16 on q, k, v and out of all "
        "attention, noise prediction, AdamW",
    ),
    "flux": (
        "FLUX-shaped blocks",
        "4 blocks of two streams and 8 of one, of FLUX.1's true width in bf16 (it has 19 and 38), random weights, "
        "4,096 places and 512 words, r = 16 on the layers that diffusers' script adapts, AdamW",
    ),
}


def diffusion_gpu(found: dict[str, Any]) -> str:
    done = {r["variant"]: r for r in found["rows"] if "failed" not in r}
    peer = done.get("peft-compiled", {}).get("images_per_second", float("nan"))
    rows = [
        (
            f"{name}, without cuDNN's attention" if "died" in r else name,
            f"{r['images_per_second']:.2f}",
            f"{r['images_per_second'] / peer:.2f}",
            "-" if r["peak_gib"] is None else f"{r['peak_gib']:.1f}",
            f"{r['reserved_gib']:.1f}",
            f"{1e3 * r['host_seconds']:.0f}",
            f"{r['warmup_seconds']:.0f}",
            *(f"{r['losses'][i]:.4f}" for i in (0, 2, 5, 8)),
        )
        for name, r in sorted(done.items(), key=lambda pair: -pair[1]["images_per_second"])
    ]
    before, after = found["ceiling_tflops"]
    what, shape = WHAT_WAS_STEPPED[found["shape"]]
    command = found["command"].partition(" --profile")[0]
    head = ["", "images/s", "of peft-compiled", "peak GiB", "reserved", "host ms", "warm-up s"]
    lines = [
        f"## A training step of {what}, {found['batch']} images of 1024 x 1024: {found['device']}",
        f"`python benchmarks/{command}`, torch {found['torch']}: {shape}; nothing is "
        "computed twice but in `fused-gate_up`. `peft` is what diffusers' training script does (fp32 adapters under "
        "autocast), `peft-bf16` PEFT with bf16 adapters, `peft-compiled` the same with compiled transformer blocks; "
        "`plain` is `veneer.attach`, `fused` `veneer.fuse(model)`, `fused-graphs` `veneer.fuse(model, graphs=True)`. "
        "Host: the time in which Python hands out a step; where it is as long as the step, the card may wait for "
        "Python. The card's own matrix product ran at "
        f"{before:.0f} TFLOP/s before and {after:.0f} after.",
        table([*head, "loss", "step 3", "step 6", "step 9"], rows),
    ]
    evened = [f"`{name}`" for name, r in done.items() if r.get("evened")]
    if evened:
        lines.append(
            f"The gradients of attention were laid alike for {', '.join(evened)} (`even_gradients`): by diffusers' own "
            "forward FLUX dies of an illegal memory access in cuDNN's attention, with or without PEFT."
        )
    return "\n\n".join([*lines, *([found["note"]] if "note" in found else [])])


def train_graphs(runs: list[dict[str, Any]]) -> str:
    """Of whole steps after warming up: tokens over seconds."""
    body = [row for found in runs for row in _graph_rows(found)]
    head = ["", "card", "graphs", "tokens/s", "ratio", "fillers", "losses apart, at most"]
    commands = ", ".join(dict.fromkeys(_commands(found) for found in runs))
    return "\n\n".join(
        [
            "## A run of `veneer.train` with its blocks as CUDA graphs",
            f"{commands}, torch {runs[-1]['torch']}: whole steps of the loop, random weights of Qwen2.5-0.5B's shape "
            f"or "
            "four layers of Llama-3.1-8B's in bf16, r = 16 on all linears, rows of the lengths of conversations. "
            "`packed`: two rows of 2,048 tokens at a time; `by samples`: eight samples end to end, with graphs filled "
            "up "
            "to one shape. Only real tokens are counted. At 0.5B the card waits for Python: fillers cost nothing, and "
            "a "
            "replay is all gain. At the width of 8B it is busy with tokens, and fillers cost what tokens cost. "
            "`graphs: auto` times two passes before the first step to tell which it is, and fills up what thereby "
            "takes "
            "at most 5 % longer. The host did other work beside, so ratios are rough: where auto came to off, the row "
            "beside the one with off is the same once more.",
            table(head, body),
        ]
    )


def _graph_rows(found: dict[str, Any], warm: int = 10) -> Iterable[tuple[str, ...]]:
    firsts: dict[tuple[str, str], tuple[float, list[float]]] = {}
    for r in found["rows"]:
        shape, speed = r.get("shape", "0.5b"), sum(r["tokens"][warm:]) / sum(r["seconds"][warm:])
        first, losses = firsts.setdefault((shape, r["way"]), (speed, r["losses"]))
        shapes = (re.search(r"filled up to one shape \(([\d.]+%)\)", note) for note in r["notes"])
        filled = next((match.group(1) for match in shapes if match and r.get("taken", r["graphs"]) == "on"), "")
        graphs = r["graphs"] + (f": {r['taken']}" if r["graphs"] == "auto" else "")
        what = {"0.5b": "0.5B", "8b-4": "4 layers of 8B"}[shape]
        apart = max(abs(a - b) / a for a, b in zip(losses, r["losses"], strict=True))
        card, times = found["device"].split()[1], f"{speed / first:.2f}"
        yield f"{what}, {r['way']}", card, graphs, f"{speed:,.0f}", times, filled, f"{apart:.0e}" if apart else ""


def first_steps(found: dict[str, Any]) -> str:
    paths, exact = dict(found["paths"]), found["paths"]["exact"]["losses"]
    rows = [
        (
            name,
            *(f"{step['arrives']:.2f}" for step in each["steps"][1:]),
            *(f"{each['losses'][i] - exact[i]:+.3f}" for i in (0, 1, 3, 7)),
        )
        for name, each in paths.items()
        if name != "exact"
    ]
    steps = len(next(iter(paths.values()))["steps"])
    head = ["", *(f"arrives, step {i}" for i in range(1, steps)), "loss, step 0", "step 1", "step 3", "step 7"]
    return "\n\n".join(
        [
            "## Whose first steps are right",
            f"{_commands(found)} ({found['device']}, torch {found['torch']}): training steps in "
            "bf16 beside the same in fp32. LoRA begins at B = 0 and moves by the learning rate, so the first changes "
            "of a layer's output are far below the spacing of bf16 numbers. Eager code rounds W x, adds the change and "
            "rounds again: most of it is lost. Compiled and fused code adds before it rounds. *arrives* is the share "
            "of the exact change of the last hidden states; the losses are relative to fp32's.",
            table(head, rows),
            "cuBLAS rounds a product before it adds it to something, so the fused path keeps the products of the "
            "layers "
            "that write into the residual stream in fp32 until the adapter's share is in "
            "(`tests/kernels/test_group.py`).",
        ]
    )


def loss_curves(found: dict[str, Any]) -> str:
    from plots import overlaid

    curves = {name: [(float(i + 1), loss) for i, loss in enumerate(own)] for name, own in found["losses"].items()}
    (PAGE.parent / "images" / "loss_curves.svg").write_text(
        overlaid(curves, "Loss of SmolLM2 on shell commands", "step")
    )
    plain, rows = found["losses"]["plain"], []
    for name, own in found["losses"].items():
        apart = [abs(a - b) / b for a, b in zip(own, plain, strict=True)]
        shares = sum(apart) / len(apart), max(apart)
        told = [f"{share:.2%}" if share >= 1e-4 else f"{share:.0e}" if share else "" for share in shares]
        rows.append((name, f"{own[0]:.4f}", f"{own[-1]:.4f}", *told))
    return "\n\n".join(
        [
            "## Loss curves, fused and plain, packed and in full",
            f"`python benchmarks/loss_curves.py --steps {found['steps']}`: SmolLM2-135M-Instruct on the demo's data, "
            f"`veneer.train` on {found['device']}, torch {found['torch']}; the loss of each step, before it is taken, "
            f"on "
            "the same batches of four rows. In fp32 fused and plain are one but for the last places. Bases of 8 and 4 "
            "bits are "
            "other "
            "bases, so their curves run beside, not on, the others (docs/quantisation.md has held-out losses).",
            table(["", "loss, step 1", "the last", "off plain, mean", "at most"], rows),
            "![Losses of the variants by step, laid over each other](images/loss_curves.svg)",
        ]
    )


def merge_stream(found: dict[str, Any]) -> str:
    size, copied, merged = found["bytes"], found["copy_seconds"], found["merge_seconds"]
    rows = [
        ("a plain copy of the files", f"{copied:.0f}", f"{size / 2**20 / copied:.0f}", ""),
        ("the merge", f"{merged:.0f}", f"{size / 2**20 / merged:.0f}", f"{found['merge_mib_above_start']:.0f}"),
    ]
    return "\n\n".join(
        [
            "## Merging on disk",
            f"`python benchmarks/merge_stream.py`: a model of {size / 1e9:.1f} GB in bfloat16, merged shard by shard "
            f"with an adapter of rank {found['rank']} on all linear layers and proven tensor by tensor, beside a plain "
            f"copy of the same files in the same run ({found['threads']} threads; data on the disk at the end of both"
            f"{', page cache dropped before each' if found['cache_dropped'] else ''}). The aim is less than 2 GB of "
            f"memory above the largest tensor, which has {found['largest_mib']:.0f} MiB.",
            table(["", "seconds", "MiB/s", "MiB above the start"], rows),
            f"The worst error of an output was {found['worst_output_error']:.2f} of what rounding to bfloat16 allows; "
            f"{found['share_kept']:.1%} of dW survived it.",
        ]
    )


def learning_rate(found: list[dict[str, Any]]) -> str:
    best: dict[tuple[str, float], list[float]] = defaultdict(list)
    for r in found:
        best[r["setup"], r["rate"]].append(r["loss"])
    mean = {key: sum(losses) / len(losses) for key, losses in best.items()}
    rows = []
    for setup in sorted({s for s, _ in mean}):
        tried = {rate: loss for (s, rate), loss in mean.items() if s == setup}
        top = min(tried, key=tried.__getitem__)
        near = [f"{tried[r]:.3f}" if r in tried else "" for r in (top / 4, top, top * 2)]
        rows.append((setup, f"{top:g}", *near))
    return "\n\n".join(
        [
            "## Held-out loss by learning rate",
            "`python benchmarks/learning_rate.py`: SmolLM2-135M on the demo's data; what the rule for `lr: auto` was "
            "held against.",
            table(["", "best rate", "loss at a quarter of it", "loss", "loss at twice"], rows),
        ]
    )


def methods(found: dict[str, Any]) -> str:
    about, rows = found["about"], found["rows"]

    def cell(row: dict[str, float] | None, key: str, form: str) -> str:
        return form.format(row[key]) if row and key in row else ""

    body = []
    for name, own in rows.items():
        if name.startswith("peft"):
            continue
        peer = rows.get(f"peft {name}")
        pairs = (cell(r, k, "{:.1f}") for k in ("saved MiB", "peak MiB") for r in (own, peer))
        steps = cell(own, "step", "{:.2f}"), cell(peer, "step", "{:.2f}"), cell(own, "peft/ours", "{:.2f}")
        body.append((name, *steps, *pairs))
    return "\n\n".join(
        [
            f"## A step of every method: {about['device']}",
            f"`python benchmarks/methods.py`: forward and backward, {about['layers']} layers x {about['width']}, "
            f"{about['tokens']} tokens, {about['dtype']}, rank 16 on all linears; torch {about['torch']}, PEFT "
            f"{about['peft']}. A step of plain LoRA is 1 in each library; DoRA is to stay below 1.25. Memory is what "
            "is kept for the backward pass, parameters not counted, and the highest point of a step, in MiB.",
            table(["", "step", "PEFT", "PEFT / ours", "kept", "PEFT", "peak", "PEFT"], body),
        ]
    )


def mixing(found: dict[str, Any]) -> str:
    about, r = found["about"], found["rows"]
    rows = [
        ("Veneer", f"{1e3 * r['veneer s']:.0f} ms", "1", f"{r['veneer error']:.4f}"),
        ("PEFT", f"{1e3 * r['peft s']:.0f} ms", f"{r['peft / veneer']:.0f}", f"{r['peft error']:.4f}"),
        ("PEFT, svd_full_matrices=False", "", f"{r['peft without full matrices / veneer']:.0f}", ""),
    ]
    return "\n\n".join(
        [
            "## Two adapters mixed into one of their rank",
            f"`python benchmarks/mixing.py`: svd, rank 16 on all linears of {about['layers']} layer x {about['width']}"
            f", one thread; torch {about['torch']}, PEFT {about['peft']}. The error is that of the worst matrix, "
            f"relative to the exact sum. 16 layers take us {r['veneer, 16 layers, s']:.2f} s.",
            table(["", "time", "ratio", "error"], rows),
        ]
    )


def small_data(found: list[dict[str, Any]]) -> str:
    cells: dict[tuple[str, int, float], list[float]] = defaultdict(list)
    for r in found:
        cells[r["method"], r["rows"], r["rate"]].append(r["accuracy"])
    best: dict[tuple[str, int], float] = {}
    for (method, rows, _), values in cells.items():
        best[method, rows] = max(best.get((method, rows), 0.0), sum(values) / len(values))
    counts = sorted({rows for _, rows in best})
    names = list(dict.fromkeys(m for m, _ in best))
    body = [(m, *(f"{100 * best[m, n]:.1f}" if (m, n) in best else "" for n in counts)) for m in names]
    return "\n\n".join(
        [
            "## Adapter, whole model or last layers, by amount of data",
            "`python benchmarks/small_data.py`: all-MiniLM-L6-v2 on the sentiment of film reviews, accuracy in % on "
            "1,000 other reviews at the best of five rates.",
            table(["rows", *map(str, counts)], body),
        ]
    )


def packed(found: dict[str, Any]) -> str:
    rows = found["rows"]
    first = next(iter(rows.values()))["tokens_per_second"]
    body = [
        (
            name,
            f"{r['tokens_per_second']:,.0f}",
            f"{r['tokens_per_second'] / first:.2f}",
            f"{100 * r['padding']:.0f} %",
            f"{r['peak_gib']:.1f}",
            f"{100 * r['off']:.1f} %",
        )
        for name, r in rows.items()
    ]
    return "\n\n".join(
        [
            f"## Samples of different lengths in rows of {found['length']:,} tokens: {found['device']}",
            f"`python benchmarks/packed.py{_packed_options(found)}`: {found['samples']} samples, {found['tokens']:,} "
            f"tokens, the longest {found['longest']:,}; {found['layers']} layers of the Llama-3.1-8B shape in bf16, "
            f"fused blocks, torch {found['torch']}. Only real tokens are counted. `by samples` has attention within "
            "each sample and no mask; padded and flat batches have 8 samples. The last column is how far all adapter "
            "gradients are from those of the samples one by one: rounding to bf16, alike in all rows.",
            table(["", "tokens/s", "ratio", "padding", "peak GiB", "gradient off"], body),
        ]
    )


def _packed_options(found: dict[str, Any]) -> str:
    if found["length"] == 2048:
        return ""
    return f" --length {found['length']} --rows {found['rows_at_once']} --samples {found['samples']} --passes 3"


def train_cpu(found: dict[str, Any]) -> str:
    from plots import overlaid
    from train_cpu import ratios

    wall, cpu, rows, v = ratios(found["rows"]), ratios(found["rows"], "cpu"), found["rows"], found["versions"]
    curves = {r["name"]: [(each["seen"], each["val"]) for each in r["held_out"]] for r in rows}
    picture = overlaid(curves, "Held-out loss of SmolLM2-135M on shell commands", "tokens trained on")
    (PAGE.parent / "images" / "train_cpu.svg").write_text(picture)
    common = min(r["held_out"][-1]["step"] for r in rows)
    body = [
        (
            r["name"],
            f"{wall[r['name']]:.2f}",
            f"{cpu[r['name']]:.2f}",
            f"{sum(r['tokens']):,}",
            f"{next(each['val'] for each in r['held_out'] if each['step'] == common):.3f}",
        )
        for r in rows
    ]
    steps, held = len(rows[0]["seconds"]), rows[0]["held_out"][0]["val"]
    return "\n\n".join(
        [
            "## Training on two CPU cores, beside PEFT with Trainer",
            f"`python benchmarks/train_cpu.py`: SmolLM2-135M-Instruct in fp32 on the demo's data, {steps} steps of 4 "
            f"rows; torch {v['torch']}, transformers {v['transformers']}, PEFT {v['peft']}. Real tokens a second, "
            "`trainer` = 1, by the clock and by the processor's seconds; the candidates take their steps in turn. "
            "`plain step` is what our step alone gives: with padding, whole logits and plain blocks, though rows are "
            f"sorted by length. The held-out loss begins at {held:.3f}. The machine did other work meanwhile, so the "
            "clock's ratios are noisy; the processor's are the ones to go by.",
            table(["", "tokens/s", "processor", "tokens", f"held-out loss at step {common}"], body),
            _cpu_limit(found["arithmetic"], cpu["veneer"]),
            "![Held-out loss of the candidates by tokens, laid over each other](images/train_cpu.svg)",
        ]
    )


def _cpu_limit(most: dict[str, float], reached: float) -> str:
    padding, head = most["padding"], most["head"]
    both = padding * head
    return (
        f"The aim was 1.5; {reached:.2f} is what the processor's seconds show. A step on a CPU is matrix products of "
        "the frozen base, and both sides do those in fp32 with one library. What can be left out is padding (rows drawn"
        f" at random are padded to {padding:.2f} times their tokens) and the head where no token is trained "
        f"({most['trained']:.0%} are, x {head:.2f}): at most x {both:.2f} together, were products all there is. Norms, "
        "rotations, activations, attention and the adapters' thin products take their time on either side and shrink "
        "with padding alone."
    )


SECTIONS: dict[str, Callable[[Any], str]] = {
    "core": core,
    "mixed": mixed,
    "memory_cpu": memory,
    "memory_cuda": memory,
    "memory_printed": memory_printed,
    "merge_stream": merge_stream,
    "train_gpu_*": train_gpu,
    "train_graphs*": train_graphs,
    "peers_printed": peers,
    "longest*": longest,
    "sdxl_gpu": diffusion_gpu,
    "flux_gpu": diffusion_gpu,
    "loss_curves": loss_curves,
    "first_steps": first_steps,
    "packed_2048": packed,
    "packed_16384": packed,
    "train_cpu": train_cpu,
    "learning_rate": learning_rate,
    "small_data": small_data,
    "methods": methods,
    "methods_cuda": methods,
    "mixing": mixing,
}


def main() -> None:
    parts = [HEAD.strip(), aims()]
    for name, section in SECTIONS.items():
        found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}.json"))]
        if found:
            parts.append(section(found if "*" in name else found[0]))
    PAGE.write_text("\n\n".join(parts) + "\n")
    print(f"{PAGE}: {len(parts) - 1} sections")


if __name__ == "__main__":
    main()
