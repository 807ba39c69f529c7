"""A conversation in any common spelling becomes messages in the one form that chat templates read.

| spelling | becomes |
| --- | --- |
| {from: human, value}, {role: user, content} | {role: user, content} |
| from: gpt, bot, model, chatgpt | role: assistant |
| from: function_call with a JSON value; function_call: {...}; tool_calls: [{name, arguments}] | tool_calls: [...] |
| from: observation, function, ipython | role: tool |
| content: [{type: text, text}, ...] | content: the texts joined |

Arguments of tool calls become objects: templates write them with `tojson`, and a string would be quoted twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.core.registry import near
from veneer.data.types import Message

__all__ = ["RowError", "conversation", "json_list", "kind_of", "tool_list", "turn"]

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "model", "chatgpt", "bard", "function_call"),
    "tool": ("tool", "function", "observation", "ipython", "function_response", "tool_response"),
}
ROLE_OF = {alias: role for role, aliases in ROLES.items() for alias in aliases}
KEPT = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking", "weight")  # passed on to the template


class RowError(ValueError):
    """What is wrong with one row; the reader of the rows knows where it stands."""


def conversation(value: Any, field: str) -> tuple[Message, ...]:
    """The messages of a list of turns (or of its JSON, as a cell of a table holds it)."""
    turns = json_list(value, field)
    if not turns:
        raise RowError(f"field {field!r} has no turns")
    return tuple(turn(item, f"{field}[{number}]") for number, item in enumerate(turns))


def turn(value: Any, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise RowError(f"{place} is {kind_of(value)}; a turn is an object with role and content")
    spoken = _first(value, "role", "from")
    role = _role(spoken, place)
    message = Message(role=role, content="")
    calls = _tool_calls(value, spoken, place)
    if calls:
        message["tool_calls"] = calls
    if not (calls and spoken == "function_call"):
        message["content"] = _content(_first(value, "content", "value"), role, bool(calls), place)
    for key in KEPT:
        if value.get(key) is not None:
            message[key] = value[key]  # type: ignore[literal-required]
    return message


def _first(value: Mapping[str, Any], *keys: str) -> Any:
    return next((value[key] for key in keys if value.get(key) is not None), None)


def _role(spoken: Any, place: str) -> str:
    if spoken is None:
        raise RowError(f"{place} has no role ('role' or 'from')")
    if not isinstance(spoken, str) or spoken.strip().lower() not in ROLE_OF:
        hint = near(str(spoken).lower(), ROLE_OF)
        raise RowError(f"{place} has the unknown role {spoken!r}.{hint} Known: {', '.join(ROLES)}")
    return ROLE_OF[spoken.strip().lower()]


def _content(content: Any, role: str, has_calls: bool, place: str) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(part, place) for part in content)
    if content is None and has_calls:
        return ""
    if not isinstance(content, str):
        raise RowError(f"{place}: content is {kind_of(content)}; text is expected")
    if not content.strip() and not has_calls and role in ("user", "assistant"):
        raise RowError(f"{place}: the {role} turn is empty")
    return content


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
    raise RowError(f"{place}: a part of the content is of type {kind!r}; only text can be trained on")


# Tools


def tool_list(value: Any, field: str) -> tuple[dict[str, Any], ...]:
    """The tools a conversation may call: JSON schemas of functions, as OpenAI's API takes them."""
    tools = json_list(value, field) if value is not None and value != "" else []
    for number, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise RowError(f"{field}[{number}] is {kind_of(tool)}; a tool is an object (a function's schema)")
    return tuple(_without_nulls(tool) for tool in tools)


def _without_nulls(value: Any) -> Any:
    """Arrow fills every key that any row has with null; a schema must show the keys it was written with."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _tool_calls(value: Mapping[str, Any], spoken: str, place: str) -> list[dict[str, Any]]:
    if spoken == "function_call":
        calls = _parsed(_first(value, "value", "content"), f"{place}: the function call")
    else:
        calls = _parsed(_first(value, "tool_calls", "function_call"), f"{place}: tool_calls")
    calls = [calls] if isinstance(calls, Mapping) else calls or []
    if not isinstance(calls, list):
        raise RowError(f"{place}: tool_calls is {kind_of(calls)}; a list is expected")
    return [_tool_call(call, place) for call in calls]


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"{place}: a tool call needs the name of its function")
    arguments = _parsed(function.get("arguments", {}), f"{place}: the arguments of {function['name']}")
    clean = {"type": "function", "function": {"name": function["name"], "arguments": _without_nulls(arguments)}}
    return clean | ({"id": call["id"]} if call.get("id") else {})


def _parsed(value: Any, place: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError(f"{place} is not JSON: {error}") from None


# Values


def json_list(value: Any, field: str) -> list[Any]:
    """A list, or the JSON of one."""
    if isinstance(value, str):
        value = _parsed(value, f"field {field!r}")
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return list(value)
    if to_list := getattr(value, "tolist", None):  # numpy and torch
        return to_list()
    raise RowError(f"field {field!r} is {kind_of(value)}; a list is expected")


def kind_of(value: Any) -> str:
    """What a value is, in the words of somebody who looks at a JSON file.

    >>> kind_of(3.5), kind_of(None), kind_of(float("nan"))
    ('a number (3.5)', 'missing', 'NaN')
    """
    if value is None:
        return "missing"
    if isinstance(value, bool):
        return f"a truth value ({str(value).lower()})"
    if isinstance(value, int | float):
        return "NaN" if math.isnan(value) else f"a number ({value})"
    names = {str: "text", list: "a list", tuple: "a list", dict: "an object", bytes: "binary data"}
    return names.get(type(value), f"a {type(value).__name__}")
