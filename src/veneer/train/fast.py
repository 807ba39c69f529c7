"""How the steps of a run are computed: on fused blocks where they are known, keeping as much as fits.

    fuse        auto: on where an adapter is trained on blocks that are known; what runs plainly is named, and why
    recompute   auto: the first level that fits by the memory model (advise/keep.py), then tried on the longest batch
    graphs      auto: blocks are recorded as CUDA graphs where pictures have one size, and where batches of words can be
                filled up to one shape for next to nothing (train/moulds.py), by samples that count for nothing (`Mould`
                in data/batch.py). On rows of a model of 0.5B that is 2.4 times the speed and more
                (benchmarks/train_graphs.py)

Three things can turn out otherwise, and all are said: memory that runs out although the estimate said it would not,
then the second layout of an 8-bit base is given up, after that the graphs, and then the next level is taken; a fused
block that fails where it was tried for the first time, then blocks run plainly; and a recording that fails, then blocks
run fused without one, on batches as they are.
What was decided stands in config.yaml as a rule and its reason, what was replaced in run.json.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.advise.device import free_memory
from veneer.advise.keep import choose, fusing, levels_of, recorded, stays
from veneer.advise.memory import gib
from veneer.advise.plan import CHOICES, Plan
from veneer.advise.shapes import Shapes, shapes_of
from veneer.data.batch import Batch, Mould, mould_of
from veneer.data.types import Encoded
from veneer.errors import UserError
from veneer.kernels.even import even_gradients
from veneer.kernels.fuse import (
    Fused,
    FusedBlock,
    FusedMlp,
    FusedModule,
    FusedNorm,
    drop_graphs,
    fuse,
    is_fused,
    keep_layouts,
    set_graphs,
    set_recompute,
    turnable,
    unfuse,
)
from veneer.kernels.parts import AttentionParts, BlockParts, LayerNormParts, MlpParts, NormParts, is_unsafe
from veneer.train.base import dtype_of, recomputing
from veneer.train.memory import is_out_of_memory
from veneer.train.moulds import COST, FREE, Fit, Micro, fits, micro_batches, timing_of, tokens_of
from veneer.train.offload import offloaded, pinned_bytes
from veneer.train.prepare import Job
from veneer.train.run import Run

__all__ = ["Way", "available", "uncached", "way_of"]

SAME = (
    "task", "method", "r", "targets", "exclude", "modules_to_save", "layers", "dropout", "combine", "precision",
    "quant", "batch_size", "optimizer",
)  # fmt: skip
AWAY = ("offload", "tiled")  # levels that put inputs of blocks on the host
AGAIN = ("middle", "input", "full")  # levels that draw a block's masks of dropout a second time
FEWEST = 24  # batches of a run for which recording is worth its while
TURNING = ("cuda",)  # where a transpose lies in memory of its own
RECORDING = ("cuda",)  # where blocks can be recorded
WIDTHS = ("hidden_size", "n_embd", "d_model")
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, AssertionError)


@contextmanager
def way_of(job: Job, run: Run, tell: Callable[..., Any]) -> Iterator[Way]:
    """Settle how steps are computed, and undo it on the model afterwards."""
    with ExitStack() as stack:
        way = Way(job, run, tell, stack)
        way.settle_blocks()
        way.settle_level()
        yield way


class Way:
    """Fused or not, and what is kept. The methods stand in the order in which they are called."""

    def __init__(self, job: Job, run: Run, tell: Callable[..., Any], stack: ExitStack) -> None:
        self.job, self.run, self.tell, self.stack = job, run, tell, stack
        self.settings, self.model = job.settings, job.model
        self.level = "none"
        self.has_both = False  # layouts of a base in 8 bits
        self.is_ours = self.is_checkpointed = self.is_graphed = False
        self.room = 0  # bytes of what would go to the host and stays, as there is no room for it
        self.moulds: dict[int, Mould] = {}  # by rows at a time
        self.may_go_on = self.settings.recompute == "auto" or self._origin("recompute") == "rule"

    # ---------------------------------------------------------------- blocks

    def settle_blocks(self) -> None:
        if is_fused(self.model):
            self.tell("note", text="the model came fused and stays so")
        elif self._wants_fused():
            self._fuse()
        if any(isinstance(module, FusedModule) for module in self.model.modules()):
            self.stack.enter_context(uncached(self.model))
        self._even()

    def _even(self) -> None:
        if self.job.task.paints and self.job.device.type == "cuda":
            self.stack.enter_context(even_gradients(self.model))

    def _wants_fused(self) -> bool:
        if self.settings.fuse == "auto":
            wanted, why = self._best()
            self.settings.settle("fuse", "on" if wanted else "off", why)
            self.run.write_config(self.settings.resolved)
            if self.job.task.paints or (not wanted and self.settings.method == "lora"):
                self.tell("note", text=f"fuse {self.settings.fuse}: {why}")
        return self.settings.fuse == "on"

    def _best(self) -> tuple[bool, str]:
        """By what was measured: a UNet's many small blocks are no faster for being fused unless they are recorded, too;
        large ones of a transformer are, and keep less (benchmarks/sdxl_gpu.py)."""
        if self.settings.method != "lora":
            return False, "fused blocks do not train their weights"
        if not self.job.task.paints:
            return fusing(width_of(self.model), self.job.device.type)
        if self.job.device.type in RECORDING and (why := self.job.task.better_fused()) is not None:
            return True, why
        if (why := self._unrecordable()) is not None:
            return False, f"fused blocks of a denoiser are faster only as CUDA graphs, and {why}"
        return True, "pictures of one size: blocks are recorded as CUDA graphs"

    def _unrecordable(self) -> str | None:
        """Why a denoiser's blocks are not recorded as CUDA graphs."""
        if self.job.device.type not in RECORDING:
            return "there is no GPU"
        return "graphs are off" if self.settings.graphs == "off" else self.job.task.unlike(self.job.train)

    def _fuse(self) -> None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*run plainly")  # it is told below, once
                report = fuse(self.model, "none", verbose=False)
            leave_idle(self.model, report)
        except FAILURES as error:
            unfuse(self.model)
            self._give_up(f"blocks could not be fused ({_line(error)}): they run plainly")
            return
        self.is_ours = True
        self.stack.callback(unfuse, self.model)
        for line in str(report).splitlines():
            self.tell("note", text=line.removesuffix(" (recompute none)"))
        self.run.update(fused={"replaced": dict(report.replaced), "plain": dict(list(report.skipped.items())[:20])})

    @property
    def is_whole(self) -> bool:
        """Whether every block runs fused. One that does not is enough to leave recomputing to transformers."""
        count = sum(isinstance(module, FusedBlock) for module in self.model.modules())
        wanted = getattr(getattr(self.model, "config", None), "num_hidden_layers", None)
        return count > 0 and wanted in (None, count)

    def fell_back(self, error: Exception) -> bool:
        """After an error in the first pass: once, run plainly instead. False where that was not it."""
        if not self.is_ours or isinstance(error, UserError) or not isinstance(error, FAILURES):
            return False
        self.is_ours = self.is_graphed = False
        unfuse(self.model)
        self._even()
        self._give_up(f"the first pass failed ({_line(error)}): once more, without fused blocks")
        self._apply(self.level)
        return True

    def _give_up(self, why: str) -> None:
        self.tell("warning", text=why)
        self.settings.settle("fuse", "off", why)
        self.run.write_config(self.settings.resolved)
        self.run.update(fused={"replaced": {}, "plain": {type(self.model).__name__: why}})

    # ---------------------------------------------------------------- what is kept

    @property
    def levels(self) -> tuple[str, ...]:
        return levels_of(self.is_whole, self.job.device.type)

    def settle_level(self) -> None:
        if self.settings.recompute == "auto":
            level, reason = self._planned()
            self._record(level, reason)
            self.tell("note", text=f"recompute {level}: {reason}")
        self._apply(self.settings.recompute)
        self._keep_both()

    def _keep_both(self) -> None:
        """Of a base in 8 bits also the layout that the backward pass multiplies by, where it fits beside all else."""
        size = self._other_layout()
        if not size or not self.is_ours or self.level != "none" or self.job.device.type not in TURNING:
            return
        device = self.job.device
        try:
            plan = self.plan()
            more = replace(plan, weights=(plan.weights or 0) + size)
            fits = choose(self._shapes(), more, available(self.model, device), host_memory(device)).level == "none"
        except (UserError, *FAILURES) as error:
            self.tell("note", text=f"one layout of the 8-bit base is kept: memory cannot be estimated ({_line(error)})")
            return
        if fits:
            self.has_both = keep_layouts(self.model) > 0
            self.tell("note", text=f"both layouts of the 8-bit base are kept, for speed: {gib(size)} more fit")

    def _planned(self) -> tuple[str, str]:
        device = self.job.device
        if self.settings.task not in CHOICES["task"]:
            return "none", "what this task's models keep is known to no formula; the longest batch will tell"
        try:
            choice = choose(self._shapes(), self.plan(), available(self.model, device), host_memory(device))
        except (UserError, *FAILURES) as error:
            return "none", f"its memory cannot be estimated ({_line(error)}); the longest batch will tell"
        if choice.instead:
            self.tell("note", text=f"nothing would be computed again with {', or '.join(choice.instead)}")
        return choice.level, choice.reason

    def plan(self) -> Plan:
        """The heaviest micro-batch of this run, as the memory model takes it."""
        settings, longest = self.settings, heaviest(self.job.train, self.settings.batch_size)
        tokens = [len(sample) for sample in longest]
        is_even = self.job.by_samples or len(set(tokens)) == 1
        attention = getattr(getattr(self.model, "config", None), "_attn_implementation", "sdpa")
        known: dict[str, Any] = {name: getattr(settings, name) for name in SAME} | {"batch_size": len(longest)}
        return Plan(
            **known,
            labels=max(1, self._labels()),
            max_len=-(-sum(tokens) // len(tokens)) if self.job.by_samples else max(tokens),
            padded=not is_even,
            accumulate=settings.global_batch > settings.batch_size,
            attention="eager" if attention == "eager" else "sdpa",
            fused=self.is_whole,
            weights=weights_of(self.model, self.job.trained.values()) + self.has_both * self._other_layout(),
            device=self.job.device.type if self.job.device.type == "cuda" else "cpu",
        )

    def _other_layout(self) -> int:
        """Bytes of the transposes of a base in 8 bits."""
        return sum(codes.numel() for codes in turnable(self.model))

    def _shapes(self) -> Shapes:
        return shapes_of(getattr(self.model, "config", None), self.settings.task, self._labels())

    def _labels(self) -> int:
        labels = self.job.task.labels
        return len(labels.names) if labels is not None else 2

    def _apply(self, level: str) -> None:
        """Let the model keep what `level` says, or the next thing to it that this model knows."""
        if level not in self.levels:
            nearest = "input" if level != "none" else level
            self.tell(
                "note", text=f"recompute {level} needs fused blocks{' on a GPU' * (level == 'offload')}: {nearest}"
            )
            level = nearest
        self.level = level
        again = "none" if level == "none" or not self.is_whole else "input" if level == "offload" else level
        set_recompute(self.model, again)
        self.room = self._room(level)
        if level != "none" and not self.is_whole and not self.is_checkpointed:
            self.is_checkpointed = True
            self.stack.enter_context(recomputing(self.model, True))

    def _room(self, level: str) -> int:
        if level not in AWAY or self.job.device.type != "cuda":
            return 0
        try:
            return stays(self._shapes(), replace(self.plan(), recompute=level), host_memory(self.job.device))
        except (UserError, *FAILURES):  # what is not estimated goes to the host, all of it
            return 0

    def further(self, message: str) -> bool:
        """After memory ran out: keep less, where that was left to the run and something is left to give up."""
        if self.has_both:
            self.has_both = False
            keep_layouts(self.model, keep=False)
            self.tell(
                "oom", text=f"out of memory ({message}): going on with one layout of the base", recompute=self.level
            )
            return True
        if self.is_graphed and self._origin("graphs") == "rule":
            drop_graphs(self.model)
            self._leave_graphs("memory ran out with them, whatever the estimate said")
            self.tell("oom", text=f"out of memory ({message}): going on without CUDA graphs", recompute=self.level)
            return True
        rest = self.levels[self.levels.index(self.level) + 1 :] if self.level in self.levels else ()
        if not self.may_go_on or not rest:
            return False
        before, after = self.level, rest[0]
        self.tell(
            "oom", text=f"out of memory with recompute {before} ({message}): going on with {after}", recompute=after
        )
        self._record(after, f"{before} ran out of memory, whatever the estimate said")
        self._apply(after)
        return True

    @contextmanager
    def around(self, batch: Batch) -> Iterator[None]:
        """For one forward and backward pass."""
        with ExitStack() as stack:
            stack.enter_context(safe_attention(batch))
            if self.level in AWAY:
                away = offloaded(self.job.device, room=self.room, fetches_ahead=self.level == "offload")
                stack.enter_context(away)
            yield

    # ---------------------------------------------------------------- graphs

    def settle_graphs(self, rows: int, seconds: Callable[[Micro], float]) -> None:
        """Whether blocks are recorded, which makes one shape of all batches of `rows`. After the first pass, which says
        what fits; `seconds` is how long a pass takes over some rows."""
        if self.settings.graphs == "auto":
            self.settings.settle("graphs", *self._graphs_rule(rows, seconds))
            self.run.write_config(self.settings.resolved)
        if self.settings.graphs == "off":
            return
        why = set_graphs(self.model, self._without_graphs)
        self.is_graphed = why is None
        self.tell("note", text=f"no CUDA graphs: {why}" if why else self._graphed(rows))

    def _graphs_rule(self, rows: int, seconds: Callable[[Micro], float]) -> tuple[str, str]:
        if self.job.device.type not in RECORDING:
            return "off", "they need a GPU"
        if self.job.task.paints:
            why = "nothing is fused" if not self.is_ours else self._unrecordable() or self._draws_again()
            if why is None and self.job.task.better_fused() is not None:
                why = "large blocks keep a card busy by themselves"
            return ("on", "pictures of one size") if why is None else ("off", why)
        if (why := self._unfit_for_graphs()) is not None:
            return "off", why
        batches = micro_batches(self.job.train, self.settings.global_batch, rows, self.settings.seed)
        if (count := self.job.steps * -(-self.settings.global_batch // rows)) < FEWEST:
            return "off", f"recording is not worth its while for {count} batches"
        choice = self._shape(batches, rows, seconds)
        if isinstance(choice, str):
            return "off", choice
        self.run.update(one_shape=[choice.tokens, rows])
        return "on", self._paying(choice)

    def _unfit_for_graphs(self) -> str | None:
        """Why blocks of a model of words are not recorded, however long its rows are."""
        if not (self.is_ours and self.is_whole and self.job.by_samples):
            return "only fused blocks are recorded, on batches without padding"
        if self.level in AWAY:
            return "inputs of blocks are kept on the host"
        if (why := self._draws_again()) is not None:
            return why
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            return "on several GPUs they are not tried"
        return None

    def _draws_again(self) -> str | None:
        if self.level in AGAIN and (self.settings.dropout or draws(self.model)):
            return "blocks that are computed again draw their masks of dropout a second time"
        return None

    def _shape(self, batches: Sequence[Micro], rows: int, seconds: Callable[[Micro], float]) -> Fit | str:
        """The largest shape that costs next to nothing and has room, or why there is none."""
        sizes = [tokens_of(batch) for batch in batches]
        found = fits(sizes)
        if found[0].filling > FREE:
            try:
                found = fits(sizes, timing_of(batches, seconds))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return "memory ran out as passes were timed"
        if not (paying := [fit for fit in found if fit.cost <= COST]):
            least = min(found, key=lambda fit: fit.cost)
            return (
                f"the card is busy with tokens as it is: filled up to one shape ({least.filling:.1%}), batches take "
                f"{1 + least.cost:.2f} times as long"
            )
        refused = [self._no_room(fit, rows) for fit in paying]
        return next((fit for fit, why in zip(paying, refused, strict=True) if why is None), refused[-1] or "")

    def _no_room(self, fit: Fit, rows: int) -> str | None:
        device = self.job.device
        heavy = sum(map(len, heaviest(self.job.train, self.settings.batch_size)))
        try:
            plan = replace(self.plan(), recompute=self.level)
            needed = recorded(self._shapes(), plan, fit.tokens / heavy, not self.job.val and fit.share == 1)
        except (UserError, *FAILURES) as error:
            return f"their memory cannot be estimated ({_line(error)})"
        there = available(self.model, device)
        return None if needed <= there else f"records do not fit: {gib(needed)} needed, {gib(there)} are there"

    def _paying(self, fit: Fit) -> str:
        left = "" if fit.share == 1 else f"; the longest {1 - fit.share:.0%} of batches run as ever"
        if fit.filling <= FREE:
            return f"batches are nearly of one shape ({fit.filling:.1%} to fill up){left}"
        times = f"passes take {1 + fit.cost:.2f} times as long, and replayed ones less"
        return f"filled up to one shape ({fit.filling:.1%}), {times}{left}"

    def _graphed(self, rows: int) -> str:
        what = "blocks are recorded as CUDA graphs"
        if not self.job.by_samples or self.job.task.paints:
            return what
        tokens = self._mould_of(rows).tokens
        taken = [n for n in self._sizes(rows) if n <= tokens]
        return f"{what}, batches filled up to one shape ({1 - sum(taken) / (tokens * len(taken)):.1%})"

    def _sizes(self, rows: int) -> list[int]:
        batches = micro_batches(self.job.train, self.settings.global_batch, rows, self.settings.seed)
        return [tokens_of(batch) for batch in batches]

    def _without_graphs(self, why: str) -> None:
        """What keeps blocks from being recorded or replayed. Where it is the recording, batches need no one shape."""
        self.tell("note", text=why)
        if any(each.why_not is not None for each in recorders(self.model)):
            self._leave_graphs(why)

    def _leave_graphs(self, why: str) -> None:
        self.is_graphed = False
        self.settings.settle("graphs", "off", why)
        self.run.write_config(self.settings.resolved)

    def mould(self, rows: int) -> Mould | None:
        """The shape of batches of so many rows, where they have to be of one."""
        return self._mould_of(rows) if self.is_graphed and self.job.by_samples else None

    def _mould_of(self, rows: int) -> Mould:
        if rows not in self.moulds:
            tokens, count = self.run.info.get("one_shape", (None, 1))  # where a rule said it, perhaps before a resume
            most = None if tokens is None else -(-tokens * rows // count)
            self.moulds[rows] = mould_of(self.job.train, rows, most)
        return self.moulds[rows]

    # ---------------------------------------------------------------- what is written down

    def _record(self, level: str, reason: str) -> None:
        self.settings.settle("recompute", level, reason)
        self.run.write_config(self.settings.resolved)

    def _origin(self, name: str) -> str:
        return self.settings.resolved.origins[name].how


def recorders(model: nn.Module) -> list[Any]:
    """What fused modules are recorded by; they share it."""
    held = [m.fused.recorder for m in model.modules() if isinstance(m, FusedModule)]
    return list({id(each): each for each in held if each is not None}.values())


@contextmanager
def safe_attention(batch: Batch) -> Iterator[None]:
    """Blocks that run by their own forward take torch's first choice of a kernel; not the one whose gradient may be NaN
    for masks of this length (fused blocks see to it themselves)."""
    tensors = (*batch.inputs.values(), batch.labels)
    lengths = {t.shape[1] for t in tensors if isinstance(t, Tensor) and t.ndim == 2}
    is_masked = "attention_mask" in batch.inputs or batch.is_packed
    was = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(was and not (is_masked and any(map(is_unsafe, lengths))))
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)


def draws(model: nn.Module) -> bool:
    """Whether fused blocks draw random numbers of their own, besides what their adapters do."""
    blocks = [module for module in model.modules() if isinstance(module, FusedBlock)]
    drops = (drop for block in blocks for drop in block.fused.parts.drops)
    return any(drop is not None and drop.p for drop in drops) or any(
        block.fused.parts.attention.dropout for block in blocks
    )


def width_of(model: nn.Module) -> int | None:
    """Of what flows from block to block, as far as the model's configuration says so."""
    config = getattr(model, "config", None)
    return next((getattr(config, name) for name in WIDTHS if isinstance(getattr(config, name, None), int)), None)


def heaviest(samples: Sequence[Encoded], rows: int) -> list[Encoded]:
    """The micro-batch that needs the most memory."""
    return sorted(samples, key=len, reverse=True)[:rows]


def leave_idle(model: nn.Module, report: Fused) -> None:
    """Give back what would run plainly at every step: its weights are trained, or its adapters are of another kind."""
    dtype = dtype_of(model)
    for name, module in list(model.named_modules()):
        if not isinstance(module, FusedModule):
            continue
        why = next((found for found in _now(module.fused.parts, dtype) if isinstance(found, str)), None)
        if why is not None:
            unfuse(module)
            report.skipped[name] = why
    kinds = {"blocks": FusedBlock, "gated units": FusedMlp, "norms": FusedNorm}
    counts = {kind: sum(isinstance(module, held) for module in model.modules()) for kind, held in kinds.items()}
    for kind in report.replaced.keys() & counts.keys():
        report.replaced[kind] = min(report.replaced[kind], counts[kind])
    report.replaced = +report.replaced  # without what is down to none


def _now(parts: Any, dtype: torch.dtype) -> Iterator[Any]:
    """What a fused module amounts to, part by part, or in words why it must run plainly."""
    if isinstance(parts, (MlpParts, AttentionParts)):
        yield parts.now(dtype, 1)
    elif isinstance(parts, (NormParts, LayerNormParts)):
        yield parts.now(dtype)
    elif isinstance(parts, BlockParts):
        yield parts.endings(dtype)
        for part in (parts.first, parts.attention, parts.second, parts.mlp):
            yield from _now(part, dtype)


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Without the cache of keys and values that many configurations ask for; a fused block has no use for it."""
    config = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        config.use_cache = True  # type: ignore[union-attr]


def weights_of(model: nn.Module, trained: Any) -> int:
    """Bytes of the base as it lies in memory: parameters and buffers, each once, without what is trained beside it."""
    ours = {id(parameter) for parameter in trained}
    held = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in ours}
    return sum(t.nbytes for t in held.values())


def available(model: nn.Module, device: torch.device) -> int:
    """Bytes that this process may have on the device, with what it holds already."""
    if device.type == "cuda":
        return free_memory(str(device)) + torch.cuda.memory_reserved(device)
    return free_memory("cpu") + sum(parameter.nbytes for parameter in model.parameters())


def host_memory(device: torch.device) -> int:
    """Bytes that the host has for what a GPU puts there: a tenth is left to everything else."""
    return int(0.9 * free_memory("cpu")) + pinned_bytes(device)


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
