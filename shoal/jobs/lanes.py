"""The requests in flight by the engine that has them. It must not know what requests are for, nor any engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.jobs.feed import AnyPart

BURDEN = 1024  # requests that an engine which has died counts as beside its own


@dataclass(slots=True)
class Lane:
    """What one engine has."""

    parts: dict[str, AnyPart] = field(default_factory=dict)
    unstarted: set[str] = field(default_factory=set)
    groups: deque[list[AnyPart]] = field(default_factory=deque)  # suspects: each group runs with nobody else in it
    quarantine: bool = False

    @property
    def busy(self) -> int:
        """Requests that it has to do, as far as others are to see it: an engine that died takes nothing else on."""
        return len(self.parts) + (BURDEN + sum(map(len, self.groups)) if self.quarantine else 0)

    def add(self, part: AnyPart) -> None:
        """A request is handed out."""
        self.parts[part.request.id] = part
        self.unstarted.add(part.request.id)

    def remove(self, id: str) -> None:
        """It is over."""
        del self.parts[id]
        self.unstarted.discard(id)

    def suspects(self) -> list[AnyPart]:
        """The next group of them; none while one runs."""
        if self.parts:
            return []
        self.quarantine = bool(self.groups)
        return self.groups.popleft() if self.groups else []

    def clear(self) -> list[AnyPart]:
        """The engine is gone: what it had."""
        parts = list(self.parts.values())
        self.parts.clear()
        self.unstarted.clear()
        return parts

    def drop(self, line: int) -> list[str]:
        """Nothing more is to come of a row; the requests of it that run."""
        kept = ([part for part in group if part.row.line != line] for group in self.groups)
        self.groups = deque(group for group in kept if group)
        dropped = [id for id, part in self.parts.items() if part.row.line == line]
        for id in dropped:
            self.remove(id)
        return dropped


class Lanes(list[Lane]):
    """One for each engine, by its number."""

    def of(self, id: str) -> Lane | None:
        """Where a request is; None of an engine that has died since, or of a row that failed."""
        return next((lane for lane in self if id in lane.parts), None)

    def part(self, id: str) -> AnyPart:
        """A request that is in flight."""
        return next(lane.parts[id] for lane in self if id in lane.parts)

    def parts(self) -> Iterator[tuple[str, AnyPart]]:
        """All that are in flight."""
        return chain.from_iterable(lane.parts.items() for lane in self)

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight, nor to come back."""
        return not any(lane.parts or lane.groups for lane in self)

    @property
    def started(self) -> bool:
        """Whether all that is in flight has started, and nothing is to come back."""
        return not any(lane.unstarted or lane.groups for lane in self)
