"""P5: the merged weights are the adapted model, and unmerging gives the base back.

Logits alone cannot prove this in a narrow type: in bf16 the rounding of every product already moves them as far as a
lost layer might. So each layer is held to its own claim first. The weight that merging should have written, W + dW
rounded once to the stored type, is multiplied with a few random signs before the merge, and the weight that it did
write after (Freivalds' check of a product): they agree only if the layer was merged, once, with the right scale. Then
come the logits, then the bits of the base after unmerging.

How much of dW survives the rounding is another matter and no fault of the merge; it is measured and said.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veneer.core.leaf import own_parameters
from veneer.core.model import adapter_of, is_merged, merge, sites, unmerge
from veneer.core.op import op_of
from veneer.core.weight import is_plain, read_weight
from veneer.errors import StateError
from veneer.prove.answers import Subject, gap, limit, same_bits
from veneer.prove.fingerprint import fingerprints
from veneer.prove.proof import Check, LeftOut

__all__ = ["merges_and_returns"]

TITLE = "Merge"
LIMIT_BYTES = 6 << 30  # merging holds the adapted weights twice for a moment; above this the proof would risk the run
SIGNS = 4  # random vectors per layer
OFF = {torch.float32: 1e-3, torch.float64: 1e-6}  # share of a layer's change that the order of sums may spoil
NARROW = 0.25  # the same for narrow types, where a tie in rounding moves an element by a whole unit
DULL = 0.9  # below this share of dW kept, the sentence warns


def merges_and_returns(subject: Subject) -> Check | LeftOut:
    model, name = subject.model, subject.name
    if reason := _reason_not_to(model, name):
        return LeftOut("P5", TITLE, reason)
    wanted, was = _probes(model, name, planned=True), _probes(model, name)
    before = fingerprints(_weights(model, name))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what merging would warn of is in the statement
            kept = merge(model, name).kept
        got, merged = _probes(model, name), subject.now()
    except StateError as error:  # tied weights: a merge would change layers that the adapter does not belong to
        return LeftOut("P5", TITLE, " ".join([error.what, *error.problems[:2]]))
    finally:
        if is_merged(model):
            unmerge(model)
    types = {site: read_weight(layer).dtype for site, layer in sites(model, name).items() if site in wanted}
    wrong = [s for s in wanted if not _agree(got[s], wanted[s], was[s], OFF.get(types[s], NARROW))]
    changed = fingerprints(_weights(model, name)).differing(before)
    return _verdict(subject, wrong, changed, gap(merged, subject.adapted), kept)


def _verdict(subject: Subject, wrong: list[str], changed: list[str], apart: float, kept: Mapping[str, float]) -> Check:
    allowed, share = limit(subject.adapted), min(kept.values(), default=1.0)
    back = not changed and same_bits(subject.now(), subject.adapted)
    said = f"Merged, the model gives the adapted logits (largest difference {apart:.2g}, {allowed:.2g} allowed); "
    said += "unmerged, every weight has its old bits."
    if share < DULL:
        worst = min(kept, key=lambda site: kept[site])
        kind = str(read_weight(sites(subject.model)[worst]).dtype).removeprefix("torch.")
        said += f" But {kind} keeps only {100 * share:.0f} % of dW in {worst}: merge into fp32."
    if not back:
        said = f"Unmerging did not give the old weights back: {', '.join(changed[:3]) or 'the answers differ'}."
    if not apart <= allowed:
        said = f"The merged model answers otherwise: off by {apart:.3g}, {allowed:.2g} is allowed."
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        said = f"The merged weight is not W + dW in {', '.join(wrong[:3])}{more}."
    return Check(
        "P5", TITLE, back and apart <= allowed and not wrong, said,
        {"largest_difference": apart, "allowed": allowed, "share_of_dw_kept": share, "wrong_layers": wrong,
         "changed_after_unmerge": changed},
    )  # fmt: skip


def _reason_not_to(model: nn.Module, name: str) -> str | None:
    """Why a trial merge would prove nothing, or harm."""
    layers = sites(model, name)
    packed = [site for site, layer in layers.items() if adapter_of(layer, name).delta and not _is_plain(layer)]
    if packed:
        return f"The base is stored in a packed form ({packed[0]}): merge into the full-precision base on disk instead."
    held = sum(t.numel() * t.element_size() for t in _weights(model, name).values())
    if held > LIMIT_BYTES:
        size = f"{held / 1e9:.1f} GB"
        return f"The adapted weights take {size}, and a trial merge holds them twice. `veneer merge` proves its own."
    return None


def _is_plain(layer: nn.Module) -> bool:
    raw = own_parameters(layer).get("weight")
    return raw is not None and is_plain(raw)


def _weights(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The stored tensors that a merge of `name` may write."""
    found = {}
    for site, layer in sites(model, name).items():
        for leaf in ("weight", "bias"):
            if (raw := own_parameters(layer).get(leaf)) is not None:
                found[f"{site}.{leaf}"] = raw
    return found


def _probes(model: nn.Module, name: str, planned: bool = False) -> dict[str, Tensor]:
    """Each layer's weight times random signs: as it is stored now, or as the merge ought to store it."""
    found, source = {}, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site, layer in sites(model, name).items():
            adapter = adapter_of(layer, name)
            if adapter.delta is None:
                continue
            stored = read_weight(layer)
            matrix = op_of(layer).to_matrix(layer, stored).to(torch.promote_types(stored.dtype, torch.float32))
            if planned:
                matrix = adapter.weight(matrix).to(stored.dtype).to(matrix.dtype)
            signs = torch.randint(0, 2, (matrix.shape[-1], SIGNS), generator=source) * 2.0 - 1
            found[site] = (matrix @ signs.to(matrix)).double().cpu()
    return found


def _agree(got: Tensor, wanted: Tensor, was: Tensor, off: float) -> bool:
    """Whether the change of a layer is the wanted one, up to what the order of sums may do."""
    floor = 4 * torch.finfo(torch.float32).eps * float(was.norm())
    return float((got - wanted).norm()) <= off * float((wanted - was).norm()) + floor
