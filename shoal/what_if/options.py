"""What the user wants to know of a machine that need not be here. It must not know how it is found out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from shoal.core.config import EngineConfig
from shoal.core.errors import UsageError
from shoal.core.types import Promise
from shoal.jobs.options import JobOptions
from shoal.sched.policy import Budget
from shoal.sim.workload import Arrivals

FIRST_COME, BATCH = (
    "first-come",
    "batch",
)  # policies where none is named: of traffic, and of a job as `shoal run` has it


@dataclass(frozen=True, slots=True)
class SimOptions:
    """One question. What is asked for: `workload` is a law or a trace, `job` a file to run, `output` a job that ran."""

    workload: str = ""
    job: JobOptions | None = None
    output: Path | None = None
    policies: tuple[str, ...] = ()  # none: what serves traffic, or a job
    hardware: str = "h100"
    model: str = "llama-3-8b"
    tensor: int = 1
    pipeline: int = 1
    instances: int = 1
    place: str = "least-work"
    arrivals: str | None = None  # None: as the trace has them, a request a second of a law, a job all at once
    requests: int | None = None  # None: all of a trace or a job, a thousand of a law
    memory: int | None = None  # tokens of keys and values on an instance, in place of what the hardware has room for
    step_tokens: int | None = None  # None: as many as each policy takes by itself
    first: float = math.inf  # seconds within which first tokens are promised
    gap: float = math.inf  # seconds between tokens, likewise
    deadline: float = math.inf  # seconds for whole answers
    seeds: int = 1
    seed: int = 0
    capacity: bool = False  # find the highest rate that keeps the gap
    html: Path | None = None

    def __post_init__(self) -> None:
        asked = [name for name in ("workload", "job", "output") if getattr(self, name)]
        if len(asked) != 1:
            raise UsageError(
                "say what to simulate, once: a law or a trace (shoal sim azure.csv), a job file (--input rows.jsonl), "
                "or a job that has run (--from OUT)"
            )
        for name in ("tensor", "pipeline", "instances", "step_tokens", "seeds", "requests"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {given}: give at least 1")
        for name in ("first", "gap", "deadline"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name} is {getattr(self, name)}: give seconds above 0")
        if self.capacity and not math.isfinite(self.gap):
            raise UsageError("--capacity is the highest rate that keeps a gap between tokens: give --gap SECONDS")
        came = self.came
        if self.capacity and (asked[0] != "workload" or came is not None and came.rate is None):
            raise UsageError(
                "--capacity needs a law or a trace whose arrivals have a rate: poisson:1, gamma:1:2, trace:1"
            )

    @property
    def came(self) -> Arrivals | None:
        """When requests come, as far as that was said."""
        return None if self.arrivals is None else Arrivals.parse(self.arrivals)

    @property
    def is_job(self) -> bool:
        """Whether it is a file's rows, which `shoal run` would feed to the engine."""
        return not self.workload

    @property
    def named(self) -> tuple[str, ...]:
        """The policies that are compared."""
        return self.policies or ((BATCH,) if self.is_job else (FIRST_COME,))

    def limit(self, policy: str) -> Budget | None:
        """Of a policy's steps, but for `step_tokens`; None is the policy's own. A job's batch policy has what the
        engine gives it."""
        kept = EngineConfig()
        return Budget(kept.step_tokens, kept.max_sequences) if self.is_job and policy == BATCH else None

    @property
    def promise(self) -> Promise | None:
        """Of each request, if anything is promised."""
        return Promise(self.first, self.gap) if math.isfinite(min(self.first, self.gap)) else None
