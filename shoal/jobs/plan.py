"""The plan of a whole job: what each row costs, in which order rows run, and who needs which prefix again.

It knows the tables that planning leaves on the disk; it must not know engines, answers or the journal.
Words: a *unit* is one prompt of one row; it is asked for `samples` times. Its *position* is its place in serving
order; an *index* counts requests in serving order, so a unit with n samples occupies n consecutive indexes.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from shoal.core.errors import RowError, StateError
from shoal.jobs import plan_store as store
from shoal.jobs.arena import Arena
from shoal.jobs.files import disk_errors
from shoal.jobs.keys import SIZE as KEY
from shoal.jobs.plan_arrange import arrange, facts_of
from shoal.jobs.plan_build import NO_KEY, Encoder, Source, collect
from shoal.jobs.plan_sort import overlaps

Order = Literal["prefix", "input", "length"]
Staircase = tuple[tuple[int, int], ...]

_WINDOW = 1024  # units read at once when the plan is walked


@dataclass(frozen=True, slots=True)
class Row:
    """One input row. Offsets and lengths are bytes of the source."""

    line: int  # from 1
    offset: int
    length: int
    prompts: int  # 0 for a bad row
    error: RowError | None


@dataclass(frozen=True, slots=True)
class Unit:
    """One prompt as it is fed to the engine."""

    position: int
    index: int  # of its first sample
    row: int  # from 0
    prompt: int  # number of the prompt within its row
    tokens: array[int]
    samples: int
    futures: tuple[Staircase, ...] | None  # Request.future of each sample; None: nobody knows
    ask: bytes = b""  # equal ones have equal answers, sample by sample; empty: nothing has the same


class Plan:
    """A finished plan, memory-mapped. Open it with `build_plan` or `Plan.load`."""

    def __init__(self, folder: Path, summary: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> None:
        self.folder = folder
        self._summary, self._arrays = summary, arrays
        self.order: Order = summary["key"]["order"]
        self.hash: str = hashlib.sha256(json.dumps([summary["key"], summary["files"]]).encode()).hexdigest()
        self.num_lines: int = summary["lines"]  # blank ones too
        self.num_rows: int = summary["rows"]
        self.num_bad: int = summary["bad"]  # rows that have an error instead of prompts
        self.num_units: int = summary["units"]
        self.num_requests: int = summary["requests"]  # samples of all units
        self.num_copies: int = summary["copies"]  # rows that ask for what an earlier row asks for: they have no units
        self.copied_tokens: int = summary["copied_tokens"]  # prompt tokens of the copies' requests
        self.prompt_tokens: int = summary["prompt_tokens"]  # of all requests, copies included
        self.bound: int = summary["bound"]  # the least number of prompt tokens that must be computed
        self.answer_tokens: int = summary["answer_tokens"]  # the most that all requests may produce
        self.last_again: int = summary["last_again"]  # fully cached prompts whose last token is computed again
        self._arena = Arena(folder / store.ARENA)
        self._rows, self._units, self._error_end = arrays["rows"], arrays["units"], arrays["error_end"]
        self._asks, self._copies = arrays["asks"], arrays["copies"]
        self._unit_at, self._index = arrays["order"], arrays["index"]
        self._start, self._depth, self._next = (arrays[f"future_{name}"] for name in ("start", "depth", "index"))

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """The plan kept in `folder`, every file verified. Raises StateError when there is none or it is damaged."""
        summary = store.load_summary(folder)
        if summary is None:
            raise StateError(f"there is no finished plan in {folder}. Run again: it is made from the input.")
        store.verify(folder, summary)
        Arena(folder / store.ARENA, verify=True)
        return cls(folder, summary, {name: np.asarray(values) for name, values in store.load_arrays(folder).items()})

    def without(self, rows: npt.NDArray[np.int64]) -> Plan:
        """The plan of the other rows: their order, bound and future. Totals of the input stay what they are."""
        kept = ~np.isin(self._units["row"], rows)
        arrays, totals = arrange(self._units[kept], self._arena, self.order)
        arrays = {**self._arrays, **arrays, "units": self._units[kept], "asks": self._asks[kept]}
        return Plan(self.folder, {**self._summary, **totals, "prompt_tokens": self.prompt_tokens}, arrays)

    def shares(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many tokens the unit at each of these positions may take from the one at the position before it in the
        list; 0 for the first."""
        facts = facts_of(self._units[self._unit_at[positions]], self._arena)
        here = np.arange(len(positions))
        found = np.zeros(len(here), dtype=np.int64)
        if self.order != "length" and len(here):
            found[1:] = np.minimum(overlaps(facts.prompts, here[:-1], here[1:]), facts.reach[1:])
        return found

    def bound_of(self, positions: npt.NDArray[np.int64]) -> int:
        """The least number of prompt tokens to compute for the units at these positions alone."""
        return int(arrange(self._units[self._unit_at[positions]], self._arena, self.order)[1]["bound"])

    def index(self, position: int) -> int:
        """The index of the first request of the unit at a position; of the first beyond the last, their number."""
        return int(self._index[position]) if position < self.num_units else self.num_requests

    @property
    def saved(self) -> int:
        """Prompt tokens that sharing can save."""
        return self.prompt_tokens - self.bound

    @property
    def units(self) -> npt.NDArray[Any]:
        """Every prompt that is computed, in file order: plan_store.UNIT."""
        return self._units

    @property
    def served(self) -> npt.NDArray[np.int64]:
        """Numbers of the units in serving order."""
        return self._unit_at.astype(np.int64)

    @property
    def lines(self) -> npt.NDArray[np.int64]:
        """Line numbers of all rows, ascending."""
        return self._rows["line"].astype(np.int64)

    def line(self, number: int) -> int:
        """Line number of row `number`."""
        return int(self._rows["line"][number])

    def row(self, number: int) -> Row:
        """Row `number`, from 0 in file order."""
        line, offset, length, prompts, error = self._rows[number].tolist()
        return Row(line, offset, length, prompts, self._error(error) if error >= 0 else None)

    def bad_rows(self) -> Iterator[tuple[int, Row]]:
        """(number, row) of every row that has an error, in file order."""
        for number in np.flatnonzero(self._rows["error"] >= 0).tolist():
            yield number, self.row(number)

    def unit(self, position: int) -> Unit:
        """The unit served at `position`."""
        return next(self.units_from(position))

    def units_from(self, position: int = 0, wanted: Callable[[int], bool] | None = None) -> Iterator[Unit]:
        """Units in serving order from `position` on; with `wanted`, only those whose row number it accepts."""
        for low in range(position, self.num_units, _WINDOW):
            high = min(low + _WINDOW, self.num_units)
            units = self._units[self._unit_at[low:high]]
            asks = self._asks[self._unit_at[low:high]].tobytes()
            facts = zip(
                range(low, high),
                self._index[low:high].tolist(),
                *(units[name].tolist() for name in ("row", "prompt", "offset", "length", "goal", "samples")),
                self._staircases(low, high),
                strict=True,
            )
            for place, index, row, prompt, offset, length, goal, samples, last in facts:
                if wanted is None or wanted(row):
                    futures = _sample_futures(index, samples, goal, last)
                    tokens, ask = self._arena.slice(offset, length), _known(asks, place - low)
                    yield Unit(place, index, row, prompt, tokens, samples, futures, ask)

    def units_by_row(self, wanted: Callable[[int], bool]) -> Iterator[Unit]:
        """Units in file order, those of a row together, whose row number is wanted; they have no place in the plan."""
        for low in range(0, self.num_units, _WINDOW):
            yield from self._placeless(low, low + _WINDOW, wanted)

    def units_like(self, row: int) -> list[Unit]:
        """The units of a row, or of the one that it is a copy of, in order of its prompts; they have no place."""
        original = self._copies["original"][self._copies["row"] == row]
        low, high = np.searchsorted(
            self._units["row"], [original[0], original[0] + 1] if len(original) else [row, row + 1]
        )
        return [replace(unit, row=row) for unit in self._placeless(int(low), int(high), lambda row: True)]

    def _placeless(self, low: int, high: int, wanted: Callable[[int], bool]) -> Iterator[Unit]:
        """Units number low … high - 1 without their place in the plan."""
        units, asks = self._units[low:high], self._asks[low:high].tobytes()
        facts = zip(*(units[name].tolist() for name in ("row", "prompt", "offset", "length", "samples")), strict=True)
        for place, (row, prompt, offset, length, samples) in enumerate(facts):
            if wanted(row):
                yield Unit(-1, -1, row, prompt, self._arena.slice(offset, length), samples, None, _known(asks, place))

    def rows_of(self, lines: Iterable[int]) -> npt.NDArray[np.int64]:
        """The numbers of the rows in these input lines."""
        return np.searchsorted(self._rows["line"], np.fromiter(lines, dtype=np.int64))

    def copies_of(self, row: int) -> list[int]:
        """The rows that are copies of this one, in file order; none of a row that is a copy itself."""
        low, high = np.searchsorted(self._copies["original"], [row, row + 1])
        return self._copies["row"][low:high].tolist()  # type: ignore[no-any-return]

    def copies(self) -> Iterator[tuple[int, int]]:
        """Every copy with the row that it is a copy of before it, in order of both."""
        for low in range(0, self.num_copies, _WINDOW):
            yield from self._copies[low : low + _WINDOW].tolist()

    def units_of(self, row: int) -> list[Unit]:
        """The units of a row, in serving order."""
        numbers = np.flatnonzero(self._units["row"] == row)
        return [self.unit(position) for position in np.flatnonzero(np.isin(self._unit_at, numbers)).tolist()]

    def future(self, index: int) -> Staircase:
        """Request.future of the request at `index`: (depth, index) pairs, deepest first."""
        if not 0 <= index < self.num_requests:
            raise IndexError(f"request {index} of {self.num_requests}")
        position = int(np.searchsorted(self._index, index, side="right")) - 1
        unit = self._units[self._unit_at[position]]
        first = int(self._index[position])
        (last,) = self._staircases(position, position + 1)
        return _sample_futures(first, int(unit["samples"]), int(unit["goal"]), last)[index - first]

    def _staircases(self, low: int, high: int) -> list[Staircase]:
        """Staircases of the last samples of the units at positions low … high - 1."""
        start = self._start[low : high + 1].tolist()
        base = start[0]
        steps = self._depth[base : start[-1]].tolist(), self._next[base : start[-1]].tolist()
        pairs = list(zip(*steps, strict=True))
        return [tuple(pairs[a - base : b - base]) for a, b in zip(start, start[1:], strict=False)]

    def _error(self, number: int) -> RowError:
        start = int(self._error_end[number - 1]) if number else 0
        return store.read_error(self.folder / store.ERRORS, start, int(self._error_end[number]))


def build_plan(
    source: Source,
    encoder: Encoder,
    folder: Path,
    order: Order = "prefix",
    key: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """The plan of `source`, made in `folder` unless the one there already is of the same source, order and key.

    `key` must change with everything else that could change a token (tokenizer, template, settings). `progress` is
    told rows and bytes read so far. A torn or damaged plan is made again.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        plan = _kept(source, folder, order, key)
        if plan is not None:
            return plan
        store.clear(folder)
        collected = collect(source, encoder, folder, progress or _silent)
        arrays, totals = arrange(collected.units, Arena(folder / store.ARENA), order)
        bad = int((collected.rows["error"] >= 0).sum())
        arrays |= {"rows": collected.rows, "units": collected.units, "error_end": collected.error_end}
        arrays |= {"asks": collected.asks, "copies": collected.copies}
        totals |= {"lines": source.num_lines, "rows": len(collected.rows), "bad": bad}
        totals |= {"copies": len(collected.copies), "copied_tokens": collected.copied_tokens}
        totals["prompt_tokens"] += collected.copied_tokens
        totals["answer_tokens"] = collected.answer_tokens
        store.save(folder, _key(source, key, order), arrays, totals)
        return Plan.load(folder)


def _kept(source: Source, folder: Path, order: Order, key: str) -> Plan | None:
    """The plan in `folder` if it is whole and of this job."""
    try:
        summary = store.load_summary(folder)
        if summary is not None and summary["key"] == _key(source, key, order):
            return Plan.load(folder)
    except StateError:  # a plan holds nothing that the input does not: damaged is as good as missing
        return None
    return None


def _key(source: Source, key: str, order: Order) -> dict[str, str]:
    return {"source": source.fingerprint, "key": key, "order": order}


def _known(asks: bytes, place: int) -> bytes:
    """The key at a place of an array of keys; empty where there is none."""
    ask = asks[place * KEY : (place + 1) * KEY]
    return ask if ask != NO_KEY else b""


def _sample_futures(index: int, samples: int, goal: int, last: Staircase) -> tuple[Staircase, ...]:
    """Every sample but the last leaves all that is computed of the prompt to the next one."""
    return (*(((goal, index + sample),) if goal else () for sample in range(1, samples)), last)


def _silent(rows: int, size: int) -> None:
    """Report no progress."""
