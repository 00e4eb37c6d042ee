"""Rows from whatever yields them, read in a thread of their own, so that one that comes late keeps nobody waiting.

It must not know what a row is. No row is read that was not asked for.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from types import TracebackType

SLOW = 0.05  # seconds after which rows that come slowly are handed on without waiting for the others asked for


class Intake:
    """Its methods are for one thread, the caller's; the rows' iterator is advanced by the other alone."""

    def __init__(self, rows: Iterator[object]) -> None:
        self.over = False  # every row has been handed on
        self.asked = 0  # rows that were asked for and have not been handed on
        self._arrived: queue.SimpleQueue[_Row | _End] = queue.SimpleQueue()
        self._wanted = threading.Semaphore(0)
        self._closed = threading.Event()
        self._until = 0.0  # rows that are asked for may take [s, monotonic]
        how = (rows, self._wanted, self._arrived, self._closed)
        self._thread = threading.Thread(target=_read, args=how, name="shoal rows", daemon=True)

    def want(self, number: int) -> None:
        """Ask for so many rows more."""
        if self.over:
            return
        self.asked += number
        self._until = time.monotonic() + SLOW
        self._wanted.release(number)
        if self._thread.ident is None:
            self._thread.start()

    def take(self, patience: float) -> list[object]:
        """Rows that have arrived: all that were asked for, or those that are there after a short while; the first is
        waited for with more `patience` [s]. An error in reading a row is raised here."""
        until, longest = self._until, max(self._until, time.monotonic() + patience)
        given: list[object] = []
        while self.asked and not self.over:
            left = (until if given else longest) - time.monotonic()
            try:
                item = self._arrived.get(timeout=left) if left > 0 else self._arrived.get_nowait()
            except queue.Empty:
                break
            if isinstance(item, _Row):
                given.append(item.row)
                self.asked -= 1
                continue
            self.over, self.asked = True, 0
            if item.error is not None:
                raise item.error
        return given

    def close(self) -> None:
        """No further row is read. One that is being read is not waited for."""
        self._closed.set()
        self._wanted.release()


class _Row:
    """A row that has arrived."""

    __slots__ = ("row",)

    def __init__(self, row: object) -> None:
        self.row = row


class _End:
    """That there are no more, and why: what ends the thread goes to whoever takes the rows."""

    def __init__(self, arrived: queue.SimpleQueue[_Row | _End]) -> None:
        self.error: BaseException | None = None
        self._arrived = arrived

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        self._arrived.put(self)
        return True


def _read(
    rows: Iterator[object],
    wanted: threading.Semaphore,
    arrived: queue.SimpleQueue[_Row | _End],
    closed: threading.Event,
) -> None:
    nothing = object()
    with _End(arrived):
        while wanted.acquire() and not closed.is_set() and (row := next(rows, nothing)) is not nothing:
            arrived.put(_Row(row))
