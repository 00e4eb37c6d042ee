"""How models write calls of tools: found in their texts, and as what a text has to be where a call is asked for.

Knows the ways of writing of three families of models; it must not know templates' engines, tokens or requests. Which
way a model has is seen in its chat template, for that is where it was taught.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

_TAGGED, _TAGGED_END = "<tool_call>", "</tool_call>"
_MISTRAL = "[TOOL_CALLS]"
_NAMED = re.compile(r"\s*([\w-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")
_PYTHON = "<|python_tag|>"


@dataclass(frozen=True, slots=True)
class Call:
    """A call as a model wrote it."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Style:
    """A family's way of writing calls."""

    name: str
    find: Callable[[str, bool], tuple[str, list[Call], str]]  # in a text that ended by itself or not: what stands
    # before the calls, the calls, what stands behind; ValueError where any is bad
    arguments: str  # what it calls the arguments
    first: str = ""  # what stands before all calls
    begin: str = ""  # before each
    end: str = ""
    between: str = ""  # two of them; nothing where a text has but one
    last: str = ""


def style_of(template: str) -> Style | None:
    """The style that a chat template teaches; None for one that shows no tools."""
    if "tools" not in template:
        return None
    return next((style for mark, style in _MARKS.items() if mark in template), None)


def read_calls(
    style: Style, text: str, names: Collection[str], ended: bool = True, ends: Collection[str] = ()
) -> tuple[str, list[Call]]:
    """What stands before the calls of a text, and the calls; the whole text and none where it is not made of calls of
    these tools, as JSON. `ended` by itself it may lack the last closing mark; behind the calls may stand what is
    among `ends`, and nothing else.
    """
    try:
        before, calls, rest = style.find(text, ended)
    except (ValueError, RecursionError):
        return text, []
    for end in ends:
        rest = rest.replace(end, "")
    if not calls or rest.strip() or any(call.name not in names for call in calls):
        return text, []
    return before.strip(), calls


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _number(word: str) -> float:
    return number if math.isfinite(number := float(word)) else _no_number(word)


_json = json.JSONDecoder(parse_float=_number, parse_constant=_no_number)


def _value(text: str) -> tuple[Any, str]:
    """The JSON that a text begins with, and what stands behind it: marks inside of its strings are none."""
    text = text.lstrip()
    value, end = _json.raw_decode(text)
    return value, text[end:].lstrip()


def _call(value: Any) -> Call:
    """From the JSON of a call. ValueError for anything else."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("not a call")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json.decode(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("no arguments")
    json.dumps(arguments, ensure_ascii=False).encode()  # half of a pair of surrogates is no text: a ValueError
    return Call(value["name"], arguments)


def _tagged(text: str, ended: bool) -> tuple[str, list[Call], str]:
    """Objects between marks. Words between two calls are kept with those before the first."""
    before, mark, rest = text.partition(_TAGGED)
    words, calls = [before.strip()], list[Call]()
    while mark:
        value, rest = _value(rest)
        calls.append(_call(value))
        closed = rest.startswith(_TAGGED_END)
        if not closed and not ended:
            raise ValueError("the call is cut off")
        rest = rest.removeprefix(_TAGGED_END)
        between, mark, behind = rest.partition(_TAGGED)
        if mark:
            if not closed:
                raise ValueError("a call inside another")
            words.append(between.strip())
            rest = behind
    return "\n".join(filter(None, words)), calls, rest


def _bare(text: str, ended: bool) -> tuple[str, list[Call], str]:
    """Objects one after the other, semicolons between them, and nothing before."""
    rest, calls = text.strip().removeprefix(_PYTHON).strip(), list[Call]()
    while rest.startswith("{"):
        value, rest = _value(rest)
        calls.append(_call(value))
        rest = rest.removeprefix(";").lstrip()
    return "", calls, rest


def _listed(text: str, ended: bool) -> tuple[str, list[Call], str]:
    """A list behind a mark, or behind the mark names with their arguments; a text that is a list needs no mark."""
    if (found := _list_of_calls(text)) is not None:
        return "", *found
    before, mark, rest = text.partition(_MISTRAL)
    if (found := _list_of_calls(rest)) is not None:
        return before, *found
    calls = list[Call]()
    while mark and (name := _NAMED.match(rest)):
        value, rest = _value(rest[name.end() :])
        calls.append(_call({"name": name[1], "arguments": value}))
        rest = rest.removeprefix(_MISTRAL)
    return before, calls, rest


def _list_of_calls(text: str) -> tuple[list[Call], str] | None:
    """The list that a text begins with, and what stands behind it; None where it begins with words, in brackets
    perhaps."""
    try:
        values, rest = _value(text)
    except ValueError:
        return None
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        return None
    return [_call(value) for value in values], rest


HERMES = Style("hermes", _tagged, "arguments", begin=f"{_TAGGED}\n", end=f"\n{_TAGGED_END}", between="\n")
LLAMA = Style("llama", _bare, "parameters")
MISTRAL = Style("mistral", _listed, "arguments", first="[", between=", ", last="]")

_MARKS = {_TAGGED: HERMES, _MISTRAL: MISTRAL, _PYTHON: LLAMA, '"parameters": dictionary': LLAMA}
"""What only the templates of one family say."""


# -- what a text has to be ----------------------------------------------------------------------------


def calls_text(style: Style, functions: Sequence[tuple[str, Mapping[str, Any]]], several: bool) -> str:
    """What says that a text is a call of one of these functions, by name and JSON schema of its arguments; or several
    calls, where the style has a way to write them."""
    kinds = []
    schemas: dict[str, Any] = {}
    for number, (name, parameters) in enumerate(functions):
        place = f"f{number}"
        # Under a name of its own its references mean what they meant where it stood alone.
        schemas[place] = {**{k: v for k, v in parameters.items() if k != "$schema"}, "$id": f"shoal://{place}/"}
        properties = {"name": {"const": name}, style.arguments: {"$ref": f"#/$defs/{place}"}}
        kinds.append(
            {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        )
    schema = {**(kinds[0] if len(kinds) == 1 else {"anyOf": kinds}), "$defs": schemas}
    signs = {name: getattr(style, name) for name in ("first", "begin", "end", "last")}
    between = style.between if several else ""
    return msgspec.json.encode({"schema": schema, **signs, "between": between}).decode()


def calls_lark(text: str, guidance: Mapping[str, Any]) -> str:
    """The library's grammar of it; `guidance` says how it is to read the schema."""
    asked = json.loads(text)
    body = json.dumps({**asked["schema"], "x-guidance": guidance})
    one = _joined([_literal(asked["begin"]), "body", _literal(asked["end"])])
    more = f" ({_literal(asked['between'])} call)*" if asked["between"] else ""
    every = _joined([_literal(asked["first"]), f"call{more}", _literal(asked["last"])])
    return f"start: {every}\ncall: {one}\nbody: %json {body}\n"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _joined(parts: Iterable[str]) -> str:
    return " ".join(part for part in parts if part)
