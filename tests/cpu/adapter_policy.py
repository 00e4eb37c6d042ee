"""A policy for jobs with adapters: odd chunks, and whoever is last loses its blocks."""

from __future__ import annotations

from shoal.sched.policy import Policy


class Thief(Policy):
    """Preempts often."""

    def chunk(self, seq, room, view):
        return min(5 + seq.number % 3, seq.pending, room)

    def victim(self, seq, others, view):
        return others[-1] if others else None
