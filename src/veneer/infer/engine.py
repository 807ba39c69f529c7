"""Text out of a model that carries adapters: batches, streaming, one adapter per row.

    generate(model, tokenizer, [[{"role": "user", "content": "How many?"}]] * 2, adapters=["sql", None])

    engine = Engine(model, tokenizer, stop_ids)
    engine.generate([ids, ids], Sampling(), adapters=["sql", None])       # two rows, two adapters, one pass

One decoding loop serves a single chat, a side by side and an evaluation: a prompt is a list of token ids, an answer
is a stream of `Piece`s. Rows are padded on the left, share one key-value cache, and leave the batch when they are
done, so a long answer does not pay for the short ones beside it.

The loop is ours, not transformers' `generate`, for two reasons: the adapter of a row must follow it when other rows
leave, and a caller who watches the text (a terminal, a server) must be able to stop between any two tokens. The tests
hold its greedy output to that of `generate`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from veneer.core.model import routed
from veneer.data.template import Renderer
from veneer.data.types import Message
from veneer.errors import CheckpointError, DataError
from veneer.infer.sampling import Sampling, generators, pick
from veneer.tasks.cross_entropy import evaluating

__all__ = ["Adapter", "Answer", "CausalDecoder", "Engine", "Piece", "Seq2SeqDecoder", "TextStream", "generate"]

Adapter = str | Mapping[str, float] | None  # what one row is answered with: a name, a weighted sum, or the base
Ids = Sequence[int]


@dataclass(frozen=True)
class Piece:
    """A step of one row: the token, the text it completes (often "", inside a character), why the row ended."""

    row: int
    token: int | None
    text: str
    stopped: str | None = None  # "stop", "length" or "limit" with the last piece of a row


@dataclass
class Answer:
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    stopped: str = ""
    prompt_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.stopped = piece.stopped or self.stopped
        if piece.token is not None:
            self.tokens.append(piece.token)


class TextStream:
    """Turns tokens into text as they come, never cutting a character in two, and watches for stop texts.

    A token may hold half a character or lose its leading space when decoded alone, so each step decodes a short
    window and returns what the window grew by. What might be the beginning of a stop text is held back.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids: list[int] = []
        self.shown, self.read = 0, 0  # ids[shown:read] were decoded last time
        self.held = ""
        self.stopped = False

    def _decode(self, ids: Ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def add(self, token: int) -> str:
        self.ids.append(token)
        before, after = self._decode(self.ids[self.shown : self.read]), self._decode(self.ids[self.shown :])
        if after.endswith("\ufffd"):  # half a character; the next token completes it
            return ""
        self.shown, self.read = self.read, len(self.ids)
        return self._release(after[len(before) :])

    def _release(self, text: str) -> str:
        text = self.held + text
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self.held = True, ""
            return text[: min(ends)]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is still held back when the row ends for another reason."""
        if self.stopped:
            return ""
        rest = self._decode(self.ids[self.shown :])[len(self._decode(self.ids[self.shown : self.read])) :]
        held, self.held, self.shown, self.read = self.held, "", len(self.ids), len(self.ids)
        return held + rest


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


@runtime_checkable
class Decoder(Protocol):
    """A batch in flight: logits of the first token, then of one more token per row, for the rows still wanted."""

    def start(self) -> Float[Tensor, "rows vocab"]: ...
    def step(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]: ...
    def keep(self, rows: Int[Tensor, " kept"]) -> None: ...


def _pad_left(prompts: Sequence[Ids], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class CausalDecoder:
    """Decoder-only models. Padding is on the left, so the newest token of every row is in the last column."""

    def __init__(self, model: nn.Module, prompts: Sequence[Ids], pad: int) -> None:
        self.model = model
        self.ids, self.mask = _pad_left(prompts, pad, _device(model))
        self.cache: Any = None
        self.takes = frozenset(inspect.signature(model.forward).parameters)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        wanted = {"position_ids": positions, "logits_to_keep": 1}
        extra = {name: value for name, value in wanted.items() if name in self.takes}
        out = self.model(input_ids=ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **extra)
        self.cache = out.past_key_values
        return out.logits[:, -1]

    @torch.no_grad()
    def start(self) -> Tensor:
        return self._forward(self.ids, (self.mask.cumsum(-1) - 1).clamp(min=0))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=-1)
        return self._forward(tokens[:, None], self.mask.sum(-1, keepdim=True) - 1)

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]


class Seq2SeqDecoder:
    """Encoder-decoder models: the prompt is read once, the answer grows from the decoder's start token."""

    def __init__(self, model: nn.Module, prompts: Sequence[Ids], pad: int) -> None:
        self.model, self.cache = model, None
        self.ids, self.mask = _pad_left(prompts, pad, _device(model))
        self.encoded: Any = None

    def _forward(self, tokens: Tensor) -> Tensor:
        out = self.model(
            encoder_outputs=self.encoded,
            attention_mask=self.mask,
            decoder_input_ids=tokens[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = out.past_key_values
        return out.logits[:, -1]

    @torch.no_grad()
    def start(self) -> Tensor:
        self.encoded = self.model.get_encoder()(input_ids=self.ids, attention_mask=self.mask)  # type: ignore[operator]
        config: Any = self.model.config
        first = getattr(config, "decoder_start_token_id", None)
        first = config.bos_token_id if first is None else first
        return self._forward(self.ids.new_full((len(self.ids),), first))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        return self._forward(tokens)

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)  # type: ignore[attr-defined]
        self.mask = self.mask[rows]
        self.encoded.last_hidden_state = self.encoded.last_hidden_state[rows]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@dataclass
class _Row:
    """One prompt on its way: `seen` is what the model has read and said."""

    index: int
    seen: list[int]
    text: TextStream
    dice: torch.Generator
    answered: int = 0


class Engine:
    """A model, its tokenizer and the tokens that end an answer."""

    def __init__(self, model: nn.Module, tokenizer: Any, stop_ids: Sequence[int] = ()) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.stop_ids = frozenset(stop_ids)
        config: Any = getattr(model, "config", None)
        self.limit: int | None = getattr(config, "max_position_embeddings", None)
        self.decoder = Seq2SeqDecoder if getattr(config, "is_encoder_decoder", False) else CausalDecoder

    def generate(
        self,
        prompts: Sequence[Ids],
        sampling: Sampling | None = None,
        adapters: Sequence[Adapter] | None = None,
        batch_size: int = 8,
    ) -> list[Answer]:
        """All answers, in the order of the prompts. Rows of like length are batched together, so padding is little."""
        answers = [Answer(prompt_tokens=len(prompt)) for prompt in prompts]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for at in range(0, len(by_length), batch_size):
            rows = by_length[at : at + batch_size]
            batch_adapters = None if adapters is None else [adapters[i] for i in rows]
            start = time.perf_counter()
            for piece in self.stream([prompts[i] for i in rows], sampling, batch_adapters):
                answer = answers[rows[piece.row]]
                answer.add(piece)
                answer.seconds = time.perf_counter() - start
        return answers

    def stream(
        self, prompts: Sequence[Ids], sampling: Sampling | None = None, adapters: Sequence[Adapter] | None = None
    ) -> Iterator[Piece]:
        """The pieces of all rows as they come. `adapters` gives each row its own; None leaves the active one."""
        sampling = sampling or Sampling()
        self._check(prompts, adapters)
        with evaluating(self.model):  # no dropout while answering; training mode comes back afterwards
            yield from self._decode(prompts, sampling, adapters)

    def _check(self, prompts: Sequence[Ids], adapters: Sequence[Adapter] | None) -> None:
        bad = [f"prompt {row} has no tokens" for row, prompt in enumerate(prompts) if not len(prompt)]
        if self.limit and self.decoder is CausalDecoder:
            bad += [
                f"prompt {row} has {len(prompt):,} tokens; the model reads at most {self.limit:,}"
                for row, prompt in enumerate(prompts)
                if len(prompt) >= self.limit
            ]
        if not prompts or bad:
            raise DataError("nothing can be generated from this", "prompts", "shorten or fill them", bad)
        if adapters is not None and len(adapters) != len(prompts):
            raise DataError(f"{len(adapters)} adapters for {len(prompts)} prompts", "adapters", "name one per prompt")

    def _routed(self, adapters: Sequence[Adapter] | None) -> AbstractContextManager[Any]:
        return nullcontext() if adapters is None else routed(self.model, list(adapters))

    def _decode(
        self, prompts: Sequence[Ids], sampling: Sampling, adapters: Sequence[Adapter] | None
    ) -> Iterator[Piece]:
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        batch = self.decoder(self.model, prompts, pad)
        dice = generators(sampling, len(prompts), _device(self.model))
        rows = [_Row(i, list(p), TextStream(self.tokenizer, sampling.stop), dice[i]) for i, p in enumerate(prompts)]
        with self._routed(adapters):
            logits = batch.start()
        if bool(logits.isnan().any()):  # the likeliest of them would be some token, and the answer some nonsense
            fix = "`veneer inspect` finds NaN in an adapter; fp16 overflows where bf16 and fp32 do not"
            raise CheckpointError("the model's logits are not numbers, so it cannot answer", "the model", fix)
        while True:
            tokens = pick(logits, [row.seen for row in rows], sampling, [row.dice for row in rows])
            pieces = [self._advance(row, int(t), sampling) for row, t in zip(rows, tokens, strict=True)]
            yield from pieces
            alive = [i for i, piece in enumerate(pieces) if piece.stopped is None]
            if not alive:
                return
            if len(alive) < len(rows):
                rows, tokens = [rows[i] for i in alive], tokens[alive]
                batch.keep(torch.tensor(alive, device=tokens.device))
            with self._routed(adapters and [adapters[row.index] for row in rows]):
                logits = batch.step(tokens)

    def _advance(self, row: _Row, token: int, sampling: Sampling) -> Piece:
        if token in self.stop_ids:
            return Piece(row.index, None, row.text.flush(), "stop")
        row.seen.append(token)
        row.answered += 1
        text = row.text.add(token)
        stopped = self._why(row, sampling)
        return Piece(row.index, token, text + (row.text.flush() if stopped else ""), stopped)

    def _why(self, row: _Row, sampling: Sampling) -> str | None:
        if row.text.stopped:
            return "stop"
        if row.answered >= sampling.max_tokens:
            return "length"
        full = self.decoder is CausalDecoder and self.limit is not None and len(row.seen) >= self.limit
        return "limit" if full else None


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Message]],
    *,
    adapters: Sequence[Adapter] | None = None,
    template: str | None = None,
    system: str | None = None,
    **sampling: Any,
) -> list[str]:
    """The answers to conversations (lists of messages), or what follows texts (strings), in one line.

    `adapters` names one for each prompt (None: the base); without it the active one answers. `sampling` are the fields
    of `Sampling`; the default is greedy.
    """
    renderer = Renderer(tokenizer, template, system)
    engine = Engine(model, tokenizer, renderer.stop_ids)
    rows = [renderer.prompt_ids(prompt) for prompt in prompts]
    return [answer.text for answer in engine.generate(rows, Sampling(**sampling), adapters)]
