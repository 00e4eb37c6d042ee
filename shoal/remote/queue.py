"""Calls that wait for a server, in families that share a prefix. It must not know servers but as whoever takes.

The calls come in plan order, where those that share most stand together. With one server that is the order in which
they go out. With several, each goes through a family of its own as long as there is one that nobody has, so that a
prefix is computed, and kept, by one server and not by all.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Iterable

import numpy as np

from shoal.core.types import Tokens
from shoal.remote.words import Call


class Queue:
    """Changed by one thread alone."""

    def __init__(self) -> None:
        self._families: deque[deque[Call]] = deque()  # in plan order, none empty
        self._first: list[tuple[int, str, Call]] = []  # a heap of those that go before all others, in plan order
        self._late: list[tuple[int, str, Call]] = []  # a heap of those that go behind all others
        self._last: Call | None = None
        self._held: dict[Hashable, deque[Call]] = {}  # the family that each taker is in

    def __len__(self) -> int:
        return len(self._first) + len(self._late) + sum(map(len, self._families))

    def add(self, calls: Iterable[Call]) -> None:
        """Take calls in plan order. One that has no place in the plan goes before all others."""
        for call in calls:
            if call.index < 0:
                self.give_back(call)
                continue
            last, self._last = self._last, call
            if last is not None and self._families and self._families[-1][-1] is last and _akin(last, call):
                self._families[-1].append(call)
            else:
                self._families.append(deque((call,)))

    def take(self, taker: Hashable) -> Call | None:
        """The call that this one is best sent next; None when none waits."""
        if self._first:
            return heapq.heappop(self._first)[2]
        if not self._families:
            return heapq.heappop(self._late)[2] if self._late else None
        family = self._held.get(taker)
        if not family:
            others = [each for who, each in self._held.items() if who != taker]
            free = (one for one in self._families if not any(one is other for other in others))
            family = next(free, None) or max(self._families, key=len)
            self._held[taker] = family
        call = family.popleft()
        if not family:
            self._families = deque(one for one in self._families if one is not family)
            self._held = {who: one for who, one in self._held.items() if one is not family}
        return call

    def give_back(self, call: Call, last: bool = False) -> None:
        """Put a call before all others, or behind them."""
        heapq.heappush(self._late if last else self._first, (call.index, call.id, call))

    def remove(self, ids: set[str]) -> list[Call]:
        """Take out these calls; those that were not here are not among the answer."""
        found = [call for family in self._families for call in family if call.id in ids]
        found += [call for _, id, call in self._first + self._late if id in ids]
        if found:
            for heap in (self._first, self._late):
                heap[:] = [each for each in heap if each[1] not in ids]
                heapq.heapify(heap)
            left = [deque(call for call in family if call.id not in ids) for family in self._families]
            self._families, self._held = deque(filter(None, left)), {}
        return found


def _akin(one: Call, other: Call) -> bool:
    """Whether half of a call's prompt is the beginning of the one's before it."""
    return one.root == other.root and 2 * _common(one.prompt, other.prompt) >= len(other.prompt)


def _common(one: Tokens, other: Tokens) -> int:
    """How many tokens they begin with alike."""
    most = min(len(one), len(other))
    differs = np.frombuffer(one, dtype=np.int32, count=most) != np.frombuffer(other, dtype=np.int32, count=most)
    return int(np.argmax(differs)) if differs.any() else most
