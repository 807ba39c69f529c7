"""Fused blocks recorded once as CUDA graphs and replayed: a block's work is one launch forward and one backward.

A block in the fused form is about sixty kernels, each of which Python has to ask for; on a fast card, a short row or a
small model the card waits for Python. A recorded block is asked for as a whole.

    calls 1, 2    as ever: kernels are compiled, libraries make their plans
    call 3        forward, then backward, are recorded; from here on they are replayed
    any later     replayed if everything that was recorded still holds, otherwise as ever; if what is new lasts, all
                  blocks are recorded anew

Masks of dropout are drawn anew at each replay, from where the card's random numbers are, and are those that the block
would draw as ever. A block that would draw them a second time, because it is computed again, cannot be recorded.

What a replay takes for granted is compared at each call: shapes, every tensor's place, modes, hooks, which adapters act
and how strongly (`Record.state`). Numbers in tensors may change, as an optimiser changes them; places may not. Where
it keeps most calls from being replayed, what differs is said, once.

Every record keeps the memory of what its backward pass needs, as a fused block does anyway between its two passes.
Scratch memory is shared by all: record k's scratch may lie where record k + 1 keeps something, for the backward pass of
k comes after that of k + 1. So all blocks are recorded in one pass through the model, in the order in which they run,
or not at all; and a block that is entered twice before its backward pass runs as ever the second time.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook
from torch.random import fork_rng

from veneer.errors import StateError
from veneer.quant.eight import forget

__all__ = ["Recorder", "Unfit", "replayed", "room_for"]

WARM = 2  # calls alike before a block is recorded
LASTING = 4  # calls alike, but unlike the record, before all is recorded anew: an odd last batch is none
ROUNDS = 16  # in which all is recorded; what changes more often than that is not worth it
ALIGNED = 64  # elements: where each gradient begins among a block's
MISSED = 24  # calls of a block that were not replayed, and more than those that were: then it is said why
Run = Callable[..., Tensor]
"""The block by its kernels: from x and the tensors among its keyword arguments to its output."""


@dataclass
class Recorder:
    """What the records of one model share."""

    pool: Any = None
    stream: Any = None
    warmed: set[Any] = field(default_factory=set)  # signatures that ran on the recording stream
    inputs: dict[Any, Shared] = field(default_factory=dict)
    gradients: dict[Any, Tensor] = field(default_factory=dict)  # by shape: what goes from one block back to the last
    rooms: dict[Any, Rooms] = field(default_factory=dict)  # by shapes: a block's gradients of what it trains
    outputs: dict[int, Tensor] = field(default_factory=dict)  # by place: what records give, which may be others' input
    records: weakref.WeakKeyDictionary[nn.Module, Record] = field(default_factory=weakref.WeakKeyDictionary)
    rounds: int = 0
    is_open: bool = False  # blocks are being recorded, in this pass through the model
    is_stale: bool = False  # a block is no longer what was recorded: all of them anew, before the next pass
    why_not: str | None = None
    said: set[str] = field(default_factory=set)
    has_complained: bool = False  # of calls that are unlike each other: one example will do
    tell: Callable[[str], Any] | None = None  # whom reasons are told; a warning where nobody asked for them

    def may_record(self, device: torch.device) -> bool:
        """Whether this is the pass in which blocks are recorded, or may become it."""
        if not self.is_open:
            if any(record.forward_graph is not None for record in self.records.values()):
                self.is_stale = True
                return False
            if self.rounds == ROUNDS:
                self.give_up("they keep being changed")
                return False
            self.is_open, self.rounds = True, self.rounds + 1
            self.pool, self.stream = torch.cuda.graph_pool_handle(), self.stream or torch.cuda.Stream(device)
        return True

    def record(self, work: Callable[[], Any]) -> tuple[Any, Any]:
        """A graph of `work`, and what it will have given after a replay."""
        graph = torch.cuda.CUDAGraph()
        with _recording(graph, self), torch.enable_grad():
            found = work()
        return graph, found

    def refresh(self, record: Record) -> None:
        """A pass begins with the block that was met first: no block is added to the round of another pass, and what
        does not hold any more is dropped, once no backward pass needs it."""
        if record is not next(iter(self.records.values())):
            return
        self.is_open = False
        if self.is_stale and not any(each.is_busy for each in self.records.values()):
            self.forget()

    def gradient_like(self, t: Tensor) -> Tensor:
        key = t.shape, t.dtype
        if key not in self.gradients:
            self.gradients[key] = torch.empty_like(t, memory_format=torch.contiguous_format, requires_grad=False)
        return self.gradients[key]

    def rooms_like(self, leaves: list[Tensor]) -> Rooms:
        key = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)
        if key not in self.rooms:
            self.rooms[key] = Rooms.of(leaves)
        return self.rooms[key]

    def give_up(self, why: str) -> None:
        """Blocks run as ever from now on."""
        self.why_not = why
        self.say(why)

    def say(self, why: str, module: nn.Module | None = None) -> None:
        """Each reason once, and loudly: it costs speed. With the name of the block that was met first."""
        if why in self.said:
            return
        self.said.add(why)
        who = "fused blocks" if module is None else f"{_name(module)} and its like"
        text = f"{who} are not recorded as CUDA graphs, and slower: {why}"
        if self.tell is not None:
            self.tell(text)
        else:
            warnings.warn(text, stacklevel=6)

    def release(self) -> None:
        """Nothing will be replayed any more: give the memory back, once no backward pass needs it."""
        if self.records and not any(each.is_busy for each in self.records.values()):
            self.forget()
            self.records.clear()

    def forget(self) -> None:
        """Free what records hold."""
        for record in self.records.values():
            record.drop()
        self.inputs.clear()
        self.gradients.clear()
        self.rooms.clear()
        self.outputs.clear()
        self.is_open = self.is_stale = False

    def __deepcopy__(self, memo: Any) -> Recorder:
        return Recorder()

    def __reduce__(self) -> Any:
        return Recorder, ()


@dataclass
class Shared:
    """A tensor that all blocks are called with, like the angles of a rotation: copied once for all of them."""

    static: Tensor
    source: weakref.ref[Tensor] | None = None
    version: int = -1

    def take(self, t: Tensor) -> None:
        if self.source is None or self.source() is not t or self.version != t._version:
            self.static.copy_(t)
            self.source, self.version = weakref.ref(t), t._version


class Rooms(NamedTuple):
    """Where the gradients of all that a block trains are put: side by side, so that they are taken out in one copy for
    each of their types. Blocks alike share it, for what the last put there has been taken out."""

    flats: tuple[Tensor, ...]
    places: tuple[tuple[int, int], ...]  # of each: in which flat, and from where
    shapes: tuple[torch.Size, ...]

    @staticmethod
    def of(leaves: list[Tensor]) -> Rooms:
        ends: dict[torch.dtype, int] = {}
        places = []
        for leaf in leaves:
            at = ends.setdefault(leaf.dtype, 0)
            places.append((list(ends).index(leaf.dtype), at))
            ends[leaf.dtype] = at + -(-leaf.numel() // ALIGNED) * ALIGNED
        flats = tuple(torch.empty(n, dtype=dtype, device=leaves[0].device) for dtype, n in ends.items())
        return Rooms(flats, tuple(places), tuple(leaf.shape for leaf in leaves))

    def views(self, flats: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(self.places, self.shapes, strict=True)
        return [flats[i][at : at + shape.numel()].view(shape) for (i, at), shape in pairs]

    def put(self, grads: list[Tensor]) -> None:
        pairs = list(zip(self.views(self.flats), grads, strict=True))
        alike = [pair for pair in pairs if pair[1].is_contiguous()]  # one other would take all of them the slow way
        if alike:
            copy: Any = torch._foreach_copy_  # type: ignore[attr-defined]
            copy(*map(list, zip(*alike, strict=True)))
        for room, grad in pairs:
            if not grad.is_contiguous():
                room.copy_(grad)

    def taken_out(self) -> list[Tensor]:
        return self.views([flat.clone() for flat in self.flats])


class Record:
    """One block's two graphs, and what they read and write."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.latest: Any = None  # what the last calls were like
        self.calls = 0  # how many of them in a row
        self.missed = 0  # calls that were not replayed
        self.replays = 0
        self.signature: Any = None  # what was recorded
        self.unfit: Any = None  # what cannot be
        self.generation = 0
        self.pending: weakref.ref[Any] | None = None  # the forward pass whose backward pass is to come
        self.drop()

    def drop(self) -> None:
        if (y := getattr(self, "y", None)) is not None:
            self.recorder.outputs.pop(y.data_ptr(), None)
        self.forward_graph: Any = None
        self.backward_graph: Any = None
        self.x: Tensor | None = None
        self.y: Tensor | None = None
        self.g: Tensor | None = None
        self.dx: Tensor | None = None  # in g's place where x and y are of one shape
        self.shared: dict[str, Shared] = {}
        self.leaves: list[Tensor] = []
        self.rooms: Rooms | None = None  # for their gradients

    # -------------------------------------------------------------- what must hold

    def fits(self, x: Tensor) -> bool:
        """Whether x lies, or may be put, where it is read from."""
        assert self.x is not None
        return x.data_ptr() == self.x.data_ptr() or self.x.data_ptr() not in self.recorder.outputs

    def miss(self, module: nn.Module, why: str) -> None:
        """A call that runs as ever. Some do; where most do, something is amiss."""
        self.missed += 1
        if self.missed >= MISSED and self.missed > self.replays and not self.recorder.has_complained:
            self.recorder.has_complained = True
            self.recorder.say(why, module)

    @property
    def is_busy(self) -> bool:
        return self.pending is not None and self.pending() is not None

    # -------------------------------------------------------------- recording

    def make(self, module: nn.Module, x: Tensor, tensors: dict[str, Tensor], run: Run) -> None:
        recorder = self.recorder
        self.signature = self.latest
        self.x = self._place_of(x)
        for name, t in tensors.items():
            key = name, t.shape, t.dtype
            if key not in recorder.inputs:
                recorder.inputs[key] = Shared(torch.empty_like(t, memory_format=torch.contiguous_format))
            self.shared[name] = recorder.inputs[key]
            self.shared[name].take(t)
        statics = {name: shared.static for name, shared in self.shared.items()}
        if self.x.data_ptr() != x.data_ptr():
            self.x.detach().copy_(x.detach())
        with _aliased(module) as own:
            if self.signature[0] not in recorder.warmed:
                self._warm(run, statics)
            forward, y = recorder.record(lambda: run(self.x, **statics))
            leaves = [leaf for leaf in _leaves(y) if leaf is not self.x]
            if any(id(leaf) not in own for leaf in leaves):
                raise Unfit("it trains what lies outside of it")
            self.g, self.dx = recorder.gradient_like(y), recorder.gradient_like(self.x)
            self.rooms = recorder.rooms_like(leaves)
            wanted = [self.x, *leaves] if self.x.requires_grad else leaves
            backward, _ = recorder.record(lambda: self._back(y, wanted))
        self.leaves = [own[id(leaf)] for leaf in leaves]
        self.y, self.forward_graph, self.backward_graph = y, forward, backward
        recorder.outputs[y.data_ptr()] = y.detach()

    def _back(self, y: Tensor, wanted: list[Tensor]) -> None:
        """The gradients of the leaves in their rooms, and of x in a place that may be that of y. y keeps what the pass
        reads."""
        assert self.x is not None and self.dx is not None and self.rooms is not None
        with _offering(self.dx):
            grads = list(torch.autograd.grad(y, wanted, self.g, retain_graph=True))
        if self.x.requires_grad and (dx := grads.pop(0)).data_ptr() != self.dx.data_ptr():
            self.dx.copy_(dx)
        self.rooms.put(grads)

    def _warm(self, run: Run, statics: dict[str, Tensor]) -> None:
        """Once on the stream that records, for what libraries set up for each stream."""
        recorder = self.recorder
        if not recorder.warmed:
            torch.cuda.empty_cache()  # what the first calls left lying about would stand beside the records' memory
        recorder.warmed.add(self.signature[0])
        assert self.x is not None
        with _beside(recorder.stream), torch.enable_grad(), fork_rng([self.x.device] * self.x.is_cuda):
            y = run(self.x, **statics)
            torch.autograd.grad(y, _leaves(y), torch.zeros_like(y))

    def _place_of(self, x: Tensor) -> Tensor:
        """Where x is read from: where it lies, if another record put it there, else a place of its own."""
        known = self.recorder.outputs.get(x.data_ptr())
        if known is not None and known.shape == x.shape:
            return known.detach().requires_grad_(x.requires_grad)
        return torch.empty_like(x, memory_format=torch.contiguous_format).requires_grad_(x.requires_grad)

    # -------------------------------------------------------------- replaying

    def forward(self, x: Tensor, token: Any) -> Tensor:
        assert self.x is not None and self.y is not None
        if x.data_ptr() != self.x.data_ptr():
            self.x.detach().copy_(x)
        self.forward_graph.replay()
        self.generation += 1
        self.pending = weakref.ref(token)
        return self.y.detach()

    def backward(self, generation: int, g: Tensor) -> list[Tensor]:
        """The gradients of x, in a place that the next block's backward pass may write to, and of the leaves."""
        if generation != self.generation or self.g is None:
            raise StateError(
                "a recorded block cannot go back: it has gone forward again, or was recorded anew, since",
                fix="run each backward pass before the next forward pass, or veneer.fuse(model, graphs=False)",
            )
        if g.data_ptr() != self.g.data_ptr():
            self.g.copy_(g)
        self.backward_graph.replay()
        self.pending, self.recorder.is_open = None, False
        assert self.dx is not None and self.rooms is not None
        return [self.dx, *self.rooms.taken_out()]


_offered: list[Tensor] = []  # where the gradient of the input is wanted, while a block's backward pass is recorded


@contextmanager
def _offering(room: Tensor) -> Iterator[None]:
    _offered.append(room)
    try:
        yield
    finally:
        _offered.clear()


def room_for(x: Tensor) -> Tensor | None:
    """Where a block may put the gradient of its input x as the last thing it does; where it does not, it is copied."""
    return _offered[0] if _offered and _offered[0].shape == x.shape and _offered[0].dtype == x.dtype else None


class Unfit(Exception):
    """Raised by a run whose block cannot be recorded as it is now, though others can."""


class Token:
    """Lives as long as somebody may still ask for the backward pass."""


class Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, record: Record, follows: bool, *leaves: Tensor) -> Tensor:
        ctx.token, ctx.record, ctx.follows = Token(), record, follows
        y = record.forward(x, ctx.token)
        ctx.generation = record.generation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx, *found = ctx.record.backward(ctx.generation, g)
        if not ctx.needs_input_grad[0]:
            return None, None, None, *found
        return dx if ctx.follows else dx.clone(), None, None, *found


def _follows(x: Tensor) -> bool:
    """Whether x comes straight from a recorded block and nobody looks at its gradient on the way back."""
    node = x.grad_fn
    return node is not None and node.name() == "ReplayedBackward" and not x._backward_hooks and not x.retains_grad


@contextmanager
def _aliased(module: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Every trained parameter of the module stands aside for another name of the same memory; by id, whom it stands
    for. Autograd binds what it knows of a leaf to the stream on which it first met it, and that is the recording one.
    """
    own: dict[int, Tensor] = {}
    places = []
    for each in module.modules():
        for name, p in each._parameters.items():
            if p is not None and p.requires_grad:
                places.append((each._parameters, name, p))
                each._parameters[name] = p.detach().requires_grad_()  # type: ignore[assignment]
                own[id(each._parameters[name])] = p
    try:
        yield own
    finally:
        for held, name, p in places:
            held[name] = p


def _leaves(y: Tensor) -> list[Tensor]:
    """Every tensor whose gradient a backward pass from y adds to."""
    found: dict[int, Tensor] = {}
    seen, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found[id(leaf)] = leaf
        waiting += [each for each, _ in node.next_functions]
    return list(found.values())


@contextmanager
def _beside(stream: Any) -> Iterator[None]:
    here = torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        yield
    here.wait_stream(stream)


@contextmanager
def _recording(graph: Any, recorder: Recorder) -> Iterator[None]:
    """torch.cuda.graph collects garbage and waits for the card each time; for many blocks that takes many seconds."""
    collecting = gc.isenabled()
    gc.disable()  # what is collected in between might ask the card for something that cannot be recorded
    forget()
    try:
        with _beside(recorder.stream):
            graph.capture_begin(pool=recorder.pool, capture_error_mode="thread_local")
            try:
                yield
            except BaseException:
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
    finally:
        forget()
        if collecting:
            gc.enable()


# ------------------------------------------------------------------ whether, and what must hold


def replayed(
    recorder: Recorder, module: nn.Module, x: Tensor, settings: Any, tensors: dict[str, Tensor], run: Run
) -> Tensor | None:
    """The block's output by a replay; None where it has to run as ever.

    settings: what else the output depends on and can be compared. tensors: what the block is called with besides x.
    """
    if recorder.why_not is not None or not _can_record(x):
        recorder.release()
        return None
    if (why := _watched()) is not None:
        return None if why == RECORDING else recorder.say(why)
    record = recorder.records.get(module)
    if record is None:
        record = recorder.records[module] = Record(recorder)
    recorder.refresh(record)
    if record.is_busy:
        return record.miss(module, "it is entered again before its backward pass")
    if (state := state_of(module)) is None:
        return recorder.say("rows of a batch are routed to adapters of their own", module)
    before, signature = record.latest, (_signature(x, settings, tensors), state)
    record.calls = record.calls + 1 if signature == before else 1
    record.latest = signature
    if signature == record.unfit:
        return None
    if record.forward_graph is not None:
        if signature != record.signature or not record.fits(x):
            recorder.is_stale |= record.calls >= LASTING
            return record.miss(module, _difference(record.signature, signature))
    elif record.calls <= WARM or not recorder.may_record(x.device):
        return record.miss(module, _difference(before, signature))
    elif not _recorded(record, module, x, tensors, run):
        return None
    for name, shared in record.shared.items():
        shared.take(tensors[name])
    record.replays += 1
    return Replayed.apply(x, record, _follows(x), *record.leaves)  # type: ignore[return-value]


def _recorded(record: Record, module: nn.Module, x: Tensor, tensors: dict[str, Tensor], run: Run) -> bool:
    try:
        record.make(module, x, tensors, run)
    except Unfit as why:
        record.drop()
        record.unfit = record.latest
        record.recorder.say(str(why), module)
        return False
    except (RuntimeError, ValueError) as error:
        record.drop()
        record.recorder.give_up(f"recording failed: {str(error).splitlines()[0]}")
        return False
    return True


def _can_record(x: Tensor) -> bool:
    return x.is_cuda


RECORDING = "the whole step is being recorded"


def _watched() -> str | None:
    """Whether somebody wants to see, or keep elsewhere, what is saved; or records the whole step already."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return RECORDING
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else "something looks at what is saved for the backward pass, or keeps it elsewhere"


def _signature(x: Tensor, settings: Any, tensors: dict[str, Tensor]) -> Any:
    given = tuple((name, t.shape, t.dtype, t.device) for name, t in tensors.items())
    return tuple(x.shape), x.dtype, x.device, x.requires_grad, x.is_contiguous(), settings, given


WORDS = ("shape", "type", "device", "need of gradients", "layout", "options", "further tensors")


def _difference(one: Any, other: Any) -> str:
    """In which way two calls are unlike, in words."""
    if one is None or one == other:
        return "too few of its calls follow each other alike"
    if one[0] == other[0]:
        return "its weights, modes, hooks or adapters keep changing"
    word, was, now = next(found for found in zip(WORDS, one[0], other[0], strict=True) if found[1] != found[2])
    if word == "shape":
        return f"too few batches are of one shape: {was}, then {now}"
    return f"the {word} of its input keep{'s' * (not word.endswith('s'))} changing"


def _name(module: nn.Module) -> str:
    state = module.__dict__.get("fused")
    return getattr(state, "name", "") or type(module).__name__


def state_of(module: nn.Module) -> tuple[Any, ...] | None:
    """All that a recorded block takes for granted about its modules; None where rows are routed, each on its own way,
    which a graph would go again whatever the next batch asks for."""
    found: list[Any] = [bool(_has_any_global_hook())]
    for each in module.modules():
        found.append(type(each))
        found.append(each.training)
        if each._forward_hooks or each._forward_pre_hooks or each._backward_hooks or each._backward_pre_hooks:
            found.append("hooked")
        for held in (each._parameters, each._buffers):
            for t in held.values():
                if t is not None:
                    found.append((id(t), t.data_ptr(), t.requires_grad, t.dtype))
        own = each.__dict__
        if "forward" in own or "inner_forward" in own:
            found.append("forward on the instance")
        if "scale" in own or "dropout" in own:
            found.append((own.get("scale"), own.get("dropout")))
        if "p" in own:
            found.append(own["p"])
        if (active := own.get("active")) is not None:
            if active.routed:
                return None
            mix = active.mix
            found.append((active.names, None if mix is None else (mix.data_ptr(), mix.shape)))
    return tuple(found)
