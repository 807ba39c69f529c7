"""Conversations: several speakers, their own histories, and the commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from veneer.errors import ConfigError
from veneer.infer.chat import COMMANDS, Chat, Quit, Speaker, mixture
from veneer.infer.load import Ready, load, source_of_folder
from veneer.infer.sampling import Sampling


@pytest.fixture
def chat(ready: Ready) -> Chat:
    return Chat([Speaker("base", ready, None), Speaker("a", ready, "a")], Sampling(max_tokens=6))


def said(chat: Chat, text: str) -> list[str]:
    grown = ["" for _ in chat.speakers]
    for index, piece in chat.ask(text):
        grown[index] += piece.text
    return grown


def test_each_speaker_answers_and_remembers_what_it_said_itself(chat: Chat) -> None:
    first = said(chat, "one")
    assert first[0] != first[1] and [s.answer.text for s in chat.speakers] == first
    second = said(chat, "two")
    for speaker, one, two in zip(chat.speakers, first, second, strict=True):
        assert [m["content"] for m in speaker.messages] == ["one", one, "two", two]


def test_side_by_side_answers_are_those_of_each_alone(chat: Chat, ready: Ready) -> None:
    together = said(chat, "hello there")
    for speaker, text in zip(chat.speakers, together, strict=True):
        assert said(Chat([Speaker("x", ready, speaker.adapter)], chat.sampling), "hello there") == [text]


def test_speakers_on_other_models_take_turns(chat: Chat, tiny_folder: Path) -> None:
    other = load([source_of_folder(str(tiny_folder))], say=lambda line: None)
    chat.speakers.append(Speaker("other", other, None))
    order = [index for index, _ in chat.ask("hello")]
    assert set(order) == {0, 1, 2} and order.index(2) < 4
    assert chat.speakers[2].answer.tokens == chat.speakers[0].answer.tokens  # the same base, loaded twice


def test_an_interrupted_answer_keeps_what_came(chat: Chat) -> None:
    stream = chat.ask("one")
    for _ in range(4):
        next(stream)
    stream.close()
    assert all(speaker.messages[-1]["role"] in ("assistant", "user") for speaker in chat.speakers if speaker.messages)
    said(chat, "two")  # and the conversation can go on
    assert chat.speakers[0].messages[-1]["role"] == "assistant"


def test_the_oldest_turns_are_dropped_when_the_model_reads_no_more(chat: Chat) -> None:
    chat.system = "Be kind."
    for speaker in chat.speakers:
        speaker.ready.engine.limit = 120
    for turn in range(5):
        said(chat, f"turn {turn} of a conversation that goes on")
    kept = chat.speakers[0].messages
    assert kept[0]["role"] == "system" and kept[1]["content"] != "turn 0 of a conversation that goes on"
    assert chat.speakers[0].forgotten > 0


def test_commands_do_what_they_say(chat: Chat, tmp_path: Path) -> None:
    assert chat.command("/save") == "there is nothing to save yet"
    answers = said(chat, "one")
    file = tmp_path / "c.jsonl"
    assert "with a was added" in chat.command(f"/save 2 {file}")
    assert json.loads(file.read_text()) == {
        "messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": answers[1]}]
    }
    assert "come from b" in chat.command("/adapter 2 b") and chat.speakers[1].adapter == "b"
    assert "come from a*0.5+b*0.5" in chat.command("/adapter 2 a*0.5+b*0.5")
    assert "known: base, a, b" in chat.command("/adapter")
    assert "no adapter 'c'" in chat.command("/adapter c")
    assert "no speaker 7" in chat.command("/adapter 7 a")
    assert chat.command("/set temperature 0.5") == "temperature is 0.5" and chat.sampling.temperature == 0.5
    assert "temperature must be 0 or more" in chat.command("/set temperature -1")
    assert "no setting 'tmperature'. Did you mean 'temperature'?" in chat.command("/set tmperature 1")
    assert "top_p: could not convert" in chat.command("/set top_p much")
    assert "begins anew" in chat.command("/system Be brief.")
    assert chat.system == "Be brief." and not chat.speakers[0].messages
    assert "no command /sav. Did you mean 'save'?" in chat.command("/sav")
    assert all(f"/{name}" in chat.command("/help") for name in COMMANDS)
    said(chat, "again")
    assert "No such file or directory" in chat.command(f"/save {tmp_path}/none/x.jsonl")
    with pytest.raises(Quit):
        chat.command("/quit")


def test_what_was_saved_can_be_trained_on(chat: Chat, tmp_path: Path) -> None:
    from veneer.data.dataset import load as load_data

    said(chat, "one")
    for _ in range(3):
        chat.command(f"/save {tmp_path}/c.jsonl")
    assert len(load_data(tmp_path / "c.jsonl")) == 3


def test_texts_are_saved_as_prompts_and_completions(make_adapter: Any, tmp_path: Path) -> None:
    source = dataclasses.replace(source_of_folder(str(make_adapter("p"))), plain=True)
    chat = Chat([Speaker("p", load([source], say=lambda line: None), "p")], Sampling(max_tokens=4))
    answers = [said(chat, text)[0] for text in ("one", "two")]  # each text stands alone
    chat.command(f"/save {tmp_path}/c.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": p, "completion": a} for p, a in zip(("one", "two"), answers, strict=True)]
    assert said(Chat(chat.speakers[:1], chat.sampling), "one") == answers[:1]


def test_sums_of_adapters_are_read() -> None:
    assert mixture("a", ("a",)) == "a" and mixture("a*2", ("a",)) == {"a": 2.0}
    with pytest.raises(ConfigError, match="'x' is not a weight"):
        mixture("a*x", ("a",))
