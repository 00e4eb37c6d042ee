"""Whatever bytes a line holds: it becomes a row or a RowError, and its error line is an input with the same end."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from byte_text import ByteTokenizer, row_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from mutate import HUGE_LINE, mutants, write_file

from shoal.core.errors import RowError
from shoal.jobs.answer import AnswerWriter
from shoal.jobs.encode import Encoded
from shoal.jobs.prompt import PromptTemplate
from shoal.jobs.read import Source
from shoal.jobs.schema import parse_line
from shoal.jobs.settings import JobSettings

LINES = 4000
WRITER = AnswerWriter(ByteTokenizer(), "f" * 64, "m")
SETTINGS = (
    JobSettings(),
    JobSettings(strict=True, model="m"),
    JobSettings(prompt=PromptTemplate.parse("{text}")),
    JobSettings(chat=True),
)


def test_every_mutated_line_is_a_row_or_a_row_error(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    write_file(path, mutants(LINES, seed=2, huge_lines=1))
    expected = dict(enumerate(mutants(LINES, seed=2, huge_lines=1), 1))
    encoder = row_encoder(context=2048)
    seen: Counter[str] = Counter()
    with Source(path) as source:
        for line, offset, length in source:
            mutant = expected.pop(line)
            (result,) = encoder.encode([source.read(offset, length)])
            assert isinstance(result, (Encoded, RowError))
            if mutant.good is not None and mutant.kind != "duplicate custom_id":
                assert isinstance(result, Encoded) == mutant.good, (mutant.kind, mutant.raw[:300], result)
            seen[mutant.kind] += 1
        assert source.num_lines == LINES
    assert all(not mutant.raw.strip() for mutant in expected.values())  # blank lines are no rows
    assert len(seen) >= 23 and min(seen.values()) >= 1


def test_an_error_line_is_an_input_that_fails_alike() -> None:
    encoder = row_encoder(context=2048)
    for number, mutant in enumerate(mutants(LINES, seed=3), 1):
        raw = mutant.raw.removesuffix(b"\r")
        (first,) = encoder.encode([raw])
        if not isinstance(first, RowError) or not raw.strip():
            continue
        error_line = WRITER.failure(number, raw, first)
        shown = json.loads(error_line)
        assert set(shown) == {"id", "custom_id", "response", "error", "x_shoal"}
        assert shown["response"]["body"]["error"]["code"] == first.code
        (second,) = encoder.encode([error_line])
        assert isinstance(second, RowError), raw
        if second.code != "request_missing":
            assert second.code == first.code, (raw[:300], str(first), str(second))
        again = json.loads(WRITER.failure(1, error_line, second))
        assert again["x_shoal"] == shown["x_shoal"]
        assert again["id"] == shown["id"]


def test_a_line_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * HUGE_LINE + b'"}\n{}\n')
    with Source(path) as source:
        places = list(source)
        raws = [source.read(offset, length) for _, offset, length in places]
    assert [line for line, _, _ in places] == [1, 2] and raws == [None, b"{}"]
    (result, _) = row_encoder().encode(raws)
    assert isinstance(result, RowError) and result.code == "line_too_long"
    shown = json.loads(WRITER.failure(1, None, result))
    assert shown["x_shoal"] == {"line": 1, "fault": "yours", "request": None}


def test_bytes_that_are_not_utf8_never_become_another_request() -> None:
    for place in (b"Gr\xf6\xdfe", b"\\\xff", b"\xff"):
        request = json.dumps(good_request_of("XX")).encode().replace(b"XX", place)
        (first,) = row_encoder().encode([request])
        assert isinstance(first, RowError)
        (second,) = row_encoder().encode([WRITER.failure(1, request, first)])
        assert isinstance(second, RowError)


def good_request_of(prompt: str) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 2}
    return {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}


def check_only_row_errors(raw: bytes) -> None:
    for job in SETTINGS:
        try:
            parse_line(raw, job)
        except RowError as error:
            json.loads(WRITER.failure(1, raw, error))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_row_or_a_row_error(raw: bytes) -> None:
    check_only_row_errors(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    "messages prompt max_tokens n stop seed logprobs temperature tools response_format echo logit_bias".split()
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(FIELDS, JSON, max_size=4), st.sampled_from(["messages", "prompt"]), JSON)
def test_any_json_in_the_body_is_a_row_or_a_row_error(body: dict[str, Any], kind: str, value: Any) -> None:
    url = "/v1/chat/completions" if kind == "messages" else "/v1/completions"
    request = {"custom_id": "a", "method": "POST", "url": url, "body": {kind: value} | body}
    raw = json.dumps(request).encode()
    check_only_row_errors(raw)
    (result,) = row_encoder().encode([raw])
    assert isinstance(result, (Encoded, RowError))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_any_replaced_part_of_a_good_line_is_a_row_or_a_row_error(data: st.DataObject) -> None:
    raw = json.dumps(good_request_of("fish")).encode()
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, min(len(raw), start + 8)))
    check_only_row_errors(raw[:start] + data.draw(st.binary(max_size=8)) + raw[end:])
