"""The fast path of a whole model: its blocks, gated units and norms run as the functions of block.py.

    veneer.fuse(model)               what was replaced, and what was not, and why
    veneer.fuse(model, "input")      the same, keeping block inputs only and computing the rest again
    veneer.unfuse(model)             every module its own class back

Instances change their class, as adapters do it in core/host.py; no class or function of transformers is touched, names
and keys stay, and whatever cannot run so - another build, a hook, an adapter that is no plain LoRA, evaluation, a
cache - runs by the module's own forward. What that means is settled by experiment: each kind of block that is taken is
run both ways on a few tokens, forwards and backwards, and left alone where the two differ.
"""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.core.host import Hosted, original_class, plain_modules
from veneer.errors import ConfigError, StateError
from veneer.kernels.block import LEVELS, Block, Drop, RandomState, norm, run_mlp
from veneer.kernels.graphs import Recorder, Unfit, replayed
from veneer.kernels.group import factors_of
from veneer.kernels.parts import (
    BlockParts,
    block_parts,
    mlp_parts,
    norm_parts,
)
from veneer.kernels.tiled import is_tiled, run_block
from veneer.quant.eight import keep_turned
from veneer.quant.layer import Packed, unrounded
from veneer.quant.storage import EIGHT

__all__ = [
    "FAMILIES",
    "Family",
    "Fused",
    "drop_graphs",
    "fuse",
    "is_fused",
    "keep_layouts",
    "set_graphs",
    "set_recompute",
    "turnable",
    "unfuse",
]

TOKENS = 7  # that a block is tried on


# ------------------------------------------------------------------ what fuse did


@dataclass
class Fused:
    """What runs fused, by kind, and what does not, with the reason."""

    replaced: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)  # module -> why
    recompute: str = "none"
    graphs: bool = False
    ungraphed: str | None = None  # why there will be no CUDA graphs, where they were asked for
    turned: int = 0  # packed layers whose transpose is kept

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {kind}" for kind, n in self.replaced.items()) or "nothing"
        how = f"recompute {self.recompute}{', as CUDA graphs' if self.graphs else ''}"
        lines = [f"fused: {counts} ({how}{', both layouts kept' if self.turned else ''})"]
        if self.ungraphed is not None:
            lines.append(f"no CUDA graphs: {self.ungraphed}; kernels are started one by one")
        reasons = Counter(self.skipped.values())
        for why, count in reasons.items():
            first = next(name for name, reason in self.skipped.items() if reason == why)
            lines.append(f"plain: {first}{f' and {count - 1} more' if count > 1 else ''}: {why}")
        return "\n".join(lines)


# ------------------------------------------------------------------ classes


class FusedModule(nn.Module):
    """What fused modules share. `fused` lies in the instance's dict: the parts, and what is kept."""

    fused: FusedState
    records = False  # whether it can be recorded as CUDA graphs

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, type(self).__bases__, self.__dict__

    def plain(self, why: str, *args: Any, **kwargs: Any) -> Any:
        """By the module's own forward; the reason is said once for each."""
        say_once(self.fused, why)
        return super().forward(*args, **kwargs)


@dataclass
class FusedState:
    parts: Any
    recompute: str = "none"
    name: str = ""
    recorder: Recorder | None = None  # where the block is to be recorded as CUDA graphs


_said: set[tuple[str, str]] = set()


def say_once(state: FusedState, why: str) -> None:
    kind = type(state.parts).__name__
    if (kind, why) not in _said:
        _said.add((kind, why))
        warnings.warn(f"{state.name or 'a fused module'} and its like run plainly, and slower: {why}", stacklevel=4)


def _is_resting(x: Tensor) -> bool:
    """Nothing to gain: no gradients are wanted."""
    return not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)


class FusedBlock(FusedModule):
    records = True

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs |= zip(_argument_names(type(self).__bases__[1]), args, strict=False)
        rests = _is_resting(hidden_states)
        runs_plainly = rests and not self._is_tiled_anyway(hidden_states, kwargs)
        if runs_plainly or kwargs.get("encoder_hidden_states") is not None:
            return super().forward(hidden_states, **kwargs)
        if not hidden_states.numel():
            where = self.fused.name or type(self).__name__
            fix = "leave such a batch out; one row of one token is the least there is to learn from"
            raise StateError(f"a batch of nothing: its input is of shape {tuple(hidden_states.shape)}", where, fix)
        if (cache := kwargs.get("past_key_values")) is not None and (why := self._against(cache)) is not None:
            return self.plain(why, hidden_states, **kwargs)
        if not rests and (y := _by_replay(self, hidden_states, kwargs)) is not None:
            return y
        block = _block_now(self.fused.parts, hidden_states, kwargs)
        if isinstance(block, str):
            return self.plain(block, hidden_states, **kwargs)
        cos, sin = kwargs.get("position_embeddings") or (None, None)
        return run_block(hidden_states, cos, sin, block, self.fused.recompute)

    def _is_tiled_anyway(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """A row that is trained in tiles has no room to be evaluated whole."""
        usual = not torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type)
        is_long = self.fused.recompute == "tiled" and is_tiled(x)
        return usual and is_long and kwargs.get("past_key_values") is None

    def _against(self, cache: Any) -> str | None:
        """Models fill a cache in training too unless told not to; an empty one is filled here as well."""
        held = getattr(cache, "get_seq_length", None)
        if held is None or held(self.fused.parts.attention.module.layer_idx):
            return "a cache of keys and values is there"
        if self.fused.recompute not in ("none", "gate_up"):
            return "a cache cannot be filled twice, as computing a block again would; pass use_cache=False"
        return None


def _by_replay(block: FusedBlock, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The block's output from its CUDA graph, where it has one or gets one now."""
    state = block.fused
    if state.recorder is None:
        return None
    if kwargs.get("past_key_values") is not None:
        return state.recorder.say("a cache of keys and values is filled; pass use_cache=False")
    turns = kwargs.get("position_embeddings")
    positions = dict(zip(("cos", "sin"), turns, strict=True)) if isinstance(turns, tuple) else {}
    options = {k: v for k, v in kwargs.items() if k not in PASSED_ON} | {"attention_mask": kwargs.get("attention_mask")}
    tensors = {k: v for k, v in options.items() if isinstance(v, Tensor)}
    rest = {k: v for k, v in options.items() if k not in tensors}

    def run(x: Tensor, *, cos: Tensor | None = None, sin: Tensor | None = None, **tensors: Tensor) -> Tensor:
        turned = {} if cos is None else {"position_embeddings": (cos, sin)}
        now = _block_now(state.parts, x, {**rest, **tensors, **turned})
        if isinstance(now, str):
            raise Unfit(now)
        if now.random and state.recompute not in ("none", "gate_up"):
            raise Unfit("it is computed again, and would draw its masks of dropout a second time")
        return run_block(x, cos, sin, now, state.recompute)

    try:
        attention = getattr(getattr(state.parts.attention.module, "config", None), "_attn_implementation", None)
        settings = state.recompute, attention, frozenset(rest.items())
    except TypeError:
        return state.recorder.say("it is called with something that cannot be compared", block)
    return replayed(state.recorder, block, x, settings, positions | tensors, run)


PASSED_ON = (
    "past_key_values", "use_cache", "position_embeddings", "attention_mask",
    "encoder_hidden_states", "encoder_attention_mask",
)  # fmt: skip


@cache
def _argument_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """Of a block's own forward, after its input: GPT-2 gives some by their places."""
    return tuple(inspect.signature(kind.forward).parameters)[2:]


def _block_now(parts: BlockParts, x: Tensor, kwargs: dict[str, Any]) -> Block | str:
    """The block as it is at this call: adapters, dropout and hooks may have changed since the last."""
    if (why := parts.touched()) is not None:
        return why
    positions = kwargs.get("position_embeddings")
    if (positions[0].shape[-1] if isinstance(positions, tuple) else 0) != parts.attention.turned:
        return "its positions do not rotate what it rotates"
    first, second, posts = parts.first.now(x.dtype), parts.second.now(x.dtype), parts.endings(x.dtype)
    unit, attention = parts.mlp.now(x.dtype, len(x)), parts.attention.now(x.dtype, len(x))
    for part in (first, second, posts, unit, attention):
        if isinstance(part, str):
            return part
    options = {key: value for key, value in kwargs.items() if key not in PASSED_ON}
    qkv, out = attention
    attend = parts.attention.attend(
        *(positions or (None, None)), kwargs.get("attention_mask"), options, kwargs.get("past_key_values")
    )
    groups = (qkv, out, unit.entry, unit.down)
    is_random = bool(parts.attention.dropout) or any(layer.dropout for group in groups for layer in group.layers)
    is_random |= any(isinstance(post, Drop) for post in posts)
    return Block(
        first, qkv, parts.attention.heads, parts.attention.head_dim, parts.attention.turns, out, second, unit, attend,
        is_random, tuple(factors_of(groups, x.dtype)), posts, parts.parallel,
    )  # fmt: skip


class FusedMlp(FusedModule):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or _is_resting(x):
            return super().forward(x, *args, **kwargs)
        unit = self.fused.parts.now(x.dtype, len(x))
        if isinstance(unit, str) or self.fused.parts.is_dropping:
            return self.plain(unit if isinstance(unit, str) else "it drops out of what it gives", x)
        return run_mlp(x, unit, self.fused.recompute != "none")


class FusedNorm(FusedModule):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or _is_resting(x) or not x.requires_grad:
            return super().forward(x, *args, **kwargs)
        spec = self.fused.parts.now(x.dtype)
        return self.plain(spec, x) if isinstance(spec, str) else norm(x, spec)


@cache
def fused_class(kind: type, base: type) -> type:
    return type(f"Fused{base.__name__}", (kind, base), {"__module__": kind.__module__})


def _rebuild(kind: type, base: type) -> Any:
    made = fused_class(kind, base)
    return made.__new__(made)


# ------------------------------------------------------------------ kinds of modules that a library names


class Family(NamedTuple):
    """A kind of module that is known by its class, where names of children do not tell."""

    label: str  # in the report
    kind: type[FusedModule]
    parts: Callable[[nn.Module], Any]  # or the reason why not
    differs: Callable[[nn.Module], str | None]  # from its own forward, tried out


FAMILIES: dict[str, Family] = {}  # by the dotted name of the library's class
HOMES = {"diffusers": ("image_fuse", "dit_fuse")}  # library -> the files here that fill in its families


def _families(modules: dict[str, nn.Module]) -> dict[str, Family]:
    """Of the modules that there are, by their names."""
    for library in {base.__module__.partition(".")[0] for m in modules.values() for base in type(m).__mro__}:
        for home in HOMES.get(library, ()):
            importlib.import_module(f"veneer.kernels.{home}")
    found = {name: FAMILIES.get(_dotted(original_class(type(module)))) for name, module in modules.items()}
    return {name: family for name, family in found.items() if family is not None}


def _dotted(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# ------------------------------------------------------------------ fuse


def fuse(
    model: nn.Module, recompute: str = "none", *, graphs: bool = False, turned: bool = False, verbose: bool = True
) -> Fused:
    """Run what can run fused so, in place. `recompute` says what is kept for the backward pass: none (all that it
    needs), gate_up, middle, input, or tiled (see kernels/block.py). `graphs`: on a GPU, blocks are recorded as CUDA
    graphs (kernels/graphs.py): no waiting for Python, for batches of one shape; what keeps them from being replayed is
    said when it turns out. `turned`: of a base in 8 bits the transpose, which the backward pass multiplies by, is kept
    as well instead of made each time: a byte a weight for some per cent of speed. Prints and returns what was
    done."""
    if recompute not in LEVELS:
        raise ConfigError(f"recompute={recompute!r} is none of {', '.join(LEVELS)}")
    if is_fused(model):
        raise StateError("this model is fused already", fix="veneer.unfuse(model) first, or set_recompute(model, ...)")
    report = Fused(recompute=recompute)
    modules = plain_modules(model)
    taken: set[int] = set()
    for name, family in _families(modules).items():
        if _take_family(modules[name], name, family, recompute, report):
            taken |= {id(inside) for inside in modules[name].modules()}
    for name, module in modules.items():
        if _looks_like_block(module) and _take(module, name, FusedBlock, block_parts(module), recompute, report):
            taken |= {id(inside) for inside in module.modules()}
    for name, module in modules.items():
        if id(module) not in taken and _looks_like_unit(module):
            _take(module, name, FusedMlp, mlp_parts(module), recompute, report)
    for name, module in modules.items():
        if _looks_like_norm(module) and (id(module) not in taken or name.endswith(("q_norm", "k_norm"))):
            _take(module, name, FusedNorm, norm_parts(module), recompute, report)
    if turned:
        report.turned = keep_layouts(model)
    if graphs:
        report.ungraphed = set_graphs(model)
        report.graphs = report.ungraphed is None
    if not report.replaced and not report.skipped:
        report.skipped[type(model).__name__] = "no part of it is of a build that is known"
    if verbose:
        print(report)
    return report


def turnable(model: nn.Module) -> Iterator[Tensor]:
    """The codes of all layers that multiply in 8 bits."""
    for module in model.modules():
        if isinstance(module, Packed) and module.recipe.kind in EIGHT and module.recipe.dynamic:
            yield module.parts[0]


def keep_layouts(model: nn.Module, keep: bool = True) -> int:
    """Whether transposes of a base in 8 bits are kept from now on; of how many layers."""
    found = list(turnable(model))
    for codes in found:
        keep_turned(codes, keep)
    return len(found)


def set_graphs(model: nn.Module, tell: Callable[[str], Any] | None = None) -> str | None:
    """Let fused blocks be recorded as CUDA graphs from now on. Why nothing will be, as far as that can be told before
    the first call; `tell` is told what turns out later."""
    blocks = [m for m in model.modules() if isinstance(m, FusedModule) and m.records]
    recorder = Recorder(tell=tell)
    for block in blocks:
        block.fused.recorder = recorder
    if not blocks:
        return "none of what is fused is recorded"
    device = next((p.device.type for p in blocks[0].parameters()), "cpu")
    return None if device in ("cuda", "meta") else f"they need a GPU, and the model is on the {device}"


def drop_graphs(model: nn.Module) -> None:
    """Blocks run as ever from now on, and the memory of what was recorded is given back now, not when garbage is
    collected: records and their recorder know each other."""
    for module in model.modules():
        if isinstance(module, FusedModule) and (recorder := module.fused.recorder) is not None:
            recorder.release()
            module.fused.recorder = None


def _looks_like_block(module: nn.Module) -> bool:
    return (hasattr(module, "self_attn") or hasattr(module, "attn")) and hasattr(module, "mlp")


def _looks_like_unit(module: nn.Module) -> bool:
    return hasattr(module, "down_proj") and not isinstance(module, nn.ModuleList)


def _looks_like_norm(module: nn.Module) -> bool:
    return "RMSNorm" in type(module).__name__ or isinstance(module, nn.RMSNorm)


def _take(module: nn.Module, name: str, kind: type, parts: Any, recompute: str, report: Fused) -> bool:
    """Change the module's class, if its parts are known and it proves to be what they say."""
    if isinstance(parts, str):
        report.skipped[name] = parts
        return False
    before = type(module)
    module.__class__ = fused_class(kind, before)
    module.__dict__["fused"] = FusedState(parts, recompute, name)
    if kind is FusedBlock and (why := _differs(module)) is not None:
        _restore(module)
        report.skipped[name] = why
        return False
    report.replaced[{FusedBlock: "blocks", FusedMlp: "gated units", FusedNorm: "norms"}[kind]] += 1
    return True


def _take_family(module: nn.Module, name: str, family: Family, recompute: str, report: Fused) -> bool:
    parts = family.parts(module)
    if not isinstance(parts, str):
        module.__class__ = fused_class(family.kind, type(module))
        module.__dict__["fused"] = FusedState(parts, recompute, name)
        if (why := family.differs(module)) is None:
            report.replaced[family.label] += 1
            return True
        _restore(module)
        parts = why
    report.skipped[name] = parts
    return False


def _restore(module: nn.Module) -> None:
    module.__class__ = type(module).__bases__[1]
    del module.__dict__["fused"]


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused module its own class back."""
    keep_layouts(model, keep=False)
    drop_graphs(model)
    for module in model.modules():
        if isinstance(module, FusedModule):
            _restore(module)
    return model


def is_fused(model: nn.Module) -> bool:
    return any(isinstance(module, FusedModule) for module in model.modules())


def set_recompute(model: nn.Module, recompute: str) -> None:
    """What fused blocks keep from now on."""
    if recompute not in LEVELS:
        raise ConfigError(f"recompute={recompute!r} is none of {', '.join(LEVELS)}")
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.fused.recompute = recompute


# ------------------------------------------------------------------ the experiment


def _differs(block: nn.Module) -> str | None:
    """Run the block both ways on a few tokens. None where they agree; else what is wrong."""
    parts: BlockParts = block.fused.parts  # type: ignore[union-attr]
    weight = parts.first.module._parameters["weight"]
    assert weight is not None
    if weight.is_meta:
        return None
    x = _trial(_routed_rows(block), len(weight), weight)
    positions = _trial_positions(parts.attention.turned, x)
    for drops in (False, True) if any(parts.drops) else (False,):
        found, state = [], RandomState.now(x)
        for way in (block, _Plainly(block)):
            with _at_rest(block), _dropping(block, drops), RandomState.again(state, x):
                found.append(_outcome(way, x, positions))
            if isinstance(found[-1], str):
                return found[-1]
        if (why := _apart(*found)) is not None:
            return why
    return None


@contextmanager
def _dropping(block: nn.Module, drops: bool) -> Iterator[None]:
    """Whether it drops out of what is added to its residual stream, of half of it then: so its places are proved, too,
    whatever p is now. Not in tiles, which draw their own masks."""
    state: FusedState = block.fused  # type: ignore[assignment]
    known = {drop: drop.p for drop in state.parts.drops if drop is not None}
    level = state.recompute
    state.recompute = "none" if drops else level
    for drop in known:
        drop.training, drop.p = drops, 0.5
    try:
        yield
    finally:
        state.recompute = level
        for drop, p in known.items():
            drop.p = p


def _apart(fused: tuple[Tensor, Tensor], plain: tuple[Tensor, Tensor]) -> str | None:
    near = 1e-3 if fused[0].dtype in (torch.float32, torch.float64) else 5e-2
    for mine, own in zip(fused, plain, strict=True):
        off = float((mine - own).float().norm() / own.float().norm().clamp_min(1e-30))
        if not off <= near:
            return f"its own forward gives something else (off by {off:.1%})"
    return None


def _trial_positions(turned: int, x: Tensor) -> tuple[Tensor, Tensor] | None:
    if not turned:
        return None
    angle = torch.linspace(0, 1, TOKENS * turned // 2, device=x.device).view(1, TOKENS, -1)
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


class _Plainly:
    """The same block by its own forward."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super(FusedModule, self.block).forward(*args, **kwargs)  # type: ignore[misc]


def _routed_rows(block: nn.Module) -> int:
    """How many rows a batch must have just now: as many as are routed."""
    active = next((module.active for module in block.modules() if isinstance(module, Hosted)), None)
    return len(active.mix) if active is not None and active.routed and active.mix is not None else 1


def _trial(rows: int, width: int, like: Tensor) -> Tensor:
    values = torch.sin(torch.arange(rows * TOKENS * width, device=like.device) * math.sqrt(2))
    return values.view(rows, TOKENS, width).to(like.dtype)


@contextmanager
def _at_rest(block: nn.Module) -> Any:
    """Without dropout and without rounding inputs to 8 bits, which turns a last place into a percent; afterwards every
    module is as it was."""
    modes = {module: module.training for module in block.modules()}
    block.eval()
    try:
        with unrounded(block):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _outcome(block: Any, x: Tensor, positions: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | str:
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        try:
            turned = {} if positions is None else {"position_embeddings": positions}
            y = block(x, attention_mask=None, position_ids=None, **turned)
            y = y[0] if isinstance(y, tuple) else y
            (d,) = torch.autograd.grad(y, x, torch.cos(y.detach()))
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
            return f"it does not run by itself ({type(error).__name__}: {error})"
    return y.detach(), d
