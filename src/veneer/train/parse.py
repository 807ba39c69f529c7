"""Values as people write them, turned into values as the schema wants them.

A flag is always a string, YAML 1.1 reads `1e-4` as a string and `no` as False, and other tools write `true` where we
want a word. So no value is trusted to have its type: every key of the schema names one of the readers below, and a
reader either returns the value it was meant to be or raises ValueError with what was expected. The caller adds the key.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from veneer.core.registry import near

__all__ = [
    "Reader",
    "auto_or",
    "flag",
    "folder",
    "layers",
    "mapping",
    "names",
    "number",
    "one_of",
    "optional",
    "options",
    "overrides",
    "paths",
    "prompts",
    "share_rows_or_path",
    "targets",
    "text",
    "token_rows",
    "whole",
]

Reader = Callable[[Any], Any]

NOTHING = (None, "", "none", "null", "None", "~")
YES, NO = ("true", "yes", "on", "1", "y"), ("false", "no", "off", "0", "n")


def text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"expected text, got {_shown(value)}")
    return str(value)


def number(low: float = -math.inf, high: float = math.inf) -> Reader:
    """A finite number in [low, high].

    >>> number(0)("1e-4")
    0.0001
    """

    def read(value: Any) -> float:
        try:
            if isinstance(value, bool):
                raise TypeError
            found = float(value.replace("_", "") if isinstance(value, str) else value)
        except (TypeError, ValueError):
            raise ValueError(f"expected a number, got {_shown(value)}") from None
        if not low <= found <= high or not math.isfinite(found):
            raise ValueError(f"expected a number {_span(low, high)}, got {_shown(value)}")
        return found

    return read


def whole(low: int = 0) -> Reader:
    """A whole number, at least `low`; 1e3 and "2_048" are whole numbers too.

    >>> whole()("1e3")
    1000
    """

    def read(value: Any) -> int:
        found = number()(value)
        if found != int(found):
            raise ValueError(f"expected a whole number, got {_shown(value)}")
        if found < low:
            raise ValueError(f"expected a whole number of at least {low}, got {_shown(value)}")
        return int(found)

    return read


def flag(value: Any) -> bool:
    """
    >>> flag("no"), flag(True)
    (False, True)
    """
    word = str(value).lower()
    if word in YES:
        return True
    if word in NO:
        return False
    raise ValueError(f"expected true or false, got {_shown(value)}")


def one_of(*choices: str, also: Mapping[Any, str] | None = None) -> Reader:
    """One of `choices`; `also` holds other words for them, and true and false where a tool writes those.

    >>> one_of("auto", "on", "off", also={True: "on", False: "off"})("yes")
    'on'
    """
    other = {str(word).lower(): choice for word, choice in (also or {}).items()}
    if "true" in other:
        other |= dict.fromkeys(YES, other["true"])
    if "false" in other:
        other |= dict.fromkeys(NO, other["false"])

    def read(value: Any) -> str:
        word = str(value).strip().lower()
        for spelling in (word, word.replace("-", "_"), word.replace("_", "-")):
            if spelling in choices or spelling in other:
                return spelling if spelling in choices else other[spelling]
        raise ValueError(f"{_shown(value)} is not one of {', '.join(choices)}.{near(word, [*choices, *other])}")

    return read


def optional(reader: Reader) -> Reader:
    """`reader`, or None where nothing is said."""
    return lambda value: None if value in NOTHING else reader(value)


def auto_or(reader: Reader) -> Reader:
    return lambda value: "auto" if value in (*NOTHING, "auto") else reader(value)


def names(value: Any) -> tuple[str, ...]:
    """A list of names, or one string with commas.

    >>> names("q_proj, v_proj")
    ('q_proj', 'v_proj')
    """
    if value in NOTHING:
        return ()
    found = value.split(",") if isinstance(value, str) else value
    listed = isinstance(found, Iterable) and not isinstance(found, Mapping)
    if not listed or not all(isinstance(name, str) for name in found):
        raise ValueError(f"expected a list of names, got {_shown(value)}")
    return tuple(name.strip() for name in found if name.strip())


def prompts(value: Any) -> tuple[str, ...]:
    """A list of texts; in one text they are parted by |, since prompts hold commas. A .txt file is read later.

    >>> prompts("a cat, sleeping | a dog")
    ('a cat, sleeping', 'a dog')
    """
    if value in NOTHING or value == []:
        return ()
    found = value.split("|") if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not all(isinstance(each, str) for each in found):
        raise ValueError(f"expected a list of texts, got {_shown(value)}")
    return tuple(each.strip() for each in found if each.strip())


def targets(value: Any) -> str | tuple[str, ...]:
    """A preset, a regular expression or a list of name endings. Commas make a list unless they stand in an expression.

    >>> targets("q_proj,v_proj"), targets("all"), targets(r"layers\\.\\d{1,2}\\.mlp")
    (('q_proj', 'v_proj'), 'all-linear', 'layers\\\\.\\\\d{1,2}\\\\.mlp')
    """
    if isinstance(value, str):
        word = value.strip()
        if word.lower() in ("all", "all_linear", "all-linear"):
            return "all-linear"
        if not word:
            raise ValueError("expected a preset, a pattern or a list of names, got nothing")
        return names(word) if "," in word and not re.search(r"[\\*+?{}()|^$\[]", word) else word
    found = names(value)
    if not found:
        raise ValueError(f"expected a preset, a pattern or a list of names, got {_shown(value)}")
    return "all-linear" if found == ("all",) else found


def layers(value: Any) -> int | tuple[int, ...] | None:
    """How many of the last layers (a number; none of them is 0), or which ones (a list, or ranges in a string).

    >>> layers(4), layers("0-2,7"), layers([3])
    (4, (0, 1, 2, 7), (3,))
    """
    if value in NOTHING or value == "all":
        return None
    if isinstance(value, str) and not value.strip().isdigit():
        return tuple(sorted({number for part in value.split(",") for number in _range(part.strip())}))
    if isinstance(value, (list, tuple, range)):
        return tuple(sorted({whole()(number) for number in value}))
    return whole(0)(value)


def mapping(value: Any) -> dict[str, Any]:
    """A mapping; on the command line `name=value,name=value` or JSON.

    >>> mapping("prompt=question,completion=answer")
    {'prompt': 'question', 'completion': 'answer'}
    """
    if value in NOTHING:
        return {}
    if isinstance(value, str):
        value = _mapping_from(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping, got {_shown(value)}")
    return {str(name): inner for name, inner in value.items()}


def options(value: Any) -> dict[str, Any]:
    """A mapping whose values are numbers, words, lists or yes and no, also where they were written as text.

    >>> options("factor=8,decompose_both=true,target_rank=4.5")
    {'factor': 8, 'decompose_both': True, 'target_rank': 4.5}
    """
    return {name: _value(inner) if isinstance(inner, str) else inner for name, inner in mapping(value).items()}


def _value(word: str) -> Any:
    """What a word stands for: a number, true or false, or itself."""
    try:
        return json.loads(word.lower() if word.lower() in ("true", "false") else word)
    except json.JSONDecodeError:
        return word


def token_rows(value: Any) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """Numbers of tokens: a list, or ranges in a string; or the same for each of several tables, by name.

    >>> token_rows("32000-32002,7"), token_rows({"lm_head": [3]})
    ((7, 32000, 32001, 32002), {'lm_head': (3,)})
    """
    if isinstance(value, Mapping):
        return {str(name): _rows(inner) for name, inner in value.items()}
    return () if value in NOTHING else _rows(value)


def _rows(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        return tuple(sorted({i for part in value.split(",") for i in _range(part.strip(), "token numbers")}))
    if isinstance(value, Iterable):
        return tuple(sorted({whole()(number) for number in value}))
    return (whole()(value),)


def overrides(value: Any) -> dict[str, dict[str, Any]]:
    """Pattern -> what differs there. A bare number is a rank.

    >>> overrides("q_proj=4")
    {'q_proj': {'rank': 4}}
    """
    read = {"rank": whole(1), "r": whole(1), "alpha": number(0), "lora_alpha": number(0), "dropout": number(0, 1)}
    called = {"r": "rank", "lora_alpha": "alpha"}
    found: dict[str, dict[str, Any]] = {}
    for pattern, fields in mapping(value).items():
        fields = fields if isinstance(fields, Mapping) else {"rank": fields}
        if unknown := [name for name in fields if name not in read]:
            raise ValueError(f"{pattern!r} sets {unknown[0]!r}; what can differ is rank, alpha, dropout")
        found[pattern] = {called.get(name, name): read[name](inner) for name, inner in fields.items()}
    return found


def paths(value: Any) -> str | tuple[str, ...]:
    """One path or hub id, or several. Other tools' lists of `{path: ...}` are read for their paths."""
    if isinstance(value, (list, tuple)):
        found = tuple(text(row["path"]) if isinstance(row, Mapping) and "path" in row else text(row) for row in value)
        return found[0] if len(found) == 1 else found
    return text(value)


def share_rows_or_path(value: Any) -> float | int | str | None:
    """A share of the rows (below 1), a number of rows, or a file; None where nothing is said.

    >>> share_rows_or_path("0.1"), share_rows_or_path(200), share_rows_or_path("val.jsonl")
    (0.1, 200, 'val.jsonl')
    """
    if value is None or value == "":
        return None
    if value is False or str(value).lower() in ("none", "no", "false"):
        return 0
    try:
        found = number(0)(value)
    except ValueError:
        if isinstance(value, str) and not re.fullmatch(r"-?[\d.]+", value):
            return value
        raise ValueError(f"expected a share below 1, a number of rows or a file, got {_shown(value)}") from None
    return found if 0 < found < 1 else whole()(found)


def folder(value: Any) -> str:
    """A folder to go on from. `--resume` alone means the last run."""
    if value is True or str(value).lower() in ("true", "yes", "last"):
        return "last"
    return text(value)


def _range(part: str, what: str = "layer numbers") -> range:
    found = re.fullmatch(r"(\d+)(?:\s*(?:-|\.\.)\s*(\d+))?", part)
    if not found:
        raise ValueError(f"expected {what} like 0-7,12, got {part!r}")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise ValueError(f"the range {part!r} runs backwards")
    return range(first, last + 1)


def _mapping_from(value: str) -> Any:
    if value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"expected a mapping, got broken JSON ({error})") from None
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(f"expected name=value,name=value, got {value!r}")
    return {name.strip(): inner.strip() for name, _, inner in pairs}


def _span(low: float, high: float) -> str:
    if math.isinf(high):
        return f"of at least {low:g}"
    return f"up to {high:g}" if math.isinf(low) else f"from {low:g} to {high:g}"


def _shown(value: Any) -> str:
    shown = repr(value)
    kind = {"dict": "mapping", "NoneType": "nothing"}.get(type(value).__name__, type(value).__name__)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({kind})"
