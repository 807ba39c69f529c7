"""A conversation with one model, or with several side by side, without a terminal.

    chat = Chat([Speaker("base", ready, None), Speaker("sql", ready, "sql")])
    for index, piece in chat.ask("How many orders last week?"):     # both answers grow together
        ...

Every speaker keeps its own history, so in the second turn each goes on from what it said itself. Speakers that share a
model are answered in one batch, each row with its own adapter; speakers on other models take turns token by token.

Lines that begin with a slash are commands; `COMMANDS` is the list and the help. What they answer is text for the user.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from veneer.core.model import adapters
from veneer.core.registry import near
from veneer.data.types import Message
from veneer.errors import ConfigError, VeneerError
from veneer.infer.engine import Adapter, Answer, Piece
from veneer.infer.load import Ready
from veneer.infer.sampling import Sampling

__all__ = ["COMMANDS", "Chat", "Quit", "Speaker"]


class Quit(Exception):
    """The user wants to leave."""


@dataclass
class Speaker:
    """Who answers: a model, with one of its adapters or bare, and what was said so far."""

    label: str
    ready: Ready
    adapter: Adapter
    messages: list[Message] = field(default_factory=list)
    forgotten: int = 0  # turns dropped from the beginning because the model reads no more
    answer: Answer = field(default_factory=Answer)

    @property
    def routed(self) -> bool:
        return bool(adapters(self.ready.model))

    def prompt(self, room: int) -> list[int]:
        """The conversation as tokens, its oldest turns left out until `room` tokens are free for the answer."""
        limit = self.ready.engine.limit
        if self.ready.plain:  # a text to go on from has no turns before it
            return self.ready.prompt(self.messages[-1]["content"])
        while True:
            ids = self.ready.prompt(self.messages)
            first = 1 if self.messages[0]["role"] == "system" else 0
            if limit is None or len(ids) + room <= limit or len(self.messages) - first < 3:
                return ids
            del self.messages[first : first + 2]
            self.forgotten += 2


@dataclass
class Chat:
    speakers: list[Speaker]
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    saved: int = 0

    # ------------------------------------------------------------------ talking

    def ask(self, text: str) -> Iterator[tuple[int, Piece]]:
        """Send a turn to every speaker; yields (speaker, piece) as the answers grow. Stopping early keeps what came."""
        for speaker in self.speakers:
            if not speaker.messages and self.system is not None:
                speaker.messages.append({"role": "system", "content": self.system})
            speaker.messages.append({"role": "user", "content": text})
            speaker.answer, speaker.forgotten = Answer(), 0
        start = time.perf_counter()
        try:
            for index, piece in _interleaved([self._stream(group) for group in self._groups()]):
                answer = self.speakers[index].answer
                answer.add(piece)
                answer.seconds = time.perf_counter() - start
                yield index, piece
        finally:
            for speaker in self.speakers:
                self._close(speaker)

    def _groups(self) -> list[list[int]]:
        """Speakers by the engine they share: the same model, asked in the same manner."""
        groups: dict[int, list[int]] = {}
        for index, speaker in enumerate(self.speakers):
            groups.setdefault(id(speaker.ready.engine), []).append(index)
        return list(groups.values())

    def _stream(self, group: list[int]) -> Iterator[tuple[int, Piece]]:
        speakers = [self.speakers[index] for index in group]
        engine = speakers[0].ready.engine
        room = min(self.sampling.max_tokens, (engine.limit or self.sampling.max_tokens) // 2)
        prompts = [speaker.prompt(room) for speaker in speakers]
        rows = [speaker.adapter for speaker in speakers] if speakers[0].routed else None
        for speaker, prompt in zip(speakers, prompts, strict=True):
            speaker.answer.prompt_tokens = len(prompt)
        for piece in engine.stream(prompts, self.sampling, rows):
            yield group[piece.row], piece

    def _close(self, speaker: Speaker) -> None:
        """The answer joins the history; a question that got none leaves it."""
        if speaker.answer.text:
            speaker.messages.append({"role": "assistant", "content": speaker.answer.text})
        elif speaker.messages and speaker.messages[-1]["role"] == "user":
            speaker.messages.pop()

    # ------------------------------------------------------------------ commands

    def command(self, line: str) -> str:
        """Carry out a line such as `/adapter sql` and say what was done."""
        name, _, rest = line[1:].strip().partition(" ")
        if name not in COMMANDS:
            return f"no command /{name}.{near(name, COMMANDS)} /help lists them"
        try:
            return COMMANDS[name].act(self, rest.strip())
        except VeneerError as error:
            return str(error)
        except OSError as error:
            return f"{error.strerror or error}: {error.filename}"

    def reset(self, _: str = "") -> str:
        for speaker in self.speakers:
            speaker.messages.clear()
        return "the conversation begins anew"

    def set_system(self, text: str) -> str:
        self.system = text or None
        self.reset()
        return f"system prompt: {text!r}; the conversation begins anew" if text else "no system prompt"

    def swap(self, rest: str) -> str:
        """`/adapter sql`, `/adapter base`, `/adapter sql*0.7+tone*0.3`; with a number first, for that speaker."""
        number, _, wanted = rest.partition(" ")
        at, wanted = (int(number) - 1, wanted) if number.isdigit() and wanted else (0, rest)
        if not 0 <= at < len(self.speakers):
            raise ConfigError(f"there is no speaker {at + 1}", fix=f"1 to {len(self.speakers)}")
        speaker = self.speakers[at]
        known = adapters(speaker.ready.model)
        if not wanted:
            return f"{speaker.label}; known: {', '.join(('base', *known))}"
        speaker.adapter, speaker.label = mixture(wanted, known), wanted
        return f"answers now come from {wanted}; the conversation goes on"

    def set_sampling(self, rest: str) -> str:
        """`/set temperature 0.7`."""
        name, _, value = rest.replace("=", " ").partition(" ")
        kinds = {"max_tokens": int, "top_k": int, "seed": int}
        known = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        if not name:
            return ", ".join(f"{key} {getattr(self.sampling, key)}" for key in known)
        if name not in known:
            raise ConfigError(f"no setting {name!r}.{near(name, known)}", fix=f"one of {', '.join(known)}")
        try:
            self.sampling = replace(self.sampling, **{name: kinds.get(name, float)(value.strip())})
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None
        return f"{name} is {getattr(self.sampling, name)}"

    def save(self, rest: str) -> str:
        """Append the conversation to a JSONL in the format that `train` reads. `/save FILE`, `/save 2 FILE`."""
        number, _, name = rest.partition(" ")
        at, name = (int(number) - 1, name) if number.isdigit() else (0, rest)
        if not 0 <= at < len(self.speakers) or not self.speakers[at].messages:
            return "there is nothing to save yet"
        path = Path(name.strip() or "chat.jsonl").expanduser()
        with path.open("a", encoding="utf-8") as file:
            for row in _rows(self.speakers[at]):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.saved += 1
        return f"the conversation with {self.speakers[at].label} was added to {path}"

    def quit(self, _: str = "") -> str:
        raise Quit

    def help(self, _: str = "") -> str:
        return "\n".join(f"{command.usage:<24} {command.says}" for command in COMMANDS.values())


def _rows(speaker: Speaker) -> list[dict[str, Any]]:
    """The conversation as rows to train on: one of messages, or a prompt and a completion for each text."""
    if not speaker.ready.plain:
        return [{"messages": speaker.messages}]
    said = [message["content"] for message in speaker.messages if message["role"] != "system"]
    return [{"prompt": prompt, "completion": answer} for prompt, answer in zip(said[::2], said[1::2], strict=False)]


def _interleaved(streams: list[Iterator[tuple[int, Piece]]]) -> Iterator[tuple[int, Piece]]:
    """One item of each in turn, until all are exhausted; all are closed when the reader leaves."""
    waiting = list(streams)
    try:
        while waiting:
            for stream in list(waiting):
                item = next(stream, None)
                if item is None:
                    waiting.remove(stream)
                else:
                    yield item
    finally:
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]


def mixture(text: str, known: tuple[str, ...]) -> Adapter:
    """
    >>> mixture("sql", ("sql", "tone")), mixture("base", ()), mixture("sql*0.7+tone*0.3", ("sql", "tone"))
    ('sql', None, {'sql': 0.7, 'tone': 0.3})
    """
    if text == "base":
        return None
    weights: dict[str, float] = {}
    for part in text.split("+"):
        name, _, weight = part.strip().partition("*")
        if name not in known:
            raise ConfigError(f"no adapter {name!r}.{near(name, known)}", fix=f"known: {', '.join(('base', *known))}")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise ConfigError(f"{weight!r} is not a weight", fix="write sql*0.7+tone*0.3") from None
    return text if list(weights.values()) == [1.0] and text in known else weights


@dataclass(frozen=True)
class Command:
    usage: str
    says: str
    act: Callable[[Chat, str], str]


COMMANDS: Mapping[str, Command] = {
    "help": Command("/help", "this list", Chat.help),
    "save": Command("/save [N] [FILE]", "add the conversation (with speaker N) to a JSONL that train reads", Chat.save),
    "adapter": Command("/adapter [N] NAME", "answer with another adapter, base, or a sum: a*0.7+b*0.3", Chat.swap),
    "system": Command("/system TEXT", "set the system prompt and begin anew", Chat.set_system),
    "set": Command("/set temperature 0.7", "change how tokens are picked", Chat.set_sampling),
    "reset": Command("/reset", "forget the conversation", Chat.reset),
    "quit": Command("/quit", "leave (Ctrl-D does the same)", Chat.quit),
}
