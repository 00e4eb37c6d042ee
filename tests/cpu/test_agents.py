"""Programs on the real engine that call scripted tools between their turns: what is pinned is not computed again."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterator

import pytest
import torch

from benchmarks.prove_policies import BLOCK, build
from shoal.build import BuiltEngine, WallClock
from shoal.core.types import TOKEN, Request, Sampling
from shoal.engine import Engine
from shoal.kernels import set_threads
from shoal.sched.policies.stall_free import StallFree
from shoal.sched.policies.time_to_live import TimeToLive
from shoal.sched.policy import Budget, Policy
from shoal.sched.scheduler import Scheduler

PROGRAMS, TURNS, BLOCKS = 3, 3, 52


@pytest.fixture(scope="module")
def built() -> Iterator[BuiltEngine]:
    before = torch.get_num_threads()
    made = build(threads=1)
    yield made
    made.close()
    set_threads(before)


def agents(built: BuiltEngine, policy: Policy) -> tuple[dict[str, list[int]], float]:
    """Tokens of all turns, and prompt tokens found in memory. A tool takes until a stranger has been answered."""
    luck = random.Random(5)

    def some(count: int) -> list[int]:
        return [luck.randrange(300, built.facts.vocab_size) for _ in range(count)]

    engine = Engine(Scheduler(policy, BLOCKS, BLOCK), built.runner, WallClock())
    begins, said = [some(300) for _ in range(PROGRAMS)], [some(25) for _ in range(PROGRAMS * TURNS)]
    strangers = [some(400) for _ in range(PROGRAMS * TURNS)]
    tokens: dict[str, list[int]] = {}
    cached = 0.0
    prompts = {program: begins[program] for program in range(PROGRAMS)}

    def ask(id: str, prompt: list[int], program: str) -> float:
        clock = engine.clock
        request = Request(id, array(TOKEN, prompt), Sampling(max_tokens=12), arrival=clock.now(), program=program)
        assert engine.add(request) is None
        tokens[id] = []
        found = 0.0
        while engine.busy:
            for out in engine.step():
                tokens[out.id] += out.tokens
                found += out.timing["cached"] if out.timing is not None else 0.0
        return found

    for turn in range(TURNS):
        for program in range(PROGRAMS):
            number = turn * PROGRAMS + program
            id = f"p{program}.{turn}"
            cached += ask(id, prompts[program], f"p{program}")
            engine.tell(f"p{program}", "ls" if turn + 1 < TURNS else "")
            prompts[program] = [*prompts[program], *tokens[id], *said[number]]
            ask(f"s{number}", strangers[number], "")
    engine.scheduler.kv.audit([])
    return tokens, cached


def test_a_turn_finds_what_the_one_before_left_and_says_the_same(built: BuiltEngine) -> None:
    limit = Budget(512, 8)
    plain, lost = agents(built, StallFree(limit))
    pinned, found = agents(built, TimeToLive(limit, always=600.0, patience=math.inf))
    assert pinned == plain
    assert found >= PROGRAMS * (TURNS - 1) * 300 > lost
