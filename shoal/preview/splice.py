"""Changing one value in a line of JSON, and no other byte of it. It must not know what the value means.

A line is given as the text of an object that was read before: nothing here says what is wrong with one that is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

_SPACE = re.compile(r"[ \t\n\r]*")
_values = json.JSONDecoder(parse_int=str, parse_float=str, strict=False)  # numbers of any length, which nobody reads


def place(text: str, name: str, start: int = 0) -> int:
    """Where the value of a member begins, in the object at `start`: of several that of the last, which counts."""
    return [begin for each, begin, _ in _members(text, start) if each == name][-1]


def replaced(text: str, name: str, value: str, start: int = 0) -> str:
    """The text with another value of a member in the object at `start`; it becomes the last one where there is none."""
    members = list(_members(text, start))
    for each, begin, end in reversed(members):
        if each == name:
            return text[:begin] + value + text[end:]
    end, comma = (members[-1][2], ", ") if members else (_past(text, start) + 1, "")
    return f'{text[:end]}{comma}"{name}": {value}{text[end:]}'


def _members(text: str, start: int) -> Iterator[tuple[str, int, int]]:
    """Name, and where the value begins and ends, of each member of an object."""
    at = _past(text, _past(text, start) + 1)
    while text[at] != "}":
        name, end = _values.raw_decode(text, at)
        at = _past(text, _past(text, end) + 1)
        _, end = _values.raw_decode(text, at)
        yield name, at, end
        at = _past(text, end)
        at = _past(text, at + 1) if text[at] == "," else at


def _past(text: str, at: int) -> int:
    """The first place from `at` on that is no space."""
    found = _SPACE.match(text, at)
    return found.end() if found else at
