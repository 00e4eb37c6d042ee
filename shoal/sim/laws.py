"""Length laws of the papers, and laws of when requests come.

It knows distributions and seeds; it must not know who serves what is drawn. Every draw is a function of its seed, so
that policies which are compared get the same requests at the same times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from shoal.core.errors import UsageError

Ints = np.ndarray[tuple[int], np.dtype[np.int64]]
Lengths = tuple[Ints, Ints]  # prompts and answers
Law = Callable[[int, np.random.Generator], Lengths]

SHAREGPT = (1730, 5696, 415, 834, 8192)  # prompt median and 90th percentile, answer's, longest in all: see sharegpt


def between(prompts: tuple[int, int], answers: tuple[int, int]) -> Law:
    """Both uniform, ends included."""

    def draw(count: int, luck: np.random.Generator) -> Lengths:
        return luck.integers(*prompts, count, endpoint=True), luck.integers(*answers, count, endpoint=True)

    return draw


def lognormal(prompt: tuple[float, float], answer: tuple[float, float], most: int) -> Law:
    """Both lognormal, by median and sigma; drawn again where both together are longer than `most`."""

    def draw(count: int, luck: np.random.Generator) -> Lengths:
        kept: list[np.ndarray] = []
        while sum(map(len, kept)) < count:
            p = np.maximum(np.rint(luck.lognormal(np.log(prompt[0]), prompt[1], count)), 1)
            a = np.maximum(np.rint(luck.lognormal(np.log(answer[0]), answer[1], count)), 1)
            kept.append(np.stack([p, a], axis=1)[p + a <= most])
        both = np.concatenate(kept)[:count].astype(np.int64)
        return both[:, 0], both[:, 1]

    return draw


def sigma(median: float, ninetieth: float) -> float:
    """Of a lognormal law with these percentiles."""
    return float(np.log(ninetieth / median) / 1.2815515655446004)


def fixed(prompt: int, answer: int) -> Law:
    """All alike."""
    return between((prompt, prompt), (answer, answer))


def zipf(low: int, high: int, ratio: float, theta: float = 0.4) -> Law:
    """Whole lengths between `low` and `high` whose k-th shortest has a share of k to the power -theta, split into
    prompt and answer by the ratio (SARATHI, arXiv 2308.16369, its pipeline experiments)."""
    shares = np.arange(1, high - low + 2, dtype=float) ** -theta
    shares /= shares.sum()

    def draw(count: int, luck: np.random.Generator) -> Lengths:
        whole = low + luck.choice(len(shares), count, p=shares)
        answers = np.maximum(np.rint(whole / (1 + ratio)), 1).astype(np.int64)
        return whole - answers, answers

    return draw


LAWS: dict[str, Law] = {
    # Past-Future (arXiv 2507.10150): decode-heavy, balanced, prefill-heavy; and answers with long thoughts
    "d1": between((32, 4096), (2048, 4096)),
    "d2": between((3072, 5120), (3072, 5120)),
    "d3": between((2048, 4096), (32, 4096)),
    "sharegpt-o1": lognormal((250, 0.92), (1800, 0.6), 16384),
    # Sarathi-Serve (arXiv 2403.02310): percentiles of its openchat_sharegpt4, lognormal between them
    "sharegpt": lognormal(
        (SHAREGPT[0], sigma(*SHAREGPT[:2])), (SHAREGPT[2], sigma(*SHAREGPT[2:4])), SHAREGPT[4]
    ),
}  # fmt: skip


def find_law(name: str) -> Law | None:
    """By name; fixed:PROMPT:ANSWER, uniform:LOW:HIGH:LOW:HIGH and zipf:LOW:HIGH:RATIO have numbers. None: unknown."""
    kind, *numbers = name.split(":")
    try:
        given = [float(number) for number in numbers]
        if kind == "fixed" and len(given) == 2:
            return fixed(int(given[0]), int(given[1]))
        if kind == "uniform" and len(given) == 4:
            return between((int(given[0]), int(given[1])), (int(given[2]), int(given[3])))
        if kind == "zipf" and len(given) == 3:
            return zipf(int(given[0]), int(given[1]), given[2])
    except ValueError as error:
        raise UsageError(f"the numbers of {name!r} cannot be read: {error}") from error
    return LAWS.get(name)


# -- arrivals ----------------------------------------------------------------------------------------


def poisson(count: int, rate: float, seed: int) -> list[float]:
    """Times at so many requests a second. The gaps at another rate are the same ones, longer or shorter."""
    return bursts(count, rate, 1.0, seed)


def bursts(count: int, rate: float, variation: float, seed: int) -> list[float]:
    """Times with gaps of a gamma law whose standard deviation is so many times its mean."""
    luck = np.random.default_rng([seed, 1])
    shape = 1.0 / variation**2
    return list(np.cumsum(luck.gamma(shape, 1.0 / shape, count)) / rate)


def scaled(times: Sequence[float], rate: float | None) -> list[float]:
    """A trace's times from 0 on, so that there are so many a second on average; None leaves them as they are."""
    first, last = min(times), max(times)
    if rate is None or last == first:
        return [at - first for at in times]
    factor = (len(times) - 1) / (last - first) / rate
    return [(at - first) * factor for at in times]
