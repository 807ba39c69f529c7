"""An adapter file in one form, whatever its layout: parts of a pipeline, their layers, what each key of it became.

A layout is one file that registers itself here (kohya.py, diffusers.py); shared.py reads, writes and attaches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from veneer.ckpt.config import Rank, patterns_for, resolves, targets_for
from veneer.ckpt.methods import METHODS
from veneer.ckpt.tensorfile import TensorFile
from veneer.ckpt.unets import Shapes
from veneer.core.deltas.lokr import split
from veneer.core.registry import Registry
from veneer.core.spec import LoRA
from veneer.errors import CheckpointError

__all__ = [
    "ADAPTER_WORDS",
    "KINDS",
    "LAYOUTS",
    "Coverage",
    "Layer",
    "Layout",
    "Piece",
    "Shared",
    "alphas_by_words",
    "config_for",
]

ADAPTER_WORDS = "lora_adapter_metadata"  # diffusers' own entry, which is made anew
KINDS = ("LORA", "LOHA", "LOKR")  # what people share


@dataclass(frozen=True)
class Layer:
    """One layer's adapter: its tensors by PEFT's leaf names, shaped as PEFT has them. The scale is alpha / rank."""

    tensors: Mapping[str, Tensor] = field(repr=False)
    alpha: float | None = None  # None: as large as the rank

    @property
    def kind(self) -> str:
        first = next(iter(self.tensors))
        return "LOHA" if first.startswith("hada") else "LOKR" if first.startswith("lokr") else "LORA"

    @property
    def rank(self) -> int:
        for key in ("lora_A.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if key in self.tensors:
                return self.tensors[key].shape[0]
        return max(self.tensors["lokr_w2"].shape[:2])  # a whole factor has no rank: one that PEFT keeps whole, too

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass
class Coverage:
    """What became of a file's keys."""

    layout: str
    keys: int = 0
    used: dict[str, int] = field(default_factory=dict)  # part -> how many of its keys have been understood
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, part: str) -> None:
        self.used[part] = self.used.get(part, 0) + 1

    def __str__(self) -> str:
        used = ", ".join(f"{part} {count}" for part, count in self.used.items())
        return f"{sum(self.used.values())} of {self.keys} keys ({self.layout}: {used or 'none'})"


@dataclass
class Shared:
    """A file's adapters: part -> module -> layer, and what the file says about itself (`ss_*` and the like)."""

    parts: dict[str, dict[str, Layer]]
    metadata: dict[str, str] = field(default_factory=dict)
    coverage: Coverage = field(default_factory=lambda: Coverage("here"))


class Piece(NamedTuple):
    """What one key of a file is: of which part and module, under PEFT's name for the tensor (or "alpha")."""

    part: str
    module: str
    leaf: str
    cut: Callable[[Tensor], Tensor] | None = None  # what of the tensor is the module's, where it is not all
    joined: str = ""  # the file's layer, where several modules share it


@runtime_checkable
class Layout(Protocol):
    """One way to write a `Shared` into a single file."""

    def recognises(self, keys: Collection[str]) -> int:
        """How many of these keys look like its own: the layout with the most is taken."""
        ...

    def pieces(self, file: TensorFile, known: Mapping[str, Shapes]) -> Mapping[str, Sequence[Piece]]:
        """What each key of the file is; empty where the layout does not know it."""
        ...

    def alphas(self, file: TensorFile) -> Callable[[str, str, Layer], float | None]:
        """What the file says of a layer's alpha other than by a tensor."""
        ...

    def write(self, shared: Shared, known: Mapping[str, Shapes]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The file's tensors and metadata; raises if the layout cannot hold them."""
        ...


LAYOUTS: Registry[Layout] = Registry("layout")


# ---------------------------------------------------------------- in PEFT's words


def config_for(part: str, layers: Mapping[str, Layer], modules: Collection[str] | None = None) -> dict[str, Any]:
    """The adapter_config.json that says what these layers are, exactly, among these modules."""
    kinds = {layer.kind for layer in layers.values()}
    if len(kinds) > 1:
        mixed = [f"{module}: {layer.kind.lower()}" for module, layer in layers.items()]
        fix = "load the layers of one method at a time"
        raise CheckpointError(f"{part} mixes {' and '.join(sorted(kinds))}.", None, fix, mixed)
    kind = kinds.pop()
    ranks = {m: Rank(la.rank, la.rank if la.alpha is None else la.alpha) for m, la in layers.items()}
    words = patterns_for(LoRA(targets=tuple(layers)), ranks)
    dora = {"lora_magnitude_vector" in layer.tensors for layer in layers.values()}
    if len(dora) > 1:
        raise CheckpointError("Some layers have a magnitude and others have none; PEFT knows DoRA for all.", part)
    config: dict[str, Any] = {"peft_type": kind, "task_type": None, "inference_mode": True, "bias": "none"}
    targets = targets_for(LoRA(targets=tuple(layers)), list(layers), list(modules or layers), [])
    if kind == "LORA":
        return {**config, **words, "use_dora": dora == {True}, "lora_dropout": 0.0, **targets}
    del config["bias"]
    words = {METHODS[kind].rank: words["r"], "alpha": words["lora_alpha"], **_patterns(words)}
    config |= {"use_effective_conv2d": any("_t" in key for layer in layers.values() for key in layer.tensors)}
    return {**config, **words, **(_lokr_words(part, layers) if kind == "LOKR" else {}), **targets}


def _patterns(words: Mapping[str, Any]) -> dict[str, Any]:
    return {key: words[key] for key in ("rank_pattern", "alpha_pattern")}


def _lokr_words(part: str, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """The factor under which every layer is split as its tensors are."""
    splits = {}
    for module, layer in layers.items():
        own = layer.tensors
        c = (*own["lokr_w1"].shape[:2],) if "lokr_w1" in own else (own["lokr_w1_a"].shape[0], own["lokr_w1_b"].shape[1])
        if "lokr_w2" in own:
            d = (*own["lokr_w2"].shape[:2],)
        else:
            turned = "lokr_t2" in own
            d = own["lokr_w2_a"].shape[1 if turned else 0], own["lokr_w2_b"].shape[1]
        splits[module] = (c[0], d[0]), (c[1], d[1])
    spans = {one for pair in splits.values() for one in pair}
    for kernels in ((1,), (1, 9, 25, 49, 3)):
        for factor in (-1, *sorted({small for small, _ in spans})):
            if all(_splits(pair, factor, kernels) for pair in splits.values()):
                both = any("lokr_w1_a" in layer.tensors for layer in layers.values())
                return {"decompose_factor": factor, "decompose_both": both}
    odd = [f"{module}: {out} x {inner}" for module, (out, inner) in splits.items()]
    raise CheckpointError("No one factor splits these Kronecker products as they are.", part, None, odd)


Split = tuple[tuple[int, int], tuple[int, int]]


def _splits(pair: Split, factor: int, kernels: Collection[int]) -> bool:
    """Whether a layer is split so. A second factor that is a product holds a convolution's kernel in its columns."""
    (o1, o2), (i1, i2) = pair
    inner = (split(i1 * i2 // k, factor) == (i1, i2 // k) for k in kernels if i2 % k == 0)
    return split(o1 * o2, factor) == (o1, o2) and any(inner)


def alphas_by_words(words: Mapping[str, Any]) -> Callable[[str], float]:
    """What a LoraConfig says of a module's alpha, as the alpha of scale alpha / rank."""
    rank, alpha = (
        resolves(words.get(f"{k}_pattern") or {}, words.get(d, 8))
        for k, d in (("rank", "r"), ("alpha", "lora_alpha" if "lora_alpha" in words else "alpha"))
    )
    root = bool(words.get("use_rslora"))
    return lambda module: float(alpha(module)) * (float(rank(module)) ** 0.5 if root else 1.0)
