"""Many steps alike at once: what a scheduler is after it has committed and planned the same decodes again and again.

It knows the mechanism's books and keeps them as single steps would; it must not know why nothing else happens, nor
what a step takes. Only simulations use it: who runs a model has no steps to spare.
"""

from __future__ import annotations

from array import array

from shoal.core.types import TOKEN, Slice, Step
from shoal.kv.cache import KVCache
from shoal.sched.scheduler import Scheduler

Crossings = list[tuple[int, int]]  # (step, place of the slice in its step): a block more is needed there


def alike(scheduler: Scheduler, step: Step) -> bool:
    """Whether the step, just planned and the only one in flight, decodes one token of every running sequence and can
    be followed by another that does the same one token further."""
    running = scheduler.running
    if scheduler.in_flight != 1 or len(step.slices) != len(running):
        return False
    for part in step.slices:
        seq = running.get(part.ticket)
        if seq is None or len(part.tokens) != 1 or part.draft or not part.want:
            return False
        if not seq.samples or seq.scored >= 0 or seq.first_token is None or part.start < seq.num_prompt:
            return False
    return True


def room(kv: KVCache, step: Step, count: int) -> int:
    """How many of `count` further steps like this one find blocks: free ones, and those that lie idle.

    All of the latter can be had, as a running sequence that scores nothing holds every node above its own: see match.
    """
    left = kv.pool.num_blocks - kv.in_use
    if len(step.slices) * (-(-count // kv.block_size)) <= left:
        return count
    needed = crossings(kv.block_size, step, count)
    return count if len(needed) <= left else needed[left][0] - 1


def crossings(size: int, step: Step, count: int) -> Crossings:
    """Where the `count` steps after this one need a block more, in the order in which they would ask."""
    found = []
    for place, part in enumerate(step.slices):
        known = part.start + 1  # positions the step in flight will have computed
        first = -known % size + 1
        found += [(later, place) for later in range(first, count + 1, size)]
    found.sort()
    return found


def repeat(scheduler: Scheduler, step: Step, token: int, count: int) -> Step:
    """Commit `token` for every sequence of the step in flight and plan the next, `count` times; the step in flight
    then. Nothing may end, start or be refused memory on the way: see `alike` and `room`."""
    kv, running = scheduler.kv, scheduler.running
    sequences = [running[part.ticket] for part in step.slices]
    for later, place in crossings(kv.block_size, step, count):
        grown = kv.grow(sequences[place], later)
        assert grown, f"no block for {sequences[place].request.id} {later} steps ahead"
    new, slices = array(TOKEN, [token]) * count, []
    for part, seq in zip(step.slices, sequences, strict=True):
        pending = seq.tokens.pop()
        seq.tokens.extend(new)
        seq.tokens.append(pending)
        scheduler.count(seq, seq.computed, count)
        seq.computed += count
        if len(seq.table) != len(seq.blocks):
            seq.table = tuple(seq.blocks)
        slices.append(Slice(part.ticket, seq.computed - 1, new[:1], seq.table, part.want))
    scheduler.counters.steps += count
    return Step(scheduler.counters.steps, tuple(slices))
