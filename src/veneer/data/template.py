"""One renderer between conversations and tokens, for training, evaluation, chat and serving alike.

A conversation is rendered to text by a chat template and the text is tokenised with no special tokens added: the
template has written those it wants, so a second BOS cannot come about. Where the model begins to speak and what ends
its turn is looked up once (habits.py):

    messages               ... <user turn> <header> <answer> <turn end> <rest>
    prompt(messages[:k])   ...............................^             what inference feeds
    trained                                          |---------------|  what training counts, turn end included

The decision a reader would question: templates are not followed to the letter. What is trained must be what is asked
for later, so a generation prompt that finished answers do not contain is cut, a missing one is added, an open last turn
is closed as it is when the conversation goes on; and a template that writes the date of the day is held at one day, or
a run resumed after midnight would see other tokens. `warnings` says which of these was done.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from veneer.data.families import FALLBACK, FAMILIES
from veneer.data.habits import ANSWER, WHOLE, Habits, any_of, observed
from veneer.data.types import Message, Tokenizer
from veneer.errors import ConfigError, DataError

__all__ = ["Renderer", "Turn"]

DAY = datetime.date(2024, 7, 26)  # the day that Llama 3.1's template itself falls back on
TOOL = {
    "type": "function",
    "function": {"name": "veneer_probe", "description": "x", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"type": "function", "id": "call00001", "function": {"name": "veneer_probe", "arguments": {"veneer_probe": 1}}}


@dataclass(frozen=True)
class Turn:
    """An assistant turn in `text`, the conversation up to its end: trained are the characters from `start` to `end`."""

    text: str
    start: int
    end: int


class Renderer:
    """`template`: None for the tokenizer's own, a name (chatml, llama3, gemma, qwen, mistral, alpaca, vicuna), a .jinja
    file, or the jinja text itself. `system` is put before conversations that have no system turn. `variables` reach the
    template (enable_thinking=False)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | os.PathLike[str] | None = None,
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.system, self.variables = tokenizer, system, dict(variables or {})
        self.name, chosen = _chosen(template, tokenizer)
        self.is_ours = chosen in FAMILIES.values()
        self.jinja = _held_at(DAY, chosen)
        self.is_dated = self.jinja != chosen
        self.is_fast = bool(getattr(tokenizer, "is_fast", False))  # can tell which characters a token stands for
        self.bos = _habitual_bos(tokenizer)
        self.eos: str | None = tokenizer.eos_token
        self.eos_id = self._single_id(self.eos, "EOS") if self.eos else None
        self._check_named()

    # What was decided

    @cached_property
    def trouble(self) -> str | None:
        """Why no conversation can be written, if so; texts and prompt/completion rows need no template."""
        try:
            self._habits  # noqa: B018
        except (ConfigError, DataError) as error:
            return error.what
        return None

    @property
    def decision(self) -> str:
        """One sentence to print: which template, why, and what ends a turn."""
        if self.trouble:
            return f"template: NONE that can be used ({self.trouble}); texts and prompt/completion rows only"
        chosen = {
            "own": "the tokenizer's own",
            "none": f"none in the tokenizer, so {FALLBACK}'s (plain words and EOS: all that a base model knows)",
        }.get(self.name, self.name)
        end = f"turns end in {self.turn_end}" if self.turn_end else "turns have NO end token"
        return f"template: {chosen}; {end}; {f'texts begin with {self.bos}' if self.bos else 'no BOS'}"

    @property
    def warnings(self) -> list[str]:
        """What is done otherwise than the template's author may expect."""
        habits, found = Habits() if self.trouble else self._habits, []
        if habits.cut:
            found.append(
                f"the template's generation prompt ends in {habits.cut!r}, which its finished answers do not contain; "
                "prompts stop before it, in training and in use"
            )
        if habits.add:
            found.append(f"the template has no generation prompt; {habits.add!r}, the start of its answers, is added")
        if habits.close:
            found.append(f"the template leaves the last turn open; {habits.close!r}, which it writes later, is added")
        if self.is_dated:
            found.append(f"the template writes the date of the day; it is held at {DAY}, in training and in use")
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Equal for renderers that write the same text: compared when an adapter is loaded."""
        said = repr((self.source, self.system, sorted(self.variables.items()), self.bos, self.eos))
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    @property
    def source(self) -> str | None:
        """The jinja text in use: what to save beside an adapter."""
        own = self.tokenizer.chat_template
        return self.jinja or (own.get("default") if isinstance(own, dict) else own)

    # Text

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, generate: bool = False
    ) -> str:
        """The template's text, as it is. Raises DataError with the template's own words when it refuses."""
        if self.is_ours and self.eos is None:
            raise DataError("the tokenizer has no EOS token to end turns with", fix="give a template that ends turns")
        options = self.variables | ({"bos_token": self.bos} if self.is_ours else {})
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in self._with_system(messages)],
                tools=list(tools) or None,
                chat_template=self.jinja,
                add_generation_prompt=generate,
                tokenize=False,
                **options,
            )
        except Exception as error:  # templates are programs: they raise whatever they like
            raise DataError(
                f"the chat template refuses this conversation: {error}",
                fix="mend the conversation, or choose another template (template=chatml)",
            ) from error
        return str(text)

    def whole(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """The text of a conversation, its last answer closed."""
        return self.render(messages, tools) + (self._habits.close if messages[-1]["role"] == "assistant" else "")

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """The text after which the model speaks."""
        text = self.render(messages, tools, generate=True)
        return text.removesuffix(self._habits.cut) + self._habits.add

    def turn(self, messages: Sequence[Message], index: int, tools: Sequence[dict[str, Any]] = ()) -> Turn:
        """The assistant turn `messages[index]` as the last of its conversation, and which part of it is trained."""
        before = self.prompt(messages[:index], tools)
        text = self.whole(messages[: index + 1], tools)
        if not text.startswith(before):
            raise DataError(
                f"the template's prompt for turn {index + 1} is no beginning of the text it writes for that turn, so "
                "which tokens the model would produce cannot be told",
                fix="choose another template (template=chatml)",
            )
        return Turn(text, len(before), self._end(text, len(before), index))

    def _end(self, text: str, start: int, index: int) -> int:
        """Where a trained turn ends: behind its end token, among the control tokens that close the text. (Phi-3 writes
        its turn end and then EOS; the model needs to produce the first only.)"""
        closing: list[re.Match[str]] = []
        rest = len(text)
        for match in reversed([*self._control_tokens.finditer(text, start)]):
            if text[match.end() : rest].strip():
                break
            closing.append(match)
            rest = match.start()
        if not closing:
            self._refuse_endless(index)
        return next((match for match in closing if match.group() == self.turn_end), closing[0]).end()

    def finish(self, text: str) -> str:
        """`text` with EOS after it, if it does not end so already; unchanged for a tokenizer without EOS."""
        return text if self.eos is None or text.endswith(self.eos) else text + self.eos

    # Tokens

    def ids(self, text: str) -> list[int]:
        """Tokens of rendered text. Nothing is added: the text holds its BOS."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def lead(self, text: str) -> list[int]:
        """What goes before the tokens of a text that no template wrote: BOS, if this tokenizer begins texts so and the
        text does not. As an id, not as text: "<s>Hello" and "Hello" after <s> are different tokens for a tokenizer that
        puts a space before a text's first word (Llama 2, Mistral)."""
        return self.ids(self.bos) if self.bos and not text.startswith(self.bos) else []

    def tokens(self, texts: Iterable[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Tokens of many rendered texts at once, each token with the characters it stands for."""
        batch = list(texts)
        if not batch:
            return
        if not self.is_fast:
            raise ConfigError(
                f"the tokenizer, {type(self.tokenizer).__name__}, cannot tell which characters a token stands for",
                where="tokenizer",
                fix="use a fast tokenizer (AutoTokenizer gives one when the model has a tokenizer.json)",
            )
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        made = self.tokenizer(batch, add_special_tokens=False, return_offsets_mapping=True, **options)
        yield from zip(made["input_ids"], made["offset_mapping"], strict=True)

    @cached_property
    def vocabulary_size(self) -> int:
        return len(self.tokenizer)  # type: ignore[arg-type]

    def prompt_ids(self, messages: Sequence[Message] | str, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """What inference feeds. A plain string is continued as it stands, as prompt/completion rows train it."""
        if isinstance(messages, str):
            return self.lead(messages) + self.ids(messages)
        return self.ids(self.prompt(messages, tools))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a produced answer, its end and what follows left off."""
        kept: list[int] = []
        for token in ids:
            if token in self.stop_ids:
                break
            kept.append(int(token))
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))

    @property
    def turn_end(self) -> str | None:
        """The token that closes an assistant turn; None for a template that writes none."""
        return None if self.trouble else self._habits.turn_end

    @property
    def turn_end_is_next(self) -> bool:
        """Whether turns end at the marker with which the next one begins (GLM)."""
        return self._habits.by_next

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens at which generation ends: the turn's end and EOS."""
        turn_end = self._single_id(self.turn_end, "turn end") if self.turn_end else None
        return tuple(sorted({stop for stop in (turn_end, self.eos_id) if stop is not None}))

    # What a template can carry

    @cached_property
    def takes_tools(self) -> bool:
        """Whether tools appear in the text at all; many templates leave them out in silence."""
        text = self._tried(WHOLE[:1], [TOOL])
        return text is None or "veneer_probe" in text  # a template that refuses will say so itself

    @cached_property
    def takes_system(self) -> bool:
        return ANSWER in (self._tried([Message(role="system", content=ANSWER), *WHOLE[:1]]) or "")

    @cached_property
    def takes_tool_calls(self) -> bool:
        calling: Message = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        text = None if self._habits.by_next else self._tried([WHOLE[0], calling])
        if text is None:  # a marker that is not yet known would end such a turn; a template that refuses will say so
            return not self._habits.by_next
        return "veneer_probe" in text or CALL["id"] in text  # Kimi K2 writes the id alone

    def forged(self, text: str) -> str | None:
        """A token of the template that stands in a turn's own text, where it would end the turn or begin another."""
        match = self._structure.search(text)
        return match.group() if match else None

    # How the template behaves

    @cached_property
    def _habits(self) -> Habits:
        if self.is_ours and self.eos is None:
            return Habits()
        return observed(self.render, self.tokens if self.is_fast else None, self._control_tokens)

    def _tried(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str | None:
        try:
            return self.render(messages, tools)
        except DataError:
            return None

    def _with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        if self.system is None or (messages and messages[0]["role"] == "system"):
            return messages
        return [Message(role="system", content=self.system), *messages]

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        """Tokens that stand outside the text proper: special ones, and whatever was added to the vocabulary."""
        added = [str(token) for token in getattr(self.tokenizer, "added_tokens_decoder", {}).values()]
        return any_of({*added, *getattr(self.tokenizer, "all_special_tokens", [])})

    @cached_property
    def _structure(self) -> re.Pattern[str]:
        """The control tokens that the template writes around turns."""
        return any_of(set(self._control_tokens.findall(self.render(WHOLE))))

    # Refusals

    def _check_named(self) -> None:
        if self.name == "none" and self.eos is None:
            return  # said when a conversation is to be rendered
        if self.name not in ("own", "none") and self.trouble:
            raise ConfigError(self.trouble, where="template", fix="choose another template")
        if self.is_ours and not self.turn_end:
            raise ConfigError(
                f"the {self.name} template ends turns in a token that this tokenizer does not have",
                where="template",
                fix=f"choose template={FALLBACK} or another whose turn end the model knows",
            )
        if self.system is not None and not self.takes_system:
            raise ConfigError(
                "the chat template takes no system prompt",
                where="system",
                fix="leave the system prompt out, or choose template=gemma, which puts it into the first user turn",
            )

    def _refuse_endless(self, index: int) -> None:
        fix = (
            "choose template=chatml (or another named one) or a .jinja file whose assistant turns end in "
            "{{ eos_token }}; prompt/completion rows need no template: EOS is appended to them"
        )
        if self.turn_end is None:
            raise ConfigError(
                "the chat template ends assistant turns in no token, so the model would never learn to stop",
                where="template",
                fix=fix,
            )
        raise DataError(f"the chat template ends assistant turn {index + 1} in no token", fix=fix)

    def _single_id(self, token: str, what: str) -> int:
        ids = self.ids(token)
        if len(ids) != 1:
            raise ConfigError(
                f"the {what} {token!r} is spelt with {len(ids)} tokens by this tokenizer, so nothing can stop at it",
                where="template",
                fix="use the tokenizer that belongs to the model, or a template whose turn end it knows",
            )
        return ids[0]


def _chosen(template: str | os.PathLike[str] | None, tokenizer: Tokenizer) -> tuple[str, str | None]:
    """What to call the template, and its jinja text (None: the tokenizer's own)."""
    if template is None:
        own = tokenizer.chat_template
        if not own:
            return "none", FAMILIES[FALLBACK]
        return "own", own if isinstance(own, str) and "strftime_now" in own else None  # several: transformers picks one
    name = os.fspath(template)
    if "{{" in name or "{%" in name:
        return "given", name
    if name.endswith((".jinja", ".jinja2", ".j2")):
        try:
            return name, Path(name).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the template file cannot be read: {error}", where="template") from None
    return name, FAMILIES[name]


def _habitual_bos(tokenizer: Tokenizer) -> str:
    """The BOS that this tokenizer puts before a text of its own accord, or nothing. Having a bos_token proves nothing:
    GPT-2, Qwen and SmolLM2 have one and never use it so."""
    bos = tokenizer.bos_token
    if not bos:
        return ""
    ids = list(tokenizer("a")["input_ids"])
    return str(bos) if ids and tokenizer.decode(ids[:1]) == bos else ""


def _held_at(day: datetime.date, jinja: str | None) -> str | None:
    """The template with `strftime_now` answering for one fixed day, by a macro that hides transformers' function."""
    formats = re.findall(r"""strftime_now\(\s*(["'])(.*?)\1""", jinja or "")
    if jinja is None or not formats:
        return jinja
    texts = json.dumps({form: day.strftime(form) for _, form in formats})
    return f"{{%- macro strftime_now(format) -%}}{{{{- {texts}[format] -}}}}{{%- endmacro -%}}{jinja}"
