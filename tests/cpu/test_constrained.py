"""Rows under a constraint inside the engine: kept whatever stands beside them, and never answered freely."""

from __future__ import annotations

import json
import random
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from shoal.build import WallClock, build_engine
from shoal.core.config import EngineConfig
from shoal.core.types import TOKEN, Constraint, Finish, Request, Sampling, Start
from shoal.engine import Engine
from shoal.kernels import load
from shoal.llm import LLM, SamplingParams, StructuredOutputsParams
from shoal.nn import masks as nn_masks
from shoal.nn.masks import Masks
from shoal.nn.sampler import Sampler
from shoal.runtime.runner import ModelRunner
from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policy import Budget, Policy
from shoal.sched.scheduler import Scheduler
from shoal.text import constraint, grammar
from shoal.text.checkpoint import EMBEDDED
from shoal.text.grammar import Grammars
from shoal.text.tokenizer import Tokenizer
from tests.cpu.test_runner import Thief

TOKENIZER = Tokenizer.load(EMBEDDED)
STOP = TOKENIZER.eos
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}}},
    "required": ["name"],
    "additionalProperties": False,
}
JSON = constraint.json_schema(SCHEMA)
KERNELS = load("auto")


def masks() -> Masks:
    return Masks(lambda: Grammars(TOKENIZER, TOKENIZER.vocab_size))


def sampler_of(wanted: Constraint | None, produced: Sequence[int] = (), **wishes: Any) -> Sampler:
    """A sampler with masks and one ticket, 0."""
    wishes = {"stop": STOP, **wishes}
    request = Request("0", array(TOKEN, [5]), Sampling(**wishes), constraint=wanted)
    sampler = Sampler(TOKENIZER.vocab_size, KERNELS, masks())
    start = Start(0, request, array(TOKEN, produced))
    sampler.prepare(start)
    sampler.start(start)
    return sampler


def noise(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, TOKENIZER.vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def text_of(tokens: Sequence[int]) -> str:
    return TOKENIZER.decode(tokens)


# -- the sampler ------------------------------------------------------------------------------------


def test_the_best_token_is_the_best_that_may_come() -> None:
    logits = noise()
    may = sorted(TOKENIZER.encode(word, special=False)[0] for word in ("yes", "no"))
    sampler = sampler_of(constraint.choice(["yes", "no"]))
    found = sampler.sample(logits.clone(), [0]).tokens[0]
    assert text_of([found])[0] in "yn" and found != int(logits.argmax())
    assert int(logits[0, found] * 1000) >= int(logits[0, may].max() * 1000)
    sampler.close()


def test_log_probabilities_are_of_the_models_own_distribution_and_logits_are_as_before() -> None:
    logits = noise()
    before = logits.clone()
    sampler = sampler_of(JSON, logprobs=2)
    result = sampler.sample(logits, [0])
    assert torch.equal(logits, before)
    own = torch.log_softmax(before[0], 0)
    score = result.logprobs[0]
    assert score.logprob == pytest.approx(float(own[score.token]), abs=1e-4) and score.rank > 1
    assert [token for token, _ in score.top] == torch.topk(before[0], 2).indices.tolist()
    sampler.close()


def test_without_masks_a_constraint_is_an_error_and_its_neighbour_is_not() -> None:
    sampler = Sampler(TOKENIZER.vocab_size, KERNELS)
    for ticket, wanted in enumerate((JSON, None)):
        sampler.start(Start(ticket, Request(str(ticket), array(TOKEN, [5]), constraint=wanted), array(TOKEN)))
    result = sampler.sample(noise(2), [0, 1])
    assert set(result.errors) == {0} and set(result.tokens) == {1}


@pytest.mark.parametrize("seed", range(8))
def test_a_token_of_its_own_is_the_one_a_mask_leaves_also_among_equals_and_beside_what_is_no_number(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, stories, begin = random.Random(seed), list[list[int]](), Grammars.begin
    wanted = draw.choice((JSON, constraint.regex("[ab]{3,9}"), constraint.json_schema({"type": "array"})))
    for tries in (True, False):
        monkeypatch.setattr(Grammars, "begin", lambda self, *rest, tries=tries: begin(self, *rest[:5], tries))
        sampler, tokens = sampler_of(wanted, max_tokens=30), list[int]()
        while len(tokens) < 30 and not (tokens and tokens[-1] in STOP):
            logits = torch.round(noise(seed=100 * seed + len(tokens)) / 3)
            odd = random.Random(1000 * seed + len(tokens)).choices(range(TOKENIZER.vocab_size), k=2)
            logits[0, odd] = torch.tensor([float("nan"), float("inf")])
            result = sampler.sample(logits, [0])
            if 0 in result.errors:
                tokens.append(-1)
                break
            tokens += [result.tokens[0], *result.forced.get(0, ())]
        sampler.close()
        stories.append(tokens)
    assert stories[0] == stories[1]


def test_a_constraint_that_cannot_be_kept_is_its_rows_error_with_the_keyword() -> None:
    sampler = sampler_of(constraint.json_schema({"type": "array", "uniqueItems": True}))
    result = sampler.sample(noise(), [0])
    assert result.errors[0].startswith("constraint: ") and "uniqueItems" in result.errors[0] and not result.tokens
    sampler.close()


def test_wishes_and_constraints_meet() -> None:
    no = TOKENIZER.encode("no", special=False)[0]
    yes = tuple((i,) for i in range(TOKENIZER.vocab_size) if TOKENIZER.token_bytes(i).startswith(b"y"))
    wanted = constraint.choice(["yes", "no"])
    for wishes in ({"logit_bias": ((no, 100.0),)}, {"banned": yes}, {"allowed": (no, 7)}):
        sampler = sampler_of(wanted, **wishes)
        found = sampler.sample(noise(), [0]).tokens.get(0)
        assert found is not None and text_of([found]).startswith("n")
        sampler.close()
    sampler = sampler_of(wanted, allowed=(7,))
    assert "constraint" in sampler.sample(noise(), [0]).errors[0]
    sampler.close()


def test_min_tokens_keeps_the_end_away_but_not_when_the_text_is_over() -> None:
    for wanted, least in ((constraint.regex("a*"), 10), (constraint.choice(["a"]), 1)):
        logits = noise()
        logits[:, list(STOP)] = 50.0
        sampler, tokens = sampler_of(wanted, min_tokens=10), list[int]()
        while not tokens or tokens[-1] not in STOP:
            tokens.append(sampler.sample(logits.clone(), [0]).tokens[0])
        assert len(tokens) == least + 1
        sampler.close()


def test_a_resumed_ticket_goes_on_with_the_masks_it_would_have_had() -> None:
    def story(tokens: list[int]) -> list[int]:
        sampler = sampler_of(JSON, tokens, max_tokens=24, temperature=1.0, stop=frozenset())
        while len(tokens) < 24:
            result = sampler.sample(noise(seed=len(tokens)), [0])
            tokens = [*tokens, result.tokens[0], *result.forced.get(0, ())]
        sampler.close()
        return tokens

    whole = story([])
    for cut in (1, 5, 13, 20):
        assert story(whole[:cut]) == whole


class Slow:
    """Grammars whose work on tokens waits for a sign."""

    def __init__(self) -> None:
        self.inner = Grammars(TOKENIZER, TOKENIZER.vocab_size)
        self.may = threading.Event()

    def begin(self, *arguments: Any) -> Any:
        return self.inner.begin(*arguments)

    def accept(self, rows: Any) -> list[bool]:
        return self.inner.accept(rows)

    def advance(self, rows: Any) -> None:
        self.may.wait(30)
        self.inner.advance(rows)


def test_masks_are_waited_for_when_they_are_needed_and_not_before() -> None:
    slow = Slow()
    made = Masks(lambda: slow)
    request = Request("0", array(TOKEN, [5]), Sampling(stop=STOP, temperature=1.0), constraint=JSON)
    made.start(Start(0, request, array(TOKEN)))
    first = made.take([0])[0].bits
    assert first is not None
    brace = TOKENIZER.encode("{", special=False)[0]
    made.give({0: brace})  # returns at once
    slow.may.set()
    second = made.take([0])[0].bits
    assert second is not None and not np.array_equal(first, second)
    made.close()


# -- the engine -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder() -> Iterator[Any]:
    built = build_engine(EngineConfig.from_mapping({"context": 512, "memory_bytes": 8 << 20}))
    yield built.runner._model
    built.close()


def requests() -> list[Request]:
    """Free rows and constrained ones, greedy and drawn; one that cannot be kept."""
    draw = random.Random(5)
    wanted = [
        None,
        JSON,
        constraint.regex(r"[0-9]{2}( [a-z]+)*"),
        constraint.json_schema({"type": "array", "uniqueItems": True}),
    ]
    return [
        Request(
            id=str(i),
            prompt=array(TOKEN, [draw.randrange(3, 4000) for _ in range(draw.randrange(4, 40))]),
            sampling=Sampling(max_tokens=40, stop=STOP, temperature=(i % 3) / 2, seed=i),
            constraint=wanted[i % 4],
        )
        for i in range(16)
    ]


def run(
    model: Any, policy: type[Policy], blocks: int, tokens: int, rows: int, ahead: int,
    asked: Callable[[], list[Request]] = requests,
) -> tuple[dict[str, Any], int, int]:  # fmt: skip
    kernels = model.kernels
    runner = ModelRunner(model, kernels, model.new_kv(blocks, 32), TOKENIZER.vocab_size, masks=masks())
    scheduler = Scheduler(policy(Budget(tokens, rows)), blocks, 32)
    engine = Engine(scheduler, runner, WallClock(), ahead)
    got: dict[str, Any] = {}
    for request in asked():
        assert engine.add(request) is None
        got[request.id] = ([], [])
    while engine.busy:
        for output in engine.step():
            got[output.id][0].extend(output.tokens)
            if output.finish:
                got[output.id][1].append((output.finish, output.error))
    runner.close()
    return got, scheduler.counters.preemptions, scheduler.counters.steps


def test_constrained_rows_do_not_depend_on_memory_company_chunks_or_overlap(decoder: Any) -> None:
    first, _, _ = run(decoder, BatchPolicy, 64, 512, 64, 1)
    for request in requests():
        tokens, ends = first[request.id]
        assert len(ends) == 1
        if int(request.id) % 4 == 1:
            assert ends[0][0] is Finish.STOP
            jsonschema.validate(json.loads(text_of(tokens)), SCHEMA)
        if int(request.id) % 4 == 3:
            assert ends[0][0] is Finish.ERROR and "uniqueItems" in ends[0][1] and not tokens
    preempted = 0
    for policy, *setting in (
        (BatchPolicy, 64, 512, 64, 0), (BatchPolicy, 64, 16, 64, 1), (BatchPolicy, 64, 512, 1, 1),
        (Thief, 5, 64, 64, 1), (Thief, 4, 512, 64, 0),
    ):  # fmt: skip
        again, preemptions, _ = run(decoder, policy, *setting)
        assert again == first, setting
        preempted += preemptions
    assert preempted


def test_tokens_that_have_no_choice_take_fewer_steps_and_no_answer_changes(
    decoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("identification", "transportation", "manufacturer")
    schema = {"type": "object", "properties": {name: {"type": "integer"} for name in names}, "required": list(names)}
    wanted = constraint.json_schema({**schema, "additionalProperties": False}, compact=True)

    def asked() -> list[Request]:
        return [replace(each, constraint=wanted, sampling=replace(each.sampling, max_tokens=90)) for each in requests()]

    fast = [run(decoder, BatchPolicy, 64, 512, 64, ahead, asked) for ahead in (0, 1)]
    monkeypatch.setattr(nn_masks, "_has_no_say", lambda sampling: False)
    slow = [run(decoder, BatchPolicy, 64, 512, 64, ahead, asked) for ahead in (0, 1)]
    assert all(answers == slow[0][0] for answers, *_ in (*fast, *slow))
    assert all(few < 0.8 * many for (*_, few), (*_, many) in zip(fast, slow, strict=True))


@pytest.mark.parametrize("patience", [1, grammar.PATIENCE])
def test_rows_that_try_their_own_tokens_answer_as_those_that_are_masked(
    decoder: Any, monkeypatch: pytest.MonkeyPatch, patience: int
) -> None:
    draw = random.Random(patience)
    wanted = [
        JSON, constraint.regex(r"[0-9]{2}( [a-z]+)*"), constraint.json_schema(True), constraint.choice(["yes", "no"]),
        constraint.json_schema({"type": "array", "items": {"type": "number"}, "minItems": 2}, compact=True),
        constraint.json_schema({"type": "object", "additionalProperties": {"type": "boolean"}}),
    ]  # fmt: skip
    wishes: list[dict[str, Any]] = [{}, {}, {}, {"logprobs": 1}, {"repetition_penalty": 1.3}, {"min_tokens": 9}]
    wishes += [{"temperature": 0.8}, {"banned": ((7,),)}, {"logit_bias": ((9, 4.0),)}, {"stop": frozenset()}]

    def asked() -> list[Request]:
        draw.seed(patience)
        return [
            replace(each, constraint=draw.choice(wanted), sampling=Sampling(**{
                "max_tokens": draw.randrange(1, 60), "stop": STOP, "seed": i, **draw.choice(wishes),
            }))
            for i, each in enumerate([*requests(), *(replace(each, id=f"again {each.id}") for each in requests())])
        ]  # fmt: skip

    made, begin, tried = grammar.Grammars, grammar.Grammars.begin, list[bool]()

    def patient(*arguments: Any) -> Grammars:
        found, accept = made(*arguments), made.accept
        monkeypatch.setattr(found, "_patience", patience)
        monkeypatch.setattr(found, "accept", lambda rows: tried.extend(more := accept(found, rows)) or more)
        return found

    monkeypatch.setitem(globals(), "Grammars", patient)
    quick = [run(decoder, BatchPolicy, *setting, asked)[0] for setting in ((96, 512, 64, 0), (96, 64, 64, 1))]
    assert any(tried) and not all(tried)
    tried.clear()
    monkeypatch.setattr(made, "begin", lambda self, *arguments: begin(self, *arguments[:5], False))
    slow = run(decoder, BatchPolicy, 96, 512, 64, 1, asked)[0]
    assert not tried and all(each == slow for each in quick)


def test_llm_takes_structured_outputs_under_both_names(tmp_path: Path) -> None:
    llm = LLM(max_model_len=512, kv_cache_memory_bytes=8 << 20)
    greedy = {"temperature": 0.0, "max_tokens": 60}
    ways: list[Any] = [
        SamplingParams(structured_outputs=StructuredOutputsParams(json=SCHEMA), **greedy),
        SamplingParams(structured_outputs={"json": json.dumps(SCHEMA)}, **greedy),
        SamplingParams(guided_decoding={"json": SCHEMA}, **greedy),
    ]
    texts = [llm.generate("One river is", way, use_tqdm=False)[0].outputs[0].text for way in ways]
    assert len(set(texts)) == 1
    jsonschema.validate(json.loads(texts[0]), SCHEMA)
    choice = SamplingParams(structured_outputs={"choice": ["red", "blue"]}, n=3, temperature=1.0)
    assert {each.text for each in llm.generate("It is", choice, use_tqdm=False)[0].outputs} <= {"red", "blue"}
    refused = llm.generate("a", SamplingParams(structured_outputs={"regex": "["}), use_tqdm=False)[0].outputs[0]
    assert refused.finish_reason == "error" and refused.text == ""
    llm.close()
