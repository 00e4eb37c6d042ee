"""How many calls a server is to have at once, found from what it does with them. It must not know what a call is.

Nobody tells a client how many requests a server takes. So, as in a network (Jacobson 1988, Chiu and Jain 1989): twice
as many each round until something is refused, then one more each round, and a good part fewer at each refusal. A server
that queues without an end refuses nothing: there, more calls only wait longer, and more are lost when it dies. So a
greater number must also bring more work in the same time (as in TCP Vegas, Brakmo 1994), or it is given up again.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST = 4.0  # calls at once before anything is known
MOST = 512.0  # calls at once to all servers, whatever they bear: a process may have 1,024 files and connections
CUT = 0.7  # of the calls at once that are left after a refusal
GAIN = 1.05  # times as much work in the same time that makes a greater number worth it
WASTE = 1.5  # times the number that has brought the best pace at which a greater one that brings no more is given up,
LESS = 0.8  # and times the same, at which it is looked again what so many bring: rows change, and servers too
LEAST_ROUND = 8  # answers, fewer say nothing about a pace


@dataclass(slots=True)
class _Round:
    """Answers under one limit."""

    began: float
    answers: int = 0
    work: float = 0.0
    full: bool = True  # there were always as many calls as the limit allows


class Limit:
    """One server's. Times are the caller's, in seconds; changed by whoever sends to that server."""

    def __init__(self, first: float = FIRST, most: float = MOST) -> None:
        self.allowed = first
        self._most = most
        self._doubling = True
        self._cut = float("-inf")  # when it was last cut
        self._best = first  # the fewest calls that have nearly brought the best pace,
        self._pace: float | None = None  # and that pace; None before a round has shown it
        self._round: _Round | None = None

    def room(self, running: int) -> bool:
        """Whether one more may be sent while so many run."""
        return running < int(self.allowed)

    def answered(self, now: float, running: int, work: float = 1.0) -> None:
        """A call was answered when `running`, itself included, were under way; `work` is what it was worth."""
        if self._round is None:
            self._round = _Round(now)
            return
        this = self._round
        this.answers += 1
        this.work += work
        this.full &= running >= int(self.allowed)
        if this.answers >= max(self.allowed, LEAST_ROUND):
            self._judge(this, now)
            self._round = _Round(now)

    def refused(self, now: float, sent: float) -> None:
        """A call sent at `sent` was too much for the server. Those sent before the last cut say nothing new."""
        if sent >= self._cut:
            self.allowed = max(1.0, self.allowed * CUT)
            self._cut, self._doubling, self._round = now, False, None
            self._best, self._pace = min(self._best, self.allowed), None

    def _judge(self, this: _Round, now: float) -> None:
        if not this.full or now <= this.began:
            return  # it was not the limit that held back
        pace = this.work / (now - this.began)
        if self._pace is None or pace > GAIN * self._pace:
            self._best, self._pace = self.allowed, pace
        else:
            self._doubling = False
            if self.allowed > WASTE * self._best + 1:
                self.allowed, self._pace = max(1.0, LESS * self._best), None
                return
        self.allowed = min(self._most, self.allowed * 2 if self._doubling else self.allowed + 1)
