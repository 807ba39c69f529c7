"""What a word on the command line means: a run, an adapter's folder, a model's folder or a model's id.

A run is named by its folder, by its name under runs/, or as `last`. Everything that decides how it must be asked -
base, template, system prompt, task, classes - is taken from the run itself, so that nobody has to say it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import CheckpointError, VeneerError
from veneer.train.run import Run

if TYPE_CHECKING:
    from veneer.infer.load import Source

__all__ = ["find_run", "source_of"]


def find_run(word: str, root: str = "runs") -> Run | None:
    """The run that `word` names, if it names one."""
    if word == "last":
        return Run.open("last", root=root)
    for folder in (Path(word).expanduser(), Path(root) / word):
        if (folder / "run.json").is_file():
            return Run.open(folder)
    return None


def source_of(word: str, root: str = "runs", base: str | None = None) -> Source:
    from veneer.infer.load import source_of_folder

    run = find_run(word, root)
    return source_of_folder(word, base) if run is None else _of_run(run, base)


def _of_run(run: Run, base: str | None) -> Source:
    from veneer.infer.load import Source, told_by

    settings = run.config().settings
    if not run.learned.is_dir():
        fix = f"`veneer train --resume {run.folder}` goes on with it" if run.status != "done" else "train it again"
        raise CheckpointError(f"the run {run.name} ({run.status}) has no checkpoint", str(run.learned), fix)
    common: dict[str, Any] = {
        "label": run.name,
        "template": settings.template,
        "system": settings.system,
        "plain": _is_plain(run),
        **({"task": settings.task} | told_by(run.learned)),
    }
    if settings.method != "lora":
        return Source(base=str(run.learned), **common)
    proof = run.path("proof.json")
    return Source(
        base=base or str(settings.model), adapter=run.learned, proof=proof if proof.is_file() else None, **common
    )


def _is_plain(run: Run) -> bool:
    """Whether the rows were texts rather than conversations: what was trained is what is asked.

    The format prompt/completion holds either; then the first row says which.
    """
    from veneer.data.dataset import load
    from veneer.data.types import Chat

    settings = run.config().settings
    data = settings.data or ""
    form = run.data.get("format") if run.path("data.json").exists() else None
    if form in ("text", "tokenised"):
        return True
    if form != "prompt/completion":
        return False
    try:
        return not isinstance(load(data, columns=settings.columns, limit=1).examples[0], Chat)
    except (VeneerError, OSError):  # the data is gone; strings are by far the commoner kind
        return True
