"""What is good, measured: each time of a request defined once, and the five goodputs of five papers by five names.

It knows records; it must not know who made them. A request without a first token has waited for ever, so that who
answers only the quick ones does not look quick. Percentiles are straight between the two nearest values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from shoal.sim.record import Record

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]

# Two-sided 95 % points of Student's law, by degrees of freedom; beyond them, the normal law's.
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def percentile(values: Sequence[float] | Floats, percent: float) -> float:
    """Straight between the nearest values of rank percent / 100 * (n - 1); nan of nothing, infinity beside infinity."""
    if not len(values):
        return math.nan
    ordered = np.sort(np.asarray(values, dtype=float))
    place = percent / 100 * (len(ordered) - 1)
    low = math.floor(place)
    below, above = float(ordered[low]), float(ordered[math.ceil(place)])
    return below if below == above else below + (place - low) * (above - below)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds, with the half of its 95 % confidence interval; nan where there is one seed only."""

    mean: float
    half: float
    values: tuple[float, ...]


def interval(values: Iterable[float]) -> Interval:
    """The mean of independent runs and how sure it is (Student's t)."""
    kept = tuple(values)
    mean = float(np.mean(kept))
    if len(kept) < 2 or not math.isfinite(mean):
        return Interval(mean, math.nan, kept)
    points = STUDENT[len(kept) - 2] if len(kept) - 2 < len(STUDENT) else 1.960
    return Interval(mean, points * float(np.std(kept, ddof=1)) / math.sqrt(len(kept)), kept)


# -- one request -------------------------------------------------------------------------------------


def first_token(record: Record) -> float:
    """TTFT: seconds from arrival to the first token."""
    return record.times[0] - record.arrival if record.times else math.inf


def gaps(record: Record) -> Floats:
    """TBT: seconds between each token and the next."""
    return np.diff(np.asarray(record.times))


def worst_gap(record: Record) -> float:
    """MTPOT of Past-Future: the longest of the gaps; 0 where there is none, infinity before the first token."""
    if not record.times:
        return math.inf
    return float(gaps(record).max()) if len(record.times) > 1 else 0.0


def per_token(record: Record) -> float:
    """TPOT: seconds from the first token to the last, for each token after the first; 0 for a single one."""
    if not record.times:
        return math.inf
    return (record.times[-1] - record.times[0]) / max(len(record.times) - 1, 1)


def end_to_end(record: Record) -> float:
    """Seconds from arrival to the end of the answer."""
    return record.end - record.arrival if record.answered else math.inf


def delay(record: Record) -> float:
    """Seconds from arrival until it ran first: Sarathi-Serve's scheduling delay."""
    return record.start - record.arrival if math.isfinite(record.start) else math.inf


# -- many requests -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """Values by their percentiles [s]."""

    mean: float
    p50: float
    p90: float
    p99: float
    most: float


def spread(values: Sequence[float] | Floats) -> Spread:
    """Mean, percentiles and the largest."""
    if not len(values):
        return Spread(math.nan, math.nan, math.nan, math.nan, math.nan)
    array = np.asarray(values, dtype=float)
    p50, p90, p99 = (percentile(array, percent) for percent in (50, 90, 99))
    return Spread(float(array.mean()), p50, p90, p99, float(array.max()))


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run came to."""

    requests: int
    answered: int
    refused: int  # or failed
    unfinished: int
    seconds: float  # from the first arrival to the last end
    prompt: int  # tokens of all that came
    tokens: int  # of answers
    tokens_per_second: float
    requests_per_second: float  # answered
    preempted: int  # requests that lost their memory at least once
    preemptions: int
    cached: int  # prompt tokens found
    ttft: Spread
    tbt: Spread  # over all gaps of all requests
    tpot: Spread
    worst_gap: Spread
    e2e: Spread
    delay: Spread


def settled(records: Sequence[Record], share: float = 0.1) -> list[Record]:
    """Without the first of them, in which queues had not formed yet."""
    return list(records[int(share * len(records)) :])


def summary(records: Sequence[Record]) -> Summary:
    """Of all records; those that had been refused count as such and have no times."""
    taken = [record for record in records if record.finish is None or record.answered]
    answered = [record for record in taken if record.answered]
    seconds = span(records)
    produced = sum(len(record.times) for record in taken)
    between = np.concatenate([gaps(record) for record in taken]) if taken else np.zeros(0)
    return Summary(
        len(records), len(answered), len(records) - len(taken), len(taken) - len(answered), seconds,
        sum(record.prompt for record in records), produced, produced / seconds if seconds else 0.0,
        len(answered) / seconds if seconds else 0.0, sum(record.preemptions > 0 for record in records),
        sum(record.preemptions for record in records), sum(record.cached for record in records),
        spread([first_token(r) for r in taken]), spread(between), spread([per_token(r) for r in taken]),
        spread([worst_gap(r) for r in taken]), spread([end_to_end(r) for r in taken]),
        spread([delay(r) for r in taken]),
    )  # fmt: skip


def span(records: Sequence[Record]) -> float:
    """Seconds from the first arrival to the last thing that happened."""
    if not records:
        return 0.0
    last = max(max(record.end if record.answered else 0.0, *record.times[-1:], record.arrival) for record in records)
    return last - min(record.arrival for record in records)


# -- five goodputs -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rate:
    """So much a second."""

    requests: float
    tokens: float
    share: float  # of the requests


def timely(records: Sequence[Record], first: float, gap: float) -> Rate:
    """Past-Future's: only requests count whose first token came within `first` seconds and whose worst gap is at most
    `gap`."""
    good = [r for r in records if r.answered and first_token(r) <= first and worst_gap(r) <= gap]
    return _rate(good, records)


def flowing(records: Sequence[Record], gap: float, wait: float = 2.0) -> bool:
    """Sarathi-Serve's condition at a rate, whose capacity is the highest that meets it: the 99th percentile of all gaps
    is at most `gap`, and the median delay at most `wait` seconds."""
    found = summary(records)
    between = found.tbt.p99 if math.isfinite(found.tbt.p99) else 0.0  # answers of one token have no gaps
    return not found.refused and between <= gap and found.delay.p50 <= wait


def attained(records: Sequence[Record], first: float, token: float) -> float:
    """DistServe's share of requests with both their first token within `first` seconds and no more than `token` seconds
    a token after it: its goodput is the highest rate, for each device, at which this is at least 0.9."""
    good = sum(r.answered and first_token(r) <= first and per_token(r) <= token for r in records)
    return good / len(records) if records else 1.0


def in_service(records: Sequence[Record]) -> dict[str, Rate]:
    """JITServe's, by class: what came within its own promise. A token of a promise counts by its own time (first + k *
    gap after arrival), requests with a deadline count when they end by it, and programs when all of their turns do."""
    classes: dict[str, list[Record]] = {"promise": [], "deadline": [], "program": [], "none": []}
    for record in records:
        classes[service_class(record)].append(record)
    ended: dict[str, bool] = {}
    for record in classes["program"]:
        ended[record.program] = ended.get(record.program, True) and _by_deadline(record)
    found = {}
    seconds = span(records) or math.inf
    for name, some in classes.items():
        if not some:
            continue
        if name == "promise":
            tokens = sum(_on_time(record) for record in some)
            good = sum(record.answered and _on_time(record) == len(record.times) for record in some)
        else:
            kept = [
                r for r in some
                if (ended[r.program] if name == "program" else _by_deadline(r) if name == "deadline" else r.answered)
            ]  # fmt: skip
            tokens, good = sum(len(record.times) for record in kept), len(kept)
        found[name] = Rate(good / seconds, tokens / seconds, good / len(some))
    return found


def service_class(record: Record) -> str:
    """By what was promised."""
    if record.program:
        return "program"
    if record.promise is not None:
        return "promise"
    return "deadline" if math.isfinite(record.deadline) else "none"


def emitted(records: Sequence[Record]) -> float:
    """SmartSpec's: tokens a second that were given out, whatever was promised."""
    seconds = span(records)
    return sum(len(record.times) for record in records) / seconds if seconds else 0.0


def _by_deadline(record: Record) -> bool:
    return record.answered and record.end <= record.deadline


def _on_time(record: Record) -> int:
    """Tokens that came by the time promised for each."""
    assert record.promise is not None
    promise, times = record.promise, np.asarray(record.times) - record.arrival
    steps = np.arange(len(times))
    due = promise.first + (steps * promise.gap if math.isfinite(promise.gap) else np.where(steps > 0, math.inf, 0.0))
    return int((times <= due).sum())


def _rate(good: Sequence[Record], records: Sequence[Record]) -> Rate:
    seconds = span(records) or math.inf
    tokens = sum(len(record.times) for record in good)
    return Rate(len(good) / seconds, tokens / seconds, len(good) / len(records) if records else 1.0)


def jobs(records: Sequence[Record]) -> dict[str, float]:
    """Seconds that whole programs took, from their first arrival to their last end; infinity where one has not ended:
    Continuum's job completion times."""
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for record in records:
        if record.program:
            first[record.program] = min(first.get(record.program, math.inf), record.arrival)
            end = record.end if record.answered else math.inf
            last[record.program] = max(last.get(record.program, -math.inf), end)
    return {name: last[name] - first[name] for name in first}
