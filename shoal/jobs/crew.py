"""Encoding a large file on all cores: processes that turn lines into tokens, each a whole encoder of its own.

It knows how to start, feed and end them; it must not know what a line or a token is. The answers do not depend on
how many there are.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Pipe
from pathlib import Path

from shoal.core.errors import RowError, ShoalError
from shoal.jobs.encode import Encoded, RowEncoder
from shoal.jobs.schema import RowSpec
from shoal.jobs.settings import JobSettings
from shoal.text.checkpoint import ModelInfo

LARGE = 64 << 20  # bytes of input from which starting processes pays: seconds of one core
MOST = 8  # processes: more than that wait for the one that keeps their answers

Raws = Sequence[bytes | None]
Results = list[Encoded | RowError]


@dataclass(frozen=True, slots=True)
class Recipe:
    """To a process: the encoder it is to make."""

    folder: Path
    model: ModelInfo
    settings: JobSettings


class _Worker:
    """One encoding process. It ends when its connection does, however this process ends."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self._connection, theirs = Pipe()
        # Keys of custom_ids are Python's hashes: all processes must hash alike, and each has one core to itself.
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "shoal.jobs.crew_host", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        self._connection.send(recipe)

    def encode(self, raws: Raws) -> Results:
        """Hand in one batch and wait for its results. One call at a time."""
        try:
            self._connection.send(raws)
            results = self._connection.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            raise ShoalError(
                f"a process that reads the input ended by itself (exit code {code}): see what it printed and whether "
                "memory is short, and run the same command again"
            ) from error
        assert isinstance(results, list)
        return results

    def close(self) -> None:
        """End it. What it was doing is lost."""
        self._connection.close()
        self._process.terminate()
        self._process.wait()


class Crew:
    """An encoder over several processes, which live as long as a `stream` does."""

    def __init__(self, encoder: RowEncoder, model: ModelInfo, workers: int) -> None:
        """`encoder` is that of the model in `model.folder`; it answers for single lines here."""
        self._encoder = encoder
        self._recipe = Recipe(model.folder, model, encoder.settings)
        self._count = workers

    def parse(self, raw: bytes | None) -> RowSpec:
        """The row of a line; raises RowError."""
        return self._encoder.parse(raw)

    def stream(self, batches: Iterable[Raws]) -> Iterator[Results]:
        """The results of each batch, in order. ShoalError when a process dies."""
        seed = int.from_bytes(os.urandom(4), "big")
        workers = [_Worker(self._recipe, seed) for _ in range(self._count)]
        try:
            yield from self._spread(batches, workers)
        finally:
            for worker in workers:
                worker.close()

    def _spread(self, batches: Iterable[Raws], workers: list[_Worker]) -> Iterator[Results]:
        """Every process has a batch, and as many batches wait."""
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in workers:
            idle.put(worker)

        def encode(raws: Raws) -> Results:
            worker = idle.get()
            try:
                return worker.encode(raws)
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(len(workers)) as pool:
            ahead: deque[Future[Results]] = deque()
            for raws in batches:
                ahead.append(pool.submit(encode, raws))
                if len(ahead) > 2 * len(workers):
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()


def on_all_cores(encoder: RowEncoder, model: ModelInfo, size: int) -> RowEncoder | Crew:
    """An encoder that gives the same answers for an input of `size` bytes, sooner where processes pay."""
    cores = len(os.sched_getaffinity(0))
    return encoder if size < LARGE or cores < 2 else Crew(encoder, model, min(cores, MOST))
