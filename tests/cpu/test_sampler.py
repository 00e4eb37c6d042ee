"""The sampler: equal to the field's processors, independent of its neighbours, and fair."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from shoal.core.types import TOKEN, Request, Sampling, Start
from shoal.kernels import load, set_threads
from shoal.kernels.ref_sampling import exponential
from shoal.nn.random import draw, philox
from shoal.nn.sampler import Sampler, Samples
from shoal.nn.scores import score

VOCAB = 199
KERNELS = load("auto")  # tests/cpu/test_sampling_kernels.py says that all give the same


def started(wishes: Sequence[Sampling], prompt: Sequence[int] = (1,), produced: Sequence[int] = ()) -> Sampler:
    """A sampler with ticket i for wishes[i]."""
    sampler = Sampler(VOCAB, KERNELS)
    for ticket, sampling in enumerate(wishes):
        request = Request(str(ticket), array(TOKEN, prompt), sampling)
        sampler.start(Start(ticket, request, array(TOKEN, produced)))
    return sampler


def noise(rows: int, seed: int = 0, spread: float = 3.0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def one(logits: torch.Tensor, prompt: Sequence[int] = (1,), produced: Sequence[int] = (), **wishes: Any) -> int:
    """The token of a single row."""
    return started([Sampling(**wishes)], prompt, produced).sample(logits[None], [0]).tokens[0]


def possible(logits: torch.Tensor, draws: int = 400, **wishes: Any) -> set[int]:
    """Every token that comes up when a flat-ish row is drawn from many times."""
    wishes.setdefault("temperature", 1.0)
    sampler = started([Sampling(seed=i, **wishes) for i in range(draws)])
    return set(sampler.sample(logits.repeat(draws, 1), range(draws)).tokens.values())


# -- random numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [(0, 0), (1, 2), (2**64 - 1, 12345), (0xDEADBEEF, 7)])
def test_philox_is_the_published_generator(key: tuple[int, int]) -> None:
    for counter in (0, 5, 2**64 - 2):
        # numpy counts one up before its first block, over all four words
        reference = np.random.Philox(
            key=np.array(key, dtype=np.uint64), counter=np.array([counter, 9, 0, 3], np.uint64)
        )
        expected = reference.random_raw(4).tolist()
        whole = counter + (9 << 64) + (3 << 192) + 1
        words = tuple((whole >> shift) & (2**64 - 1) for shift in (0, 64, 128, 192))
        assert list(philox(key, words)) == expected  # type: ignore[arg-type]


def test_every_argument_of_a_draw_matters() -> None:
    values = {draw(*args) for args in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0))}
    assert len(values) == 5
    assert draw(-1, 0, 0, 0) == draw(2**64 - 1, 0, 0, 0)  # any integer is a seed


# -- the same as transformers -------------------------------------------------------------------------


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(VOCAB)
    logits[[17, 3, 170]] = 5.0
    assert one(logits) == 3


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    from transformers.generation import RepetitionPenaltyLogitsProcessor

    prompt, produced = [5, 9, 9, 40], [77, 5]
    for seed in range(20):
        logits = noise(1, seed)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + produced]), logits.clone())
        got = one(logits[0], prompt, produced, repetition_penalty=penalty)
        assert got == int(expected.argmax())
        drawn = one(logits[0], prompt, produced, repetition_penalty=penalty, temperature=1.0, seed=seed)
        assert drawn == one(expected[0], [1] * len(prompt), produced, temperature=1.0, seed=seed)


@pytest.mark.parametrize(
    "wishes", [{"top_k": 1}, {"top_k": 7}, {"top_p": 0.05}, {"top_p": 0.8}, {"min_p": 0.1}, {"min_p": 1.0}]
)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_truncation_keeps_what_transformers_keeps(wishes: dict[str, Any], temperature: float) -> None:
    from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warper = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    (name, value), ids = next(iter(wishes.items())), torch.tensor([[1]])
    for seed in range(4):
        logits = noise(1, seed, spread=1.0)
        scores = warper[name](value)(ids, TemperatureLogitsWarper(temperature)(ids, logits))
        kept = set(scores[0].isfinite().nonzero()[:, 0].tolist())
        # the draw from the kept tokens alone is the draw from the truncated row: same weights, same random numbers
        masked = logits[0].masked_fill(~scores[0].isfinite(), -math.inf)
        for trial in range(60):
            got = one(logits[0], temperature=temperature, seed=trial, **wishes)
            assert got in kept
            assert got == one(masked, temperature=temperature, seed=trial)
        if len(kept) <= 12:
            assert possible(logits[0], temperature=temperature, **wishes) == kept


def test_truncations_compose_in_the_order_top_k_top_p_min_p() -> None:
    from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids = torch.tensor([[1]])
    for seed in range(10):
        logits = noise(1, seed, spread=1.5)
        scores = MinPLogitsWarper(0.1)(ids, TopPLogitsWarper(0.7)(ids, TopKLogitsWarper(9)(ids, logits)))
        kept = set(scores[0].isfinite().nonzero()[:, 0].tolist())
        assert possible(logits[0], top_k=9, top_p=0.7, min_p=0.1) == kept


def test_top_p_over_a_vocabulary_larger_than_its_first_look() -> None:
    from transformers.generation import TopPLogitsWarper

    logits, ids = noise(1, 3, spread=0.5, vocab=40_000), torch.tensor([[1]])
    kept = TopPLogitsWarper(0.9)(ids, logits)[0].isfinite()
    sampler = Sampler(40_000, KERNELS)
    for ticket in range(200):
        sampling = Sampling(temperature=1.0, top_p=0.9, seed=ticket)
        sampler.start(Start(ticket, Request(str(ticket), array(TOKEN, [1]), sampling), array(TOKEN)))
    tokens = list(sampler.sample(logits.repeat(200, 1), range(200)).tokens.values())
    assert kept[tokens].all()
    assert 39_000 > int(kept.sum()) > 16_384


def test_bad_words_are_those_of_transformers_over_the_output() -> None:
    from transformers.generation import NoBadWordsLogitsProcessor

    banned = ((3,), (5, 9), (7, 5, 11))
    logits = torch.arange(VOCAB, 0, -1).float() / 10 + 1.0
    processor = NoBadWordsLogitsProcessor([list(b) for b in banned], eos_token_id=[])
    for produced in ([], [5], [7, 5], [9, 5], [5, 7]):
        for favourite in (3, 9, 11, 50):
            row = logits.clone()
            row[favourite] = 100.0
            expected = processor(torch.tensor([[1] * 3 + produced]), row[None].clone())
            assert one(row, [1] * 3, produced, banned=banned) == int(expected.argmax())


def test_bad_words_do_not_look_at_the_prompt() -> None:
    row = torch.zeros(VOCAB)
    row[9] = 1.0
    assert one(row, prompt=[1, 5], banned=((5, 9),)) == 9
    assert one(row, prompt=[1], produced=[5], banned=((5, 9),)) == 0


def test_no_stop_token_before_min_tokens() -> None:
    from transformers.generation import MinNewTokensLengthLogitsProcessor

    row = torch.zeros(VOCAB)
    row[[4, 6]] = torch.tensor([9.0, 8.0])
    for produced in ([], [1], [1, 1], [1, 1, 1]):
        processor = MinNewTokensLengthLogitsProcessor(2, 2, [4, 6], device="cpu")
        expected = processor(torch.tensor([[1, 1] + produced]), row[None].clone())
        got = one(row, [1, 1], produced, min_tokens=2, stop=frozenset({4, 6, VOCAB + 5}))
        assert got == int(expected.argmax())


def test_presence_and_frequency_count_the_output_only() -> None:
    produced = [8, 8, 8, 20]
    logits = noise(1, 5)[0]
    expected = logits.clone()
    expected[8] -= 3 * 0.9 + 0.4
    expected[20] -= 0.9 + 0.4
    for seed in range(50):
        got = one(logits, [2, 3], produced, frequency_penalty=0.9, presence_penalty=0.4, temperature=1.0, seed=seed)
        assert got == one(expected, [2, 3], produced, temperature=1.0, seed=seed)


def test_logit_bias_comes_first_and_allowed_tokens_are_a_fence() -> None:
    row = torch.zeros(VOCAB)
    row[50] = 10.0
    assert one(row, logit_bias=((7, 11.0),)) == 7
    assert one(row, logit_bias=((7, 11.0),), allowed=(9, 12)) == 9
    assert one(row, logit_bias=((50, -100.0),)) == 0
    assert one(row, logit_bias=((7, 11.0),), produced=[7], repetition_penalty=2.0) == 50


# -- state and neighbours -----------------------------------------------------------------------------

MIXED = [
    Sampling(),
    Sampling(temperature=0.9, seed=4),
    Sampling(temperature=0.9, seed=4, sample=1),
    Sampling(temperature=1.2, top_k=20, seed=5, logprobs=3),
    Sampling(temperature=0.8, top_p=0.9, seed=6, repetition_penalty=1.2),
    Sampling(temperature=1.0, min_p=0.05, seed=7, min_tokens=6, stop=frozenset(range(60))),
    Sampling(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.7, logprobs=0),
    Sampling(temperature=1.5, top_k=30, top_p=0.7, min_p=0.02, seed=8, logit_bias=((3, 2.0), (90, -5.0))),
    Sampling(logprobs=5, banned=((12,), (4, 7)), allowed=tuple(range(5, 150))),
]


def run_mixed(order: list[int], groups: int, threads: int = 1, steps: int = 12) -> dict[int, list[Any]]:
    """Tokens and scores of every mixed row, sampled in `groups` calls a step, rows in the given order."""
    before = torch.get_num_threads()
    set_threads(threads)
    sampler, story = started(MIXED, prompt=[3, 4, 9]), {i: [] for i in order}
    for step in range(steps):
        logits = noise(len(MIXED), seed=100 + step, spread=2.0)
        for first in range(groups):
            part = order[first::groups]
            result = sampler.sample(logits[torch.tensor(part)], part)
            for ticket in part:
                story[ticket].append((result.tokens[ticket], result.logprobs.get(ticket)))
    set_threads(before)
    return story


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows = list(range(len(MIXED)))
    expected = run_mixed(rows, groups=1)
    assert run_mixed(rows[::-1], groups=1) == expected
    assert run_mixed(rows, groups=len(rows)) == expected
    assert run_mixed([4, 1, 8, 0, 2, 7, 3, 6, 5], groups=3, threads=2) == expected


def test_a_draw_is_the_inverse_of_the_cumulated_weights_at_a_place_that_the_row_decides() -> None:
    sampler = started([Sampling(temperature=0.8, seed=41, sample=2)], prompt=[3, 4, 9])
    for position in range(3, 40):
        logits = noise(1, seed=position)
        z = (logits - logits.max()) / torch.tensor(0.8)
        weights = np.floor(np.exp(z[0].numpy()).astype(np.float64) * 2**40)
        place = draw(41, 2, position, 0) / 2**64 * weights.sum()
        assert sampler.sample(logits, [0]).tokens[0] == np.searchsorted(weights.cumsum(), place, side="right")


def test_a_resumed_row_is_an_undisturbed_row() -> None:
    expected = run_mixed(list(range(len(MIXED))), groups=1)
    for cut in (1, 5, 11):
        sampler = Sampler(VOCAB, KERNELS)
        for ticket, sampling in enumerate(MIXED):
            produced = array(TOKEN, [token for token, _ in expected[ticket][:cut]])
            sampler.start(Start(ticket, Request(str(ticket), array(TOKEN, [3, 4, 9]), sampling), produced))
        for step in range(cut, 12):
            result = sampler.sample(noise(len(MIXED), seed=100 + step, spread=2.0), range(len(MIXED)))
            assert result.tokens == {ticket: expected[ticket][step][0] for ticket in range(len(MIXED))}


@pytest.mark.parametrize("vocab", [260, 4099, 32_003])
def test_reductions_have_the_same_bits_alone_and_in_company(vocab: int) -> None:
    logits = noise(7, 1, spread=4.0, vocab=vocab)
    together = score(KERNELS, logits, [5, 6, 7, 8, 9, 10, 11], 4)
    for threads in (1, 2):
        set_threads(threads)
        for row in range(7):
            assert score(KERNELS, logits[row : row + 1], [5 + row], 4) == [together[row]]
            z = logits - logits.max()
            assert torch.equal(exponential(z)[row], exponential(z[row : row + 1])[0])
    set_threads(1)


# -- scores -------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_model_before_any_wish() -> None:
    logits = noise(1, 9)
    wishes = Sampling(temperature=0.5, repetition_penalty=2.0, allowed=(5, 6, 7), logprobs=4, seed=3)
    result = started([wishes], prompt=[5, 6]).sample(logits, [0])
    expected = logits[0].double().log_softmax(0)
    found, token = result.logprobs[0], result.tokens[0]
    assert token in (5, 6, 7)
    assert found.token == token
    assert found.logprob == pytest.approx(float(expected[token]), abs=1e-5)
    assert found.rank == int((expected > expected[token]).sum()) + 1
    best = expected.topk(4)
    assert [i for i, _ in found.top] == best.indices.tolist()
    assert [p for _, p in found.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_of_equal_logits_the_lowest_ids_are_the_best() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 100] = 1.0
    found = score(KERNELS, logits, [2], 3)[0]
    assert [i for i, _ in found.top] == [100, 0, 1]
    assert found.rank == 4


# -- what cannot be granted ---------------------------------------------------------------------------


def test_one_impossible_row_is_its_own_error() -> None:
    wishes = [
        Sampling(),
        Sampling(logit_bias=((VOCAB, 1.0),)),
        Sampling(allowed=(4,), stop=frozenset({4}), min_tokens=3),
        Sampling(temperature=1.0, seed=1),
        Sampling(),
    ]
    logits = noise(len(wishes))
    logits[4, 7] = math.nan
    result: Samples = started(wishes).sample(logits, range(len(wishes)))
    assert set(result.tokens) == {0, 3}
    assert f"token {VOCAB}" in result.errors[1]
    assert "no token may be sampled" in result.errors[2]
    assert "not finite" in result.errors[4]


# -- fairness -----------------------------------------------------------------------------------------


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's statistic in standard deviations from its mean, cells expecting fewer than 5 joined into one."""
    expected = probabilities * counts.sum()
    small = expected < 5
    observed = np.append(counts[~small], counts[small].sum())
    wanted = np.append(expected[~small], expected[small].sum())
    keep = wanted > 0
    statistic = float((((observed - wanted) ** 2)[keep] / wanted[keep]).sum())
    freedom = int(keep.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def drawn(logits: torch.Tensor, vary: str, draws: int, wishes: dict[str, Any]) -> np.ndarray:
    """How often each token came when one of seed, sample index and position runs and the others stand still."""
    if vary == "position":
        sampler = started([Sampling(seed=11, **wishes)])
        tokens = [sampler.sample(logits[None], [0]).tokens[0] for _ in range(draws)]
    else:
        sampler = started([Sampling(**{"seed": 11, vary: i}, **wishes) for i in range(draws)])
        tokens = list(sampler.sample(logits.repeat(draws, 1), range(draws)).tokens.values())
    return np.bincount(tokens, minlength=VOCAB)


@pytest.mark.parametrize("vary", ["seed", "sample", "position"])
@pytest.mark.parametrize("wishes", [{}, {"temperature": 0.7}, {"top_k": 20}, {"top_p": 0.8}])
def test_draws_follow_the_distribution(wishes: dict[str, Any], vary: str) -> None:
    logits = noise(1, 21, spread=1.0)[0]
    wishes = {"temperature": 1.0, **wishes}
    counts = drawn(logits, vary, 15_000 if vary == "position" else 20_000, wishes)
    z = logits.double() / wishes["temperature"]
    if "top_k" in wishes:
        z[z < z.topk(wishes["top_k"]).values[-1]] = -math.inf
    p = z.softmax(0)
    if "top_p" in wishes:
        best = p.sort(descending=True)
        p[best.indices[best.values.cumsum(0) - best.values >= wishes["top_p"]]] = 0
    true = chi_square(counts, (p / p.sum()).numpy())
    wrong = p ** (1 / 1.3)
    control = chi_square(counts, (wrong / wrong.sum()).numpy())
    print(f"chi-square in deviations from its mean: {true:.2f}; control, at 1.3 times the temperature: {control:.1f}")
    assert abs(true) < 4
    assert control > 8
