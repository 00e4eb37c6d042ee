"""From a job's units to their serving order, the bound and the known future: the steps of planning, joined.

It knows tables and the arena; it must not know where they came from or who reads the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.jobs.arena import Arena
from shoal.jobs.plan_future import Staircases, neighbour_staircases, staircases
from shoal.jobs.plan_order import NO_LIMIT, Floats, Tree, build_tree, computed, walk
from shoal.jobs.plan_sort import Ints, Prompts, overlaps, sort_prompts

_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Facts:
    """Columns of the units as wide integers, by unit number."""

    prompts: Prompts
    reach: Ints
    samples: Ints
    decode: Floats  # expected output tokens of all samples

    @property
    def limited(self) -> bool:
        """Whether some unit may not take all of its prompt from others."""
        return bool((self.reach < self.prompts.length).any())


def arrange(units: npt.NDArray[Any], arena: Arena, order: str) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """(arrays of the serving order and the known future, totals of the summary). `order` is "prefix", "input", or
    "length" for prompts that share nothing: the longest first, those of one length in file order."""
    if not len(units):
        return _arrays(_NONE, _NONE, Staircases(np.zeros(1, dtype=np.int64), _NONE, _NONE)), _totals(units)
    facts = facts_of(units, arena)
    if order == "length":
        served = np.argsort(-facts.prompts.length, kind="stable")
        index = np.cumsum(facts.samples[served]) - facts.samples[served]
        alone = Staircases(np.zeros(len(units) + 1, dtype=np.int64), _NONE, _NONE)
        return _arrays(served, index, alone), _totals(units, int(facts.prompts.length.sum()))
    ranked = sort_prompts(facts.prompts)
    lcp = _neighbour_overlaps(facts.prompts, ranked)
    tree = build_tree(lcp)
    places = walk(tree, ranked, lcp, facts.prompts.length[ranked], facts.reach[ranked], facts.decode[ranked])
    walked = ranked[places]
    overlap = _neighbour_overlaps(facts.prompts, walked)
    cost = computed(facts.prompts.length[walked], overlap, facts.reach[walked])
    totals = _totals(units, int(cost.sum()), _last_again(units[walked], cost))
    if order == "input":
        places = np.argsort(ranked)
    served = ranked[places]
    index = np.cumsum(facts.samples[served]) - facts.samples[served]
    if order == "input" or facts.limited:
        stairs = _staircases(tree, places, index, facts.reach[served], facts.samples[served])
    else:
        stairs = neighbour_staircases(overlap, index)
    return _arrays(served, index, stairs), totals


def facts_of(units: npt.NDArray[Any], arena: Arena) -> Facts:
    """What planning must know of units; of a prompt the part that must be computed."""
    offset, length, root, reach, samples = (
        units[name].astype(np.int64) for name in ("offset", "goal", "root", "reach", "samples")
    )
    reach[reach < 0] = NO_LIMIT
    return Facts(Prompts(arena.padded, offset, length, root), reach, samples, _decode(units["expect"]) * samples)


def _decode(expect: npt.NDArray[np.float32]) -> Floats:
    """Expected output tokens, where an unknown length counts as the average of the known, or nothing is known as 0."""
    known = expect >= 0
    neutral = float(expect[known].mean(dtype=np.float64)) if known.any() else 0.0
    return np.where(known, expect, neutral).astype(np.float64)


def _neighbour_overlaps(prompts: Prompts, order: Ints) -> Ints:
    """Overlap of each prompt with the one before it in `order`; 0 for the first."""
    lcp = np.zeros(len(order), dtype=np.int64)
    lcp[1:] = overlaps(prompts, order[:-1], order[1:])
    return lcp


def _staircases(tree: Tree, places: Ints, index: Ints, reach: Ints, samples: Ints) -> Staircases:
    """Staircases of units' last samples, for any order; arrays are by serving position.

    A reach limits only a unit's first sample: one with more samples needs its whole prompt again for the second.
    """
    twice = (samples > 1) & (reach < NO_LIMIT)
    copies = np.where(twice, 2, 1)
    last = np.cumsum(copies) - 1  # the entry that stands for a unit's later samples
    reach, index = np.repeat(reach, copies), np.repeat(index, copies)
    reach[last[twice]] = NO_LIMIT
    index[last[twice]] += 1
    every = staircases(tree, np.repeat(places, copies), index, reach)
    kept = np.zeros(len(every.depth) + 1, dtype=np.int64)
    start, stop = every.start[last], every.start[last + 1]
    np.add.at(kept, start, 1)
    np.add.at(kept, stop, -1)
    chosen = np.cumsum(kept)[:-1] > 0
    return Staircases(np.append(0, np.cumsum(stop - start)), every.depth[chosen], every.index[chosen])


def _last_again(units: npt.NDArray[Any], cost: Ints) -> int:
    """Requests whose whole prompt is there already, and which compute its last token again to sample from it."""
    sampled = units["length"] == units["goal"]
    return int((sampled & (cost == 0)).sum() + (sampled * (units["samples"] - 1)).sum())


def _totals(units: npt.NDArray[Any], bound: int = 0, last_again: int = 0) -> dict[str, Any]:
    samples = units["samples"].astype(np.int64)
    return {
        "units": len(units),
        "requests": int(samples.sum()),
        "prompt_tokens": int((units["length"] * samples).sum()),
        "bound": bound,
        "last_again": last_again,
    }


def _arrays(order: Ints, index: Ints, stairs: Staircases) -> dict[str, npt.NDArray[Any]]:
    """Narrow where the values are: a unit number fits 32 bits as a row number does, and so does a depth."""
    return {
        "order": order.astype(np.int32),
        "index": index,
        "future_start": stairs.start,
        "future_depth": stairs.depth.astype(np.int32),
        "future_index": stairs.index,
    }
