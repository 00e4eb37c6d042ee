"""A server that is started for a job, and asked as any other: it is waited for, and started again when it dies.

It knows processes, a port and a log; it must not know whose server it is, nor what is asked of it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.client import News
from shoal.core.errors import ShoalError
from shoal.core.types import Finish, Request

if TYPE_CHECKING:
    from shoal.remote.backend import Servers

LOCAL = "127.0.0.1"  # nobody else's business
LOOK = 0.2  # seconds between looks whether it answers
REPLY = 1.0  # seconds that it has to say so
DEATHS = 8  # in a row without an answer, after which the job gives up
LONGEST = 30.0  # seconds between a death and the next start, at most
PATIENCE = 4.0  # times as long as it took to start, without an answer, until it is thought to be gone
SHOWN = 15  # last lines of its log that are shown when it cannot be started


@dataclass(frozen=True, slots=True)
class Command:
    """How a server is started."""

    words: tuple[str, ...]
    environment: Mapping[str, str]

    def line(self) -> bytes:
        """As its guard reads it: not on a command line, which anybody on this machine may see, for it has a key."""
        return json.dumps([self.words, dict(self.environment)]).encode() + b"\n"


class OwnServer:
    """A Backend: one server of ours, and what asks it. Used by one thread."""

    def __init__(self, name: str, make: Callable[[int, str], Command], log: Path, model: str) -> None:
        """`make` says how it is started on a port, to answer those who know a key as `model`; what it prints goes to
        `log`."""
        self.name, self.log, self._model = name, log, model
        self.seconds = 0.0  # that its first start took
        self.deaths = 0  # since it last answered
        self.key = secrets.token_hex(16)
        self._port = _free_port()  # the same at every start, so that calls find it again
        self.url = f"http://{LOCAL}:{self._port}/v1"
        self._command = make(self._port, self.key)
        self._process: subprocess.Popen[bytes] | None = None
        self._hold = -1  # of the pipe whose end ends the server
        self._began = self._looked = 0.0
        self._again: float | None = None  # when it is started again
        self._up = False  # since its last start
        self._starts = 0
        self._servers: Servers | None = None
        self.start()

    def start(self) -> None:
        """Start it; `ready` says when it answers."""
        theirs, self._hold = os.pipe()
        guard = [sys.executable, "-m", "shoal.remote.guard", str(theirs)]
        try:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    guard, pass_fds=[theirs], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
        except OSError as error:
            raise ShoalError(f"{self.name} cannot be started, with its log in {self.log}: {error}") from error
        finally:
            os.close(theirs)
        with contextlib.suppress(BrokenPipeError), open(self._hold, "wb", closefd=False) as pipe:
            pipe.write(self._command.line())  # where it has ended already, a look at it says so
        self._began, self._again, self._up = time.monotonic(), None, False
        self._starts += 1

    def ready(self, timeout: float) -> bool:
        """Whether it answers, within so many seconds. ShoalError when it has ended instead."""
        end = time.monotonic() + timeout
        while not self._answers():
            if (how := self._ended()) is not None:
                raise ShoalError(f"{self.name} ended ({how}) before it answered:\n{self._last_words()}")
            if time.monotonic() >= end:
                return False
            time.sleep(min(LOOK, timeout))
        from shoal.remote.backend import GONE, Servers  # here, so that other jobs need not load what speaks HTTP

        self.seconds = time.monotonic() - self._began
        patience = max(GONE, PATIENCE * self.seconds)
        self._servers = Servers([self.url], self.key, direct=True, nobody=patience, gone=patience, life=self._life)
        return True

    # -- as a backend ------------------------------------------------------------------------------

    def submit(self, requests: Iterable[Request], watched: frozenset[str] = frozenset()) -> None:
        """Hand in calls, in plan order."""
        assert self._servers is not None, "it is not ready"
        self._servers.submit(requests, watched)

    def cancel(self, ids: Iterable[str]) -> None:
        """End calls."""
        assert self._servers is not None, "it is not ready"
        self._servers.cancel(ids)

    def outputs(self, timeout: float) -> News | None:
        """What has happened; a server that has died is started again meanwhile. ShoalError when that is in vain."""
        if self._servers is None:
            return None
        self._look(self._servers)
        news = self._servers.outputs(timeout)
        if news is not None and any(output.finish is Finish.STOP for output in news.outputs):
            self.deaths = 0
        return news

    def close(self) -> None:
        """End it."""
        if self._servers is not None:
            self._servers.close()
        self._end()

    # -- its life ----------------------------------------------------------------------------------

    def _look(self, servers: Servers) -> None:
        """See to a server that has died, or that is up again."""
        now = time.monotonic()
        if self._again is not None:
            if now >= self._again:
                self.start()
        elif (how := self._ended()) is not None:
            self._bury(servers, how, now)
        elif not self._up and now - self._looked >= LOOK:
            self._looked = now
            if self._answers():
                servers.say(f"{self.name} answers again after {now - self._began:.0f} s")
                servers.ask_again()

    def _bury(self, servers: Servers, how: str, now: float) -> None:
        self._end()
        self.deaths += 1
        if self.deaths >= DEATHS:
            raise ShoalError(
                f"{self.name} ended ({how}), {self.deaths} times without an answer; what was answered is kept: see "
                f"{self.log}, give it more memory or a smaller --memory, and run the same command again\n"
                f"{self._last_words()}"
            )
        pause = min(2.0 ** (self.deaths - 2), LONGEST) if self.deaths > 1 else 0.0
        self._again = now + pause
        later = f"in {pause:g} s" if pause else "now"
        servers.say(f"{self.name} ended by itself ({how}); it is started again {later}, its unfinished rows run again")

    def _answers(self) -> bool:
        """Whether it, and nobody else at its port, says that it has the model."""
        line = http.client.HTTPConnection(LOCAL, self._port, timeout=REPLY)
        try:
            line.request("GET", "/v1/models", headers={"Authorization": f"Bearer {self.key}"})
            response = line.getresponse()
            body = response.read() if response.status == http.HTTPStatus.OK else b""
            self._up = self._life() > 0 and self._model in _models(body)
        except (OSError, http.client.HTTPException):
            self._up = False  # it is not there yet
        finally:
            line.close()
        return self._up

    def _life(self) -> int:
        """Which of its lives it is in; 0 between two. Asked by any thread."""
        process = self._process
        return self._starts if process is not None and process.poll() is None else 0

    def _ended(self) -> str | None:
        """How it has ended; None while it lives."""
        code = None if self._process is None else self._process.poll()
        if code is None:
            return None
        number = -code if code < 0 else code - 128
        known = [one.name for one in signal.Signals if one.value == number]
        return f"signal {known[0]}" if known else f"exit code {code}"

    def _end(self) -> None:
        """Have the guard end it, and wait until it has."""
        if self._hold >= 0:
            os.close(self._hold)
            self._hold = -1
        if self._process is not None:
            self._process.wait()

    def _last_words(self) -> str:
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - (1 << 14)))
            lines = log.read().decode("utf-8", "replace").splitlines()
        return "\n".join([*lines[-SHOWN:], f"all of it is in {self.log}"])


def _models(body: bytes) -> list[object]:
    """The names in a list of models; none in anything else."""
    try:
        return [each["id"] for each in json.loads(body)["data"]]
    except (ValueError, LookupError, TypeError):
        return []


def _free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as free:
        free.bind((LOCAL, 0))
        port: int = free.getsockname()[1]
    return port
