"""Single keys while a command runs: read in a thread, without Enter, and only from a terminal that is ours.

The terminal is put into cbreak mode, in which Ctrl-C still interrupts, and is given back as it was - also when the
program is killed by an exception. Where there is no terminal (or no termios, as on Windows) nothing is read.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Mapping
from typing import Any

__all__ = ["Keys"]


class Keys:
    """`take()` gives the wish behind the last key that was pressed, once."""

    def __init__(self, wishes: Mapping[str, str]) -> None:
        self.wishes = wishes
        self.on = False
        self._wish: str | None = None
        self._before: Any = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        with contextlib.suppress(Exception):  # no terminal of any kind: the keys are a convenience
            import termios
            import tty

            if not sys.stdin.isatty() or os.getpgrp() != os.tcgetpgrp(sys.stdin.fileno()):
                return  # in the background, reading would stop the whole process
            self._before = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
            self.on = True
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        if not self.on:
            return
        import termios

        self.on = False
        if self._thread is not None:
            self._thread.join(timeout=1)
        with contextlib.suppress(OSError, termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)

    def take(self) -> str | None:
        wish, self._wish = self._wish, None
        return wish

    def _listen(self) -> None:
        while self.on:
            if select.select([sys.stdin], [], [], 0.2)[0]:
                key = os.read(sys.stdin.fileno(), 1).decode(errors="ignore").lower()
                self._wish = self.wishes.get(key, self._wish)
