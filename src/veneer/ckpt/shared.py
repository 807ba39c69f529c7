"""Adapters as people share them: one file for several models of a pipeline, in kohya's or diffusers' layout.

    layout      where                   names                                            alpha
    kohya       one .safetensors        lora_unet_down_blocks_0_..._to_q.lora_down       a tensor for each layer
    diffusers   one .safetensors        unet.down_blocks.0....to_q.lora_A                in the file's metadata
    peft        a folder for each part  base_model.model.down_blocks.0....to_q.lora_A    in adapter_config.json

All three are read into one form, `Shared`: parts ("unet", "text_encoder", ...), their layers, and of each layer the
tensors under PEFT's names with its rank and alpha. What is attached to a model from there goes the way that PEFT's
folders go (fit.py), so what a file may be wrong in is said in the same words, whichever layout it came in.

Nothing is dropped in silence. `Coverage` counts what every key of a file became; a key that no rule explains, or a
layer that has no place in the layout to be written, is refused with its name unless the caller allows it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import veneer.ckpt.diffusers
import veneer.ckpt.kohya  # noqa: F401
from veneer.ckpt.atomic import atomic_folder
from veneer.ckpt.base import base_of
from veneer.ckpt.config import CONFIG, parse, read_config
from veneer.ckpt.contents import Contents, add_factors, contents_of
from veneer.ckpt.dits import without_idle
from veneer.ckpt.fit import Fit, fit
from veneer.ckpt.hub import WEIGHTS, find
from veneer.ckpt.layers import ADAPTER_WORDS, KINDS, LAYOUTS, Coverage, Layer, Layout, Piece, Shared, config_for
from veneer.ckpt.layout import PREFIX, parse_key
from veneer.ckpt.peft import attach_fitted, refuse_broken
from veneer.ckpt.tensorfile import Stored, TensorFile, save_tensors
from veneer.ckpt.unets import DENOISERS, KNOWN, PARTS, Shapes, canonical, known_clip, known_model, shapes_of
from veneer.core.host import plain_modules
from veneer.core.model import activate, adapter_of, adapters, detach, sites, spec_of, unmerged, unwrapped
from veneer.errors import CheckpointError, ConfigError

__all__ = [
    "LoadedShared",
    "Written",
    "gather",
    "known_of",
    "load_shared",
    "parts_of",
    "read_shared",
    "save_shared",
    "write_shared",
]

# ---------------------------------------------------------------- reading


def read_shared(
    path: str | os.PathLike[str],
    known: Mapping[str, Shapes] | None = None,
    *,
    part: str | None = None,
    allow_unknown: bool = False,
) -> Shared:
    """Read a shared file, or a folder in PEFT's layout (`part` says of which model, where its names do not).

    known: the modules of the models that it is for, which kohya's names need; without it, the widely used UNets are
    tried. allow_unknown: drop keys that nobody understands, and note them.
    """
    where = Path(path).expanduser()
    if where.is_dir() or not where.name.endswith((".safetensors", ".bin", ".pt", ".ckpt")):
        return _read_folder(where, part)
    file = TensorFile(where)
    layout = max(LAYOUTS, key=lambda name: LAYOUTS[name].recognises(file.tensors))
    if not LAYOUTS[layout].recognises(file.tensors):
        some = ", ".join(list(file.tensors)[:3])
        fix = "these are read: a file of kohya's trainers or of diffusers, or a folder of PEFT"
        raise CheckpointError(f"No layout of adapters has keys like {some}.", str(where), fix)
    shared = _collect(file, layout, known if known is not None else _guess(file, LAYOUTS[layout]))
    unknown = shared.coverage.unknown
    if unknown and not allow_unknown:
        raise CheckpointError(
            f"{len(unknown)} of {len(file)} keys of the file mean nothing here ({layout}); nothing was read.",
            str(where),
            "load it onto the model that it was made for; allow_unknown=True (--allow-unknown) leaves these keys out",
            unknown,
        )
    shared.coverage.notes += [f"left out: {key}" for key in unknown]
    return shared


def _collect(file: TensorFile, name: str, known: Mapping[str, Shapes]) -> Shared:
    """Sort the file's keys by part and module, and complete what each layer is."""
    layout, coverage = LAYOUTS[name], Coverage(name, keys=len(file))
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    keys: dict[tuple[str, str], set[str]] = {}
    families: dict[tuple[str, str], set[str]] = {}  # modules that share one layer of the file
    for key, pieces in layout.pieces(file, known).items():
        for piece in pieces:
            value = file[key].load()
            own = found.setdefault(piece.part, {}).setdefault(piece.module, {})
            own[piece.leaf] = value if piece.cut is None else piece.cut(value)
            keys.setdefault((piece.part, piece.module), set()).add(key)
            if piece.joined:
                families.setdefault((piece.part, piece.joined), set()).add(piece.module)
    understood: dict[str, set[str]] = {part: set() for part in found}
    told, parts = layout.alphas(file), {}
    for part, modules in found.items():
        for module, tensors in modules.items():
            alpha = tensors.pop("alpha", None)
            if not _is_whole(tensors):
                continue
            layer = _without_mid(tensors)
            given = float(alpha) if alpha is not None else told(part, module, layer)
            parts.setdefault(part, {})[module] = _settled(layer, given)
            understood[part] |= keys[part, module]
    for (part, _), modules in families.items():
        whole = {module: parts[part].pop(module) for module in sorted(modules & parts.get(part, {}).keys())}
        parts.setdefault(part, {}).update(without_idle(whole))
    coverage.used = {part: len(own) for part, own in understood.items() if own}
    coverage.unknown = list(set(file.tensors) - {key for own in understood.values() for key in own})
    coverage.unknown.sort()
    metadata = {key: value for key, value in file.metadata.items() if key not in ("format", ADAPTER_WORDS)}
    return Shared(parts, metadata, coverage)


WHOLE = (
    {"lora_A.weight", "lora_B.weight"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    *({*c, *d} for c in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")) for d in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))),
)
EXTRA = {"lora_magnitude_vector", "lora_mid.weight", "hada_t1", "hada_t2", "lokr_t2"}


def _is_whole(tensors: Collection[str]) -> bool:
    """Whether these are all tensors of one method and no others."""
    core = set(tensors) - EXTRA
    family = {leaf[:4] for leaf in tensors}
    return core in WHOLE and len(family) == 1 and ("hada_t1" in tensors) == ("hada_t2" in tensors)


def _without_mid(tensors: dict[str, Tensor]) -> Layer:
    """A convolution in three factors (LoCon's CP form) as the two that it is worth: the core goes into A."""
    mid = tensors.pop("lora_mid.weight", None)
    if mid is not None:
        wide, down = mid.float(), tensors["lora_A.weight"].float().flatten(1)
        tensors["lora_A.weight"] = torch.einsum("pq...,qi->pi...", wide, down).to(mid.dtype)
    return Layer(tensors)


def _settled(layer: Layer, alpha: float | None) -> Layer:
    """With its alpha. A Kronecker product of two whole factors has no rank, and its readers take no scale."""
    if layer.kind == "LOKR" and {"lokr_w1", "lokr_w2"} <= set(layer.tensors):
        alpha = None
    tensors = dict(layer.tensors)
    magnitude = tensors.get("lora_magnitude_vector")
    if magnitude is not None:
        ones = tensors["lora_A.weight"].ndim - 2
        tensors["lora_magnitude_vector"] = magnitude.reshape(1, -1, *[1] * ones) if ones else magnitude.flatten()
    return Layer(tensors, alpha)


def _guess(file: TensorFile, layout: Layout) -> Mapping[str, Shapes]:
    """The widely used model of which the file explains itself best, by names and by shapes."""
    if layout is not LAYOUTS["kohya"] or not any(key.startswith("lora_unet_") for key in file.tensors):
        return known_clip(numbered=any(key.startswith(("lora_te1_", "lora_te2_")) for key in file.tensors))
    fits = {}
    for word in _words_for(file.tensors):
        known = known_model(word)
        pieces = layout.pieces(file, known)
        fits[word] = sum(_has_shape(file, key, piece, known) for key, own in pieces.items() for piece in own[:1])
    return known_model(max(fits, key=lambda word: fits[word]))


def _words_for(names: Collection[str]) -> list[str]:
    """The widely used models that these names may be of; the others need not be looked at."""
    if any("_joint_blocks_" in name for name in names):
        return [word for word in KNOWN if word.startswith("sd3")]
    if any("_double_blocks_" in name or "_single_blocks_" in name for name in names):
        return ["flux"]
    return ["sd1", "sd2", "sdxl"]


def _has_shape(file: TensorFile, key: str, piece: Piece, known: Mapping[str, Shapes]) -> bool:
    shape = known.get(piece.part, {}).get(piece.module)
    return shape is None or piece.leaf != "lora_A.weight" or file[key].shape[1] == shape[1]


def _read_folder(where: Path, part: str | None) -> Shared:
    """PEFT's folders: one, one for each part under the part's name, or one of a model that has the parts inside it."""
    folders = {name: where / name for name in PARTS if (where / name / CONFIG).is_file()} or {part: find(where)}
    shared = Shared({}, coverage=Coverage("peft"))
    for name, folder in folders.items():
        file, config = TensorFile(folder / WEIGHTS), read_config(folder / CONFIG)
        parsed = parse(config, str(folder / CONFIG))
        if parsed.kind not in KINDS:
            fix = "load it, make a LoRA of it with veneer.convert(...), and save that"
            raise CheckpointError(f"Files that people share hold no {parsed.kind}.", str(folder), fix)
        layers, unknown = _folder_layers(file)
        if unknown:
            what = (
                "This adapter has more than low-rank factors, and the layouts that people share have no place for it."
            )
            raise CheckpointError(what, str(folder), "train with bias='none' and without modules_to_save", unknown)
        joined = len({module.partition(".")[0] for module in layers} & set(PARTS)) > 1
        name = name or ("" if joined else _part_by_names(layers))
        for module, tensors in layers.items():
            own = parsed.spec.at(module)
            rank = Layer(tensors).rank
            owner, _, inner = module.partition(".") if joined else (name, "", module)
            shared.parts.setdefault(owner, {})[canonical(owner, inner)] = Layer(tensors, own.scale * rank)
            shared.coverage.used[owner] = shared.coverage.used.get(owner, 0) + len(tensors)
        shared.coverage.keys += len(file)
        shared.metadata |= {k: v for k, v in file.metadata.items() if k not in ("format", "veneer")}
    return shared


def _folder_layers(file: TensorFile) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for stored in file:
        key = parse_key(stored.name)
        module, leaf = stored.name.removeprefix(PREFIX), ""
        if key is not None and key.field not in ("", "B.bias", "rows") and "." not in key.field.replace("B.bias", "."):
            module, leaf = key.module, module.removeprefix(f"{key.module}.")
        if not leaf or leaf.startswith("lora_embedding"):
            unknown.append(stored.name)
        else:
            found.setdefault(module, {})[leaf] = stored.load()
    return found, unknown


def _part_by_names(modules: Collection[str]) -> str:
    if any(name.startswith(("down_blocks.", "up_blocks.", "mid_block.")) for name in modules):
        return "unet"
    if any("encoder.layers." in name or "SelfAttention" in name for name in modules):
        return "text_encoder"
    if any("transformer_blocks." in name for name in modules):
        return "transformer"
    fix = (
        f"say which: {', '.join(PARTS)} (part=, --part); an adapter of a text model is shared as the folder that it is"
    )
    raise CheckpointError("The names of these layers do not say which part of a pipeline they are of.", None, fix)


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Written:
    """What was written where."""

    path: Path
    layout: str
    layers: Mapping[str, int]
    tensors: int

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {count} layers" for part, count in self.layers.items())
        return f"{self.path} ({self.layout}: {parts}, {self.tensors} tensors)"


def write_shared(
    shared: Shared, path: str | os.PathLike[str], layout: str, known: Mapping[str, Shapes] | None = None
) -> Written:
    """Write to a file (kohya, diffusers) or a folder (peft). What is there already stays unless it is such a file."""
    where = Path(path).expanduser()
    counts = {part: len(layers) for part, layers in shared.parts.items()}
    if layout == "peft":
        return Written(where, layout, counts, _write_folders(shared, where))
    if where.suffix != ".safetensors":
        where = where / "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
    writer = LAYOUTS[layout]
    tensors, metadata = writer.write(shared, known if known is not None else _guess_for(shared))
    whole = {key: value.contiguous() for key, value in tensors.items()}
    where.parent.mkdir(parents=True, exist_ok=True)
    half = where.with_name(f".{where.name}.half")  # a process killed in between leaves the old file
    try:
        save_tensors(half, whole, shared.metadata | metadata)
        os.replace(half, where)
    finally:
        half.unlink(missing_ok=True)
    return Written(where, layout, counts, len(tensors))


def _guess_for(shared: Shared) -> Mapping[str, Shapes]:
    """The widely used model that has all these layers in these shapes; or only the names that there are."""
    own: dict[str, Shapes] = {part: dict.fromkeys(layers) for part, layers in shared.parts.items()}
    for part in (part for part in DENOISERS if shared.parts.get(part)):
        for word in KNOWN:
            shapes = known_model(word).get(part, {})
            if all(n in shapes and _matches(layer, shapes[n]) for n, layer in shared.parts[part].items()):
                return {**known_model(word), **own, part: shapes}
    return own


def _matches(layer: Layer, shape: tuple[int, ...] | None) -> bool:
    a = layer.tensors.get("lora_A.weight")
    return shape is not None and (a is None or a.shape[1] == shape[1])


def _write_folders(shared: Shared, where: Path) -> int:
    count = 0
    for part, layers in shared.parts.items():
        folder = where if len(shared.parts) == 1 else where / part
        names = {module: module.removeprefix("text_model.") for module in layers}  # fits CLIP of any version
        plain = {names[module]: layer for module, layer in layers.items()}
        tensors = {
            f"{PREFIX}{module}.{leaf}": value.contiguous()
            for module, layer in plain.items()
            for leaf, value in layer.tensors.items()
        }
        with atomic_folder(folder, keep=True) as temp:
            save_tensors(temp / WEIGHTS, tensors, shared.metadata)
            text = json.dumps(config_for(part, plain), indent=2, sort_keys=True)
            (temp / CONFIG).write_text(text + "\n", encoding="utf-8")
        count += len(tensors)
    return count


# ---------------------------------------------------------------- models and pipelines


def parts_of(models: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that may carry adapters, by the part's name; also from a mapping, or a single model."""
    if isinstance(models, Mapping):
        return dict(models)
    if isinstance(models, nn.Module):
        return {_part_by_names(list(plain_modules(unwrapped(models)))): models}
    found = {part: getattr(models, part, None) for part in PARTS}
    held = {part: model for part, model in found.items() if isinstance(model, nn.Module)}
    if not held:
        raise ConfigError(f"{type(models).__name__} has none of {', '.join(PARTS)}", fix="pass a pipeline or a model")
    return held


def gather(models: Any, name: str = "default") -> Shared:
    """Adapter `name` of every part that has it."""
    shared = Shared({})
    for part, model in parts_of(models).items():
        if name not in adapters(model):
            continue
        with unmerged(model):
            shared.parts[part] = _layers(unwrapped(model), part, name)
    if not shared.parts:
        raise ConfigError(f"no part has an adapter named {name!r}", fix="veneer.attach(pipeline.unet, LoRA(...)) first")
    return shared


def _layers(model: nn.Module, part: str, name: str) -> dict[str, Layer]:
    contents = contents_of(model, name)
    if contents.kind not in KINDS:  # another method, as the plain LoRA that it is worth
        hosts = {site: (host, adapter_of(host, name)) for site, host in sites(model, name).items()}
        contents = Contents()
        add_factors(contents, spec_of(model, name), hosts)
    named, layers = {f"{PREFIX}{site}": site for site in contents.ranks}, {}
    odd = []
    for key, value in contents.tensors.items():
        owner = next((o for o in _owners(key) if o in named), None)
        leaf = key[len(owner) + 1 :] if owner else ""
        if owner is None or leaf.startswith(("lora_embedding", "base_layer", "lora_B.bias")):
            odd.append(key.removeprefix(PREFIX))
        else:
            layers.setdefault(named[owner], {})[leaf] = value.detach().cpu()
    if odd or contents.attentions:
        what = f"{part}: the layouts that people share have no place for these."
        fix = "train without biases, embeddings and modules_to_save, or save in PEFT's layout (veneer.save)"
        raise CheckpointError(what, None, fix, odd or contents.attentions)
    spec = spec_of(model, name)
    root = contents.kind == "LORA" and spec.scaling == "rslora"
    found = {}
    for site, tensors in layers.items():
        own = contents.ranks[site]
        alpha = own.alpha * own.rank**0.5 if root else own.alpha
        found[canonical(part, site)] = _rescaled(Layer(tensors), alpha / own.rank)
    return found


def _owners(key: str) -> Iterator[str]:
    words = key.split(".")
    return (".".join(words[:i]) for i in range(len(words) - 1, 0, -1))


def _rescaled(layer: Layer, scale: float) -> Layer:
    """With an alpha of this scale; where readers would take none, the scale goes into the first factor."""
    if layer.kind == "LOKR" and {"lokr_w1", "lokr_w2"} <= set(layer.tensors):
        return Layer({**layer.tensors, "lokr_w1": layer.tensors["lokr_w1"] * scale})
    return Layer(layer.tensors, scale * layer.rank)


def known_of(models: Any) -> dict[str, Shapes]:
    """The modules of these models under the names that files have for them."""
    found = {}
    for part, model in parts_of(models).items():
        shapes = shapes_of(unwrapped(model))
        found[part] = {canonical(part, name): shapes.get(name) for name in plain_modules(unwrapped(model)) if name}
    return found


def save_shared(
    models: Any,
    path: str | os.PathLike[str],
    layout: str = "diffusers",
    name: str = "default",
    *,
    metadata: Mapping[str, str] | None = None,
    allow_nan: bool = False,
) -> Written:
    """Write adapter `name` of a pipeline, a model or {part: model} as one file that others load.

    layout: "kohya", "diffusers" or "peft". metadata: what the file shall say about itself (`load_shared` returns what
    it read).
    """
    shared = gather(models, name)
    shared.metadata |= metadata or {}
    if not allow_nan:
        refuse_broken(
            {(p, m, k): t for p, ls in shared.parts.items() for m, la in ls.items() for k, t in la.tensors.items()},
            str(path),
        )
    return write_shared(shared, path, layout, known_of(models))


@dataclass(frozen=True)
class LoadedShared:
    """What load_shared did, part by part."""

    name: str
    path: Path
    sites: Mapping[str, tuple[str, ...]]
    metadata: Mapping[str, str] = field(repr=False)
    coverage: Coverage = field(repr=False)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = ", ".join(f"{len(names)} layers of {part}" for part, names in self.sites.items())
        return f"adapter {self.name!r} from {self.path} on {parts}; {self.coverage}"


def load_shared(
    models: Any,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    trainable: bool = False,
    partial: bool = False,
    allow_unknown: bool = False,
    allow_nan: bool = False,
) -> LoadedShared:
    """Attach one shared file to all models of a pipeline that it speaks of, and make it the active adapter there.

    All parts are compared with the file before the first is touched. partial: leave out parts that the pipeline has not
    and layers that a model has not, and say so; allow_unknown: the same for keys that nobody understands.
    """
    held = {part: unwrapped(model) for part, model in parts_of(models).items()}
    single = next(iter(held)) if len(held) == 1 else None
    shared = read_shared(path, known_of(held), part=single, allow_unknown=allow_unknown or partial)
    absent = [f"{part}: {len(layers)} layers" for part, layers in shared.parts.items() if part not in held]
    if absent and not partial:
        what = f"The file has parts that {type(models).__name__} has not; nothing was loaded."
        fix = "pass the whole pipeline, or partial=True to leave them out"
        raise CheckpointError(what, str(path), fix, absent)
    fitted: dict[str, Fit] = {}
    for part in (p for p in held if p in shared.parts):
        fitted[part] = _fit(held[part], part, shared, Path(path), name, partial)
        if not allow_nan:
            refuse_broken(fitted[part].values, str(path))
    if not fitted:
        raise CheckpointError("No part of the file is among these models; nothing was loaded.", str(path), None, absent)
    _attach_all(held, fitted, name, trainable)
    notes = [f"left out, as allowed: {one}" for one in absent] + shared.coverage.notes
    notes += [note for one in fitted.values() for note in one.notes]
    if notes:
        warnings.warn(f"loading {path}: " + "; ".join(notes), stacklevel=2)
    where = {part: one.sites for part, one in fitted.items()}
    return LoadedShared(name, Path(path), where, shared.metadata, shared.coverage, tuple(notes))


def _attach_all(held: Mapping[str, nn.Module], fitted: Mapping[str, Fit], name: str, trainable: bool) -> None:
    """Onto all parts, or onto none."""
    done: list[nn.Module] = []
    try:
        for part, one in fitted.items():
            attach_fitted(held[part], one, name, trainable)
            done.append(held[part])
    except BaseException:
        for model in done:
            detach(model, name)
        raise
    for part, model in held.items():
        if part not in fitted and adapters(model):
            activate(model, None)


@dataclass(frozen=True, eq=False)
class _Held(Stored):
    """A tensor that is in memory, where fit.py expects one of a file."""

    value: Tensor = field(repr=False)

    def load(self) -> Tensor:
        return self.value

    def forget(self, first_byte: int = 0, last_byte: int | None = None) -> None:
        pass


class _HeldFile(TensorFile):
    """Tensors that are in memory, where fit.py expects a file."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path, self.metadata, self.size = path, {}, 0
        self.tensors = {
            name: _Held(name, value.dtype, tuple(value.shape), self, i, value)
            for i, (name, value) in enumerate(tensors.items())
        }


def _fit(model: nn.Module, part: str, shared: Shared, path: Path, name: str, partial: bool) -> Fit:
    """One part against its model, by the rules that hold for PEFT's files."""
    modules = plain_modules(model)
    here = {canonical(part, module): module for module in modules}
    layers = {here.get(module, module): layer for module, layer in shared.parts[part].items()}
    layers = {module: _as_host(layer, modules.get(module)) for module, layer in layers.items()}
    parsed = parse(config_for(part, layers, [m for m in modules if m]), str(path))
    tensors = {f"{PREFIX}{m}.{leaf}": value for m, layer in layers.items() for leaf, value in layer.tensors.items()}
    try:
        return fit(model, parsed, _HeldFile(path, tensors), name, partial=partial)
    except CheckpointError as error:
        error.what = (
            f"{error.what} (part {part}, a {type(model).__name__}; based on {base_of(model).id or 'no known id'})"
        )
        raise


def _as_host(layer: Layer, host: nn.Module | None) -> Layer:
    """A 1 x 1 convolution and a linear layer are the same numbers; UNets of different age have one or the other."""
    if layer.kind != "LORA" or host is None:
        return layer
    conv = len(getattr(host, "kernel_size", ()))
    found = dict(layer.tensors)
    for leaf in ("lora_A.weight", "lora_B.weight"):
        value = found[leaf]
        if not conv and value.ndim > 2 and value.shape[2:].numel() == 1:
            found[leaf] = value.flatten(1)
        elif conv and value.ndim == 2 and host.kernel_size == (1,) * conv:
            found[leaf] = value.view(*value.shape, *[1] * conv)
    return Layer(found, layer.alpha)
