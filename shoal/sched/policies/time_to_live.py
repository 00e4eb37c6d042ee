"""Times to live: when a turn ends with a tool's call, its keys and values are kept as long as that is likely to pay.

It knows programs, the tools they say they call, and how long such calls took; it must not know texts, nor how long
this call will take. Continuum (arXiv 2511.02230).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from shoal.core.sequence import Sequence
from shoal.core.types import Finish, Promise, Request
from shoal.kv.tree import Node
from shoal.sched.admission import Admission
from shoal.sched.budgeting import priced
from shoal.sched.calls import Calls
from shoal.sched.cost import Cost, LinearCost
from shoal.sched.policies.serving import DECODE, PREFILL, WAIT
from shoal.sched.policies.stall_free import StallFree
from shoal.sched.policy import Budget, Key, Reach, View

PINNED = 1e12  # worth of a pinned block, less its program's arrival [s]: above the last use of any other
FOLLOWED = 10_000  # programs that are followed at once
ROUGHLY = 256  # tokens that contexts are rounded up to before they are priced


@dataclass(slots=True)
class _Program:
    arrival: float  # of its first request
    turns: int = 0  # that have ended
    waiting: set[str] = field(default_factory=set)  # ids of its requests that have not started
    live: int = 0  # requests of it that have not ended
    leaf: Node | None = None  # the last block of its last turn, while it is idle
    tokens: int = 0  # of its last turn
    ended: float = -math.inf  # when its last turn ended; -infinity when the time since is known already
    tool: str = ""
    until: float = -math.inf  # of its pin


class TimeToLive(StallFree):
    """Pins in the order of their programs; a pin yields when its time is over and nobody of its program waits, or
    when nothing could go on otherwise, that of the latest program first.

    Waiting requests: the preempted, those whose program has a pin, the rest; within each the program that came first.
    Whoever has waited `patience` times as long as requests take to be served goes before pins and needs no regard
    for them: so that no tail pays for the mean. `always` is the same time to live for all calls: a control.
    """

    def __init__(
        self, limit: Budget | None = None, cost: Cost | None = None, promise: Promise | None = None,
        admission: Admission | None = None, always: float | None = None, patience: float = 2.0,
    ) -> None:  # fmt: skip
        super().__init__(limit, admission, cost, promise)
        self.calls, self.patience, self.always = Calls(), patience, always
        self._cost: Cost = cost or LinearCost()
        self._programs: dict[str, _Program] = {}
        self._pins: dict[str, _Program] = {}
        self._asked: dict[int, Node] = {}  # by writer: leaves that became idle since the last plan
        self._owner: dict[int, str] = {}  # by writer: the program of turns that have ended
        self._since: dict[str, float] = {}  # by id of a live request: when it came
        self._changed: list[Node] = []  # pinned or unpinned since the last plan
        self._reload: dict[int, float] = {}  # seconds, by rounded tokens
        self._started = False  # whether this plan has let anybody in
        self._served: list[Sequence] = []  # that had not started when they were served
        self._kept: dict[str, int] | None = None  # by program: blocks of its pin, counted once a plan
        self._service = 1.0  # seconds from a start to an end: a moving mean

    # -- programs ----------------------------------------------------------------------------------

    def accept(self, request: Request, view: View) -> str:
        """Take down when its program came back."""
        self._since[request.id] = view.now
        if request.program:
            if len(self._programs) >= FOLLOWED and request.program not in self._programs:
                self._forget()
            program = self._programs.setdefault(request.program, _Program(view.now))
            if program.tool and program.ended > -math.inf:
                self.calls.took(program.tool, view.now - program.ended)
            program.ended = -math.inf
            program.waiting.add(request.id)
            program.live += 1
        return ""

    def hear(self, program: str, tool: str, now: float) -> None:
        """A turn has ended: pin what it left, for as long as its tool makes it worth; forget a program that is over."""
        self._settle()
        found = self._programs.get(program)
        if found is None:
            return
        if not tool:
            self.calls.over(found.turns)
            self._unpin(program)
            if not found.live:
                self._drop(program)
            return
        found.tool = tool
        live = self.time_to_live(tool, found.tokens)
        if live > 0.0 and found.leaf is not None and not found.live:
            found.until = now + live
            self._pins[program] = found
            self._changed.append(found.leaf)

    def time_to_live(self, tool: str, tokens: int) -> float:
        """Seconds that keys and values of so many tokens are worth keeping while the tool runs."""
        return self.calls.time_to_live(tool, self.reload(tokens)) if self.always is None else self.always

    def reload(self, tokens: int) -> float:
        """Seconds to compute so many tokens again."""
        size = -(-tokens // ROUGHLY) * ROUGHLY
        if size not in self._reload:
            self._reload[size] = priced(self._cost, 0, 0, size, 0)
        return self._reload[size]

    def _forget(self) -> None:
        """Of programs that have not said that they have ended, the first without a request and a pin."""
        idle = (name for name, found in self._programs.items() if not found.live and name not in self._pins)
        self._drop(next(idle, ""))

    def _drop(self, name: str) -> None:
        found = self._programs.pop(name, None)
        if found is not None and found.leaf is not None:
            self._owner.pop(found.leaf.writer, None)

    def _settle(self) -> None:
        """Who has started needs its program's pin no more; who was served in vain still does."""
        served, self._served = self._served, []
        for seq in served:
            name = seq.request.program
            program = self._programs.get(name)
            if program is not None and seq.started is not None and seq.request.id in program.waiting:
                program.waiting.discard(seq.request.id)
                if program.turns and name not in self._pins:
                    self.calls.waited(seq.started - self._since.get(seq.request.id, seq.started))
                self._unpin(name)

    def _unpin(self, program: str) -> None:
        pin = self._pins.pop(program, None)
        if pin is not None and pin.leaf is not None:
            pin.until = -math.inf
            self._changed.append(pin.leaf)

    def worth(self, node: Node) -> float:
        """A pinned block more than any other, of an early program more than of a late one; else by last use."""
        self._asked[node.writer] = node
        pin = self._pins.get(self._owner.get(node.writer, ""))
        return node.last_use if pin is None else PINNED - pin.arrival

    def revalued(self, view: View) -> Iterable[Node]:
        """Pins that are over, and all that has changed."""
        self._settle()
        self._kept = None
        late = [name for name, pin in self._pins.items() if view.now > pin.until and not pin.waiting]
        for name in late:
            self._unpin(name)
        changed, self._changed = self._changed, []
        self._asked.clear()
        self._started = False
        return changed

    # -- answers -----------------------------------------------------------------------------------

    def _aged(self, seq: Sequence, view: View) -> bool:
        return view.now - self._since.get(seq.request.id, view.now) > self.patience * self._service

    def _came(self, seq: Sequence) -> float:
        program = self._programs.get(seq.request.program)
        return self._since.get(seq.request.id, 0.0) if program is None else program.arrival

    def rank(self, seq: Sequence, view: View) -> Key:
        """What runs by phase; what waits as said above."""
        if seq.ticket >= 0:
            return (DECODE if len(seq.tokens) - seq.computed <= 1 else PREFILL), 0.0, 0.0
        if seq.preemptions:
            return WAIT, 0.0, self._came(seq)
        if self._aged(seq, view):
            return WAIT, 1.0, self._since[seq.request.id]
        return WAIT, 2.0 if seq.request.program in self._pins else 3.0, self._came(seq)

    def admit(self, seq: Sequence, reach: Reach, view: View) -> float:
        """If there is room beside the pins of other programs; when nothing runs, pins make room."""
        if self._aged(seq, view) or not (view.running or self._started):
            kept = 0  # where it needs room, the latest are the first of the pinned that are forgotten
        else:
            kept = self._beside(seq.request.program, reach)
        if super().admit(seq, replace(reach, reserved_blocks=reach.reserved_blocks + kept), view) > view.now:
            return math.inf
        self._started = True
        return -math.inf

    def _beside(self, name: str, reach: Reach) -> int:
        """Idle blocks of the pins of all programs but this one and those that this plan has served."""
        if self._kept is None:
            pins = {other: pin.leaf for other, pin in self._pins.items() if pin.leaf is not None}
            self._kept = dict(zip(pins, reach.idle(pins.values()), strict=True))
            for seq in self._served:
                self._kept.pop(seq.request.program, None)
        return sum(self._kept.values()) - self._kept.get(name, 0)

    def chunk(self, seq: Sequence, room: int, view: View) -> int:
        """The same; who is about to start is taken down."""
        if seq.started is None:
            self._served.append(seq)
            if self._kept is not None:
                self._kept.pop(seq.request.program, None)
        return super().chunk(seq, room, view)

    def steady(self, view: View) -> int:
        """As long as nothing is pinned: a pin is over at some time, and its blocks with it."""
        return 0 if self._pins else super().steady(view)

    def victim(self, seq: Sequence, others: Seq[Sequence], view: View) -> Sequence | None:
        """The one of the latest program."""
        return max(others, key=lambda other: (self._came(other), other.number)) if seq.ticket >= 0 and others else None

    def retire(self, seq: Sequence, finish: Finish, view: View) -> None:
        """Take down where its turn left off; what its program does next will be said."""
        super().retire(seq, finish, view)
        self._settle()
        self._since.pop(seq.request.id, None)
        if seq.started is not None:
            self._service += 0.1 * (view.now - seq.started - self._service)
        name = seq.request.program
        program = self._programs.get(name)
        if program is None:
            return
        program.live -= 1
        program.waiting.discard(seq.request.id)
        self._unpin(name)
        if program.live:
            return  # calls side by side: the last to end leaves what is pinned
        self._owner.pop(program.leaf.writer if program.leaf is not None else -1, None)
        program.leaf = self._asked.get(seq.number)
        if program.leaf is not None:
            self._owner[seq.number] = name
        program.turns += 1
        program.tokens, program.ended, program.tool = len(seq.tokens), view.now, ""
