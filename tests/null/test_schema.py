"""What a line may say, what is ignored, and what is refused with advice rather than answered wrongly."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from byte_text import BOS, EOS, FIRST, row_encoder

from shoal.core.errors import RowError, UsageError
from shoal.jobs.body import FIELDS
from shoal.jobs.encode import Encoded
from shoal.jobs.prompt import PromptTemplate
from shoal.jobs.schema import RowSpec, parse_line
from shoal.jobs.settings import JobSettings, parse_defaults

HI = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def line(**body: Any) -> bytes:
    """A line around a body; its url follows from the body."""
    url = COMPLETIONS if "prompt" in body else CHAT
    return json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body}).encode()


def refusal(raw: bytes, settings: JobSettings | None = None, **model: Any) -> RowError:
    (result,) = row_encoder(settings, **model).encode([raw])
    assert isinstance(result, RowError), result
    return result


def encoded(raw: bytes, settings: JobSettings | None = None, **model: Any) -> Encoded:
    (result,) = row_encoder(settings, **model).encode([raw])
    assert isinstance(result, Encoded), result
    return result


def parsed(raw: bytes, settings: JobSettings | None = None) -> RowSpec:
    return parse_line(raw, settings or JobSettings())


@pytest.mark.parametrize(
    "body",
    [
        {"user": 5, "metadata": {"deep": [[{}]]}, "store": None, "service_tier": "flex", "prediction": {"x": 1}},
        {"stream": False, "stream_options": {"include_usage": True}, "tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}, "structured_outputs": None, "guided_json": None, "logit_bias": {}},
        {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0.5, "n": 128, "seed": -(2**63), "stop": ["a"] * 16},
        {"max_completion_tokens": 4, "max_tokens": None, "modalities": ["text"], "parallel_tool_calls": True},
        {"logprobs": True, "top_logprobs": 20, "chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_what_changes_nothing_is_accepted(body: dict[str, Any]) -> None:
    assert encoded(line(messages=HI, **body)).prompts


@pytest.mark.parametrize(
    ("body", "code", "param", "advice"),
    [
        ({"stream": True}, "not_supported", "stream", "remove"),
        ({"tools": [{"type": "function"}]}, "missing_field", "function", "add it"),
        ({"response_format": {"type": "json_schema"}}, "missing_field", "json_schema", "add"),
        ({"response_format": {"type": "xml"}}, "invalid_request", "response_format.type", "xml"),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "invalid_request",
            "structured_outputs.structural_tag",
            "null",
        ),
        ({"structured_outputs": {"jsn": {}}}, "unknown_field", "jsn", "remove"),
        ({"guided_choice": []}, "invalid_constraint", "guided_choice", "at least one"),
        ({"guided_regex": "a", "guided_json": {}}, "invalid_constraint", "guided_regex", "exclude each other"),
        ({"guided_json": "{"}, "invalid_constraint", "guided_json", "not JSON"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "invalid_constraint", "guided_json", "uniqueItems"),
        ({"guided_grammar": "root ::= foo ["}, "invalid_constraint", "guided_grammar", "correct"),
        ({"temprature": 1}, "unknown_field", "temprature", "did you mean 'temperature'?"),
        ({"suffix": "x"}, "unknown_field", "suffix", "not a field of this url"),
        ({"temperature": -0.1}, "invalid_request", "temperature", ">= 0"),
        ({"temperature": "0"}, "invalid_request", "temperature", "expected `float"),
        ({"top_p": 0}, "invalid_request", "top_p", "> 0"),
        ({"n": 0}, "invalid_request", "n", ">= 1"),
        ({"seed": 2**63}, "invalid_request", "seed", "<= 9223372036854775807"),
        ({"stop": ["a"] * 17}, "invalid_request", "stop", "length <= 16"),
        ({"stop": ""}, "invalid_request", "stop", "length >= 1"),
        ({"logit_bias": {"5": 101}}, "invalid_request", "logit_bias[...]", "<= 100"),
        ({"logit_bias": {"1000": 1}}, "invalid_token", "logit_bias", "0 to 257"),
        ({"stop_token_ids": [258]}, "invalid_token", "stop_token_ids", "0 to 257"),
        ({"allowed_token_ids": [-1]}, "invalid_token", "allowed_token_ids", "0 to 257"),
        ({"max_tokens": 0}, "invalid_request", "max_tokens", "at least 1"),
        ({"max_tokens": 4, "min_tokens": 5}, "invalid_request", "min_tokens", "lower it"),
        ({"top_logprobs": 2}, "invalid_request", "top_logprobs", "logprobs: true"),
        ({"messages": []}, "invalid_request", "messages", "length >= 1"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "invalid_request", "messages[0].role", "the roles"),
        ({"messages": [{"role": "user"}]}, "missing_field", "content", "add it"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_request", None, "text only"),
        ({"chat_template_kwargs": {"messages": []}}, "invalid_request", "chat_template_kwargs", "messages"),
        ({"continue_final_message": True}, "invalid_request", "continue_final_message", "assistant"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "chat_template", None, "speaks first"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_advice(
    body: dict[str, Any], code: str, param: str | None, advice: str
) -> None:
    error = refusal(line(**{"messages": HI, **body}))
    assert error.code == code and advice in str(error), str(error)
    assert param is None or error.param == param


def test_prompts_come_in_four_forms() -> None:
    text = [FIRST + b for b in b"ab"]
    assert [list(p) for p in encoded(line(prompt="ab")).prompts] == [[BOS, *text]]
    assert [list(p) for p in encoded(line(prompt=["ab", "ab"])).prompts] == [[BOS, *text]] * 2
    assert [list(p) for p in encoded(line(prompt=[5, 6, 7])).prompts] == [[5, 6, 7]]
    assert [list(p) for p in encoded(line(prompt=[[5], [6, 7]])).prompts] == [[5], [6, 7]]
    assert [list(p) for p in encoded(line(prompt="ab", add_special_tokens=False)).prompts] == [text]
    for prompt in ([], ["a", 1], [[1], []], [[1], "a"], [258], [-1], [10**30], [[1.0]]):
        refusal(line(prompt=prompt))


def test_text_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    whole = encoded(line(messages=[{"role": "user", "content": "a\nb"}]))
    assert encoded(line(messages=[{"role": "user", "content": parts}])).prompts == whole.prompts


def test_the_context_is_a_limit_with_both_numbers() -> None:
    assert encoded(line(prompt=[5] * 12, max_tokens=4), context=16).max_tokens == 4
    assert encoded(line(prompt=[5] * 12), context=16).max_tokens == 4  # the rest of the context
    for body in ({"prompt": [5] * 12, "max_tokens": 5}, {"prompt": [5] * 16}):
        error = refusal(line(**body), context=16)
        assert error.code == "context_length_exceeded"
        assert "16 tokens" in str(error) and str(len(body["prompt"])) in str(error)
    cut = encoded(line(prompt=list(range(2, 30)), max_tokens=4, truncate_prompt_tokens=-1), context=16)
    assert list(cut.prompts[0]) == list(range(18, 30))
    assert refusal(line(prompt="a", max_tokens=10**9)).code == "context_length_exceeded"


def test_depth_has_a_limit_that_depends_on_nothing_else() -> None:
    def nested(depth: int) -> bytes:
        return line(prompt='a [[[ {{{ \\" [', metadata={"text": "[" * 5000}, user="[").replace(
            b'"user": "["', b'"user": ' + b"[" * depth + b"]" * depth
        )

    def deeper(frames: int, raw: bytes) -> Encoded | RowError:
        return deeper(frames - 1, raw) if frames else row_encoder().encode([raw])[0]

    for frames in (0, 500):
        assert isinstance(deeper(frames, nested(254)), Encoded)  # the envelope and the body are two levels more
        error = deeper(frames, nested(255))
        assert isinstance(error, RowError) and "nested" in str(error)


def test_no_row_may_become_the_whole_job() -> None:
    assert refusal(line(prompt=["x"] * 200, n=128)).code == "too_many_tasks"


def test_requests_carry_the_whole_body() -> None:
    body = {
        "prompt": [5, 6],
        "n": 2,
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 11,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {"9": 1, "8": -1},
        "allowed_token_ids": [9, 8, 9],
        "bad_words": ["ab"],
        "stop_token_ids": [7],
        "logprobs": 3,
        "echo": True,
        "cache_salt": "s",
    }
    encoder = row_encoder()
    row = encoder.parse(line(**body))
    (result,) = encoder.encode([line(**body)])
    assert isinstance(result, Encoded)
    first, second = encoder.requests(4, row, 0, result.prompts[0], 10, [((2, 11),), ()])
    assert (first.id, second.id) == ("4.0.0", "4.0.1")
    assert (first.index, second.index, first.future, second.future) == (10, 11, ((2, 11),), ())
    assert (first.score_from, first.score_top, second.score_from) == (1, 3, -1)  # the prompt is scored once
    assert first.root == result.root and first.salt == "s"
    sampling = first.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature, sampling.seed) == (9, 2, 0.5, 11)
    assert (sampling.top_k, sampling.top_p, sampling.min_p, sampling.logprobs) == (7, 0.9, 0.1, 3)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert sampling.logit_bias == ((8, -1.0), (9, 1.0)) and sampling.allowed == (8, 9)
    assert sampling.banned == ((FIRST + 97, FIRST + 98),) and sampling.stop == {7, EOS}
    assert (sampling.sample, second.sampling.sample) == (0, 1)


def sampling_of(raw: bytes, settings: JobSettings | None = None, number: int = 1, **model: Any) -> Any:
    encoder = row_encoder(settings, **model)
    return encoder.requests(number, encoder.parse(raw), 0, encoder.tokenizer.encode("ab"))[0].sampling


def test_a_row_wins_over_the_job_and_the_job_over_the_model() -> None:
    job = JobSettings(defaults=parse_defaults({"temperature": 0.3, "max_completion_tokens": 3}))
    assert sampling_of(line(prompt="ab")).temperature == 1.0
    assert sampling_of(line(prompt="ab"), top_k=5, temperature=0.6).temperature == 0.6
    assert sampling_of(line(prompt="ab"), job, top_k=5, temperature=0.6).temperature == 0.3
    assert sampling_of(line(prompt="ab", temperature=0.1), job, temperature=0.6).temperature == 0.1
    assert sampling_of(line(prompt="ab"), job).max_tokens == 3
    assert sampling_of(line(messages=HI, max_completion_tokens=2), job).max_tokens == 2


def test_greedy_leaves_nothing_to_chance() -> None:
    sampling = sampling_of(line(prompt="ab", temperature=1e-6, top_k=5, top_p=0.5, min_p=0.5))
    assert sampling.greedy and (sampling.top_k, sampling.top_p, sampling.min_p) == (0, 1.0, 0.0)


def test_ignore_eos_fixes_the_length() -> None:
    assert sampling_of(line(prompt="ab", ignore_eos=True)).stop == frozenset()
    assert encoded(line(prompt="ab", ignore_eos=True, max_tokens=5)).expect == 5
    assert encoded(line(prompt="ab", ignore_eos=True, max_tokens=5, stop="x")).expect is None
    assert encoded(line(prompt="ab", max_tokens=5)).expect is None


def test_a_seed_follows_the_custom_id_and_not_the_line() -> None:
    one = sampling_of(line(prompt="ab"), number=1).seed
    assert sampling_of(line(prompt="ab"), number=9).seed == one
    assert sampling_of(line(prompt="ab"), JobSettings(seed=1)).seed != one
    assert sampling_of(line(prompt="ab").replace(b'"a"', b'"b"')).seed != one
    plain = JobSettings(prompt=PromptTemplate.parse("{text}"))
    assert sampling_of(b'{"text": "x"}', plain, 1).seed != sampling_of(b'{"text": "x"}', plain, 2).seed
    retried = b'{"x_shoal": {"line": 2, "request": {"text": "x"}}}'
    assert sampling_of(retried, plain, 1).seed == sampling_of(b'{"text": "x"}', plain, 2).seed


def test_an_error_line_of_ours_is_its_request() -> None:
    raw = line(prompt="ab")
    failed = b'{"id":"x","custom_id":"a","response":null,"error":null,"x_shoal":{"line":7,"request":%b}}' % raw
    assert parsed(failed).line == 7
    assert parsed(failed).request == raw == parsed(raw).request
    assert encoded(failed) == encoded(raw)


def test_error_lines_of_others_say_what_is_missing() -> None:
    others = (
        b'{"id":"v","custom_id":"a","response":{"status_code":404,"body":null},"error":{"error":{"message":"m"}}}',
        b'{"id":"b","custom_id":"a","response":{"status_code":400,"body":{"error":{}}},"error":null}',
    )
    for other in others:
        error = refusal(other)
        assert error.code == "request_missing" and "'a'" in str(error)


def test_strict_jobs_serve_their_model_alone() -> None:
    strict = JobSettings(model="m", strict=True)
    assert encoded(line(prompt="a", model="m"), strict)
    assert refusal(line(prompt="a", model="x"), strict).code == "model_not_found"
    assert encoded(line(prompt="a", model="x"))


def test_a_template_names_columns_and_nothing_else() -> None:
    job = JobSettings(prompt=PromptTemplate.parse("{{{text}}}: {k} {k}"))
    row = parsed(b'{"text": "a", "k": [1, {"b": 2.50}], "other": 5}', job)
    assert row.prompts == ['{a}: [1, {"b": 2.50}] [1, {"b": 2.50}]']
    assert parsed(b'{"text": "{k}", "k": "{text}"}', job).prompts == ["{{k}}: {text} {text}"]  # filled once only
    for bad in ("{a.b}", "{a[0]}", "{a!r}", "{a:5}", "{}", "{a", "a}", "{__class__.x}"):
        with pytest.raises(UsageError):
            PromptTemplate.parse(bad)
    missing = refusal(b'{"text": "a", "other": 1}', job)
    assert missing.code == "missing_column" and "'k'" in str(missing) and "'text', 'other'" in str(missing)
    assert refusal(b'{"text": null, "k": 1}', job).code == "missing_column"
    assert refusal(b'["a"]', job).code == "malformed_row"


def test_plain_rows_can_be_chats() -> None:
    chat = JobSettings(chat=True)
    expected = encoded(line(messages=HI)).prompts
    assert encoded(b'{"prompt": "hi"}', chat).prompts == expected
    assert encoded(b'{"messages": [{"role": "user", "content": "hi"}]}', chat).prompts == expected
    assert encoded(b'{"q": "hi"}', JobSettings(chat=True, prompt=PromptTemplate.parse("{q}"))).prompts == expected


@pytest.mark.parametrize("fields", [{"max_tokens": -1}, {"foo": 1}, {"tools": [1]}, {"model": "x"}, {"messages": HI}])
def test_wrong_defaults_are_a_usage_error(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        parse_defaults(fields)


def test_defaults_fit_the_kind_of_body() -> None:
    job = JobSettings(defaults=parse_defaults({"logprobs": True, "stop": "x"}))
    assert parsed(line(messages=HI), job).logprobs == 0
    assert parsed(line(prompt="a"), job).logprobs == -1 and parsed(line(prompt="a"), job).stop == ("x",)


def test_a_fingerprint_changes_with_what_changes_tokens() -> None:
    prints = {
        row_encoder().fingerprint,
        row_encoder(context=64).fingerprint,
        row_encoder(JobSettings(chat=True)).fingerprint,
        row_encoder(JobSettings(defaults=parse_defaults({"max_tokens": 3}))).fingerprint,
    }
    assert len(prints) == 4 and row_encoder().fingerprint in prints


def test_a_stream_of_batches_is_encoded_like_each_batch() -> None:
    batches = [[line(prompt="a" * n), b"{}", None] for n in range(1, 6)]
    streamed = list(row_encoder().stream(batches))
    for got, batch in zip(streamed, batches, strict=True):
        for one, other in zip(got, row_encoder().encode(batch), strict=True):
            assert one == other if isinstance(one, Encoded) else str(one) == str(other)
    assert list(row_encoder().stream([])) == []


def test_the_document_of_formats_names_every_field() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    assert not set(FIELDS) - set(re.findall(r"`(\w+)`", text))
