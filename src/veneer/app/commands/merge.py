"""veneer merge: an adapter into its base, shard by shard on disk; or several adapters into one adapter.

    veneer merge A --out DIR                       base + A, a model
    veneer merge A:0.7 B:0.3 --into-base --out DIR base + 0.7 A + 0.3 B, a model
    veneer merge A:0.7 B:0.3 --out DIR             one adapter that does the same

Weights multiply dW. A model is written without ever being in memory whole; a mixture of adapters loads the base, since
some methods need its layers.
"""

from __future__ import annotations

import argparse
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.app.output import Output
from veneer.app.subjects import source_of
from veneer.app.text import bytes_, duration, plural, share
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.infer.load import Source

EXAMPLES = """  veneer merge runs/support-0917-a1 --out merged
  veneer merge runs/sql:0.7 runs/tone:0.3 --out both               one adapter, exact (cat)
  veneer merge runs/sql runs/tone --method ties --density 0.3 --out both
  veneer merge runs/sql:0.7 runs/tone:0.3 --into-base --out model"""

METHODS = ["cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
CARRIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.jinja")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="A[:WEIGHT]", help="runs or adapters' folders")
    parser.add_argument("--out", "-o", required=True, metavar="DIR", help="where the result goes; must not exist")
    parser.add_argument("--into-base", action="store_true", help="write a whole model (so does a single adapter)")
    parser.add_argument("--base", metavar="MODEL", help="the base model [what the adapter says]")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="type of the model's weights [the base's]")
    parser.add_argument("--untie", action="store_true", help="give tied embeddings weights of their own, if need be")
    parser.add_argument("--prove", action="store_true", help="load both models afterwards and compare their logits")
    parser.add_argument("--method", choices=METHODS, default="cat", help="how adapters are mixed [cat: the exact sum]")
    parser.add_argument("--rank", type=int, metavar="N", help="largest rank of the mixture, for all methods but cat")
    parser.add_argument(
        "--density", type=float, default=0.5, metavar="X", help="share kept by ties, dare and prune [0.5]"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="for dare's random choice [0]")
    parser.add_argument("--root", default="runs", help="the folder that holds the runs [runs]")


def run(args: argparse.Namespace, out: Output) -> int:
    weighted = [_weighted(word) for word in args.adapters]
    sources = [source_of(word, args.root, args.base) for word, _ in weighted]
    weights = [weight for _, weight in weighted]
    _check(sources, args)
    if args.into_base or len(sources) == 1:
        return into_base(sources, weights, args, out)
    return into_adapter(sources, weights, args, out)


def _weighted(word: str) -> tuple[str, float]:
    """
    >>> _weighted("runs/a:0.7"), _weighted("runs/a"), _weighted("C:/runs/a")
    (('runs/a', 0.7), ('runs/a', 1.0), ('C:/runs/a', 1.0))
    """
    name, colon, weight = word.rpartition(":")
    try:
        return (name, float(weight)) if colon else (word, 1.0)
    except ValueError:
        return word, 1.0


def _check(sources: list[Source], args: argparse.Namespace) -> None:
    bare = [source.label for source in sources if source.adapter is None]
    if bare:
        raise ConfigError(f"no adapter: {', '.join(bare)}", "command line", "name a run or an adapter's folder")
    painting = [source.label for source in sources if source.task == "diffusion"]
    if painting:
        fix = (
            "in Python: veneer.load_shared(pipeline, ADAPTER), veneer.merge(pipeline.unet, keep_base=False), or of "
            "whichever of its models has it, and pipeline.save_pretrained(...)"
        )
        raise ConfigError(f"only models in one folder are merged on disk: {', '.join(painting)}", "command line", fix)
    bases = {source.base for source in sources}
    if len(bases) > 1:
        fix = "adapters can only be added on one base; --base names it if these are copies"
        raise ConfigError(f"the adapters belong to {len(bases)} bases: {', '.join(sorted(bases))}", "command line", fix)
    if len({source.adapter for source in sources}) < len(sources):
        raise ConfigError("an adapter is named twice", "command line", "give it a weight: A:2")
    target = Path(args.out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("there are files already, and nothing is ever overwritten", args.out, "choose another --out")


# ------------------------------------------------------------------ a model


def into_base(sources: list[Source], weights: list[float], args: argparse.Namespace, out: Output) -> int:
    import torch

    from veneer.ckpt.stream import merge_to_disk
    from veneer.extras import quiet

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(args.dtype)
    paths = {source.adapter: weight for source, weight in zip(sources, weights, strict=True)}
    with out.wait(f"merging into {sources[0].base}"), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the notes are printed below
        done = merge_to_disk(sources[0].base, paths, args.out, dtype=dtype, untie=args.untie, prove_logits=args.prove)
    value = {
        "out": str(done.path),
        "bytes": done.bytes,
        "seconds": done.seconds,
        "tensors": len(done.kept),
        "kept_share": done.share,
        "logits_error": done.logits_error,
        "notes": done.notes,
    }
    lines = [
        f"{out.signs.ok} merged   {plural(len(done.kept), 'tensor')} of {sources[0].base} in {duration(done.seconds)}, "
        f"{bytes_(done.bytes)}; every output proved within rounding",
        f"  kept     at least {share(done.share)} of dW after rounding to the stored type",
    ]
    if done.logits_error is not None:
        lines.append(f"{out.signs.ok} proof    merged equals adapted: logits differ by at most {done.logits_error:.2g}")
    lines += [f"{out.signs.warn} {note}" for note in done.notes]
    out.result(value, lambda console: _print(console, [*lines, f"saved {done.path}   next: veneer chat {done.path}"]))
    return 0


# ------------------------------------------------------------------ an adapter


def into_adapter(sources: list[Source], weights: list[float], args: argparse.Namespace, out: Output) -> int:
    from veneer.ckpt.peft import save
    from veneer.core.mixing import combine
    from veneer.infer.load import load, same_storage

    named = [replace(source, label=f"{source.label}#{i}") for i, source in enumerate(sources, 1)]
    if not all(same_storage(named[0], source) for source in named):
        out.note(f"{out.signs.dot} trained on one base in different storages, so their proofs are not replayed")
        named = [replace(source, quant=None, proof=None) for source in named]
    with out.wait(f"loading {sources[0].base}"):
        ready = load(named, device="cpu", dtype="fp32", say=lambda line: None)
    mixture = {str(source.name): weight for source, weight in zip(named, weights, strict=True)}
    with out.wait(f"mixing {plural(len(sources), 'adapter')} by {args.method}"):
        mixed = combine(
            ready.model, mixture, "default", args.method, rank=args.rank, density=args.density, seed=args.seed
        )
        path = save(ready.model, args.out)
        _carry(sources[0], path)
    worst = max(mixed.errors.values(), default=0.0)
    value: dict[str, Any] = {
        "out": str(path),
        "method": args.method,
        "layers": len(mixed.ranks),
        "ranks": sorted(set(mixed.ranks.values())),
        "largest_error": worst,
        "errors": mixed.errors,
    }
    ranks = "-".join(str(rank) for rank in value["ranks"])
    exact = "exact" if worst < 1e-6 else f"off by at most {share(worst)} in a layer"
    parts = " + ".join(f"{weight:g} x {source.label}" for source, weight in zip(sources, weights, strict=True))
    lines = [
        f"{out.signs.ok} mixed    {parts} by {args.method}: {plural(len(mixed.ranks), 'layer')}, rank {ranks}, {exact}",
        f"saved {path}   next: veneer chat {path} --vs base",
    ]
    out.result(value, lambda console: _print(console, lines))
    return 0


def _carry(source: Source, out: Path) -> None:
    """The tokenizer and template that the first adapter was trained with go along."""
    if source.adapter is not None:
        for pattern in CARRIED:
            for file in source.adapter.glob(pattern):
                shutil.copy2(file, out / file.name)


def _print(console: Any, lines: list[str]) -> None:
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
