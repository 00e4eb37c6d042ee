"""A row's answer is a function of the row: the real engine over a small model, cut, crowded and shuffled."""

from __future__ import annotations

import itertools
import random
import threading
from array import array
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from small_models import reference, save_model

from shoal.build import WallClock, build_engine
from shoal.core.config import EngineConfig
from shoal.core.errors import UsageError
from shoal.core.types import TOKEN, Answer, Finish, Move, Output, Request, Sampling, Slice, Start, Step
from shoal.engine import Engine
from shoal.kernels import load, set_threads
from shoal.kernels.cpu import instruction_sets
from shoal.nn.arch import read_config
from shoal.nn.decoder import Decoder
from shoal.nn.weights import load_weights
from shoal.runtime.memory import MemoryPlan, _control_groups, available_bytes, plan_memory
from shoal.runtime.runner import ModelRunner
from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policy import Budget, Policy
from shoal.sched.scheduler import Scheduler

VOCAB, BLOCK = 199, 16


class Reverse(Policy):
    """Later rows first: everybody is preempted by those who come after."""

    def rank(self, seq, view):
        return float(-seq.number)


class Thief(Policy):
    """Odd chunks, and whoever is last loses its blocks."""

    def chunk(self, seq, room, view):
        return min(5 + seq.number % 3, seq.pending, room)

    def victim(self, seq, others, view):
        return others[-1] if others else None


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    set_threads(1)
    yield
    set_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_model("llama", path)
    return path


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    config = read_config(folder)
    return Decoder(config, load_weights(folder, config), load("auto"))


# -- the workload -------------------------------------------------------------------------------------

WISHES: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"repetition_penalty": 1.4, "logprobs": 2},
    {"temperature": 0.8, "top_p": 0.9, "seed": 5, "presence_penalty": 0.6, "logprobs": 0},
    {"min_tokens": 7, "stop": frozenset(range(0, VOCAB, 3))},
    {"temperature": 1.3, "top_k": 25, "min_p": 0.02, "seed": 6, "min_tokens": 5, "stop": frozenset(range(60))},
    {"logit_bias": ((4, 3.0), (9, -50.0)), "frequency_penalty": 0.8, "temperature": 0.9, "seed": 7},
    {"banned": ((11, 12), (20,)), "allowed": tuple(range(2, 120)), "repetition_penalty": 0.9},
]


def rows(count: int = 20, seed: int = 1) -> list[Request]:
    """Rows behind shared heads that end inside blocks, with every wish; some scored, one a vector."""
    luck = random.Random(seed)
    heads = [[luck.randrange(VOCAB) for _ in range(n)] for n in (37, 21)]
    found = []
    for i in range(count):
        prompt = array(TOKEN, heads[i % 2] + [luck.randrange(VOCAB) for _ in range(luck.randrange(1, 18))])
        sampling = Sampling(max_tokens=luck.randrange(4, 14), **WISHES[i % len(WISHES)])
        more: dict[str, Any] = {}
        if i % 5 == 3:
            more = {"score_from": luck.randrange(1, len(prompt)), "score_top": i % 3}
        if i == 10:
            more = {"answer": Answer.VECTOR}
        if i == 13:
            sampling, more = Sampling(max_tokens=0), {"score_from": 1}
        found.append(Request(f"r{i}", prompt, sampling, **more))
    for sample in (1, 2):  # further answers of one prompt
        first = found[1]
        found.append(replace(first, id=f"{first.id}.{sample}", sampling=replace(first.sampling, sample=sample)))
    return found


@dataclass(frozen=True)
class Setting:
    policy: type[Policy]
    blocks: int
    tokens: int  # step budget
    ahead: int
    reuse: bool
    order: str


LEVELS: Mapping[str, list[Any]] = {
    "policy": [Policy, BatchPolicy, Reverse, Thief],
    "blocks": [6, 11, 400],
    "tokens": [7, 64, 2048],
    "ahead": [0, 1],
    "reuse": [True, False],
    "order": ["file", "shuffled", "halves"],
}


def pairwise() -> list[Setting]:
    """Settings in which every two levels of different factors meet, chosen greedily."""
    names = list(LEVELS)

    def pairs(values: tuple[Any, ...]) -> set[Any]:
        return set(itertools.combinations(zip(names, values, strict=True), 2))

    every = [tuple(values) for values in itertools.product(*LEVELS.values())]
    missing = set().union(*map(pairs, every))
    chosen = []
    while missing:
        best = max(every, key=lambda values: len(missing & pairs(values)))
        missing -= pairs(best)
        chosen.append(Setting(**dict(zip(names, best, strict=True))))
    return chosen


def run(decoder: Decoder, requests: list[Request], s: Setting) -> tuple[dict[str, Any], Scheduler]:
    """What every request got: tokens, end, log-probabilities, scores and vector."""
    runner = ModelRunner(decoder, decoder.kernels, decoder.new_kv(s.blocks, BLOCK), VOCAB)
    scheduler = Scheduler(s.policy(Budget(s.tokens, 64)), s.blocks, BLOCK, s.reuse)
    engine = Engine(scheduler, runner, WallClock(), s.ahead)
    todo = list(requests)
    if s.order != "file":
        random.Random(4).shuffle(todo)
    parts = [todo] if s.order != "halves" else [todo[: len(todo) // 2], todo[len(todo) // 2 :]]
    got: dict[str, list[Output]] = {each.id: [] for each in requests}
    for part in parts:
        for request in part:
            assert engine.add(request) is None
        while engine.busy:
            for output in engine.step():
                got[output.id].append(output)
    runner.close()
    return {
        id: (
            [token for news in story for token in news.tokens],
            [(news.finish, news.error) for news in story if news.finish],
            [score for news in story for score in news.logprobs],
            [score for news in story for score in news.scores],
            [news.vector for news in story if news.vector is not None],
        )
        for id, story in got.items()
    }, scheduler


CALM = Setting(Policy, 400, 2048, 0, True, "file")


@pytest.fixture(scope="module")
def expected(decoder: Decoder) -> dict[str, Any]:
    return run(decoder, rows(), CALM)[0]


def test_the_workload_shows_what_it_should(expected: dict[str, Any]) -> None:
    ends = {id: story[1] for id, story in expected.items()}
    assert all(len(end) == 1 and end[0][0] in (Finish.STOP, Finish.LENGTH) for end in ends.values())
    assert {end[0][0] for end in ends.values()} == {Finish.STOP, Finish.LENGTH}
    assert len(expected["r10"][4][0]) == 64
    for request in rows():
        tokens, _, logprobs, scores, _ = expected[request.id]
        assert len(scores) == (len(request.prompt) - request.score_from if request.score_from > 0 else 0)
        assert len(logprobs) == (len(tokens) if request.sampling.logprobs >= 0 else 0)
    assert expected["r1"] != expected["r1.1"] != expected["r1.2"]


def test_pairwise_settings_cover_every_pair() -> None:
    levels = [len(each) for each in LEVELS.values()]
    least = max(a * b for a, b in itertools.combinations(levels, 2))
    assert least <= len(pairwise()) <= 2 * least


@pytest.mark.parametrize("setting", pairwise(), ids=lambda s: f"{s.policy.__name__}-{s.blocks}-{s.tokens}-{s.ahead}")
def test_an_answer_depends_on_its_row_alone(decoder: Decoder, expected: dict[str, Any], setting: Setting) -> None:
    got, scheduler = run(decoder, rows(), setting)
    assert got == expected  # to the last bit of every log-probability
    counters = scheduler.counters
    print(f"preemptions {counters.preemptions}, cached {counters.cached}, steps {counters.steps}")
    if setting.blocks == 6 and setting.policy is Reverse:
        assert counters.preemptions > 0
    if not setting.reuse:
        assert counters.cached == 0


def test_answers_are_those_of_transformers(folder: Path, decoder: Decoder, tmp_path: Path) -> None:
    model = save_model("llama", tmp_path)
    luck = random.Random(8)
    prompts = [[luck.randrange(VOCAB) for _ in range(luck.randrange(1, 60))] for _ in range(6)]
    requests = [
        Request(str(i), array(TOKEN, prompt), Sampling(max_tokens=12, logprobs=1)) for i, prompt in enumerate(prompts)
    ]
    got, _ = run(decoder, requests, replace(CALM, tokens=32, ahead=1))
    for i, prompt in enumerate(prompts):
        tokens, logits = reference(model, prompt, 12)
        assert got[str(i)][0] == tokens
        wanted = logits.double().log_softmax(-1)[range(12), tokens]
        assert [each.logprob for each in got[str(i)][2]] == pytest.approx(wanted.tolist(), abs=1e-4)


def test_prompt_scores_are_those_of_transformers(decoder: Decoder, tmp_path: Path) -> None:
    model = save_model("llama", tmp_path)
    prompt = [random.Random(2).randrange(VOCAB) for _ in range(90)]
    request = Request("s", array(TOKEN, prompt), Sampling(max_tokens=0), score_from=1, score_top=3)
    scores = run(decoder, [request], replace(CALM, tokens=40))[0]["s"][3]
    with torch.inference_mode():
        wanted = model(torch.tensor([prompt])).logits[0, :-1].double().log_softmax(-1)
    assert [each.token for each in scores] == prompt[1:]
    assert [each.logprob for each in scores] == pytest.approx(wanted[range(89), prompt[1:]].tolist(), abs=1e-4)
    assert [[i for i, _ in each.top] for each in scores] == wanted.topk(3).indices.tolist()


# -- steps --------------------------------------------------------------------------------------------


def test_a_moved_block_answers_as_the_one_it_was_copied_from(decoder: Decoder) -> None:
    prompt = array(TOKEN, range(10, 34))
    request = Request("a", prompt, Sampling(max_tokens=3))

    def answer(moved: bool) -> list[int]:
        runner = ModelRunner(decoder, decoder.kernels, decoder.new_kv(8, BLOCK), VOCAB)
        first = Slice(1, 0, prompt[:20], (0, 1), 0)
        runner.submit(Step(1, (first,), (Start(1, request, array(TOKEN)),))).wait()
        moves = (Move(0, 5, 16), Move(1, 6, 4)) if moved else ()
        last = Slice(1, 20, prompt[20:], (5, 6) if moved else (0, 1), 1)
        tokens = runner.submit(Step(2, (last,), moves=moves)).wait().tokens[1]
        runner.close()
        return tokens

    assert answer(moved=True) == answer(moved=False)


def test_a_row_that_cannot_be_run_fails_alone(decoder: Decoder) -> None:
    good = Request("good", array(TOKEN, [3, 4, 5]), Sampling(max_tokens=4))
    outside = Request("outside", array(TOKEN, [3, VOCAB, 5]), Sampling(max_tokens=4))
    nothing = Request("nothing", array(TOKEN, [3]), Sampling(max_tokens=4, allowed=(5,), banned=((5,),)))
    for ahead in (0, 1):
        got, _ = run(decoder, [outside, good, nothing], replace(CALM, ahead=ahead))
        alone, _ = run(decoder, [good], CALM)
        assert got["good"] == alone["good"]
        assert got["outside"][1][0][0] is Finish.ERROR and "vocabulary of 199" in got["outside"][1][0][1]
        assert got["nothing"][1][0][0] is Finish.ERROR and "no token may be sampled" in got["nothing"][1][0][1]


def test_what_breaks_in_the_worker_surfaces_in_wait(decoder: Decoder) -> None:
    class Broken:
        def forward(self, batch: Any, kv: Any, begun: Any) -> torch.Tensor:
            raise RuntimeError("the device fell off")

        def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
            return hidden_RD

    runner = ModelRunner(Broken(), decoder.kernels, decoder.new_kv(2, BLOCK), VOCAB)
    engine = Engine(Scheduler(Policy(), 2, BLOCK), runner, WallClock(), 0)
    engine.add(Request("a", array(TOKEN, [1])))
    with pytest.raises(RuntimeError, match="fell off"):
        engine.step()
    runner.close()


def test_a_step_that_an_interrupt_kept_out_makes_no_later_one_wait_for_it(decoder: Decoder) -> None:
    queue = ThreadPoolExecutor.submit
    for queued in (False, True):  # before it was queued, or just after
        runner = ModelRunner(decoder, decoder.kernels, decoder.new_kv(2, BLOCK), VOCAB)

        def interrupted(*args: Any, queued: bool = queued) -> Any:
            if queued:
                queue(*args)
            raise KeyboardInterrupt

        with mock.patch.object(ThreadPoolExecutor, "submit", interrupted), pytest.raises(KeyboardInterrupt):
            runner.submit(Step(0, ()))
        waits = threading.Thread(target=runner.submit(Step(1, ())).wait, daemon=True)
        waits.start()
        waits.join(10)
        assert not waits.is_alive()
        runner.close()


# -- memory and building ------------------------------------------------------------------------------


def test_kv_memory_is_what_is_free_and_at_most_what_is_useful() -> None:
    gb = 10**9
    plan = plan_memory(8 * gb, 2 * gb, gb // 100, None, useful_blocks=10_000)
    assert (plan.num_blocks, plan.reason) == (500, "memory")
    plan = plan_memory(8 * gb, 2 * gb, gb // 100, None, useful_blocks=40)
    assert (plan.num_blocks, plan.reason) == (40, "plan")
    plan = plan_memory(8 * gb, 2 * gb, gb // 100, gb, useful_blocks=40)
    assert plan == MemoryPlan(8 * gb, 2 * gb, 0, gb // 100, 100, "--memory")
    assert "1.00 GB" in str(plan) and "100 blocks" in str(plan)


@pytest.mark.parametrize(
    ("available", "asked", "words"),
    [(2, None, ["2.00 GB are available", "--memory"]), (9, 8, ["10.00 GB", "9.00 GB"]), (9, 0.001, ["too small"])],
)
def test_what_cannot_fit_is_refused_with_three_numbers(available: int, asked: float | None, words: list[str]) -> None:
    gb = 10**9
    with pytest.raises(UsageError) as caught:
        plan_memory(available * gb, 2 * gb, gb // 100, asked and int(asked * gb), useful_blocks=40, least_blocks=1)
    assert all(word in str(caught.value) for word in [*words, "--memory"])


def test_the_tightest_control_group_on_the_way_up_decides(tmp_path: Path) -> None:
    def group(path: str, **files: object) -> None:
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (tmp_path / path / name.replace("__", ".")).write_text(f"{content}\n")

    group("job", memory__max=1000, memory__current=900, memory__stat="anon 5\ninactive_file 300")
    group("job/inner", memory__max="max", memory__current=5, memory__stat="")
    group("memory/old", memory__limit_in_bytes=50, memory__usage_in_bytes=70, memory__stat="total_inactive_file 1")
    member = tmp_path / "cgroup"
    member.write_text("4:memory:/old\n2:cpu:/job\n0::/job/inner\n")
    assert sorted(_control_groups(tmp_path, member)) == [0, 400]
    member.write_text("0::/nowhere\n")
    assert list(_control_groups(tmp_path, member)) == list(_control_groups(tmp_path, tmp_path / "none")) == []
    assert 0 < available_bytes(torch.device("cpu"))


def test_a_built_engine_knows_what_it_stands_on(folder: Path) -> None:
    built = build_engine(EngineConfig(model=str(folder), memory_bytes=10**6, block_size=16, policy=f"{__name__}:Thief"))
    facts = built.facts
    block = 2 * 3 * 16 * 2 * 32 * 4  # K and V, layers, tokens, heads, width filled up to 32, float32
    assert facts.memory.block == block and facts.memory.num_blocks == 10**6 // block
    weights = sum(p.numel() for p in save_model("llama", folder).parameters()) * 4
    assert (facts.context, facts.vocab_size, facts.weights, facts.kernels) == (
        1024,
        VOCAB,
        "fp32",
        instruction_sets()[0],
    )
    assert facts.memory.weights == weights
    assert type(built.engine.scheduler.policy).__name__ == "Thief"
    built.close()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kernels": "abacus"}, "abacus"),
        ({"policy": "shoal.nowhere:No"}, "cannot be imported"),
        ({"policy": "shoal.core.types:Request"}, "not a Policy"),
        ({"device": "cuda:97"}, "not there"),
        ({"memory_bytes": 10**18}, "lower --memory"),
        ({"kv": "int8"}, "16-bit activations only: give --weights bf16 too"),
    ],
)
def test_a_wrong_setting_is_refused_before_or_while_building(folder: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build_engine(EngineConfig(**{"model": str(folder), "memory_bytes": 10**6, **values}))


def test_scores_and_samples_are_cut_into_pieces_without_a_trace(
    decoder: Decoder, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.runtime.runner._LOGIT_BYTES", 1)
    monkeypatch.setattr("shoal.kernels.ref_sampling._BYTES", 1)
    assert run(decoder, rows(), CALM)[0] == expected
    assert np.isfinite([each.logprob for each in expected["r13"][3]]).all()
