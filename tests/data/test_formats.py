"""Each format in every spelling, and each way in which a row can be wrong, with the sentence that says so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from veneer.data.dataset import load
from veneer.data.formats import FORMATS
from veneer.data.types import Chat, Completion, Labelled, Pair, Tagged, Text, Tokens
from veneer.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
SYSTEM = {"role": "system", "content": "be kind"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}

READ = {
    "messages": ({"messages": [SYSTEM, USER, ASSISTANT]}, Chat((SYSTEM, USER, ASSISTANT))),
    "messages in a cell": ({"messages": json.dumps([USER, ASSISTANT])}, Chat((USER, ASSISTANT))),
    "messages with nulls": (
        {"messages": [{"role": "user", "content": "hi", "name": None, "tool_calls": None}, ASSISTANT], "tools": None},
        Chat((USER, ASSISTANT)),
    ),
    "messages with parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                ASSISTANT,
            ]
        },
        Chat((USER, ASSISTANT)),
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "be kind"}, USER, ASSISTANT]},
        Chat((SYSTEM, USER, ASSISTANT)),
    ),
    "tool calls": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}],
                },
                {"role": "tool", "content": "7", "tool_call_id": "1"},
                ASSISTANT,
            ],
            "tools": json.dumps([TOOL]),
        },
        Chat(
            (
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "1"}]},
                {"role": "tool", "content": "7", "tool_call_id": "1"},
                ASSISTANT,
            ),
            (TOOL,),
        ),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "system": "be kind"},
        Chat((SYSTEM, USER, ASSISTANT)),
    ),
    "sharegpt calls": (
        {
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "7"},
                {"from": "gpt", "value": "ho"},
            ]
        },
        Chat(
            (
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "7"},
                ASSISTANT,
            )
        ),
    ),
    "alpaca": ({"instruction": "hi", "input": "", "output": "ho"}, Chat((USER, ASSISTANT))),
    "alpaca whole": (
        {"instruction": "add", "input": "1 2", "output": "3", "system": "be kind", "history": [["hi", "ho"]]},
        Chat((SYSTEM, USER, ASSISTANT, {"role": "user", "content": "add\n1 2"}, {"role": "assistant", "content": "3"})),
    ),
    "dolly": ({"instruction": "hi", "context": "", "response": "ho"}, Chat((USER, ASSISTANT))),
    "prompt and completion": ({"prompt": "2+2=", "completion": "4"}, Completion("2+2=", "4")),
    "question and answer": ({"question": "2+2?", "answer": "4"}, Completion("2+2?", "4")),
    "prompt and completion as messages": (
        {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]},
        Chat((SYSTEM, USER, ASSISTANT), prompt_turns=2),
    ),
    "text": ({"text": "once"}, Text("once")),
    "tokenised": ({"input_ids": [1, 2]}, Tokens((1, 2))),
    "tokenised with labels": (
        {"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]},
        Tokens((1, 2), (-100, 2)),
    ),
    "labelled": ({"text": "good", "label": "pos"}, Labelled("good", "pos")),
    "labelled pair": ({"premise": "a", "hypothesis": "b", "label": 2}, Labelled("a", 2, "b")),
    "labelled with several": ({"text": "good", "labels": ["a", "b"]}, Labelled("good", ["a", "b"])),
    "tagged": ({"tokens": ["A", "b"], "ner_tags": ["B-X", "O"]}, Tagged(("A", "b"), ("B-X", "O"))),
    "tagged in a cell": ({"tokens": "A b", "tags": "B-X O"}, Tagged(("A", "b"), ("B-X", "O"))),
    "pair": ({"source": "cat", "target": "chat"}, Pair("cat", "chat")),
}


@pytest.mark.parametrize("name", READ)
def test_every_spelling_is_read(name):
    row, expected = READ[name]
    (example,) = load([row])
    assert vars(example) == vars(expected) | {"where": "row 1"}


@pytest.mark.parametrize("name", READ)
def test_nothing_of_a_row_depends_on_its_place(name):
    row, _ = READ[name]
    first, second = load([row, row])
    assert first.id == second.id and first.where != second.where


WRONG = {
    "empty": ({"prompt": "x", "completion": " "}, "field 'completion' is empty"),
    "missing": ({"prompt": "x", "other": 1}, "field 'completion' is missing (there is: prompt, other)"),
    "null": ({"prompt": "x", "completion": None}, "field 'completion' is missing; text is expected"),
    "NaN": ({"prompt": "x", "completion": float("nan")}, "field 'completion' is NaN; text is expected"),
    "number": ({"prompt": "x", "completion": 42}, "field 'completion' is a number (42); text is expected"),
    "bool": ({"prompt": "x", "completion": True}, "field 'completion' is a truth value (true); text is expected"),
    "object": ({"prompt": {}, "completion": "x"}, "field 'prompt' is an object; text is expected"),
}
CHATS = {
    "no turns": ([], "field 'messages' has no turns"),
    "no answer": ([USER], "no assistant turn, so there is nothing to learn"),
    "empty answer": ([USER, {"role": "assistant", "content": " "}], "messages[1]: the assistant turn is empty"),
    "no content": ([USER, {"role": "assistant"}], "messages[1]: content is missing; text is expected"),
    "unknown role": (
        [{"role": "usr", "content": "x"}],
        "messages[0] has the unknown role 'usr'. Did you mean 'user'? Known: system, user, assistant, tool",
    ),
    "no role": ([{"content": "x"}], "messages[0] has no role ('role' or 'from')"),
    "a text": (["hi"], "messages[0] is text; a turn is an object with role and content"),
    "an image": (
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
        "messages[0]: a part of the content is of type 'image'; only text can be trained on",
    ),
    "bad arguments": (
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}],
        "messages[0]: the arguments of f is not JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
    ),
    "a nameless call": (
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}],
        "messages[0]: a tool call needs the name of its function",
    ),
    "not a list": ("hello", "field 'messages' is not JSON: Expecting value: line 1 column 1 (char 0)"),
    "a number": (3, "field 'messages' is a number (3); a list is expected"),
}
OTHERS = {
    "labels of another length": ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids but 1 labels"),
    "ids that are none": ({"input_ids": [1, 2.5]}, "field 'input_ids' holds a number (2.5); token ids are integers"),
    "no ids": ({"input_ids": []}, "field 'input_ids' is empty"),
    "tags of another length": ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens but 1 tags"),
    "mixed tags": (
        {"tokens": ["a", "b"], "tags": ["O", 1]},
        "field 'tags' mixes kinds; all tags are texts, or all are integers",
    ),
    "an empty label": ({"text": "x", "label": ""}, "field 'label' is empty"),
    "a label that is an object": (
        {"text": "x", "label": {}},
        "field 'label' is an object; a class, a number or a list is expected",
    ),
    "an empty text": ({"text": ""}, "field 'text' is empty"),
    "system twice": (
        {"messages": [SYSTEM, USER, ASSISTANT], "system": "x"},
        "the system prompt is given twice: as a field and as the first turn",
    ),
}
GOOD = {"prompt/completion": {"prompt": "p", "completion": "c"}, "messages": {"messages": [USER, ASSISTANT]}}


def problem_of(row: dict[str, object], good: dict[str, object] | None = None) -> str:
    with pytest.raises(DataError) as error:
        load([row] + [good] * 3 if good else [row])
    (problem,) = error.value.problems
    assert problem.startswith("row 1: ")
    return problem.removeprefix("row 1: ")


@pytest.mark.parametrize("name", WRONG)
def test_wrong_texts_are_said(name):
    row, sentence = WRONG[name]
    assert problem_of(row, GOOD["prompt/completion"]) == sentence


@pytest.mark.parametrize("name", CHATS)
def test_wrong_conversations_are_said(name):
    turns, sentence = CHATS[name]
    assert problem_of({"messages": turns}, GOOD["messages"]) == sentence


@pytest.mark.parametrize("name", OTHERS)
def test_other_wrong_rows_are_said(name):
    row, sentence = OTHERS[name]
    assert problem_of(row) == sentence


def test_detection_is_by_half_of_the_rows_and_then_all_are_held_to_it():
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "c", "label": None}]
    with pytest.raises(DataError, match="field 'label' is missing"):
        load(rows)
    assert load(rows, skip_bad=True).format == "labelled"


def test_a_task_decides_between_two_readings():
    assert load([{"text": "a", "label": "x"}], kinds=(Text, Chat)).format == "text"
    assert vars(load([{"prompt": "a", "completion": "b"}], kinds=(Pair,)).examples[0])["target"] == "b"
    with pytest.raises(DataError, match="no known format has the columns prompt, completion"):
        load([{"prompt": "a", "completion": "b"}], kinds=(Labelled,))


def test_columns_can_be_mapped_and_complaints_use_the_names_of_the_file():
    columns = {"prompt": "Frage", "completion": "Antwort"}
    assert load([{"Frage": "a", "Antwort": "b"}], columns=columns).examples[0] == Completion("a", "b", where="row 1")
    with pytest.raises(DataError, match="field 'Antwort' is empty"):
        load([{"Frage": "a", "Antwort": ""}], columns=columns)
    with pytest.raises(DataError, match=r"the mapped column 'Antwort' is not there\. Did you mean 'Antwrt'\?"):
        load([{"Frage": "a", "Antwrt": "b"}], columns=columns)


def test_unknown_columns_are_answered_with_what_is_near():
    with pytest.raises(DataError, match=r"column 'instructoin' is not known\. Did you mean 'instruction'\?") as error:
        load([{"instructoin": "a", "out": "b"}])
    assert "alpaca {instruction, output, input?, system?, history?}" in str(error.value)


def test_preference_rows_are_recognised_and_refused():
    with pytest.raises(DataError, match="preference training"):
        load([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match="KTO"):
        load([{"prompt": "a", "completion": "b", "label": True}])
    mapped = load(
        [{"prompt": "a", "chosen": "b", "rejected": "c"}], format="prompt/completion", columns={"completion": "chosen"}
    )
    assert mapped.examples[0] == Completion("a", "b", where="row 1")
    assert mapped.unused == ("rejected",)


def test_an_unknown_format_is_answered():
    with pytest.raises(ValueError, match="Did you mean 'alpaca'"):
        load([{"text": "a"}], format="alpacca")


def test_every_format_says_its_fields():
    assert all(form.fields for form in FORMATS.values())


def test_columns_that_hold_nothing_anywhere_are_said_row_by_row():
    rows = [{"prompt": "a", "completion": float("nan")}, {"prompt": None, "completion": "x"}]
    with pytest.raises(DataError) as error:
        load(rows)
    assert [problem.split(": ", 1)[1] for problem in error.value.problems] == [
        "field 'completion' is NaN; text is expected",
        "field 'prompt' is missing; text is expected",
    ]


PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


@pytest.mark.parametrize("name, rows", re.findall(r"```jsonl ([^\n]+)\n(.*?)```", PAGE, re.DOTALL))
def test_the_rows_in_the_manual_are_what_it_says(name, rows, tmp_path):
    (tmp_path / "rows.jsonl").write_text(rows)
    assert load(tmp_path / "rows.jsonl").format == name


def test_the_manual_has_every_format():
    told = re.findall(r"```jsonl ([^\n]+)\n", PAGE)
    undetected = {"illustrated parts"}  # the task says so: such rows look like those of words alone
    assert set(told) == {name for name in FORMATS if "preference" not in name} - undetected
