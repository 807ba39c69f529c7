"""Writes settings.md out of the one table of settings, so the page cannot say what the code does not.

python docs/settings.py         # after a change of src/veneer/train/settings.py; a test holds the two together
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from veneer.train.settings import KEYS, Key

PAGE = Path(__file__).with_suffix(".md")

INTRO = """# Settings

<!-- written by docs/settings.py; edit the table in src/veneer/train/settings.py instead -->

Every key works as a flag (`--batch-size 4`), as a line of a YAML file (`batch_size: 4`) and as an argument of
`veneer.train(model, data, batch_size=4)`. Flags win over the file. Dashes and underscores are the same. A key that is
not in this table is refused with the nearest one that is, and so is a key that would have no effect beside the others.
`veneer train --explain KEY` says what is written here.

Names that other tools use for the same thing are understood and answered with a one-line notice; they stand in the last
column. The value of each key and where it came from (default, file and line, flag, or a rule and its reason) is kept in
the run's `config.yaml`.
"""

TITLES = {
    "subject": "What to adapt, and to what",
    "method": "The method",
    "data": "The data",
    "training": "The training",
    "pictures": "Pictures",
    "run": "How the run is kept",
}


def page() -> str:
    return "\n".join([INTRO, *(line for group, keys in groups() for line in section(group, keys))])


def groups() -> Iterator[tuple[str, list[Key]]]:
    by_group = sorted(KEYS.values(), key=lambda key: list(TITLES).index(key.group))
    return ((group, list(keys)) for group, keys in groupby(by_group, key=lambda key: key.group))


def section(group: str, keys: list[Key]) -> Iterator[str]:
    yield f"## {TITLES[group]}\n"
    yield "| key | what it is | when not set | also called |"
    yield "| --- | --- | --- | --- |"
    for key in keys:
        cells = [f"`{key.name}`", about(key), unset(key), ", ".join(f"`{alias}`" for alias in key.aliases)]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def about(key: Key) -> str:
    choices = f" One of {', '.join(f'`{choice}`' for choice in key.choices)}." if key.choices else ""
    unit = f" In {key.unit}." if key.unit else ""
    limits = "".join(f" Only with {name} {' or '.join(values)}." for name, values in key.only_for.items())
    return key.help + choices + unit + limits


def unset(key: Key) -> str:
    return key.rule or ("-" if key.default in (None, (), {}, "") else f"`{key.default}`")


if __name__ == "__main__":
    PAGE.write_text(page())
