"""Steps that decodes can wait for, and the batches of whole prompts that they cannot."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import COST, ask, serve, whole

from shoal.core.types import Promise, Step
from shoal.sched.budgeting import NEAR, Budgets, multiples, priced, rounded, saturation, select_budget
from shoal.sched.cost import LinearCost, shape
from shoal.sched.policies.decode_maximal import DecodeMaximal
from shoal.sched.policies.stall_free import StallFree
from shoal.sched.policies.whole_prompts import Hybrid, PrefillFirst, RequestLevel
from shoal.sched.policy import Budget
from shoal.sim.hardware import A100
from shoal.sim.roofline import Roofline
from shoal.sim.shapes import SHAPES
from shoal.sim.stages import Staged

GAP = 0.02
LIMIT = Budget(4096, 64)


class Saturating:
    """A step of few tokens takes as long as one of `knee`."""

    def __init__(self, knee: int = 300) -> None:
        self.knee = knee

    def seconds(self, step: Step) -> float:
        _, tokens, read, _ = shape(step)
        return 1e-3 + 1e-5 * max(tokens, self.knee) + 1e-9 * read


@settings(max_examples=150, deadline=None)
@given(
    gap=st.floats(0.005, 0.2), decodes=st.integers(0, 200), context=st.integers(1, 4000), depth=st.integers(0, 40_000),
    tile=st.sampled_from([16, 64, 128]), knee=st.integers(1, 1500),
)  # fmt: skip
def test_a_budget_is_whole_tiles_keeps_the_gap_and_is_the_least_near_the_best(gap, decodes, context, depth, tile, knee):
    cost, most = Saturating(knee), 2048
    chosen = select_budget(cost, gap, decodes, context, depth, tile, most)
    pace = {
        tokens: (tokens - decodes) / priced(cost, decodes, context, tokens - decodes, depth)
        for tokens in multiples(tile, most)
        if tokens > decodes and priced(cost, decodes, context, tokens - decodes, depth) <= gap
    }
    if not pace:
        assert chosen == 0
        return
    near = [tokens for tokens, speed in pace.items() if speed >= (1 - NEAR) * max(pace.values())]
    assert chosen == min(near) and chosen % tile == 0 and chosen > decodes


@given(count=st.integers(0, 100_000), parts=st.sampled_from([4, 8]))
def test_rounding_is_up_and_by_little(count, parts):
    assert count <= rounded(count, parts) <= count * (1 + 1 / parts) + 1
    assert rounded(rounded(count, parts), parts) == rounded(count, parts)


def test_there_is_a_share_for_prompts_however_many_decode():
    """Guard: with as many decodes as the budget has tokens, or a promise nobody can keep, prompts still go on."""
    budgets = Budgets(COST, 64, 4096)
    for decodes in (1, 63, 64, 200, 999):
        assert budgets.tokens(1e-6, decodes, 1000, 1000) == (decodes // 64 + 1) * 64 > decodes
    assert budgets.tokens(math.inf, 5, 10, 10) == 4096


def long_prompt(policy, prompt: int = 2000, decodes: int = 8):
    """Short requests that decode, while a long prompt arrives."""
    requests = [ask(f"d{i}", 20, 120) for i in range(decodes)] + [ask("long", prompt, 20, arrival=0.2)]
    lengths = dict.fromkeys((r.id for r in requests), 100)
    served = serve(policy, requests, lengths, 2000)
    whole(served, lengths)
    return served, max(max(served.gaps(f"d{i}")) for i in range(decodes))


def test_no_token_waits_longer_than_promised_while_a_long_prompt_arrives():
    served, worst = long_prompt(StallFree(LIMIT, cost=COST, promise=Promise(1.0, GAP)))
    assert worst <= GAP
    _, stalled = long_prompt(PrefillFirst(LIMIT))
    _, hybrid = long_prompt(Hybrid(LIMIT))
    assert min(stalled, hybrid) > 2 * worst
    assert served.first("long") < 20 * GAP


def test_no_token_waits_longer_than_promised_however_deep_the_prompt_is():
    """Attention of a chunk far into a prompt is what most of its step goes to."""
    cost = Roofline(A100, SHAPES["llama-2-7b"])
    requests = [ask(f"d{i}", 20, 2000) for i in range(8)] + [ask("deep", 30_000, 20, arrival=0.2)]
    lengths = {r.id: 1200 if r.id != "deep" else 10 for r in requests}
    policy = StallFree(Budget(8192, 64), cost=cost, promise=Promise(10.0, 0.05))
    served = serve(policy, requests, lengths, 4000, cost=cost)
    whole(served, lengths)
    assert served.first("deep") > 0.5, "else nothing was shown"
    assert max(max(served.gaps(f"d{i}")) for i in range(8)) <= 0.05


def test_a_promise_looser_than_the_default_is_the_one_that_counts():
    def worst(gap: float) -> float:
        requests = [ask(f"d{i}", 20, 120, promise=Promise(1.0, gap)) for i in range(8)]
        requests.append(ask("long", 2000, 20, arrival=0.2, promise=Promise(1.0, gap)))
        lengths = dict.fromkeys((r.id for r in requests), 100)
        served = serve(StallFree(LIMIT, cost=COST, promise=Promise(1.0, GAP)), requests, lengths, 2000)
        return max(max(served.gaps(f"d{i}")) for i in range(8))

    assert worst(GAP / 2) <= GAP / 2 < worst(GAP) <= GAP < worst(2 * GAP) <= 2 * GAP


def test_no_token_waits_longer_than_a_step_of_a_fixed_budget():
    _, worst = long_prompt(StallFree(LIMIT, fixed=128))
    assert worst <= COST.weights[0] + 128 * 2 * COST.weights[1] + 0.01


def test_prompts_are_not_cut_when_nothing_decodes():
    policy = StallFree(LIMIT, cost=COST, promise=Promise(1.0, GAP))
    served = serve(policy, [ask("a", 3000, 4), ask("b", 900, 4)], {"a": 3, "b": 3}, 1000)
    assert [len(part.tokens) for part in served.steps[0][1].slices] == [3000, 900]


def test_all_decodes_are_in_every_step_and_budgets_are_whole_tiles():
    served, _ = long_prompt(StallFree(LIMIT, cost=COST, promise=Promise(1.0, GAP), tile=64))
    mixed = [step for _, step in served.steps if len(step.slices) > 1 and any(len(s.tokens) > 1 for s in step.slices)]
    mixed = [step for step in mixed if any(len(s.tokens) == 1 for s in step.slices)]
    assert len(mixed) >= 3
    assert all(step.num_tokens % 64 == 0 for step in mixed[:-1])
    assert all(sum(len(s.tokens) == 1 for s in step.slices) == 8 for step in mixed)


def test_a_whole_prompt_is_one_slice_and_no_decode_is_beside_it():
    served, _ = long_prompt(PrefillFirst(LIMIT))
    steps = [step for _, step in served.steps]
    assert any(len(s.tokens) == 2000 for step in steps for s in step.slices)
    for step in steps:
        assert len({len(s.tokens) > 1 for s in step.slices}) == 1, "prompts and decodes in one step"
    hybrid, _ = long_prompt(Hybrid(LIMIT))
    assert any({len(s.tokens) for s in step.slices} == {1, 2000} for _, step in hybrid.steps)


def test_nobody_joins_a_batch_of_requests():
    requests = [ask(f"r{i}", 30, 50, arrival=0.01 * i) for i in range(12)]
    lengths = {f"r{i}": 5 + 3 * i for i in range(12)}
    served = serve(RequestLevel(Budget(4096, 4)), requests, lengths, 400)
    spans = sorted((served.start(r.id), served.ends[r.id].timing["end"]) for r in requests)
    batches = {begin: [end for other, end in spans if other == begin] for begin, _ in spans}
    begins = sorted(batches)
    assert all(max(batches[a]) <= b for a, b in zip(begins, begins[1:], strict=False))
    assert max(map(len, batches.values())) == 4


# -- one chunk of one prompt, and decodes that ride on it ---------------------------------------------


def test_a_step_has_one_chunk_and_at_most_the_seats_beside_it():
    luck = random.Random(2)
    requests = [ask(f"r{i}", luck.randrange(200, 900), 60) for i in range(20)]
    lengths = {r.id: luck.randrange(20, 60) for r in requests}
    served = serve(DecodeMaximal(Budget(1024, 8), tile=64, least=64), requests, lengths, 2000)
    for _, step in served.steps:
        assert sum(len(s.tokens) > 1 for s in step.slices) <= 1
        assert len(step.slices) <= 8


def test_the_chunk_with_its_riders_is_whole_tiles_and_follows_the_means():
    policy = DecodeMaximal(Budget(4096, 27), tile=128, least=256)
    assert (policy.best_chunk() + 26) % 128 == 0 and policy.best_chunk() >= 256 - 26
    luck = random.Random(4)
    requests = [ask(f"r{i}", luck.randrange(700, 900), 90) for i in range(60)]
    lengths = {r.id: luck.randrange(30, 50) for r in requests}  # P / D about 20
    serve(policy, requests, lengths, 4000)
    chunk = policy.best_chunk()
    assert abs(chunk - 26 * 20) <= 128 and (chunk + 26) % 128 == 0


def test_the_chunk_of_a_model_in_stages_has_a_step_s_share_of_the_riders():
    one, parts = DecodeMaximal(Budget(4096, 32)), DecodeMaximal(Budget(4096, 32))
    Staged(parts, 4)
    for policy in (one, parts):
        policy._prompt, policy._output = 1000.0, 10.0
    assert abs(one.best_chunk() - 31 * 100) <= 128 and abs(parts.best_chunk() - 7 * 100) <= 128
    assert (parts.best_chunk() + 7) % 128 == 0


def test_prompts_and_decodes_run_out_together_at_the_paper_s_chunk():
    """C = (B - 1) P / D: with less, chunks go without riders; with more, decodes go without a chunk."""
    requests = [ask(f"r{i}", 600, 60) for i in range(80)]
    lengths = dict.fromkeys((r.id for r in requests), 60)
    best = 7 * 600 / 60

    def alone(chunk: int) -> tuple[float, float]:
        """Shares of steps: chunks with less than half of the riders they have room for, and decodes alone."""
        served = serve(DecodeMaximal(Budget(2048, 8), chunk_tokens=chunk), requests, lengths, 4000)
        riders = [sum(len(s.tokens) == 1 for s in step.slices) for _, step in served.steps]
        carried = [any(len(s.tokens) > 1 for s in step.slices) for _, step in served.steps]
        few = sum(there and count < 3.5 for count, there in zip(riders, carried, strict=True))
        return few / len(riders), carried.count(False) / len(riders)

    small, right, large = (alone(round(best * factor)) for factor in (0.25, 1.0, 8.0))
    assert small[0] > 0.9 and large[1] > 0.5, (small, large)
    assert sum(right) < 0.7 * min(sum(small), sum(large)), (small, right, large)


def test_saturation_is_where_twice_the_tokens_take_twice_as_long():
    found = saturation(Saturating(512), 64, 4096)
    assert 512 <= found <= 2048
    assert priced(Saturating(512), 0, 0, 2 * found, 0) >= 1.9 * priced(Saturating(512), 0, 0, found, 0)
    assert saturation(LinearCost((1.0, 1e-9, 0.0, 0.0)), 64, 512) == 512


@pytest.mark.parametrize("kind", [PrefillFirst, Hybrid])
def test_a_prompt_longer_than_any_step_is_computed_alone(kind):
    policy = kind(Budget(256, 8))
    requests = [ask("big", 900, 5), ask("small", 20, 5)]
    served = serve(policy, requests, {"big": 5, "small": 5}, 400)
    assert len(served.times["big"]) == len(served.times["small"]) == 5
