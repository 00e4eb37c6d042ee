"""The parts of talking to servers, each alone: how many calls at once, in which order, what a response means."""

from __future__ import annotations

import heapq
import json
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.errors import UsageError
from shoal.core.types import Finish
from shoal.jobs.passing_encode import as_tokens, prompt_text
from shoal.remote.limit import Limit
from shoal.remote.queue import Queue
from shoal.remote.server import LONGEST_PAUSE, Server, parse_url
from shoal.remote.verdict import Again, End, judge, retry_after
from shoal.remote.words import Call, Reply


def simulate(room: int, slots: int, calls: int, seconds: float = 1.0) -> tuple[float, int, int]:
    """A server that refuses the call after `room` and works at `slots` at once, in pretended time: (seconds taken,
    refusals, the most calls it had)."""
    limit, now, running, refused, most, done = Limit(), 0.0, 0, 0, 0, 0
    events: list[tuple[float, float]] = []  # (end, sent)
    free = [0.0] * slots
    while done < calls:
        while limit.room(running) and done + running < calls:
            if running >= room:
                refused += 1
                limit.refused(now, now)
                break
            start = max(now, heapq.heappop(free))
            heapq.heappush(free, start + seconds)
            heapq.heappush(events, (start + seconds, now))
            running += 1
            most = max(most, running)
        now, _ = heapq.heappop(events)
        limit.answered(now, running)
        running -= 1
        done += 1
    return now, refused, most


@pytest.mark.parametrize("room", [1, 3, 20, 100])
def test_nearly_all_the_room_is_used_and_little_is_refused(room: int) -> None:
    calls = 40 * room + 400
    took, refused, _ = simulate(room, room, calls)
    assert took < 1.4 * calls / room + 10, took
    assert refused < 0.16 * calls


@pytest.mark.parametrize("slots", [1, 4, 32])
def test_a_server_that_queues_without_an_end_is_not_flooded(slots: int) -> None:
    took, refused, most = simulate(10_000, slots, 3000)
    assert refused == 0 and took < 1.25 * 3000 / slots
    assert most <= max(24, 4 * slots)


def test_refusals_of_one_burst_cut_the_limit_once() -> None:
    limit = Limit(64.0)
    for _ in range(50):
        limit.refused(now=10.0, sent=9.0)
    assert 40 < limit.allowed < 50


def call(index: int, text: str = "", **more: Any) -> Call:
    return Call(f"{index}.0.0", as_tokens(text or f"call {index}"), index=index, **more)


def test_one_server_gets_calls_in_plan_order_and_what_is_given_back_first() -> None:
    queue = Queue()
    queue.add(call(i, "family " * 20 + str(i)) for i in range(10))
    taken = [queue.take("a") for _ in range(4)]
    for one in reversed(taken[1:]):
        assert one is not None
        queue.give_back(one)
    again = [queue.take("a") for _ in range(9)]
    assert [one.index for one in again if one is not None] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert queue.take("a") is None and len(queue) == 0


def test_what_is_given_back_as_the_last_goes_behind_all_others() -> None:
    queue = Queue()
    queue.add(call(i) for i in range(3))
    first = queue.take("a")
    assert first is not None
    queue.give_back(first, last=True)
    queue.add([call(3)])
    taken = [queue.take("a") for _ in range(4)]
    assert [one.index for one in taken if one is not None] == [1, 2, 3, 0]


def test_each_of_several_servers_goes_through_families_of_its_own() -> None:
    queue = Queue()
    queue.add(call(8 * family + i, chr(97 + family) * 200 + str(i)) for family in range(6) for i in range(8))
    had: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    while len(queue):
        for taker, taken in had.items():
            if (one := queue.take(taker)) is not None:
                taken.append(one.index)
    assert sorted(sum(had.values(), [])) == list(range(48))
    runs = [zip(taken, taken[1:], strict=False) for taken in had.values()]
    assert sum(one // 8 != other // 8 for run in runs for one, other in run) <= 6


@given(st.lists(st.sampled_from(["take a", "take b", "back", "back last", "remove"]), max_size=60))
def test_no_call_is_lost_or_doubled_by_the_queue(moves: list[str]) -> None:
    queue = Queue()
    queue.add(call(i, "xyz"[i % 7 % 3] * 30 + str(i)) for i in range(25))
    out: list[Call] = []
    gone: list[Call] = []
    for move in moves:
        if move.startswith("take"):
            out += filter(None, [queue.take(move)])
        elif move.startswith("back") and out:
            queue.give_back(out.pop(0), last=move == "back last")
        elif move == "remove":
            gone += queue.remove({f"{i}.0.0" for i in range(0, 25, 6)})
        assert len(queue) == 25 - len(out) - len(gone)
    while (one := queue.take("a")) is not None:
        out.append(one)
    assert sorted(each.index for each in out + gone) == list(range(25))


def chat_reply(**change: Any) -> bytes:
    choice = {"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"} | change
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}, indent=2).encode()


CHAT = call(1, url="/v1/chat/completions")


def test_a_whole_answer_is_taken_as_it_is_on_one_line() -> None:
    found = judge(CHAT, 200, {}, chat_reply())
    assert isinstance(found, Reply) and found.usage == (5, 2) and "\n" not in found.body
    assert json.loads(found.body) == json.loads(chat_reply())


@given(st.integers(0, len(chat_reply()) - 1))
def test_no_part_of_an_answer_is_taken_for_one(size: int) -> None:
    assert isinstance(judge(CHAT, 200, {}, chat_reply()[:size]), Again)


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 520, 529])
def test_what_passes_is_asked_again(status: int) -> None:
    found = judge(CHAT, status, {"retry-after": "7"}, b"")
    assert isinstance(found, Again) and found.wait == 7.0 and found.overload == (status in (429, 503, 529))


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_what_does_not_pass_is_the_rows_fault(status: int) -> None:
    found = judge(CHAT, status, {}, b'{"detail": [{"msg": "no such model"}]}')
    assert isinstance(found, Reply) and found.error and found.code in ("invalid_request", "model_not_found")


def test_no_money_and_no_key_end_the_job() -> None:
    spent = b'{"error": {"code": "insufficient_quota", "message": "pay"}}'
    for status, body in ((401, b""), (403, b"{}"), (402, b""), (429, spent), (307, b"")):
        assert isinstance(judge(CHAT, status, {}, body), End)


@given(st.binary(max_size=60), st.integers(200, 599))
def test_any_response_means_something(body: bytes, status: int) -> None:
    assert isinstance(judge(CHAT, status, {}, body), Reply | Again | End)


def test_an_answer_that_was_broken_off_at_the_server_is_asked_again() -> None:
    for reason in ("abort", "error", "cancelled"):
        assert isinstance(judge(CHAT, 200, {}, chat_reply(finish_reason=reason)), Again)
    for reason in ("stop", "length", "tool_calls", "content_filter", "repetition"):
        assert isinstance(judge(CHAT, 200, {}, chat_reply(finish_reason=reason)), Reply)


@pytest.mark.parametrize("status", [501, 505])
def test_what_a_server_will_never_do_is_not_asked_again(status: int) -> None:
    found = judge(CHAT, status, {}, b"not implemented")
    assert isinstance(found, Reply) and found.code == "not_supported"


def test_what_moderation_says_of_a_row_is_the_rows_failure() -> None:
    for body in (b'{"error": {"message": "Your input was flagged", "code": 403}}', b"Blocked by content_policy"):
        assert isinstance(judge(CHAT, 403, {}, body), Reply)
    for status, body in ((403, b"Forbidden"), (404, b"no such page"), (405, b"")):
        found = judge(CHAT, status, {}, body)
        assert isinstance(found, End) and found.unless is not None and found.unless.finish is Finish.ERROR
    assert isinstance(found := judge(CHAT, 401, {}, b"flagged"), End) and found.unless is None


def test_both_forms_of_retry_after_are_read() -> None:
    assert retry_after({"retry-after": "3"}, 0.0) == 3.0 and retry_after({"retry-after-ms": "250"}, 0.0) == 0.25
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:00:09 GMT"}, 2.0) == 7.0
    assert retry_after({}, 0.0) is None and retry_after({"retry-after": "soon"}, 0.0) is None


def test_a_pause_is_what_the_server_asks_for_or_grows() -> None:
    server = Server("http://a/v1")
    server.pause(0.0, 5.0)
    assert not server.open(4.9) and server.open(5.0)
    waits, now = [], 10.0
    for _ in range(12):
        server.pause(now, None)
        server.pause(now, None)  # at the same time by another call
        waits.append(server.wait(now))
        now += waits[-1]
    assert waits[:3] == pytest.approx([0.05, 0.1, 0.2]) and waits[-1] == pytest.approx(LONGEST_PAUSE)


def test_addresses_are_read_as_openais_clients_read_them() -> None:
    assert parse_url("http://localhost:8000") == parse_url(" http://localhost:8000/v1/") == "http://localhost:8000/v1"
    server = Server(parse_url("https://host/api/openai/v1"))
    assert server.place("/v1/chat/completions") == "https://host/api/openai/v1/chat/completions"
    wrongs = ("localhost:8000", "ftp://a", "http://me:secret@host/v1", "http://host/v1?key=secret", "")
    ports = ("http://host:99999/v1", "http://host:port/v1", "http://host:-1/v1", "http://me:secret@host:99999")
    for wrong in (*wrongs, *ports, "http://[::1/v1", "http://a b/v1", "http://a\nb/v1", "http://"):
        with pytest.raises(UsageError) as caught:
            parse_url(wrong)
        assert "secret" not in str(caught.value) or "localhost" in wrong


@given(st.text(max_size=80), st.text(max_size=80))
def test_texts_that_begin_alike_have_tokens_that_do(one: str, other: str) -> None:
    shared = 0
    while shared < min(len(one.encode()), len(other.encode())) and one.encode()[shared] == other.encode()[shared]:
        shared += 1
    first, second = as_tokens(one), as_tokens(other)
    assert isinstance(first, array) and len(first) >= 1 and min(first) >= 0 and max(first) < 1 << 16
    assert first[: shared // 2] == second[: shared // 2]


def test_tools_and_turns_stand_where_templates_put_them() -> None:
    turns = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    text = prompt_text("/v1/chat/completions", {"messages": turns, "tools": [{"name": "f"}]})
    assert text.index('"f"') < text.index("Be brief") < text.index("Hi")
