"""Around a run: its folder is found or made, what it reports is written down, and however it ends is recorded."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from veneer.errors import ConfigError
from veneer.train.run import Run
from veneer.train.settings import KEYS, Reads, Resolved
from veneer.train.stop import Stop

__all__ = ["Report", "Session", "Tell", "named", "session"]

Report = Callable[[dict[str, Any]], Any]
Tell = Callable[..., Any]
QUIET = ("step", "tokenising", "doing")  # told to the listener; written as a line of metrics.jsonl instead of an event


class Session(NamedTuple):
    run: Run
    settings: Reads
    tell: Tell
    stop: Stop


def named(model: Any, data: Any) -> dict[str, Any]:
    """What of the arguments of `train` is a setting: a path or an id. Loaded models and rows in memory have no name."""
    found: dict[str, Any] = {}
    if isinstance(model, (str, Path)):
        found["model"] = str(model)
    elif isinstance(where := getattr(model, "name_or_path", None), str) and where:
        found["model"] = where
    if isinstance(data, (str, Path)):
        found["data"] = str(data)
    elif isinstance(data, (list, tuple)) and data and all(isinstance(each, (str, Path)) for each in data):
        found["data"] = [str(each) for each in data]
    return found


@contextmanager
def session(asked: Resolved, report: Report | None) -> Iterator[Session]:
    """The run to work on, with its settings: the given ones, or for a resumed run those it began with."""
    run, settings = _run_for(asked)
    is_resumed = settings.resume is not None
    listeners = [report] if report is not None else []

    def tell(event: str, **fields: Any) -> Any:
        row = {"event": event, **fields}
        if event not in QUIET:
            run.log_event(row)
            run.log_text(f"{event}: {fields.get('text') or ', '.join(f'{k} {v}' for k, v in fields.items())}")
        run.beat()
        try:
            return listeners[0](row) if listeners else None
        except OSError as error:  # a terminal that was closed, a pipe whose reader left: no reason to lose the run
            listeners.clear()
            run.log_text(f"nobody listens any more ({error}); going on")
            return None

    tell("start", run=str(run.folder), resumed=is_resumed)
    for notice in asked.notices:
        tell("note", text=notice)
    started = time.time()
    try:
        with Stop(lambda reason: tell("stopping", text=f"{reason}: finishing the step, then saving")) as stop:
            yield Session(run, settings, tell, stop)
    except KeyboardInterrupt:
        run.update(status="stopped", ended=time.time())
        raise
    except BaseException as error:
        run.log_text(traceback.format_exc())
        run.update(status="failed", error=str(error) or type(error).__name__, ended=time.time())
        raise
    finally:
        run.close()
    seconds = round(time.time() - started, 3)
    run.update(ended=time.time(), result={"seconds": run.result.get("seconds", 0) + seconds})
    tell("done", status=run.status, folder=str(run.folder), **run.result)
    run.close()


def _run_for(asked: Resolved) -> tuple[Run, Reads]:
    settings = Reads(asked)
    if settings.resume is None:
        return Run.create(asked, out=settings.out, name=settings.name), settings
    run = Run.open(settings.resume)
    if settings.out and Path(settings.out).resolve() != run.folder.resolve():
        raise ConfigError("a run goes on in its own folder", str(run.folder), "leave out: out")
    if settings.name and settings.name != run.name:
        raise ConfigError(f"a run keeps its name, {run.name}", str(run.folder), "leave out: name")
    before = run.config()
    if changed := list(_changed(before, asked)):
        raise ConfigError(
            "a run that is resumed keeps its settings", str(run.path("config.yaml")),
            "leave these out, or begin a new run with them", changed,
        )  # fmt: skip
    if run.status == "done":
        raise ConfigError("this run is done; there is nothing to go on with", str(run.folder), "begin a new run")
    run.take_over()
    merged = Reads(_with_run_keys(before, asked))
    merged.consumed |= {"out", "name", "resume"}  # when the folder was made, and just now
    return run, merged


def _changed(before: Resolved, asked: Resolved) -> Iterator[str]:
    """Settings given now that differ from the run's. Where the run is kept may be said again, nothing else changed."""
    for name, origin in asked.origins.items():
        old, new = getattr(before.settings, name), getattr(asked.settings, name)
        if origin.how in ("file", "call", "flag") and KEYS[name].group != "run" and old != new:
            yield f"{name}: {old!r} in the run, {new!r} now"


def _with_run_keys(before: Resolved, asked: Resolved) -> Resolved:
    """The run's settings; of those that say how it is kept, the ones given now count."""
    own = {
        name for name, key in KEYS.items() if key.group == "run" and asked.origins[name].how not in ("default", "rule")
    }
    settings = replace(before.settings, **{name: getattr(asked.settings, name) for name in own})
    return Resolved(settings, {**before.origins, **{name: asked.origins[name] for name in own}}, asked.notices)
