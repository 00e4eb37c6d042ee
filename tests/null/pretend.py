"""Small simulated clusters for tests: instances, and programs that share prefixes, have turns, or stand alone."""

from __future__ import annotations

import random
from itertools import chain

from shoal.core.clock import SimClock
from shoal.sched.cost import LinearCost
from shoal.sched.place import Placement
from shoal.sched.policy import Policy
from shoal.sched.scheduler import Scheduler
from shoal.sim.cluster import Cluster
from shoal.sim.executor import SimExecutor
from shoal.sim.instance import Instance
from shoal.sim.program import Program, Turn
from shoal.sim.stages import Staged, StagedExecutor


def alone(number: int, at: float, prompt: int, answer: int, limit: int = 10_000, **more) -> Program:
    """One request whose prompt is its own."""
    return Program(f"r{number}", at, (Turn(((number + 1000, prompt),), answer, limit),), **more)


def programs(seed: int, count: int, rate: float, most: int) -> list[Program]:
    """Requests alone, some that share prefixes, and programs of some turns; and two clients in a closed loop."""
    luck, at, made = random.Random(seed), 0.0, []

    def turn(number: int) -> Turn:
        shared = ((luck.randrange(3), luck.randrange(1, most)),) if luck.random() < 0.4 else ()
        answer = luck.randrange(1, most)
        pieces = (*shared, (number + 1000, luck.randrange(1, most)))
        return Turn(pieces, answer, answer + luck.choice([-1, 0, 5]) or 1, luck.choice([0.0, 0.05, 3.0]), "search")

    for i in range(count):
        at += luck.choice([0.0, luck.expovariate(rate)])
        several = luck.randrange(1, 4) if luck.random() < 0.2 else 1
        made.append(Program(f"r{i}", at, tuple(turn(i * 10 + k) for k in range(several))))
    shared = chain(turn(100_000 + k) for k in range(6))
    made += [Program(f"client{k}", at, shared, keeps=False) for k in range(2)]
    return made


def cluster(
    policies: list[Policy], blocks: int, size: int = 16, leaps: bool = True, ahead: int = 0,
    placement: Placement | None = None,
) -> Cluster:  # fmt: skip
    clock = SimClock()
    instances = [
        Instance(clock, Scheduler(policy, blocks, size), SimExecutor(clock, LinearCost()), ahead, leaps)
        for policy in policies
    ]
    return Cluster(clock, instances, placement)


def staged(policy: Policy, stages: int, per_stage, blocks: int = 4000, size: int = 16) -> Cluster:
    """One instance whose model is in stages."""
    clock = SimClock()
    scheduler = Scheduler(Staged(policy, stages), blocks, size)
    executor = StagedExecutor(clock, LinearCost(), per_stage, stages)
    return Cluster(clock, [Instance(clock, scheduler, executor, stages - 1)])


def story(done: Cluster) -> list[tuple]:
    """All that can be told apart from outside."""
    return [
        (r.id, r.instance, r.arrival, r.start, list(r.times), r.end, r.finish, r.cached, r.preemptions, r.error)
        for r in done.records
    ]
