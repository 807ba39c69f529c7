"""Every method in Veneer's words and, where PEFT has it, in PEFT's: one table for all scripts that compare the two.

    method = METHODS["dora"]
    ours(model, method, common)             attaches it; the parameters to train
    model, parameters = theirs(model, method, common)

`common` says what both share: rank, alpha, targets, and the modules that are trained whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import veneer
from veneer import LoRA
from veneer.core.model import adapter_of, parameters, sites, spec_of, tensors

__all__ = ["METHODS", "Common", "Method", "ours", "theirs"]


@dataclass(frozen=True)
class Common:
    """`steps`: the length of the run, for AdaLoRA's schedule."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    saved: tuple[str, ...] = ()
    steps: int = 100


@dataclass(frozen=True)
class Method:
    """`fields` go over `common` in veneer.LoRA; `config` makes PEFT's config, None where PEFT has no such method."""

    fields: dict[str, Any]
    config: Callable[[Common], Any] | None = None
    rate: float = 2e-3
    kind: str = "delta"
    rank: int | None = None  # where the method's own rank means something else
    freeze: tuple[str, ...] = field(default=())  # parts of PEFT's parameter names that stay as they are

    def common(self, common: Common) -> Common:
        rank = self.rank or common.rank
        return Common(rank, common.alpha * rank / common.rank, common.targets, common.saved, common.steps)


def _lora(**more: Any) -> Callable[[Common], Any]:
    def config(c: Common) -> Any:
        from peft import LoraConfig

        saved = list(c.saved) or None
        return LoraConfig(r=c.rank, lora_alpha=c.alpha, target_modules=list(c.targets), modules_to_save=saved, **more)

    return config


def _adalora(c: Common) -> Any:
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        init_r=c.rank,
        target_r=max(1, c.rank // 2),
        lora_alpha=c.alpha,
        target_modules=list(c.targets),
        modules_to_save=list(c.saved) or None,
        total_step=c.steps,
        tinit=c.steps // 5,
        tfinal=c.steps // 3,
        deltaT=5,
    )


def _other(name: str, **more: Any) -> Callable[[Common], Any]:
    def config(c: Common) -> Any:
        import peft

        words = {"r": c.rank, "target_modules": list(c.targets), "modules_to_save": list(c.saved) or None}
        alpha = {} if name == "VeraConfig" else {"alpha": c.alpha}
        return getattr(peft, name)(**words, **alpha, **more)

    return config


METHODS: dict[str, Method] = {
    "lora": Method({}, _lora()),
    "rslora": Method({"scaling": "rslora"}, _lora(use_rslora=True), rate=1e-3, kind="scaling"),
    "dora": Method({"combine": "dora"}, _lora(use_dora=True), kind="combine"),
    "adalora": Method({"delta": "adalora"}, _adalora, rate=1e-2),
    "lora_fa": Method({"delta": "lora_fa"}, _lora(), rate=4e-3, freeze=("lora_A",)),
    "vera": Method({"delta": "vera"}, _other("VeraConfig", d_initial=0.1), rate=2e-2, rank=64),
    "lora_xs": Method({"delta": "lora_xs"}, None, rate=4e-3),
    "loha": Method({"delta": "loha"}, _other("LoHaConfig"), rate=4e-3),
    "lokr": Method({"delta": "lokr"}, _other("LoKrConfig", decompose_factor=-1), rate=4e-3),
    "block": Method({"delta": "block", "options": {"blocks": 2}}),
    "gaussian": Method({"init": "gaussian"}, _lora(init_lora_weights="gaussian"), kind="init"),
    "orthogonal": Method({"init": "orthogonal"}, _lora(init_lora_weights="orthogonal"), kind="init"),
    "pissa": Method({"init": "pissa"}, _lora(init_lora_weights="pissa"), rate=5e-4, kind="init"),
    "olora": Method({"init": "olora"}, _lora(init_lora_weights="olora"), rate=5e-4, kind="init"),
    "eva": Method({"init": "eva"}, rate=5e-4, kind="init"),
    "corda": Method({"init": "corda"}, rate=5e-4, kind="init"),
    "lora_ga": Method({"init": "lora_ga"}, rate=5e-4, kind="init"),
}


def ours(
    model: nn.Module, method: Method, common: Common, data: Iterable[Any] | None = None, like: Any = None
) -> dict[str, nn.Parameter]:
    """like: PEFT's model, whose values to start with."""
    c = method.common(common)
    spec = LoRA(rank=c.rank, alpha=c.alpha, targets=c.targets, modules_to_save=c.saved, **method.fields)
    veneer.attach(model, spec, data=data)
    if like is not None:
        take_start(model, like)
    return {name: p for name, p in parameters(model).items() if p.requires_grad}


@torch.no_grad()
def take_start(model: nn.Module, like: Any) -> None:
    """Copy what PEFT drew at random. Starts taken out of the base follow from it in either library."""
    drawn = dict(like.base_model.model.named_parameters())
    for (site, key), own in tensors(model).items():
        names = {**adapter_of(sites(model)[site]).delta.saved} if site in sites(model) else {}  # type: ignore[union-attr]
        word = f"{site}.{names.get(key)}.default"
        value = next((drawn[n] for n in (word, f"{word}.weight") if n in drawn), None)
        if value is not None and spec_of(model).init not in ("pissa", "olora"):
            own.copy_(value)


def theirs(model: nn.Module, method: Method, common: Common) -> tuple[Any, dict[str, nn.Parameter]]:
    from peft import get_peft_model

    assert method.config is not None, "PEFT has no such method"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, method.config(method.common(common)))  # type: ignore[arg-type]
    for name, p in wrapped.named_parameters():
        if any(part in name for part in method.freeze):
            p.requires_grad_(False)
    return wrapped, {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
