"""report.html out of a run directory."""

from __future__ import annotations

from typing import Any

__all__ = ["write_report"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name != "write_report":
        raise AttributeError(f"module 'veneer.app.report' has no attribute {name!r}")
    from veneer.app.report.page import write_report

    return write_report
