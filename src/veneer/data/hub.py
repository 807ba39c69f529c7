"""Rows from a hub id, `org/name[:config][@revision][split]`, through the `datasets` library (an extra).

tatsu-lab/alpaca            the train split
openai/gsm8k:main[test]     a configuration and a split
org/name@v2[train[:500]]    a revision and a slice
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from veneer.data.types import Row
from veneer.errors import DataError
from veneer.extras import need

__all__ = ["is_hub_id", "rows_of", "table"]

PATTERN = re.compile(
    r"(?P<path>[\w.-]+/[\w.-]+)(?::(?P<name>[\w.+-]+))?(?:@(?P<revision>[\w./-]+))?(?:\[(?P<split>.+)\])?"
)


def is_hub_id(data: str) -> bool:
    """Whether this is a hub id rather than a path that is not there.

    >>> is_hub_id("tatsu-lab/alpaca"), is_hub_id("openai/gsm8k:main[train]"), is_hub_id("./alpaca")
    (True, True, False)
    """
    return PATTERN.fullmatch(data) is not None and not data.startswith(".") and not Path(data).parent.is_dir()


def table(data: str, split: str) -> Any:
    """The `datasets.Dataset` of a hub id; `split` counts where the id names none. None if it has no such split."""
    datasets: Any = need("datasets", extra="data", use=f"fetch {data} from the hub")
    match = PATTERN.fullmatch(data)
    assert match is not None
    path, name, revision, given = match.group("path", "name", "revision", "split")
    try:
        return datasets.load_dataset(path, name, revision=revision, split=given or split)
    except Exception as error:  # whatever the library, the network or the hub may raise
        if given is None and split != "train" and "split" in str(error).lower():
            return None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the hub did not give this data: {type(error).__name__}: {reason}",
            where=data,
            fix="check the id, the configuration (org/name:config), the split (org/name[split]); offline, give a file",
        ) from error


def rows_of(table: Any, name: str) -> Iterator[Row]:
    """The rows of a `datasets.Dataset`, class numbers replaced by their names."""
    classes = _class_names(getattr(table, "features", None) or {})
    for number, fields in enumerate(table, 1):
        named = {key: _named(fields[key], names) for key, names in classes.items()}
        yield Row({**fields, **named}, f"{name}:row {number}")


def _class_names(features: Any) -> dict[str, list[str]]:
    found = {}
    for key, feature in features.items():
        inner = getattr(feature, "feature", feature)  # a list of classes: the tags of a sentence
        if names := getattr(inner, "names", None):
            found[key] = names
    return found


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value
