"""Answers have the shapes that clients of OpenAI and vLLM read, and depend on their line alone."""

from __future__ import annotations

import json
import math
from array import array
from typing import Any

from byte_text import EOS, FIRST, ByteTokenizer, row_encoder

from shoal.core.errors import RowError
from shoal.core.types import TokenScore
from shoal.jobs.answer import AnswerWriter, PromptAnswers, Sample
from shoal.jobs.prompt import PromptTemplate
from shoal.jobs.schema import parse_line
from shoal.jobs.settings import JobSettings

PRINT = "0123456789abcdef" * 4
WRITER = AnswerWriter(ByteTokenizer(), PRINT, "shoal")


def line(**body: Any) -> bytes:
    url = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    return json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body}).encode()


def ids(text: str) -> array[int]:
    return array("i", [FIRST + b for b in text.encode()])


def score(token: int, logprob: float = -0.5, top: tuple[tuple[int, float], ...] = ()) -> TokenScore:
    return TokenScore(token, logprob, 1, top)


def sample(text: str = "ok", **other: Any) -> Sample:
    tokens = array("i", [*ids(text), EOS])
    scores = [score(t, -float(i), ((t, -float(i)), (EOS, -9.0))) for i, t in enumerate(tokens)]
    return Sample(text, tokens, "stop", logprobs=scores, **other)


def answer(raw: bytes, *answers: PromptAnswers, writer: AnswerWriter = WRITER, job: JobSettings | None = None) -> Any:
    return json.loads(writer.answer(parse_line(raw, job or JobSettings()), answers))


HI = [{"role": "user", "content": "hi"}]


def test_a_chat_answer_has_every_field_of_the_batch_api() -> None:
    shown = answer(line(messages=HI, model="my-model"), PromptAnswers(ids("hi"), [sample()]))
    body = shown["response"]["body"]
    mark = body["id"].removeprefix("chatcmpl-")
    assert shown == {
        "id": f"batch_req_{mark}",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": f"req_{mark}", "body": body},
        "error": None,
    }
    assert body == {
        "id": f"chatcmpl-{mark}",
        "object": "chat.completion",
        "created": 0,
        "model": "my-model",
        "system_fingerprint": "fp_0123456789abcdef",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "ok"},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
    }


def test_a_line_is_a_function_of_its_input_line_and_the_fingerprint() -> None:
    raw = line(messages=HI)
    row = parse_line(raw, JobSettings())
    answers = [PromptAnswers(ids("hi"), [sample()])]
    assert WRITER.answer(row, answers) == WRITER.answer(parse_line(raw, JobSettings()), answers)
    retried = b'{"custom_id":"a","x_shoal":{"line":3,"request":%b}}' % raw
    assert WRITER.answer(parse_line(retried, JobSettings()), answers) == WRITER.answer(row, answers)
    other = AnswerWriter(ByteTokenizer(), "f" * 64, "shoal")
    assert other.answer(row, answers) != WRITER.answer(row, answers)
    dated = AnswerWriter(ByteTokenizer(), PRINT, "shoal", created=17)
    assert json.loads(dated.answer(row, answers))["response"]["body"]["created"] == 17
    assert b"\n" not in WRITER.answer(row, answers)


def test_choices_are_numbered_over_prompts_and_samples() -> None:
    answers = [PromptAnswers(ids(p), [sample(p + "0"), sample(p + "1")]) for p in ("x", "yy")]
    body = answer(line(prompt=["x", "yy"], n=2), *answers)["response"]["body"]
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "x0"), (1, "x1"), (2, "yy0"), (3, "yy1")]
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 14, "total_tokens": 17}  # a prompt counts once


def test_chat_logprobs_have_bytes_and_alternatives() -> None:
    shown = answer(line(messages=HI, logprobs=True, top_logprobs=1), PromptAnswers(ids("hi"), [sample("é")]))
    first, _, last = shown["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert first == {
        "token": "\ufffd",
        "logprob": 0.0,
        "bytes": [0xC3],
        "top_logprobs": [{"token": "\ufffd", "logprob": 0.0, "bytes": [0xC3]}],
    }
    assert last["token"] == "" and last["bytes"] == []
    shown = answer(line(messages=HI, logprobs=True), PromptAnswers(ids("hi"), [sample()]))
    assert shown["response"]["body"]["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_echoed_prompts_are_scored_from_their_second_token() -> None:
    """What lm-eval asks and reads: one more score than prompt tokens, the first null, the best one's value equal."""
    prompt = ids("hey")
    scores = [score(t, -1.0, ((t, -1.0),)) for t in prompt[1:]]
    one = Sample("!", ids("!"), "length", logprobs=[score(ids("!")[0], -2.0, ((ids("!")[0], -2.0),))])
    raw = line(prompt=[list(prompt)], echo=True, logprobs=1, max_tokens=1, temperature=0)
    (choice,) = answer(raw, PromptAnswers(prompt, [one], scores))["response"]["body"]["choices"]
    assert choice["text"] == "hey!"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["h", "e", "y", "!"] and logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["token_logprobs"] == [None, -1.0, -1.0, -2.0]
    assert logprobs["top_logprobs"] == [None, {"e": -1.0}, {"y": -1.0}, {"!": -2.0}]
    for value, best in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert max(best.values()) == value
    nothing = Sample("", ids(""), "length")
    raw = line(prompt="hey", echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer(raw, PromptAnswers(prompt, [nothing], scores))["response"]["body"]["choices"]
    assert choice["text"] == "hey" and choice["logprobs"]["token_logprobs"] == [None, -1.0, -1.0]


def test_what_stands_before_score_from_has_no_score() -> None:
    prompt = ids("river")
    scores = [score(t, -float(i), ((t, -float(i)),)) for i, t in enumerate(prompt) if i]
    nothing = Sample("", ids(""), "length")
    raw = line(prompt="river", echo=True, logprobs=1, max_tokens=0, score_from=3)
    for known in (scores, scores[1:]):  # those of a whole block may have been computed
        (choice,) = answer(raw, PromptAnswers(prompt, [nothing], known))["response"]["body"]["choices"]
        assert choice["logprobs"]["tokens"] == list("river") and choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
        assert choice["logprobs"]["token_logprobs"] == [None, None, None, -3.0, -4.0]
        assert choice["logprobs"]["top_logprobs"] == [None, None, None, {"e": -3.0}, {"r": -4.0}]
    raw = line(prompt="river", prompt_logprobs=0, score_from=4)
    (choice,) = answer(raw, PromptAnswers(prompt, [sample("s")], scores))["response"]["body"]["choices"]
    assert [each and each[str(prompt[4])]["logprob"] for each in choice["prompt_logprobs"]] == [None] * 4 + [-4.0]


def test_of_tokens_that_read_the_same_the_likeliest_has_the_name() -> None:
    """Whoever asks whether a token was the best compares its own value with the largest."""
    halves = ids("éà")[1], ids("é")[0]  # parts of characters: both read as U+FFFD
    one = Sample("x", ids("x"), "length", logprobs=[score(halves[0], -2.0, ((halves[1], -0.5),))])
    (choice,) = answer(line(prompt="x", logprobs=1), PromptAnswers(ids("x"), [one]))["response"]["body"]["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-2.0] and choice["logprobs"]["top_logprobs"] == [{"\ufffd": -0.5}]


def test_without_echo_only_produced_tokens_are_listed() -> None:
    raw = line(prompt="hey", logprobs=1)
    (choice,) = answer(raw, PromptAnswers(ids("hey"), [sample("ab")]))["response"]["body"]["choices"]
    assert choice["logprobs"]["tokens"] == ["a", "b", ""] and choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert choice["logprobs"]["top_logprobs"][1] == {"b": -1.0}


def test_prompt_logprobs_are_in_the_dialect_of_vllm() -> None:
    scores = [TokenScore(FIRST + 98, -3.0, 7, ((FIRST + 99, -0.1), (FIRST + 98, -3.0)))]
    answers = PromptAnswers(ids("ab"), [sample()], scores)
    expected = [
        None,
        {
            str(FIRST + 98): {"logprob": -3.0, "rank": 7, "decoded_token": "b"},
            str(FIRST + 99): {"logprob": -0.1, "rank": 1, "decoded_token": "c"},
        },
    ]
    assert (
        answer(line(prompt="ab", prompt_logprobs=1), answers)["response"]["body"]["choices"][0]["prompt_logprobs"]
        == expected
    )
    assert answer(line(messages=HI, prompt_logprobs=1), answers)["response"]["body"]["prompt_logprobs"] == expected


def test_impossible_tokens_have_a_number_that_json_can_hold() -> None:
    one = Sample("a", ids("a"), "length", logprobs=[score(FIRST + 97, -math.inf)])
    shown = answer(line(prompt="x", logprobs=0), PromptAnswers(ids("x"), [one]))
    assert shown["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_token_ids_come_back_where_asked() -> None:
    answers = PromptAnswers(ids("x"), [sample("a")])
    (choice,) = answer(line(prompt="x", return_token_ids=True), answers)["response"]["body"]["choices"]
    assert choice["prompt_token_ids"] == list(ids("x")) and choice["token_ids"] == [*ids("a"), EOS]
    body = answer(line(messages=HI, return_token_ids=True), answers)["response"]["body"]
    assert body["prompt_token_ids"] == list(ids("x")) and body["choices"][0]["token_ids"] == [*ids("a"), EOS]
    raw = line(prompt="x", logprobs=0, return_tokens_as_token_ids=True)
    (choice,) = answer(raw, answers)["response"]["body"]["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{t}" for t in (*ids("a"), EOS)]


def test_stop_reasons_are_told() -> None:
    stopped = Sample("a", ids("a"), "stop", stop_reason="\n")
    (choice,) = answer(line(prompt="x"), PromptAnswers(ids("x"), [stopped]))["response"]["body"]["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "\n")


PLAIN = JobSettings(prompt=PromptTemplate.parse("{text}"))


def test_a_plain_row_comes_back_with_its_columns_as_they_were() -> None:
    raw = b'{"text": "x", "big": 123456789012345678901234567890, "exact": 1.50, "answer": "mine", "none": null}'
    row = parse_line(raw, PLAIN)
    shown = WRITER.answer(row, [PromptAnswers(ids("x"), [sample()])])
    assert shown == (
        b'{"text":"x","big":123456789012345678901234567890,"exact":1.50,"answer":"mine","none":null,'
        b'"answer_shoal":"ok","finish_reason":"stop","prompt_tokens":1,"completion_tokens":3}'
    )
    two = json.loads(WRITER.answer(row, [PromptAnswers(ids("x"), [sample("a"), sample("b")])]))
    assert two["answer_shoal"] == ["a", "b"] and two["finish_reason"] == ["stop", "stop"]


def test_a_plain_row_can_come_back_as_an_envelope() -> None:
    writer = AnswerWriter(ByteTokenizer(), PRINT, "shoal", envelopes=True)
    shown = answer(b'{"text": "x"}', PromptAnswers(ids("x"), [sample()]), writer=writer, job=PLAIN)
    assert shown["custom_id"] is None and shown["response"]["body"]["choices"][0]["text"] == "ok"
    assert shown["response"]["body"]["model"] == "shoal"


def test_a_failure_has_the_shape_of_openai_and_its_request() -> None:
    raw = line(prompt="x" * 600)
    (error,) = row_encoder().encode([raw])
    assert isinstance(error, RowError)
    shown = json.loads(WRITER.failure(3, raw, error))
    assert shown["custom_id"] == "a" and shown["error"] is None
    assert shown["response"]["status_code"] == 400
    detail = shown["response"]["body"]["error"]
    assert detail["type"] == "invalid_request_error" and detail["code"] == "context_length_exceeded"
    assert detail["param"] == "prompt" and "shorten" in detail["message"]
    assert shown["x_shoal"] == {"line": 3, "fault": "yours", "request": json.loads(raw)}
    assert raw in WRITER.failure(3, raw, error)  # byte for byte


def test_failures_of_ours_and_rows_that_never_ran_look_different() -> None:
    raw = line(prompt="x")
    died = json.loads(WRITER.failure(1, raw, RowError("the engine died twice", "engine_died")))
    assert died["response"]["status_code"] == 500
    assert died["response"]["body"]["error"]["type"] == "server_error"
    late = json.loads(WRITER.failure(1, raw, RowError("too late", "batch_expired")))
    assert late["response"] is None and late["error"] == {"code": "batch_expired", "message": "too late"}
    wrong = json.loads(WRITER.failure(1, raw, RowError("no such model", "model_not_found", "model")))
    assert wrong["response"]["status_code"] == 404


def test_a_retried_failure_keeps_its_first_line() -> None:
    raw = line(prompt="x")
    once = WRITER.failure(7, raw, RowError("m", "engine_died"))
    assert WRITER.failure(1, once, RowError("m", "engine_died")) == once


def test_failed_plain_rows_are_plain_rows_again() -> None:
    failed = WRITER.failure(5, b'{"text": "x"}', RowError("m", "engine_died"))
    row = parse_line(failed, PLAIN)
    assert row.prompts == ["x"] and row.line == 5 and set(row.columns or {}) == {"text"}
