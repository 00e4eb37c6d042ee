"""What a run is told of itself before its first step, and while it goes on: explain's forecast of the plan at hand.

It knows the plan and what is kept of this machine; it must not measure anything: that would take the job's time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shoal.jobs.foretold import Foretold, attempt
from shoal.jobs.plan import Plan
from shoal.jobs.plan_sort import Ints
from shoal.jobs.prepare import Prepared, Words
from shoal.preview import paperwork
from shoal.preview.course import UNITS, Course, Rates
from shoal.preview.facts import memory_of, spare_cores
from shoal.preview.forecast import predict
from shoal.preview.look import Looked, looked_at, served
from shoal.preview.machine import elsewhere, kept
from shoal.preview.sizes import Sizes
from shoal.runtime.memory import available_host_bytes
from shoal.text.checkpoint import kv_mode, weight_mode

SIMULATED = 20_000  # row-steps up to which the scheduler itself is asked: half a second beside the engine's loading
UNMEASURED = "no calibration of this machine is kept for this model: shoal explain makes one, in seconds"


class Foreseer:
    """Foretells runs."""

    def free(self) -> int:
        """Bytes that an engine could take now."""
        return available_host_bytes()

    def foretell(
        self, job: Prepared, plan: Plan, wanted: npt.NDArray[np.bool_] | None, planned: float, free: int
    ) -> Course | None:  # fmt: skip
        """The course of the `wanted` rows of a plan, or of all, `planned` seconds after the job began, by an engine
        that found so many bytes free."""
        words = job.words
        if not isinstance(words, Words):
            return None  # servers tell nothing of themselves
        found = served(plan, words.info.context, wanted)
        if not len(found.order):
            return None
        looked = looked_at(found, words, job.source, planned)
        said = Foretold(int(looked.cost.sum()), (_tokens(looked, _least(looked)), _tokens(looked, looked.limits)))
        course = attempt(lambda: _course(job, words, looked, said, free))
        return Course(_without(said, course), looked, None) if isinstance(course, str) else course


def _course(job: Prepared, words: Words, looked: Looked, said: Foretold, free: int) -> Course:
    options, folder, config = job.options, words.folder, job.options.engine()
    if words.info.encoder:
        return Course(_without(said, "an encoder's steps are not measured"), looked, None)
    if why := elsewhere(options.device):
        return Course(_without(said, why), looked, None)
    sizes, weights = Sizes.load(folder), weight_mode(options.weights, folder)
    kv = kv_mode(options.kv, weights)
    memory = memory_of(looked, config, sizes, weights, kv, free)
    machine = kept(folder, sizes, weights, kv, options.threads)
    if machine is None or memory.problem:
        return Course(_without(said, memory.problem or UNMEASURED), looked, None)
    paper = paperwork.measure(looked)
    cost, block = machine.cost(paper.drawn), config.block_size
    blocks = memory.have_tokens // block
    own = paperwork.Paperwork(0.0, 0.0, 0.0) if spare_cores(machine) else paper
    rates = Rates(cost, config, blocks, own)
    before = max(machine.load(memory.weight_bytes), looked.seconds)

    def span(answers: Ints) -> tuple[float, int]:
        time = predict(looked, answers, cost, config, blocks, SIMULATED, UNITS)
        requests = int(looked.units["samples"][looked.order].sum())
        job = own.seconds(requests, _tokens(looked, answers), time.steps)
        return time.seconds + job, round(time.peak) * block * memory.position_bytes

    known, most = bool(looked.certain[looked.order].all()), span(looked.limits)
    least = most if known else span(_least(looked))
    low, high = (1.0, 1.0) if known else (1 - machine.error, 1 + machine.error)
    return Course(
        Foretold(
            said.prompt_tokens, said.output_tokens, (before + low * least[0], before + high * most[0]),
            (min(least[1], most[1]), max(least[1], most[1])), machine.at,
        ), looked, rates,
    )  # fmt: skip


def _least(looked: Looked) -> Ints:
    """Tokens of each answer if those that may end anywhere end at once."""
    return np.where(looked.certain, looked.limits, np.minimum(looked.limits, 1))


def _tokens(looked: Looked, answers: Ints) -> int:
    return int((answers * looked.units["samples"])[looked.order].sum())


def _without(said: Foretold, why: str) -> Foretold:
    return Foretold(said.prompt_tokens, said.output_tokens, why=why)
