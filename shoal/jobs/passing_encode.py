"""Rows that a server answers, as the plan needs them, and as calls. No tokenizer: what two prompts share is their text.

It must not know where calls go, nor in which order they are made.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

from shoal.core.errors import RowError
from shoal.core.types import TOKEN, Tokens
from shoal.jobs.body import PassedBody
from shoal.jobs.encode import Encoded, Staircase
from shoal.jobs.keys import SIZE
from shoal.jobs.passing import ASKS
from shoal.jobs.schema import RowSpec, parse_line
from shoal.jobs.settings import JobSettings
from shoal.remote.words import Call

VERSION = b"shoal call 2"  # another whenever equal keys no longer mean equal answers
UNDECIDED = frozenset(
    "user metadata store safety_identifier prompt_cache_key prompt_cache_retention request_id priority service_tier"
    " stream_options".split()
)
"""Fields that say who asks, and how the call is treated, to every server. Any other may change what it answers."""
UNIT = 2  # bytes of text in what the plan takes for a token: as many as it can sort

_decode = msgspec.json.decode


class PassingEncoder:
    """What `RowEncoder` is to an engine of ours. A row is one prompt, however many texts it holds, and one call."""

    order: Literal["prefix"] = "prefix"

    def __init__(self, settings: JobSettings, servers: Sequence[str]) -> None:
        """`servers` are those whose answers are the same answers: a key of one of them is a key of all."""
        self.settings = settings
        self._servers = "\n".join(sorted(servers)).encode()

    @property
    def fingerprint(self) -> str:
        """Another one whenever the same line could become another prompt, or be refused."""
        return hashlib.sha256(VERSION + repr((self.settings, self._servers)).encode()).hexdigest()

    def parse(self, raw: bytes | None) -> RowSpec:
        """The row of a line; raises RowError."""
        return parse_line(raw, self.settings)

    def stream(self, batches: Iterable[Sequence[bytes | None]]) -> Iterator[list[Encoded | RowError]]:
        """One result for each line, batch by batch."""
        for raws in batches:
            yield [self._encoded(raw) for raw in raws]

    def requests(
        self, line: int, row: RowSpec, number: int, prompt: Tokens, index: int = -1,
        futures: Sequence[Staircase] | None = None,
    ) -> list[Call]:  # fmt: skip
        """The call of a row. What is known of the future is of no use to a server."""
        body = _passed(row)
        answers = _answers(body.url, _decode(body.sent))
        return [
            Call(
                id=f"{line}.{number}.0", prompt=prompt, index=index, adapter=self._model(body),
                url=body.url, body=body.sent, answers=answers,
            )
        ]  # fmt: skip

    def _encoded(self, raw: bytes | None) -> Encoded | RowError:
        try:
            row = self.parse(raw)
        except RowError as error:
            return error
        body = _passed(row)
        try:
            fields = _decode(body.sent)
        except msgspec.DecodeError as error:  # a number that no computer has, or half of a character
            return RowError(f"body cannot be read whole ({error}): write what the value is to be", "invalid_request")
        key = 0 if row.custom_id is None else hash(row.custom_id) or 1
        asks = self._asks(body.url, fields)
        return Encoded([as_tokens(prompt_text(body.url, fields))], 1, 1, None, self._model(body), -1, key, asks)

    def _model(self, body: PassedBody) -> str:
        """Rows of one model alone share prefixes."""
        alone = self.settings.passing is not None and self.settings.passing.alone
        return "" if alone else body.model or ""

    def _asks(self, url: str, fields: dict[str, Any]) -> list[bytes]:
        """The row's key, if the same question has the same answer; none where the server draws numbers of its own."""
        settled = url.endswith("/embeddings") or fields.get("temperature") == 0 or isinstance(fields.get("seed"), int)
        if not settled:
            return []
        asked = {name: value for name, value in fields.items() if name not in UNDECIDED and value is not None}
        text = msgspec.json.encode((url, asked), order="sorted")
        return [hashlib.blake2b(VERSION + self._servers + b"\0" + text, digest_size=SIZE).digest()]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a row asks of a server, as far as the fields that every server knows say it."""

    model: str  # '' leaves it to the server
    answers: int
    limit: int | None  # output tokens of each at most; None: no field says


def asked_of(row: RowSpec) -> Asked:
    """What a row's call asks for."""
    body = _passed(row)
    fields = _decode(body.sent)
    given = (fields.get(name) for name in ("max_completion_tokens", "max_tokens"))
    limit = 0 if body.url.endswith("/embeddings") else next((one for one in given if isinstance(one, int)), None)
    model = fields.get("model")
    return Asked(model if isinstance(model, str) else "", _answers(body.url, fields), limit)


def prompt_text(url: str, fields: dict[str, Any]) -> str:
    """The text whose beginning a server can share: near enough to what its template makes of it."""
    asked = fields[ASKS[url]]
    if not isinstance(asked, list):
        return _text(asked)
    if "/chat/" not in url:
        return "\n".join(map(_text, asked))
    tools = [_text(fields["tools"])] if fields.get("tools") else []
    turns = (_text(turn.get("role", "")) + "\n" + _text(turn.get("content")) if isinstance(turn, dict) else _text(turn)
             for turn in asked)  # fmt: skip
    rest = (_text(turn) for turn in asked if isinstance(turn, dict) and turn.keys() - {"role", "content"})
    return "\n".join([*tools, *turns, *rest])


def as_tokens(text: str) -> Tokens:
    """A text in units of two bytes, at least one."""
    data = text.encode("utf-8", "surrogatepass")
    data += bytes(-len(data) % UNIT or (0 if data else UNIT))
    return array(TOKEN, np.frombuffer(data, dtype="<u2").astype(np.int32).tobytes())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _passed(row: RowSpec) -> PassedBody:
    assert isinstance(row.body, PassedBody), row.body
    return row.body


def _answers(url: str, fields: dict[str, Any]) -> int:
    """Choices, or vectors, that a reply must have."""
    asked, n = fields[ASKS[url]], fields.get("n")
    texts = 1
    if "/chat/" not in url and isinstance(asked, list) and not all(isinstance(one, int) for one in asked):
        texts = len(asked)
    return texts * (n if isinstance(n, int) and n > 0 and not url.endswith("/embeddings") else 1)
