"""Does this adapter file fit this model? All the answers before anything is touched.

Three things must agree: the keys in the file, the patterns in its config, and the modules of the model. PEFT loads what
matches and drops the rest, so an adapter with a wrong prefix is a model that answers like its base. Here every
disagreement is found, in both directions, and they are raised together:

    in the file, not in the model     another architecture, or other names for the same layers (see names.py)
    in the file, not in the config    the config was edited, or belongs to other weights
    in the config, not in the file    an incomplete save
    a shape that cannot be            with both shapes and the likely cause
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.ckpt.config import TASK_HEADS, Parsed, selects, selects_parameters
from veneer.ckpt.layout import from_file, is_conv, is_flipped, misfit
from veneer.ckpt.methods import METHODS, built, expanded, turned_over, unpack
from veneer.ckpt.names import Found, Renaming, best_renaming, renamed, sort_keys
from veneer.ckpt.places import drop_mirrors, leaf_at, name_parameters, name_projections, projection_overrides
from veneer.ckpt.tensorfile import Stored, TensorFile
from veneer.core.delta import DELTAS
from veneer.core.host import plain_modules
from veneer.core.op import op_for, op_of
from veneer.core.select import ends_with
from veneer.core.spec import LoRA
from veneer.core.ties import select_tokens
from veneer.core.weight import dense
from veneer.errors import CheckpointError, TargetError

__all__ = ["Fit", "Read", "fit"]


Read = Callable[[str], Tensor | None]
"""The value of a parameter of the base, by name, for models whose own parameters have none."""


@dataclass
class Fit:
    """An adapter file in the model's own terms."""

    spec: LoRA
    sites: tuple[str, ...]
    hosts: dict[str, nn.Module]
    saved: tuple[str, ...]
    values: dict[tuple[str, str], Tensor]  # (module, field) -> A, B, magnitude, ..., saved.<parameter>
    biases: dict[str, Tensor]  # module -> the whole bias, where training moved it
    bias_changes: dict[str, Tensor]  # module -> what is added to the bias (lora_bias, scaled)
    notes: list[str]
    shared: dict[str, Tensor] = field(default_factory=dict)  # VeRA's A and B, where the file brings them
    tables: dict[str, LoRA] = field(default_factory=dict)  # sites of which single rows are trained, what holds for each

    def at(self, site: str) -> LoRA:
        """What holds for one site."""
        return self.tables.get(site) or self.spec.at(site)


def fit(
    model: nn.Module, parsed: Parsed, file: TensorFile, name: str, *, partial: bool = False, read: Read | None = None
) -> Fit:
    """Bring the file and the model together, or raise CheckpointError with every reason why they cannot be.

    Little is read but shapes. The model may be on the meta device if `read` gives the values of its parameters.
    partial: take what matches and note the rest.
    """
    modules = plain_modules(model)
    found = sort_keys(file, name)
    name_of, notes = best_renaming(model, modules, found, file)
    found = renamed(found, name_of.forward)
    return _Matching(model, modules, parsed, found, file, name_of, partial, notes, read).run()


@dataclass
class _Matching:
    """The state of one fit; each step appends to `problems`, and `run` raises them all at once."""

    model: nn.Module
    modules: dict[str, nn.Module]
    parsed: Parsed
    found: Found
    file: TensorFile
    name_of: Renaming
    partial: bool
    notes: list[str]
    read: Read | None
    problems: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)  # what `partial` forgives
    hosts: dict[str, nn.Module] = field(init=False)  # all that may carry an adapter: modules, and parameters by name
    tables: dict[str, tuple[nn.Module, LoRA]] = field(init=False)  # of which single rows are trained
    attentions: dict[str, str] = field(default_factory=dict)  # projection -> the attention that the file names
    rule: Callable[[str], bool] = field(init=False)  # PEFT's own: is this module a target?

    def __post_init__(self) -> None:
        self.hosts, self.tables, self.rule = dict(self.modules), {}, selects(self.parsed.raw)
        try:
            self.tables = select_tokens(self.model, self.parsed.spec)
        except TargetError as error:
            self.problems += [str(error)]

    def run(self) -> Fit:
        self._name_places()
        sites = self._sites()
        saved, biases, whole = self._plain(sites)
        spec, factors = self._factors(sites)
        biases |= {s: t.load() for s, t in self._base_biases(sites).items()}
        self._raise()
        values = factors | {key: stored.load() for key, stored in whole.items()}
        spec = dataclasses.replace(spec, modules_to_save=_shortest(spec.modules_to_save, saved, self.modules))
        changes = {
            site: self.found.adapted[site]["B.bias"].load().float() * spec.at(site).scale
            for site in sites
            if "B.bias" in self.found.adapted[site]
        }
        hosts = {site: self.hosts[site] for site in sites}
        shared = {name: stored.load() for name, stored in self.found.shared.items()}
        tables = {site: own for site, (_, own) in self.tables.items()}
        return Fit(spec, tuple(sites), hosts, tuple(saved), values, biases, changes, self.notes, shared, tables)

    def _name_places(self) -> None:
        """What keys mean inside the modules that they name (places.py)."""
        self.attentions = name_projections(self.modules, self.found, self._is_target)
        name_parameters(self.modules, self.found, self._targets_parameter)
        leaves = {site: leaf_at(self.modules, site) for site in self.found.adapted if site not in self.modules}
        self.hosts |= {site: leaf for site, leaf in leaves.items() if leaf is not None}
        if self.parsed.spec.tied == "together":
            drop_mirrors(self.modules, self.found, self._wanted() or ())

    def _is_target(self, name: str) -> bool:
        return self.rule(name) or self.rule(self.name_of.backward(name))

    def _targets_parameter(self, name: str) -> bool:
        rule = selects_parameters(self.parsed.raw)
        return rule(name) or rule(self.name_of.backward(name))

    def _sites(self) -> list[str]:
        """The layers that file and config agree on, in the model's order."""
        in_file, wanted = self.found.adapted.keys(), self._wanted()
        for site in in_file:
            if site not in self.hosts:
                self.gaps.append(f"{site}: in the file, but the model has no such module")
            elif op_for(type(self.hosts[site])) is None:
                self.gaps.append(f"{site}: in the file, but {type(self.hosts[site]).__name__} cannot carry a LoRA")
            elif wanted is not None and site not in wanted:
                self.gaps.append(f"{site}: in the file, but its config does not target it")
        self.gaps += [f"{s}: targeted by the config, but not in the file" for s in wanted or () if s not in in_file]
        return [n for n, m in self.hosts.items() if n in in_file and op_for(type(m)) is not None]

    def _wanted(self) -> set[str] | None:
        """What PEFT would have adapted; None where the config leaves it to the model's kind."""
        targets, bare = (self.parsed.raw.get(f"target_{kind}") for kind in ("modules", "parameters"))
        by_kind = not targets and not bare and not self.tables
        if by_kind or (isinstance(targets, str) and targets.lower() == "all-linear"):
            return None
        wanted = {n for n, m in self.modules.items() if op_for(type(m)) is not None and self._is_target(n)}
        wanted |= self.attentions.keys()
        if bare:
            names = (f"{n}.{p}" for n, m in self.modules.items() for p in m._parameters)
            wanted |= {name for name in names if self._targets_parameter(name)}
        return wanted | self.tables.keys()

    def _factors(self, sites: Iterable[str]) -> tuple[LoRA, dict[tuple[str, str], Tensor]]:
        """A, B and magnitude of each layer as our matrices, and the spec with the ranks that these have."""
        if self.parsed.kind in METHODS:
            return self.parsed.spec, self._other_factors(sites)
        spec, values, shrunk = self.parsed.spec, {}, {}
        exact = projection_overrides(spec, self.attentions)
        spec = dataclasses.replace(spec, overrides={**exact, **spec.overrides}) if exact else spec
        for site in sites:
            own, host, fields = spec.at(site), self.hosts[site], self.found.adapted[site]
            if site in self.tables or "rows" in fields:
                values |= self._rows(site, fields)
                continue
            if not self._is_complete(site, fields):
                continue
            shapes = {key: stored.shape for key, stored in fields.items()}
            flipped = is_flipped(host, str(self.parsed.raw.get("peft_version") or ""), shapes)
            problem = misfit(site, host, own.rank, shapes, flipped)
            if problem is not None:
                self.problems.append(problem)
                continue
            pair = from_file(host, fields["A"].load(), fields["B"].load(), flipped)
            if pair is None:
                self.problems.append(f"{site}: {MIXED_GROUPS}")
                continue
            values |= {(site, "A"): pair.a, (site, "B"): pair.b}
            if spec.combine == "dora":
                values[site, "magnitude"] = fields["magnitude"].load().view(*pair.b.shape[:-1])
            if pair.shrunk > 1:
                shrunk["^" + re.escape(site)] = _shrink(own, pair.shrunk)
        self._note_padding(sites)
        return dataclasses.replace(spec, overrides={**shrunk, **spec.overrides}) if shrunk else spec, values

    def _other_factors(self, sites: Iterable[str]) -> dict[tuple[str, str], Tensor]:
        """What another method than LoRA has of each layer, as its delta has it."""
        spec, saved, values = self.parsed.spec, DELTAS[self.parsed.spec.delta].saved, {}
        masks = self.parsed.raw.get("rank_pattern") if self.parsed.kind == "ADALORA" else None
        masks = {self.name_of.forward(key.removesuffix(".lora_E")): mask for key, mask in (masks or {}).items()}
        for site in sites:
            fields = {key: stored.load() for key, stored in self.found.adapted[site].items()}
            problem = turned_over(self.hosts[site], fields) or _wrong_mask(fields, masks.get(site), spec.rank)
            if problem is None:
                fields = expanded(unpack(fields), masks.get(site))
                own = built(site, self.hosts[site], spec.at(site)).state_dict()
                problem = _misfit(own, fields, saved)
            if problem is None:
                values |= {(site, key): value for key, value in fields.items()}
            else:
                self.problems.append(f"{site}: {problem}")
        self._check_shared(values)
        return values

    def _check_shared(self, values: Mapping[tuple[str, str], Tensor]) -> None:
        """VeRA's random matrices must reach over the largest layer."""
        wanted = bool(self.parsed.spec.options.get("save_projection"))
        have = {name: stored.shape for name, stored in self.found.shared.items()}
        if self.parsed.kind != "VERA" or not (wanted or have):
            return
        out = max((len(value) for (_, key), value in values.items() if key == "b"), default=0)
        n = max((op_of(self.hosts[site]).shape(self.hosts[site])[1] for site, _ in values), default=0)
        for name, need in (("A", (self.parsed.spec.rank, n)), ("B", (out, self.parsed.spec.rank))):
            if name not in have:
                self.problems.append(f"the file lacks vera_{name}, and its config says that it has it")
            elif any(h < w for h, w in zip(have[name], need, strict=True)):
                self.problems.append(f"vera_{name} is {list(have[name])}, needs {list(need)}")

    def _rows(self, site: str, fields: Mapping[str, Stored]) -> dict[tuple[str, str], Tensor]:
        """PEFT keeps the new values of a table's rows, in the order of its config; here is their change, in order."""
        extra = sorted(fields.keys() - {"rows"})
        own = self.read(f"{site}.weight") if self.read is not None else self.modules[site]._parameters.get("weight")
        if site not in self.tables or extra or own is None or "rows" not in fields:
            why = f"its adapter holds {', '.join(extra) or 'rows'}, which does not fit trainable_token_indices"
            self.problems.append(f"{site}: {why}" if own is not None else f"{site}: its own rows cannot be read")
            return {}
        rows = torch.tensor(self.tables[site][1].options["rows"])
        given = fields["rows"].load()
        if given.shape != (len(rows), own.shape[-1]) or int(rows.max()) >= len(own):
            want = f"{len(rows)} rows of {own.shape[-1]} for tokens below {len(own)}"
            why = f"trainable_tokens_delta is {list(given.shape)}, needs {want} (or resize the embeddings first)"
            self.problems.append(f"{site}: {why}")
            return {}
        order = rows.argsort()
        kept = dense(own.detach())[rows[order].to(own.device)]
        return {(site, "change"): given[order].to(torch.promote_types(given.dtype, torch.float32)) - kept.to("cpu")}

    def _is_complete(self, site: str, fields: Mapping[str, Stored]) -> bool:
        needed = {"A", "B"} | ({"magnitude"} if self.parsed.spec.combine == "dora" else set())
        known = needed | ({"B.bias"} if self.parsed.has_bias_in_b else set())
        missing, extra = sorted(needed - fields.keys()), sorted(fields.keys() - known)
        if missing:
            self.problems.append(f"{site}: the file lacks {' and '.join(missing)}")
        if extra:
            self.problems.append(f"{site}: the file has {' and '.join(extra)}, which its config does not announce")
        return not missing and not extra

    def _note_padding(self, sites: Iterable[str]) -> None:
        odd = [s for s in sites if is_conv(self.hosts[s]) and self.hosts[s].padding_mode != "zeros"]
        if odd and "veneer" not in self.file.metadata:
            self.notes.append(
                f"PEFT pads with zeros inside adapters of {', '.join(odd)}, whatever the layer does; here the adapter "
                "pads like its layer, as PEFT's merged weights do. Outputs at the borders differ from PEFT's."
            )

    def _plain(self, sites: Sequence[str]) -> tuple[list[str], dict[str, Tensor], dict[tuple[str, str], Stored]]:
        """Whole modules and biases: what the file holds of them, and that it holds them completely."""
        saved = self._saved_modules(sites)
        values, biases = {}, {}
        for full, stored in self.found.plain.items():
            owner = max((s for s in saved if full.startswith(f"{s}.")), key=len, default=None)
            module, _, leaf = full.rpartition(".")
            if owner is not None:
                values[owner, f"saved.{full[len(owner) + 1 :]}"] = stored
            elif leaf == "bias" and module in self.modules and self._trains_biases():
                biases[module] = stored.load()
            else:
                self.gaps.append(f"{full}: in the file, but neither its config nor the model knows what it is for")
        self._check_saved(saved, values)
        return [s for s in saved if any(key[0] == s for key in values)], biases, values

    def _trains_biases(self) -> bool:
        return self.parsed.raw.get("bias", "none") not in (None, "none")

    def _saved_modules(self, sites: Sequence[str]) -> list[str]:
        """Modules that the config names (by PEFT's rule), and embeddings that PEFT adds when the vocabulary changed."""
        endings = tuple(self.parsed.spec.modules_to_save)
        saved = [n for n in self.modules if n and endings and n.endswith(endings)]
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            name = next((n for n, m in self.modules.items() if m is _ask(self.model, getter)), None)
            if name is not None and name not in (*saved, *sites) and f"{name}.weight" in self.found.plain:
                saved.append(name)
                self.notes.append(f"{name} comes whole from the file (PEFT saves it when the vocabulary was changed)")
        heads = {head for names in TASK_HEADS.values() for head in names}
        unknown = [e for e in endings if e not in heads and not any(n.endswith(e) for n in self.modules)]
        self.gaps += [f"modules_to_save {e!r}: the model has no such module" for e in unknown]
        return saved

    def _check_saved(self, saved: Iterable[str], values: Mapping[tuple[str, str], Stored]) -> None:
        for site in saved:
            own = {k: v.shape for k, v in self.modules[site].state_dict().items() if not k.startswith("lora.")}
            held = {key.removeprefix("saved."): s.shape for (owner, key), s in values.items() if owner == site}
            self.gaps += [f"{site}: {key} is missing in the file" for key in own.keys() - held.keys()]
            self.gaps += [f"{site}: the model has no {key}" for key in held.keys() - own.keys()]
            for key in own.keys() & held.keys():
                if tuple(own[key]) != held[key]:
                    both = f"{key} is {list(held[key])}, needs {list(own[key])}"
                    self.problems.append(f"{site}: {both} ({_cause_for_whole(own[key], held[key])})")

    def _base_biases(self, sites: Collection[str]) -> dict[str, Stored]:
        """What the file says of the base under an adapted layer: its bias if that is trained, its unchanged weight."""
        biases = {}
        for full, stored in self.found.base.items():
            module, _, leaf = full.rpartition(".")
            if module not in sites:
                self.gaps.append(f"{full}: the file has a base for a layer that it does not adapt")
            elif leaf == "bias" and self._trains_biases():
                biases[module] = stored
            elif leaf == "weight":
                self._check_base(module, stored)
            else:
                self.gaps.append(f"{full}: in the file, but bias={self.parsed.raw.get('bias')!r} does not train it")
        return biases

    def _check_base(self, site: str, stored: Stored) -> None:
        """PEFT copies an adapted embedding's own weight into the file; it must be the one that is here."""
        name = f"{site}.weight"
        own: Any = self.modules[site]._parameters.get("weight") if self.read is None else self.read(name)
        if own is None or own.is_meta:
            self.notes.append(f"the file's own copy of {name} was not compared with the base's")
        elif tuple(own.shape) != stored.shape:
            self.problems.append(
                f"{site}: its weight in the file is {list(stored.shape)}, here {list(own.shape)} (another vocabulary: "
                f"call model.resize_token_embeddings({stored.shape[0]}) before loading)"
            )
        elif other := _rows_that_differ(own.detach(), stored):
            self.problems.append(
                f"{site}: the file holds another base weight ({other} of {own.shape[0]} rows differ); load the base "
                "that the adapter was trained on, new tokens included"
            )

    def _raise(self) -> None:
        where = str(self.file.path)
        if self.gaps and self.partial:
            self.notes += [f"left out: {gap}" for gap in self.gaps]
        elif self.gaps:
            self.problems += self.gaps
        if self.problems:
            fix = "load it onto its own base and config; partial=True takes what matches and leaves out the rest"
            raise CheckpointError("The adapter does not fit this model; nothing was loaded.", where, fix, self.problems)


def _rows_that_differ(own: Tensor, stored: Stored, rows: int = 1024) -> int:
    """How many rows differ by more than a narrower type explains; a few at a time, for embeddings are large."""
    held, other = stored.load(), 0
    for i in range(0, len(held), rows):
        mine, theirs = own[i : i + rows].cpu().float(), held[i : i + rows].float()
        other += int((~torch.isclose(mine, theirs, rtol=2**-7, atol=1e-6)).any(-1).sum())
    stored.forget()
    return other


def _wrong_mask(fields: Mapping[str, Tensor], mask: Sequence[bool] | None, rank: int) -> str | None:
    """An AdaLoRA rank_pattern that does not speak of these tensors."""
    if mask is None or "E" not in fields or (len(mask) == rank and sum(mask) == len(fields["E"])):
        return None
    return (
        f"rank_pattern keeps {sum(mask)} of {len(mask)} directions; the file has {len(fields['E'])}, init_r is {rank}"
    )


def _misfit(own: Mapping[str, Tensor], given: Mapping[str, Tensor], names: Mapping[str, str]) -> str | None:
    """Why a delta with these tensors cannot take the file's: what lacks, what is too many, both shapes; None if it can.

    The file's names are used, and of a kernel's shape only its size: `given` has been flattened.
    """
    own = {key: value for key, value in own.items() if key in names}
    missing = [names[key] for key in own.keys() - given.keys()]
    extra = [names.get(key, key) for key in given.keys() - own.keys()]
    wrong = [
        f"{names[key]} is {list(given[key].shape)}, needs {list(own[key].shape)}"
        for key in own.keys() & given.keys()
        if own[key].shape != given[key].shape
    ]
    found = [f"the file lacks {' and '.join(sorted(missing))}"] if missing else []
    found += [f"the file has {' and '.join(sorted(extra))}, which its config does not announce"] if extra else []
    found += (
        [f"{'; '.join(sorted(wrong))} (made for a base of another size, or the config was edited)"] if wrong else []
    )
    return "; ".join(found) or None


MIXED_GROUPS = (
    "in this grouped convolution the adapter reads channels of other groups, which no change of the layer's weight can "
    "do (PEFT cannot merge it either); train without this layer, or train it here"
)


def _shortest(endings: Sequence[str], saved: Sequence[str], modules: Iterable[str]) -> tuple[str, ...]:
    """The config's own words for the whole modules where they mean the same here, else their full names."""
    used = tuple(e for e in endings if any(ends_with(s, e) for s in saved))
    same = {n for n in modules if n and any(ends_with(n, e) for e in used)} == set(saved)
    return used if same else tuple(saved)


def _shrink(own: LoRA, by: int) -> dict[str, object]:
    """The rank without its repetitions over groups, at the same scale."""
    return {"rank": own.rank // by, "alpha": own.alpha / (by if own.scaling == "lora" else by**0.5)}


def _cause_for_whole(own: Sequence[int], held: Sequence[int]) -> str:
    if len(own) == len(held) and tuple(own[1:]) == tuple(held[1:]):
        return "another number of classes or another vocabulary: build the base with as many"
    return "made for a base of another size"


def _ask(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        return getattr(model, getter, lambda: None)()
    except NotImplementedError:
        return None
