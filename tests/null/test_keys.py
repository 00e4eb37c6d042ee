"""Two requests have one key when the engine would compute the same from them, and only then."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from byte_text import row_encoder

from shoal.core.errors import RowError
from shoal.core.types import Answer, Request, Sampling
from shoal.jobs import keys
from shoal.jobs.encode import RowEncoder
from shoal.jobs.settings import JobSettings

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0}


def asks(encoder: RowEncoder, name: str = "a", url: str = "chat/completions", **fields: Any) -> list[bytes]:
    body = {field: value for field, value in (BODY | fields).items() if value is not ...}
    if url == "completions":
        body.pop("messages", None)
    line = {"custom_id": name, "method": "POST", "url": f"/v1/{url}", "body": body}
    (found,) = encoder.encode([json.dumps(line).encode()])
    assert not isinstance(found, RowError), found
    return found.asks


SAME = [
    {},
    {"name": "another"},
    {"model": "any", "user": "me", "metadata": {"a": "b"}, "priority": 3},
    {"seed": 7},  # greedy rows draw no numbers
    {"n": 3},  # a key is of one request, its samples are numbered
    {"top_p": 0.5, "top_k": 3, "min_p": 0.1},
    {"max_tokens": ..., "max_completion_tokens": 5},
    {"temperature": 1e-6},
    {"stop": []},
    {"presence_penalty": 0, "repetition_penalty": 1, "min_tokens": 0, "logit_bias": {}},
    {"messages": [{"content": [{"text": "hello", "type": "text"}], "role": "user"}]},
    {"return_token_ids": True},  # how an answer is shown
    {"add_generation_prompt": True, "continue_final_message": False},
]


@pytest.mark.parametrize("fields", SAME, ids=str)
def test_what_changes_nothing_changes_no_key(fields: dict[str, Any]) -> None:
    encoder = row_encoder()
    assert asks(encoder, **fields) == asks(row_encoder()) and len(asks(encoder)) == 1


OTHER = [
    {"messages": [{"role": "user", "content": "hello "}]},
    {"messages": [{"role": "system", "content": "hello"}]},
    {"max_tokens": 6},
    {"max_tokens": ...},
    {"temperature": 0.5, "seed": 1},
    {"temperature": 0.5, "seed": 2},
    {"temperature": 0.6, "seed": 1},
    {"temperature": 0.5, "seed": 1, "top_p": 0.5},
    {"temperature": 0.5},
    {"temperature": 0.5, "name": "another"},
    {"stop": "x"},
    {"stop": ["x", "y"]},
    {"stop": ["y", "x"]},
    {"stop": "x", "include_stop_str_in_output": True},
    {"stop_token_ids": [40]},
    {"stop_token_ids": [1]},  # the model's own end, which is now a reason of the row
    {"min_tokens": 2},
    {"ignore_eos": True},
    {"skip_special_tokens": False},
    {"presence_penalty": 0.5},
    {"frequency_penalty": 0.5},
    {"repetition_penalty": 1.5},
    {"logit_bias": {"40": 3}},
    {"logit_bias": {"40": 4}},
    {"allowed_token_ids": [40, 41]},
    {"bad_words": ["hell"]},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 2},
    {"prompt_logprobs": 0},
    {"prompt_logprobs": 1},
    {"cache_salt": "mine"},
    {"structured_outputs": {"regex": "a+"}},
    {"structured_outputs": {"choice": ["a", "b"]}},
    {"structured_outputs": {"choice": ["b", "a"]}},
    {"url": "completions", "prompt": "hello"},
]


def test_everything_that_changes_an_answer_changes_the_key() -> None:
    encoder = row_encoder()
    found = [asks(encoder)[0], *(asks(encoder, **fields)[0] for fields in OTHER)]
    again = [asks(row_encoder(), **fields)[0] for fields in reversed(OTHER)]
    assert len(set(found)) == len(found)
    assert again[::-1] == found[1:], "a key does not depend on what was asked before"


def test_every_prompt_of_a_row_has_its_own_key() -> None:
    encoder = row_encoder()
    both = asks(encoder, url="completions", prompt=["one", "two"])
    assert both == asks(encoder, url="completions", prompt="one") + asks(encoder, url="completions", prompt="two")
    loose = asks(encoder, url="completions", prompt=["one", "one"], temperature=0.5)
    assert loose[0] != loose[1], "without a seed every prompt draws its own numbers"
    tight = asks(encoder, url="completions", prompt=["one", "one"], temperature=0.5, seed=1)
    assert tight[0] == tight[1]


def test_another_adapter_is_another_question_and_another_name_for_the_model_is_not() -> None:
    encoder = row_encoder(JobSettings(model="base", adapters=("fish", "bird")))
    found = [asks(encoder, **named)[0] for named in ({}, {"model": "base"}, {"model": "fish"}, {"model": "bird"})]
    assert found[0] == found[1] and len(set(found)) == 3


def test_rows_that_their_place_decides_have_no_key() -> None:
    encoder = row_encoder(JobSettings(chat=True))
    rows = [b'{"messages": [{"role": "user", "content": "hello"}]}'] * 2
    assert [row.asks for row in encoder.encode(rows)] == [[], []]


def test_no_field_of_a_request_is_forgotten() -> None:
    """A field that a later version adds is in the key, unless somebody says that it decides nothing."""
    encoder = row_encoder()
    row = encoder.parse(
        json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY}).encode()
    )
    plain = Request("a", encoder.tokenizer.encode("x"))
    other: dict[type, Any] = {
        int: 3,
        float: 0.5,
        str: "x",
        frozenset: frozenset((9,)),
        tuple: ((1, 2),),
        Answer: Answer.VECTOR,
    }
    for kind, skipped in ((Request, keys._NOT_COMPUTED), (Sampling, keys._APART)):
        for field in dataclasses.fields(kind):
            if field.name in skipped:
                continue
            value = getattr(plain if kind is Request else plain.sampling, field.name)
            change = {field.name: other.get(type(value), "another")}
            changed = (
                dataclasses.replace(plain, **change)
                if kind is Request
                else dataclasses.replace(plain, sampling=dataclasses.replace(plain.sampling, **change))
            )
            assert keys._canonical(changed, row) != keys._canonical(plain, row), field.name


def test_twins_ask_for_as_many_answers() -> None:
    one, two = b"1" * 16, b"2" * 16
    found = [keys.twin_key(asked, n) for asked in ([one], [two], [one, two], [two, one]) for n in (1, 2)]
    assert len(set(found)) == len(found) and keys.twin_key([], 1) == b""
