"""Laws, traces and programs: the same arguments give the same requests, and shared is what a trace says is shared."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from shoal.core.errors import UsageError
from shoal.core.types import Promise
from shoal.sim.classes import three_classes
from shoal.sim.laws import LAWS, bursts, find_law, poisson, scaled
from shoal.sim.program import spell
from shoal.sim.traces import Row, clients, histories, pieces_of, read_trace
from shoal.sim.workload import Arrivals, find_source, programs

TRACES = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason=f"the traces are not here: {TRACES}")


def facts(found):
    return [(p.id, p.at, tuple(p.turns)) for p in found]


@pytest.mark.parametrize("name", [*LAWS, "fixed:100:7", "uniform:1:9:2:4", "zipf:1024:4096:10"])
def test_a_seed_decides_all_of_a_law(name):
    def draw(seed):
        return facts(programs(find_source(name), Arrivals.parse("poisson:2"), 50, seed))

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("name", ["poisson", "gamma", "trace"])
def test_the_rate_scales_times_and_changes_no_request(name):
    rows = [Row(float(i * i), 10 + i, 1 + i) for i in range(30)]

    def at(rate):
        return programs(rows, Arrivals(name, rate, 3.0), None, 5)

    slow, quick = at(1.0), at(4.0)
    assert [p.turns for p in slow] == [p.turns for p in quick]
    assert np.allclose([p.at for p in slow], [4 * p.at for p in quick])


def test_laws_of_the_papers():
    for name, (prompts, answers) in {"d1": ((32, 4096), (2048, 4096)), "d3": ((2048, 4096), (32, 4096))}.items():
        p, a = LAWS[name](4000, np.random.default_rng(0))
        assert prompts[0] <= p.min() and p.max() <= prompts[1] and abs(p.mean() - sum(prompts) / 2) < 60
        assert answers[0] <= a.min() and a.max() <= answers[1] and abs(a.mean() - sum(answers) / 2) < 60
    p, a = LAWS["sharegpt"](20000, np.random.default_rng(0))
    assert (p + a).max() <= 8192 and abs(np.median(a) - 415) < 40 and 1300 < np.median(p) < 1730
    zipf = find_law("zipf:1024:4096:10")
    assert zipf is not None
    p, a = zipf(20000, np.random.default_rng(0))
    assert 1024 <= (p + a).min() and (p + a).max() <= 4096 and abs((p / a).mean() - 10) < 0.2
    assert (p + a < 2560).mean() > 0.55  # short ones are more frequent


def test_bursts_vary_as_they_are_told_and_poisson_by_one():
    for variation in (0.5, 1.0, 4.0):
        gaps = np.diff(bursts(40000, 2.0, variation, 3))
        assert abs(gaps.mean() - 0.5) < 0.05 and abs(gaps.std() / gaps.mean() - variation) < 0.15 * variation
    assert poisson(10, 1.0, 3) == bursts(10, 1.0, 1.0, 3)
    assert scaled([5.0, 6.0, 9.0], 1.0) == [0.0, 0.5, 2.0] and scaled([5.0, 6.0], None) == [0.0, 1.0]


@pytest.mark.parametrize("text", ["poisson", "poisson:0", "gamma:1", "closed:1.5", "often", "poisson:x", "trace:-1"])
def test_arrivals_that_cannot_be_read_say_how_to_write_them(text):
    with pytest.raises(UsageError, match="poisson:RATE"):
        Arrivals.parse(text)


def test_an_unknown_law_and_a_file_that_is_no_trace_say_what_there_is(tmp_path):
    with pytest.raises(UsageError, match="sharegpt"):
        find_source("nowhere")
    for number, text in enumerate(["{", "a,b\n1,2\n", '{"x": 1}', "TIMESTAMP,ContextTokens\nnever,1\n"]):
        path = tmp_path / f"{number}.csv"
        path.write_text(text)
        with pytest.raises(UsageError, match="no trace that is known"):
            read_trace(path)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"TIMESTAMP,ContextTokens,GeneratedTokens\n" * 99)[:40])
    with pytest.raises(UsageError, match="no trace that is known"):
        read_trace(tmp_path / "cut.gz")


def test_blocks_of_the_same_hash_are_the_same_tokens():
    a, b = Row(0.0, 1200, 5, (1, 2, 3)), Row(0.0, 1536, 5, (1, 2, 4))
    x, y = spell(pieces_of(a, 0)), spell(pieces_of(b, 1))
    assert len(x) == 1200 and len(y) == 1536
    assert x[:1024] == y[:1024] and x[1024] != y[1024]


def history():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "search_x", "arguments": "{}"}}]}
    return [
        {"role": "system", "content": "s" * 400}, {"role": "user", "content": "u" * 40}, call,
        {"role": "tool", "content": "t" * 80}, {"role": "assistant", "content": "a" * 20},
        {"role": "user", "content": "v" * 8}, {"role": "assistant", "content": "b" * 12},
    ]  # fmt: skip


def test_a_history_is_a_program_of_turns_with_tools_between():
    (program,) = histories([{"traj": history()}], 100, 0)
    first, second, third = program.turns
    assert [turn.num_tokens for turn in program.turns] == [110, 20, 2]
    assert (first.tool, second.tool, third.tool) == ("search_x", "", "")
    assert first.pause == 0.0 and 0 < second.pause and second.length == 5 and third.length == 3
    as_text = histories([{"messages": json.dumps(history())}], 100, 0)
    assert as_text == [program]


@pytest.mark.parametrize("entry", [{"messages": "{"}, {"messages": [{"content": "x"}]}, {"traj": 3}, {"messages": [1]}])
def test_a_history_that_cannot_be_read_says_which(entry):
    with pytest.raises(UsageError, match="history 2 cannot be read"):
        histories([{"traj": history()}, entry], 100, 0)


def test_a_client_that_cannot_be_read_says_which():
    with pytest.raises(UsageError, match="client 'b'"):
        clients({"b": {"trace_csv": "43200,1.0,1.0,Gamma", "dataset": {}}}, 600.0, 0, 43200.0)


def test_a_program_that_comes_again_has_other_words_after_what_all_begin_with():
    found = programs([{"traj": history()}], Arrivals.parse("poisson:1"), 2, 0)
    one, two = (program.turns[0].pieces for program in found)
    assert one[0] == two[0] and one[1] != two[1] and one[1][1] == two[1][1]
    assert len({program.id for program in found}) == 2


def test_three_classes_are_as_many_of_each_and_the_same_at_every_rate():
    def mix(rate, seed=1):
        return three_classes(LAWS["sharegpt"], Arrivals("poisson", rate), 90, seed, Promise(2.0, 0.1), 20.0)

    slow, quick = mix(1.0), mix(3.0)
    assert [p.turns for p in slow] == [p.turns for p in quick] != [p.turns for p in mix(1.0, 2)]
    kinds = [p.group for p in slow]
    assert {kind: kinds.count(kind) for kind in kinds} == {"live": 30, "deadline": 30, "compound": 30}
    for program in slow:
        assert (program.promise is not None) == (program.group == "live")
        assert math.isfinite(program.deadline) == (program.group != "live")
        if program.group == "compound":
            assert 2 <= len(program.turns) <= 4 and program.deadline == 20.0 * len(program.turns)
            assert [turn.tool for turn in program.turns] == ["tool"] * (len(program.turns) - 1) + [""]


@needs_traces
def test_the_published_traces_are_read_whole():
    azure = read_trace(TRACES / "azure2023" / "AzureLLMInferenceTrace_conv.csv.gz")
    assert len(azure) == 19366 and abs(np.mean([row.prompt for row in azure]) - 1154.7) < 0.1
    assert all(row.at >= 0 for row in azure) and 3000 < max(row.at for row in azure) < 3600
    mooncake = read_trace(TRACES / "mooncake" / "conversation_trace.jsonl.gz")
    blocks = [block for row in mooncake for block in row.hashes]
    assert len(mooncake) == 12031 and len(blocks) == 288_500
    assert round(1 - len(set(blocks)) / len(blocks), 3) == 0.366
    arxiv = read_trace(TRACES / "vidur" / "arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv.gz")
    assert len(arxiv) == 28257
    tau = programs(
        read_trace(TRACES / "agents" / "taubench_gpt-4o-airline.json.gz"), Arrivals.parse("poisson:1"), None, 0
    )
    assert len(tau) == 200 and all(program.turns for program in tau)
    swe = histories(read_trace(TRACES / "agents" / "continuum_swe_agent_messages.json.gz"), 1024, 0)
    assert [len(program.turns) for program in swe] == [24, 21, 32, 24, 24]
    assert swe[0].turns[0].tool and swe[0].turns[0].pieces[0] == swe[1].turns[0].pieces[0]


@needs_traces
def test_clients_of_servegen_keep_their_rates():
    data = read_trace(TRACES / "servegen" / "language_m-large.json.gz")
    rows = clients(data, 1200.0, 1, 43200.0)
    expected = sum(
        600 * float(line.split(",")[1])
        for client in data.values()
        for line in client["trace_csv"].splitlines()
        if float(line.split(",")[0]) in (43200.0, 43800.0)
    )
    assert abs(len(rows) - expected) < 0.1 * expected
    assert rows == clients(data, 1200.0, 1, 43200.0) != clients(data, 1200.0, 2, 43200.0)
    assert all(0 <= row.at < 1200 and row.prompt > 0 and row.answer > 0 for row in rows)
