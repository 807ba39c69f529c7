"""Laws of encoding: every sample trains something, nothing is lost unsaid, what is trained is what was asked for."""

from __future__ import annotations

import json

import pytest

from veneer.data.encode import encode
from veneer.data.lengths import Lengths
from veneer.data.preview import preview, runs
from veneer.data.template import Renderer
from veneer.data.types import IGNORE, Chat, Completion, Labelled, Text, Tokens
from veneer.errors import ConfigError, DataError

from .conftest import OWN


def chat(*turns: str, **more) -> Chat:
    roles = ("user", "assistant")
    return Chat(tuple({"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)), **more)


@pytest.fixture
def renderer(tokenizer_of):
    return Renderer(tokenizer_of("bytes", OWN["chatml"]))


def trained(sample, renderer) -> str:
    return renderer.tokenizer.decode([label for label in sample.labels if label != IGNORE])


# What is trained


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("assistant", "one<|im_end|>two<|im_end|>"),
        ("completions", "one<|im_end|>two<|im_end|>"),
        ("last", "two<|im_end|>"),
        ("all", "user\na<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\nb<|im_end|>\n"
                "<|im_start|>assistant\ntwo<|im_end|>\n"),
    ],
)  # fmt: skip
def test_what_the_loss_is_on(loss_on, expected, renderer):
    (sample,) = encode([chat("a", "one", "b", "two")], renderer, loss_on=loss_on).samples
    assert trained(sample, renderer) == expected


def test_the_prompt_of_message_lists_is_context(renderer):
    (sample,) = encode([chat("a", "one", "b", "two", prompt_turns=3)], renderer).samples
    assert trained(sample, renderer) == "two<|im_end|>"


def test_turns_of_weight_zero_are_context(renderer):
    example = chat("a", "one", "b", "two")
    example.messages[3]["weight"] = 0
    (sample,) = encode([example], renderer).samples
    assert trained(sample, renderer) == "one<|im_end|>"


def test_what_follows_the_last_trained_turn_is_left_off(renderer):
    (sample,) = encode([chat("a", "one", "b")], renderer).samples
    assert renderer.tokenizer.decode(sample.input_ids).endswith("one<|im_end|>\n")


def test_an_opening_assistant_turn_is_context(renderer):
    example = Chat(({"role": "assistant", "content": "hello"}, *chat("a", "one").messages))
    (sample,) = encode([example], renderer).samples
    assert trained(sample, renderer) == "one<|im_end|>"
    assert "hello" in renderer.tokenizer.decode(sample.input_ids)


def test_the_loss_of_plain_texts(renderer):
    for loss_on in ("assistant", "completions", "last"):
        text, completion = encode([Text("a text"), Completion("ask ", "told")], renderer, loss_on=loss_on).samples
        assert trained(text, renderer).endswith("text</s>") and trained(completion, renderer).strip() == "told</s>"
    (completion,) = encode([Completion("ask", " told")], renderer, loss_on="all").samples
    assert completion.trained_tokens == len(completion) - 1


def test_rows_without_anything_to_train_are_problems(renderer):
    silent = chat("a", "one", where="f:1")
    silent.messages[1]["weight"] = 0
    opening = Chat(({"role": "assistant", "content": "hello"},), where="f:2")
    with pytest.raises(DataError) as error:
        encode([silent, opening, chat("a", "b"), Tokens((5, 6), (IGNORE, IGNORE), where="f:4")], renderer)
    assert [problem[:3] for problem in error.value.problems] == ["f:1", "f:2", "f:4"]
    assert "no assistant turn to train" in error.value.problems[0]
    assert "3 of 4 rows cannot be trained on" in str(error.value)


def test_tokenised_rows_are_taken_as_they_are(renderer):
    given, labelled = encode([Tokens((5, 6, 7)), Tokens((5, 6, 7), (5, IGNORE, 7))], renderer).samples
    assert list(given.labels) == [IGNORE, 6, 7] and list(labelled.labels) == [IGNORE, IGNORE, 7]
    with pytest.raises(DataError) as error:
        encode([Tokens((5, 99_999), where="f:1")], renderer)
    assert "token id 99999 is outside the vocabulary" in error.value.problems[0]


def test_rows_of_another_task_are_refused(renderer):
    with pytest.raises(DataError) as error:
        encode([Labelled("a", "b", where="f:1")], renderer)
    assert "kind Labelled is not for a causal language model" in error.value.problems[0]


# Too long


LONG = [Text("word " * 5, where="short"), Text("word " * 40, where="long")]


def test_overlong_rows_are_dropped_and_counted(renderer):
    encodings = encode(LONG, renderer, max_len=64)
    assert [sample.where for sample in encodings.samples] == ["short"]
    assert encodings.counts["dropped"] == 1 and encodings.lost_share == 0.5
    assert "1 over 64 tokens dropped (50.0%)" in str(encodings)
    assert encodings.lengths.longest > 64


def test_overlong_rows_are_cut_short(renderer):
    whole = encode(LONG, renderer).samples[1]
    encodings = encode(LONG, renderer, max_len=64, overlong="truncate")
    assert list(encodings.samples[1].input_ids) == list(whole.input_ids[:64])
    assert "the ends of their answers are lost" in str(encodings)
    buried = encode([chat("word " * 40, "answer"), chat("a", "b")], renderer, max_len=64, overlong="truncate")
    assert len(buried) == 1 and buried.counts["left with nothing"] == 1


def test_overlong_rows_are_split_without_loss(renderer):
    whole = encode(LONG, renderer).samples[1]
    pieces = encode(LONG, renderer, max_len=64, overlong="split").samples[1:]
    assert [token for piece in pieces for token in piece.input_ids] == list(whole.input_ids)
    assert all(len(piece) <= 64 and piece.labels[0] == IGNORE for piece in pieces)
    assert sum(piece.trained_tokens for piece in pieces) == whole.trained_tokens - len(pieces) + 1


def test_overlong_rows_can_be_errors(renderer):
    with pytest.raises(DataError) as error:
        encode(LONG, renderer, max_len=64, overlong="error")
    assert error.value.problems[0].startswith("long: ") and "over max_len = 64" in error.value.problems[0]


def test_when_nothing_is_left_it_says_how_long_the_rows_are(renderer):
    with pytest.raises(DataError, match="not one sample is left: all are over 8 tokens \\(median") as error:
        encode(LONG, renderer, max_len=8)
    assert "raise max_len" in str(error.value)


def test_an_unknown_way_with_overlong_rows(renderer):
    with pytest.raises(ConfigError, match="Did you mean 'truncate'"):
        encode(LONG, renderer, max_len=8, overlong="truncat")


# What is said about it


def test_progress_and_facts(renderer):
    seen: list[tuple[int, int]] = []
    encodings = encode([chat("a", "b")] * 1000, renderer, report=lambda done, total: seen.append((done, total)))
    assert seen == [(512, 1000), (1000, 1000)]
    assert encodings.facts()["samples"] == 1000 == len(encodings)
    json.dumps(encodings.facts())
    assert str(encodings).startswith("1,000 rows, 1,000 samples")


def test_samples_stay_in_the_order_of_the_rows(renderer):
    examples = [Tokens((5, n)) if n % 3 else Text(f"text {n}") for n in range(20)]
    for n, example in enumerate(examples):
        object.__setattr__(example, "where", f"f:{n}")
    assert [sample.where for sample in encode(examples, renderer).samples] == [f"f:{n}" for n in range(20)]


def test_the_histogram_counts_everything_once():
    lengths = Lengths([1, 5, 5, 100, 37])
    for bins in (1, 3, 20, 200):
        histogram = lengths.histogram(bins)
        assert sum(count for *_, count in histogram) == 5
        for low, high, count in histogram:
            assert count == sum(low <= length <= high for length in lengths.tokens)
    assert lengths.over(5) == 2
    assert str(Lengths([])) == "median 0, 99 % up to 0, longest 0 tokens"


def test_the_preview_shows_what_is_trained(renderer):
    samples = encode([chat("a", "one", where="f:1"), chat("b", "two")], renderer).samples
    plain = preview(samples, renderer.tokenizer)
    head, shown = plain.split("\n")
    assert head.startswith("f:1: ") and "tokens trained" in head
    assert shown == "<|im_start|>user\u23cea<|im_end|>\u23ce<|im_start|>assistant\u23ce[one<|im_end|>]\u23ce"
    coloured = preview(samples, renderer.tokenizer, colour=True, count=2)
    assert coloured.count("\x1b[1;32m") == 2 and "one<|im_end|>\x1b[0m" in coloured
    assert [run.is_trained for run in runs(samples[0], renderer.tokenizer)] == [False, True, False]


def test_a_long_preview_keeps_every_boundary(renderer):
    (sample,) = encode([chat("word " * 300, "answer " * 300)], renderer).samples
    shown = preview([sample], renderer.tokenizer, width=200)
    assert len(shown) < 400 and "[answer" in shown and "<|im_end|>]" in shown


# The real tokenizer


def test_the_demos_own_model_and_data(real_smollm2, real_shell):
    from transformers import AutoTokenizer

    from veneer.data.dataset import load

    renderer = Renderer(AutoTokenizer.from_pretrained(real_smollm2))
    dataset = load(real_shell[0])
    encodings = encode(dataset.examples, renderer, max_len=512)
    assert encodings.counts["bad"] == 0 and len(encodings) == len(dataset)
    for sample, example in zip(encodings.samples, dataset, strict=True):
        answer = example.messages[-1]["content"]
        assert trained(sample, renderer) == f"{answer}<|im_end|>"
        ids = list(sample.input_ids)
        prompt = renderer.prompt_ids(example.messages[:-1])
        assert ids[: len(prompt)] == prompt
        assert sample.labels[len(prompt)] != IGNORE == sample.labels[len(prompt) - 1]
