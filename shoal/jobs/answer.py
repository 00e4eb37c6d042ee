"""What comes back for a row: the line of its answer, or the line of its failure, in the shapes of OpenAI's Batch API.

It must not know how an answer was computed. A line is a function of the input line, the model and the parameters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec

from shoal.core.errors import RowError, fault_of
from shoal.core.types import Tokens, TokenScore
from shoal.jobs.body import ChatBody, PassedBody, VectorBody
from shoal.jobs.logprobs import TokenNames, chat_logprobs, completion_logprobs, prompt_logprobs
from shoal.jobs.schema import RowSpec, unwrap
from shoal.jobs.tools import tool_use
from shoal.jobs.vector_lines import vector_reply
from shoal.text.heads import Head
from shoal.text.tools import Style, read_calls

NOT_EXECUTED = frozenset(("batch_expired", "batch_cancelled"))  # failures of rows that never ran: no response
STATUS = {  # of other codes: 400
    "model_not_found": 404, "engine_died": 500, "internal": 500, "server_error": 502, "bad_reply": 502, "no_reply": 504,
}  # fmt: skip
PLAIN_COLUMNS = ("answer", "finish_reason", "prompt_tokens", "completion_tokens")
CLASH = "_shoal"  # added to the name of an answer's column where the row has a column of that name


class TokenizerLike(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...

    def token_text(self, token: int) -> str: ...

    def token_bytes(self, token: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished answer to a prompt."""

    text: str
    tokens: Tokens  # as produced, the stop token included
    finish: Literal["stop", "length"]
    stop_reason: int | str | None = None  # the stop string or stop token of the row that ended it
    logprobs: Sequence[TokenScore] = ()  # of `tokens`, where the row asks
    vector: Sequence[float] = ()  # of a row that asks for no text
    usage: tuple[int, int] | None = None  # of a reply: prompt and output tokens, as its server counts them


@dataclass(frozen=True, slots=True)
class PromptAnswers:
    """All n answers to one prompt, in order of their sample index."""

    prompt: Tokens
    samples: Sequence[Sample]
    scores: Sequence[TokenScore] = ()  # of the prompt's tokens from the second on, where the row asks


class Lines:
    """What lines of all kinds of answers have in common, and those of failures."""

    def __init__(self, fingerprint: str, envelopes: bool = False) -> None:
        self.fingerprint = fingerprint  # the hash of all that an answer depends on but its line
        self.envelopes = envelopes  # plain rows too come back in the Batch shape

    def envelope(self, row: RowSpec, body: object) -> bytes:
        """The line of an answered request."""
        mark = self._mark(row.request)
        response = {"status_code": 200, "request_id": f"req_{mark}", "body": body}
        return msgspec.json.encode(
            {"id": f"batch_req_{mark}", "custom_id": row.custom_id, "response": response, "error": None}
        )

    def failure(self, line: int, raw: bytes | None, error: RowError, had: Sequence[str] = ()) -> bytes:
        """The error line of an input line, good or bad; None is a line too long to read.

        `x_shoal` holds the request, as text where it is not JSON, so that the line is a valid input, and whose the
        failure is. `had` are the texts that a row had come to when its time was up.
        """
        request, first = (None, None) if raw is None else unwrap(raw)
        line = first or line
        custom_id, embedded = _embed(request)
        shown = embedded.encode() if isinstance(embedded, str) else embedded
        mark = self._mark(b"%d" % line if shown is None else bytes(shown))
        reply: dict[str, Any] | None = None
        inner: dict[str, Any] | None = None
        if error.code in NOT_EXECUTED:
            inner = {"code": error.code, "message": str(error)}
        else:
            status = STATUS.get(error.code, 400)
            kind = "server_error" if status >= 500 else "invalid_request_error"
            detail = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
            reply = {"status_code": status, "request_id": f"req_{mark}", "body": {"error": detail}}
        found = {"answers": list(had)} if had else {}
        return msgspec.json.encode(
            {
                "id": f"batch_req_{mark}",
                "custom_id": custom_id,
                "response": reply,
                "error": inner,
                "x_shoal": {"line": line, "fault": fault_of(error.code), **found, "request": embedded},
            }
        )

    def _mark(self, request: bytes) -> str:
        """What ids are made of: the same for the same request under the same fingerprint."""
        return hashlib.blake2b(request, digest_size=12, key=self.fingerprint.encode()[:64]).hexdigest()


class AnswerWriter(Lines):
    """Makes lines of an engine's answers. `created` is a Unix time."""

    def __init__(
        self, tokenizer: TokenizerLike, fingerprint: str, model: str, created: int = 0, envelopes: bool = False,
        style: Style | None = None, head: Head | None = None,
    ) -> None:  # fmt: skip
        super().__init__(fingerprint, envelopes)
        self.tokenizer = tokenizer
        self.style = style  # how the model writes calls of tools; None where it has not learnt it
        self.head = head  # what the numbers of a classifier mean; None for any other model
        self.model = model  # the name for rows that give none
        self.created = created

    def answer(self, row: RowSpec, answers: Sequence[PromptAnswers]) -> bytes:
        """The output line of a row, without its end. `answers` has every prompt of the row, in order."""
        if row.endpoint == "plain" and not self.envelopes:
            return msgspec.json.encode(_plain(row, answers))
        mark = self._mark(row.request)
        match row.body:
            case VectorBody():
                body = self._vectors(row.body, answers, mark)
            case ChatBody():
                body = self._chat(row, answers[0], mark)
            case _:
                body = self._text(row, answers, mark)
        return self.envelope(row, body)

    def _frame(self, row: RowSpec, kind: str, mark: str, choices: list[Any], usage: dict[str, int]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{mark}",
            "object": kind,
            "created": self.created,
            "model": row.body.model or self.model,
            "system_fingerprint": f"fp_{self.fingerprint[:16]}",
            "choices": choices,
            "usage": usage,
        }

    def _chat(self, row: RowSpec, answers: PromptAnswers, mark: str) -> dict[str, Any]:
        body = row.body
        names = TokenNames(self.tokenizer, bool(body.return_tokens_as_token_ids))
        choices = []
        for index, sample in enumerate(answers.samples):
            message, finish = self._message(row, sample, f"{mark}{index}")
            choice: dict[str, Any] = {
                "index": index,
                "message": message,
                "logprobs": chat_logprobs(sample.logprobs, row.logprobs, names) if row.logprobs >= 0 else None,
                "finish_reason": finish,
                "stop_reason": sample.stop_reason,
            }
            if body.return_token_ids:
                choice["token_ids"] = list(sample.tokens)
            choices.append(choice)
        reply = self._frame(row, "chat.completion", mark, choices, _usage((answers,)))
        if body.prompt_logprobs is not None:
            reply["prompt_logprobs"] = prompt_logprobs(1, answers.scores, body.prompt_logprobs, names)
        if body.return_token_ids:
            reply["prompt_token_ids"] = list(answers.prompt)
        return reply

    def _message(self, row: RowSpec, sample: Sample, mark: str) -> tuple[dict[str, Any], str]:
        """What the assistant says, in words or in calls of tools, and why it ended."""
        use = tool_use(row.body)
        message = {"role": "assistant", "content": sample.text}
        if use is None or self.style is None:
            return message, sample.finish
        # Special tokens are part of how calls are written, and no part of a text.
        text = self.tokenizer.decode(sample.tokens, False)
        before, calls = read_calls(self.style, text, use.names, sample.finish == "stop", self._ends(sample))
        if not calls:
            return message, sample.finish
        shown = [
            {
                "id": self._mark(f"{mark}.{number}".encode())[:9],  # as long as Mistral's templates want it
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for number, call in enumerate(calls if use.several else calls[:1])
        ]
        finish = "tool_calls" if sample.finish == "stop" else sample.finish
        return {**message, "content": before or None, "tool_calls": shown}, finish

    def _ends(self, sample: Sample) -> set[str]:
        """What may stand behind calls: special tokens, and what the row wants answers to end with."""
        decode, reason = self.tokenizer.decode, sample.stop_reason
        ends = {decode([reason], False)} if isinstance(reason, int) else {reason} if reason else set[str]()
        for token in reversed(sample.tokens):
            if decode([token]).strip():
                break
            ends.add(decode([token], False))
        return ends - {""}

    def _text(self, row: RowSpec, answers: Sequence[PromptAnswers], mark: str) -> dict[str, Any]:
        body = row.body
        names = TokenNames(self.tokenizer, bool(body.return_tokens_as_token_ids))
        choices: list[dict[str, Any]] = []
        for number, answer in enumerate(answers):
            before = self._echo(row, number, answer.prompt)
            first = row.score_from  # what stands before it was computed with its block, and is not asked for
            scored = answer.scores[first - len(answer.prompt) :] if 0 < first < len(answer.prompt) else ()
            unscored = answer.prompt[: max(first, 0)] if row.echo else answer.prompt[:0]
            for sample in answer.samples:
                scores = [*scored, *sample.logprobs] if row.echo else sample.logprobs
                shown = completion_logprobs(unscored, scores, row.logprobs, names) if row.logprobs >= 0 else None
                choice: dict[str, Any] = {
                    "index": len(choices),
                    "text": before + sample.text,
                    "logprobs": shown,
                    "finish_reason": sample.finish,
                    "stop_reason": sample.stop_reason,
                }
                if body.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = prompt_logprobs(first, scored, body.prompt_logprobs, names)
                if body.return_token_ids:
                    choice["prompt_token_ids"] = list(answer.prompt)
                    choice["token_ids"] = list(sample.tokens)
                choices.append(choice)
        return self._frame(row, "text_completion", mark, choices, _usage(answers))

    def _vectors(self, body: VectorBody, answers: Sequence[PromptAnswers], mark: str) -> dict[str, Any]:
        frame = {"id": mark, "created": self.created, "model": body.model or self.model}
        vectors = [answer.samples[0].vector for answer in answers]
        return vector_reply(body, vectors, self.head, frame, _usage(answers)["prompt_tokens"])

    def _echo(self, row: RowSpec, number: int, prompt: Tokens) -> str:
        """The text of an echoed prompt: as given, where it was a text and none of it was cut off."""
        if not row.echo:
            return ""
        given = row.prompts[number]
        if isinstance(given, str) and row.body.truncate_prompt_tokens is None:
            return given
        return self.tokenizer.decode(prompt, row.body.skip_special_tokens is not False)


def count_tokens(row: RowSpec, prompts: Iterable[Tokens], samples: Iterable[Sample]) -> tuple[int, int]:
    """Prompt and output tokens of a row. Those of a row that a server answers are its server's to count."""
    if isinstance(row.body, PassedBody):
        used = [sample.usage for sample in samples if sample.usage is not None]
        return sum(prompt for prompt, _ in used), sum(output for _, output in used)
    return sum(map(len, prompts)), sum(len(sample.tokens) for sample in samples)


def _usage(answers: Sequence[PromptAnswers]) -> dict[str, int]:
    """Tokens of a row: each prompt once, however many answers it has."""
    prompt = sum(len(answer.prompt) for answer in answers)
    completion = sum(len(sample.tokens) for answer in answers for sample in answer.samples)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _plain(row: RowSpec, answers: Sequence[PromptAnswers]) -> dict[str, Any]:
    samples, usage = answers[0].samples, _usage(answers)
    used = usage["prompt_tokens"], usage["completion_tokens"]
    return plain_columns(row, [sample.text for sample in samples], [sample.finish for sample in samples], used)


def plain_columns(row: RowSpec, texts: Sequence[Any], ends: Sequence[str], usage: tuple[int, int]) -> dict[str, Any]:
    """A plain row's columns and its answer's; lists of n values where the job asks for n answers."""
    columns: dict[str, Any] = dict(row.columns or {})
    single = len(texts) == 1
    for name, value in zip(
        PLAIN_COLUMNS, (texts[0] if single else texts, ends[0] if single else ends, *usage), strict=True
    ):
        while name in columns:
            name += CLASH
        columns[name] = value
    return columns


def _embed(request: bytes | None) -> tuple[str | None, msgspec.Raw | str | None]:
    """A failed request's custom_id, and the request as JSON holds it: itself, else its text, else nothing."""
    if request is None:
        return None, None
    found = _decoded(request)
    if isinstance(found, dict):
        custom_id = found.get("custom_id")
        return custom_id if isinstance(custom_id, str) else None, msgspec.Raw(request)
    text = request.decode("utf-8", "backslashreplace")
    if text.encode() != request and _decoded(text.encode()) is not None:
        return None, None  # bytes that are not UTF-8 must not become another request when this line is run again
    return None, text


def _decoded(request: bytes) -> Any:
    """What the JSON says; None where it says nothing."""
    try:
        return msgspec.json.decode(request)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
