"""Rows that a server answers: what is read of them, and what is passed on. Their fields are the server's to judge.

It must not know servers, nor how a row is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw

from shoal.core.errors import RowError, UsageError
from shoal.jobs.body import TEXT_FIELDS, EmbeddingBody, PassedBody
from shoal.jobs.complain import unsupported
from shoal.jobs.prompt import DEFAULT_PROMPT, PromptTemplate

ASKS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/embeddings": "input"}
"""The field that a row of each url must have."""

Fields = Mapping[str, Raw]


class _Read(msgspec.Struct, frozen=True):
    """The fields that are ours to read."""

    model: str | None = None
    timeout: Annotated[float, Meta(gt=0.0)] | None = None
    stream: bool | None = None


_read = msgspec.json.Decoder(_Read)
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Passing:
    """What a job adds to its rows: a model for those that name none, and fields where they are silent."""

    model: str = ""
    alone: bool = False  # the server has no other model: it answers all rows, whatever they name
    defaults: tuple[tuple[str, bytes], ...] = ()  # JSON by name, from `parse_passed`

    def body(self, url: str, fields: Fields) -> PassedBody:
        """The body of a row with these fields. RowError for what no server could answer in one piece."""
        if url not in ASKS:
            raise RowError(
                f"url {url!r} is not passed on to servers: use one of {', '.join(ASKS)}", "url_not_supported", "url"
            )
        asked = ASKS[url]
        if _absent(fields, asked):
            raise RowError(f"body: {asked!r} is missing: add it", "missing_field", asked)
        whole = dict(fields)
        for name, value in (("model", _encode(self.model)) if self.model else ("", b""), *self.defaults):
            if name and _absent(fields, name) and (asked != "input" or _of_embeddings(name)):
                whole[name] = Raw(value)
        read = _read.decode(_encode(whole))
        if read.stream:
            raise unsupported("stream")
        whole.pop("timeout", None)
        if self.alone:
            whole["model"] = Raw(_encode(self.model))
        return PassedBody(model=read.model, timeout=read.timeout, url=url, sent=_encode(whole))

    def plain(self, columns: Fields, prompt: PromptTemplate | None, chat: bool) -> PassedBody:
        """The body of a plain row."""
        if prompt is None and "messages" in columns:
            return self.body("/v1/chat/completions", {"messages": columns["messages"]})
        text = (prompt or DEFAULT_PROMPT).fill(columns)
        if chat:
            messages = [{"role": "user", "content": text}]
            return self.body("/v1/chat/completions", {"messages": Raw(_encode(messages))})
        return self.body("/v1/completions", {"prompt": Raw(_encode(text))})


def parse_passed(fields: Mapping[str, Any]) -> tuple[tuple[str, bytes], ...]:
    """Defaults for all rows. A UsageError for what only a row, or --model, can say, and what is ours and wrong."""
    for name in fields:
        if name in (*ASKS.values(), "model"):
            raise UsageError(
                f"{name!r} cannot be a default for all rows: remove it" + ", and say --model" * (name == "model")
            )
    try:
        _read.decode(_encode(fields))
    except msgspec.ValidationError as error:
        raise UsageError(f"a default for all rows cannot be: {error}") from error
    return tuple(sorted((name, _encode(value)) for name, value in fields.items()))


def _absent(fields: Fields, name: str) -> bool:
    return name not in fields or bytes(fields[name]) == b"null"


def _of_embeddings(name: str) -> bool:
    """Whether a default is for rows that want vectors too: unless it is known to be of texts alone."""
    return name not in TEXT_FIELDS or name == "timeout" or EmbeddingBody.has(name)
