"""Named pieces that are found by name, with a helpful answer when the name is wrong.

A piece registers itself where it is written, so nothing else keeps a list of variants, and a test that runs over the
registry covers a new piece the moment it exists.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Generic, NoReturn, TypeVar

from veneer.errors import ConfigError

__all__ = ["Registry", "near"]

T = TypeVar("T")
P = TypeVar("P")  # the very piece: a decorated class stays known as itself


def near(word: str, known: Iterable[str]) -> str:
    """The sentence to append when `word` is not among `known`.

    >>> near("pisa", ["pissa", "olora"])
    " Did you mean 'pissa'?"
    >>> near("zzz", ["pissa"])
    ''
    """
    best = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {best[0]!r}?" if best else ""


class Registry(dict[str, T], Generic[T]):
    """A dict from names to pieces whose misses say what was meant.

    >>> inits = Registry("init")
    >>> inits["pissa"] = print
    >>> inits["pisa"]
    Traceback (most recent call last):
    veneer.errors.ConfigError: no init named 'pisa'. Did you mean 'pissa'? Known: pissa.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, *names: str) -> Callable[[P], P]:
        def add(piece: P) -> P:
            for name in names:
                if name in self:
                    raise ValueError(f"{self.kind} {name!r} is registered twice")
                self[name] = piece  # type: ignore[assignment]
            return piece

        return add

    def __missing__(self, name: str) -> NoReturn:
        raise ConfigError(f"no {self.kind} named {name!r}.{near(name, self)} Known: {', '.join(sorted(self))}.")
