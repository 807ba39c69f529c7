"""The engine against transformers' own `generate`, a batch against its rows, and text against its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from veneer.core.model import activate, attach, parameters
from veneer.core.spec import LoRA
from veneer.errors import CheckpointError, DataError
from veneer.infer.engine import Engine, TextStream
from veneer.infer.sampling import Sampling

PROMPTS = [[10, 11, 12], [40, 41, 42, 43, 44, 45, 46], [99], [200, 201, 202, 203]]


def adapted(model: PreTrainedModel, *names: str) -> PreTrainedModel:
    """With adapters that really change the answers."""
    for i, name in enumerate(names):
        attach(model, LoRA(rank=4, alpha=8), name)
        dice = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in parameters(model, name).values():
                p.copy_(torch.randn(p.shape, generator=dice) * 0.3)
    return model


def reference(model: PreTrainedModel, prompt: list[int], **kwargs: Any) -> list[int]:
    """What transformers generates, without the prompt (or the decoder's start token)."""
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, **kwargs
    )[0]
    return out[1:].tolist() if model.config.is_encoder_decoder else out[len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "t5"])
def test_greedy_equals_transformers(kind: str, make_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any) -> None:
    model = adapted(make_model(kind), "default")
    engine = Engine(model, tiny_tokenizer)
    answers = engine.generate(PROMPTS, Sampling(max_tokens=12))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.tokens == reference(model, prompt), kind
        assert answer.stopped == "length" and answer.prompt_tokens == len(prompt)


def test_what_is_no_number_is_not_answered_with(tiny_llama: PreTrainedModel, tiny_tokenizer: Any) -> None:
    tiny_llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="are not numbers"):
        Engine(tiny_llama, tiny_tokenizer).generate(PROMPTS)


def test_repetition_penalty_equals_transformers(tiny_llama: PreTrainedModel, tiny_tokenizer: Any) -> None:
    answer = Engine(tiny_llama, tiny_tokenizer).generate([PROMPTS[1]], Sampling(max_tokens=12, repetition_penalty=1.4))
    assert answer[0].tokens == reference(tiny_llama, PROMPTS[1], repetition_penalty=1.4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_with_their_own_adapters_answer_as_if_alone(
    temperature: float, tiny_llama: PreTrainedModel, tiny_tokenizer: Any
) -> None:
    model = adapted(tiny_llama, "a", "b")
    engine, sampling = Engine(model, tiny_tokenizer), Sampling(max_tokens=10, temperature=temperature, seed=5)
    rows = ["a", None, {"a": 0.5, "b": 0.5}, "b"]
    together = engine.generate(PROMPTS, sampling, rows)
    for prompt, adapter, answer in zip(PROMPTS, rows, together, strict=True):
        activate(model, adapter)
        assert engine.generate([prompt], sampling)[0].tokens == answer.tokens
    if temperature == 0:
        assert len({tuple(answer.tokens[:4]) for answer in engine.generate([PROMPTS[0]] * 4, sampling, rows)}) == 4


def test_a_row_that_ends_leaves_the_others_alone(tiny_llama: PreTrainedModel, tiny_tokenizer: Any) -> None:
    model = adapted(tiny_llama, "a", "b")
    full = Engine(model, tiny_tokenizer).generate(PROMPTS, Sampling(max_tokens=12), ["a", "b", "a", None])
    stop = full[1].tokens[3]  # ends row 1 after three tokens, and others wherever they say it
    engine = Engine(model, tiny_tokenizer, [stop])
    for short, long in zip(engine.generate(PROMPTS, Sampling(max_tokens=12), ["a", "b", "a", None]), full, strict=True):
        cut = long.tokens.index(stop) if stop in long.tokens else len(long.tokens)
        assert short.tokens == long.tokens[:cut]
        assert short.stopped == ("stop" if stop in long.tokens else "length")


def test_batches_come_back_in_the_order_asked(tiny_llama: PreTrainedModel, tiny_tokenizer: Any) -> None:
    engine = Engine(tiny_llama, tiny_tokenizer)
    one, many = (engine.generate(PROMPTS, Sampling(max_tokens=5), batch_size=n) for n in (1, 3))
    assert [a.tokens for a in one] == [a.tokens for a in many]


def test_streamed_text_is_the_decoded_answer(tiny_llama: PreTrainedModel, tiny_tokenizer: Any) -> None:
    engine = Engine(tiny_llama, tiny_tokenizer)
    pieces = list(engine.stream([PROMPTS[0]], Sampling(max_tokens=30, temperature=2.0)))
    tokens = [p.token for p in pieces if p.token is not None]
    text = tiny_tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(p.text for p in pieces) == text
    assert [p.stopped for p in pieces[:-1]] == [None] * (len(pieces) - 1) and pieces[-1].stopped == "length"


def test_a_caller_may_stop_in_the_middle_and_training_mode_returns(
    tiny_llama: PreTrainedModel, tiny_tokenizer: Any
) -> None:
    tiny_llama.train()
    stream = Engine(tiny_llama, tiny_tokenizer).stream([PROMPTS[0]], Sampling(max_tokens=30))
    next(stream)
    assert not tiny_llama.training and torch.is_grad_enabled()
    stream.close()
    assert tiny_llama.training


def test_the_models_length_ends_an_answer(make_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any) -> None:
    engine = Engine(make_model("gpt2", n_positions=8), tiny_tokenizer)
    assert (answer := engine.generate([[5, 6, 7]], Sampling(max_tokens=50))[0]).stopped == "limit"
    assert len(answer.tokens) == 5
    with pytest.raises(DataError, match="prompt 1 has 9 tokens; the model reads at most 8"):
        engine.generate([[5], [1] * 9])


def test_what_cannot_be_answered_is_refused(tiny_llama: PreTrainedModel, tiny_tokenizer: Any) -> None:
    engine = Engine(tiny_llama, tiny_tokenizer)
    with pytest.raises(DataError, match="prompt 0 has no tokens"):
        engine.generate([[]])
    with pytest.raises(DataError, match="1 adapters for 2 prompts"):
        list(engine.stream([[1], [2]], adapters=["a"]))


@pytest.mark.parametrize(
    "text", ["na\u00efve caf\u00e9 \u2615 \U0001f600!", "plain words", " leading space", "\u4f60\u597d"]
)
def test_no_character_is_cut_in_two(text: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tiny_tokenizer)
    pieces = [stream.add(token) for token in tiny_tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "".join([*pieces, stream.flush()]) == text
    assert "\ufffd" not in "".join(pieces)


def test_a_stop_text_ends_the_answer_and_is_not_shown(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def said(text: str, *stop: str) -> tuple[str, bool]:
        stream = TextStream(tiny_tokenizer, stop)
        shown = ""
        for token in tiny_tokenizer(text, add_special_tokens=False)["input_ids"]:
            shown += stream.add(token)
            assert not any(s in shown for s in stop)
            if stream.stopped:
                break
        return shown + stream.flush(), stream.stopped

    assert said("one two\n\nUser: three", "\nUser:") == ("one two\n", True)
    assert said("one two\nUse it", "\nUser:") == ("one two\nUse it", False)
    assert said("ends with \nUse", "\nUser:") == ("ends with \nUse", False)


def test_generate_in_one_line(tiny_llama: PreTrainedModel, tiny_tokenizer: Any) -> None:
    from veneer.infer import Engine as lazily
    from veneer.infer import generate

    assert lazily is Engine
    model = adapted(tiny_llama, "a")
    conversation = [{"role": "user", "content": "hello"}]
    one, other, text = generate(
        model, tiny_tokenizer, [conversation, conversation, "once"], adapters=["a", None, "a"], max_tokens=6
    )
    assert one != other and text != one
    activate(model, None)
    assert generate(model, tiny_tokenizer, [conversation], max_tokens=6) == [other]
