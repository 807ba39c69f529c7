"""AdaLoRA's budget under the loop's name for it; `veneer.core.allocate` says how it is shared out."""

from __future__ import annotations

from veneer.core.allocate import RankAllocator

__all__ = ["RankAllocator"]
