"""adapter_config.json: PEFT's words for what a LoRA is, read and written.

    PEFT                               here
    r, lora_alpha, lora_dropout        rank, alpha, dropout
    use_rslora, use_dora               scaling, combine
    rank_pattern, alpha_pattern        overrides (same rule: a regular expression for the end of a module's name)
    target_modules, exclude_modules    targets, exclude
    layers_to_transform                layers
    trainable_token_indices            token_rows
    ensure_weight_tying                tied ("together"; without it "apart": a file says what each layer holds)
    modules_to_save, bias              the same

(for LORA; methods.py has the words of PEFT's other methods.) Every key falls into one of four sorts: mapped (above),
saying nothing about the function (`HARMLESS`), changing the function in a way that we cannot follow (`REFUSED`, with a
way out each), and unknown. Unknown keys are kept, written back, and reported: newer versions of PEFT invent some all
the time. One that looks like a switch (true, or settings of its own) in a file of a newer version than we know may
change what the adapter computes; such a file is refused unless `allow_unknown` says otherwise. Bare numbers and words
are settings of a switch, and say nothing without it.

Which layers an adapter sits on is decided by patterns, and our rules and PEFT's agree on nearly all models but not on
all. So `selects` is PEFT's rule to the letter, and whoever reads or writes a config checks with it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.ckpt.methods import METHODS, Method
from veneer.core.registry import near
from veneer.core.select import PRESETS
from veneer.core.spec import LoRA
from veneer.errors import CheckpointError, ConfigError

__all__ = [
    "CONFIG",
    "RECOMPUTED",
    "REFUSED",
    "TASK_HEADS",
    "Parsed",
    "Rank",
    "parameters_for",
    "parse",
    "patterns_for",
    "read_config",
    "selects",
    "selects_parameters",
    "targets_for",
]

CONFIG = "adapter_config.json"

TASK_HEADS = {  # modules that PEFT trains whole for a task whether or not modules_to_save names them
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

WORDS = """
    r lora_alpha lora_dropout use_rslora use_dora rank_pattern alpha_pattern target_modules exclude_modules bias
    layers_to_transform layers_pattern modules_to_save init_lora_weights lora_bias peft_type target_parameters
    trainable_token_indices ensure_weight_tying
"""
MAPPED = frozenset(WORDS.split())
SILENT = """
    task_type base_model_name_or_path revision inference_mode auto_mapping peft_version runtime_config
    fan_in_fan_out eva_config corda_config loftq_config lora_ga_config qalora_group_size megatron_core
"""  # the layer itself says whether it is transposed, and the settings of an init say nothing without the init
HARMLESS = frozenset(SILENT.split())

RETRAIN = "train it again without this option"
WORDS_OF_ALL = """
    target_modules exclude_modules modules_to_save layers_to_transform layers_pattern ensure_weight_tying
"""
SHARED = frozenset(WORDS_OF_ALL.split())
REFUSED = {  # keys that change what the adapter computes
    "alora_invocation_tokens": ("acts only after its invocation tokens (aLoRA)", RETRAIN),
    "arrow_config": ("routes tokens between experts (Arrow)", RETRAIN),
    "kasa_config": ("cuts singular values off the base (KaSA)", RETRAIN),
    "layer_replication": ("runs blocks of the base several times", "replicate the blocks in the base model itself"),
    "megatron_config": ("is for Megatron's parallel layers", "convert base and adapter to Hugging Face's layout"),
    "monteclora_config": ("adds random perturbations (MonteCLoRA)", RETRAIN),
    "use_bdlora": ("has block-diagonal factors (BD-LoRA)", RETRAIN),
    "use_qalora": ("pools the inputs of A (QA-LoRA)", RETRAIN),
    "velora_config": ("compresses what A reads (VeLoRA)", RETRAIN),
}

TO_LORA = "let PEFT turn it into a LoRA where it can (peft.convert_to_lora), or use PEFT itself"
OTHERS = {  # PEFT's methods that are no sum with a matrix of ours, by what they do instead
    "it multiplies the weight by a rotation": "BOFT HRA OFT PSOFT ROAD",
    "it multiplies activations by a vector": "IA3",
    "it trains weights of the base themselves": "LN_TUNING OSF SHIRA",
    "its change is given by a transform, not by two factors": "C3A FOURIERFT FROD WAVEFT",
    "it adds trained tokens to the input": "ADAPTION_PROMPT CARTRIDGE CPT MULTITASK_PROMPT_TUNING P_TUNING "
    "PREFIX_TUNING PROMPT_TUNING",
    "it mixes several adapters by a trained router": "POLY XLORA",
    "it has a rule of its own": "ADAMSS BEFT DEFT DELORA GLORA GRALORA HIRA LILY MISS PEANUT PVERA RANDLORA SHADOW "
    "SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA",
}
OTHER_METHODS = {kind: why for why, kinds in OTHERS.items() for kind in kinds.split()}
NEWEST = (0, 21)  # of PEFT: whose keys are all known here

CONVERT = "let PEFT convert it: save_pretrained(..., path_initial_model_for_weight_conversion=<the initial adapter>)"
RECOMPUTED = ("pissa", "olora")  # the base changes, in a way that follows from the base alone
BASE_CHANGED = ("corda", "loftq", "lora_ga", "pissa_niter")  # by data, quantisation or chance: unknown to the file
STARTS = (True, False, None, "true", "gaussian", "orthogonal", "eva", "mica")  # only where training began


@dataclass(frozen=True)
class Parsed:
    """What an adapter_config.json says."""

    spec: LoRA
    raw: dict[str, Any] = field(repr=False)
    kind: str = "LORA"  # the peft_type
    has_bias_in_b: bool = False  # lora_bias: B has a bias of its own, inside the scaling
    unknown: dict[str, Any] = field(default_factory=dict)


def read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"There is no {CONFIG}.", str(path.parent), "name the folder of an adapter") from None
    except ValueError as error:
        raise CheckpointError(
            f"{path.name} is not valid JSON: {error}.", str(path), "the file is damaged; download or save it again"
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path.name} holds no JSON object.", str(path), "download or save it again")
    return config


def parse(config: Mapping[str, Any], where: str = "", *, allow_unknown: bool = False) -> Parsed:
    """The LoRA that a config describes. Raises CheckpointError with everything that stands against it."""
    kind = str(config.get("peft_type") or "LORA")
    problems = list(_refused(config, kind))
    if problems:
        raise CheckpointError("This adapter computes something that cannot be done here.", where, problems=problems)
    method = METHODS.get(kind)
    unknown = {key: value for key, value in config.items() if key not in _known(kind) and value}
    if not allow_unknown:
        _refuse_switches(unknown, config, where)
    try:
        spec = _spec(config) if method is None else _method_spec(config, method)
        selects(config)
    except re.error as error:
        what = f"target_modules or exclude_modules is not a regular expression: {error}"
        raise CheckpointError(f"{CONFIG} makes no sense: {what}.", where, "correct it") from None
    except ConfigError as error:
        problems = error.problems or [str(error)]
        raise CheckpointError(f"{CONFIG} makes no sense.", where, "correct it", problems) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{CONFIG} makes no sense: {error}.", where, "correct it") from None
    return Parsed(spec, dict(config), kind, kind == "LORA" and bool(config.get("lora_bias")), unknown)


def _known(kind: str) -> frozenset[str]:
    known = MAPPED | HARMLESS | frozenset(REFUSED)
    return known | METHODS[kind].words if kind in METHODS else known


def _refuse_switches(unknown: Mapping[str, Any], config: Mapping[str, Any], where: str) -> None:
    """A newer PEFT's new option, switched on: nobody here can know what it does."""
    version = str(config.get("peft_version") or "")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) <= NEWEST:
        return
    switches = [f"{key}={value!r}" for key, value in unknown.items() if value is True or isinstance(value, dict | list)]
    if switches:
        raise CheckpointError(
            f"The adapter was written by PEFT {version}, which is newer than what is known here, with options that may "
            "change what it computes.",
            where,
            "allow_unknown=True loads it as if they were not there; a newer veneer may know them",
            switches,
        )


def _refused(config: Mapping[str, Any], kind: str) -> Iterator[str]:
    if kind != "LORA" and kind not in METHODS:
        known = ["LORA", *METHODS]
        why = OTHER_METHODS.get(kind)
        why = f"{why}." if why else f"it is not known here.{near(kind, known)}"
        yield f"peft_type is {kind!r}: {why} {', '.join(known)} can be read. Way out: {TO_LORA}"
        return
    for key, (why, fix) in REFUSED.items():
        if config.get(key):
            yield f"{key}: it {why}. Way out: {fix}"
    if kind == "LORA":
        yield from _refused_init(config.get("init_lora_weights", True))


def _refused_init(init: Any) -> Iterator[str]:
    if isinstance(init, str) and init.startswith(BASE_CHANGED):
        yield f"init_lora_weights={init!r} changed the base itself, and the file does not say how. Way out: {CONVERT}"
    elif not isinstance(init, bool) and init not in (*STARTS, *RECOMPUTED):
        yield f"init_lora_weights={init!r} is unknown, so it may have changed the base. Way out: {CONVERT}"


def _spec(config: Mapping[str, Any]) -> LoRA:
    init, bias = config.get("init_lora_weights"), config.get("bias") or "none"
    layers = config.get("layers_to_transform")
    return LoRA(
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        dropout=config.get("lora_dropout") or 0.0,
        targets=_targets(config.get("target_modules")),
        exclude=_names(config.get("exclude_modules")),
        combine="dora" if config.get("use_dora") else "add",
        scaling="rslora" if config.get("use_rslora") else "lora",
        init=init if init in RECOMPUTED else "kaiming",
        token_rows=config.get("trainable_token_indices") or (),
        tied="together" if config.get("ensure_weight_tying") else "apart",
        bias="lora" if bias == "none" and config.get("lora_bias") else bias,
        modules_to_save=_names(config.get("modules_to_save")),
        layers=None if layers is None or layers == [] else (layers,) if isinstance(layers, int) else tuple(layers),
        overrides=_overrides(config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}),
    )


def _method_spec(config: Mapping[str, Any], method: Method) -> LoRA:
    """The same for another method: its own words, and what all of them share."""
    rank = config.get(method.rank, 8)
    alpha = config.get(method.alpha, 8) if method.alpha else rank
    bias = config.get("bias") or "none"
    shared = _spec({key: value for key, value in config.items() if key in SHARED})
    return dataclasses.replace(
        shared,
        delta=method.delta,
        rank=rank,
        alpha=alpha if alpha > 0 or method.delta != "adalora" else rank,  # AdaLoRA's way to say "unscaled"
        dropout=(method.dropout and config.get(method.dropout)) or 0.0,
        bias="lora_only" if bias == method.bias else bias,
        overrides=_overrides(config.get("rank_pattern") or {}, config.get("alpha_pattern") or {})
        if method.by_layer
        else {},
        options={ours: config[theirs] for ours, theirs in method.options.items() if theirs in config},
    )


def _targets(value: Any) -> str | tuple[str, ...]:
    """The word all-linear, a regular expression, or names (sorted: PEFT writes a set in any order)."""
    if isinstance(value, str):
        return value.lower() if value.lower() == "all-linear" else f"(?:{value})" if value in PRESETS else value
    return tuple(sorted(value)) if value else "all-linear"


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value or ())


def _overrides(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, dict[str, object]]:
    """Both patterns in one mapping. In each the first match counts, so neither order may get lost."""
    joined: dict[str, dict[str, object]] = {pattern: {"rank": rank} for pattern, rank in ranks.items()}
    for pattern, alpha in alphas.items():
        joined.setdefault(pattern, {})["alpha"] = alpha
    if [pattern for pattern, fields in joined.items() if "alpha" in fields] == list(alphas):
        return joined
    apart: dict[str, dict[str, object]] = {pattern: {"rank": rank} for pattern, rank in ranks.items()}
    apart.update({f"(?:{pattern})": {"alpha": alpha} for pattern, alpha in alphas.items()})
    return apart


# ---------------------------------------------------------------- PEFT's rules


def selects(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """PEFT's own answer to "is this module a target?" (`check_target_module_exists`)."""
    targets, excluded = config.get("target_modules") or (), config.get("exclude_modules") or ()
    saved = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in config.get("modules_to_save") or ()]
    is_target, is_excluded, in_layer = _matcher(targets), _matcher(excluded), _layer_rule(config)
    by_pattern = isinstance(targets, str)

    def rule(name: str) -> bool:
        if is_excluded(name) or any(pattern.match(name) for pattern in saved):
            return False
        return is_target(name) and (by_pattern or name in targets or in_layer(name))

    return rule


def _matcher(names: str | Collection[str]) -> Callable[[str], bool]:
    if isinstance(names, str):
        pattern = re.compile(names)
        return lambda name: pattern.fullmatch(name) is not None
    whole, ends = frozenset(names), tuple(f".{name}" for name in names)
    return lambda name: name in whole or name.endswith(ends)


def selects_parameters(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """PEFT's own answer to "is this bare parameter a target?" (`_inject_parameters`)."""
    return _matcher(tuple(config.get("target_parameters") or ()))


def _layer_rule(config: Mapping[str, Any]) -> Callable[[str], bool]:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return lambda name: True
    wanted = {layers} if isinstance(layers, int) else set(layers)
    given = config.get("layers_pattern") or ()
    given = (given,) if isinstance(given, str) else given
    patterns = [re.compile(rf"(?:^|.*?\.){p}\.(?P<index>\d+)\.") for p in given]
    patterns = patterns or [re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")]

    def rule(name: str) -> bool:
        found = next((m for m in (p.match(name) for p in patterns) if m), None)
        return found is not None and int(found["index"]) in wanted

    return rule


def resolves(patterns: Mapping[str, Any], default: Any) -> Callable[[str], Any]:
    """PEFT's own answer to "which rank (or alpha) has this module?" (`get_pattern_key`)."""
    compiled = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]
    return lambda name: next((value for pattern, value in compiled if pattern.match(name)), default)


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Rank:
    """Rank and alpha of one layer as they stand in the file."""

    rank: int
    alpha: float


def targets_for(
    spec: LoRA, sites: Collection[str], modules: Collection[str], saved: Sequence[str], *, excludes: bool = True
) -> dict[str, Any]:
    """The keys that make PEFT choose exactly `sites` among `modules`, as close to the user's words as that allows.

    excludes: whether the method knows exclude_modules.
    """
    if not sites:
        return {"target_modules": []}
    for candidate in _target_candidates(spec if excludes else dataclasses.replace(spec, exclude=()), sites):
        config = {**candidate, "modules_to_save": list(saved)}
        rule = selects(config)
        if {name for name in modules if rule(name)} == set(sites):
            return candidate
    return {"target_modules": "|".join(re.escape(site) for site in sites)}


def parameters_for(sites: Collection[str], parameters: Collection[str]) -> list[str] | None:
    """The target_parameters that make PEFT choose exactly these: their last two words where that will do."""
    short = sorted({".".join(site.split(".")[-2:]) for site in sites})
    rule = selects_parameters({"target_parameters": short})
    exact = {name for name in parameters if rule(name)} == set(sites)
    return (short if exact else sorted(sites)) if sites else None


def _target_candidates(spec: LoRA, sites: Collection[str]) -> Iterator[dict[str, Any]]:
    exclude = spec.exclude if isinstance(spec.exclude, str) else list(spec.exclude)
    extra: dict[str, Any] = {"exclude_modules": exclude} if exclude else {}
    tails = sorted({site.rsplit(".", 1)[-1] for site in sites})
    if isinstance(spec.targets, str) and spec.targets not in PRESETS:
        yield {"target_modules": spec.targets, **extra}
    if spec.layers is not None:
        extra["layers_to_transform"] = list(spec.layers)
    if not isinstance(spec.targets, str):
        yield {"target_modules": list(spec.targets), **extra}
    yield {"target_modules": tails}
    yield {"target_modules": tails, **extra}
    yield {"target_modules": list(sites)}


def patterns_for(spec: LoRA, ranks: Mapping[str, Rank]) -> dict[str, Any]:
    """r, lora_alpha, rank_pattern and alpha_pattern that give every layer its own, in the shortest true form."""
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else Rank(spec.rank, spec.alpha)
    candidates = _pattern_candidates(spec, ranks, common)
    rank, alpha = next(c for c in candidates if _gives(c, common, ranks))
    return {
        "r": common.rank,
        "lora_alpha": _plain(common.alpha),
        "rank_pattern": rank,
        "alpha_pattern": {pattern: _plain(value) for pattern, value in alpha.items()},
    }


def _gives(patterns: tuple[Any, Any], common: Rank, ranks: Mapping[str, Rank]) -> bool:
    rank_of, alpha_of = resolves(patterns[0], common.rank), resolves(patterns[1], common.alpha)
    return all(rank_of(site) == r.rank and alpha_of(site) == r.alpha for site, r in ranks.items())


def _pattern_candidates(
    spec: LoRA, ranks: Mapping[str, Rank], common: Rank
) -> Iterator[tuple[dict[str, int], dict[str, float]]]:
    yield {}, {}
    rank = {p: f["rank"] for p, f in spec.overrides.items() if "rank" in f}
    yield rank, {p: f["alpha"] for p, f in spec.overrides.items() if "alpha" in f}  # type: ignore[misc]
    for short in (True, False):
        odd = {_pattern(site, short): r for site, r in ranks.items() if short or r != common}
        yield (
            {p: r.rank for p, r in odd.items() if r.rank != common.rank},
            {p: r.alpha for p, r in odd.items() if r.alpha != common.alpha},
        )


def _pattern(site: str, short: bool) -> str:
    return re.escape(site.rsplit(".", 1)[-1]) if short else "^" + re.escape(site)


def _plain(value: float) -> float | int:
    """16 rather than 16.0: some readers of these files insist on whole numbers.

    >>> _plain(16.0), _plain(2.5)
    (16, 2.5)
    """
    return int(value) if math.isfinite(value) and value == int(value) else value
