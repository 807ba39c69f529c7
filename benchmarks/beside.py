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
    before: Callable[[nn.Module, Any, Iterable[Any]], None] | None = None  # what PEFT wants done before it wraps,
    after: Callable[[nn.Module, Any, Iterable[Any]], None] | None = None  # and after; both see some batches

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


def _data(init: str, name: str, config: Callable[[], Any]) -> Callable[[Common], Any]:
    """A config of PEFT's for an init that looks at data, `name` being the field for the init's own config."""
    return lambda c: _lora(init_lora_weights=init, **{name: config()})(c)


def _corda_config() -> Any:
    from peft.tuners.lora.config import CordaConfig

    return CordaConfig()


def _eva_config() -> Any:
    from peft import EvaConfig

    return EvaConfig(use_label_mask=False)  # labels here are classes, not tokens


def _lora_ga_config() -> Any:
    from peft import LoraGAConfig

    return LoraGAConfig()


def _covariances(model: nn.Module, config: Any, batches: Iterable[Any]) -> None:
    from peft.tuners.lora.corda import preprocess_corda  # needs the package attrs

    def look() -> None:
        with torch.no_grad():
            for batch in batches:
                for i in range(len(batch["labels"])):  # PEFT's hooks take one row at a time
                    model(**{key: value[i : i + 1] for key, value in batch.items()})

    preprocess_corda(model, config, run_model=look)


def _gradients(model: nn.Module, config: Any, batches: Iterable[Any]) -> None:
    from peft import preprocess_loraga

    def look() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, look)


def _eva_start(model: nn.Module, config: Any, batches: Iterable[Any]) -> None:
    from peft import initialize_lora_eva_weights

    initialize_lora_eva_weights(model, list(batches), show_progress_bar=False)


FOLLOWS = ("pissa", "olora", "eva", "corda", "lora_ga")  # starts that follow from the base and the data
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
    "eva": Method({"init": "eva"}, _data("eva", "eva_config", _eva_config), rate=5e-4, kind="init", after=_eva_start),
    "corda": Method(
        {"init": "corda"}, _data("corda", "corda_config", _corda_config), rate=5e-4, kind="init", before=_covariances
    ),
    "lora_ga": Method(
        {"init": "lora_ga"},
        _data("lora_ga", "lora_ga_config", _lora_ga_config),
        rate=5e-4,
        kind="init",
        before=_gradients,
    ),
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
        if value is not None and spec_of(model).init not in FOLLOWS:
            own.copy_(value)


def theirs(
    model: nn.Module, method: Method, common: Common, data: Iterable[Any] = ()
) -> tuple[Any, dict[str, nn.Parameter]]:
    from peft import get_peft_model

    assert method.config is not None, "PEFT has no such method"
    config = method.config(method.common(common))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method.before is not None:
            method.before(model, config, data)
        wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
        if method.after is not None:
            method.after(wrapped, config, data)
    for name, p in wrapped.named_parameters():
        if any(part in name for part in method.freeze):
            p.requires_grad_(False)
    return wrapped, {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
