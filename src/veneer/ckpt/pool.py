"""Many adapters, few on the model: the rest wait in memory or on disk and are fetched before they are needed.

    pool = Pool(model, capacity=8)                        # at most eight on the model at a time
    pool.add("sql", "adapters/sql")                       # on disk; only looked at, to see that it fits
    pool.add("tone", "adapters/tone", hold="pinned")      # in page-locked memory, a copy away from the GPU
    pool.add("mine", hold="cpu")                          # takes an adapter off the model and keeps it in memory
    pool.prefetch("sql", "tone")                          # when a request comes in: a thread begins to read
    with pool.routed(["sql", None, "tone"]):              # when it is answered: waits for the rest, if there is any
        model(x)

    disk --read--> memory --side stream--> device --copy--> a place on the model      (the last step is the only one
     a thread of its own, while the model computes          in the caller's thread    that the model waits for)

Whoever is in use stays; beyond the capacity the one that was used longest ago goes, and is only forgotten, since what
is here is never written: its file, or its copy in memory, is what it was. What is wrong with a file is said by `add`;
what goes wrong while it is read is raised where the adapter is used, and the next use tries again.

Without `room` an adapter comes onto the model as itself: any kind, bit for bit as loaded. With `room`, places of that
rank and those layers are made once and plain LoRAs are written into them (core/swap.py), so that a compiled model is
never compiled again, at the price of computing with the room's rank.

One thread at a time may use a pool, as is true of the model.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.ckpt.base import base_of
from veneer.ckpt.config import CONFIG, RECOMPUTED, parse, read_config
from veneer.ckpt.fit import Fit, fit
from veneer.ckpt.hub import WEIGHTS, find
from veneer.ckpt.peft import attach_fitted, check_base, refuse_broken
from veneer.ckpt.tensorfile import TensorFile
from veneer.core.model import (
    Mixture,
    active_of,
    adapters,
    attach,
    detach,
    device_of,
    is_merged,
    mixture_of,
    put,
    row_of,
    spec_of,
    state_of,
    tensors,
    unwrapped,
)
from veneer.core.registry import near
from veneer.core.spec import LoRA
from veneer.core.swap import Values, misfits, overwrite
from veneer.errors import CheckpointError, ConfigError, StateError

__all__ = ["Pool", "swap"]

Folder = str | os.PathLike[str]
Hold = str  # "disk", "cpu" or "pinned"


# ---------------------------------------------------------------- one adapter in the place of another


def swap(
    model: nn.Module,
    folder: Folder,
    name: str = "default",
    *,
    revision: str | None = None,
    allow_other_base: bool = False,
) -> None:
    """Write the adapter in `folder` over adapter `name`, in place: what is compiled stays compiled.

    It must be of the same kind and of the same or a smaller rank, on the same layers or fewer. On any problem nothing
    is written. The place keeps its own spec: saving it writes the rank that it has.
    """
    _unmerged(model)
    fitted = _look(model, folder, name, revision, allow_other_base)
    refuse_broken(fitted.values, str(folder))
    _tell(fitted, folder)
    overwrite(unwrapped(model), name, fitted.spec, _plain(fitted, str(folder)))


def _look(model: nn.Module, folder: Folder, name: str, revision: str | None, allow_other_base: bool) -> Fit:
    """The file in the model's terms; its tensors are pages of the file that nobody has read yet."""
    path = find(folder, name, revision)
    parsed, file = parse(read_config(path / CONFIG), str(path / CONFIG)), TensorFile(path / WEIGHTS)
    _, notes = check_base(base_of(unwrapped(model)), parsed, file, allow_other_base)
    fitted = fit(unwrapped(model), parsed, file, name)
    fitted.notes += [*notes, *(f"{key}={value!r} in {CONFIG} is not known" for key, value in parsed.unknown.items())]
    return fitted


def _tell(fitted: Fit, folder: Folder) -> None:
    if fitted.notes:
        warnings.warn(f"reading {folder}: " + "; ".join(fitted.notes), stacklevel=3)


def _plain(fitted: Fit, where: str) -> Values:
    """What is written into a place: A, B and magnitudes; no biases, and no start that follows from the base."""
    problems = [f"{site}: a bias" for site in sorted({*fitted.biases, *fitted.bias_changes})]
    if fitted.spec.init in RECOMPUTED:
        problems.append(f"a start that is computed from the base ({fitted.spec.init})")
    if problems:
        fix = "load it under a name of its own; for the start: load it and save it again, which writes a plain LoRA"
        raise CheckpointError("This adapter holds what cannot be written over another.", where, fix, problems)
    return fitted.values


def _unmerged(model: nn.Module) -> None:
    if is_merged(model):
        raise StateError("adapters are merged into the weights", fix="unmerge(model) first")


# ---------------------------------------------------------------- what is held


@dataclass
class Filed:
    """An adapter of a folder. `kept`: its values in memory, unless it is held on disk."""

    folder: Folder
    revision: str | None
    allow_other_base: bool
    hold: Hold
    bytes: int
    kept: Fit | None = None

    def fetch(self, model: nn.Module, name: str) -> Fit:
        return self.kept or _look(model, self.folder, name, self.revision, self.allow_other_base)

    def place(self, model: nn.Module, name: str, source: Fit, values: Values) -> None:
        attach_fitted(model, dataclasses.replace(source, values=dict(values)), name, trainable=False)


@dataclass
class Taken:
    """An adapter that came off the model, with all that it had there."""

    spec: LoRA
    values: Values
    hold: Hold

    @property
    def bytes(self) -> int:
        return _bytes(self.values)

    def fetch(self, model: nn.Module, name: str) -> Taken:
        return self

    def place(self, model: nn.Module, name: str, source: Taken, values: Values) -> None:
        dtype = next((v.dtype for (_, key), v in values.items() if not key.startswith("saved.")), None)
        attach(model, self.spec, name, dtype=dtype, init=False, trainable=False)
        try:
            put(model, name, values)
        except BaseException:
            detach(model, name)
            raise


@dataclass
class Staged:
    """Values on the model's device, or on their way there until `ready`."""

    values: Values
    ready: torch.cuda.Event | None = None

    def wait(self) -> Values:
        """Let the current stream, not the caller, wait for the copy."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(next(iter(self.values.values())).device)
            stream.wait_event(self.ready)
            for value in self.values.values():
                value.record_stream(stream)
        return self.values


def _bytes(values: Values) -> int:
    return sum(value.numel() * value.element_size() for value in values.values())


def _in_memory(values: Values, pinned: bool) -> dict[tuple[str, str], Tensor]:
    """Copies that depend on no file and on no device."""
    return {key: v.detach().cpu().pin_memory() if pinned else v.detach().cpu().clone() for key, v in values.items()}


# ---------------------------------------------------------------- the pool


class Pool:
    """Adapters by name, `capacity` of them on `model` at a time (and at most `capacity_bytes`, where given).

    room: make all places once, as this LoRA says, and write adapters into them; for compiled models.
    """

    def __init__(
        self, model: nn.Module, capacity: int = 8, *, capacity_bytes: int | None = None, room: LoRA | None = None
    ) -> None:
        if capacity < 1 or (capacity_bytes is not None and capacity_bytes < 1):
            raise ConfigError(f"a pool of capacity={capacity}, capacity_bytes={capacity_bytes} holds nothing")
        _unmerged(model)
        self.model, self.capacity, self.capacity_bytes = unwrapped(model), capacity, capacity_bytes
        self._held: dict[str, Filed | Taken] = {}
        self._on: OrderedDict[str, str] = OrderedDict()  # adapter -> its name on the model, longest unused first
        self._users: dict[str, int] = {}  # how many open blocks use an adapter
        self._coming: dict[str, tuple[Fit | Taken, Future[Staged]]] = {}
        self._queue: dict[str, None] = {}  # asked for, and not begun while as many as there are places are coming
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="veneer-pool")
        self._stream: torch.cuda.Stream | None = None
        self._places = self._make(room) if room is not None else ()
        self._free = list(self._places)

    def _make(self, room: LoRA) -> tuple[str, ...]:
        """Attach the places. A start with B = 0 changes nothing and is finite, so an empty one does no harm."""
        plain = {"bias": "none", "modules_to_save": (), "delta": "lora", "init": "kaiming"}
        problems = [f"{key}={getattr(room, key)!r}" for key, value in plain.items() if getattr(room, key) != value]
        if problems:
            raise ConfigError("room is for plain LoRAs", problems=problems, fix="leave room out for other adapters")
        first, *rest = self._place_names()
        with self._as_before():
            attach(self.model, room, first, trainable=False)
            each = _bytes(tensors(self.model, first))
            if self.capacity_bytes is not None:
                self.capacity = min(self.capacity, self.capacity_bytes // each)
            if not self.capacity:
                detach(self.model, first)
                raise ConfigError(f"a place of this room takes {each:,} bytes, capacity_bytes={self.capacity_bytes:,}")
            rest = rest[: self.capacity - 1]
            for name in rest:
                attach(self.model, room, name, trainable=False)
        return (first, *rest)

    def _place_names(self) -> list[str]:
        taken = set(adapters(self.model))
        free = (name for i in itertools.count() if (name := f"place{i}") not in taken)
        return list(itertools.islice(free, self.capacity))

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Attaching and detaching change what is active; here they do not."""
        before = None
        if adapters(self.model):
            active = active_of(self.model)
            before = active.names, active.mix
        try:
            yield
        finally:
            if adapters(self.model):
                active_of(self.model).change(*(before or ((), None)))

    # ------------------------------------------------------------ what there is

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def resident(self) -> tuple[str, ...]:
        """Those on the model, the one that was used longest ago first."""
        return tuple(self._on)

    @property
    def resident_bytes(self) -> int:
        return sum(_bytes(tensors(self.model, n)) for n in self._places or self._on.values())

    def __str__(self) -> str:
        return (
            f"{len(self)} adapters, {len(self._on)} of at most {self.capacity} on the model "
            f"({self.resident_bytes / 2**20:.1f} MiB), {len(self._coming)} coming"
        )

    # ------------------------------------------------------------ adding and removing

    def add(
        self,
        name: str,
        folder: Folder | None = None,
        *,
        hold: Hold = "disk",
        revision: str | None = None,
        allow_other_base: bool = False,
    ) -> None:
        """Hold the adapter in `folder`, or, without one, the adapter `name` of the model, which leaves it.

        hold: "disk" (read again for each visit), "cpu" or "pinned" (page-locked memory, for a model on a GPU). All
        that could keep it from working here is checked now.
        """
        if name in self._held:
            raise StateError(
                f"the pool holds an adapter named {name!r}", fix=f"remove({name!r}) first, or another name"
            )
        self._check_hold(hold, folder)
        _unmerged(self.model)
        pinned = hold == "pinned"
        if folder is None:
            self._held[name] = self._take(name, hold, pinned)
            return
        if not self._places and name in adapters(self.model):
            raise StateError(f"the model has an adapter named {name!r}", fix="add(name) without a folder takes it")
        fitted = _look(self.model, folder, name, revision, allow_other_base)
        self._check_room(name, fitted.spec, _plain(fitted, str(folder)) if self._places else {}, str(folder))
        size, kept = _bytes(fitted.values), None
        self._check_size(name, size)
        if hold != "disk":
            refuse_broken(fitted.values, str(folder))
            kept = dataclasses.replace(fitted, values=_in_memory(fitted.values, pinned))
        _tell(fitted, folder)
        self._held[name] = Filed(folder, revision, allow_other_base, hold, size, kept)

    def _check_hold(self, hold: str, folder: object) -> None:
        if hold not in ("disk", "cpu", "pinned"):
            raise ConfigError(f"hold={hold!r} is not known.{near(hold, ('disk', 'cpu', 'pinned'))}")
        if hold == "pinned" and device_of(self.model).type != "cuda":
            raise ConfigError("page-locked memory is for models on a GPU", fix='hold="cpu"')
        if hold == "disk" and folder is None:
            raise ConfigError("an adapter of the model has no file", fix='save it and name its folder, or hold="cpu"')

    def _check_room(self, name: str, spec: LoRA, values: Values, where: str) -> None:
        problems = misfits(self.model, self._places[0], spec, values) if self._places else []
        if problems:
            fix = "a Pool with more room, or one without room, which takes every kind"
            raise CheckpointError(f"There is no room for adapter {name!r} in this pool.", where, fix, problems)

    def _check_size(self, name: str, size: int) -> None:
        if self.capacity_bytes is not None and not self._places and size > self.capacity_bytes:
            raise ConfigError(f"adapter {name!r} alone takes {size:,} bytes, capacity_bytes={self.capacity_bytes:,}")

    def _take(self, name: str, hold: Hold, pinned: bool) -> Taken:
        spec, values = spec_of(self.model, name), tensors(self.model, name)
        started = [f"{site}: {key}" for site, key in values if key == "A0"]
        if started:
            fix = "save it and add its folder: the file is a plain LoRA of twice the rank"
            raise ConfigError(f"adapter {name!r} keeps a start that it subtracts ({spec.init})", fix=fix)
        if self._places:
            self._check_room(name, spec, values, "the model")
        taken = Taken(spec, _in_memory(values, pinned), hold)
        self._check_size(name, taken.bytes)
        with self._as_before_without(name):
            detach(self.model, name)
        return taken

    @contextmanager
    def _as_before_without(self, name: str) -> Iterator[None]:
        if name in active_of(self.model).names:
            raise StateError(f"adapter {name!r} is active", fix="activate another one, or None, first")
        with self._as_before():
            yield

    def remove(self, name: str) -> None:
        """Forget an adapter; its file stays."""
        self._known(name)
        if self._users.get(name):
            raise StateError(f"adapter {name!r} is in use", fix="leave the block that uses it first")
        self.cancel(name)
        if name in self._on:
            self._evict(name)
        del self._held[name]

    def close(self) -> None:
        """Take everything off the model and stop reading. A pool is a context manager that ends so."""
        if any(self._users.values()):
            raise StateError("adapters of this pool are in use", fix="leave the blocks that use them first")
        self._queue.clear()
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._coming.clear()
        with self._as_before():
            for name in self._places or tuple(self._on.values()):
                detach(self.model, name)
        self._on.clear()
        self._held.clear()
        self._places, self._free = (), []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _known(self, name: str) -> Filed | Taken:
        if name not in self._held:
            some = ", ".join([*self._held][:8]) or "none"
            raise StateError(f"the pool has no adapter named {name!r}.{near(name, self._held)} It has: {some}")
        return self._held[name]

    # ------------------------------------------------------------ fetching

    def prefetch(self, *names: str) -> None:
        """Begin to read these, in this order; returns at once. At most as many as there are places come at a time."""
        for name in names:
            self._known(name)
            if name not in self._on and name not in self._coming:
                self._queue[name] = None
        self._pump()

    def cancel(self, *names: str) -> None:
        """They are not needed after all: drop what was read ahead."""
        for name in names:
            self._queue.pop(name, None)
            if name in self._coming:
                self._coming.pop(name)[1].cancel()
        self._pump()

    def _pump(self) -> None:
        while self._queue and len(self._coming) < self.capacity:
            name = next(iter(self._queue))
            del self._queue[name]
            self._begin(name)

    def _begin(self, name: str) -> None:
        """Open the file here, where the model may be looked at, and read it in the thread."""
        self._queue.pop(name, None)
        held = self._known(name)
        try:
            source = held.fetch(self.model, name)
            future = self._worker.submit(self._stage, name, source.values, held.hold)
        except CheckpointError as error:  # the file is gone, or another one: raised where it is used
            source, future = Taken(LoRA(), {}, "cpu"), Future()
            future.set_exception(error)
        self._coming[name] = source, future

    def _stage(self, name: str, values: Values, hold: Hold) -> Staged:
        """In the thread: values in memory, checked, and on the way to the device."""
        device = device_of(self.model)
        if hold == "disk":
            values = _in_memory(values, pinned=device.type == "cuda")
            refuse_broken({f"{site}.{key}": v for (site, key), v in values.items()}, f"adapter {name!r} of the pool")
        if device.type != "cuda":
            return Staged(values)
        self._stream = self._stream or torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            moved = {key: value.to(device, non_blocking=True) for key, value in values.items()}
            event = torch.cuda.Event()
            event.record(self._stream)
        return Staged(moved, event)

    # ------------------------------------------------------------ using

    @contextmanager
    def holding(self, *names: str) -> Iterator[Mapping[str, str]]:
        """Bring these onto the model and keep them there for the length of the block; gives their names on it."""
        wanted = tuple(dict.fromkeys(names))
        self._bring(wanted)
        for name in wanted:
            self._users[name] = self._users.get(name, 0) + 1
        try:
            yield {name: self._on[name] for name in wanted}
        finally:
            for name in wanted:
                self._users[name] -= 1
                if not self._users[name]:
                    del self._users[name]

    @contextmanager
    def active(self, names: Mixture) -> Iterator[nn.Module]:
        """As `activate`, for the length of the block."""
        weights, single = _row_of(names), names is None or isinstance(names, str)
        with self.holding(*weights) as on:
            if not adapters(self.model):
                yield self.model
                return
            here = {on[n]: w for n, w in weights.items()}
            chosen = next(iter(here), None) if single else here
            with state_of(self.model).active.changed(*mixture_of(self.model, state_of(self.model), chosen)):
                yield self.model

    @contextmanager
    def routed(self, rows: Sequence[Mixture]) -> Iterator[nn.Module]:
        """As `veneer.routed`: one adapter, None or a mapping of weights for each row of the batch."""
        weights = [_row_of(row) for row in rows]
        with self.holding(*(n for row in weights for n in row)) as on:
            if not adapters(self.model):
                yield self.model
                return
            here = [row_of(self.model, {on[n]: w for n, w in row.items()}) for row in weights]
            names = self._places or tuple(on.values())  # all places: the same graph whoever is in them
            mix = torch.tensor([[row.get(n, 0.0) for n in names] for row in here], device=device_of(self.model))
            with state_of(self.model).active.changed(names, mix.reshape(len(here), len(names))):
                yield self.model

    def _bring(self, wanted: tuple[str, ...]) -> None:
        """All of them onto the model. Whatever cannot be read is raised before anybody has to go."""
        for name in wanted:
            self._known(name)
        _unmerged(self.model)
        self._check_capacity(wanted)
        missing = [name for name in wanted if name not in self._on]
        for name in missing:
            if name not in self._coming:
                self._begin(name)
        arrived = {name: self._arrived(name) for name in missing}
        for name in wanted:
            if name in self._on:
                self._on.move_to_end(name)
        for name, (source, staged) in arrived.items():
            del self._coming[name]
            self._make_way(name, keep=wanted)
            self._on[name] = self._put(name, source, staged)
        self._pump()

    def _check_capacity(self, wanted: Iterable[str]) -> None:
        needed = {*wanted, *self._users}
        size = sum(self._held[n].bytes for n in needed)
        over = self.capacity_bytes is not None and not self._places and size > self.capacity_bytes
        if len(needed) > self.capacity or over:
            raise StateError(
                f"{len(needed)} adapters ({size:,} bytes) would be in use at a time, and the pool has room for "
                f"{self.capacity}{f' ({self.capacity_bytes:,} bytes)' if self.capacity_bytes else ''} on the model",
                fix="a larger capacity, or batches with fewer different adapters",
            )

    def _arrived(self, name: str) -> tuple[Fit | Taken, Staged]:
        source, future = self._coming[name]
        try:
            return source, future.result()
        except BaseException:
            self._coming.pop(name, None)  # the next use tries again
            raise

    def _make_way(self, name: str, keep: Iterable[str]) -> None:
        """Send the longest unused away until one more fits."""
        spared = {*keep, *self._users}
        for old in [n for n in self._on if n not in spared]:
            size = self._held[name].bytes + sum(self._held[n].bytes for n in self._on)
            over = self.capacity_bytes is not None and not self._places and size > self.capacity_bytes
            if len(self._on) < self.capacity and not over:
                return
            self._evict(old)

    def _evict(self, name: str) -> None:
        place = self._on.pop(name)
        if self._places:
            self._free.append(place)
            return
        with self._as_before():
            detach(self.model, place)

    def _put(self, name: str, source: Fit | Taken, staged: Staged) -> str:
        values = staged.wait()
        if not self._places:
            with self._as_before():
                self._held[name].place(self.model, name, source, values)  # type: ignore[arg-type]
            return name
        overwrite(self.model, self._free[-1], source.spec, values)
        return self._free.pop()


def _row_of(names: Mixture) -> dict[str, float]:
    if names is None:
        return {}
    if isinstance(names, str):
        return {names: 1.0}
    return dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
