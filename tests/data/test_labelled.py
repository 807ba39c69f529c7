"""Laws of rows with labels: special tokens once, tags at first pieces, targets that end, nothing lost unsaid."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from veneer.data.labelled import encode_labelled, encode_pairs, encode_tagged
from veneer.data.labels import labels_of
from veneer.data.types import IGNORE, Completion, Labelled, Pair, Tagged
from veneer.errors import ConfigError, DataError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "new", "york", "is", "big", "##ger", "good", "bad", "a"]


@pytest.fixture
def bert() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordPiece({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, **names)


TEXTS = [
    Labelled("good", "pos", where="f:1"),
    Labelled("bad bad", "neg", where="f:2"),
    Labelled("a", "pos", where="f:3"),
]


def test_texts_have_special_tokens_once_and_a_class(bert):
    encodings = encode_labelled(TEXTS, bert, labels_of(TEXTS))
    assert [list(sample.input_ids) for sample in encodings.samples] == [[2, 9, 3], [2, 10, 10, 3], [2, 11, 3]]
    assert [sample.labels for sample in encodings.samples] == [[1], [0], [1]]
    assert {sample.layout for sample in encodings.samples} == {"row"}
    assert encodings.trained_tokens == 3


def test_pairs_of_texts_know_which_is_which(bert):
    rows = [Labelled("a", 0, "big"), Labelled("a a", 1, "big")]
    first, _ = encode_labelled(rows, bert, labels_of(rows)).samples
    assert list(first.input_ids) == [2, 11, 3, 7, 3]


def test_several_labels_and_numbers(bert):
    several = [Labelled("a", ["x", "y"]), Labelled("a", [])]
    assert [s.labels for s in encode_labelled(several, bert, labels_of(several)).samples] == [[1.0, 1.0], [0.0, 0.0]]
    numbers = [Labelled("a", 0.5), Labelled("a", "2")]
    assert [s.labels for s in encode_labelled(numbers, bert, labels_of(numbers)).samples] == [[0.5], [2.0]]


def test_labels_that_training_never_saw_are_problems(bert):
    with pytest.raises(DataError) as error:
        encode_labelled([Labelled("a", "poss", where="f:9")], bert, labels_of(TEXTS))
    assert error.value.problems == ["f:9: the label 'poss' is not among the training labels. Did you mean 'pos'?"]
    kept = encode_labelled([Labelled("a", "poss"), *TEXTS], bert, labels_of(TEXTS), skip_bad=True)
    assert len(kept) == 3 and kept.counts["bad"] == 1


def test_a_tag_sits_on_the_first_piece_of_its_word(bert):
    rows = [Tagged(("new", "york", "is", "bigger"), ("B-LOC", "I-LOC", "O", "O"))]
    (sample,) = encode_tagged(rows, bert, labels_of(rows)).samples
    assert list(sample.input_ids) == [2, 4, 5, 6, 7, 8, 3]
    names = labels_of(rows).names
    assert [names[tag] if tag != IGNORE else None for tag in sample.labels] == [
        None, "B-LOC", "I-LOC", "O", "O", None, None,
    ]  # fmt: skip
    assert sample.trained_tokens == 4


def test_words_that_give_no_token_are_said(bert):
    rows = [Tagged(("a",), ("O",)), Tagged((" ",), ("X",), where="f:2")]
    with pytest.raises(DataError, match="none of its 1 words gave a token"):
        encode_tagged(rows, bert, labels_of(rows))


def test_byte_level_tokenizers_take_words_too(tokenizer_of):
    tokenizer = tokenizer_of("bytes")
    rows = [Tagged(("quick", "brown", "foxes"), ("A", "B", "A"))]
    (sample,) = encode_tagged(rows, tokenizer, labels_of(rows)).samples
    assert sample.trained_tokens == 3


def test_targets_end_in_eos_once(tokenizer_of):
    tokenizer = tokenizer_of("bytes with BOS")
    for example in (Pair("question", "answer"), Completion("question", "answer")):
        (sample,) = encode_pairs([example], tokenizer).samples
        assert sample.layout == "target"
        assert list(sample.labels) == [*tokenizer("answer")["input_ids"], tokenizer.eos_token_id]
        assert list(sample.input_ids) == tokenizer("question")["input_ids"]


def test_too_long_rows(bert):
    long = [*TEXTS, Labelled("a " * 40, "pos", where="f:4")]
    dropped = encode_labelled(long, bert, labels_of(TEXTS))
    assert len(dropped) == 3 and "1 over 32 tokens dropped" in str(dropped)
    cut = encode_labelled(long, bert, labels_of(TEXTS), max_len=10, overlong="truncate")
    assert len(cut.samples[3]) == 10 and cut.samples[3].input_ids[-1] == 3 and cut.counts["truncated"] == 1
    with pytest.raises(DataError) as error:
        encode_labelled(long, bert, labels_of(TEXTS), overlong="error")
    assert error.value.problems == ["f:4: 42 tokens, over max_len = 32"]
    with pytest.raises(ConfigError, match="overlong=split does not work"):
        encode_labelled(long, bert, labels_of(TEXTS), overlong="split")


def test_progress_is_told(bert):
    seen = []
    encode_labelled(TEXTS, bert, labels_of(TEXTS), report=lambda *at: seen.append(at))
    assert seen == [(3, 3)]
