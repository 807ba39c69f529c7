"""Merge adapters into a model on disk, shard by shard, without ever holding the model.

    merge_to_disk("org/model", "runs/a/adapter", "merged")
    merge_to_disk("models/base", {"runs/sql": 0.7, "runs/tone": 0.3}, "merged", dtype=torch.bfloat16)

What is in memory at any time is the adapters and a few megabytes of one tensor: tensors that no adapter touches are
copied from file to file by the kernel, and the others pass through in pieces of rows (rows.py), always through the
same few buffers, and are written behind a header that was known before the first byte. So a 14 GB model needs less
memory than one of its shards, and takes about as long as a copy.

Layers, shapes and ties come from a model built from the config on the meta device, where weights have shapes but no
values. Each merged tensor is proven while it is written: its output for a random input is the adapted layer's output,
up to the rounding of the stored type. The folder appears under its name when all of it is there and proven.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.ckpt.atomic import atomic_folder
from veneer.ckpt.hub import find
from veneer.ckpt.layout import is_stack
from veneer.ckpt.peft import load
from veneer.ckpt.plan import FLOATS, Edit, Item, Plan
from veneer.ckpt.rows import Result, merged_rows
from veneer.ckpt.shards import model_folder, shard_names
from veneer.ckpt.skeleton import read_json, skeleton_of, task_config
from veneer.ckpt.tensorfile import Stored, TensorFile, Writer, writing
from veneer.core.model import activate
from veneer.errors import CheckpointError, ProofFailed

__all__ = ["Streamed", "merge_to_disk"]

Report = Callable[[dict[str, Any]], None]

PIECE = 1 << 20  # elements at a time where rows do not matter
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
OF_THE_BASE = ("README.md", ".gitattributes")
TRAINED_WITH = """
    tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json vocab.json vocab.txt
    merges.txt chat_template.jinja generation_config.json
"""  # an adapter's own copies win: the merged model must be run with what it was trained with


@dataclass
class Streamed:
    """What merge_to_disk did. By tensor: `kept` is the share of dW that survived rounding, `excess` the proof's worst
    error in units of what rounding allows (with more than 1 nothing is written and ProofFailed is raised)."""

    path: Path
    bytes: int = 0
    seconds: float = 0.0
    shards: int = 0
    kept: dict[str, float] = field(default_factory=dict)
    excess: dict[str, float] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    logits_error: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        return min(self.kept.values(), default=1.0)

    def __str__(self) -> str:
        rate = self.bytes / 2**20 / max(self.seconds, 1e-9)
        return (
            f"{len(self.kept)} tensors merged into {self.path}: {self.bytes / 1e9:.2f} GB in {self.seconds:.1f} s "
            f"({rate:.0f} MiB/s), at least {100 * self.share:.1f} % of dW kept, every output within rounding"
        )


def merge_to_disk(
    base: str | os.PathLike[str],
    adapters: str | os.PathLike[str] | Mapping[Any, float],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    untie: bool = False,
    prove_logits: bool = False,
    allow_other_base: bool = False,
    allow_nan: bool = False,
    skeleton: nn.Module | None = None,
    trust_remote_code: bool = False,
    report: Report | None = None,
) -> Streamed:
    """Write base + adapters to the folder `out`.

    adapters: a folder, or folders with the weight that each dW is multiplied by. dtype: the type to store weights in;
    the base's unless given. max_shard_size: in bytes; the base's own division unless given. untie: give a tied head and
    embedding weights of their own where an adapter changes one, instead of refusing. prove_logits: load both models
    afterwards and compare their logits (for small models). skeleton: the base on the meta device, for models that
    transformers cannot build from their config.json.

    Raises before anything is written if adapter and base do not belong together, and leaves nothing behind if it fails
    later.
    """
    began, folder = time.monotonic(), model_folder(base)
    paths = _adapter_paths(adapters)
    if Path(out).exists() and Path(out).resolve() == folder.resolve():
        raise CheckpointError("The merged model would replace its own base.", str(out), "choose another folder")
    plan = Plan(folder, skeleton if skeleton is not None else skeleton_of(folder, paths, trust_remote_code), untie)
    for path, weight in paths.items():
        plan.add(path, weight, allow_other_base=allow_other_base, allow_nan=allow_nan)
    layout = plan.layout(dtype, max_shard_size)
    result = Streamed(Path(out), sum(i.bytes for items in layout for i in items), shards=len(layout), notes=plan.notes)
    _check_space(Path(out), result.bytes)
    with atomic_folder(out) as temp:
        _write(plan, layout, temp, result, report or (lambda event: None))
        _copy_files(plan, list(paths), temp, dtype)
        if prove_logits:
            exact = all(i.dtype == torch.float32 for items in layout for i in items if i.parameter in plan.edits)
            result.logits_error = _compare_logits(plan, paths, temp, 1e-3 if exact else 0.2)
    result.seconds = time.monotonic() - began
    _tell(result)
    return result


def _adapter_paths(adapters: str | os.PathLike[str] | Mapping[Any, float]) -> dict[Path, float]:
    weights = adapters if isinstance(adapters, Mapping) else {adapters: 1.0}
    if not weights:
        raise CheckpointError("There is no adapter to merge.", None, "name the folder of one")
    return {find(where): float(weight) for where, weight in weights.items()}


def _tell(result: Streamed) -> None:
    if result.share < 0.9:
        worst = min(result.kept, key=result.kept.__getitem__)
        result.notes.append(
            f"only {100 * result.share:.0f} % of dW survived rounding in {worst}: the type is too coarse for so small "
            "a change. dtype=torch.float32 keeps it, and so does serving the adapter unmerged"
        )
    for note in result.notes:
        warnings.warn(note, stacklevel=3)


# ---------------------------------------------------------------- writing


def _write(plan: Plan, layout: list[list[Item]], folder: Path, result: Streamed, report: Report) -> None:
    names, done = shard_names(len(layout)), 0
    for name, items in zip(names, layout, strict=True):
        announced = {item.name: (item.dtype, item.shape) for item in items}
        with writing(folder / name, announced) as writer:
            for item in items:
                _write_item(plan, item, writer, result)
                done += item.bytes
                report({"event": "merge", "tensor": item.name, "bytes": done, "total_bytes": result.bytes})
    if len(names) > 1:
        table = {item.name: name for name, items in zip(names, layout, strict=True) for item in items}
        index = {"metadata": {"total_size": result.bytes}, "weight_map": dict(sorted(table.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_item(plan: Plan, item: Item, writer: Writer, result: Streamed) -> None:
    edit, stored = plan.edits.get(item.parameter), item.stored
    if edit is not None and edit.deltas and stored is not None:
        _write_merged(plan, item, stored, writer, result)
    elif edit is not None:
        for piece in _whole(edit, stored, plan.adapters):
            writer.write(item.name, piece.to(item.dtype))
        result.whole += (item.name,)
    elif stored is not None and stored.dtype == item.dtype:
        writer.copy(item.name, stored)
    elif stored is not None:
        for _, piece in _pieces(stored):
            writer.write(item.name, piece.to(item.dtype))


def _write_merged(plan: Plan, item: Item, stored: Stored, writer: Writer, result: Streamed) -> None:
    figures = Result()
    for expert, matrix in _matrices(plan.edits[item.parameter], stored):
        for piece in merged_rows(matrix, plan.changes(item.parameter, matrix, expert), item.dtype, figures):
            writer.write(item.name, piece)
    result.kept[item.name], result.excess[item.name] = figures.kept, figures.excess
    if not figures.is_finite:
        raise ProofFailed(f"{item.name} has values that {item.dtype} cannot hold", fix="dtype=torch.bfloat16")
    if not figures.excess <= 1:
        raise ProofFailed(
            f"the merged {item.name} computes something else than the adapted layer ({figures.excess:.1f} times more "
            "error than rounding explains); nothing was written",
            fix="this is a defect of veneer: please report it with the adapter's config",
        )


def _matrices(edit: Edit, stored: Stored) -> Iterator[tuple[int | None, Stored]]:
    """The matrices that a stored tensor holds: itself, or one for each expert of a stack."""
    fitted, site, _ = edit.deltas[0]
    if not is_stack(fitted.hosts[site]):
        yield None, stored
        return
    size = stored.bytes // stored.shape[0]
    for expert in range(stored.shape[0]):
        yield expert, dataclasses.replace(stored, shape=stored.shape[1:], start=stored.start + expert * size)


def _whole(edit: Edit, stored: Stored | None, adapters: list[TensorFile]) -> Iterator[Tensor]:
    """base + sum of weight * (theirs - base), in pieces and in fp32; what cannot be added (counters) is replaced."""
    theirs = [(tensor.reshape(-1), weight) for tensor, weight in edit.whole]
    if stored is None or stored.dtype not in FLOATS:
        yield theirs[-1][0]
        return
    for i, piece in _pieces(stored):
        base = piece.float()
        total = base.clone()
        for tensor, weight in theirs:
            total += weight * (tensor[i : i + PIECE].float() - base)
        for tensor, weight in edit.added:
            total += weight * tensor.reshape(-1)[i : i + PIECE]
        yield total
        for file in adapters:
            file.forget(0, file.size)


def _pieces(stored: Stored) -> Iterator[tuple[int, Tensor]]:
    """A stored tensor flat and a piece at a time, each only good until the next; with the number of its first."""
    count = math.prod(stored.shape)
    buffer = torch.empty(min(PIECE, count), dtype=stored.dtype)
    for i in range(0, count, PIECE):
        yield i, stored.read(buffer[: min(PIECE, count - i)], i)


def _check_space(out: Path, needed: int) -> None:
    parent = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"The merged model needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free.",
            str(out),
            "free some space, choose another disk, or store it in a narrower type (dtype=torch.bfloat16)",
        )


def _copy_files(plan: Plan, adapters: list[Path], folder: Path, dtype: torch.dtype | None) -> None:
    """Tokenizer, template, generation settings and code beside the weights, and a config that tells the truth."""
    for source in sorted(plan.folder.iterdir()):
        if source.is_file() and not source.name.endswith(WEIGHT_FILES) and source.name not in OF_THE_BASE:
            shutil.copyfile(source, folder / source.name)
    if len(adapters) == 1:
        for name in TRAINED_WITH.split():
            source, target = adapters[0] / name, folder / name
            if source.is_file():
                if target.is_file() and source.read_bytes() != target.read_bytes():
                    plan.notes.append(f"{name} is the adapter's, not the base's")
                shutil.copyfile(source, target)
    if (plan.folder / "config.json").is_file():
        config = read_json(plan.folder / "config.json") | task_config(plan.skeleton)
        if plan.untied:
            config["tie_word_embeddings"] = False
        if dtype is not None:
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _compare_logits(plan: Plan, paths: Mapping[Path, float], merged: Path, limit: float) -> float:
    """How far the merged model's outputs are from the adapted base's, in units of what the adapters change."""
    skeleton: Any = plan.skeleton
    kind, config = type(skeleton), skeleton.config
    ids = torch.randint(0, config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    model = kind.from_pretrained(plan.folder, dtype=torch.float32, config=config).eval()
    with torch.no_grad():
        base = model(ids).logits
        for i, path in enumerate(paths):
            load(model, path, f"adapter{i}", allow_other_base=True)
        activate(model, {f"adapter{i}": weight for i, weight in enumerate(paths.values())})
        expected = model(ids).logits
        del model
        got = kind.from_pretrained(merged, dtype=torch.float32).eval()(ids).logits
    error = float((got - expected).abs().max() / (expected - base).abs().max().clamp_min(1e-6))
    if not error <= limit:
        raise ProofFailed(
            f"the merged model's logits are {100 * error:.1f} % of the adapter's effect away from the adapted model's",
            fix="dtype=torch.float32 keeps all of dW",
        )
    return error
