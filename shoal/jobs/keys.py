"""What makes two requests the same question: one key over all that the engine would compute from.

It knows a row's words and its requests; it must not know where keys are kept, nor which answers are known. A key holds
no custom_id, no name of a file and no spelling of JSON: rows with equal keys have equal answers, by construction.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from enum import Enum
from operator import attrgetter
from typing import Protocol

import msgspec

from shoal.core.types import Request, Sampling, Tokens
from shoal.jobs.body import GIVEN, Body
from shoal.jobs.schema import RowSpec

VERSION = b"shoal request 1"  # another whenever the same words come to mean another answer
SIZE = 16  # bytes of a key
MEMORY = 4096  # parameters remembered: rows of one file repeat a few

# What tells requests apart without changing what is computed: names, places and hints; the seed and the prompt are
# told apart by themselves.
_NOT_COMPUTED = frozenset(("id", "prompt", "sampling", "arrival", "deadline", "group", "guess", "index", "future"))
_APART = frozenset(("seed", "sample"))


class Requests(Protocol):
    """What makes the requests of a row."""

    def requests(self, line: int, row: RowSpec, number: int, prompt: Tokens) -> list[Request]: ...

    def seed(self, line: int, row: RowSpec, number: int) -> int: ...


@dataclasses.dataclass(frozen=True, slots=True)
class _Parameters:
    head: bytes  # hash of all but prompt and seed
    greedy: bool


class RequestKeys:
    """Keys of the prompts of rows. One thread may use it."""

    def __init__(self) -> None:
        self._known: dict[bytes, _Parameters] = {}

    def of(self, requests: Requests, row: RowSpec, prompts: Sequence[Tokens], context: int) -> list[bytes]:
        """A key for each prompt of a row; none for a row whose answer its place in the file decides."""
        keys = []
        for number, prompt in enumerate(prompts):
            found = self._parameters(requests, row, number, prompt, context)
            seed = 0
            if not found.greedy:
                if row.body.seed is None and row.custom_id is None:
                    return []
                seed = requests.seed(0, row, number)
            text = hashlib.blake2b(found.head, digest_size=SIZE)
            text.update(seed.to_bytes(8, "little", signed=True))
            text.update(prompt)
            keys.append(text.digest())
        return keys

    def _parameters(self, requests: Requests, row: RowSpec, number: int, prompt: Tokens, context: int) -> _Parameters:
        """The rest of the key, remembered by the fields that it is made from."""
        room = context - len(prompt) if row.max_tokens is None else 0
        kind = type(row.body)
        name = msgspec.msgpack.encode((kind.__name__, room, _fields(kind)(row.body)))
        found = self._known.get(name)
        if found is None:
            request = requests.requests(0, row, number, prompt)[0]
            found = _Parameters(hashlib.blake2b(_canonical(request, row)).digest(), request.sampling.greedy)
            if len(self._known) >= MEMORY:
                self._known.clear()
            self._known[name] = found
        return found


def twin_key(keys: Sequence[bytes], samples: int) -> bytes:
    """One key for a row of these prompts and so many answers to each; empty for a row without keys."""
    if len(keys) == 1 and samples == 1:
        return keys[0]
    if not keys:
        return b""
    return hashlib.blake2b(b"%d" % samples + b"".join(keys), digest_size=SIZE).digest()


@functools.cache
def _fields(kind: type[Body]) -> attrgetter[object]:
    """The fields of a body that may decide what is computed: all but its texts, and those that are never read."""
    names = [
        field.name
        for field in msgspec.structs.fields(kind)
        if field.name not in GIVEN and field.name != "seed" and not isinstance(field.default, msgspec.Raw)
    ]
    return attrgetter(*names)


def _canonical(request: Request, row: RowSpec) -> bytes:
    """Every field of the request and its sampling, and how its tokens become text, in one spelling."""
    asked = {f.name: getattr(request, f.name) for f in dataclasses.fields(Request) if f.name not in _NOT_COMPUTED}
    sampled = {f.name: getattr(request.sampling, f.name) for f in dataclasses.fields(Sampling) if f.name not in _APART}
    body = row.body
    shown: dict[str, object] = {
        "stop": row.stop,
        "stop_token_ids": frozenset(body.stop_token_ids or ()),
        "include_stop": bool(body.include_stop_str_in_output),
        "skip_special": body.skip_special_tokens is not False,
    }
    if row.loops is not None:
        shown["loops"] = row.loops
    return (
        VERSION + repr([sorted((k, _plain(v)) for k, v in part.items()) for part in (asked, sampled, shown)]).encode()
    )


def _plain(value: object) -> object:
    """The value in one spelling, whatever the order it was given in and whether a whole number has a point."""
    match value:
        case Enum():
            return value.value
        case bool() | int() | str() | bytes() | None:
            return value
        case float():
            return int(value) if value.is_integer() else value
        case frozenset():
            return sorted((_plain(one) for one in value), key=repr)
        case tuple() | list():
            return [_plain(one) for one in value]
        case dict():
            return sorted((str(name), _plain(one)) for name, one in value.items())
        case msgspec.Struct():
            return _plain(msgspec.structs.asdict(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    raise TypeError(f"a request key cannot hold a {type(value).__name__}")
