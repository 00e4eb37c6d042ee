"""The highest rate that meets a condition, by halving, with the same requests at every rate.

It knows a yes-or-no question of a rate; it must not know what is asked. Tails are noisy, so a rate below the answer may
fail by bad luck: rates below it are tried too, and what they say bounds the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BELOW = (0.95, 0.85, 0.7)  # shares of the answer that are tried too


@dataclass(frozen=True, slots=True)
class Capacity:
    """A rate, and all that was tried."""

    rate: float  # the highest that met the condition with all tried below it; 0 where none did
    tried: tuple[tuple[float, bool], ...]  # ascending
    monotone: bool  # whether no rate failed below one that did not


def capacity(
    meets: Callable[[float], bool], guess: float, tolerance: float = 0.025, most: float = 1e6, probes: int = 40
) -> Capacity:
    """Halve between a rate that meets the condition and one that does not until they are `tolerance` apart, from
    `guess` on. Ask with common random numbers: the same requests in the same order, whatever the rate."""
    known: dict[float, bool] = {}

    def ask(rate: float) -> bool:
        if rate not in known:
            known[rate] = meets(rate)
        return known[rate]

    low, high = 0.0, guess
    while high <= most and len(known) < probes and ask(high):
        low, high = high, 2 * high
    if low == 0.0:
        low = guess / 2
        while len(known) < probes and not ask(low):
            low, high = low / 2, low
    while known.get(low) and high > low * (1 + tolerance) and len(known) < probes:
        middle = (low + high) / 2
        low, high = (middle, high) if ask(middle) else (low, middle)
    if known.get(low):
        for share in BELOW:
            ask(low * share)
    tried = tuple(sorted(known.items()))
    best, failed = 0.0, False
    for rate, met in tried:
        failed = failed or not met
        if met and not failed:
            best = rate
    held = [met for _, met in tried]
    return Capacity(best, tried, held == sorted(held, reverse=True))
