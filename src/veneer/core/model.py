"""Adapters on a whole model: attach, switch, route, merge, take away.

Every change is planned for all layers before the first one is touched, so a call that fails leaves the model as it
was. What is known about the adapters of a model lives in one `State` on the model itself; it is copied and pickled
with the model.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.combine import COMBINES, Add
from veneer.core.delta import DELTAS, Lora
from veneer.core.host import (
    NORMS,
    Active,
    Adapted,
    Adapter,
    Hosted,
    Readable,
    Whole,
    host,
    plain_modules,
    refuse_sharded,
    release,
)
from veneer.core.init import (
    CHANGES_BASE,
    INITS,
    NEEDS,
    SHARES_RANKS,
    Known,
    Originals,
    RoundTrip,
    Site,
    share_ranks,
    unset,
)
from veneer.core.leaf import Leaf, own_parameters
from veneer.core.observe import Loss, loss_of, observe
from veneer.core.op import Op, op_for, op_of
from veneer.core.registry import near
from veneer.core.select import refined, select, select_saved
from veneer.core.spec import SCALINGS, LoRA
from veneer.core.ties import Follower, followers, select_tokens, tied_groups
from veneer.core.weight import UNPACK_FIRST, is_packed, is_plain, read_weight, write_weight
from veneer.errors import CheckpointError, ConfigError, StateError, TargetError

__all__ = [
    "Attached",
    "Merged",
    "Mixture",
    "State",
    "Summary",
    "activate",
    "active_of",
    "adapter_of",
    "adapters",
    "attach",
    "check_alive",
    "detach",
    "device_of",
    "disabled",
    "elements",
    "is_merged",
    "merge",
    "mixture_of",
    "parameters",
    "put",
    "routed",
    "row_of",
    "sites",
    "spec_of",
    "state_of",
    "summary",
    "tensors",
    "unmerge",
    "unmerged",
    "unwrapped",
]

Mixture = str | None | Sequence[str] | Mapping[str, float]
"""One adapter, none, several, or several with weights."""

CHUNK = 1 << 18  # elements merged at a time where the weight is narrower than fp32: three times 1 MiB


@dataclass
class Placed:
    """One adapter of a model: its spec and the layers that carry it, by name."""

    spec: LoRA
    sites: tuple[str, ...]
    saved: tuple[str, ...]


@dataclass
class State:
    """All that a model knows of its adapters."""

    active: Active = field(default_factory=Active)
    placed: dict[str, Placed] = field(default_factory=dict)
    hosts: dict[str, nn.Module] = field(default_factory=dict)  # by module name, in the order of attaching
    trained_before: list[nn.Parameter] = field(default_factory=list)  # required gradients before the first attach
    merged: Mixture = None
    resume: tuple[tuple[str, ...], Tensor | None] = ((), None)  # what was active before the merge
    kept: list[tuple[nn.Module, str, Tensor]] | None = None  # (layer, parameter, base value) for unmerge


@dataclass(frozen=True)
class Attached:
    """What attach did. `total` counts the base and this adapter, not the other adapters on the model."""

    name: str
    sites: tuple[str, ...]
    saved: tuple[str, ...]
    trainable: int
    total: int

    def __str__(self) -> str:
        whole = f" and {len(self.saved)} whole modules" if self.saved else ""
        share = 100 * self.trainable / max(self.total, 1)
        return (
            f"adapter {self.name!r} on {len(self.sites)} layers{whole}: "
            f"{self.trainable:,} of {self.total:,} parameters trained ({share:.2f} %)"
        )


@dataclass(frozen=True)
class Merged:
    """What merge did: `kept` is the share of dW that survived rounding to the stored type, by layer (1.0 is all)."""

    kept: dict[str, float]

    @property
    def share(self) -> float:
        return min(self.kept.values(), default=1.0)

    def __str__(self) -> str:
        return f"merged into {len(self.kept)} layers; at least {100 * self.share:.1f} % of dW kept"


@dataclass(frozen=True)
class Summary:
    """Parameters and bytes of a model with adapters."""

    trainable: int
    total: int
    adapter_bytes: dict[str, int]
    sites: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{self.trainable:,} of {self.total:,} parameters trained ({100 * self.trainable / self.total:.2f} %)"]
        for name, size in self.adapter_bytes.items():
            lines.append(f"  {name}: {self.sites[name]} layers, {size / 2**20:.1f} MiB")
        return "\n".join(lines)


# --- finding things -------------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> State:
    """The model's adapters, through wrappers that keep the model in .module (DDP) or ._orig_mod (compile)."""
    inner = unwrapped(model)
    state = vars(inner).get("_veneer")
    if state is None:
        raise StateError(f"{type(inner).__name__} has no adapter", fix="veneer.attach(model, LoRA(...)) first")
    return state


def unwrapped(model: nn.Module) -> nn.Module:
    while "_veneer" not in vars(model):
        inner = vars(model).get("_modules", {}).get("_orig_mod") or vars(model).get("_modules", {}).get("module")
        if inner is None:
            break
        model = inner
    return model


def _placed(model: nn.Module, name: str) -> Placed:
    placed = state_of(model).placed
    if name not in placed:
        raise StateError(f"no adapter named {name!r}.{near(name, placed)} There are: {', '.join(placed) or 'none'}.")
    return placed[name]


def adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters on `model`, in the order in which they came."""
    state = vars(unwrapped(model)).get("_veneer")
    return tuple(state.placed) if state is not None else ()


def spec_of(model: nn.Module, name: str = "default") -> LoRA:
    return _placed(model, name).spec


def active_of(model: nn.Module) -> Active:
    return state_of(model).active


def is_merged(model: nn.Module) -> bool:
    state = vars(unwrapped(model)).get("_veneer")
    return state is not None and state.merged is not None


def sites(model: nn.Module, name: str | None = None) -> dict[str, nn.Module]:
    """The layers that carry adapter `name` (or any), by module name; modules that are trained whole not among them."""
    state = state_of(model)
    placed = list(state.placed.values()) if name is None else [_placed(model, name)]
    return {s: state.hosts[s] for p in placed for s in p.sites}


def adapter_of(layer: nn.Module, name: str = "default") -> Adapter:
    return layer.slots[name]  # type: ignore[index, union-attr]


def parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """What training moves: the adapters' parameters by dotted name, copies of whole modules among them."""
    state = state_of(model)
    names = [name] if name is not None else list(state.placed)
    return {
        f"{site}.lora.{n}.{key}": parameter
        for n in names
        for site in (*_placed(model, n).sites, *_placed(model, n).saved)
        for key, parameter in state.hosts[site].slots[n].named_parameters()  # type: ignore[index, union-attr]
    }


# --- attach and detach ----------------------------------------------------------------------------------------------


def attach(
    model: nn.Module,
    spec: LoRA,
    name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    init: bool = True,
    trainable: bool = True,
    data: Iterable[Any] | None = None,
    loss: Loss = loss_of,
    round_trip: RoundTrip | None = None,
    originals: Originals | None = None,
    inputs: Known | None = None,
) -> Attached:
    """Put an adapter on `model`, in place, freeze everything else, and make the new adapter the active one.

    The layers keep their names and weights. dtype: the type the adapter is kept and trained in; fp32 on a half
    precision base unless given (products still run in the base's type). init=False leaves values unset, for whoever
    loads them next. data: a few batches, for inits that look at them (eva, corda, lora_ga): mappings are passed to the
    model by keyword; loss(model, batch) gives lora_ga its gradient. round_trip: what quantising will make of a matrix,
    for loftq, which writes the base; quantise it afterwards. originals: for loftq on a base that is packed already, and
    is then not written; inputs: for the same, what is known of the layers' inputs.
    Raises ConfigError, TargetError or StateError before anything has changed.
    """
    state = vars(unwrapped(model)).get("_veneer")
    model = unwrapped(model)
    _check_name(name, state)
    layers, whole = select(model, spec) if spec.targets else {}, select_saved(model, spec)
    specs = {site: refined(model, site, layer, spec) for site, layer in layers.items()}
    layers, specs = _with_tokens(model, spec, layers, specs, whole)
    tied = followers(model, layers, specs, whole)
    biased = _bias_layers(model, {**layers, **tied}, whole, spec)
    plan = _plan({n: layer for n, layer in layers.items() if n not in tied}, specs, dtype, init)
    if init:
        spec = _look_at_data(model, plan, specs, spec, data, loss)
        _ready_to_change_the_base(model, plan, specs, state, round_trip, originals, inputs)
    layers |= {site: follower.layer for site, follower in tied.items()}
    refuse_sharded({**layers, **whole, **biased})
    new = {site: _adapter(place, init, specs[site]) for site, place in plan.items()}
    new |= {site: _following(follower, plan, new, spec) for site, follower in tied.items()}
    new |= {site: Adapter(None, None, _bias_change(layer)) for site, layer in biased.items()}
    copies: dict[str, nn.Module] = {n: _own_copy(module, name) for n, module in whole.items()}

    state = state or _start(model)
    for site, place in plan.items():
        if place.base is not None:
            _write_base(place, new[site], specs[site])
    for site, module in {**new, **copies}.items():
        layer = layers.get(site) or biased.get(site) or whole[site]
        host(layer, state.active, Whole if site in whole else _mode(layer))
        layer.slots[name] = module.requires_grad_(trainable).train(layer.training)  # type: ignore[index, union-attr]
        state.hosts[site] = layer
    state.placed[name] = Placed(spec, tuple(new), tuple(copies))
    state.active.change((name,))
    trained = sum(p.numel() for m in (*new.values(), *copies.values()) for p in m.parameters())
    return Attached(
        name, tuple(new), tuple(copies), trained if trainable else 0, elements(model, adapted=False) + trained
    )


def _start(model: nn.Module) -> State:
    """Freeze the base and give the model its state."""
    state = State(trained_before=[p for p in model.parameters() if p.requires_grad])
    for parameter in state.trained_before:
        parameter.requires_grad_(False)
    vars(model)["_veneer"] = state
    return state


def elements(model: nn.Module, *, adapted: bool = True) -> int:
    """How many numbers the parameters of a model stand for, shared ones once; 4-bit codes lie two to a byte. Without
    `adapted` those of adapters are left out."""
    modules = model.modules() if adapted else plain_modules(model).values()
    own = {id(p): _stands_for(m, n, p) for m in modules for n, p in m._parameters.items() if p is not None}
    return sum(own.values())


def _stands_for(host: nn.Module, name: str, p: Tensor) -> int:
    if name != "weight" or is_plain(p) or is_packed(host) is None or op_for(type(host)) is None:
        return p.numel()
    return math.prod(op_of(host).shape(host))


def _check_name(name: str, state: State | None) -> None:
    if not name or "." in name or name in dir(nn.ModuleDict):
        raise ConfigError(f"{name!r} cannot be an adapter's name", fix="use a short word without dots")
    if state is None:
        return
    if name in state.placed:
        raise StateError(
            f"there is already an adapter named {name!r}", fix=f"choose another name, or detach(model, {name!r}) first"
        )
    if state.merged is not None:
        raise StateError("the model is merged, so a new adapter would start from W + dW", fix="unmerge(model) first")
    if state.active.pending:
        state.active.change(state.active.names)  # raises, and says why


def _plan(
    layers: Mapping[str, nn.Module], specs: Mapping[str, LoRA], dtype: torch.dtype | None, init: bool
) -> dict[str, Site]:
    """A Site for every layer, or one error with everything that stands against it."""
    plan, problems = {}, []
    for name, layer in layers.items():
        own = specs[name]
        if isinstance(layer, Whole):
            problems.append(f"{name} is trained whole by another adapter")
            continue
        op = op_of(layer)
        problems += [f"{name}: {problem}" for problem in _against(layer, op, own, init)]
        held = (*own_parameters(layer).values(), *layer._buffers.values())  # some packed layers hold buffers only
        weight = next((t for t in held if t is not None), None)
        device = weight.device if weight is not None else torch.device("cpu")
        options = {**DELTAS[own.delta].options, **own.options}
        plan[name] = Site(name, layer, op, own.rank, own.scale, dtype or _adapter_dtype(weight), device, options)
    if problems:
        raise TargetError("this adapter cannot be attached", problems=problems)
    for delta in {specs[name].delta for name in plan}:
        DELTAS[delta].share([site for name, site in plan.items() if specs[name].delta == delta])
    return plan


def _look_at_data(
    model: nn.Module, plan: dict[str, Site], specs: dict[str, LoRA], spec: LoRA, data: Iterable[Any] | None, loss: Loss
) -> LoRA:
    """Give each site what its init asked to see; returns the spec with the ranks that came of it."""
    wanted = {NEEDS[specs[name].init] for name in plan if specs[name].init in NEEDS}
    if wanted and data is None:
        asking = sorted({specs[n].init for n in plan if specs[n].init in NEEDS})
        raise ConfigError(f"init {', '.join(asking)} looks at data", fix="attach(model, spec, data=a few batches)")
    batches = list(data) if wanted else []  # type: ignore[arg-type]
    for need in sorted(wanted):
        layers = {n: site.host for n, site in plan.items() if NEEDS.get(specs[n].init) == need}
        rank = max(plan[n].rank for n in layers)
        for name, seen in observe(model, layers, need, batches, loss, rank).items():
            plan[name].seen = seen
    sharing = {n: s for n, s in plan.items() if specs[n].init in SHARES_RANKS}
    if not sharing:
        return spec
    rho = max(SHARES_RANKS[specs[n].init] for n in sharing)
    ranks = share_ranks({n: s.seen.explained for n, s in sharing.items()}, {n: s.rank for n, s in sharing.items()}, rho)
    exact = {}
    for name, rank in ranks.items():
        alpha = specs[name].alpha * _alpha_factor(specs[name], rank)  # the scale stays what it was
        plan[name].rank = rank
        exact[re.escape(name)] = {"rank": rank, "alpha": alpha}
    return dataclasses.replace(spec, overrides={**exact, **spec.overrides})


def _ready_to_change_the_base(
    model: nn.Module,
    plan: Mapping[str, Site],
    specs: Mapping[str, LoRA],
    state: State | None,
    round_trip: RoundTrip | None,
    originals: Originals | None,
    inputs: Known | None,
) -> None:
    """An init that writes the base needs one that nobody else has built upon, and that can be written; where it is
    packed already, what it was before."""
    changed = [n for n in plan if specs[n].init in CHANGES_BASE]
    if originals is not None:
        for name in [n for n in changed if is_packed(plan[n].host) is not None]:
            plan[name].originals, plan[name].known = originals, inputs
            changed.remove(name)
    if not changed:
        return
    if round_trip is None:
        raise ConfigError(
            f"init {specs[changed[0]].init!r} starts from what quantising will lose",
            fix="attach(model, spec, round_trip=function), where function(W) is W quantised and read back; for a base "
            "that is packed already, originals=function, where function(name) is the layer's weight as it was",
        )
    shared = {n for group in tied_groups(model) for n in group}
    problems = []
    for name in changed:
        plan[name].round_trip, packed = round_trip, is_packed(plan[name].host)
        if packed is not None:
            problems.append(f"{name} is packed already ({packed}); attach to the full-precision base, then quantise")
        if state is not None and name in state.hosts:
            others = ", ".join(state.hosts[name].slots)  # type: ignore[arg-type]
            problems.append(f"{name} carries {others}, trained on the base as it is; two bases in one are not possible")
        if name in shared:
            problems.append(f"{name} shares its weight with another layer, which would change with it")
    if problems:
        raise TargetError("this init changes the base, which cannot be changed here", problems=problems)


def _write_base(place: Site, adapter: Adapter, own: LoRA) -> None:
    """The base becomes what the init made of it; a combine rule that looks at the base looks again."""
    stored = place.op.to_weight(place.host, place.base)  # type: ignore[arg-type]
    write_weight(place.host, stored.to(place.host_dtype))
    if adapter.combine_changes_base:
        adapter.combine = COMBINES[own.combine](place, adapter.delta)  # type: ignore[arg-type]


def _alpha_factor(spec: LoRA, rank: int) -> float:
    return spec.scale / SCALINGS[spec.scaling](spec.alpha, rank)


def _adapter_dtype(weight: Tensor | None) -> torch.dtype:
    wide = weight is not None and weight.is_floating_point() and weight.dtype.itemsize >= 4
    return weight.dtype if wide else torch.float32  # type: ignore[union-attr]


def _against(layer: nn.Module, op: Op, spec: LoRA, init: bool) -> Iterator[str]:
    out, n = op.shape(layer)
    if init and spec.rank > min(out, n) and DELTAS[spec.delta].has_rank:
        yield f"rank {spec.rank} is above the layer's own rank, at most {min(out, n)} for {out} x {n}"
    if getattr(layer, "max_norm", None) is not None:
        yield "an embedding with max_norm rewrites its weight when called, so it cannot be frozen"
    if isinstance(layer, Leaf) and own_parameters(layer)["weight"].ndim > 2 and not DELTAS[spec.delta].takes_stacks:
        yield f"delta {spec.delta!r} cannot hold a stack of matrices"
    if (_mode(layer) is Readable or isinstance(layer, Leaf)) and spec.dropout:
        yield "dropout acts on the input, and this layer's weight is read without one; set dropout=0 for it"
    if spec.bias == "lora" and (op.looks_up or _mode(layer) is Readable or isinstance(layer, Leaf)):
        yield "a bias in B is added to an output, and this is no layer that adds one; leave it out, or bias='lora_only'"


def _mode(layer: nn.Module) -> type:
    """nn.MultiheadAttention reads the weight of its out_proj; everything else is called."""
    kind = Readable if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear) else Adapted
    return kind


def _adapter(site: Site, init: bool, own: LoRA) -> Adapter:
    with torch.no_grad():
        delta = DELTAS[own.delta].create(site, INITS[own.init] if init else unset, own.dropout)
        combine = COMBINES[own.combine](site, delta)
    has_bias = own_parameters(site.host).get("bias") is not None
    if own.bias == "lora" and not has_bias:
        return Adapter(delta, combine, nn.Parameter(torch.zeros(site.shape[0], dtype=site.dtype, device=site.device)))
    return Adapter(delta, combine, _bias_change(site.host) if has_bias and own.bias != "none" else None)


def _with_tokens(
    model: nn.Module,
    spec: LoRA,
    layers: Mapping[str, nn.Module],
    specs: Mapping[str, LoRA],
    whole: Mapping[str, nn.Module],
) -> tuple[dict[str, nn.Module], dict[str, LoRA]]:
    """The layers and what holds for each, with the tables of which only rows are trained among them."""
    tables = select_tokens(model, spec)
    problems = [f"{n} is a target as well; exclude it there, or leave out its rows" for n in tables if n in layers]
    problems += [f"{n} is trained whole, all rows of it" for n in tables if n in whole]
    if problems:
        raise TargetError("token_rows names tables that are adapted otherwise", problems=problems)
    found = {n: layer for n, (layer, _) in tables.items()}
    return {**layers, **found}, {**specs, **{n: own for n, (_, own) in tables.items()}}


def _following(follower: Follower, plan: Mapping[str, Site], new: Mapping[str, Adapter], spec: LoRA) -> Adapter:
    """The adapter of a layer that shares its weight with another and shows that one's change."""
    delta = new[follower.source].delta.mirrored(follower.turned)  # type: ignore[union-attr]
    wants_bias = spec.bias in ("lora_only", "all") and own_parameters(follower.layer).get("bias") is not None
    return Adapter(delta, Add(plan[follower.source], delta), _bias_change(follower.layer) if wants_bias else None)


def _bias_change(layer: nn.Module) -> nn.Parameter:
    bias = layer._parameters["bias"]
    return nn.Parameter(torch.zeros_like(bias, dtype=_adapter_dtype(bias)))  # type: ignore[arg-type]


def _bias_layers(
    model: nn.Module, layers: Mapping[str, nn.Module], whole: Mapping[str, nn.Module], spec: LoRA
) -> dict[str, nn.Module]:
    """For bias="all": the other layers that have a bias and add it to their output."""
    if spec.bias != "all":
        return {}
    found, problems = {}, []
    for name, module in plain_modules(model).items():
        if module._parameters.get("bias") is None or name in layers:
            continue
        if any(name == w or name.startswith(w + ".") for w in whole):
            continue
        if op_for(type(module)) is not None or isinstance(module, NORMS):
            found[name] = module
        else:
            problems.append(f"{name}: what {type(module).__name__} does with its bias is not known")
    if problems:
        raise TargetError(
            "bias='all' cannot reach some biases", problems=problems, fix="bias='lora_only', or modules_to_save"
        )
    return found


def _own_copy(module: nn.Module, name: str) -> nn.Module:
    """A module's own copy for one adapter: of the base, not of another adapter's copy."""
    if isinstance(module, Whole):
        held = dict(module.slots)
        module.slots.clear()
        try:
            twin = copy.deepcopy(module)
        finally:
            module.slots.update(held)
        release(twin)
        return twin
    if any(isinstance(m, Hosted) for m in module.modules()):
        raise TargetError(
            f"modules_to_save names a module that carries another adapter's layers: {type(module).__name__}",
            fix=f"attach {name!r} to a model without that adapter, or leave the module out",
        )
    return copy.deepcopy(module)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take adapter `name` (or all) away. The last one gives every layer its own class back.

    On a merged model the merged weights stay: merge and detach together bake an adapter into the base.
    """
    state = state_of(model)
    names = list(state.placed) if name is None else [name]
    doomed = {n: _placed(model, n) for n in names}
    if state.merged is not None and len(doomed) < len(state.placed):
        raise StateError(
            "some adapters would stay on weights that another one was merged into",
            fix="unmerge(model) first, or detach(model) to bake the merge in and drop all adapters",
        )
    keep = tuple(n for n in state.active.names if n not in doomed)
    state.active.change(keep if len(keep) < len(state.active.names) else state.active.names, None)
    for n, placed in doomed.items():
        for site in (*placed.sites, *placed.saved):
            layer = state.hosts[site]
            del layer.slots[n]  # type: ignore[union-attr]
            if not layer.slots:
                release(layer)
                del state.hosts[site]
        del state.placed[n]
    if not state.placed:
        for parameter in state.trained_before:
            parameter.requires_grad_(True)
        del vars(unwrapped(model))["_veneer"]


# --- switching ------------------------------------------------------------------------------------------------------


def activate(model: nn.Module, names: Mixture) -> None:
    """Make one adapter active, several (a sum of dW, weighted if given as a mapping), or None for the base.

    One assignment: the cost does not depend on the model's size or on how many adapters are loaded.
    """
    state = state_of(model)
    if state.merged is not None and names is not None:
        raise StateError(f"{state.merged!r} is merged into the weights", fix="unmerge(model) before switching")
    state.active.change(*mixture_of(model, state, names))


def mixture_of(model: nn.Module, state: State, names: Mixture) -> tuple[tuple[str, ...], Tensor | None]:
    if names is None:
        return (), None
    if isinstance(names, str):
        _placed(model, names)
        return (names,), None
    for name in names:
        _placed(model, name)
    if len(set(names)) < len(names):
        raise ConfigError(f"an adapter is named twice in {list(names)}", fix='give it a weight: {"a": 2.0}')
    if not isinstance(names, Mapping):
        return tuple(names), None
    return tuple(names), torch.tensor([float(w) for w in names.values()], device=device_of(model))


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base, bit for bit, for the length of the block."""
    if is_merged(model):
        raise StateError("the adapters are merged into the weights", fix="unmerge(model) gives the base back")
    with state_of(model).active.changed(()):
        yield model


@contextmanager
def routed(model: nn.Module, rows: Sequence[Mixture]) -> Iterator[nn.Module]:
    """One adapter, None or a mapping of weights for each row of the batch, for the length of the block.

    A batch that is a multiple of `rows` (beams, or time folded into the batch) repeats each row in place.
    """
    state = state_of(model)
    if state.merged is not None:
        raise StateError("a merged model answers every row alike", fix="unmerge(model) first")
    weights = [row_of(model, row) for row in rows]
    names = tuple(dict.fromkeys(n for row in weights for n in row))
    mix = torch.tensor([[row.get(n, 0.0) for n in names] for row in weights], device=device_of(model))
    with state.active.changed(names, mix.reshape(len(weights), len(names))):
        yield model


def row_of(model: nn.Module, row: Mixture) -> dict[str, float]:
    if row is None:
        return {}
    weights = {row: 1.0} if isinstance(row, str) else row
    if not isinstance(weights, Mapping):
        weights = dict.fromkeys(weights, 1.0)
    for name in weights:
        _placed(model, name)
    return {n: float(w) for n, w in weights.items()}


# --- merging --------------------------------------------------------------------------------------------------------


def merge(model: nn.Module, names: Mixture = None, *, keep_base: bool = True, untie: bool = False) -> Merged:
    """Write W + dW into the weights, so that the adapted model runs at the base's own speed.

    names: as in activate; the active adapters when None. keep_base: hold the base's weights so that unmerge restores
    them exactly; without, the extra memory is one layer's and the merge is for good. untie: give a layer whose weight
    is shared (an embedding tied to the head) a weight of its own instead of refusing.

    Sums are formed in fp32 and rounded once. A narrow type loses part of a small dW; the share kept is reported for
    each layer, and a loss of more than a tenth is warned about.
    """
    state = state_of(model)
    if state.merged is not None:
        raise StateError(f"{state.merged!r} is merged already", fix="unmerge(model) first")
    names = names if names is not None else _active_mixture(state)
    chosen, mix = mixture_of(model, state, names)
    if not chosen:
        raise StateError("no adapter is active, so there is nothing to merge", fix='merge(model, "name")')
    weights = [1.0] * len(chosen) if mix is None else mix.tolist()
    acting = {
        site: [(layer.slots[n], w) for n, w in zip(chosen, weights, strict=True) if n in layer.slots]  # type: ignore[union-attr, index, operator]
        for site, layer in state.hosts.items()
        if any(n in layer.slots for n in chosen)  # type: ignore[union-attr, operator]
    }
    _refuse_tied(model, state, acting, untie)
    _refuse_homeless(state, acting)
    _refuse_broken(acting)
    _refuse_packed(state, acting)
    state.active.change(())
    state.resume, state.merged, state.kept = (chosen, mix), names, [] if keep_base else None
    kept: dict[str, float] = {}
    written: dict[int, str] = {}  # weights that are done, by identity: layers that share one show the same change
    with torch.no_grad():
        for site, adapters_here in acting.items():
            weight = id(own_parameters(state.hosts[site]).get("weight", site))
            done = written.setdefault(weight, site)
            kept[site] = _merge_layer(state.hosts[site], adapters_here, state.kept, kept.get(done))
    report = Merged(kept)
    if report.share < 0.9:
        worst = min(kept, key=kept.__getitem__)
        dtype = read_weight(state.hosts[worst]).dtype
        warnings.warn(
            f"merging kept only {100 * report.share:.0f} % of dW in {worst}: {dtype} is too coarse for a change this "
            "small. Merge into an fp32 copy of the base, or serve the adapter unmerged.",
            stacklevel=2,
        )
    return report


def _active_mixture(state: State) -> Mixture:
    if state.active.routed:
        raise StateError("rows are routed one by one, which no single weight can express", fix="leave routed() first")
    names, mix = state.active.names, state.active.mix
    return list(names) if mix is None else dict(zip(names, mix.tolist(), strict=True))


def _merge_layer(
    layer: nn.Module, acting: list[tuple[Any, float]], kept: list[Any] | None, done: float | None
) -> float:
    """Merge one layer; returns the share of dW that survived rounding: `done` where its weight has been merged."""
    if isinstance(layer, Whole):
        _merge_whole(layer, acting, kept)
        return 1.0
    bias = layer._parameters.get("bias")
    changes = [(adapter.bias, w) for adapter, w in acting if adapter.bias is not None]
    if changes:
        _keep(kept, layer, "bias", bias)
        bias.copy_(bias + sum(w * change for change, w in changes))  # type: ignore[union-attr, operator]
    acting = [(adapter, w) for adapter, w in acting if adapter.delta is not None]
    if not acting or done is not None:
        return 1.0 if done is None else done
    raw = own_parameters(layer).get("weight")
    _keep(kept, layer, "weight", raw if raw is not None else read_weight(layer))
    plain = raw is not None and raw.ndim == 2 and is_plain(raw) and all(isinstance(a.combine, Add) for a, _ in acting)
    if plain and op_of(layer).to_matrix(layer, raw).data_ptr() == raw.data_ptr():  # type: ignore[union-attr]
        return _merge_rows(op_of(layer).to_matrix(layer, raw), acting)
    return _merge_dense(layer, acting)


def _merge_rows(w: Tensor, acting: list[tuple[Adapter, float]]) -> float:
    """W += sum of s B A, in place and a few rows at a time, so that no second matrix of W's size is made."""
    factors = [(a.delta.factors(), a.delta.scale * weight) for a, weight in acting]  # type: ignore[union-attr]
    if w.dtype in (torch.float32, torch.float64):
        for (a, b), scale in factors:
            w.addmm_(b.to(w.dtype), a.to(w.dtype), alpha=scale)
        return 1.0
    rows, survived, wanted = max(1, CHUNK // w.shape[1]), 0.0, 0.0
    for start in range(0, w.shape[0], rows):
        piece = w[start : start + rows]
        change = sum(scale * (b[start : start + rows].float() @ a.float()) for (a, b), scale in factors)
        before = piece.float()
        piece.copy_(before + change)
        survived += float(((piece.float() - before) * change).sum())
        wanted += float((change * change).sum())  # type: ignore[operator]
    return survived / wanted if wanted else 1.0


def _merge_dense(layer: nn.Module, acting: list[tuple[Adapter, float]]) -> float:
    op = op_of(layer)
    stored = read_weight(layer)
    w = op.to_matrix(layer, stored).to(torch.promote_types(stored.dtype, torch.float32))
    change = sum(weight * (adapter.weight(w) - w) for adapter, weight in acting)
    write_weight(layer, op.to_weight(layer, w + change).to(stored.dtype))
    if stored.dtype in (torch.float32, torch.float64):
        return 1.0
    now = op.to_matrix(layer, read_weight(layer)).to(w.dtype)
    wanted = float((change * change).sum())  # type: ignore[operator]
    return float(((now - w) * change).sum()) / wanted if wanted else 1.0


def _merge_whole(layer: nn.Module, acting: list[tuple[nn.Module, float]], kept: list[Any] | None) -> None:
    mine = {k: v for k, v in layer.state_dict(keep_vars=True).items() if not k.startswith("lora.")}
    theirs = [(dict(twin.state_dict(keep_vars=True)), w) for twin, w in acting]
    for key, value in mine.items():
        owner, _, leaf = key.rpartition(".")
        _keep(kept, layer.get_submodule(owner), leaf, value)
        if value.is_floating_point():
            value.copy_(value + sum(w * (twin[key] - value) for twin, w in theirs))
        else:
            value.copy_(theirs[-1][0][key])


def _keep(kept: list[Any] | None, layer: nn.Module, leaf: str, value: Tensor | None) -> None:
    if kept is not None and value is not None:
        kept.append((layer, leaf, value.detach().clone()))


def unmerge(model: nn.Module) -> None:
    """Give the base's weights back exactly, and the adapters that were merged their activity."""
    state = state_of(model)
    if state.merged is None:
        raise StateError("nothing is merged", fix="merge(model) first")
    if state.kept is None:
        raise StateError(
            "the base was not kept when merging", fix="merge(model, ..., keep_base=True), or load the base again"
        )
    with torch.no_grad():
        for layer, leaf, value in state.kept:
            own = own_parameters(layer).get(leaf, layer._buffers.get(leaf))
            write_weight(layer, value) if own is None else own.copy_(value)
    state.kept, state.merged = None, None
    state.active.change(*state.resume)


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """The base's own weights for the length of the block, where a merge keeps them; then merged again."""
    state = state_of(model)
    if state.merged is None or state.kept is None:
        yield
        return
    names = state.merged
    unmerge(model)
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when it was merged first
            merge(model, names)


def _refuse_homeless(state: State, acting: Mapping[str, list[tuple[Any, float]]]) -> None:
    """A bias in B goes where the layer's own bias is; one that has none cannot take it up."""
    homeless = [
        site
        for site, here in acting.items()
        if not isinstance(state.hosts[site], Whole)
        and own_parameters(state.hosts[site]).get("bias") is None
        and any(adapter.bias is not None for adapter, _ in here)
    ]
    if homeless:
        raise StateError(
            "these layers have no bias that the adapter's could be added to",
            problems=homeless,
            fix="serve this adapter unmerged, or train it without bias='lora'",
        )


def _refuse_broken(acting: Mapping[str, list[tuple[nn.Module, float]]]) -> None:
    """A NaN in a factor would spread over the whole base; find it before the first weight is written."""
    broken = [
        site
        for site, here in acting.items()
        if not all(bool(torch.isfinite(p).all()) for module, _ in here for p in module.parameters() if not p.is_meta)
    ]
    if broken:
        raise StateError("these adapters hold NaN or infinite values and were not merged", problems=broken)


def _refuse_packed(state: State, acting: Mapping[str, Any]) -> None:
    """W + dW rounded to 4 or 8 bits again would lose most of dW and move W as well, so it is not done in silence."""
    kinds = {site: kind for site in acting if (kind := is_packed(state.hosts[site])) is not None}
    if kinds:
        raise StateError(
            "these layers hold their weights packed, and merging would round dW away",
            problems=[f"{site}: {kind}" for site, kind in kinds.items()],
            fix=UNPACK_FIRST,
        )


def _refuse_tied(model: nn.Module, state: State, acting: Mapping[str, Any], untie: bool) -> None:
    """Merging into a shared weight would change every layer that shares it."""
    owners: dict[int, list[str]] = {}
    for name, module in unwrapped(model).named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    problems = []
    for site in acting:
        layer = state.hosts[site]
        for leaf, parameter in own_parameters(layer).items():
            owner = site.rpartition(".")[0] if isinstance(layer, Leaf) else site
            others = [o for o in owners.get(id(parameter), []) if o != owner]
            if parameter is None or not others or _is_one_change(acting, [site, *others]):
                continue
            if untie:
                setattr(layer, leaf, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            else:
                problems.append(f"{site}.{leaf} is also {', '.join(f'{o}.{leaf}' for o in others)}")
    if problems:
        raise StateError(
            "merging would change layers that the adapter does not belong to, because their weights are tied",
            problems=problems,
            fix="merge(model, ..., untie=True) gives the adapted layer its own weight; set "
            "model.config.tie_word_embeddings = False before saving the model",
        )


def _is_one_change(acting: Mapping[str, list[tuple[Any, float]]], owners: list[str]) -> bool:
    """Whether all layers that share a weight show the same change of it, which may then be written once."""

    def shown(site: str) -> list[tuple[int, float]]:
        changes = [(getattr(held, "delta", held), w) for held, w in acting.get(site, ())]  # or a module trained whole
        return [(id(getattr(change, "source", change)), w) for change, w in changes]

    return bool(shown(owners[0])) and all(shown(owner) == shown(owners[0]) for owner in owners)


# --- looking and checking -------------------------------------------------------------------------------------------


def check_alive(model: nn.Module, finite: bool = True) -> tuple[str, ...]:
    """After a backward: every active adapter got a gradient in every layer, of numbers. Raises naming those without.

    This is what finds a layer whose forward was replaced, whose weight is read without being called, or whose adapter
    a fused loss passed by. An expert to which the router sent no token is no such case; returned is a sentence for each
    of them. finite: False where somebody else sees to gradients that overflow (the scaler of fp16).
    """
    state = state_of(model)
    silent: dict[tuple[str, str], str] = {}
    broken: list[str] = []
    alive: dict[str, set[str]] = {name: set() for name in state.active.names}
    for name in state.active.names:
        for site in (*state.placed[name].sites, *state.placed[name].saved):
            module = state.hosts[site].slots[name]  # type: ignore[index, union-attr]
            trained = [p for p in module.parameters() if p.requires_grad]
            if finite and not all(bool(p.grad.isfinite().all()) for p in trained if p.grad is not None):
                broken.append(f"{site} ({name})")
            if any(p.grad is not None and bool(p.grad.any()) for p in trained):
                alive[name].add(site)
            elif trained:
                has_none = all(p.grad is None for p in trained)
                silent[name, site] = f"{site} ({name})" + ("" if has_none else ": only zeros")
    reached = set().union(*alive.values())  # layers that some adapter got a gradient through: they were not idle
    idle = [
        (name, site)
        for name, site in silent
        if site not in reached and _is_idle_expert(unwrapped(model), site, alive[name])
    ]
    if problems := [said for place, said in silent.items() if place not in idle]:
        told, fix = f"{len(problems)} adapters got no gradient", SILENT
        if broken:
            told, fix = f"{told}, {len(broken)} one that is NaN or infinite", f"{fix}. {_overflow(broken)}"
        raise StateError(told, problems=[*problems, *(f"{each}: NaN or infinite" for each in broken)], fix=fix)
    if broken:
        told = f"{len(broken)} adapters got a gradient that is NaN or infinite"
        raise StateError(told, problems=broken, fix=_overflow(broken))
    sites = dict.fromkeys(site for _, site in idle)
    return tuple(f"{site} got no gradient: its expert was sent no token of this batch" for site in sites)


SILENT = (
    "their layers' forward never ran or does not reach the loss. Something reads the weight directly, replaced forward "
    "after attach (attach last), or skips these layers"
)


def _overflow(broken: Sequence[str]) -> str:
    """A backward pass spoils all that lies before the place where it fails, so the last layer is the one to look at."""
    return (
        f"{broken[-1]} is the last of them: at it or right behind it the backward pass leaves the numbers. In fp16 it "
        "overflows: train in bf16 or fp32, or with a scaler of gradients. Else: weights or rows that hold NaN, or a "
        "division by zero (a row without a trained token, a norm of zeros)"
    )


def _is_idle_expert(model: nn.Module, site: str, alive: Collection[str]) -> bool:
    """Whether a layer belongs to one of several experts, of which others have a gradient in the same place.

    Experts are the elements of a ModuleList beside which there is a router: a matrix with a row for each of them.
    """
    parts = site.split(".")
    for i in (i for i, part in enumerate(parts) if part.isdigit() and i):
        experts = model.get_submodule(".".join(parts[:i]))
        twins = (".".join([*parts[:i], str(other), *parts[i + 1 :]]) for other in range(len(list(experts.children()))))
        if isinstance(experts, nn.ModuleList) and _has_router(model, parts[:i], len(experts)):
            return any(twin in alive for twin in twins)
    return False


def _has_router(model: nn.Module, path: list[str], experts: int) -> bool:
    owner, inside = model.get_submodule(".".join(path[:-1])), path[-1] + "."
    own = (p for n, p in owner.named_parameters() if not n.startswith(inside) and ".lora." not in n)
    rows = [p.shape[0] for p in own if p.ndim == 2]
    return experts > 1 and experts in rows


def summary(model: nn.Module) -> Summary:
    """Trainable and total parameters, and for each adapter its bytes and layers."""
    state = state_of(model)
    sizes = {n: sum(p.numel() * p.element_size() for p in parameters(model, n).values()) for n in state.placed}
    trained = sum(p.numel() for p in unwrapped(model).parameters() if p.requires_grad)
    return Summary(trained, elements(unwrapped(model)), sizes, {n: len(p.sites) for n, p in state.placed.items()})


def tensors(model: nn.Module, name: str = "default") -> dict[tuple[str, str], Tensor]:
    """What a file must hold of an adapter: (site, field) -> tensor, where a field is a name of the delta or the combine
    rule (A, B, magnitude), `bias` (the change of the bias) or `saved.<parameter>` of a module that is trained whole."""
    placed, state = _placed(model, name), state_of(model)
    found: dict[tuple[str, str], Tensor] = {}
    for site in placed.sites:
        adapter = adapter_of(state.hosts[site], name)
        for part in (adapter.delta, adapter.combine):
            if part is not None:
                found |= {(site, key): value for key, value in part.state_dict(keep_vars=True).items()}
        if adapter.bias is not None:
            found[site, "bias"] = adapter.bias
    for site in placed.saved:
        twin = state.hosts[site].slots[name]  # type: ignore[index, union-attr]
        found |= {(site, f"saved.{key}"): value for key, value in twin.state_dict(keep_vars=True).items()}
    return found


def put(model: nn.Module, name: str, values: Mapping[tuple[str, str], Tensor]) -> None:
    """Copy values into an adapter. Checks every name and shape first; on any problem nothing is written.

    A start (A0, B0) that the values count from becomes the adapter's, where it has none of its own.
    """
    own = tensors(model, name)
    shapes = {place: tuple(tensor.shape) for place, tensor in own.items()}
    hosts = state_of(model).hosts
    asked = [site for site, key in values.keys() - own.keys() if key == "A0" and (site, "A") in own]
    begins = {site: d for site in asked if isinstance(d := adapter_of(hosts[site], name).delta, Lora)}
    shapes |= {(site, f"{key}0"): shapes[site, key] for site in begins for key in "AB"}
    problems = [f"{site}: the adapter has no {key!r}" for site, key in values.keys() - shapes.keys()]
    problems += [f"{site}: no value for {key!r}" for site, key in shapes.keys() - values.keys()]
    problems += [
        f"{site}: {key!r} is {shapes[site, key]} here and {tuple(value.shape)} in the values"
        for (site, key), value in values.items()
        if (site, key) in shapes and shapes[site, key] != tuple(value.shape)
    ]
    if problems:
        raise CheckpointError(f"these values do not fit adapter {name!r}", problems=sorted(problems))
    for delta in begins.values():
        delta.begin_here()
    own = tensors(model, name) if begins else own
    with torch.no_grad():
        for key, value in values.items():
            own[key].copy_(value)
