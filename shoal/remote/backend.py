"""Servers that answer calls, as a backend: every call is made until it is answered, refused, or has been made in vain
too often.

It knows HTTP and the clock; it must not know what calls are for. All calls are made in one thread of their own, the
only asynchronous code of a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import httpx2 as httpx

from shoal.client import News
from shoal.core.errors import ShoalError, UsageError
from shoal.core.types import Finish, Output, Request
from shoal.remote.limit import MOST
from shoal.remote.queue import Queue
from shoal.remote.server import Server
from shoal.remote.verdict import Again, End, Verdict, judge
from shoal.remote.words import Call, Reply

TRIES = 6  # times that a call is made before its row fails, refusals for want of room apart
FIRST_BACK_OFF, LONGEST_BACK_OFF = 0.5, 30.0  # seconds between them
NOBODY, GONE = 15.0, 600.0  # seconds without any server, when there never was one and when there was
CONNECT = 10.0  # seconds
STALLED = 600.0  # seconds without an answer, as long as nothing is known about answers
LEAST_STALL, TIMES = 60.0, 8  # later: at least, and times the longest answer so far
NEWS_EVERY = 0.2  # seconds


@dataclass(slots=True)
class _Try:
    """A call, and what has become of it so far."""

    call: Call
    tries: int = 0
    began: float | None = None  # when it was first sent [s]
    task: asyncio.Task[None] | None = field(default=None)


class Servers:
    """A Backend. Its methods are for one thread, the caller's; all that begins with an underline is the other's."""

    def __init__(
        self, urls: Sequence[str], key: str = "", stalled: float = STALLED, nobody: float = NOBODY, tries: int = TRIES
    ) -> None:
        """`urls` from `parse_url`. The key goes into requests' headers and nowhere else. UsageErrors."""
        self.servers = [Server(url, MOST / len(urls)) for url in urls]
        self._client = _client(key.strip())
        self._stalled, self._nobody, self._tries = stalled, nobody, tries
        self._longest = 0.0  # seconds to an answer, so far
        self._queue, self._open = Queue(), dict[str, _Try]()  # every call that has not ended, by id
        self._counts = Counter[str]()
        self._ever = False  # whether any server has ever said anything
        # To the caller: ends of calls, ids of those that start, and why there will be no more.
        self._inbox: queue.SimpleQueue[Output | str | BaseException] = queue.SimpleQueue()
        self._random = random.Random(0)
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="shoal servers", daemon=True)
        self._thread.start()

    # -- the caller's thread -----------------------------------------------------------------------

    def submit(self, requests: Iterable[Request], watched: frozenset[str] = frozenset()) -> None:
        """Hand in calls, in plan order."""
        calls = [request for request in requests if isinstance(request, Call)]
        self._loop.call_soon_threadsafe(self._add, calls)

    def cancel(self, ids: Iterable[str]) -> None:
        """End calls; what the server still makes of them is not read."""
        self._loop.call_soon_threadsafe(self._cancel, set(ids))

    def outputs(self, timeout: float) -> News | None:
        """What has happened, within `timeout` seconds. ShoalError when no server will answer any more."""
        end = time.monotonic() + timeout
        outputs: list[Output] = []
        started: list[str] = []
        with contextlib.suppress(queue.Empty):
            while True:
                left = 0.0 if outputs or started else max(end - time.monotonic(), 0.0)
                item = self._inbox.get(timeout=left) if left else self._inbox.get_nowait()
                if isinstance(item, BaseException) and (outputs or started):
                    self._inbox.put(item)  # what has come before it counts
                    break
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, str):
                    started.append(item)
                else:
                    outputs.append(item)
        if not outputs and not started:
            if not self._thread.is_alive():
                raise ShoalError("the thread that asks servers has ended: run the same command again to continue")
            return None
        running = sum(server.running for server in self.servers)
        counters = dict(self._counts)
        return News(
            tuple(outputs), tuple(started), waiting=len(self._open) - running, running=running, counters=counters
        )

    def close(self) -> None:
        """Break off what is under way."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    # -- the other thread --------------------------------------------------------------------------

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        pump = self._loop.create_task(self._pump())
        pump.add_done_callback(self._crashed)
        try:
            self._loop.run_forever()
        finally:
            tasks = [pump, *(one.task for one in self._open.values() if one.task is not None)]
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._client.aclose())
            self._loop.close()

    def _add(self, calls: list[Call]) -> None:
        for call in calls:
            self._open[call.id] = _Try(call)
        self._queue.add(calls)
        self._wake.set()

    def _cancel(self, ids: set[str]) -> None:
        self._queue.remove(ids)
        for id in ids & self._open.keys():
            if (task := self._open[id].task) is not None:
                task.cancel()
            self._end(Reply(id, finish=Finish.CANCEL))

    def _end(self, output: Output) -> None:
        """A call is over, once."""
        if self._open.pop(output.id, None) is not None:
            self._inbox.put(output)
        self._wake.set()

    async def _pump(self) -> None:
        """Send whatever there is room for, whenever something has changed."""
        while True:
            self._wake.clear()
            now = time.monotonic()
            for server in self._ready(now):
                call = self._queue.take(server)
                if call is not None:
                    self._send(server, self._open[call.id], now)
            waits = [wait for server in self.servers if (wait := server.wait(now)) > 0]
            if self._queue and any(server.open(now) for server in self.servers):
                continue
            with contextlib.suppress(TimeoutError):  # not wait_for: Python 3.11's forgets that it was cancelled
                async with asyncio.timeout(min([NEWS_EVERY, *waits])):
                    await self._wake.wait()

    def _ready(self, now: float) -> list[Server]:
        """Servers that take a call now, the one with the least to do first."""
        return sorted((s for s in self.servers if s.open(now)), key=lambda server: server.running)

    def _send(self, server: Server, this: _Try, now: float) -> None:
        if this.began is None:
            this.began = now
            self._inbox.put(this.call.id)
        server.running += 1
        this.task = self._loop.create_task(self._make(server, this))
        this.task.add_done_callback(self._crashed)

    def _crashed(self, task: asyncio.Task[None]) -> None:
        """A mistake of ours ends the job, and no call waits for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._inbox.put(error)

    async def _make(self, server: Server, this: _Try) -> None:
        """Make a call once, and see to what follows from it."""
        sent = time.monotonic()
        self._counts["requests"] += 1
        try:
            verdict = await self._ask(server, this.call)
            running = server.running
        finally:
            server.running -= 1
            this.task = None
            self._wake.set()
        now = time.monotonic()
        if verdict is None:
            self._unreached(server, this, now)
            return
        server.reached()
        self._ever = True
        match verdict:
            case End():
                error = ShoalError(f"{server.url}: {verdict.why}")
                error.exit_code = verdict.exit_code
                self._inbox.put(error)
            case Again():
                self._again(server, this, verdict, sent, now)
            case Reply() if verdict.code == "url_not_supported" and not server.useful:
                self._inbox.put(UsageError(f"{server.place(this.call.url)}: {verdict.error}: correct --endpoint"))
            case Reply():
                self._longest = max(self._longest, now - sent)
                server.limit.answered(now, running, max(verdict.usage[1], 1))
                if not verdict.error:
                    server.answered()
                self._count(this, verdict, now)
                self._end(verdict)

    async def _ask(self, server: Server, call: Call) -> Verdict | None:
        """What the server makes of a call; None when it cannot be reached."""
        stall = max(LEAST_STALL, TIMES * self._longest) if self._longest else self._stalled
        try:
            async with asyncio.timeout(min(stall, self._stalled)):
                response = await self._client.post(server.place(call.url), content=call.body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            server.trouble = str(error) or type(error).__name__
            return None
        except (TimeoutError, httpx.TimeoutException):
            return Again("no_reply", f"the server has not answered for {min(stall, self._stalled):g} s", late=True)
        except (httpx.TransportError, httpx.DecodingError) as error:
            return Again("no_reply", f"the connection was lost before the answer was whole ({type(error).__name__})")
        return judge(call, response.status_code, response.headers, response.content)

    def _again(self, server: Server, this: _Try, verdict: Again, sent: float, now: float) -> None:
        """A call has come to nothing: it is made again, or its row fails."""
        if verdict.overload:
            self._counts["refused"] += 1
            server.limit.refused(now, sent)
            server.pause(now, verdict.wait)
            self._queue.give_back(this.call)
            return
        self._counts["broken"] += 1
        if verdict.late:
            server.limit.refused(now, sent)
        this.tries += 1
        if this.tries >= self._tries:
            words = f"{verdict.why}; it was asked {this.tries} times"
            self._end(Reply(this.call.id, finish=Finish.ERROR, error=words, code=verdict.code))
            return
        longest = min(FIRST_BACK_OFF * 2 ** (this.tries - 1), LONGEST_BACK_OFF)
        wait = longest * self._random.uniform(0.5, 1.0) if verdict.wait is None else verdict.wait
        self._loop.call_later(wait, self._return, this.call)

    def _return(self, call: Call) -> None:
        if call.id in self._open:
            self._queue.give_back(call)
            self._wake.set()

    def _unreached(self, server: Server, this: _Try, now: float) -> None:
        """The server is not there. No row is the worse for it; without any server for long the job ends."""
        self._counts["broken"] += 1
        server.unreached(now)
        self._return(this.call)
        since = [each.silent_since for each in self.servers]
        if any(one is None for one in since):
            return
        silent = now - max(one for one in since if one is not None)
        if silent >= (GONE if self._ever else self._nobody):
            where = ", ".join(f"{each.url} ({each.trouble})" for each in self.servers)
            self._inbox.put(
                ShoalError(
                    f"no server answers at {where}: start it, or correct --endpoint, and run the same command again; "
                    "what was answered is kept"
                )
            )

    def _count(self, this: _Try, reply: Reply, now: float) -> None:
        """Note what an answer has cost, and how long it took from the first time that it was asked for."""
        cached = int(reply.timing["cached"]) if reply.timing is not None else 0
        self._counts["prompt_computed"] += reply.usage[0] - cached
        self._counts["cached"] += cached
        self._counts["output_computed"] += reply.usage[1]
        began = now if this.began is None else this.began
        reply.timing = {
            "arrival": began, "start": began, "first": began, "end": now, "cached": float(cached), "preemptions": 0.0,
        }  # fmt: skip


def _client(key: str) -> httpx.AsyncClient:
    """What speaks HTTP. A UsageError for a key, or an environment, that it cannot do with; the key is not in it."""
    headers = {"Content-Type": "application/json", "User-Agent": "shoal"}
    if not (key.isascii() and key.isprintable()):
        raise UsageError(
            "OPENAI_API_KEY has characters that no header can have, such as curly quotes or a line break: "
            "copy the key again, without quotes"
        )
    if key:
        headers["Authorization"] = f"Bearer {key}"
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    try:
        return httpx.AsyncClient(headers=headers, limits=limits, timeout=httpx.Timeout(None, connect=CONNECT))
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        raise UsageError(
            f"no connection can be made as the environment has it ({error}): correct or unset HTTP_PROXY, "
            "HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
        ) from error
