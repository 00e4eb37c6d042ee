"""Embedding rows through the whole job: answered once, in order, in OpenAI's shape, whatever happens meanwhile."""

from __future__ import annotations

import base64
import json
import sqlite3
import struct
from array import array
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest
from echo_job import EchoJob, Mortal, Watched, interrupt
from encoder_folder import BEGIN, CONTEXT, END, WIDTH, WORDS, write_encoder
from several import Several, run_on

from shoal.client import InProcess
from shoal.core.clock import SimClock
from shoal.core.types import TOKEN, Answer, Request, Sampling
from shoal.engine import Engine
from shoal.jobs.options import Order
from shoal.sched.policies.whole import WholePolicy
from shoal.sched.policy import Budget
from shoal.sched.scheduler import Scheduler
from shoal.sim.echo import EchoExecutor

SEATS = 40


def encoder_backend(tokens: int = 64, ahead: int = 1) -> InProcess:
    """An engine as an encoder has it, over an executor that hashes."""
    scheduler = Scheduler(WholePolicy(Budget(tokens, 16), CONTEXT), SEATS, CONTEXT, reuse=False)
    clock = SimClock()
    return InProcess(Engine(scheduler, EchoExecutor(SEATS, CONTEXT, clock), clock, ahead))


class MortalEncoder(Mortal):
    """An engine process that ends in its third round, the first time."""

    def __init__(self, threads: int = 0, cores: Sequence[int] = ()) -> None:
        super().__init__(threads, cores)
        self._backend = encoder_backend()

    def dies(self, running: set[int]) -> bool:
        return self.number == 1 and self.rounds == 3


class SeveralEncoders(Several):
    """Encoders beside each other, of which the first ends in its third round."""

    def __init__(self, threads: int = 0, cores: Sequence[int] = ()) -> None:
        super().__init__(threads, cores)
        self._backend = encoder_backend()

    def dies(self, running: set[int]) -> bool:
        return self.number == 1 and self.rounds == 3


def embedding(number: int, given: Any, url: str = "/v1/embeddings", **body: Any) -> str:
    """A row that wants vectors."""
    line = {"custom_id": f"r{number}", "method": "POST", "url": url, "body": {"model": "any", "input": given, **body}}
    return json.dumps(line)


def some_text(luck: Random, most: int = CONTEXT - 2) -> str:
    return " ".join(luck.choices(WORDS[3:], k=luck.randrange(1, most + 1)))


def many_rows(count: int = 150) -> list[str]:
    luck = Random(6)
    rows = []
    for number in range(count):
        texts: Any = [some_text(luck) for _ in range(luck.randrange(1, 4))]
        more = {"encoding_format": "base64"} if number % 7 == 0 else {}
        rows.append(embedding(number, texts[0] if number % 2 else texts, **more))
    return rows


@pytest.fixture
def embed(job: Callable[..., EchoJob], tmp_path: Path) -> Callable[..., EchoJob]:
    """Makes jobs over an encoder."""
    folder = write_encoder(tmp_path / "model")
    return lambda rows, **options: job(rows, model=str(folder), **options)


@pytest.fixture
def unbroken_vectors(embed: Callable[..., EchoJob]) -> tuple[bytes, bytes]:
    whole = embed(many_rows())
    assert whole.run(encoder_backend()) == 0
    return whole.final()


def bodies(job: EchoJob) -> list[dict[str, Any]]:
    return [line["response"]["body"] for line in job.answers()]


def test_answers_have_openais_shape_in_the_order_of_the_input(embed: Callable[..., EchoJob]) -> None:
    made = embed([embedding(1, "one two three"), embedding(2, ["ten", "one two three"]), embedding(3, [3, 4, 5])])
    assert made.run(encoder_backend()) == 0
    first, second, third = bodies(made)
    assert [line["custom_id"] for line in made.answers()] == ["r1", "r2", "r3"]
    assert set(first) == {"object", "data", "model", "usage"} and first["object"] == "list"
    assert first["usage"] == {"prompt_tokens": 5, "total_tokens": 5}, "the ends count"
    assert second["usage"]["prompt_tokens"] == 3 + 5 and third["usage"]["prompt_tokens"] == 3, "ids are taken as given"
    assert [(each["object"], each["index"]) for each in second["data"]] == [("embedding", 0), ("embedding", 1)]
    assert second["data"][1]["embedding"] == first["data"][0]["embedding"] != second["data"][0]["embedding"]
    assert all(isinstance(number, float) for number in first["data"][0]["embedding"])


def test_base64_holds_the_same_numbers(embed: Callable[..., EchoJob]) -> None:
    made = embed([embedding(1, "one"), embedding(2, "one", encoding_format="base64")])
    assert made.run(encoder_backend()) == 0
    floats, packed = (body["data"][0]["embedding"] for body in bodies(made))
    data = base64.b64decode(packed)
    assert list(struct.unpack(f"<{len(data) // 4}f", data)) == floats


def test_special_tokens_can_be_left_out(embed: Callable[..., EchoJob]) -> None:
    made = embed([embedding(1, "one two", add_special_tokens=False), embedding(2, [3, 4])])
    assert made.run(encoder_backend()) == 0
    bare, given = bodies(made)
    assert bare["data"] == given["data"] and bare["usage"] == given["usage"]


def test_a_text_that_is_too_long_fails_or_is_cut_between_its_ends(embed: Callable[..., EchoJob]) -> None:
    words = ["one", "two"] * CONTEXT
    rows = [
        embedding(1, " ".join(words)),
        embedding(2, " ".join(words), truncate_prompt_tokens=-1),
        embedding(3, " ".join(words), truncate_prompt_tokens=5),
        embedding(4, [3] * (CONTEXT + 1)),
        embedding(5, [3] * (CONTEXT + 1), truncate_prompt_tokens=CONTEXT),
        embedding(6, "one two", truncate_prompt_tokens=CONTEXT),
        embedding(7, " ".join(words), truncate_prompt_tokens=CONTEXT + 1),
        embedding(8, "one", truncate_prompt_tokens=0),
    ]
    made, seen = embed(rows), Watched(encoder_backend(), lambda _: None)
    assert made.run(seen) == 3
    assert [line["custom_id"] for line in made.failures()] == ["r1", "r4", "r7", "r8"]
    assert made.codes() == ["context_length_exceeded"] * 3 + ["empty_prompt"]
    message = made.failures()[0]["response"]["body"]["error"]["message"]
    assert f"takes {CONTEXT} tokens" in message and f"has {2 * CONTEXT + 2}" in message
    sent = {request.id.split(".")[0]: list(request.prompt) for request in seen.submitted}
    ids = [WORDS.index(word) for word in words]
    assert sent["2"] == [BEGIN, *ids[: CONTEXT - 2], END] and sent["3"] == [BEGIN, *ids[:3], END]
    assert sent["5"] == [3] * CONTEXT and sent["6"] == [BEGIN, 3, 4, END]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (embedding(1, []), "invalid_request"),
        (embedding(1, ["one", 3]), "invalid_request"),
        (embedding(1, None), "invalid_request"),
        (embedding(1, [len(WORDS)]), "invalid_token"),
        (embedding(1, [[3], [-1]]), "invalid_token"),
        (embedding(1, [[]]), "empty_prompt"),
        (embedding(1, "one", dimensions=WIDTH - 1), "not_supported"),
        (embedding(1, "one", encoding_format="hex"), "invalid_request"),
        (embedding(1, "one", temperature=0), "unknown_field"),
        (embedding(1, "one", max_tokens=4), "unknown_field"),
        (embedding(1, "one", n=2), "unknown_field"),
        (embedding(1, "one", prompt="one"), "unknown_field"),
        (embedding(1, "one", "/v1/completions"), "unknown_field"),
        (embedding(1, "one", "/v1/embedding"), "url_not_supported"),
        ('{"custom_id": "r1", "method": "POST", "url": "/v1/embeddings", "body": {}}', "missing_field"),
        (
            '{"custom_id": "r1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "one"}}',
            "not_supported",
        ),
        (
            '{"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", '
            '"body": {"messages": [{"role": "user", "content": "one"}]}}',
            "not_supported",
        ),
    ],
)
def test_what_cannot_be_embedded_fails_its_own_row(embed: Callable[..., EchoJob], row: str, code: str) -> None:
    made = embed([row, embedding(2, "two", user="me", dimensions=WIDTH)])
    assert made.run(encoder_backend()) == 3
    assert made.codes() == [code] and [line["custom_id"] for line in made.answers()] == ["r2"]


def test_a_model_that_makes_texts_refuses_to_embed(job: Callable[..., EchoJob]) -> None:
    made = job([embedding(1, "one")])
    assert made.run() == 3 and made.codes() == ["not_supported"]


def test_defaults_for_all_rows_hold_where_they_mean_something(embed: Callable[..., EchoJob]) -> None:
    made = embed([embedding(1, "one"), embedding(2, "two", encoding_format="float")], body={"temperature": 0.0})
    assert made.run(encoder_backend()) == 0
    packed = embed(
        [embedding(1, "one"), embedding(2, "two", encoding_format="float")], body={"encoding_format": "base64"}
    )
    assert packed.run(encoder_backend()) == 0
    kinds = [type(body["data"][0]["embedding"]) for body in bodies(packed)]
    assert kinds == [str, list]


def test_texts_are_computed_whole_by_length_and_none_twice(embed: Callable[..., EchoJob]) -> None:
    rows = many_rows()
    made, seen = (
        embed([*rows, *(row.replace('"r', '"again') for row in rows)]),
        Watched(encoder_backend(), lambda _: None),
    )
    assert made.run(seen) == 0
    lengths = [len(request.prompt) for request in seen.submitted]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 10
    assert all(request.answer is Answer.VECTOR for request in seen.submitted)
    lines = {int(request.id.split(".")[0]) for request in seen.submitted}
    assert max(lines) <= len(rows), "a row that asks for what an earlier one asks for is not run"
    report = made.report
    assert report.problems() == [] and report.reused.duplicates >= len(rows)
    assert report.tokens.prompt_computed == report.tokens.prompt_bound == sum(lengths)
    assert report.tokens.output == 0 and report.tokens.prompt_recomputed == 0
    answers = made.answers()
    assert [a["response"]["body"] for a in answers[: len(rows)]] == [
        a["response"]["body"] for a in answers[len(rows) :]
    ]


@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_an_interrupted_job_goes_on_and_computes_nothing_again(
    embed: Callable[..., EchoJob], unbroken_vectors: tuple[bytes, bytes], at: int
) -> None:
    made = embed(many_rows())
    assert made.run(Watched(encoder_backend(), interrupt(at))) == 5
    with closing(sqlite3.connect(made.state / "journal.db")) as database:
        answered = {line for (line,) in database.execute("SELECT line FROM results")}
    assert len(answered) < len(made.rows)
    rest = Watched(encoder_backend(), lambda _: None)
    assert made.run(rest) == 0
    assert made.final() == unbroken_vectors
    assert not answered & {int(request.id.split(".")[0]) for request in rest.submitted}


def test_an_engine_that_dies_costs_no_row(embed: Callable[..., EchoJob], unbroken_vectors: tuple[bytes, bytes]) -> None:
    made = embed(many_rows())
    MortalEncoder.made = 0
    assert made.run_mortal(MortalEncoder) == 0
    assert MortalEncoder.made == 2 and made.final() == unbroken_vectors


def test_several_engines_leave_the_same_vectors(
    embed: Callable[..., EchoJob], unbroken_vectors: tuple[bytes, bytes]
) -> None:
    made = embed(many_rows())
    assert run_on(made, SeveralEncoders, "0,1,2") == 0
    report = made.report
    assert made.final() == unbroken_vectors and not report.problems() and report.engine_restarts == 1
    assert report.tokens.prompt_bound <= report.tokens.prompt_computed
    assert len(report.engines) == 3 and all(engine.rows > 0 for engine in report.engines)


@pytest.mark.parametrize("order", [Order.INPUT, Order.FINISH])
def test_other_orders_have_the_same_lines(
    embed: Callable[..., EchoJob], unbroken_vectors: tuple[bytes, bytes], order: Order
) -> None:
    made = embed(many_rows(), order=order)
    assert made.run(encoder_backend()) == 0
    assert sorted(made.final()[0].splitlines()) == sorted(unbroken_vectors[0].splitlines())


def test_a_cache_keeps_vectors_bit_by_bit(
    embed: Callable[..., EchoJob], tmp_path: Path, unbroken_vectors: tuple[bytes, bytes]
) -> None:
    for submitted in (True, False):
        made, seen = embed(many_rows(), cache=tmp_path / "cache"), Watched(encoder_backend(), lambda _: None)
        assert made.run(seen) == 0
        assert made.final() == unbroken_vectors and bool(seen.submitted) == submitted


def test_another_way_of_pooling_is_another_model(embed: Callable[..., EchoJob], tmp_path: Path) -> None:
    made = embed([embedding(1, "one"), embedding(2, "two")])
    assert made.run(encoder_backend()) == 0
    first = made.report.manifest
    pooling = tmp_path / "model" / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert made.run(encoder_backend(), restart=True) == 0
    assert made.report.manifest != first


def steps_of(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Lengths of the texts in each step."""
    backend = encoder_backend(tokens)
    steps: list[list[int]] = []
    submit = backend.engine.executor.submit

    def watch(step: Any) -> Any:
        steps.append([len(part.tokens) for part in step.slices])
        return submit(step)

    backend.engine.executor.submit = watch  # type: ignore[method-assign]
    sampling = Sampling(max_tokens=0)
    backend.submit(
        Request(str(i), array(TOKEN, [3] * n), sampling, Answer.VECTOR, index=i) for i, n in enumerate(lengths)
    )
    while backend.outputs() is not None:
        scheduler = backend.engine.scheduler
        scheduler.kv.audit(scheduler.live())
    return steps


@pytest.mark.parametrize("tokens", [CONTEXT, 37, 1000])
def test_no_text_is_cut_and_no_step_is_over_its_budget(tokens: int) -> None:
    luck = Random(tokens)
    lengths = [luck.randrange(1, CONTEXT + 1) for _ in range(300)]
    steps = steps_of(lengths, tokens)
    assert [n for step in steps for n in step] == lengths, "whole, and in the plan's order"
    assert all(sum(step) <= tokens and len(step) <= 16 for step in steps)
    assert all(
        sum(step) + after[0] > tokens or len(step) == 16 for step, after in zip(steps, steps[1:], strict=False)
    ), "a step ends only where the next text does not fit"
