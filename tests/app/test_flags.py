"""Flags follow the schema: every key and alias is a flag, and a value is taken when it reads as one."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.app.flags import from_said, split
from veneer.errors import ConfigError
from veneer.train.aliases import ALIASES
from veneer.train.settings import KEYS


@pytest.mark.parametrize(
    "words, flags, rest",
    [
        ("m d --lr 1e-4", {"--lr": "1e-4"}, ["m", "d"]),
        ("--lora_r=8 m", {"--lora-r": "8"}, ["m"]),
        ("--use-dora m d", {"--use-dora": "true"}, ["m", "d"]),
        ("--use-dora false m", {"--use-dora": "false"}, ["m"]),
        ("--no-use-dora m", {"--use-dora": "false"}, ["m"]),
        ("--packing off m", {"--packing": "off"}, ["m"]),
        ("--packing m", {"--packing": "true"}, ["m"]),
        ("--no-packing", {"--packing": "false"}, []),
        ("--yes m", {"--yes": "true"}, ["m"]),
        ("--resume", {"--resume": "true"}, []),
        ("--resume runs/a", {"--resume": "runs/a"}, []),
        ("--resume --json", {"--resume": "true"}, ["--json"]),
        ("--init-lora-weights pissa m", {"--init-lora-weights": "pissa"}, ["m"]),
        ("--val 0", {"--val": "0"}, []),
        ("--targets q_proj,v_proj m", {"--targets": "q_proj,v_proj"}, ["m"]),
        ("m -- --lr 3", {}, ["m", "--lr", "3"]),
        ("--lr -1", {"--lr": "-1"}, []),
    ],
)
def test_words_become_flags(words: str, flags: dict[str, str], rest: list[str]) -> None:
    assert split(words.split()) == (flags, rest)


@pytest.mark.parametrize("name", [*KEYS, *ALIASES])
def test_every_key_and_alias_is_a_flag_in_both_spellings(name: str) -> None:
    for spelling in (f"--{name}", f"--{name.replace('_', '-')}"):
        assert split([spelling + "=1"]) == ({f"--{name.replace('_', '-')}": "1"}, [])


def test_the_later_flag_wins() -> None:
    assert split(["--lr", "1", "--lr", "2"]).flags == {"--lr": "2"}


def test_model_and_data_stand_alone_or_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("base_model: m\ndata: d.jsonl\nlearning_rate: 1e-4\n")
    resolved = from_said([str(file), "lr=3e-4"], {"--lora-r": "4"}, ["epochs=1"], None)
    s = resolved.settings
    assert (s.model, s.data, s.lr, s.r, s.epochs) == ("m", "d.jsonl", 3e-4, 4, 1)
    assert resolved.origins["lr"].how == "flag" and resolved.origins["model"].how == "file"
    again = from_said(["m2", "d2"], {}, [], str(file)).settings
    assert (again.model, again.data, again.lr) == ("m2", "d2", 1e-4)


def test_problems_of_file_and_flags_come_together(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("lr: quick\nrank: 8\nwarmpu: 3\n")
    with pytest.raises(ConfigError) as caught:
        from_said([str(file)], {"--dropout": "7"}, [], None)
    text = str(caught.value)
    assert "c.yaml:1" in text and "Did you mean 'warmup'?" in text and "dropout" in text
