"""What is wrong with a line, in words for the person who wrote it. It must not know what a good line means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

import msgspec

from shoal.core.errors import RowError
from shoal.jobs.body import FIELDS, UNSUPPORTED

_PATH = re.compile(r"^(?P<what>.*?)(?: - at (?P<path>.*))?$", re.DOTALL)
UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")
_ADVICE = {
    ".role": "this version reads the roles system, developer, user, assistant and tool",
    ".type": "this version reads parts of text only, and tools of type function",
    ".function.name": "give it 1 to 64 letters, digits, underscores and hyphens",
    ".tool_choice": 'say none, auto, required or a function: {"type": "function", "function": {"name": …}}',
}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


def explain(error: msgspec.ValidationError, inside: str = "", read: Collection[str] = ()) -> RowError:
    """A decoder's complaint as a message for the person who wrote the line; `inside` is where the object stands, and
    `read` are fields that it reads though others like it refuse them."""
    match = _PATH.match(str(error))
    assert match is not None, error
    what, path = match["what"], (match["path"] or "").strip("`").replace("key` in `", "")
    param = path.replace("$", "").lstrip(".")
    unknown = UNKNOWN.match(what)
    if unknown is not None and unknown[1] in FIELDS:
        return RowError(f"{unknown[1]!r} is not a field of this url: remove it", "unknown_field", unknown[1])
    if unknown is not None:
        near = difflib.get_close_matches(unknown[1], FIELDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ", or correct its name"
        where = ".".join(p for p in (inside, param) if p) or "the line"
        return RowError(f"unknown field {unknown[1]!r} in {where}: remove it{hint}", "unknown_field", unknown[1])
    top = re.split(r"[.\[]", param)[-1 if param.startswith("messages") else 0]
    if top in UNSUPPORTED and top not in read:
        return unsupported(param)
    place = ".".join(p for p in (inside, param) if p) or "the line"
    missing = _MISSING.match(what)
    if missing is not None:
        return RowError(f"{place}: {missing[1]!r} is missing: add it", "missing_field", missing[1])
    advice = next((advice for end, advice in _ADVICE.items() if param.endswith(end)), "correct it")
    return RowError(f"{place}: {what[0].lower()}{what[1:]}: {advice}", param=param or None)


def unsupported(name: str) -> RowError:
    """A field that is known and cannot be honoured."""
    return RowError(
        f"{name!r} is not supported by this version: remove it (the row is not answered, rather than answered wrongly)",
        "not_supported",
        name,
    )


def not_json(raw: bytes, error: Exception) -> RowError:
    """A line that no decoder reads."""
    if isinstance(error, UnicodeDecodeError):
        return RowError(f"the line is not UTF-8 ({error.reason}): convert the file to UTF-8", "invalid_json_line")
    if _SURROGATE.search(raw):
        problem = "it may hold half of a surrogate pair (\\ud800 to \\udfff alone): write the character itself"
    elif b"\0" in raw:
        problem = "it holds NUL bytes: remove them"
    else:
        problem = "correct or remove the line"
    return RowError(f"the line is not valid JSON ({error}): {problem}", "invalid_json_line")
