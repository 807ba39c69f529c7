"""After the last step: the best adapter is put back, shown on a few rows, proved, and described in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from veneer.ckpt.atomic import atomic_write
from veneer.data.batch import Batch
from veneer.prove.frozen import Before
from veneer.prove.run import prove_run
from veneer.train.method import ADAPTER
from veneer.train.prepare import Job
from veneer.train.resume import STATE, Progress, put_learned, read
from veneer.train.run import Run

__all__ = ["card", "finish", "show"]

Tell = Callable[..., Any]


def finish(job: Job, run: Run, progress: Progress, before: Before | None, tell: Tell) -> None:
    """End the run. A proof that fails is an error, and the run is then marked as failed."""
    run.update(status="proving")
    run.link_adapter()
    folder = run.adapter.resolve()
    put_learned(read(folder), job.trained, folder / STATE)
    job.model.eval()
    result = outcome(run, progress)
    if result["val_after"] is not None and result["val_after"] >= result["val_before"]:
        text = f"the best held-out loss, {result['val_after']:.4g}, is not below the base's {result['val_before']:.4g}"
        tell("warning", text=f"{text}: lower lr, more data or fewer steps may help")
    show(job, run, "after", tell)
    if found := job.task.detail(job.model, held_out(job, progress.micro_batch)):
        run.write_json("detail.json", found)
    tell("doing", text="proving the adapter")
    proof = prove_run(
        job.model,
        ADAPTER,
        before=before,
        folder=folder if job.settings.method == "lora" else None,
        samples=job.samples,
        ends=job.task.ends,
        may_be_cut=job.settings.overlong in ("truncate", "split"),
        given=job.settings.given,
        read=job.settings.consumed,
        tokenizer=job.task.tokenizer,
        base=job.base,
    )
    proof.save(run.folder)
    tell("proof", passed=proof.passed, text=proof.line(), failed=[check.id for check in proof.failed])
    described = card(run, job, result, proof.line())
    for place in (run.folder, folder):
        atomic_write(place / "README.md", described)
    proof.save(folder)
    proof.raise_if_failed(run.folder)
    run.update(status="done", result=result)


def held_out(job: Job, rows: int) -> Iterator[Batch]:
    return (batch.to(job.device) for batch in job.task.batches(job.val, rows))


def outcome(run: Run, progress: Progress) -> dict[str, Any]:
    """The figures that say how it went."""
    losses = run.metrics("loss")
    evaluations = run.metrics("val_loss")
    return {
        "steps": progress.step,
        "loss": losses[-1]["loss"] if losses else None,
        "val_before": evaluations[0]["val_loss"] if evaluations else None,
        "val_after": progress.best_loss,
        "best_step": progress.best_step,
        "tokens": progress.tokens,
        "trained_tokens": progress.trained_tokens,
        "micro_batch": progress.micro_batch,
        "restarts": progress.restarts,
    }


def show(job: Job, run: Run, when: str, tell: Tell) -> None:
    """Answers to a few held-out rows, before and after: samples/before.json, then samples/samples.json with both."""
    found = [each._asdict() for each in job.task.shown(job.model, job.shown)]
    run.path("samples").mkdir(exist_ok=True)
    run.write_json(f"samples/{when}.json", found)
    before = run.path("samples", "before.json")
    if not found or when == "before" or not before.exists():
        return
    pairs = zip(found, json.loads(before.read_text()), strict=False)
    samples = [
        {"prompt": new["prompt"], "expected": new["expected"], "before": old["answer"], "after": new["answer"]}
        for new, old in pairs
    ]
    run.write_json("samples/samples.json", samples)
    tell("samples", text=f"{len(samples)} answers before and after", samples=samples)


def card(run: Run, job: Job, result: dict[str, Any], proved: str) -> str:
    """README.md: what this adapter is, where it comes from, how it was made and how it is used."""
    settings = job.settings.resolved.settings
    base = run.info.get("base") or settings.model or "the base model"
    is_lora = settings.method == "lora"
    what = f"A low-rank adapter (r {settings.r}, alpha {settings.alpha:g})" if is_lora else "A fine-tuned model"
    held_out = ""
    if result["val_after"] is not None:
        held_out = f"Held-out loss: {result['val_before']:.4g} before, {result['val_after']:.4g} after.\n"
    given = "\n".join(f"  {name}: {getattr(settings, name)}" for name in sorted(job.settings.given))
    use = (
        job.task.use(str(base), run.name) if is_lora else f'model = AutoModel....from_pretrained("{run.name}/adapter")'
    )
    return CARD.format(
        base=base, tag="peft" if is_lora else "transformers", name=run.name, what=what, task=settings.task,
        steps=result["steps"], held_out=held_out, proved=proved, given=given or "  all defaults", use=use,
        data=run.data.get("source", "unknown"), rows=run.data.get("rows", "?"),
    )  # fmt: skip


CARD = """---
base_model: {base}
library_name: {tag}
tags: [veneer, lora, {task}]
---
# {name}

{what} on {base}, trained with Veneer for {steps} steps on {rows} rows of {data} ({task}).
{held_out}
Proved at the end of the run: {proved}

## Use

```python
import veneer
{use}
```

## Settings that were given

```yaml
{given}
```

Everything else is in the run's config.yaml, each value with its origin.
"""
