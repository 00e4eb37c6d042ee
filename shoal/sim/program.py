"""What a simulated client asks for: programs of turns, as pieces of endless texts.

It knows true lengths, for the executor alone; it must not know schedulers. Prompts are spelt out when they arrive, so
that a trace of a hundred million tokens needs the memory of its lengths.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from shoal.core.types import TOKEN, Promise, Tokens

Piece = tuple[int, int]  # which endless text, and how many of its first tokens

LEAST, MOST = 3, (1 << 31) - 1  # token ids of pieces: none is one that an answer holds


@dataclass(frozen=True, slots=True)
class Given:
    """A prompt whose tokens are known, and what a plan knows of it."""

    tokens: Tokens
    salt: str = ""
    index: int = -1
    future: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a program."""

    pieces: tuple[Piece, ...]  # its prompt, behind all that was said before where the program keeps that
    length: int  # tokens of the true answer
    limit: int  # the most it may have, which is no secret
    pause: float = 0.0  # seconds from the end of the turn before, or from the program's beginning
    tool: str = ""  # what is called when this turn has ended
    given: Given | None = None  # in place of pieces

    @property
    def num_tokens(self) -> int:
        return len(self.given.tokens) if self.given is not None else sum(count for _, count in self.pieces)


@dataclass(frozen=True, slots=True)
class Program:
    """Turns of which each waits for the one before; a request alone is a program of one turn."""

    id: str
    at: float  # seconds
    turns: Iterable[Turn]  # a tuple; or an iterator that several clients in a closed loop share
    keeps: bool = True  # a turn's prompt begins with all that was said before
    group: str = ""
    promise: Promise | None = None
    deadline: float = math.inf  # seconds after `at`


def spell(pieces: Sequence[Piece]) -> Tokens:
    """The tokens of pieces: the same for the same text, and different for others as far as 31 bits go."""
    names = np.array([name for name, _ in pieces], dtype=np.uint64)
    counts = np.array([count for _, count in pieces], dtype=np.int64)
    total = int(counts.sum())
    begins = np.cumsum(counts) - counts
    places = np.arange(total, dtype=np.int64) - np.repeat(begins, counts)
    mixed = np.repeat(_mix(names), counts) + places.astype(np.uint64)
    ids = _mix(mixed) % np.uint64(MOST - LEAST) + np.uint64(LEAST)
    return array(TOKEN, ids.astype(np.int32).tobytes())


def _mix(x: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Spread numbers over 64 bits (the finaliser of splitmix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
