"""A call on its way to an answer: how often it was made in vain, whose fault that is, and when it is given up.

It knows counts of answers and the verdicts; it must not know HTTP, queues or threads. Two kinds of failure are nobody's
at first: a refusal for want of room, and a server that is not there. They cost a call nothing until others have been
answered in the meantime: then it may be the call itself that is too large, or that ends the server.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from shoal.core.types import Finish
from shoal.remote.server import Server
from shoal.remote.verdict import Again
from shoal.remote.words import Call, Reply

SUSPECT = (
    2  # refusals after which a call waits behind all others. If these are answered and it is refused again, so many
)
REFUSALS = 16  # more, while its server has nothing else to do and with pauses that grow to 30 s, are its row's failure
FIRST_BACK_OFF, LONGEST_BACK_OFF = 0.5, 30.0  # seconds between tries


@dataclass(slots=True)
class Try:
    """A call, and what has become of it so far."""

    call: Call
    tries: int = 0  # in vain, by its own fault as far as anybody knows
    began: float | None = None  # when it was first sent [s]
    sent: float = 0.0  # and last
    task: asyncio.Task[None] | None = field(default=None)
    said: Again | None = None  # what it came to last
    told: bool = False  # whoever has asked for it, that it is to blame
    doubts: int = 0  # times that it was told that the address or the key is wrong
    _refused: int = 0  # times
    _others: int = 0  # answers to others when it was first refused
    beaten: bool = False  # it was refused again when there were more, or has failed so in an earlier run
    _alone: int = 0  # refusals since, without any other call at its server
    _unsure: list[tuple[Server, int]] = field(default_factory=list)  # servers that were absent, and their answers then
    _number: tuple[str, int] | None = None  # a server and how many parts it gave, not those asked for

    def send(self, now: float) -> None:
        """It is sent."""
        self.began = now if self.began is None else self.began
        self.sent = now

    @property
    def suspect(self) -> bool:
        """Whether it has failed so that it is to wait behind the others: they may fare better."""
        return self.blamed or self.doubts > 0 or self._refused >= SUSPECT or len(self._unsure) >= SUSPECT

    @property
    def blamed(self) -> bool:
        """Whether they have."""
        return self.tries > 0 or self.beaten

    def refused(self, answers: int, alone: bool) -> bool:
        """It was too much for its server, which has answered so many. Whether it is to be given up."""
        if self._refused == 0:
            self._others = answers
        self._refused += 1
        self._alone += alone and self.beaten
        self.beaten = self.beaten or answers > self._others
        return self._alone >= REFUSALS

    def absent(self, server: Server) -> bool:
        """Perhaps its server was not there. Whether that has cost it a try: for what is certain by now."""
        before = self.tries
        server.failed.add(self.call.id)
        certain = [(each, answers) for each, answers in self._unsure if each.answers > answers]
        self._unsure = [each for each in self._unsure if each not in certain]
        if server.useful and len(server.failed) == 1:  # no other call has found it so since it last answered
            self.tries += 1
        else:
            self._unsure.append((server, server.answers))
        self.tries += len(certain)
        return self.tries > before

    def ignores(self, server: Server, verdict: Again) -> bool:
        """Whether a server has given the same wrong number of choices twice, and so will always."""
        if verdict.number is None or self.call.answers == 1:
            return False
        before, self._number = self._number, (server.url, verdict.number)
        return self._number == before

    def back_off(self, wait: float | None, part: float) -> float:
        """Seconds until it is made again: what the server asks for, and at least `part` of what grows with each try."""
        longest: float = min(FIRST_BACK_OFF * 2.0 ** max(self.tries + self.doubts - 1, 0), LONGEST_BACK_OFF)
        return max(longest * part, wait or 0.0)

    def failure(self, code: str, words: str) -> Reply:
        """Its end."""
        return Reply(self.call.id, finish=Finish.ERROR, error=words, code=code)
