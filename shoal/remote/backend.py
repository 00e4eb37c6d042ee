"""Servers that answer calls, as a backend: every call is made until it is answered, refused, or has been made in vain
too often.

It knows HTTP and the clock; it must not know what calls are for. All calls are made in one thread of their own, the
only asynchronous code of a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import httpx2 as httpx

from shoal.client import News
from shoal.core.errors import ShoalError
from shoal.core.types import Finish, Output, Request
from shoal.remote.connection import client
from shoal.remote.inbox import Blamed, Inbox, Said, Waits
from shoal.remote.limit import MOST
from shoal.remote.queue import Queue
from shoal.remote.server import Server
from shoal.remote.tries import Try
from shoal.remote.verdict import Again, End, Verdict, judge
from shoal.remote.words import Call, Reply

TRIES = 6  # times that a call is made before its row fails, refusals for want of room apart
NOBODY, GONE = 15.0, 600.0  # seconds in which nothing is answered, when nothing was ever heard and when something was
LONG_WAIT = 60.0  # seconds without an answer, or of a pause that is asked for, that the user is told about
MANY = (
    8  # calls that are told that the address or the key is wrong, by a server that has answered none, before it is so
)
STALLED = 600.0  # seconds without an answer, as long as nothing is known about answers
LEAST_STALL, TIMES = 60.0, 8  # later: at least, and times the longest answer so far; twice as long at each try,
LONGEST_STALL = 3600.0  # up to this
NEWS_EVERY = 0.2  # seconds
DYING = 8.0  # seconds in which a server of ours ends whose engine has: until then a fault of its own is held back,
SETTLED = 1.0  # unless it answers another after these
LOOK = 0.05  # seconds between looks at it


class Servers:
    """A Backend. Its methods are for one thread, the caller's; all that begins with an underline is the other's."""

    def __init__(
        self, urls: Sequence[str], key: str = "", stalled: float = STALLED, nobody: float = NOBODY, tries: int = TRIES,
        gone: float | None = None, direct: bool = False, life: Callable[[], int] | None = None,
    ) -> None:  # fmt: skip
        """`urls` from `parse_url`. The key goes into requests' headers and nowhere else. UsageErrors.

        `direct`: not through the environment's proxies. `life`, of a server of ours: which of its lives it is in, 0
        between two.
        """
        self.servers = [Server(url, MOST / len(urls)) for url in urls]
        self._client = client(key.strip(), direct)
        self._stalled, self._nobody, self._tries = stalled, nobody, tries
        self._gone = GONE if gone is None else gone
        self._life = life
        self._longest = 0.0  # seconds to an answer, so far
        self._queue, self._open = Queue(), dict[str, Try]()  # every call that has not ended, by id
        self._counts = Counter[str]()
        self._answers = 0  # of all servers
        self._ever = False  # whether any server has ever said anything
        self._warned = False  # that nothing is answered, since something was
        self._inbox = Inbox()
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
        found = self._inbox.take(timeout)
        if not found:
            if not self._thread.is_alive():
                raise ShoalError("the thread that asks servers has ended: run the same command again to continue")
            return None
        running = sum(server.running for server in self.servers)
        return News(
            tuple(found.outputs), tuple(found.started), waiting=len(self._open) - running, running=running,
            counters=dict(self._counts), again=tuple(found.again), warnings=tuple(found.warnings),
            blamed=tuple(found.blamed),
        )  # fmt: skip

    def say(self, words: str) -> None:
        """Have the caller told what the user is to know, with the next news."""
        self._inbox.put(Said(words))

    def ask_again(self) -> None:
        """Whoever was not there is there now: do not wait to ask."""
        self._loop.call_soon_threadsafe(self._ask_again)

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
            self._open[call.id] = Try(call, beaten=call.blamed)
        self._queue.add(calls)
        self._wake.set()

    def _cancel(self, ids: set[str]) -> None:
        self._queue.remove(ids)
        for id in ids & self._open.keys():
            if (task := self._open[id].task) is not None:
                task.cancel()
            self._end(Reply(id, finish=Finish.CANCEL))

    def _ask_again(self) -> None:
        for server in self.servers:
            server.awake()
        self._wake.set()

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

    def _send(self, server: Server, this: Try, now: float) -> None:
        this.send(now)
        self._inbox.put(this.call.id)
        server.running += 1
        this.task = self._loop.create_task(self._make(server, this))
        this.task.add_done_callback(self._crashed)

    def _crashed(self, task: asyncio.Task[None]) -> None:
        """A mistake of ours ends the job, and no call waits for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._inbox.put(error)

    async def _make(self, server: Server, this: Try) -> None:
        """Make a call once, and see to what follows from it."""
        self._counts["requests"] += 1
        try:
            life = self._life() if self._life is not None else 0
            verdict = await self._ask(server, this)
            if self._life is not None and isinstance(verdict, Again):
                verdict = await self._held(server, verdict, life, self._life)
            running = server.running
        finally:
            server.running -= 1
            this.task = None
            self._wake.set()
        now = time.monotonic()
        if isinstance(verdict, End) and verdict.unless is not None and server.useful:
            verdict = verdict.unless
        match verdict:
            case End():
                self._ever = True
                self._doubt(server, this, verdict)
            case str():
                self._counts["broken"] += 1
                self._absent(server, this, verdict, now)
            case Again():
                self._ever = True
                self._again(server, this, verdict, now)
            case Reply():
                self._ever = True
                server.reached()
                server.limit.answered(now, running, max(verdict.usage[1], 1))
                if not verdict.error:
                    self._longest = max(self._longest, now - this.sent)
                    self._answers += 1
                    self._warned = False
                    server.answered()
                self._count(this, verdict, now)
                self._end(verdict)

    async def _ask(self, server: Server, this: Try) -> Verdict | str:
        """What the server makes of a call; words when it cannot be reached."""
        stall = self._stall(this.tries)
        try:
            async with asyncio.timeout(stall):
                response = await self._client.post(server.place(this.call.url), content=this.call.body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return str(error) or type(error).__name__
        except (TimeoutError, httpx.TimeoutException):
            return Again("no_reply", f"the server has not answered for {stall:g} s", late=True)
        except (httpx.TransportError, httpx.DecodingError) as error:
            why = f"the connection was lost before the answer was whole ({type(error).__name__})"
            return Again("no_reply", why, absent=True)
        return judge(this.call, response.status_code, response.headers, response.content)

    async def _held(self, server: Server, verdict: Again, life: int, now: Callable[[], int]) -> Again:
        """A fault of a server of ours, sent in the life `life`, when its process has been looked at. One that is ending
        answers all that it has with such faults: then it is as if it had not been there, which is no call's fault."""
        if verdict.code != "server_error" or verdict.overload:
            return verdict
        began, answers = time.monotonic(), -1
        while now() == life:
            waited = time.monotonic() - began
            if answers < 0 and waited >= SETTLED:
                answers = server.answers
            if waited >= DYING or 0 <= answers < server.answers:
                return verdict
            await asyncio.sleep(LOOK)
        return replace(verdict, absent=True)

    def _stall(self, tries: int) -> float:
        """Seconds after which a call that was made so often in vain is thought to be lost."""
        first = max(min(LEAST_STALL, self._stalled), TIMES * self._longest) if self._longest else self._stalled
        return max(first, min(first * 2.0**tries, LONGEST_STALL))

    # -- calls in vain -----------------------------------------------------------------------------

    def _again(self, server: Server, this: Try, verdict: Again, now: float) -> None:
        """A call has come to nothing: it is made again, or its row fails."""
        this.said = verdict
        self._counts["refused" if verdict.overload else "broken"] += 1
        if verdict.overload or verdict.late:
            server.limit.refused(now, this.sent)
        if verdict.overload:
            self._refused(server, this, verdict, now)
            return
        if not verdict.absent:
            server.reached()
            this.tries += 1
        elif not this.absent(server):
            self._absent(server, this, verdict.why, now)
            return
        if this.ignores(server, verdict):
            words = f"{verdict.why}, twice: this server ignores n, or gives fewer; ask for one in each row"
            self._end(this.failure("not_supported", words))
        elif this.tries >= self._tries:
            self._end(this.failure(verdict.code, f"{verdict.why}; it was asked {this.tries} times"))
        else:
            self._tell(server, verdict)
            self._back(this, this.back_off(verdict.wait, self._random.uniform(0.5, 1.0)))

    def _tell(self, server: Server, verdict: Again) -> None:
        """Where a server asks for a long pause, say so once, until it has answered something."""
        if verdict.wait is not None and verdict.wait > LONG_WAIT and not server.told:
            server.told = True
            self.say(f"{server.url} asks for a pause of {verdict.wait:.0f} s: {verdict.why}")

    def _refused(self, server: Server, this: Try, verdict: Again, now: float) -> None:
        """The server had no room for a call, or never has room for this one."""
        if server.wait(now) <= LONG_WAIT:  # else another call of the same moment has told
            server.told = False
        self._tell(server, verdict)
        server.in_vain(now, verdict.wait, verdict.why)
        if this.refused(self._answers, server.running == 0):
            self._end(this.failure(verdict.code, f"{verdict.why}; others were answered, and it never"))
            return
        self._back(this, 0.0)
        self._give_up(now)

    def _absent(self, server: Server, this: Try, why: str, now: float) -> None:
        """The server is not there. No row is the worse for it; without any server for long the job ends."""
        server.in_vain(now, None, why)
        self._back(this, 0.0)
        self._give_up(now)

    def _doubt(self, server: Server, this: Try, verdict: End) -> None:
        """A server has said that no call to it can succeed. Where that may be this call's fault, what others are told
        decides; else the job ends."""
        server.reached()
        server.doubted.add(this.call.id)
        this.doubts += 1
        sure = verdict.unless is None or len(server.doubted) >= MANY or server.doubted.issuperset(self._open)
        if not sure:
            self._counts["broken"] += 1
            self._back(this, this.back_off(None, self._random.uniform(0.5, 1.0)))
            return
        error = ShoalError(f"{server.url}: {verdict.why}")
        error.exit_code = verdict.exit_code
        self._stop(error)

    def _back(self, this: Try, wait: float) -> None:
        """A call is to be made again, in so many seconds; until then it is not under way."""
        self._inbox.put(Waits(this.call.id))
        if this.blamed and not this.told:
            this.told = True
            self._inbox.put(Blamed(this.call.id))
        if wait > 0:
            self._loop.call_later(wait, self._return, this)
        else:
            self._return(this)

    def _return(self, this: Try) -> None:
        if this.call.id in self._open:
            self._queue.give_back(this.call, last=this.suspect)
            self._wake.set()

    def _give_up(self, now: float) -> None:
        """Calls were in vain everywhere for long: those fail that were so while others were answered; without any,
        the job ends."""
        since = [server.vain_since for server in self.servers]
        if any(one is None for one in since):
            return
        silent = now - max(one for one in since if one is not None)
        if silent < min(LONG_WAIT, self._gone if self._ever else self._nobody):
            return
        if any(this.task is not None and now - this.sent > LEAST_STALL for this in self._open.values()):
            return  # somebody is at work on something
        where = ", ".join(f"{each.url} ({each.trouble})" for each in self.servers)
        if silent < (self._gone if self._ever else self._nobody):
            if silent > LONG_WAIT and not self._warned:
                self._warned = True
                self.say(f"nothing was answered for {silent:.0f} s by {where}; after {self._gone:.0f} s the job ends")
            return
        blamed = [this for this in self._open.values() if this.blamed and this.said is not None]
        if blamed and len(blamed) == len(self._open):
            for this in blamed:
                assert this.said is not None
                self._end(this.failure(this.said.code, f"{this.said.why}; others were answered, and it never"))
            for server in self.servers:
                server.reached()
            return
        self._stop(
            ShoalError(
                f"no server answers at {where}: start it and go on with the job by the same command, or give shoal run "
                "another --endpoint; what was answered is kept"
            )
        )

    def _stop(self, error: ShoalError) -> None:
        """The job ends; nothing more is sent."""
        for server in self.servers:
            server.shut()
        self._inbox.put(error)

    def _count(self, this: Try, reply: Reply, now: float) -> None:
        """Note what an answer has cost, and how long it took from the first time that it was asked for."""
        cached = int(reply.timing["cached"]) if reply.timing is not None else 0
        self._counts["prompt_computed"] += reply.usage[0] - cached
        self._counts["cached"] += cached
        self._counts["output_computed"] += reply.usage[1]
        began = now if this.began is None else this.began
        reply.timing = {
            "arrival": began, "start": began, "first": began, "end": now, "cached": float(cached), "preemptions": 0.0,
        }  # fmt: skip
