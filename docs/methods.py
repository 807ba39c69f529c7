"""Writes methods.md and its picture: what each method is, and how it learned in benchmarks/curves.py.

python docs/methods.py          # after a run of benchmarks/curves.py, or a new method; a test holds the two together
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE, PICTURE = HERE / "methods.md", HERE / "images" / "methods.svg"
RESULTS = HERE.parent / "benchmarks" / "results" / "curves.json"

INTRO = """# Methods

<!-- written by docs/methods.py from benchmarks/results/curves.json -->

Every adapter is put together from four independent choices, and every combination of them works: what is learned
(`delta`), how it joins the weight (`combine`), where it starts (`init`) and how it is scaled (`scaling`).

```python
veneer.attach(model, LoRA(rank=16, alpha=32, delta="lora", combine="dora", init="pissa", scaling="rslora"))
```

W is the frozen weight (out, in), A is (r, in), B is (out, r), s the scale. Unless something else is said the start
changes nothing: dW = 0.
"""

CURVES = """## How they learn

![Held-out loss of every method over {steps} steps, beside PEFT's](images/methods.svg)

`python benchmarks/curves.py`: all-MiniLM-L6-v2 learns the sentiment of short film reviews, rank 8 on all linear layers
of the encoder, {batch} reviews a step, {steps} steps; the loss is on {held_out} other reviews. Where PEFT has the
method, both libraries begin with the same random numbers and see the same rows, so two curves that lie on each other
say that the two compute the same thing. Each method has one rate, the same in both libraries and not tuned, and one
seed: the picture shows that a method learns, not which one is best. AdaLoRA's curves part: PEFT's term for
orthogonal factors is a norm where the paper has its square (eq. 4). EVA, CorDA and LoRA-GA compute their starts
from the same four batches, each library in its own way, so those curves need not agree.
"""


@dataclass(frozen=True)
class Entry:
    """One method in words. `formula` is what it computes; `use` is when to take it."""

    title: str
    word: str
    formula: str
    what: str
    use: str
    paper: str = ""


DELTAS = (
    Entry(
        "LoRA",
        'delta="lora"',
        "dW = s B A",
        "Two thin matrices whose product is the change. Everything else on this page is a variation of it.",
        "First. It is the quickest, every engine loads it, and the others are measured against it.",
        "arXiv:2106.09685",
    ),
    Entry(
        "AdaLoRA",
        'delta="adalora"',
        "dW = s B diag(E) A",
        "Singular values of their own, which training switches off where they matter least: a budget of ranks falls "
        "along a cubic and is shared out among the layers by sensitivity and its certainty. Rows of A and columns of B "
        "are kept nearly orthogonal by a term of the loss.",
        "When the file must be small and layers differ in what they need. It wants longer runs than LoRA.",
        "arXiv:2303.10512",
    ),
    Entry(
        "LoRA-FA",
        'delta="lora_fa"',
        "dW = s B A, A frozen",
        "Only B is learned, so the backward pass needs A x, which is r wide, and not x.",
        "When the memory of activations is what is short.",
        "arXiv:2308.03303",
    ),
    Entry(
        "VeRA",
        'delta="vera"',
        "dW = diag(b) B diag(d) A",
        "A and B are random, frozen and shared by all layers; a layer learns two vectors. Ranks are chosen far higher "
        "than LoRA's, and rates, too.",
        "When thousands of adapters must be stored: a layer costs out + r numbers.",
        "arXiv:2310.11454",
    ),
    Entry(
        "LoRA-XS",
        'delta="lora_xs"',
        "dW = s B R A",
        "A and B hold the top singular directions of W and are frozen; R is r x r.",
        "When even VeRA is too large: r^2 numbers a layer, whatever its width.",
        "arXiv:2405.17604",
    ),
    Entry(
        "LoHa",
        'delta="loha"',
        "dW = s (P1 Q1) * (P2 Q2)",
        "The elementwise product of two low-rank matrices has a rank of up to r^2.",
        "For image models, where it comes from. A step forms matrices as large as W.",
        "arXiv:2108.06098",
    ),
    Entry(
        "LoKr",
        'delta="lokr"',
        "dW = s C (x) D",
        "A Kronecker product of a small matrix and a larger one, which is itself a product of rank r where that saves "
        "anything.",
        "For image models and very small files.",
        "arXiv:2309.14859",
    ),
    Entry(
        "Block-diagonal LoRA",
        'delta="block"',
        "dW = s diag(B1 A1, ..., Bk Ak)",
        "Every block of inputs feeds its own block of outputs, at rank r / k.",
        "When the layer is split over k devices: the adapter then needs no exchange between them.",
    ),
    Entry(
        "Rows of an embedding",
        'delta="tokens"',
        "dW = 0 but for chosen rows",
        "Each chosen token gets a change of its own, as wide as the embedding. Not in the picture.",
        "For tokens that were added to the vocabulary, beside another adapter for the rest.",
    ),
    Entry(
        "Parts of a fused layer",
        'delta="fused"',
        "dW = s B_i A_i in the rows of part i",
        "Where q, k and v are one matrix (GPT-2, Phi), adapts q and v alone. Not in the picture: "
        "this model has no such layer.",
        'It is chosen by itself where targets="minimal" meets a fused matrix.',
    ),
)
COMBINES = (
    Entry(
        "Add",
        'combine="add"',
        "W + dW",
        "The plain sum.",
        "First.",
        "arXiv:2106.09685",
    ),
    Entry(
        "DoRA",
        'combine="dora"',
        "m (W + dW) / |W + dW|",
        "Length and direction apart: each output row has a learned length m, and dW only turns it. The row norms are "
        "found without forming dW and without a dense copy of W, so it works on packed weights and with every delta.",
        "At low ranks, where it is often a little better than LoRA for a little more time.",
        "arXiv:2402.09353",
    ),
)
INITS = (
    Entry(
        "Kaiming",
        'init="kaiming"',
        "A uniform in +-1 / sqrt(in), B = 0",
        "What the reference implementation does.",
        "First.",
        "arXiv:2106.09685",
    ),
    Entry(
        "Gaussian",
        'init="gaussian"',
        "A normal with deviation 1 / r, B = 0",
        "What the paper's text says.",
        "To repeat a run that used it.",
        "arXiv:2106.09685",
    ),
    Entry(
        "Orthogonal",
        'init="orthogonal"',
        "B A = 0 with A and B from one rotation",
        "Neither factor is zero, so both learn from the first step.",
        "When the first steps matter; the rank must be even.",
    ),
    Entry(
        "PiSSA",
        'init="pissa"',
        "B A = the top r singular directions of W",
        "Training begins with the directions that W uses most. The base stays as it is: the start is kept beside the "
        "adapter and subtracted.",
        "For short runs at a low rate. The file is a plain LoRA of rank 2 r, right on the unchanged base.",
        "arXiv:2404.02948",
    ),
    Entry(
        "OLoRA",
        'init="olora"',
        "B A = the first r columns and rows of W = Q R",
        "As PiSSA, with a QR decomposition, which is quicker.",
        "As PiSSA.",
        "arXiv:2406.01775",
    ),
    Entry(
        "LoftQ",
        'init="loftq"',
        "B A = the low-rank part of W - Q(W)",
        "Begins with what packing the base in few bits has lost.",
        "For a base in 4 bits, whose error the adapter would first have to learn away.",
        "arXiv:2310.08659",
    ),
    Entry(
        "EVA",
        'init="eva"',
        "A = the top right singular vectors of the inputs, B = 0",
        'Looks at a few batches and shares the ranks out by how much variance a direction explains; `"eva_uniform"` '
        "keeps all ranks equal. Inputs are large along these directions, so rates are lower than LoRA's.",
        "When data are at hand before the start, and layers differ.",
        "arXiv:2410.07170",
    ),
    Entry(
        "CorDA",
        'init="corda"',
        "B A = the top r components of W C C^-1, C = X^T X",
        'Begins with what matters most to these data; `"corda_kpm"` with what matters least, so that what the data '
        "show is kept.",
        "To learn one task hard (`corda`), or to learn without forgetting another (`corda_kpm`).",
        "arXiv:2406.05223",
    ),
    Entry(
        "LoRA-GA",
        'init="lora_ga"',
        "A and B along the top singular directions of dL/dW",
        "The first step moves along the gradient that full training would have.",
        "For short runs; needs batches with labels before the start.",
        "arXiv:2407.05000",
    ),
)
SCALINGS = (
    Entry(
        "Plain",
        'scaling="lora"',
        "s = alpha / r",
        "The larger the rank, the smaller the share of each direction.",
        "First, for ranks up to about 64.",
        "arXiv:2106.09685",
    ),
    Entry(
        "rsLoRA",
        'scaling="rslora"',
        "s = alpha / sqrt(r)",
        "Keeps what an adapter does at a given rate independent of its rank.",
        "For high ranks.",
        "arXiv:2312.03732",
    ),
    Entry("Constant", 'scaling="constant"', "s = alpha", "The scale itself.", "When a recipe states s, not alpha."),
)
SECTIONS = {
    "What is learned": DELTAS,
    "How it joins the weight": COMBINES,
    "Where it starts": INITS,
    "How it is scaled": SCALINGS,
}


def page(found: Mapping[str, Any]) -> str:
    parts = [INTRO, CURVES.format(**found["about"]), table(found["runs"])]
    for title, entries in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts += [text(entry, found["runs"]) for entry in entries]
    return "\n".join(parts)


def text(entry: Entry, runs: Mapping[str, Any]) -> str:
    paper = f" ([{entry.paper}](https://arxiv.org/abs/{entry.paper.removeprefix('arXiv:')}))" if entry.paper else ""
    return f"### {entry.title}\n\n`{entry.word}`: **`{entry.formula}`**{paper}. {entry.what} *When:* {entry.use}\n"


def table(runs: Mapping[str, Any]) -> str:
    lines = ["| | parameters | rate | held-out loss | PEFT | accuracy | PEFT |", "| --- |" + " ---: |" * 6]
    for name, run in ordered(runs):
        own, peer = run["veneer"], run.get("peft")
        theirs = (f"{peer['losses'][-1][1]:.3f}", f"{100 * peer['accuracy']:.1f} %") if peer else ("", "")
        cells = [f"{own['parameters']:,}", f"{own['rate']:g}", f"{own['losses'][-1][1]:.3f}", theirs[0]]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{100 * own['accuracy']:.1f} %", theirs[1]]) + " |")
    return "\n".join(lines) + "\n"


def ordered(runs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The runs in the page's order."""
    words = [entry.word.split('"')[1] for entries in SECTIONS.values() for entry in entries]
    yield from sorted(runs.items(), key=lambda item: words.index(item[0]) if item[0] in words else len(words))


# --- the picture ----------------------------------------------------------------------------------------------------

ACROSS, WIDE, HIGH, LEFT, TOP, GAP = 4, 190, 120, 44, 64, 34
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.t{font-weight:600}.s{font-size:10px;fill:#666}"
    ".g{stroke:#e4e4e4}.a{fill:none;stroke:#0b6e99;stroke-width:2}"
    ".b{fill:none;stroke:#e07a1f;stroke-width:4.5;stroke-opacity:.45;stroke-linecap:round}"
)


def picture(runs: Mapping[str, Any]) -> str:
    """One small plot a method, all with the same axes: ours a thin line on PEFT's broad one."""
    losses = [y for run in runs.values() for own in run.values() for _, y in own["losses"]]
    steps = max(x for run in runs.values() for own in run.values() for x, _ in own["losses"])
    low, high = min(losses) - 0.02, max(losses) + 0.02
    rows = -(-len(runs) // ACROSS)
    width, height = ACROSS * (WIDE + GAP) + LEFT - GAP + 12, TOP + rows * (HIGH + GAP + 14)
    ink = [f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>', *_legend()]
    for k, (name, run) in enumerate(ordered(runs)):
        x, y = LEFT + k % ACROSS * (WIDE + GAP), TOP + k // ACROSS * (HIGH + GAP + 14)
        ink.append(f'<g transform="translate({x} {y})">{"".join(_plot(name, run, steps, low, high))}</g>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *ink, "</svg>"]) + "\n"


def _legend() -> Iterator[str]:
    yield f'<text class="t" x="{LEFT}" y="24">Held-out loss by step</text>'
    yield f'<path class="a" d="M{LEFT + 170} 20h26"/><text x="{LEFT + 202}" y="24">Veneer</text>'
    yield f'<path class="b" d="M{LEFT + 262} 20h26"/><text x="{LEFT + 294}" y="24">PEFT, from the same start</text>'


def _plot(name: str, run: Mapping[str, Any], steps: int, low: float, high: float) -> Iterator[str]:
    def line(points: Sequence[tuple[float, float]], kind: str) -> str:
        spots = [f"{WIDE * x / steps:.1f} {HIGH * (high - y) / (high - low):.1f}" for x, y in points]
        return f'<path class="{kind}" d="M{"L".join(spots)}"/>'

    yield f'<text class="t" x="0" y="-6">{name}</text>'
    for value in (v / 10 for v in range(0, 20, 2) if low <= v / 10 <= high):
        at = HIGH * (high - value) / (high - low)
        yield f'<path class="g" d="M0 {at:.1f}h{WIDE}"/><text class="s" x="-24" y="{at + 3:.1f}">{value}</text>'
    for at in (0, steps // 2, steps):
        yield f'<text class="s" x="{WIDE * at / steps - 5:.0f}" y="{HIGH + 13}">{at}</text>'
    if "peft" in run:
        yield line(run["peft"]["losses"], "b")
    yield line(run["veneer"]["losses"], "a")


if __name__ == "__main__":
    results = json.loads(RESULTS.read_text())
    PAGE.write_text(page(results))
    PICTURE.write_text(picture(results["runs"]))
    print(PAGE, PICTURE)
