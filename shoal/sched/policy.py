"""The questions a scheduler asks, with first-come-first-served answers.

A policy answers; it never acts, and no answer can make the scheduler incorrect. It must not know a true output
length, the wall clock or a tensor. Override what you study and leave the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from shoal.core.sequence import Sequence
from shoal.core.types import Finish, Request
from shoal.kv.tree import Node

Key = tuple[float, ...] | float


@dataclass(frozen=True, slots=True)
class Budget:
    """How big a step may be: tokens to compute, and sequences that compute them."""

    tokens: int = 2048
    sequences: int = 256


@dataclass(frozen=True, slots=True)
class View:
    """What a policy may know when it answers. The sequences are for looking at."""

    now: float  # seconds
    free_blocks: int
    used_blocks: int  # held by running sequences; the rest is free, or idle in the cache
    num_blocks: int
    block_size: int  # tokens
    running: Seq[Sequence]
    waiting: Seq[Sequence]


@dataclass(frozen=True, slots=True)
class Reach:
    """What a waiting sequence would reuse if it started now, and what the cache would lose."""

    tokens: int
    blocks: int  # whole blocks it would share
    idle_blocks: int  # blocks of its reuse that no running sequence holds now, reserved ones apart
    reserved_blocks: int  # idle blocks that unstarted rows before the furthest started one, and the next, will reuse
    loss: Callable[[int], int]  # forgetting so many other idle blocks: the soonest plan index that would miss one
    idle: Callable[[Iterable[Node]], list[int]]  # of each node: blocks of it and above it that nobody holds, each once


class Policy:
    """First come, first served; whole prompts as far as the budget goes; the least recently used block yields first."""

    def __init__(self, limit: Budget | None = None) -> None:
        self.limit = limit or Budget()

    def accept(self, request: Request, view: View) -> str:
        """Why to refuse this request at the door, or "" to take it."""
        return ""

    def budget(self, view: View) -> Budget:
        """How big the next step may be. Asked first in each plan: joint state is computed here."""
        return self.limit

    def admit(self, seq: Sequence, reach: Reach, view: View) -> float:
        """When it may start [s]: `view.now` or earlier is now, infinity is not until something changes.
        The first that may not start ends admission for the step."""
        return -math.inf

    def rank(self, seq: Sequence, view: View) -> Key:
        """Sort key over running and waiting together: smallest is served first. Ties go to arrival order."""
        return 0.0

    def chunk(self, seq: Sequence, room: int, view: View) -> int:
        """Tokens of `seq` to compute now, 0 … room."""
        return min(seq.pending, room)

    def draft(self, seq: Sequence, view: View) -> int:
        """How far to speculate past the next token."""
        return 0

    def victim(self, seq: Sequence, others: Seq[Sequence], view: View) -> Sequence | None:
        """Who gives up its blocks so that `seq` can go on. `others` is ranked, worst last, without those that were
        preempted before and have not repaid what that cost."""
        return others[-1] if seq.running and others else None

    def worth(self, node: Node) -> float:
        """Value of an idle block; the smallest is forgotten first, ties to the longest unused."""
        return node.last_use

    def revalued(self, view: View) -> Iterable[Node]:
        """Idle blocks whose worth has changed since it was asked; it is asked again. Asked before each plan."""
        return ()

    def retire(self, seq: Sequence, finish: Finish, view: View) -> None:
        """Told when a sequence ends, for policies that learn."""

    def hear(self, program: str, tool: str, now: float) -> None:
        """Told what a program does now that its turn has ended: the tool it calls, or "" when it has ended."""
