"""Everything that can be said of a job before it runs, as numbers.

It must not know how they are shown. What rests on nobody's knowledge, the lengths of answers, is a range.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec
import numpy as np

from shoal.core.config import EngineConfig
from shoal.core.errors import ShoalError
from shoal.jobs.bill import Bill, bill
from shoal.jobs.plan import Plan
from shoal.jobs.plan_sort import Ints
from shoal.preview import paperwork
from shoal.preview.bulk import Time
from shoal.preview.forecast import predict
from shoal.preview.look import Looked
from shoal.preview.machine import Measured, Unmeasured, elsewhere, measured
from shoal.preview.options import ExplainOptions
from shoal.preview.sample import Sampled
from shoal.preview.sizes import Sizes
from shoal.runtime.memory import available_host_bytes, plan_memory
from shoal.show.prefixes import Forest, largest
from shoal.text.checkpoint import kv_mode, weight_mode

BARS = 12  # of a histogram, at most
EXAMPLES = 5  # line numbers given of each kind of bad row
LEAST_TOKENS = 2048  # as a run's engine: what its memory must hold where nobody says how large it is


class Bar(msgspec.Struct, frozen=True):
    """Prompts or answers of `low` to `high` tokens."""

    low: int
    high: int
    count: int


class Lengths(msgspec.Struct, frozen=True):
    """How long something is, in tokens, over all prompts that are computed."""

    least: int = 0
    middle: int = 0
    most: int = 0
    total: int = 0
    bars: tuple[Bar, ...] = ()


class Bad(msgspec.Struct, frozen=True):
    """Rows that fail for one reason."""

    code: str
    count: int
    lines: tuple[int, ...]  # the first of them
    message: str  # of the first


class Rows(msgspec.Struct, frozen=True):
    """Lines of the file. run + equal + bad = total."""

    total: int
    run: int
    equal: int  # ask for what an earlier row asks for, and get its answer
    bad: int
    overflow: int  # of the bad ones, those that do not fit the context
    fixed: int  # prompts whose answers have exactly the length that was asked for
    open: int  # prompts whose answers nothing but the context ends


class Memory(msgspec.Struct, frozen=True):
    """Keys and values: what the job can fill, and what there is. Bytes, but for `position`s and tokens."""

    weights: str
    kv: str
    weight_bytes: int
    position_bytes: int  # of one token
    need_tokens: int  # if nothing were ever forgotten
    need_bytes: int
    have_tokens: int
    have_bytes: int
    problem: str = ""  # why it cannot run at all


class Span(msgspec.Struct, frozen=True):
    """One way that the answers may turn out, and the seconds from the first step to the last."""

    answer_tokens: int
    seconds: float
    steps: int
    by: str
    weights: float  # shares of the seconds: reading weights (bandwidth),
    compute: float  # computing with them,
    attention: float  # looking back,
    job: float  # reading rows and writing answers, where no core is left for that
    waited: float  # and, beside these, the share in which rows wait for memory


class Forecast(msgspec.Struct, frozen=True):
    """Predicted seconds. `load` and `plan` come before the steps, one beside the other."""

    least: Span
    most: Span
    likely: Span | None  # where every length is known, or somebody said what to expect
    low: float  # all in all
    high: float
    load: float
    plan: float
    limit: str  # compute, bandwidth, attention or memory
    measured_at: float  # Unix time of this machine's measurement
    unsteady: float  # share by which its speed varied then


class Advice(msgspec.Struct, frozen=True):
    """A flag and why."""

    flag: str
    why: str


class Explanation(msgspec.Struct, frozen=True):
    """A job before it runs."""

    input: str
    model: str
    context: int
    rows: Rows
    bad: tuple[Bad, ...]
    prompts: Lengths
    answers: Lengths  # the most each may have
    prompt_tokens: int  # of all rows, equal ones too
    bound: int  # of them, those a run computes with room for all prefixes
    forest: Forest
    memory: Memory | None  # None: an encoder keeps no keys and values
    time: Forecast | None
    no_time: str  # why there is none
    advice: tuple[Advice, ...]
    bill: Bill
    seconds: float  # to find all this out
    sampled: Lengths | None = None  # of the answers of rows that were run first


def gather(options: ExplainOptions, looked: Looked, sampled: Sampled | None = None) -> Explanation:
    """All facts of a job, with what a sample of its rows has come to, if one was run. What cannot be measured here
    leaves out the times, and nothing else."""
    job, plan, words = options.job, looked.plan, looked.words
    memory, time, why = _foretell(options, looked, sampled)
    bad = bad_rows(plan)
    overflow = sum(each.count for each in bad if each.code == "context_length_exceeded")
    length = looked.units["length"].astype(np.int64)
    unlimited = ~looked.certain & (looked.limits >= words.info.context - length)
    rows = Rows(
        plan.num_rows, plan.num_rows - plan.num_bad - plan.num_copies, plan.num_copies, plan.num_bad, overflow,
        int(looked.certain.sum()), int(unlimited.sum()),
    )  # fmt: skip
    foretold = Bill() if time is None else bill(time.low, time.high, options.price, options.watts)
    return Explanation(
        input="standard input" if str(job.input) == "-" else str(job.input),
        model=words.name + ("" if job.model else " (the embedded model)"),
        context=words.info.context, rows=rows, bad=bad, prompts=lengths(length), answers=lengths(looked.limits),
        prompt_tokens=plan.prompt_tokens, bound=plan.bound, memory=memory, time=time,
        forest=largest(looked.prompts, looked.reach, words.tokenizer),
        no_time=why, advice=_advice(options, rows, memory, time), bill=foretold, seconds=looked.seconds,
        sampled=None if sampled is None else lengths(np.array(sampled.ended, dtype=np.int64)),
    )  # fmt: skip


def _foretell(
    options: ExplainOptions, looked: Looked, sampled: Sampled | None
) -> tuple[Memory | None, Forecast | None, str]:
    """Memory and time, or why there is no time."""
    job, words = options.job, looked.words
    if words.info.encoder:
        return None, None, "an encoder's steps are not measured"
    sizes = Sizes.load(words.folder)
    weights = weight_mode(job.weights, words.folder)
    kv = kv_mode(job.kv, weights)
    config = job.engine()
    memory = memory_of(looked, config, sizes, weights, kv, available_host_bytes())
    why = memory.problem or ("" if len(looked.units) else "no row can be run")
    why = elsewhere(job.device) or why
    if why:
        return memory, None, why
    try:
        machine = measured(words.folder, sizes, weights, kv, job.threads, options.calibrate)
    except Unmeasured as error:
        return memory, None, str(error)
    return memory, _forecast(options, looked, machine, config, memory, sampled), ""


def lengths(values: Ints) -> Lengths:
    """Least, middle, most and a histogram: equal steps, or doubling ones where the longest is much longer."""
    if not len(values):
        return Lengths()
    least, most = int(values.min()), int(values.max())
    if most > 20 * max(least, 1):
        powers = range(max(least, 1).bit_length() - 1, most.bit_length() + 1)
        edges = [least, *(1 << power for power in powers if least < 1 << power <= most), most + 1]
    else:
        step = next(s for s in _round_steps() if (most - least) // s < BARS - 1)
        edges = list(range(least - least % step, most + step + 1, step))
    counts = np.histogram(values, bins=np.array(edges, dtype=np.float64))[0].tolist()
    while counts[-1] == 0:
        counts.pop()
    bars = tuple(Bar(low, high - 1, count) for low, high, count in zip(edges, edges[1:], counts, strict=False))
    return Lengths(least, int(np.median(values)), most, int(values.sum()), bars)


def _round_steps() -> Sequence[int]:
    return [digit * 10**power for power in range(9) for digit in (1, 2, 5)]


def bad_rows(plan: Plan) -> tuple[Bad, ...]:
    """Bad rows by their code, the most frequent first."""
    found: dict[str, tuple[int, tuple[int, ...], str]] = {}
    for _, row in plan.bad_rows():
        assert row.error is not None
        number, lines, message = found.get(row.error.code, (0, (), str(row.error)))
        lines = (*lines, row.line) if len(lines) < EXAMPLES else lines
        found[row.error.code] = (number + 1, lines, message)
    ordered = sorted(found.items(), key=lambda item: (-item[1][0], item[0]))
    return tuple(Bad(code, number, lines, message) for code, (number, lines, message) in ordered)


def memory_of(looked: Looked, config: EngineConfig, sizes: Sizes, weights: str, kv: str, free: int) -> Memory:
    """What a run's engine would be given of so many bytes."""
    context, plan = looked.words.info.context, looked.plan
    weight_bytes, position = sizes.weight_bytes(weights), sizes.position_bytes(kv)
    useful = plan.bound + min(plan.answer_tokens, config.max_sequences * context)
    problem, found = "", None
    try:
        found = plan_memory(
            available=free, weights=weight_bytes, block=config.block_size * position,
            asked=config.memory_bytes, useful_blocks=-(-useful // config.block_size) + config.max_sequences,
            least_blocks=1 if config.memory_bytes else -(-min(context, LEAST_TOKENS) // config.block_size),
        )  # fmt: skip
    except ShoalError as error:
        problem = str(error)
    have = found.num_blocks * config.block_size if found is not None else 0
    return Memory(weights, kv, weight_bytes, position, useful, useful * position, have, have * position, problem)


def _forecast(
    options: ExplainOptions, looked: Looked, machine: Measured, config: EngineConfig, memory: Memory,
    sampled: Sampled | None,
) -> Forecast:  # fmt: skip
    limits, certain, expected = looked.limits, looked.certain, options.answer_tokens
    paper = paperwork.measure(looked)

    def span(answers: Ints) -> Span:
        tokens = int((answers * looked.units["samples"]).sum())
        time = predict(looked, answers, machine.cost(paper.drawn), config, memory.have_tokens // config.block_size)
        if memory.have_tokens >= memory.need_tokens:
            time.waited = 0.0  # what is put off then is put off for other reasons
        job = 0.0 if spare_cores(machine) else paper.seconds(looked.plan.num_requests, tokens, time.steps)
        return _span(tokens, time, job)

    most = span(limits)
    if bool(certain.all()):
        least: Span = most
        likely: Span | None = most
    else:
        least = span(np.where(certain, limits, np.minimum(limits, 1)))
        likely = span(np.where(certain, limits, np.minimum(limits, expected))) if expected else None
        likely = span(sampled.lengths(looked)) if sampled is not None else likely
    load = machine.load(memory.weight_bytes)
    before = max(load, looked.seconds)
    chosen = likely or most
    shares = {"bandwidth": chosen.weights, "compute": chosen.compute, "attention": chosen.attention}
    limit = "memory" if chosen.waited > 0.5 else max(shares, key=lambda name: shares[name])
    low, high = (likely or least).seconds * (1 - machine.error), (likely or most).seconds * (1 + machine.error)
    return Forecast(
        least, most, likely, before + low, before + high, load, looked.seconds, limit, machine.at, machine.unsteady
    )


def spare_cores(machine: Measured) -> bool:
    """Whether a job's own process has a core beside the engine's."""
    return len(os.sched_getaffinity(0)) > machine.threads


def _span(answer_tokens: int, time: Time, job: float) -> Span:
    whole = max(time.seconds + job, 1e-9)

    def share(seconds: float) -> float:
        return round(seconds / whole, 4)

    return Span(
        answer_tokens, whole, round(time.steps), time.by, share(time.weights), share(time.compute),
        share(time.attention), share(job), round(time.waited / max(time.seconds, 1e-9), 4),
    )  # fmt: skip


def _advice(options: ExplainOptions, rows: Rows, memory: Memory | None, time: Forecast | None) -> tuple[Advice, ...]:
    """Flags that would help, each with its reason; none that merely could be set."""
    found, job = [], options.job
    chosen = None if time is None else time.likely or time.most
    if rows.bad:
        why = f"{rows.bad:,} rows fail: this says which and why, and repairs those that it safely can"
        model = f" --model {job.model}" if job.model else ""
        found.append(Advice(f"shoal lint {job.input}{model} --fix FIXED", why))
    if rows.open:
        why = f"{rows.open:,} prompts have no max_tokens: one answer that never ends takes the rest of the context"
        found.append(Advice("--body '{\"max_tokens\": N}'", why))
    if memory is None:
        return tuple(found)
    if memory.problem:
        found.append(Advice("--memory, --weights int8 or a smaller model", memory.problem))
    if chosen is not None and chosen.waited > 0.05:
        share = f"rows wait for memory during {100 * chosen.waited:.0f} % of the steps"
        if job.memory is not None:
            found.append(Advice("--memory larger than now, or left out", share))
        elif memory.kv == "bf16":
            found.append(Advice("--kv int8", f"{share}: keys and values in half the memory (rounded: answers change)"))
    if chosen is not None and chosen.weights > 0.5 and memory.weights == "bf16":
        why = "most of the time goes to reading weights: as int8 they are half as many bytes (answers change)"
        found.append(Advice("--weights int8", why))
    return tuple(found)
