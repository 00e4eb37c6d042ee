"""Combinations of factors in which every two levels of different factors meet: a covering array of strength two.

It must not know what the factors are.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def covering(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Combinations in which every two levels of different factors meet: each made around the first pair that has not
    met yet, by the levels that meet most of what is left."""
    sizes = [len(levels) for levels in factors.values()]
    missing = {
        ((f, i), (g, j))
        for f, g in itertools.combinations(range(len(sizes)), 2)
        for i, j in itertools.product(range(sizes[f]), range(sizes[g]))
    }
    used: Counter[tuple[int, int]] = Counter()
    chosen = []
    while missing:
        row = dict(min(missing))
        for f, size in enumerate(sizes):
            if f in row:
                continue
            met = [sum(tuple(sorted([(f, i), other])) in missing for other in row.items()) for i in range(size)]
            row[f] = max(range(size), key=lambda i: (met[i], -used[f, i], -i))  # noqa: B023 - called at once
        missing -= set(itertools.combinations(sorted(row.items()), 2))
        used.update(row.items())
        chosen.append({name: levels[row[f]] for f, (name, levels) in enumerate(factors.items())})
    return chosen


def unmet(factors: Mapping[str, Sequence[Any]], chosen: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many pairs of levels there are, and how many of them meet in none of the combinations."""
    pairs = [
        (f, i, g, j)
        for f, g in itertools.combinations(factors, 2)
        for i, j in itertools.product(factors[f], factors[g])
    ]
    return len(pairs), sum(not any(row[f] == i and row[g] == j for row in chosen) for f, i, g, j in pairs)
