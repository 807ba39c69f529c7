"""Flags out of schemas: what `veneer train --lr 1e-4 --use-dora MODEL DATA` says, in the words of train/settings.py.

No flag of a setting is written down anywhere. A word that starts with `--` and names a key or one of its aliases is
such a flag; dashes and underscores are the same; `--no-x` says x is false. Whether a value follows is asked of the
key's own reader: if the reader would take `true`, the flag may stand alone, and it takes the next word only if that
reads as a value too. So `--packing off`, `--packing MODEL` and `--resume` mean what they say without a list of special
cases. Values stay text here: `settings.resolve` reads, checks and explains them.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from veneer.errors import ConfigError
from veneer.infer.sampling import Sampling
from veneer.train.aliases import ALIASES, DEFERRED, NOT_NEEDED
from veneer.train.settings import KEYS, Key, Resolved, resolve

__all__ = ["Said", "add_help", "add_sampling", "add_settings", "from_said", "sampling_of", "split"]

GROUPS = {
    "subject": "what to adapt, and to what",
    "method": "method",
    "data": "data",
    "training": "training",
    "pictures": "pictures (task diffusion)",
    "run": "the run",
}
METAVARS = {"flag": "", "whole": "N", "number": "X", "path": "PATH", "names": "NAMES", "mapping": "A=B"}


class Said(NamedTuple):
    """The settings' flags of a command line, and the words that are left over for the command itself."""

    flags: dict[str, Any]
    rest: list[str]


def split(words: Sequence[str]) -> Said:
    """
    >>> split(["m", "d.jsonl", "--lora_r=8", "--use-dora", "--no-yes", "--json"])
    Said(flags={'--lora-r': '8', '--use-dora': 'true', '--yes': 'false'}, rest=['m', 'd.jsonl', '--json'])
    """
    flags: dict[str, Any] = {}
    rest: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if word == "--":
            return Said(flags, rest + waiting)
        name, equals, value = word.partition("=")
        key, default = _key_of(name)
        if key is None:
            rest.append(word)
        else:
            flags["--" + name[2:].replace("_", "-")] = value if equals else _value(key, name, default, waiting)
    return Said(_own_names(flags), rest)


def _key_of(word: str) -> tuple[str | None, str | None]:
    """The key that a word names and, for `--no-key`, the value it implies."""
    if not word.startswith("--"):
        return None, None
    name = word[2:].replace("-", "_")
    if _known(name):
        return name, None
    if name.startswith("no_") and _known(name[3:]) and _reads(name[3:], "false"):
        return name[3:], "false"
    return None, None


def _known(name: str) -> bool:
    return name in KEYS or name in ALIASES or name in DEFERRED or name in NOT_NEEDED


def _reads(name: str, value: Any) -> bool:
    """Whether the key, or the keys that an alias stands for, would take this value."""
    if name in NOT_NEEDED:
        return True
    try:
        if name in KEYS or name in DEFERRED:
            (KEYS[name].read if name in KEYS else DEFERRED[name])(value)
        else:
            for own, inner in ALIASES[name](value).items():
                (KEYS[own].read if own in KEYS else DEFERRED[own])(inner)
    except ValueError:
        return False
    return True


def _value(key: str, flag: str, implied: str | None, waiting: list[str]) -> str:
    if implied is not None:
        return implied
    may_stand_alone = _reads(key, True)
    follows = bool(waiting) and not waiting[0].startswith("--")
    if follows and (not may_stand_alone or _reads(key, waiting[0])):
        return waiting.pop(0)
    if may_stand_alone:
        return "true"
    raise ConfigError(f"{flag} needs a value", "command line", f"`veneer train --explain {key}` says which")


def _own_names(flags: dict[str, Any]) -> dict[str, Any]:
    """`--no-x` becomes `--x`, now that its value is known."""
    return {(name if _known(name[2:].replace("-", "_")) else "--" + name[5:]): value for name, value in flags.items()}


def assignments(pairs: Iterable[str]) -> dict[str, Any]:
    """`--set lr=1e-4`, and the bare `lr=1e-4` that people write after a YAML file.

    >>> assignments(["lr=1e-4"])
    {'lr': '1e-4'}
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair} lacks its value", "command line", "write --set key=value")
        found[name] = value
    return found


def from_said(positional: Sequence[str], said: dict[str, Any], sets: Iterable[str], config: str | None) -> Resolved:
    """Settings from `MODEL DATA`, or `config.yaml`, with the flags on top."""
    words = [word for word in positional if not _is_assignment(word)]
    sets = [*sets, *(word for word in positional if _is_assignment(word))]
    if config is None and words and words[0].lower().endswith((".yaml", ".yml")):
        config, words = words[0], words[1:]
    if len(words) > 2:
        raise ConfigError(f"one word too many: {words[2]!r}", "command line", "write veneer train MODEL DATA [flags]")
    flags = {**said, **assignments(sets)}
    for name, word in zip(("model", "data"), words, strict=False):
        if f"--{name}" in flags:
            raise ConfigError(f"the {name} is said twice: {word!r} and --{name} {flags[f'--{name}']!r}", "command line")
        flags[name] = word
    return resolve(config, None, flags)


def _is_assignment(word: str) -> bool:
    return "=" in word and _known(word.partition("=")[0].replace("-", "_"))


def add_settings(parser: argparse.ArgumentParser) -> None:
    """What `from_said` takes, for a command of settings."""
    parser.set_defaults(takes_settings=True)
    parser.add_argument("positional", nargs="*", metavar="MODEL DATA", help="or one YAML file of settings")
    parser.add_argument("--config", "-c", metavar="FILE", help="settings as YAML; flags win over it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, by any of its names"
    )


def add_help(parser: argparse.ArgumentParser) -> None:
    """Show every key in `--help`, in the schema's groups. `split` has taken the flags out before the parser looks."""
    for group, title in GROUPS.items():
        section = parser.add_argument_group(title)
        for key in (key for key in KEYS.values() if key.group == group):
            section.add_argument(key.flag, metavar=_metavar(key), help=_help(key), default=argparse.SUPPRESS)


def _metavar(key: Key) -> str:
    return "|".join(key.choices) or METAVARS.get(key.kind, "V")


def _help(key: Key) -> str:
    if key.rule:
        default = key.rule if key.default in (None, "auto") else f"{key.default}; {key.rule}"
    else:
        default = "" if key.default in (None, (), {}, False) else str(key.default)
    unit = f" ({key.unit})" if key.unit else ""
    return f"{key.help}{unit}{f' [{default}]' if default else ''}".replace("%", "%%")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The fields of `Sampling` as flags."""
    section = parser.add_argument_group("how tokens are picked")
    for each in dataclasses.fields(Sampling):
        kind = {"int": int, "float": float}.get(str(each.type), str)
        flag, default = "--" + each.name.replace("_", "-"), each.default
        if each.name == "stop":
            section.add_argument(flag, action="append", default=[], metavar="TEXT", help=each.metadata["help"])
        else:
            shown = f"{each.metadata['help']} [{default}]".replace("%", "%%")
            section.add_argument(flag, type=kind, default=default, metavar="X", help=shown)


def sampling_of(args: argparse.Namespace) -> Sampling:
    found = {each.name: getattr(args, each.name) for each in dataclasses.fields(Sampling)}
    return Sampling(**{**found, "stop": tuple(args.stop)})
