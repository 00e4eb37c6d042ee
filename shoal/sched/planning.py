"""One plan being made: hand out the budget in rank order, so that what is computed catches up with what is known.

It knows the mechanism it works for and asks the policy; it must not know results, tensors or the wall clock.
"""

from __future__ import annotations

import math
from typing import Protocol

from shoal.core.sequence import Sequence
from shoal.core.types import PENDING, Move, Slice, Start
from shoal.kv.cache import KVCache, Match
from shoal.sched.policy import Key, Policy, Reach, View

WAITS = 64  # sequences that may be found waiting for another's prefix before a plan stops looking for more to start


class Mechanism(Protocol):
    """What a plan may do to sequences: the scheduler."""

    policy: Policy
    remedy: str
    kv: KVCache
    waiting: dict[int, Sequence]
    running: dict[int, Sequence]
    in_flight: int
    top_started: int
    overfull: bool

    @property
    def steps(self) -> int: ...

    @property
    def horizon(self) -> int: ...

    @property
    def has_preempted(self) -> bool: ...

    def begin(self, seq: Sequence, match: Match, now: float) -> Start: ...

    def preempt(self, seq: Sequence) -> None: ...

    def end(self, seq: Sequence, error: str, now: float) -> None: ...

    def count(self, seq: Sequence, start: int, count: int) -> None: ...


class Planning:
    """One plan being made. Used once."""

    def __init__(self, scheduler: Mechanism, view: View) -> None:
        self.scheduler, self.view, self.kv, self.policy = scheduler, view, scheduler.kv, scheduler.policy
        self.speculates = type(self.policy).draft is not Policy.draft
        budget = self.policy.budget(view)
        self.room, self.sequences = max(budget.tokens, 1), max(budget.sequences, 1)
        self.index = scheduler.steps + 1
        self.slices: list[Slice] = []
        self.starts: list[Start] = []
        self.moves: list[Move] = []
        self.order: list[Sequence] = []
        self.last = 0  # order[last:] have been preempted in this plan
        self.at = 0  # order[:at] have been looked at
        self.barred = scheduler.overfull and bool(scheduler.running)  # nobody starts before somebody has ended
        self.closed = self.barred  # nobody starts any more in this step
        self.forced = False  # the next to be served gets at least one token, whatever the policy says
        self.desperate = False  # … and the memory of all that started after it, whether or not they yield
        self.waits = 0
        self.wait_until = math.inf
        self.reserved: set[int] | None = None  # looked up when the first candidate asks

    def hand_out(self) -> None:
        """Serve sequences in rank order until the budget is spent."""
        rank, view = self.policy.rank, self.view
        keyed: list[tuple[Key, int, Sequence]] = [(rank(s, view), s.number, s) for s in view.running]
        keyed += [(rank(s, view), s.number, s) for s in view.waiting]
        keyed.sort()
        self.order = [entry[2] for entry in keyed]
        self.last = len(self.order)
        running = len(view.running)  # of them in order[at:last], at most
        while self.at < self.last and self.room > 0 and len(self.slices) < self.sequences:
            seq = self.order[self.at]
            self.at += 1
            if seq.ticket >= 0:
                running -= 1
                if self.can_go_on(seq):
                    self.serve(seq, None)
            elif not self.closed:
                self.start(seq)
            elif running <= 0:
                return

    @staticmethod
    def can_go_on(seq: Sequence) -> bool:
        """Whether anything of a running sequence is known and not computed; its end or length may be in flight."""
        known = len(seq.tokens)
        if seq.samples:
            return seq.computed < known < seq.limit and not seq.guessing
        return seq.computed < seq.goal

    def force(self) -> None:
        """The policy lets nothing happen and nothing is in flight: the first that can goes, so there is progress.

        If nobody can, all memory is with rows that do not yield. Then the one that has run longest takes it from those
        that started last; and nobody starts until somebody has ended, or they would only be taken from again.
        """
        self.forced = True
        self._first_that_can()
        if not self.slices:
            self.desperate = True
            for seq in sorted(self.scheduler.running.values(), key=lambda s: s.ticket):
                if not self.slices and seq.ticket >= 0 and self.can_go_on(seq):
                    self.serve(seq, None)
            self.desperate = False
        if not self.slices and not self.scheduler.running:  # the last one starts again above what it has computed
            self._first_that_can()

    def _first_that_can(self) -> None:
        for at, seq in enumerate(self.order[: self.last], 1):
            self.at = at
            if seq.ticket >= 0:
                if self.can_go_on(seq):
                    self.serve(seq, None)
            elif seq.number in self.scheduler.waiting and not (self.barred and self.scheduler.running):
                match = self.kv.match(seq, self.index)
                if match is not None:
                    self.serve(seq, match)
                if match is not None and match.source is not None and not self.slices and seq.ticket < 0:
                    self._start_without_copy(seq, match)
            if self.slices:
                return

    def _start_without_copy(self, seq: Sequence, match: Match) -> None:
        """The block that a copy is made from is held beside all that the sequence needs. Where memory has not one block
        more than that, what it would have copied is computed again."""
        if seq.number in self.scheduler.waiting:
            self.serve(seq, Match(match.path, None, 0, len(match.path) * self.kv.block_size, False))

    def start(self, seq: Sequence) -> None:
        """Let a waiting sequence in, if its prefix is not just being computed and the policy agrees."""
        match = self.kv.match(seq, self.index)
        if match is None:
            self.waits += 1
            self.closed = self.waits >= WAITS
            return
        if self.reserved is None:
            self.reserved = self.kv.reserved(self.scheduler.top_started + 1)
        idle = self.kv.idle(match)
        kept = self.reserved | idle
        new = len(kept) - len(self.reserved)
        kv = self.kv
        reach = Reach(match.tokens, len(match.path), new, len(self.reserved), lambda n: kv.loss(n, kept), kv.count_idle)
        when = self.policy.admit(seq, reach, self.view)
        if when > self.view.now:
            self.closed = True
            self.wait_until = min(self.wait_until, when)
            return
        self.serve(seq, match)

    def serve(self, seq: Sequence, match: Match | None) -> None:
        """Give `seq` a slice, making room for it where the policy or the progress guarantee says so."""
        if match is not None:
            self.kv.acquire(seq, match, self.view.now)
        first, pending = not self.slices, seq.pending
        count = min(self.policy.chunk(seq, self.room, self.view), pending, self.room)
        if self.forced:
            count = max(count, 1)
        draft = 0
        if count == pending and seq.samples and self.speculates:
            draft = max(0, min(self.policy.draft(seq, self.view), self.room - count, seq.limit - len(seq.tokens) - 1))
        fits = count > 0 and self.kv.grow(seq, count + draft)
        if draft and not fits:
            draft, fits = 0, self.kv.grow(seq, count)
        while count > 0 and not fits and not self.outgrown(seq):
            victim = self.victim(seq, first)
            if victim is None:
                break
            self.scheduler.preempt(victim)
            self.order.remove(victim)
            self.last -= 1
            fits = self.kv.grow(seq, count + draft)
        if fits:
            self.emit(seq, match, count, draft)
        elif match is not None:
            self.kv.release(seq, self.scheduler.horizon, self.index - 1, again=True)
            if count > 0 and self.outgrown(seq):
                self.fail(seq)
            else:
                self.closed = self.closed or count > 0  # nobody overtakes a request that waits for memory
        elif count > 0 and self.outgrown(seq):
            self.fail(seq)
        elif count > 0 and first and not self.scheduler.in_flight and len(self.scheduler.running) == 1:
            if self.kv.in_use < self.kv.pool.num_blocks:
                self.scheduler.preempt(seq)  # the rest lies idle above its own nodes: it starts again in those blocks
            else:
                self.fail(seq)

    def victim(self, seq: Sequence, first: bool) -> Sequence | None:
        """Who makes room for `seq`. The first of a step may take from all that yield, whatever the policy says."""
        if self.desperate:
            last = max(self.scheduler.running.values(), key=lambda s: s.ticket)
            return last if last is not seq else None
        others = [s for s in self.order[self.at : self.last] if s.ticket >= 0 and s.yields]
        chosen = self.policy.victim(seq, others, self.view)
        if chosen is None or chosen not in others:
            return others[-1] if others and first and (seq.ticket >= 0 or self.forced) else None
        return chosen

    @property
    def holds(self) -> int:
        """Tokens that all memory holds."""
        return self.kv.pool.num_blocks * self.kv.block_size

    def outgrown(self, seq: Sequence) -> bool:
        """Whether more of it is known than memory holds: no memory that others give lets it go on. A token in flight
        does not count, for it may be the last."""
        return seq.samples and len(seq.tokens) - (seq.tokens[-1] == PENDING) > self.holds

    def fail(self, seq: Sequence) -> None:
        """It alone has outgrown the pool."""
        known = seq.computed + seq.pending
        scheduler = self.scheduler
        why = f"kv_exhausted: needs {known} tokens of KV memory; {self.holds} are available: {scheduler.remedy}"
        scheduler.end(seq, why, self.view.now)

    def emit(self, seq: Sequence, match: Match | None, count: int, draft: int) -> None:
        """Write the slice, and what the sequence is now."""
        scheduler, start = self.scheduler, seq.computed
        if match is not None:
            self.starts.append(scheduler.begin(seq, match, self.view.now))
            move = self.kv.copy(seq, scheduler.horizon)
            if move is not None:
                self.moves.append(move)
        end = start + count
        if len(seq.table) != len(seq.blocks):
            seq.table = tuple(seq.blocks)
        last = end == (len(seq.tokens) if seq.samples else seq.goal)
        want = int(last)
        if seq.scored >= 0 and end > seq.scored and start < seq.num_prompt:
            want = max(want, end - max(start, seq.scored))
        self.slices.append(Slice(seq.ticket, start, seq.tokens[start:end], seq.table, want, draft))
        if start < seq.num_prompt or scheduler.has_preempted:
            self.kv.planned(seq, start, count, self.index)
        scheduler.count(seq, start, count)
        seq.computed = end
        if last and seq.samples:
            seq.tokens.append(PENDING)
            seq.guessing = draft > 0
        self.room -= count + draft
