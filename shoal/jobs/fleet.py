"""Several engines at once: each is started again when it has died, while the others go on.

It knows processes, devices and what engines say of themselves; it must not know rows, the plan, nor who gets what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import wait

from shoal.client import Backend, Begin, EngineProcess, News
from shoal.core.config import EngineConfig
from shoal.core.errors import EngineDied, ShoalError
from shoal.core.types import Request
from shoal.jobs.devices import Device, devices_of
from shoal.jobs.display import Display
from shoal.jobs.engines import LOADS, POLL, Engines, gives_up, pause_after, start_process
from shoal.jobs.meter import Meter
from shoal.jobs.options import JobOptions
from shoal.jobs.patience import Patience
from shoal.jobs.stop import Stop, WallClock


def start_processes(options: JobOptions) -> list[EngineProcess]:
    """A process for each engine of a job, told nothing so far: they load libraries while the job is planned."""
    processes = []
    try:
        for device in devices_of(options.device):
            processes.append(start_process(device, options.threads))
    except OSError:
        for process in processes:
            process.close()
        raise
    return processes


def employ(
    processes: Sequence[EngineProcess], backend: Backend | None, options: JobOptions, meter: Meter, display: Display,
    stop: Stop,
) -> Engines | Fleet:  # fmt: skip
    """What runs the requests of a job: `backend` where one is given, else the processes, and others in their places."""
    if len(processes) > 1:
        members = [
            Member(number, device, process, Patience(partial(meter.engine_seconds, number)))
            for number, (device, process) in enumerate(zip(devices_of(options.device), processes, strict=True))
        ]
        return Fleet(members, lambda device: start_process(device, options.threads), meter, display, stop)
    device = Device("cpu") if backend is not None or options.servers else devices_of(options.device)[0]
    patience = Patience(meter.engine_seconds)
    return Engines(
        next(iter(processes), None), backend, lambda: start_process(device, options.threads), meter, patience, display,
        stop,
    )  # fmt: skip


@dataclass(slots=True, eq=False)
class Member:
    """One engine of several, and those after it in its place."""

    number: int
    device: Device
    process: EngineProcess | None
    patience: Patience
    begun: bool = False  # the process was told what to build
    ready: bool = False  # and has built it
    deaths: int = 0  # since it last completed a row
    loads: int = 0  # deaths of processes that loaded, one after the other
    kv_bytes: int | None = None  # of the first that was ready and shares memory: what is free later is its alone
    due: float = 0.0  # when the next may start
    running: set[str] = field(default_factory=set)  # requests that it has
    held: list[tuple[tuple[Request, ...], frozenset[str]]] = field(default_factory=list)  # for when it is ready
    dropped: list[str] = field(default_factory=list)  # to be cancelled then
    death: EngineDied | None = None  # found out while others were seen to; told by the next look for news


class Fleet:
    """The engines of a job that runs on several devices; `Engines` for several. Changed by the job's loop alone."""

    def __init__(
        self, members: list[Member], make: Callable[[Device], EngineProcess], meter: Meter, display: Display, stop: Stop
    ) -> None:
        """The members' processes have been started and told nothing; `make` starts others."""
        self.number = len(members)
        self._members, self._make = members, make
        self._meter, self._display, self._stop = meter, display, stop
        self._clock = WallClock()
        self._begin: Callable[[Member], Begin] | None = None
        self._turn = 0  # who is heard first

    @property
    def ready(self) -> bool:
        """Whether requests may be handed in. What an engine that is being replaced gets waits for it."""
        return any(member.ready for member in self._members)

    # -- starting ----------------------------------------------------------------------------------

    def start(
        self, config: EngineConfig, useful: int, loading: Callable[[], None] = lambda: None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Have every engine, each with memory for up to `useful` tokens, unless asked to stop meanwhile."""

        def begin(member: Member) -> Begin:
            device = member.device
            memory = None if config.memory_bytes is None else config.memory_bytes // device.share
            own = replace(config, device=device.name, memory_bytes=memory)
            return Begin(own, useful, device.share, member.kv_bytes)

        self._begin = begin
        for member in self._members:
            self._tell(member)
        loading()
        while not self._stop.asked and not all(member.ready for member in self._members):
            for member in self._await(POLL):
                self._load(member)
            self._replace()
            meanwhile()

    def _tell(self, member: Member) -> None:
        """Have a process build its engine."""
        assert self._begin is not None
        if member.begun:
            return
        try:
            if member.process is None:
                member.process = self._make(member.device)
            member.process.begin(self._begin(member))
            member.begun = True
        except EngineDied as death:
            self._died_loading(member, death)

    def _load(self, member: Member) -> None:
        """Hear of an engine that is not ready, or was not."""
        if member.ready or member.process is None:
            return
        try:
            ready = member.process.ready(0.0)
        except EngineDied as death:
            return self._died_loading(member, death)
        except ShoalError as error:
            named = ShoalError(f"engine {member.number}: {error}")
            named.exit_code = error.exit_code
            raise named from error
        if ready is None:
            return
        member.ready, member.loads = True, 0
        if member.kv_bytes is None and member.device.share > 1:
            member.kv_bytes = ready.kv_bytes
        self._meter.loaded(ready, member.process.pid, member.number)
        member.patience.begin(self._clock.now())
        held, member.held = member.held, []
        dropped, member.dropped = member.dropped, []
        try:
            for requests, watched in held:
                member.process.submit(requests, watched)
            if dropped:
                member.process.cancel(dropped)
        except EngineDied as death:
            raise self._of(member, death) from death

    def _died_loading(self, member: Member, death: EngineDied) -> None:
        """Nothing that was handed in is lost by it: the next gets it."""
        member.process, member.begun = None, False
        if self._stop.asked:
            member.due = float("inf")
            return
        member.loads += 1
        if member.loads >= LOADS:
            raise ShoalError(
                f"engine {member.number}: {death} while it loaded the model, {LOADS} times: see what it printed and "
                "whether memory is short, and run the same command again to continue"
            ) from death
        self._display.warn(f"engine {member.number}: {death} while it loaded the model; starting another")
        member.due = self._clock.now() + pause_after(member.loads)

    def _replace(self) -> None:
        """Start what is due in the place of what has died."""
        now = self._clock.now()
        for member in self._members:
            if not member.begun and member.due <= now and self._begin is not None:
                self._tell(member)

    # -- the backend -------------------------------------------------------------------------------

    def submit(self, engine: int, requests: Iterable[Request], watched: frozenset[str]) -> None:
        """Hand in requests to one engine."""
        member, given = self._members[engine], tuple(requests)
        if not member.running:
            self._meter.shares.works(engine, True)
            member.patience.begin(self._clock.now())
        member.running.update(request.id for request in given)
        if not member.ready or member.process is None:
            member.held.append((given, watched))
            return
        try:
            member.process.submit(given, watched)
        except EngineDied as death:
            raise self._of(member, death) from death

    def cancel(self, ids: Iterable[str]) -> None:
        """End requests, whoever has them. An engine that has ended keeps none of the others from hearing of theirs; the
        next look for news tells of it."""
        wanted = set(ids)
        for member in self._members:
            if not (own := wanted & member.running):
                continue
            if not member.ready or member.process is None:
                member.dropped += own
                continue
            try:
                member.process.cancel(sorted(own))
            except EngineDied as death:
                member.death = self._of(member, death)

    def outputs(self, timeout: float) -> News | None:
        """The next news of any; EngineDied with its number when one has ended."""
        end = self._clock.now() + timeout
        while True:
            self._replace()
            for member in self._members:
                if member.death is not None:
                    raise member.death
            left = max(end - self._clock.now(), 0.0)
            for member in self._await(left):
                if not member.ready:
                    self._load(member)
                elif (news := self._hear(member)) is not None:
                    self._turn = member.number + 1
                    return news
            if self._clock.now() >= end:
                return None

    def _hear(self, member: Member) -> News | None:
        assert member.process is not None
        try:
            news = member.process.outputs(0.0)
        except EngineDied as death:
            raise self._of(member, death) from death
        if news is None:
            return None
        member.patience.heard(self._clock.now())
        member.running.difference_update(output.id for output in news.outputs if output.finish is not None)
        if not member.running:
            self._meter.shares.works(member.number, False)
        return replace(news, engine=member.number)

    def _await(self, seconds: float) -> list[Member]:
        """Who has something to say, within so many seconds; in turn, so that all are heard."""
        living = [member for member in self._in_turn() if member.process is not None and member.begun]
        return await_any(living, seconds)

    def _in_turn(self) -> Iterator[Member]:
        for place in range(self.number):
            yield self._members[(self._turn + place) % self.number]

    # -- endings -----------------------------------------------------------------------------------

    @staticmethod
    def _of(member: Member, death: EngineDied) -> EngineDied:
        found = EngineDied(f"engine {member.number}: {death}")
        found.engine = member.number
        return found

    def bury(self, death: EngineDied) -> bool:
        """Take note of a death. Raises when there is no sense in another engine; False when there is no time for it."""
        member = self._members[death.engine]
        member.process, member.begun, member.ready, member.death = None, False, False, None
        member.running.clear()
        member.held.clear()
        member.dropped.clear()
        self._meter.shares.works(member.number, False)
        if self._stop.asked:  # by a signal that has reached all
            member.due = float("inf")
            return False
        member.deaths += 1
        self._meter.died(member.number)
        gives_up(death, member.deaths)
        self._display.warn(f"{death}; starting another, its unfinished rows run again while the others go on")
        return True

    def revive(self, engine: int, config: EngineConfig, useful: int, meanwhile: Callable[[], None]) -> None:
        """Have another engine in place of a dead one, after a pause; the others go on, so nobody waits for it here."""
        member = self._members[engine]
        member.due = self._clock.now() + pause_after(member.deaths)

    def answered(self, engine: int) -> None:
        """An engine has completed a row."""
        self._members[engine].deaths = 0

    def idle(self) -> None:
        """Until now they had nothing to say."""
        for member in self._members:
            member.patience.begin(self._clock.now())

    def silent(self) -> str:
        """What to say of the silence of an engine that has work and no news; "" nearly always."""
        for member in self._members:
            if member.ready and member.running and member.process is not None:
                if said := member.patience.words(self._clock.now(), member.process.pid):
                    return f"engine {member.number}: {said}"
        return ""

    def close(self) -> None:
        """End them."""
        for member in self._members:
            if member.process is not None:
                member.process.close()


def await_any(members: list[Member], seconds: float) -> list[Member]:
    """Those of them whose processes have said something, or ended, within so many seconds; in their order."""
    by_process = {member.process: member for member in members if member.process is not None}
    heard = {by_process[process].number for process in wait(list(by_process), seconds)}  # type: ignore[index, arg-type]
    return [member for member in members if member.number in heard]
