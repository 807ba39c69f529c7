"""The canary: what the adapted model said to a few prompts, written down to be asked again wherever it is loaded.

A server, a converter or a colleague's laptop replays it and knows in a second whether what it loaded is what was
trained. Beside each answer stands what the base would have said, so the replay can call the commonest failure by its
name: the adapter is not applied. Prompts are asked one by one and without padding, so no batch has a say in it. They
are stored as token ids and, where that is the same, as text: a changed tokenizer is told from a changed model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.model import activate, adapters, is_merged
from veneer.errors import StateError
from veneer.prove.answers import Inputs, Subject, call, first_tensor, full_precision, shows_pictures
from veneer.prove.found import as_found, bare
from veneer.prove.proof import Check, Proof

__all__ = ["canary_of", "replay"]

TITLE = "Canary"
PROMPTS, TOP = 4, 5  # prompts that are kept; tokens or classes that are written down for each
CLOSE = {"float64": 1e-3, "float32": 1e-3, "float16": 2e-2, "bfloat16": 6e-2}  # of the largest logit, on other machines
IDS = ("input_ids", "decoder_input_ids")

Row = dict[str, Any]


def canary_of(subject: Subject, tokenizer: Any | None = None) -> dict[str, Any]:
    """Empty for a model that does not read token ids alone: its inputs would be too large to write down."""
    prompts = [row for inputs in subject.inputs for row in _rows(inputs)][:PROMPTS]
    if not prompts or not all(answer.are_logits for answer in subject.adapted):
        return {}
    activate(subject.model, subject.name)
    adapted = [_ask(subject.model, row) for row in prompts]
    with bare(subject.model):
        base = [_ask(subject.model, row) for row in prompts]
    rows = [_written(row, ours, theirs, tokenizer) for row, ours, theirs in zip(prompts, adapted, base, strict=True)]
    word = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
    return {"rows": rows, "dtype": str(adapted[0].dtype).removeprefix("torch."), "hash": word}


@full_precision()
def replay(
    model: nn.Module, proof: Proof | str | Path, tokenizer: Any | None = None, *, name: str | None = None
) -> Check:
    """Ask `model` the canary's prompts again. `name`: the adapter's name here; a merged model is asked as it stands."""
    proof = proof if isinstance(proof, Proof) else Proof.load(proof)
    rows = proof.canary.get("rows")
    if not rows:
        raise StateError("this proof has no canary", fix="only models that read token ids leave one")
    with as_found(model):
        if adapters(model) and not is_merged(model):
            activate(model, name or proof.adapter)
        now = [_ask(model, row) for row in rows]
    return _verdict(proof.canary, now, tokenizer)


def _verdict(canary: Mapping[str, Any], now: Sequence[Tensor], tokenizer: Any | None) -> Check:
    rows = canary["rows"]
    apart = [_apart(answer, row, "logits") for answer, row in zip(now, rows, strict=True)]
    from_base = [_apart(answer, row, "base_logits") for answer, row in zip(now, rows, strict=True)]
    kinds = {str(canary["dtype"]), str(now[0].dtype).removeprefix("torch.")}
    allowed = max(CLOSE.get(kind, CLOSE["bfloat16"]) for kind in kinds)
    respelt = [row["text"] for row in rows if tokenizer is not None and "text" in row and _respelt(row, tokenizer)]
    passed = max(apart) <= allowed and not respelt
    said = f"{len(rows)} prompts are answered as when the adapter was proved (off by {100 * max(apart):.2g} %)."
    if not max(apart) <= allowed:
        said = "The answers are not those of the proved adapter: "
        said += f"off by {100 * max(apart):.3g} %, {100 * allowed:g} % is allowed."
        if max(from_base) <= allowed:
            said = "The answers are the base's: the adapter is not applied."
    elif respelt:
        said = f"The tokenizer reads {respelt[0]!r} as other tokens than in training."
    figures = {"off": max(apart), "off_from_base": max(from_base), "allowed": allowed, "prompts": len(rows)}
    return Check("P8", TITLE, passed, said, figures, "canary replayed")


def _rows(inputs: Inputs) -> list[Row]:
    """The prompts of a batch as lists of ids, without padding."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or shows_pictures(inputs):
        return []
    mask = inputs.get("attention_mask")  # type: ignore[union-attr]
    keep = torch.ones_like(ids) if not isinstance(mask, Tensor) or mask.shape != ids.shape else mask
    keep = keep.bool()
    rows: list[Row] = [{"input_ids": row[kept].tolist()} for row, kept in zip(ids.cpu(), keep.cpu(), strict=True)]
    target = inputs.get("decoder_input_ids")  # type: ignore[union-attr]
    if isinstance(target, Tensor):
        rows = [{**row, "decoder_input_ids": own.tolist()} for row, own in zip(rows, target.cpu(), strict=True)]
    return [row for row in rows if row["input_ids"]]


def _ask(model: nn.Module, row: Mapping[str, Any]) -> Tensor:
    """The logits after a prompt: of the last token, or of the classes."""
    with torch.no_grad():
        output = call(model, {key: torch.tensor([row[key]]) for key in IDS if key in row})
    values = first_tensor(output)
    return values.reshape(-1, values.shape[-1])[-1].cpu()


def _written(row: Row, ours: Tensor, base: Tensor, tokenizer: Any | None) -> Row:
    top = ours.float().topk(min(TOP, len(ours))).indices
    told = {**row, "top": top.tolist(), "logits": _short(ours[top]), "base_logits": _short(base[top])}
    told["largest"] = _short(ours.abs().max()[None])[0]
    if tokenizer is not None:
        text = tokenizer.decode(row["input_ids"])
        if not _respelt({**row, "text": text}, tokenizer):
            told["text"] = text
    return told


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def _apart(answer: Tensor, row: Mapping[str, Any], which: str) -> float:
    """The largest difference at the tokens written down, as a share of the largest logit."""
    if max(row["top"]) >= len(answer):
        return float("inf")
    found = float((answer.double()[row["top"]] - torch.tensor(row[which], dtype=torch.float64)).abs().max())
    return found / max(row["largest"], 1e-30) if found == found else float("inf")


def _respelt(row: Mapping[str, Any], tokenizer: Any) -> bool:
    return list(tokenizer(row["text"], add_special_tokens=False)["input_ids"]) != list(row["input_ids"])
