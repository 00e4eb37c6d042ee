"""What a study found, in words and as JSON. It must not know how it was found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from shoal.jobs.units import count, duration, percent
from shoal.sim.capacity import Capacity
from shoal.sim.metrics import Spread, interval
from shoal.what_if.study import Run, Study

Line = tuple[str, Callable[[Run], float], Callable[[float], str]]


def seconds(value: float) -> str:
    """A time as short as it is: 12 ms, 1.25 s, 3 min 20 s."""
    if not math.isfinite(value):
        return "never" if value > 0 else "–"
    if value < 1.0:
        return f"{1e3 * value:.3g} ms"
    return f"{value:.3g} s" if value < 60 else duration(value)


def share(value: float) -> str:
    """A part of one."""
    return percent(value, 1.0)


def lines(found: Study) -> list[Line]:
    """What is said of every policy."""
    runs = [run for some in found.runs.values() for run in some]
    said: list[Line] = [
        ("answered", lambda run: run.summary.answered, count),
        ("seconds", lambda run: run.summary.seconds, seconds),
        ("tokens/s", lambda run: run.summary.tokens_per_second, count),
        ("TTFT p50", lambda run: run.summary.ttft.p50, seconds),
        ("TTFT p99", lambda run: run.summary.ttft.p99, seconds),
        ("TBT p99", lambda run: run.summary.tbt.p99, seconds),
        ("worst gap p99", lambda run: run.summary.worst_gap.p99, seconds),
        ("end to end p50", lambda run: run.summary.e2e.p50, seconds),
        ("preempted", lambda run: run.summary.preempted, count),
        ("memory used", lambda run: run.memory, share),
    ]
    if any(run.timely is not None for run in runs):
        said.append(("in time", lambda run: run.timely.share if run.timely else 0.0, share))
    if any(run.jobs is not None for run in runs):
        said.append(("programs that ended, mean", lambda run: math.nan if run.jobs is None else run.jobs, seconds))
        said.append(("programs that ended", lambda run: math.nan if run.ended is None else run.ended, share))
    if any(run.bubbles is not None for run in runs):
        said.append(("bubbles", lambda run: run.bubbles or 0.0, share))
    return said


def rows(found: Study) -> Iterator[tuple[str, ...]]:
    """A line for each number: what it is, then by policy its mean over seeds, with the half of the 95 % interval where
    there are several."""
    for name, of, written in lines(found):
        cells = [name]
        for policy in found.runs:
            mean = interval(found.values(policy, of))
            more = f" ± {written(mean.half)}" if math.isfinite(mean.half) and mean.half else ""
            cells.append(written(mean.mean) + more)
        yield tuple(cells)


def remarks(found: Study) -> list[str]:
    """What must be said beside the table."""
    said = []
    if found.real_seconds is not None:
        said.append(f"Where the job ran it took {seconds(found.real_seconds)}, reading and writing included.")
    if found.left_out:
        said.append(f"{count(found.left_out)} prompts are left out: their rows have no answer to replay.")
    if found.placed:
        said.append(
            f"Rows went one by one, in the plan's order, to instances by {found.placed}. `shoal run` deals each engine "
            "one run of the plan, so that it computes fewer shared beginnings again than is said here."
        )
    if found.spared:
        said.append(
            f"Of {count(found.spared + 1)} seeds one was run: nothing here is drawn from a seed, so all would be the "
            "same run, and there is no interval. Arrivals as poisson:RATE are drawn, where it is no job."
        )
    for policy, runs in found.runs.items():
        for error, number in runs[0].errors.items():
            said.append(f"{policy}: {count(number)} refused: {error}")
        if unfinished := runs[0].summary.unfinished:
            said.append(f"{policy}: {count(unfinished)} had not ended when the simulation did.")
    for policy, found_rates in found.capacities.items():
        said.append(f"{policy}: capacity {capacity_words(found_rates)}")
    return said


def capacity_words(rates: list[Capacity]) -> str:
    """Requests a second that keep the gap."""
    mean = interval(rate.rate for rate in rates)
    more = f" ± {mean.half:.3g}" if math.isfinite(mean.half) else ""
    odd = "" if all(rate.monotone for rate in rates) else "; a rate below one that met it did not: the tail is noisy"
    return f"{mean.mean:.3g}{more} requests a second{odd}"


def print_study(found: Study, console: Console) -> None:
    """The table and what belongs to it."""
    console.print(
        f"{found.name} with {found.machine}: {count(found.positions)} tokens of memory", markup=False, highlight=False
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for policy in found.runs:
        table.add_column(policy, justify="right", overflow="fold")
    for row in rows(found):
        table.add_row(*row)
    console.print(table)
    for remark in remarks(found):
        console.print(remark, markup=False, highlight=False)


def to_json(found: Study) -> str:
    """All of it. What has no end, or is not a number, is null."""
    return json.dumps(_plain(asdict(found)), indent=1)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def spread_words(values: Spread) -> str:
    """The percentiles of times."""
    return (
        f"median {seconds(values.p50)}, 90 % within {seconds(values.p90)}, 99 % within {seconds(values.p99)}, "
        f"at most {seconds(values.most)}"
    )
