"""P7: the base is what its files hold.

All other proofs compare a model with itself. A base that was read wrongly - a layer with another one's weights, scales
of other blocks, a tensor that was never filled - is the same wrong base with the adapter and without it, and an adapter
learns on it. So a few rows of every tensor are read anew from the safetensors files and held against the model's own:
bit for bit where nothing is packed, and within what rounding leaves where it is (`Storage.off_by`). Who loaded it is
not asked; of transformers only its table of names is used (`ckpt/origin.py`).

Every parameter must have values, and lie in the files in its shape. What the files hold beside is named and no fault:
it may be the head of another task.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from torch import nn

from veneer.ckpt.origin import Origin, filed
from veneer.ckpt.shards import Shards, model_folder
from veneer.core.host import Hosted
from veneer.core.leaf import Reading
from veneer.core.select import ends_with
from veneer.errors import CheckpointError, ProofFailed
from veneer.prove.answers import full_precision
from veneer.prove.filed import Held, Seen, comparable, compare, raw, shape_of
from veneer.prove.proof import Check, LeftOut, Outcome
from veneer.quant.inputs import Inputs, load_inputs
from veneer.quant.layer import Packed
from veneer.quant.stack import PackedStack

__all__ = ["is_as_filed", "refuse_unless_as_filed"]

ID, TITLE = "P7", "Base"
SHOWN = 4  # findings in a sentence; all of them are in the figures


@full_precision()
def is_as_filed(
    model: nn.Module,
    where: str | Path | None = None,
    *,
    fresh: Collection[str] = (),
    inputs: Mapping[str, Inputs] | None = None,
    complete: bool = True,
) -> Outcome:
    """Hold every tensor of the base against the files it was loaded from; adapters on it are left aside.

    where: the folder or hub id, the model's own when None; nothing is downloaded. fresh: modules that no file can hold,
    by their names' endings, since they are new and will be trained. inputs: what was known of the inputs of layers that
    were packed with regard to them, where the model does not say it itself. complete: whether a parameter that no file
    holds is a fault; not where the whole model is trained and saved.
    """
    started = time.perf_counter()
    try:
        shards = Shards(_folder(model, str(where or getattr(model, "name_or_path", ""))))
    except CheckpointError as error:
        return LeftOut(ID, TITLE, f"Its files could not be read anew: {error.what}")
    try:
        look = Look(model, shards, fresh, _known_inputs(model) if inputs is None else inputs, complete)
    except (ImportError, AttributeError, TypeError) as error:  # another transformers may keep its table differently
        return LeftOut(ID, TITLE, f"Where its tensors lie in the files could not be told: {error}")
    look.at_everything()
    return look.verdict(time.perf_counter() - started)


def refuse_unless_as_filed(found: Outcome, where: str) -> None:
    """For whoever has just loaded a base: hours of training on a wrong one are spared."""
    if isinstance(found, Check) and not found.passed:
        new = found.figures["new"]
        raise ProofFailed(
            "the base that was loaded is not what its files hold",
            where=where,
            fix=f"have what is new trained and saved whole: modules_to_save: [{', '.join(new)}]"
            if new
            else "load it "
            "again, in case its files were changed meanwhile. Else what loaded it is at fault: try another quant, and "
            "report it",
            problems=[f"{ID} {TITLE}: {problem}" for problem in found.figures["problems"]],
        )


def _folder(model: nn.Module, where: str) -> Path:
    if not where:
        raise CheckpointError("the model does not say which they are")
    config = getattr(model, "config", None)
    return model_folder(where, getattr(config, "_commit_hash", None), download=False)


def _known_inputs(model: nn.Module) -> Mapping[str, Inputs]:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    path = getattr(config, "energies", None)
    return load_inputs(path) if path and Path(path).is_file() else {}


def held_by(module: nn.Module, owner: str = "") -> Iterator[tuple[str, Held]]:
    """All that files should hold: parameters and persistent buffers outside adapters, each under all its names."""
    passing = module._non_persistent_buffers_set
    lasting = {name: t for name, t in module._buffers.items() if name not in passing}
    for name, tensor in {**module._parameters, **lasting}.items():
        if tensor is not None:
            is_codes = isinstance(module, Packed) and name == "weight"
            yield f"{owner}{name}", module if is_codes else tensor  # type: ignore[misc]
    for name, child in module._modules.items():
        if child is not None and not (name == "lora" and isinstance(module, Hosted | Reading)):
            yield from held_by(child, f"{owner}{name}.")


def empty_in(model: nn.Module) -> list[str]:
    """What has no values, buffers that no file holds among it."""
    if "disk" in map(str, (getattr(model, "hf_device_map", None) or {}).values()):
        return []  # accelerate has moved some of it away
    found = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [name for name, t in found if t.is_meta]


class Look:
    """A model beside its files: what was seen, and what is wrong."""

    def __init__(
        self,
        model: nn.Module,
        shards: Shards,
        fresh: Collection[str],
        inputs: Mapping[str, Inputs],
        complete: bool,
    ) -> None:
        self.model, self.fresh, self.inputs, self.complete = model, fresh, inputs, complete
        self.new: dict[str, None] = {}  # modules with parameters that no file holds
        self.held = dict(held_by(model))
        self.filed = filed(model, self.held.keys(), shards)
        self.problems: list[str] = []
        self.unread: list[str] = []
        self.exact: list[Seen] = []
        self.packed: list[Seen] = []

    def at_everything(self) -> None:
        empty = empty_in(self.model)
        self.problems += [f"{name} has no values: nothing was read into it" for name in empty]
        found = {id(raw(self.held[name])) for name in self.filed.origins}
        for name, held in self.held.items():
            if raw(held).is_meta or any(ends_with(part, end) for part in _above(name) for end in self.fresh):
                continue
            if name in self.filed.origins:
                self.at(name, held, self.filed.origins[name])
            elif name in self.filed.remade:
                self.unread.append(name)
            elif id(raw(held)) not in found and self._belongs_in_files(name, held):
                self.new[name.rpartition(".")[0]] = None
                self.problems.append(f"{name} is in none of the files, so it is as chance made it, at each load anew")

    def _belongs_in_files(self, name: str, held: Held) -> bool:
        """A buffer may have been computed, and transformers knows of some parameters that are."""
        known = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        wanted = self.complete and isinstance(held, nn.Parameter | Packed)
        return wanted and not any(re.search(each, name) for each in known)

    def at(self, name: str, held: Held, origin: Origin) -> None:
        if isinstance(held, Packed) and origin.dtypes == {raw(held).dtype}:
            held = raw(held)  # the files hold the codes
        shape = shape_of(held)
        if origin.count != math.prod(shape) or (origin.shape is not None and origin.shape != shape):
            there = list(origin.shape or [origin.count])
            self.problems.append(f"{name} is {list(shape)} in the model and {there} in the files")
        elif not comparable(held, origin):
            self.unread.append(name)
        elif origin.count:
            self._compared(name, held, compare(name, held, origin, self.inputs.get(name.removesuffix(".weight"))))

    def _compared(self, name: str, held: Held, seen: Seen) -> None:
        packed = held.recipe.kind if isinstance(held, Packed | PackedStack) else None
        (self.exact if packed is None else self.packed).append(seen)
        if not seen.off <= 1:
            how_far = f"is off by {seen.off:.3g} times what rounding to {packed} leaves" if packed else "differs"
            self.problems.append(f"{name} {how_far}")

    def verdict(self, seconds: float) -> Outcome:
        seen, worst = [*self.exact, *self.packed], max((each.off for each in self.packed), default=0.0)
        if not seen and not self.problems:
            return LeftOut(ID, TITLE, "Its files hold it in another form, which could not be compared.")
        return Check(
            ID, TITLE, not self.problems, self._statement(worst),
            {"tensors": len(seen), "exact": len(self.exact), "packed": len(self.packed), "worst": worst,
             "rows": sum(each.rows for each in seen), "bytes": sum(each.bytes for each in seen),
             "not_compared": self.unread, "unused": self.filed.unused, "problems": self.problems, "new": list(self.new),
             "seconds": round(seconds, 3)},
            f"base is as in its files ({len(seen)} tensors)",
        )  # fmt: skip

    def _statement(self, worst: float) -> str:
        if self.problems:
            more = f" and {len(self.problems) - SHOWN} more" if len(self.problems) > SHOWN else ""
            return f"The base is not what its files hold: {'; '.join(self.problems[:SHOWN])}{more}."
        parts = [f"{len(self.exact)} tensors are bit for bit what the files hold"] if self.exact else []
        if self.packed:
            parts.append(f"{len(self.packed)} packed ones within what rounding leaves (at most {worst:.2f} of it)")
        said = ", ".join(parts) + f"; {sum(each.rows for each in (*self.exact, *self.packed)):,} rows were read anew."
        said = said[0].upper() + said[1:]
        if self.unread:
            said += f" {_some(self.unread)}: held in another form, not compared."
        if self.filed.unused:
            said += f" {_some(self.filed.unused)}: in the files, without a place in this model."
        return said


def _above(name: str) -> list[str]:
    """The names of all modules around a tensor, and its own."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
