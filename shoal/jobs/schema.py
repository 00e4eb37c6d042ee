"""What one input line asks for: a RowSpec, or a RowError that says what to do about the line.

It must not know the model: no tokens, no context length, no vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np

from shoal.core.errors import RowError
from shoal.core.types import Constraint
from shoal.jobs.body import (
    TEXT_FIELDS,
    ChatBody,
    ClassifyBody,
    CompletionBody,
    EmbeddingBody,
    Message,
    PairBody,
    PassedBody,
    VectorBody,
)
from shoal.jobs.complain import UNKNOWN, explain, not_json, unsupported
from shoal.jobs.constrain import wanted
from shoal.jobs.given import check_fields, pairs_of, prompt_list
from shoal.jobs.loops import Rule, rule_of
from shoal.jobs.prompt import DEFAULT_PROMPT
from shoal.jobs.settings import JobSettings
from shoal.jobs.tools import check_messages, tool_use
from shoal.jobs.urls import NAMED, URLS, Endpoint

LINE_LIMIT = 8 << 20  # bytes: a longer line is refused without being read into memory
DEPTH_LIMIT = 256  # levels of nested JSON
SEQUENCE_LIMIT = 16_384  # prompts times n of one row: one line must not become the whole job

TEMPLATE_NAMES = frozenset("messages tools add_generation_prompt continue_final_message chat_template tokenize".split())

AnyBody = ChatBody | CompletionBody | VectorBody | PassedBody


class RowSpec(msgspec.Struct, frozen=True):
    """One row as asked, all checks done that need no model. A plain row's body is the one its columns made."""

    custom_id: str | None  # None only for plain rows
    endpoint: Endpoint
    body: AnyBody
    request: bytes  # the request's own text: what ids are made from; for a retried line not the error line around it
    columns: dict[str, msgspec.Raw] | None = None  # of a plain row: each value as its line writes it
    line: int | None = None  # the line it had in the file where it first failed

    @property
    def n(self) -> int:
        """Answers wanted of each prompt."""
        return self.body.n or 1

    @property
    def prompts(self) -> list[str | list[int]]:
        """What is given as texts or token ids, one by one; empty for chats and pairs, whose prompts are made first."""
        if isinstance(self.body, EmbeddingBody | ClassifyBody):
            return [] if self.body.input is None else prompt_list(self.body.input, "input")
        return prompt_list(self.body.prompt) if isinstance(self.body, CompletionBody) else []

    @property
    def max_tokens(self) -> int | None:
        """The row's own limit of tokens to produce; None if it gives none."""
        body = self.body
        if isinstance(body, VectorBody):
            return 0
        if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
            return body.max_completion_tokens
        return body.max_tokens

    @property
    def stop(self) -> tuple[str, ...]:
        """Stop strings."""
        stop = self.body.stop
        return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)

    @property
    def constraint(self) -> tuple[Constraint, str] | None:
        """What the text of each answer must be, and the field that asks for it. RowError where two do."""
        return wanted(self.body)

    @property
    def logprobs(self) -> int:
        """Best alternatives wanted beside each produced token; -1: no log-probabilities at all."""
        body = self.body
        if isinstance(body, ChatBody):
            return (body.top_logprobs or 0) if body.logprobs else -1
        return -1 if body.logprobs is None else body.logprobs

    @property
    def loops(self) -> Rule | None:
        """What ends an answer that repeats itself; None when nothing does."""
        return rule_of(self.body.repetition_detection)

    @property
    def echo(self) -> bool:
        """Whether the prompt is given back before the answer."""
        return bool(self.body.echo)

    @property
    def score_top(self) -> int:
        """Best alternatives wanted beside each prompt token; -1: prompt tokens are not scored."""
        wanted = -1 if self.body.prompt_logprobs is None else self.body.prompt_logprobs
        return max(wanted, self.logprobs) if self.echo else wanted

    @property
    def score_from(self) -> int:
        """The first position of a prompt that is scored; -1: none is. The very first token has nothing before it."""
        if self.score_top < 0:
            return -1
        return (isinstance(self.body, CompletionBody) and self.body.score_from) or 1


class _Failed(msgspec.Struct, frozen=True):
    request: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    line: Annotated[int, msgspec.Meta(ge=1, le=2**53)] | None = None


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    custom_id: str | None = None
    method: str | None = None
    url: str | None = None
    body: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    x_shoal: _Failed | None = None
    response: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    error: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    id: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _FailedRow(msgspec.Struct, frozen=True):
    x_shoal: _Failed | None = None


class _LooseEnvelope(_Envelope, frozen=True, forbid_unknown_fields=False):
    """The same with anything beside it."""


ENVELOPE = frozenset(_Envelope.__struct_fields__)
"""Fields of a line that mean something; others may stand beside them, as a user's own notes."""

_envelope = msgspec.json.Decoder(_Envelope)
_loose_envelope = msgspec.json.Decoder(_LooseEnvelope)
_chat = msgspec.json.Decoder(ChatBody)
_bodies: dict[str, msgspec.json.Decoder[Any]] = {url: msgspec.json.Decoder(kind) for url, (_, kind) in URLS.items()}
_object = msgspec.json.Decoder(dict[str, Any])
_failed_row = msgspec.json.Decoder(_FailedRow)
_row = msgspec.json.Decoder(dict[str, msgspec.Raw])
_text = msgspec.json.Decoder(str)

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def parse_line(raw: bytes | None, settings: JobSettings) -> RowSpec:
    """The row that a line describes; `raw` is the line without its end, None if it was longer than LINE_LIMIT.

    Raises RowError for every line that is not a request this version can honour, whatever its bytes are.
    """
    if raw is None:
        raise RowError(
            f"the line is longer than {LINE_LIMIT >> 20} MiB: shorten the request, or split it into several lines",
            "line_too_long",
        )
    try:
        if not raw.isascii():
            raw.decode()  # the parts that nobody reads too: they may be given back
        _check_depth(raw)
        return _plain_row(raw, settings) if settings.plain else _request_row(raw, settings)
    except msgspec.ValidationError as error:
        raise explain(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise not_json(raw, error) from None


def _check_depth(raw: bytes) -> None:
    """Refuse deep JSON by a limit of our own: the decoder's depends on how deep its caller already is."""
    if raw.count(b"[") + raw.count(b"{") <= DEPTH_LIMIT:
        return
    brackets = np.frombuffer(_STRING.sub(b"", raw).translate(None, _NO_BRACKETS), dtype=np.uint8)
    opens = (brackets == ord("[")) | (brackets == ord("{"))
    depth = np.cumsum(np.where(opens, np.int8(1), np.int8(-1)), dtype=np.int32)
    if depth.max(initial=0) > DEPTH_LIMIT:
        raise RowError("the JSON is nested too deeply: flatten it", "invalid_json_line")


def _request_row(raw: bytes, settings: JobSettings, line: int | None = None) -> RowSpec:
    try:
        envelope = _envelope.decode(raw)
    except msgspec.ValidationError as error:
        envelope = _lenient_envelope(raw, error)
    if envelope.x_shoal is not None and line is None:
        inner = _inner(envelope.x_shoal)
        _check_depth(inner)
        return _request_row(inner, settings, envelope.x_shoal.line or 0)
    if envelope.body is msgspec.UNSET and (
        envelope.response is not msgspec.UNSET or envelope.error is not msgspec.UNSET
    ):
        raise RowError(
            "this is a result line of another tool and does not hold the request it answers:"
            f" give the original input lines instead (custom_id {envelope.custom_id!r})",
            "request_missing",
        )
    url = _check_envelope(envelope)
    assert isinstance(envelope.body, msgspec.Raw)
    endpoint, kind = URLS[url]
    body: AnyBody
    try:
        if settings.passing is not None:
            body = settings.passing.body(url, _row.decode(envelope.body))
        else:
            body = settings.complete(_bodies[url].decode(envelope.body))
    except msgspec.ValidationError as error:
        raise explain(error, "body", kind.__struct_fields__ if issubclass(kind, PairBody) else ()) from None
    row = RowSpec(envelope.custom_id, endpoint, body, raw, None, line or None)
    _check(row, settings)
    return row


def _lenient_envelope(raw: bytes, error: msgspec.ValidationError) -> _Envelope:
    """Fields beside the known ones are a user's own notes, unless they belong into the body."""
    unknown = UNKNOWN.match(str(error))
    if unknown is None:
        raise error
    misplaced = sorted(set(_object.decode(raw)) & TEXT_FIELDS - {"user", "metadata", "documents"})
    if misplaced:
        name = misplaced[0]
        raise RowError(f"{name!r} stands beside body: move it into body", "unknown_field", name)
    return _loose_envelope.decode(raw)


def _inner(failed: _Failed) -> bytes:
    """The request inside an error line; as text if it could not be parsed when it failed."""
    if isinstance(failed.request, msgspec.UnsetType) or bytes(failed.request) == b"null":
        raise RowError(
            "this error line does not hold its request (it was too long): correct the line in the original input",
            "request_missing",
            "x_shoal.request",
        )
    request = bytes(failed.request)
    return _text.decode(request).encode() if request.startswith(b'"') else request


def unwrap(raw: bytes) -> tuple[bytes | None, int | None]:
    """The request inside one of our error lines and the line it first had; of any other line itself and None.

    The request is None where the error line holds none. Never raises: bytes that say nothing are themselves.
    """
    if b'"x_shoal"' not in raw:
        return raw, None
    try:
        failed = _failed_row.decode(raw).x_shoal
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return raw, None
    if failed is None:
        return raw, None
    try:
        return _inner(failed), failed.line
    except RowError:
        return None, failed.line


def _check_envelope(envelope: _Envelope) -> str:
    """The url of a well-formed envelope."""
    for name in ("custom_id", "method", "url", "body"):
        if getattr(envelope, name) in (None, msgspec.UNSET):
            raise RowError(
                f"{name!r} is missing: every line needs custom_id, method, url and body", "missing_field", name
            )
    if envelope.method != "POST":
        raise RowError(f"method is {envelope.method!r}: it must be 'POST'", "invalid_method", "method")
    if envelope.url is None or envelope.url not in URLS:
        raise RowError(
            f"url {envelope.url!r} is not supported by this version: use one of {NAMED}",
            "url_not_supported",
            "url",
        )
    return envelope.url


def _plain_row(raw: bytes, settings: JobSettings) -> RowSpec:
    line = None
    if b'"x_shoal"' in raw:
        failed = _failed_row.decode(raw).x_shoal
        if failed is not None:
            raw, line = _inner(failed), failed.line
            _check_depth(raw)
    if raw.startswith(b"["):
        raise RowError(
            "this row has another number of fields than the header, or cannot be read: correct it in the input",
            "malformed_row",
        )
    columns = _row.decode(raw)
    if settings.passing is not None:
        passed = settings.passing.plain(columns, settings.prompt, settings.chat)
        return RowSpec(None, "plain", passed, raw, columns, line)
    body: ChatBody | CompletionBody
    if settings.prompt is None and "messages" in columns:
        body = _chat.decode(b'{"messages":%b}' % bytes(columns["messages"]))
    elif settings.chat:
        text = (settings.prompt or DEFAULT_PROMPT).fill(columns)
        body = ChatBody(messages=[Message("user", text)])
    else:
        body = CompletionBody(prompt=(settings.prompt or DEFAULT_PROMPT).fill(columns))
    row = RowSpec(None, "plain", settings.complete(body), raw, columns, line)
    _check(row, settings)
    return row


def _check(row: RowSpec, settings: JobSettings) -> None:
    """What one field alone does not show."""
    body = row.body
    asked = body.model is not None or (settings.strict and row.endpoint != "plain")
    if asked and (settings.strict or settings.adapters) and body.model not in settings.names:
        served = ", ".join(settings.names)
        raise RowError(f"the model {body.model!r} does not exist; this job serves {served}", "model_not_found", "model")
    if isinstance(body, PassedBody):
        return  # what its fields may say is the server's to judge
    for name in ("stream", "use_beam_search"):
        if getattr(body, name):
            raise unsupported(name)
    if isinstance(body, VectorBody):
        _check_vectors(row, body)
        return
    if isinstance(body, ChatBody):
        _check_chat(row, body)
    else:
        _check_completion(row, body)
    rule_of(body.repetition_detection)
    limit = row.max_tokens
    if body.min_tokens and limit is not None and body.min_tokens > limit:
        raise RowError(f"min_tokens {body.min_tokens} is more than max_tokens {limit}: lower it", param="min_tokens")
    if limit == 0 and not row.echo:
        raise RowError("max_tokens must be at least 1 (0 only with echo in /v1/completions)", param="max_tokens")


def _check_chat(row: RowSpec, body: ChatBody) -> None:
    if body.echo:
        raise unsupported("echo")
    if tool_use(body) is not None and row.constraint is not None:
        asked = row.constraint[1]
        raise RowError(f"{asked} and tools exclude each other: keep one, or set tool_choice to none", param=asked)
    if body.top_logprobs and not body.logprobs:
        raise RowError("top_logprobs needs logprobs: true", param="top_logprobs")
    _check_turns(body, body.messages)


def _check_turns(body: ChatBody | ClassifyBody, messages: Sequence[Message]) -> None:
    check_messages(messages)
    if body.continue_final_message and body.add_generation_prompt:
        raise RowError(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    if body.continue_final_message and messages[-1].role != "assistant":
        raise RowError("continue_final_message needs an assistant's message at the end", param="continue_final_message")
    _check_template(body.chat_template_kwargs)


def _check_template(extra: Mapping[str, Any] | None) -> None:
    for name in extra or ():
        if name in TEMPLATE_NAMES:
            raise RowError(f"chat_template_kwargs may not set {name!r}", param="chat_template_kwargs")


def _check_completion(row: RowSpec, body: CompletionBody) -> None:
    if body.best_of is not None and body.best_of != row.n:
        raise RowError(
            "best_of is not supported by this version: remove it, or set it to n", "not_supported", "best_of"
        )
    if body.score_from is not None and row.score_top < 0:
        raise RowError("score_from needs prompt_logprobs, or echo with logprobs", param="score_from")
    _check_count(len(row.prompts), row.n, "prompt")


def _check_vectors(row: RowSpec, body: VectorBody) -> None:
    check_fields(body)
    if isinstance(body, PairBody):
        _check_template(body.chat_template_kwargs)
        _check_count(sum(map(len, pairs_of(body))), 1, "documents")
    elif isinstance(body, ClassifyBody) and body.messages is not None:
        _check_turns(body, body.messages)
    else:
        _check_count(len(row.prompts), 1, "input")


def _check_count(prompts: int, n: int, param: str) -> None:
    if prompts * n > SEQUENCE_LIMIT:
        raise RowError(
            f"{prompts} prompts times n={n} is more than {SEQUENCE_LIMIT} answers in one line: split the line",
            "too_many_tasks",
            param,
        )
