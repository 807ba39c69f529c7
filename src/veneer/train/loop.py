"""The recipe: how a model learns from rows. Read it from top to bottom.

    veneer.train("model-folder", "rows.jsonl", r=8, epochs=2) -> Run

One step takes `global_batch` rows, cut into micro-batches that fit. Each adds the gradient of its *summed* loss,
divided by the trained tokens of the whole step: the mean over all trained tokens, however the rows were cut.

    g = sum over micro-batches of d( sum of losses of trained tokens / N ) ,   N = trained tokens of the global batch

Then: clip g, set the rate for this step, AdamW. Around it stand the things that make a run trustworthy: the longest
batch is tried before anything is promised, every adapter must get a gradient, a loss that leaves the ground sends the
run back to its last good state once at half the rate, memory that runs out halves the micro-batch and nothing else,
and every checkpoint holds all it takes to go on bit for bit.

The loop knows no terminal. It calls `report(event)` with a dict whose "event" says what it is; the answer "save",
"eval" or "stop" is done after the step. All that it reports is in the run's files too (see run.py).

| event | fields beside `text` |
| --- | --- |
| start | run, resumed |
| doing, tokenising | what is going on, where it takes a while; not kept |
| data, model, plan, note, warning | facts in words |
| probe | seconds, memory_bytes, micro_batch, longest_tokens |
| step | step, steps, loss, lr, gnorm, tokens, trained_tokens, tokens_per_second, memory_bytes, seconds_left ... |
| eval | step, val_loss, best, and the task's metrics |
| save | step, folder |
| oom, diverged, stopping | what was done about it |
| samples | samples: prompt, expected, before, after |
| pictures | step, file, prompts: what the model paints now |
| proof | passed, failed |
| done | status, folder, val_before, val_after, seconds |
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from veneer.core.model import check_alive
from veneer.data.batch import Batch, Mould
from veneer.data.loader import Loader, Step
from veneer.data.types import Encoded
from veneer.errors import Diverged
from veneer.kernels.varlen import within
from veneer.prove.frozen import Before, snapshot
from veneer.tasks.cross_entropy import evaluating
from veneer.train.companions import write_companions
from veneer.train.ema import Average
from veneer.train.fast import Way, heaviest, way_of
from veneer.train.finish import finish, show
from veneer.train.memory import back_off
from veneer.train.method import ADAPTER, allocator_of, optimizer_of, to_train, write_model
from veneer.train.monitor import Meter, Movement, Watchdog, memory_bytes, not_finite
from veneer.train.optim import Masters, Projection, set_rate
from veneer.train.pictures import write_strip
from veneer.train.prepare import Job, prepare
from veneer.train.resume import STATE, Progress, apply, capture, checkpoint, read, same_random, values_of
from veneer.train.run import Run
from veneer.train.schedule import rate_factor, warmup_steps
from veneer.train.session import Report, Tell, named, session
from veneer.train.settings import Resolved, resolve
from veneer.train.stop import Stop

__all__ = ["Loop", "train"]

T = TypeVar("T")
MEASURED = 50  # times in a run that |dW| is written down, besides at evaluations


def train(
    model: Any = None,
    data: Any = None,
    *,
    tokenizer: Any = None,
    report: Report | None = None,
    resolved: Resolved | None = None,
    **keys: Any,
) -> Run:
    """Train and prove an adapter. Returns the run; `run.adapter` is the folder of what was learned.

    model: a folder, a hub id, or a loaded module (then it is adapted in place and ends with the best adapter active);
    for pictures a pipeline of diffusers, by name or loaded.
    data: files or a hub id, or rows in memory. keys: any settings of `veneer.train.settings`; or `resolved`, where a
    command line has read them already. Ctrl-C stops after the step and saves: status "stopped", resumable.
    """
    asked = resolved or resolve(mapping=named(model, data) | keys)
    with session(asked, report) as (run, settings, tell, stop), same_random(settings.seed):
        job = prepare(run, settings, model, data, tokenizer, tell)
        with within(job.model, job.by_samples), way_of(job, run, tell) as way:
            loop = Loop(job, run, tell, stop, way)
            loop.run_steps()
        if stop.requested:
            run.update(status="stopped")
        else:
            finish(job, run, loop.progress, loop.before, tell)
        loop.masters.release()
    return run


class Loop:
    """The steps of one run. Its methods stand in the order in which they first happen."""

    def __init__(self, job: Job, run: Run, tell: Tell, stop: Stop, way: Way) -> None:
        self.job, self.run, self.tell, self.stop, self.way = job, run, tell, stop, way
        self.settings = settings = job.settings
        self.masters = Masters(job.trained, flat=settings.method == "lora")
        self.optimizer = optimizer_of(self.masters, settings)
        self.projection = Projection(job.model, ADAPTER) if settings.optimizer == "lora_fa" else None
        self.loader = Loader(job.train, settings.global_batch, seed=settings.seed)
        self.source = self.loader.steps(job.steps)
        self.warm = warmup_steps(settings.warmup, job.steps)
        self.progress = Progress(micro_batch=settings.batch_size)
        self.watchdog, self.meter = Watchdog(), Meter()
        self.movement = Movement(job.model, ADAPTER)
        self.allocator = allocator_of(job.model, settings, job.steps)
        self.average = Average(self.masters.values, settings.ema) if settings.ema else None
        self.paint_every = job.task.paint_every(job.steps) if job.task.paints else 0
        self.before: Before | None = None  # the model before its first step, for the proofs
        self.saved = -1  # the step of the last checkpoint
        self.noted: set[str] = set()  # what was said about the adapter's file
        self.wish: Any = None  # what the listener asked for: save, eval or stop

    def run_steps(self) -> None:
        """From where the run is to its end, or to where it is stopped."""
        self.begin()
        while True:
            if self.is_time_to_evaluate():
                self.evaluate()
            if self.is_time_to_paint():
                self.paint()
            if self.is_time_to_save():
                self.save()
            if self.is_over() or self.stop.requested:
                return
            self.step()

    def begin(self) -> None:
        """Remember the model as it is, take up the last checkpoint if there is one, and try the heaviest batches; then
        it is known how steps are going to be computed."""
        job = self.job
        to_train(job.model)
        first = next(job.task.batches(job.val[:4] or job.train[:4], 4)).to(job.device)
        with same_random():
            asked = job.task.asked(first)
        self.before = snapshot(job.model, ADAPTER, [asked])
        self.tell("note", text=job.task.prepare(job.model, first))
        self.run.update(status="training", total_steps=job.steps)
        if (self.run.last / STATE).exists():
            self.go_back()
            self.tell("note", text=f"going on after step {self.progress.step} of {job.steps}")
        else:
            self.run.cut_metrics(0)  # of a run that was killed before its first checkpoint
            with same_random(), evaluating(job.model):
                show(job, self.run, "before", self.tell)
        self.probe()
        with same_random():
            self.way.settle_graphs(self.progress.micro_batch, self.seconds)

    def probe(self) -> None:
        """The longest rows forward and backward, and one evaluation batch: what fits now will fit later, and every
        adapter must have got a gradient.

        Nothing of it stays: no gradient, no random number drawn, no weight moved.
        """
        started = time.perf_counter()
        longest = heaviest(self.job.train, self.settings.batch_size)
        heavy = self.job.val[: self.settings.batch_size]  # they lie in this order
        with same_random():
            loss = self.first_pass(longest)
            if math.isfinite(loss) and self.settings.method == "lora":
                for note in check_alive(self.job.model):
                    self.tell("note", text=note)
            self.masters.zero_grad()
            self.fitting(lambda rows: self.judged(heavy, rows))
        if not math.isfinite(loss):
            broken = [f"{name} holds NaN or infinity" for name in not_finite(self.job.model.state_dict())]
            raise Diverged(
                f"the loss is {loss} before any step", fix="mend the base model; no setting will", problems=broken
            )
        self.tell(
            "probe", seconds=round(time.perf_counter() - started, 3), memory_bytes=memory_bytes(self.job.device),
            micro_batch=self.progress.micro_batch, longest_tokens=len(longest[0]),
        )  # fmt: skip

    def first_pass(self, samples: Sequence[Encoded]) -> float:
        """The loss of the longest rows. Where fused blocks fail at their first use, once more without them."""
        try:
            return self.fitting(lambda rows: self.gradients(samples, rows, collect=False), trains=True)
        except Exception as error:
            self.masters.zero_grad()
            if not self.way.fell_back(error):
                raise
        return self.fitting(lambda rows: self.gradients(samples, rows, collect=False), trains=True)

    def seconds(self, samples: Sequence[Encoded]) -> float:
        """Of a forward and a backward pass over these rows at once. Nothing of it stays."""
        began = time.perf_counter()
        self.gradients(samples, len(samples), collect=False)  # it ends in a number that the card is waited for
        spent = time.perf_counter() - began
        self.masters.zero_grad()
        return spent

    # ---------------------------------------------------------------- one step

    def step(self) -> None:
        """One optimiser step over one global batch."""
        step = next(self.source)
        loss = self.fitting(lambda rows: self.gradients(step.samples, rows), trains=True)
        if self.projection is not None:
            self.projection.apply()
        norm = self.masters.norm()
        if reason := self.watchdog.verdict(loss, norm):
            return self.restart(reason, step)
        if self.allocator is not None:
            self.allocator.observe()
        self.masters.clip(norm, self.settings.clip)
        rate = self.rate()
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.masters.publish()
        self.masters.zero_grad()
        self.progress.step += 1
        if self.allocator is not None:
            self.allocator.allocate(self.progress.step)
        if self.average is not None:
            self.average.update(self.progress.step)
        return self.measure(step, loss, norm, rate)

    def gradients(self, samples: Sequence[Encoded], rows: int, collect: bool = True) -> float:
        """Add the gradient of the mean loss over all trained tokens of `samples`, `rows` of them at a time."""
        mean, trained_tokens = 0.0, sum(sample.trained_tokens for sample in samples)
        for batch in self.batches(samples, rows, self.way.mould(rows)):
            with self.way.around(batch):
                loss = self.job.task.loss(self.job.model, batch) / trained_tokens
                loss.backward()
            if collect:
                self.masters.collect()
            mean += float(loss.detach())
        if self.allocator is not None:
            self.allocator.penalty().backward()  # once a step; it is no part of the loss that is reported
        return mean

    def rate(self) -> float:
        """The learning rate of the step to come."""
        factor = rate_factor(self.progress.step, self.job.steps, self.warm, self.settings.schedule)
        return self.settings.lr * self.progress.rate_scale * factor

    def measure(self, step: Step, loss: float, norm: float, rate: float) -> None:
        """Write the step down and tell the listener, whose answer is done before the next step."""
        progress, total = self.progress, self.job.steps
        progress.tokens += step.tokens
        progress.trained_tokens += step.trained_tokens
        self.meter.add(step.tokens, step.trained_tokens)
        row = {
            "step": progress.step, "epoch": round(progress.step / len(self.loader), 4), "loss": loss, "lr": rate,
            "gnorm": norm, "tokens": progress.tokens, "trained_tokens": progress.trained_tokens,
            **self.meter.read(), "memory_bytes": memory_bytes(self.job.device),
        }  # fmt: skip
        self.run.log_metrics(row)
        if progress.step % max(1, total // MEASURED) == 0 or progress.step == total:
            self.log_movement()
        left = round((total - progress.step) * row["seconds"], 1)
        self.wish = self.tell("step", **row, steps=total, seconds_left=left)
        if self.wish == "stop":
            self.stop.request("stopped by the listener")

    def log_movement(self) -> None:
        found: dict[str, Any] = self.movement.now()
        if self.allocator is not None:
            found["ranks"] = ranks = self.allocator.ranks()
            if self.progress.step == self.job.steps:
                kept = f"{sum(ranks.values())} of {self.allocator.start} ranks are left"
                self.tell("note", text=f"{kept}, {min(ranks.values())} to {max(ranks.values())} a layer")
        if found:
            self.run.log_metrics({"step": self.progress.step, **found})

    # ---------------------------------------------------------------- evaluation

    def is_time_to_evaluate(self) -> bool:
        done, every = self.progress.step, self.settings.eval_every
        if not self.job.val or self.progress.evaluated == done:
            return False
        return done in (0, self.job.steps) or self.wish == "eval" or (every > 0 and done % every == 0)

    def evaluate(self) -> None:
        """The loss on the held-out rows. The best one so far is kept in a checkpoint of its own."""
        progress = self.progress
        self.tell("doing", text=f"held-out loss of {len(self.job.val):,} rows")
        with self.averaged():
            found = self.fitting(lambda rows: self.judged(self.job.val, rows))
        self.meter.restart()
        if not found:  # stopped in the middle: the resumed run evaluates here first
            return None
        loss = found["val_loss"]
        if not math.isfinite(loss):
            return self.restart(f"the held-out loss is {loss}", None)
        progress.evaluated = progress.step
        is_best = progress.step > 0 and progress.is_better(loss)
        if is_best:
            progress.best_loss, progress.best_step, progress.worse = loss, progress.step, 0
            with self.averaged():
                self.write(self.run.best, values_of(self.masters.values))
        elif progress.step > 0:
            progress.worse += 1
        self.run.log_metrics({"step": progress.step, **found})
        self.tell("eval", step=progress.step, best=is_best, best_step=progress.best_step, **found)
        return self.warn_of_overfitting()

    def judged(self, samples: Sequence[Encoded], rows: int) -> dict[str, float]:
        """The task's loss and metrics on these rows, in evaluation mode."""
        with evaluating(self.job.model):
            return self.job.task.evaluate(self.job.model, self.batches(samples, rows), self.stop)

    def warn_of_overfitting(self) -> None:
        if self.progress.worse == 2 and not self.settings.patience:
            best = f"{self.progress.best_loss:.4g} at step {self.progress.best_step}"
            text = (
                f"the held-out loss has risen twice since its best, {best}, which is kept; patience: 2 would stop here"
            )
            self.tell("warning", text=text)

    def is_over(self) -> bool:
        patience = self.settings.patience
        return self.progress.step >= self.job.steps or (patience > 0 and self.progress.worse >= patience)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model as its average is, where one is kept: what is judged, painted with and saved."""
        if self.average is None:
            yield
            return
        with self.average.acting():
            self.masters.publish()
            yield
        self.masters.publish()

    # ---------------------------------------------------------------- pictures

    def is_time_to_paint(self) -> bool:
        done, every = self.progress.step, self.paint_every
        if not self.job.task.paints or self.progress.painted == done:
            return False
        return done in (0, self.job.steps) or self.is_over() or (every > 0 and done % every == 0)

    def paint(self) -> None:
        """The run's prompts as the model paints them now: one strip of pictures for each time."""
        self.tell("doing", text="painting the run's prompts")
        with same_random(), evaluating(self.job.model), self.averaged():
            found = self.job.task.painted(self.job.model)
        self.meter.restart()
        self.progress.painted = self.progress.step
        if found.pictures:
            file = write_strip(found.pictures, self.run.path("samples"), self.progress.step)
            self.tell("pictures", step=self.progress.step, file=file, prompts=list(found.prompts))

    # ---------------------------------------------------------------- saving and going back

    def is_time_to_save(self) -> bool:
        done = self.progress.step
        if self.saved == done:
            return False
        if self.is_over() or self.stop.requested or self.wish == "save":
            return True
        return self.watchdog.is_calm and (
            done == 0 or done % self.settings.save_every == 0 or self.progress.evaluated == done
        )

    def save(self) -> None:
        """All it takes to go on from here, as one folder."""
        self.write(self.run.last, self.state())
        self.saved = self.progress.step
        self.run.link_adapter()
        self.tell("save", step=self.progress.step, folder=str(self.run.last))
        self.meter.restart()

    def state(self) -> dict[str, Any]:
        self.progress.loader = self.loader.state_dict()
        self.progress.watchdog = self.watchdog.state()
        self.progress.metrics_position = self.run.metrics_position()
        found = capture(self.progress, self.masters.values, self.optimizer)
        kept = {"allocator": self.allocator, "average": self.average}
        return found | {name: each.state_dict() for name, each in kept.items() if each is not None}

    def write(self, folder: Path, state: dict[str, Any]) -> None:
        def files(temp: Path) -> None:
            with self.averaged():
                notes = write_model(self.job.model, temp, self.settings.method)
            for note in notes:
                if note not in self.noted:
                    self.tell("warning", text=note)
                self.noted.add(note)
            if not (folder / "tokenizer_config.json").exists():  # else it is carried over
                write_companions(temp, self.job.task, self.job.model)

        checkpoint(folder, files, state)

    def go_back(self) -> None:
        """To the last checkpoint: weights, moments, random states, place in the data, end of metrics.jsonl."""
        self.masters.zero_grad()
        state = read(self.run.last, self.job.device)
        self.progress = apply(state, self.masters.values, self.optimizer, self.run.last)
        self.masters.publish()
        if self.allocator is not None:
            self.allocator.load_state_dict(state["allocator"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.loader.load_state_dict(self.progress.loader)
        self.source = self.loader.steps(self.job.steps - self.progress.step)
        self.watchdog.restore(self.progress.watchdog)
        self.run.cut_metrics(self.progress.metrics_position)
        self.saved = self.progress.step
        self.meter.restart()

    def restart(self, reason: str, step: Step | None) -> None:
        """The loss has left the ground: once, go back to the last good state and on at half the rate."""
        at, restarts = self.progress.step, self.progress.restarts
        rows = [f"row {sample.where}" for sample in (step.samples if step else ()) if sample.where]
        if restarts or not (self.run.last / STATE).exists():
            rate = self.settings.lr * self.progress.rate_scale
            again = f"again at half the rate, {rate:.2g}" if restarts else "before any step"
            raise Diverged(
                f"{reason} at step {at + 1}, {again}",
                where=str(self.run.folder), problems=rows[:8],
                fix="lower lr; if it is the same step each time, look at the rows above. The last good state is kept",
            )  # fmt: skip
        self.go_back()
        self.progress.restarts, self.progress.rate_scale = restarts + 1, self.progress.rate_scale / 2
        rate = self.settings.lr * self.progress.rate_scale
        text = f"{reason} at step {at + 1}: back to step {self.progress.step}, on with lr {rate:.2g}"
        self.tell("diverged", text=text, step=at + 1, reason=reason, back_to=self.progress.step, lr=rate, rows=rows[:8])
        self.save()  # so that a run killed now remembers the lower rate

    # ---------------------------------------------------------------- means

    def batches(self, samples: Sequence[Encoded], rows: int, mould: Mould | None = None) -> Iterator[Batch]:
        for batch in self.job.task.batches(samples, rows, self.job.by_samples, mould):
            self.run.beat()
            yield batch.to(self.job.device)

    def fitting(self, attempt: Callable[[int], T], trains: bool = False) -> T:
        """`attempt(rows)` with as much kept and as many rows at a time as fit into memory."""
        found, self.progress.micro_batch = back_off(
            attempt, self.progress.micro_batch, self.masters.zero_grad, self.say_smaller,
            self.way.further if trains else None,
        )  # fmt: skip
        return found

    def say_smaller(self, before: int, after: int, message: str) -> None:
        text = f"out of memory with {before} rows at a time ({message}): going on with {after}; the global batch stays"
        self.tell("oom", text=text, micro_batch=after, before=before)
