"""PEFT's methods beside LoRA that Veneer has too: what their configs and files call things.

    peft_type   delta     rank, alpha, dropout, bias                     tensors of a layer
    ADALORA     adalora   init_r, lora_alpha, lora_dropout, lora_only    lora_A, lora_B, lora_E
    VERA        vera      r, -, vera_dropout, vera_only                  vera_lambda_d, vera_lambda_b
    LOHA        loha      r, alpha, -, -                                 hada_w1_a ... hada_w2_b, hada_t1, hada_t2
    LOKR        lokr      r, alpha, -, -                                 lokr_w1, _a, _b, lokr_w2, _a, _b, lokr_t2

Which tensor is which says `Delta.saved`; what differs in shape is here. In a convolution PEFT keeps the kernel's axes
apart, and beside a core (t1, t2) it stores the outputs' factor turned. AdaLoRA's file holds only the triplets that are
switched on, and its config says which (rank_pattern): here the others stay in their places as zeros. All of VeRA's
layers share two random matrices, one pair in the file under no layer's name.

What PEFT has no such layer for (embeddings, a DoRA over it, other ranks in single layers) is written as plain LoRA.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.delta import DELTAS, Delta
from veneer.core.init import Site, unset
from veneer.core.op import op_of
from veneer.core.spec import LoRA

__all__ = [
    "METHODS",
    "Method",
    "built",
    "drawn",
    "expanded",
    "method_of",
    "pack",
    "projection",
    "pruned",
    "tensor_names",
    "turned_over",
    "unpack",
]

LINEAR, TURNED = "torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"
CONV1D, CONV2D = "torch.nn.modules.conv.Conv1d", "torch.nn.modules.conv.Conv2d"


@dataclass(frozen=True)
class Method:
    """PEFT's words for one of its methods; None for what it has no word for."""

    delta: str
    layers: Collection[str]  # dotted names of the classes that PEFT has a layer for
    rank: str = "r"
    alpha: str | None = "alpha"
    dropout: str | None = None
    bias: str | None = None  # what it calls bias="lora_only"
    options: Mapping[str, str] = field(default_factory=dict)  # our option -> PEFT's key
    by_layer: bool = False  # whether rank and alpha may differ by layer (rank_pattern, alpha_pattern)
    excludes: bool = True  # whether it knows exclude_modules
    training: Mapping[str, Any] = field(default_factory=dict)  # keys that only training reads, with PEFT's defaults

    @property
    def words(self) -> frozenset[str]:
        """Its keys in a config, beside those that all methods share."""
        own = (self.rank, self.alpha, self.dropout, *self.options.values(), *self.training)
        return frozenset(word for word in own if word is not None)


SCHEDULE = {"target_r": 8, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5}
DROPPED = {"rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True}

METHODS: dict[str, Method] = {
    "ADALORA": Method(
        "adalora",
        (LINEAR, TURNED, CONV2D),
        rank="init_r",
        alpha="lora_alpha",
        dropout="lora_dropout",
        bias="lora_only",
        training={**SCHEDULE, "total_step": 1},
    ),
    "VERA": Method(
        "vera",
        (LINEAR, TURNED),
        alpha=None,
        dropout="vera_dropout",
        bias="vera_only",
        options={"seed": "projection_prng_key", "d_initial": "d_initial", "save_projection": "save_projection"},
        excludes=False,
        training={"init_weights": True},
    ),
    "LOHA": Method(
        "loha",
        (LINEAR, CONV1D, CONV2D),
        options={"effective_conv": "use_effective_conv2d"},
        by_layer=True,
        training=DROPPED,
    ),
    "LOKR": Method(
        "lokr",
        (LINEAR, CONV1D, CONV2D),
        options={
            "factor": "decompose_factor",
            "decompose_both": "decompose_both",
            "effective_conv": "use_effective_conv2d",
        },
        by_layer=True,
        training={**DROPPED, "rank_dropout_scale": False},
    ),
}
BY_DELTA = {method.delta: kind for kind, method in METHODS.items()}


def tensor_names() -> dict[str, str]:
    """Last word of a key in PEFT's files -> our name for the tensor, for all methods above."""
    return {theirs: ours for method in METHODS.values() for ours, theirs in DELTAS[method.delta].saved.items()}


# ---------------------------------------------------------------- which layout an adapter is written in


def method_of(spec: LoRA, layers: Mapping[str, tuple[nn.Module, Any]]) -> str:
    """The peft_type whose layout can hold these layers (name -> layer and its adapter) exactly; LORA if none can."""
    deltas = [adapter.delta for _, adapter in layers.values() if adapter.delta is not None]
    kind = next((k for d, k in BY_DELTA.items() if deltas and all(type(x) is DELTAS[d] for x in deltas)), None)
    if kind is None:
        return "LORA"
    method = METHODS[kind]
    own = [spec.at(site) for site in layers]
    alike = len({(s.rank, s.scale) for s in own}) == 1 or method.by_layer
    same = all(s.options == own[0].options and s.combine == "add" for s in own)
    fits = all(_has_layer(method, host, adapter) for host, adapter in layers.values())
    return kind if alike and same and fits else "LORA"


def _has_layer(method: Method, host: Any, adapter: Any) -> bool:
    """Whether PEFT's own code for this method computes the same on this layer."""
    if adapter.delta is None or (adapter.bias is not None and method.bias is None):
        return adapter.delta is None and method.bias is not None
    kinds = {f"{c.__module__}.{c.__qualname__}" for c in type(host).__mro__}
    if not kinds & set(method.layers):
        return False
    if CONV2D in kinds and method.delta == "adalora":
        return host.groups == 1
    return turned_over(host, adapter.delta.state_dict()) is None


def turned_over(host: nn.Module, tensors: Collection[str]) -> str | None:
    """What PEFT's LoKr does to a Conv1d with a whole second factor: its Kronecker product mixes up the axes."""
    if not isinstance(host, nn.Conv1d) or "D" not in tensors:
        return None
    return "PEFT computes no Kronecker product of channels from a whole lokr_w2 of a Conv1d; train with a smaller r"


# ---------------------------------------------------------------- tensors


def built(site: str, host: nn.Module, own: LoRA, device: str = "meta") -> Delta:
    """The delta of one layer as it would be attached there, without values."""
    place = _place(site, host, own, device)
    DELTAS[own.delta].share([place])
    with torch.no_grad():
        return DELTAS[own.delta].create(place, unset, 0.0)


def drawn(hosts: Mapping[str, nn.Module], spec: LoRA) -> dict[str, Tensor]:
    """VeRA's shared matrices, drawn for these layers as they are when it is attached to them."""
    places = [_place(site, host, spec.at(site), "cpu") for site, host in hosts.items()]
    DELTAS[spec.delta].share(places)
    return dict(zip("AB", places[0].shared, strict=True))


def _place(site: str, host: nn.Module, own: LoRA, device: str) -> Site:
    options = {**DELTAS[own.delta].options, **own.options}
    return Site(site, host, op_of(host), own.rank, own.scale, torch.float32, torch.device(device), options)


CORES = {"P1": "T1", "P2": "T2", "D1": "T"}  # the outputs' factor that stands turned in a file beside this core


def unpack(fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors out of the file's: kernels flattened, what stands beside a core turned."""
    found = {}
    for name, value in fields.items():
        if name in ("T", "T1", "T2"):
            found[name] = value.flatten(2)
        elif CORES.get(name) in fields:
            found[name] = value.mT
        else:
            found[name] = value.flatten(1) if value.ndim > 2 else value
    return found


def pack(host: Any, delta: Delta, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors by the ends of their keys."""
    kernel: tuple[int, ...] = getattr(host, "kernel_size", ())
    found = {}
    for name, value in tensors.items():
        if name in ("T", "T1", "T2"):
            value = value.view(*value.shape[:2], *kernel, *[1] * (2 - len(kernel)))
        elif CORES.get(name) in tensors:
            value = value.mT
        elif name == "D" and kernel:
            value = value.view(len(value), -1, *kernel)
        found[type(delta).saved[name]] = value.contiguous()
    return found


def expanded(fields: Mapping[str, Tensor], mask: list[bool] | None) -> dict[str, Tensor]:
    """AdaLoRA's triplets in their places, zeros where one was switched off."""
    if mask is None or all(mask):
        return dict(fields)
    on = torch.tensor(mask, dtype=torch.bool)
    a, b, e = fields["A"], fields["B"], fields["E"]
    whole = a.new_zeros(len(on), a.shape[1]), b.new_zeros(b.shape[0], len(on)), e.new_zeros(len(on), 1)
    whole[0][on], whole[1][:, on], whole[2][on] = a, b, e
    return dict(zip(("A", "B", "E"), whole, strict=True))


def pruned(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, list[bool]]:
    """Which triplets of each layer are on; nothing where all are, or where none is because nothing was trained yet."""
    masks = {site: tensors["E"][:, 0].ne(0).tolist() for site, tensors in layers.items()}
    flags = {flag for mask in masks.values() for flag in mask}
    return masks if flags == {True, False} else {}


def projection(deltas: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    """VeRA's shared matrices, as large as the largest layer needs them."""
    held = list(deltas)
    for key, axis in (("A", 1), ("B", 0)):
        yield f"base_model.vera_{key}", max((getattr(d, key) for d in held), key=lambda t: t.shape[axis]).contiguous()
