"""Packages that only some features need, and what to say when one of them is missing.

    gguf = need("gguf", extra="gguf", use="write GGUF files")

An extra is one name of `[project.optional-dependencies]` in pyproject.toml; a test holds the names used in the code to
those that exist.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from veneer.errors import UserError

__all__ = ["need"]


def need(package: str, *, extra: str, use: str) -> ModuleType:
    """Import `package`, or say which pip line brings it. A package that is there but broken raises its own error."""
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        raise UserError(f"The package {package!r} is needed to {use}.", fix=f"pip install 'veneer[{extra}]'")
    return importlib.import_module(package)
