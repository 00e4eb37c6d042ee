"""Random numbers that are a function of where they are used, not of when.

It knows Philox4x64-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
It must not keep state, nor know what the numbers are for.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)  # golden ratio, sqrt(3) - 1
_ROUNDS = 10


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Four independent 64-bit integers, a function of `key` and `counter` alone. Inputs are taken modulo 2**64."""
    k0, k1 = key[0] & _MASK, key[1] & _MASK
    c0, c1, c2, c3 = (part & _MASK for part in counter)
    for _ in range(_ROUNDS):
        low, high = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (high >> 64) ^ c1 ^ k0, high & _MASK, (low >> 64) ^ c3 ^ k1, low & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def draw(seed: int, sample: int, position: int, number: int) -> int:
    """A uniform integer in [0, 2**64): the `number`-th draw for the token at `position` of sample `sample` of a row."""
    return philox((seed, sample), (position, number, 0, 0))[0]
