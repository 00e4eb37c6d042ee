"""Policies on the same requests at the same times: what each run came to, over seeds, and the highest rates.

It knows workloads, machines and metrics; it must not know how any of it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from shoal.core.config import EngineConfig
from shoal.sim.capacity import Capacity, capacity
from shoal.sim.cluster import Cluster
from shoal.sim.machine import Machine, MakePolicy, cluster_of, find_shape, machine_of, policy_maker
from shoal.sim.metrics import Rate, Summary, attained, flowing, in_service, jobs, settled, summary, timely
from shoal.sim.program import Program
from shoal.sim.record import Record
from shoal.sim.workload import Arrivals, drawn, find_source, programs
from shoal.what_if.options import SimOptions
from shoal.what_if.requests import Rows, of_file, of_output

COLUMNS = 120  # of a picture
SOME = 1000  # requests of a law, unless it is said how many
GUESS = 1.0  # requests a second at which the search for the highest rate begins


@dataclass(frozen=True, slots=True)
class Course:
    """How a run went, in columns of equal width."""

    width: float  # seconds
    tokens: list[float]  # of answers, a second
    requests: list[float]  # that had come and not ended


@dataclass(frozen=True, slots=True)
class Run:
    """One policy on one seed's requests."""

    policy: str
    seed: int
    summary: Summary
    service: dict[str, Rate]  # JITServe's goodput, by class
    timely: Rate | None  # Past-Future's, where something is promised
    attained: float | None  # DistServe's share, likewise
    jobs: float | None  # mean seconds of programs that ended
    ended: float | None  # share of the programs that did
    memory: float  # mean share of the blocks in use
    steps: int
    bubbles: float | None  # share of the stages' time that they waited, where there are several
    errors: dict[str, int]  # reasons of refusals, and how many
    course: Course


@dataclass(slots=True)
class Study:
    """All that was found."""

    name: str  # of what was asked for
    machine: str
    positions: int  # tokens of memory of an instance
    runs: dict[str, list[Run]] = field(default_factory=dict)  # by policy
    capacities: dict[str, list[Capacity]] = field(default_factory=dict)
    real_seconds: float | None = None  # of the job that was replayed, where it ran
    left_out: int = 0  # its prompts that are not replayed
    placed: str = ""  # how a job's rows were given to several instances, which is not how `shoal run` deals them
    spared: int = 0  # seeds that were asked for and not run, as nothing is drawn from a seed

    def values(self, policy: str, of: Callable[[Run], float]) -> list[float]:
        """A number of each of a policy's runs."""
        return [of(run) for run in self.runs[policy]]


def study(options: SimOptions) -> Study:
    """Run every policy on every seed."""
    machine = machine_of(options.hardware, options.model, options.tensor, options.pipeline, options.memory)
    devices = f"{options.tensor * options.pipeline} × " if options.tensor * options.pipeline > 1 else ""
    many = f"{options.instances} instances of " if options.instances > 1 else ""
    name = f"{find_shape(options.model).name} on {many}{devices}{options.hardware}"
    if options.is_job and machine.stages == 1:
        machine = replace(machine, ahead=int(EngineConfig().overlap))
    makers = {
        text: policy_maker(text, machine.cost, options.limit(text), options.promise, options.step_tokens)
        for text in options.named
    }
    asks, rows, drawn = _asks(options)
    seeds = range(options.seed, options.seed + (options.seeds if drawn else 1))
    found = Study(rows.name if rows else options.workload, name, machine.positions)
    found.spared = options.seeds - len(seeds)
    if rows is not None:
        found.real_seconds, found.left_out = rows.seconds, rows.left_out
        found.placed = options.place if options.instances > 1 else ""
    for text, make in makers.items():
        found.runs[text] = [_run(options, machine, text, make, asks(seed, None), seed) for seed in seeds]
    if options.capacity:
        for text, make in makers.items():
            found.capacities[text] = [_capacity(options, machine, make, asks, seed) for seed in seeds]
    return found


Asks = Callable[[int, float | None], list[Program]]  # of a seed, at a rate or as it is


def _asks(options: SimOptions) -> tuple[Asks, Rows | None, bool]:
    """Who asks for what, as a function of the seed; the job it is from; and whether anything is drawn from the seed."""
    if options.output is not None or options.job is not None:
        rows = of_output(options.output, options.requests) if options.output else None
        if rows is None:
            assert options.job is not None
            rows = of_file(options.job, options.requests)
        fed = rows.fed(options.instances, EngineConfig().max_sequences)
        return lambda seed, rate: rows.programs(fed), rows, False
    source = find_source(options.workload)
    law = callable(source)
    arrivals = options.came or Arrivals("poisson" if law else "trace", GUESS if law else None)
    count = options.requests or (SOME if law else None)

    def asks(seed: int, rate: float | None) -> list[Program]:
        at = arrivals if rate is None else arrivals.at(rate)
        return programs(source, at, count, seed, options.promise, options.deadline)

    return asks, None, drawn(source, arrivals, count)


def _run(
    options: SimOptions, machine: Machine, policy: str, make: MakePolicy, requests: Sequence[Program], seed: int
) -> Run:
    cluster = cluster_of(machine, make, options.instances, options.place)
    records = cluster.run(requests)
    promise = options.promise
    took = list(jobs(records).values())
    ended = [seconds for seconds in took if math.isfinite(seconds)]
    errors: dict[str, int] = {}
    for record in records:
        if record.error:
            errors[record.error] = errors.get(record.error, 0) + 1
    held = sum(instance.held for instance in cluster.instances)
    looked = sum(instance.looked for instance in cluster.instances)
    return Run(
        policy, seed, summary(records), in_service(records),
        timely(records, promise.first, promise.gap) if promise else None,
        attained(records, promise.first, promise.gap) if promise else None,
        (float(np.mean(ended)) if ended else math.inf) if took else None, len(ended) / len(took) if took else None,
        held / looked / machine.blocks if looked else 0.0,
        sum(instance.engine.scheduler.steps for instance in cluster.instances), _bubbles(cluster), errors,
        course(records),
    )  # fmt: skip


def _bubbles(cluster: Cluster) -> float | None:
    idle = sum(instance.idle for instance in cluster.instances)
    busy = sum(instance.executor.busy for instance in cluster.instances)
    several = any(instance.staged for instance in cluster.instances)
    return idle / (idle + busy) if several and busy else None


def _capacity(options: SimOptions, machine: Machine, make: MakePolicy, asks: Asks, seed: int) -> Capacity:
    """The highest rate at which the gap is kept (Sarathi-Serve's capacity), the first tenth of the requests apart."""

    def meets(rate: float) -> bool:
        records = cluster_of(machine, make, options.instances, options.place).run(asks(seed, rate))
        return flowing(settled(records), options.gap)

    return capacity(meets, GUESS)


def course(records: Sequence[Record]) -> Course:
    """How a run went, from its first arrival to its last end."""
    begin = min((record.arrival for record in records), default=0.0)
    ends = [record.end if math.isfinite(record.end) else record.arrival for record in records]
    end = max(ends, default=begin)
    width = max(end - begin, 1e-9) / COLUMNS
    times = np.concatenate([np.asarray(record.times) for record in records]) if records else np.zeros(0)
    edges = begin + width * np.arange(COLUMNS + 1)
    edges[-1] = max(edges[-1], end)
    tokens = np.histogram(times, edges)[0] / width
    came = np.searchsorted(np.sort([record.arrival for record in records]), edges[1:], side="right")
    gone = np.searchsorted(np.sort(ends), edges[:-1], side="right")
    return Course(width, tokens.tolist(), (came - gone).astype(float).tolist())
