"""What a server's response means: an answer, a row that cannot be answered, a call to make again, or the job's end.

It knows the shapes of the OpenAI API and its errors; it must not know how responses come, nor when calls are made.
"""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from shoal.core.errors import FAULTS
from shoal.core.types import Finish
from shoal.remote.words import Call, Reply

OVERLOADED = frozenset((429, 503, 529))  # the server has too much to do, or none to do it with: no row's fault
PASSING = frozenset((408, 409, 425))  # and every 5xx but these: it may be answered at the next try
NEVER = frozenset((501, 505))
ABSENT = frozenset((502, 504))  # what stands before a server says that there is none, or that it says nothing
SPENT = frozenset(("insufficient_quota", "billing_hard_limit_reached", "billing_not_active"))
NOT_HERE = frozenset((404, 405))
MODERATED = frozenset("moderation flagged content_policy content_filter policy_violation safety".split())
BROKEN_OFF = frozenset(("abort", "error", "cancelled"))  # as the reason why a choice has ended
LONGEST_WORDS = 2000  # characters of a server's complaint that are kept


@dataclass(frozen=True, slots=True)
class Again:
    """The call is to be made again."""

    code: str  # of the row's error when it has been made often enough
    why: str
    overload: bool = False  # the server is to have fewer calls, and the row has lost no try
    wait: float | None = None  # seconds that the server asks for
    late: bool = False  # no answer came for long: the server may have too many calls
    absent: bool = False  # perhaps there is no server: one that starts, or has gone, behind what forwards to it
    number: int | None = None  # of parts that came, not those asked for: a server may do so always


@dataclass(frozen=True, slots=True)
class End:
    """No call to this server can succeed: the job ends, and may go on later."""

    why: str
    exit_code: int
    unless: Reply | None = None  # what it is instead where the server has answered others: this row's failure


Verdict = Reply | Again | End

_decode = msgspec.json.decode


def judge(call: Call, status: int, headers: Mapping[str, str], body: bytes) -> Verdict:
    """What a response to `call` means. The response was read to its end."""
    try:
        found = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = None
    if 200 <= status < 300:
        error = found.get("error") if isinstance(found, dict) else None
        if error is None:
            return _answer(call, found, body)
        status = error["code"] if isinstance(error, dict) and isinstance(error.get("code"), int) else 500
    return _refusal(call, status, headers, *_complaint(found, body))


def _complaint(found: Any, body: bytes) -> tuple[str, str]:
    """(code, words) of an error body, of whatever server."""
    error = found.get("error", found) if isinstance(found, dict) else None
    if isinstance(error, dict):
        words = next((error[name] for name in ("message", "detail", "msg") if error.get(name)), error)
        code = error.get("code") or error.get("type") or ""
    else:
        words, code = error if isinstance(error, str) else body.decode("utf-8", "replace"), ""
    text = words if isinstance(words, str) else msgspec.json.encode(words).decode()
    return str(code), " ".join(text.split())[:LONGEST_WORDS]


def _refusal(call: Call, status: int, headers: Mapping[str, str], code: str, words: str) -> Verdict:
    said = f"the server answered {status}" + (f": {words}" if words else "")
    if status in (401, 403):
        own = Reply(call.id, finish=Finish.ERROR, error=said, code="invalid_request") if status == 403 else None
        if own is not None and any(word in f"{code} {words}".lower() for word in MODERATED):
            return own
        return End(f"{said}: give the key in OPENAI_API_KEY, and go on with the job by the same command", 2, own)
    if code in SPENT or status == 402:
        return End(f"{said}; what was answered is kept: run the same command again when it is paid for", 1)
    if status in OVERLOADED:
        return Again("server_error", said, True, retry_after(headers, time.time()))
    if status in PASSING or (status >= 500 and status not in NEVER):
        wait = retry_after(headers, time.time())
        return Again("server_error", said, False, wait, absent=status in ABSENT)
    if 300 <= status < 400:
        return End(f"{said}, which leads elsewhere: give shoal run another --endpoint", 2)
    if FAULTS.get(code) != "yours":
        code = "invalid_request"
        if status in NOT_HERE:
            code = "model_not_found" if status == 404 and "model" in words.lower() else "url_not_supported"
        elif status in NEVER:
            code = "not_supported"
    own = Reply(call.id, finish=Finish.ERROR, error=said, code=code)
    if code == "url_not_supported":
        return End(f"{said} to {call.url}: give shoal run another --endpoint", 2, own)
    return own


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that the server asks to wait, by either header and either form; `now` is Unix time."""
    millis = headers.get("retry-after-ms", "")
    text = headers.get("retry-after", "").strip()
    try:
        found = float(millis) / 1000 if millis else float(text)
    except ValueError:
        try:
            found = email.utils.parsedate_to_datetime(text).timestamp() - now
        except ValueError:
            return None
    return max(found, 0.0) if found < float("inf") else None


def _answer(call: Call, found: Any, body: bytes) -> Verdict:
    """The reply that a body holds, whole and in order; anything less is asked for again."""
    name = "data" if call.url.endswith("/embeddings") else "choices"
    parts = found.get(name) if isinstance(found, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return Again("bad_reply", f"the server's reply has no {name}, or is no JSON")
    if len(parts) != call.answers:
        why = f"the server's reply has {len(parts)} {name} of the {call.answers} asked for"
        return Again("bad_reply", why, number=len(parts))
    places = [part.get("index", place) for place, part in enumerate(parts)]
    if not all(isinstance(place, int) for place in places) or sorted(places) != list(range(len(parts))):
        return Again("bad_reply", f"the server's reply numbers its {name} {places[:10]}")
    if not all(_whole(call, part) for part in parts):
        return Again("bad_reply", f"the server's reply has {name} that did not come to their end")
    if places != sorted(places):
        found[name] = sorted(parts, key=lambda part: part["index"])
        body = msgspec.json.encode(found)
    usage = found.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    counts = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    cached = _count(details, "cached_tokens") if isinstance(details, dict) else 0
    line = msgspec.json.format(body, indent=-1).decode()
    return Reply(call.id, finish=Finish.STOP, body=line, usage=counts, timing={"cached": float(min(cached, counts[0]))})


def _whole(call: Call, part: Mapping[str, Any]) -> bool:
    """Whether a choice or a vector is all there."""
    if call.url.endswith("/embeddings"):
        return bool(part.get("embedding"))
    if part.get("finish_reason") in (None, *BROKEN_OFF):
        return False
    return isinstance(part.get("message"), dict) if "/chat/" in call.url else isinstance(part.get("text"), str)


def _count(usage: Mapping[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and value >= 0 else 0
