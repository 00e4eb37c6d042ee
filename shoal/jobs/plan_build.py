"""Reading a whole job once: every row encoded, its prompts in the arena, its facts in two tables.

It knows the source and the encoder by what they answer; it must not know in which order rows will be computed.
Rows pass through in chunks, so that memory holds numbers per row and never texts.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shoal.core.errors import RowError
from shoal.jobs.arena import ArenaWriter
from shoal.jobs.keys import SIZE as KEY
from shoal.jobs.keys import twin_key
from shoal.jobs.plan_store import ARENA, COPY, ERRORS, ROW, UNIT, ErrorFile

CHUNK_ROWS = 2048
CHUNK_BYTES = 8 << 20
NO_KEY = bytes(KEY)

Place = tuple[int, int, int]  # line number, byte offset, byte length


class Source(Protocol):
    """A job's rows as places in a file."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def num_lines(self) -> int: ...  # blank ones too; known after an iteration

    def __iter__(self) -> Iterator[Place]: ...

    def read(self, offset: int, length: int) -> bytes | None: ...


class Encoded(Protocol):
    """What a plan must know of one good row."""

    @property
    def prompts(self) -> Sequence[array[int]]: ...
    @property
    def samples(self) -> int: ...
    @property
    def expect(self) -> float | None: ...  # output tokens of one sample, where known
    @property
    def max_tokens(self) -> int: ...
    @property
    def root(self) -> str: ...  # prompts under different roots share nothing
    @property
    def score_from(self) -> int: ...  # the first sample wants log-probabilities of its prompt from here on; -1: none
    @property
    def key(self) -> int: ...  # hash of the row's custom_id; 0: it has none
    @property
    def vector(self) -> bool: ...  # the last position's hidden state is needed, though nothing is sampled from it
    @property
    def alone(self) -> bool: ...  # its prompts take nothing from others
    @property
    def asks(self) -> Sequence[bytes]: ...  # a key for each prompt, of KEY bytes; empty: nothing has the same answer


class Named(Protocol):
    """A parsed row, as far as a plan reads it."""

    @property
    def custom_id(self) -> str | None: ...


class Encoder(Protocol):
    """Turns raw lines into tokens."""

    def stream(self, batches: Iterable[Sequence[bytes | None]]) -> Iterator[Sequence[Encoded | RowError]]: ...

    def parse(self, raw: bytes | None) -> Named: ...


@dataclass(frozen=True, slots=True)
class Collected:
    """A job's rows and units, and where the errors of bad rows end in the error file."""

    rows: npt.NDArray[Any]  # ROW
    units: npt.NDArray[Any]  # UNIT, of rows that are run
    asks: npt.NDArray[np.uint8]  # by unit: its key, zeros where it has none
    copies: npt.NDArray[Any]  # COPY
    copied_tokens: int  # prompt tokens of the copies' requests
    error_end: npt.NDArray[np.int64]
    answer_tokens: int  # sum of all limits


def collect(source: Source, encoder: Encoder, folder: Path, progress: Callable[[int, int], None]) -> Collected:
    """Encode every row of `source`; writes the arena and the error file into `folder`.

    `progress` is told rows and source bytes done so far, once a chunk.
    """
    tables = _Tables(ErrorFile(folder / ERRORS))
    ahead: deque[list[Place]] = deque()  # chunks the encoder has taken and not yet answered

    def raws() -> Iterator[list[bytes | None]]:
        for places in _chunks(iter(source)):
            ahead.append(places)
            yield [source.read(offset, length) for _, offset, length in places]

    with ArenaWriter(folder / ARENA) as arena:
        for results in encoder.stream(raws()):
            places = ahead.popleft()
            for place, result in zip(places, results, strict=True):
                tables.add(place, result, arena)
            progress(len(tables.rows[0]), places[-1][1] + places[-1][2])
    tables.refuse_repeated(source, encoder)
    return tables.finish()


class _Tables:
    """The columns of rows and units while they grow: typed arrays, no object per row."""

    def __init__(self, errors: ErrorFile) -> None:
        self.rows = tuple(array("q" if ROW[name].itemsize == 8 else "i") for name in _names(ROW))
        self.units = tuple(array(_typecode(UNIT[name])) for name in _names(UNIT))
        self._errors = errors
        self._roots: dict[str, int] = {}
        self._keys = array("q")  # of rows' custom_ids; 0: none
        self._asks = bytearray()  # a key for each unit
        self._twins = bytearray()  # a key for each row: equal ones have equal answers
        self._answer_tokens = 0

    def add(self, place: Place, result: Encoded | RowError, arena: ArenaWriter) -> None:
        """Take one row, good or bad."""
        row = len(self.rows[0])
        if isinstance(result, RowError):
            _append(self.rows, (*place, 0, self._errors.append(result)))
            self._keys.append(0)
            self._twins += NO_KEY
            return
        _append(self.rows, (*place, len(result.prompts), -1))
        self._keys.append(result.key)
        self._twins += twin_key(result.asks, result.samples) or NO_KEY
        self._asks += b"".join(result.asks) or NO_KEY * len(result.prompts)
        root = self._roots.setdefault(result.root, len(self._roots))
        expect = -1.0 if result.expect is None else result.expect
        self._answer_tokens += len(result.prompts) * result.samples * result.max_tokens
        unsampled = result.max_tokens == 0 and not result.vector  # then the last position's hidden state is not needed
        for number, prompt in enumerate(result.prompts):
            reach = 0 if result.alone else result.score_from - 1 if result.score_from >= 1 else -1
            length = len(prompt)
            facts = (row, number, length, length - unsampled, reach, result.samples, result.max_tokens, root, expect)
            _append(self.units, (arena.append(prompt), *facts))

    def refuse_repeated(self, source: Source, encoder: Encoder) -> None:
        """Turn second and later uses of a custom_id into row errors."""
        lines, offsets, lengths, prompts, error = self.rows
        first: dict[str | None, int] = {}
        for row in _suspects(self._keys):
            name = encoder.parse(source.read(offsets[row], lengths[row])).custom_id
            line = first.setdefault(name, lines[row])
            if line != lines[row]:
                message = f"custom_id is already that of line {line}: give each line its own"
                prompts[row], error[row] = 0, self._errors.append(RowError(message, "duplicate_custom_id", "custom_id"))

    def finish(self) -> Collected:
        """The columns as tables, without the units of rows that are not run: refused ones, and copies."""
        self._errors.close()
        rows, units = _table(ROW, self.rows), _table(UNIT, self.units)
        asks = np.frombuffer(self._asks, dtype=np.uint8).reshape(-1, KEY)
        copies = _copies(self._twins, rows["error"] < 0)
        run = rows["error"] < 0
        run[copies["row"]] = False
        copied = units[np.isin(units["row"], copies["row"])] if len(copies) else units[:0]
        tokens = int((copied["length"].astype(np.int64) * copied["samples"]).sum())
        ends, chosen = np.array(self._errors.ends, dtype=np.int64), run[units["row"]]
        return Collected(rows, units[chosen], asks[chosen], copies, tokens, ends, self._answer_tokens)


def _chunks(places: Iterator[Place]) -> Iterator[list[Place]]:
    """Consecutive rows, bounded in number and in bytes."""
    chunk: list[Place] = []
    size = 0
    for place in places:
        chunk.append(place)
        size += place[2]
        if len(chunk) >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _suspects(keys: array[int]) -> list[int]:
    """Rows whose key another row has too, in file order: the same custom_id, or by rare chance another's hash."""
    key = np.frombuffer(keys, dtype=np.int64) if keys else np.empty(0, dtype=np.int64)
    rank = np.argsort(key, kind="stable")
    same = (key[rank[1:]] == key[rank[:-1]]) & (key[rank[1:]] != 0)
    shared = np.zeros(len(key), dtype=bool)
    shared[rank[1:][same]] = True
    shared[rank[:-1][same]] = True
    found: list[int] = np.flatnonzero(shared).tolist()
    return found


def _copies(twins: bytearray, good: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Every good row that has the key of an earlier one, beside the first that has it; in order of both."""
    key = np.frombuffer(twins, dtype=np.uint64).reshape(-1, 2)
    rank = np.argsort(key[:, 0], kind="stable")
    same = key[rank[1:], 0] == key[rank[:-1], 0]
    suspect = np.zeros(len(key), dtype=bool)
    suspect[rank[1:][same]] = True
    suspect[rank[:-1][same]] = True
    rows = np.flatnonzero(suspect & good & key.any(axis=1))
    rows = rows[np.lexsort((rows, key[rows, 1], key[rows, 0]))]
    first = np.ones(len(rows), dtype=bool)
    first[1:] = (key[rows[1:]] != key[rows[:-1]]).any(axis=1)
    original = rows[first][np.cumsum(first) - 1]
    copies = np.empty(int((~first).sum()), dtype=COPY)
    copies["original"], copies["row"] = original[~first], rows[~first]
    return copies[np.lexsort((copies["row"], copies["original"]))]


def _append(columns: Sequence[array[Any]], values: Sequence[Any]) -> None:
    for column, value in zip(columns, values, strict=True):
        column.append(value)


def _names(dtype: np.dtype[Any]) -> tuple[str, ...]:
    return dtype.names or ()


def _typecode(dtype: np.dtype[Any]) -> str:
    return {"i8": "q", "i4": "i", "f4": "f"}[dtype.str[1:]]


def _table(dtype: np.dtype[Any], columns: Sequence[array[Any]]) -> npt.NDArray[Any]:
    """One structured array from its columns."""
    table = np.empty(len(columns[0]), dtype=dtype)
    for name, column in zip(_names(dtype), columns, strict=True):
        table[name] = column
    return table
