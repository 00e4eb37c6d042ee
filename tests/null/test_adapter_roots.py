"""Keys and values computed under one adapter are never read under another, and no plan counts on it."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Sequence

import pytest
from adversary import EVERY
from byte_text import row_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_jobs import Line, plan_of

from shoal.core.clock import SimClock
from shoal.core.errors import RowError, UsageError
from shoal.core.types import Request, Sampling, Step, root_of
from shoal.engine import Engine
from shoal.jobs.encode import Encoded
from shoal.jobs.options import parse_adapters
from shoal.jobs.prompt import PromptTemplate
from shoal.jobs.settings import JobSettings, parse_defaults
from shoal.sched.policy import Policy
from shoal.sched.scheduler import Scheduler
from shoal.sim.echo import Done, EchoExecutor

BLOCK = 4
NAMES = ("", "fish", "bird")


class Rooted:
    """An echo engine that also remembers under which root each position was written, and refuses all other readers."""

    def __init__(self, num_blocks: int, clock: SimClock) -> None:
        self._echo = EchoExecutor(num_blocks, BLOCK, clock)
        self._root = [[""] * BLOCK for _ in range(num_blocks)]
        self.shared = 0  # positions read that an earlier row wrote

    def submit(self, step: Step) -> Done:
        done = self._echo.submit(step)
        for move in step.moves:
            self._root[move.dst][: move.tokens] = self._root[move.src][: move.tokens]
        for part in step.slices:
            for position in range(part.start, part.start + len(part.tokens) + part.draft):
                self._root[part.blocks[position // BLOCK]][position % BLOCK] = self._mark(part.ticket)
        for part in step.slices:
            for position in range(part.start):
                found = self._root[part.blocks[position // BLOCK]][position % BLOCK]
                assert found == self._mark(part.ticket), (found, part.ticket)
            self.shared += part.start * (len(part.tokens) > 1)
        return done

    def _mark(self, ticket: int) -> str:
        request = self._echo.requests[ticket]
        return f"{request.adapter!r} {request.salt!r}"


def rows(seed: int, count: int = 30) -> list[Request]:
    """The same few prompts over and over, under every adapter and salt."""
    luck = random.Random(seed)
    heads = [[luck.randrange(2, 9) for _ in range(luck.randrange(5, 30))] for _ in range(2)]
    return [
        Request(
            f"r{i}",
            array("i", luck.choice(heads) + [luck.randrange(2, 4) for _ in range(luck.randrange(1, 6))]),
            Sampling(max_tokens=luck.randrange(1, 6)),
            adapter=luck.choice(NAMES),
            salt=luck.choice(("", "", "fish")),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("policy", EVERY, ids=lambda each: each.__name__)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), blocks=st.sampled_from([14, 30, 300]), ahead=st.integers(0, 1))
def test_nothing_is_read_under_another_adapter(policy: type[Policy], seed: int, blocks: int, ahead: int) -> None:
    clock = SimClock()
    executor = Rooted(blocks, clock)
    engine = Engine(Scheduler(policy(), blocks, BLOCK), executor, clock, ahead)
    for request in rows(seed):
        assert engine.add(request) is None
    while engine.busy:
        engine.step()
        if engine.wait_until is not None:
            clock.advance_to(engine.wait_until)


def test_rows_of_one_adapter_share() -> None:
    clock = SimClock()
    executor = Rooted(300, clock)
    engine = Engine(Scheduler(Policy(), 300, BLOCK), executor, clock, 0)
    for request in rows(1):
        engine.add(request)
    while engine.busy:
        engine.step()
    assert engine.scheduler.counters.cached > 100


names = st.text(st.characters(exclude_characters="\0"), max_size=3)


@given(names, st.text(max_size=3), names, st.text(max_size=3))
def test_no_two_pairs_of_adapter_and_salt_have_one_root(a: str, b: str, c: str, d: str) -> None:
    assert (root_of(a, b) == root_of(c, d)) == ((a, b) == (c, d))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.lists(st.integers(2, 4), min_size=1, max_size=12)), min_size=1))
def test_a_plan_counts_on_sharing_within_an_adapter_alone(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[str, list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("plan")

    def bound(name: str, rows: Sequence[tuple[str, list[int]]]) -> int:
        (folder / name).mkdir()
        return plan_of(
            [Line((tuple(prompt),), root=root_of(adapter, "")) for adapter, prompt in rows], folder / name
        ).bound

    parts = [[row for row in asked if row[0] == name] for name in NAMES]
    assert bound("all", asked) == sum(bound(f"part{i}", part) for i, part in enumerate(parts) if part)


# -- rows name adapters -------------------------------------------------------------------------------


def line(model: str | None, **body: object) -> bytes:
    body = {"prompt": "a", "max_tokens": 2, **body, **({} if model is None else {"model": model})}
    return json.dumps({"custom_id": "r", "method": "POST", "url": "/v1/completions", "body": body}).encode()


def encode(raw: bytes, settings: JobSettings) -> Encoded | RowError:
    return row_encoder(settings).encode([raw])[0]


@given(st.sampled_from((None, "base", "fish", "bird")), st.sampled_from((None, "salt")))
def test_a_rows_plan_and_its_requests_have_the_same_root(model: str | None, salt: str | None) -> None:
    rows = row_encoder(JobSettings(model="base", adapters=("fish", "bird")))
    raw = line(model, **({"cache_salt": salt} if salt else {}))
    (planned,) = rows.encode([raw])
    assert isinstance(planned, Encoded)
    (request,) = rows.requests(1, rows.parse(raw), 0, planned.prompts[0])
    assert request.adapter == (model if model in ("fish", "bird") else "")
    assert planned.root == request.root == root_of(request.adapter, salt or "")


def test_an_unknown_name_fails_its_own_row_where_there_are_adapters() -> None:
    for strict in (False, True):
        settings = JobSettings(model="base", adapters=("fish",), strict=strict)
        error = encode(line("fisch"), settings)
        assert isinstance(error, RowError) and error.code == "model_not_found"
        assert "'fisch'" in str(error) and "base, fish" in str(error)
        assert isinstance(encode(line("fish"), settings), Encoded)
        assert isinstance(encode(line("base"), settings), Encoded)
        assert isinstance(encode(line(None), settings), RowError if strict else Encoded)
    assert isinstance(encode(line("fisch"), JobSettings(model="base")), Encoded)


def test_an_adapter_may_be_the_model_of_rows_that_name_none() -> None:
    defaults = parse_defaults({"model": "fish"}, {"fish": "folder"})
    settings = JobSettings(model="base", adapters=("fish", "bird"), defaults=defaults)
    for model, root in ((None, "fish"), ("bird", "bird"), ("base", "")):
        planned = encode(line(model), settings)
        assert isinstance(planned, Encoded) and planned.root == root
    plain = JobSettings(
        model="base", adapters=("fish",), prompt=PromptTemplate.parse("{text}"), defaults=defaults, strict=True
    )
    planned = encode(b'{"text": "a"}', plain)
    assert isinstance(planned, Encoded) and planned.root == "fish"
    with pytest.raises(UsageError, match="model"):
        parse_defaults({"model": "bird"}, {"fish": "folder"})


def test_adapters_are_given_as_names_with_folders() -> None:
    assert parse_adapters(["a=x", "b=y=z"]) == {"a": "x", "b": "y=z"}
    for wrong in (["a"], ["=x"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(UsageError, match="--adapter"):
            parse_adapters(wrong)
