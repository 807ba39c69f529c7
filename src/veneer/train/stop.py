"""Ctrl-C twice: the first finishes the step, saves and stops; the second stops at once.

After the second, what is on the disk is the last whole checkpoint, because a checkpoint appears whole or not at all.
SIGTERM (a scheduler that wants its machine back) counts as a first one.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Stop"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """`with Stop(say) as stop:` `stop.requested` turns true at the first signal.

    Python takes signals in the main thread only; elsewhere `request` stops.
    """

    def __init__(self, say: Callable[[str], Any] = lambda reason: None) -> None:
        self.requested, self.reason = False, ""
        self._say = say
        self._before: dict[signal.Signals, Any] = {}

    def request(self, reason: str) -> None:
        if not self.requested:
            self.requested, self.reason = True, reason
            self._say(reason)

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._received) for each in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.request("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
