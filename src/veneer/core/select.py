"""Name patterns -> layers.

A preset stands for name endings that the common model families use. A pattern that matches nothing is an error, also
when the other patterns of the list match: "q_proj, v_prj" must not quietly train half of what was asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from torch import nn

from veneer.core.fused import fused_parts
from veneer.core.host import plain_modules
from veneer.core.leaf import Leaf, leaves_of
from veneer.core.op import LinearOp, op_for
from veneer.core.spec import LoRA
from veneer.errors import ConfigError, TargetError

__all__ = [
    "PRESETS",
    "block_index",
    "ends_with",
    "near_names",
    "output_head",
    "places",
    "refined",
    "select",
    "select_saved",
]
__all__ += ["TOWERS"]

QUERY_VALUE = ("q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "q", "v", "to_q", "to_v")
FUSED = ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "in_proj")  # q, k and v in one matrix
KEY_OUTPUT = ("k_proj", "o_proj", "key", "k_lin", "out_lin", "k", "o", "to_k", "to_out.0", "attn.c_proj", "attn.proj")
OUTPUT = ("attn.out_proj", "attention.out_proj", "attention.output.dense", "attention.dense", "self_attention.dense")

PRESETS: Mapping[str, tuple[str, ...] | None] = {
    "minimal": QUERY_VALUE + FUSED,
    "attention": QUERY_VALUE + FUSED + KEY_OUTPUT + OUTPUT,
    "all-linear": None,  # by layer kind, not by name
    "language": None,  # all-linear inside one tower of a model of pictures and words
    "vision": None,
}
TOWERS: Mapping[str, tuple[str, ...]] = {  # a layer belongs to the tower whose name is a part of its own
    "language": ("language_model", "text_model"),
    "vision": ("vision_tower", "visual", "vision_model", "vision_encoder"),
}


def ends_with(name: str, ending: str) -> bool:
    """Whether `ending` is the name or its last dotted parts.

    >>> ends_with("layers.0.q_proj", "q_proj"), ends_with("layers.0.aq_proj", "q_proj")
    (True, False)
    """
    return name == ending or name.endswith("." + ending)


def block_index(name: str) -> int | None:
    """The number of the block a layer sits in: the first whole number in its name.

    >>> block_index("model.layers.7.mlp.experts.3.up_proj"), block_index("lm_head")
    (7, None)
    """
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that turns hidden states into logits, where the model says which it is."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        return get() if get is not None else None
    except NotImplementedError:
        return None


def select(model: nn.Module, spec: LoRA) -> dict[str, nn.Module]:
    """The layers that `spec` adapts, by name in the model's order. Raises TargetError for patterns that miss."""
    layers = places(model)
    saved = select_saved(model, spec)
    wanted = _wanted(model, layers, spec)
    chosen = [n for n in wanted if not any(n == s or n.startswith(s + ".") for s in saved)]
    chosen = _within_blocks(chosen, list(layers), spec)
    is_excluded = _excluder(model, layers, spec)
    chosen = [n for n in chosen if not is_excluded(n)]
    if not chosen and spec.targets:
        raise TargetError(
            f"targets {_shown(spec.targets)} leave nothing to adapt after layers, exclude and modules_to_save",
            fix=f"loosen one of them; the targets alone match {len(wanted)} layers",
        )
    return {name: layers[name] for name in chosen}


def places(model: nn.Module) -> dict[str, nn.Module]:
    """All that can carry an adapter: layers of a known kind, and matrices held by modules of other kinds."""
    places: dict[str, nn.Module] = {}
    for name, module in plain_modules(model).items():
        if op_for(type(module)) is not None:
            places[name] = module
            continue
        known = leaves_of(module)
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim >= 2:
                places[f"{name}.{leaf}" if name else leaf] = known.get(leaf) or Leaf(module, leaf)
    return places


def select_saved(model: nn.Module, spec: LoRA) -> dict[str, nn.Module]:
    """The modules that `spec` trains whole, by name."""
    if not spec.modules_to_save:
        return {}
    found: dict[str, nn.Module] = {}
    names = plain_modules(model)
    for ending in spec.modules_to_save:
        matches = {n: m for n, m in names.items() if n and ends_with(n, ending)}
        if not matches:
            raise TargetError(f"modules_to_save {ending!r} matches no module.{near_names(ending, names)}")
        found |= matches
    return found


def refined(model: nn.Module, name: str, layer: nn.Module, spec: LoRA) -> LoRA:
    """What holds for one layer: overrides, and q and v alone where "minimal" meets a fused matrix."""
    own = spec.at(name)
    if spec.targets != "minimal" or own.delta != "lora" or not any(ends_with(name, f) for f in FUSED):
        return own
    parts = fused_parts(model, name, layer)
    return dataclasses.replace(own, delta="fused", init="kaiming", options={"parts": [parts["q"], parts["v"]]})


def _wanted(model: nn.Module, layers: Mapping[str, nn.Module], spec: LoRA) -> list[str]:
    targets = spec.targets
    if isinstance(targets, str) and targets in PRESETS:
        return _preset(model, layers, targets)
    if isinstance(targets, str):
        return _by_regex(model, layers, targets)
    return _by_endings(model, layers, targets)


def _preset(model: nn.Module, layers: Mapping[str, nn.Module], preset: str) -> list[str]:
    endings = PRESETS[preset]
    if endings is not None:
        chosen = [n for n in layers if any(ends_with(n, e) for e in endings)]
    else:
        head = output_head(model)
        chosen = [n for n, m in layers.items() if _is_linear(m) and m is not head and not ends_with(n, "lm_head")]
        chosen = [n for n in chosen if preset not in TOWERS or set(TOWERS[preset]).intersection(n.split("."))]
    if not chosen:
        kinds = ", ".join(sorted({type(m).__name__ for m in layers.values()})) or "none"
        raise TargetError(
            f"preset {preset!r} matches none of the {len(layers)} adaptable layers",
            where=type(model).__name__,
            fix=f"name the layers with targets=[...]; kinds here: {kinds}; for example {_some(layers)}",
        )
    return chosen


def _is_linear(module: nn.Module) -> bool:
    op = op_for(type(module))
    return isinstance(op, LinearOp) and type(module) is not nn.modules.linear.NonDynamicallyQuantizableLinear


def _by_regex(model: nn.Module, layers: Mapping[str, nn.Module], pattern: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"targets {pattern!r} is not a regular expression: {error}") from None
    chosen = [n for n in layers if compiled.fullmatch(n)]
    if not chosen:
        _refuse_unadaptable(model, layers, compiled.fullmatch, pattern)
        near = near_names(pattern, [*PRESETS, *layers])
        raise TargetError(
            f"targets {pattern!r} match none of {len(layers)} adaptable layers.{near}",
            fix="a single text is a regular expression for the whole name; use a list for name endings",
        )
    return chosen


def _by_endings(model: nn.Module, layers: Mapping[str, nn.Module], endings: Sequence[str]) -> list[str]:
    matched = {ending: [n for n in layers if ends_with(n, ending)] for ending in endings}
    problems = []
    for ending in (e for e, names in matched.items() if not names):
        _refuse_unadaptable(model, layers, lambda name, e=ending: ends_with(name, e), ending)
        problems.append(f"{ending!r} matches none of {len(layers)} adaptable layers.{near_names(ending, layers)}")
    if problems:
        raise TargetError("some targets match no layer", problems=problems, where=type(model).__name__)
    chosen = {n for names in matched.values() for n in names}
    return [n for n in layers if n in chosen]


def _refuse_unadaptable(
    model: nn.Module, layers: Mapping[str, nn.Module], matches: Callable[[str], object], shown: str
) -> None:
    """A target that names a module of a kind that cannot carry an adapter gets its own answer."""
    kinds = {type(m).__name__ for n, m in plain_modules(model).items() if n and matches(n) and n not in layers}
    if kinds:
        raise TargetError(
            f"targets {shown!r} name modules that cannot carry a low-rank adapter: {', '.join(sorted(kinds))}",
            fix="name the layers inside them, or train them whole with modules_to_save",
        )


def _within_blocks(chosen: list[str], layers: Sequence[str], spec: LoRA) -> list[str]:
    if spec.layers is None:
        return chosen
    indices = {block_index(n) for n in layers} - {None}
    count = max(indices, default=-1) + 1  # type: ignore[type-var, operator]
    missing = [i for i in spec.layers if not -count <= i < count]
    if missing:
        raise TargetError(f"layers {missing} do not exist", fix=f"the model's blocks are 0 to {count - 1}")
    wanted = {i % count for i in spec.layers}
    return [n for n in chosen if block_index(n) in wanted]


def _excluder(model: nn.Module, layers: Mapping[str, nn.Module], spec: LoRA) -> Callable[[str], bool]:
    """Whether a layer is to be left alone. A pattern that leaves nothing alone was meant to: it is an error."""
    rules: dict[str, Callable[[str], object]]
    if isinstance(spec.exclude, str) and spec.exclude:
        try:
            rules = {spec.exclude: re.compile(spec.exclude).fullmatch}
        except re.error as error:
            raise ConfigError(f"exclude {spec.exclude!r} is not a regular expression: {error}") from None
    else:
        rules = {ending: partial(_has_ending, ending) for ending in spec.exclude}
    problems = [
        f"exclude {shown!r} matches none of {len(layers)} adaptable layers.{_why_not(model, layers, shown, rule)}"
        for shown, rule in rules.items()
        if not any(rule(name) for name in layers)
    ]
    if problems:
        raise TargetError("some exclusions exclude nothing", problems=problems, where=type(model).__name__)
    return lambda name: any(rule(name) for rule in rules.values())


def _has_ending(ending: str, name: str) -> bool:
    return ends_with(name, ending)


def _why_not(model: nn.Module, layers: Mapping[str, nn.Module], shown: str, matches: Callable[[str], object]) -> str:
    if any(name and matches(name) for name in plain_modules(model)):
        return f" It names modules that hold layers; for all that is in them: exclude=r'(.*\\.)?{shown}\\..*'"
    return near_names(shown, layers)


def near_names(word: str, names: Iterable[str]) -> str:
    """Names like the one that missed, by their last part, so that 'q_prj' finds 'q_proj'."""
    tails = {name.rsplit(".", 1)[-1] for name in names if name} | {n for n in names if n in PRESETS}
    tails = {t for t in tails if not t.isdigit()}
    near = difflib.get_close_matches(word.rsplit(".", 1)[-1], sorted(tails), n=3, cutoff=0.5)
    return f" Near: {', '.join(near)}." if near else f" There are: {', '.join(sorted(tails)[:12])}."


def _some(layers: Iterable[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers})[:8]) or "no layer at all"


def _shown(targets: str | Sequence[str]) -> str:
    return repr(targets) if isinstance(targets, str) else repr(list(targets))
