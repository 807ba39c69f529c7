"""Other people's packages: what to say when one that only some features need is missing; and keeping one quiet.

    gguf = need("gguf", extra="gguf", use="write GGUF files")

An extra is one name of `[project.optional-dependencies]` in pyproject.toml; a test holds the names used in the code to
those that exist.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from veneer.errors import UserError

__all__ = ["need", "pip_line", "quiet"]


def need(package: str, *, extra: str, use: str) -> ModuleType:
    """Import `package`, or say which pip line brings it. A package that is there but broken raises its own error."""
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        raise UserError(f"The package {package!r} is needed to {use}.", fix=f"pip install 'veneer[{extra}]'")
    return importlib.import_module(package)


def pip_line(error: ImportError) -> str:
    """What another library says is to be installed, as a shell takes it.

    >>> pip_line(ImportError("needs it: `pip install -U it>=0.4`")), pip_line(ImportError("no it"))
    ("pip install -U 'it>=0.4'", 'install it')
    """
    found = re.search(r"pip install [^`\n]+", str(error))
    return shlex.join(found.group().split()) if found else "install it"


@contextmanager
def quiet(*others: str) -> Iterator[None]:
    """Without the bars and the advice of transformers, and of `others` that log as it does (diffusers); our own lines
    say what is going on."""
    logs = [importlib.import_module(f"{package}.utils.logging") for package in ("transformers", *others)]
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level, bars in before:
            log.set_verbosity(level)
            if bars:
                log.enable_progress_bar()
