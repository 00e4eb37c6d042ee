"""`shoal bench`: the workloads' tokens, the floor, the clocks, and peers that sleep while others are measured."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.bench import command, limits, machine, peers, single, steps
from shoal.bench.floor import Costs, costs, floor
from shoal.bench.limits import Limits
from shoal.bench.options import WORKLOADS, BenchOptions
from shoal.bench.ours import Ours, WrongAnswers
from shoal.bench.watch import watched
from shoal.bench.workloads import Row, Workload, make, plan_requests
from shoal.core.config import EngineConfig
from shoal.core.errors import UsageError
from shoal.kernels.ref import RefKernels
from shoal.nn.arch import read_config
from shoal.text.checkpoint import EMBEDDED

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "bench"
LIMITS = Limits(2, "some", {"fp32": 478e9, "bf16": 956e9, "int8": 1912e9}, 45e9)
QWEN = Costs(
    linear=357_826_560, last=13_877_248, head=28_672_000, weight_bytes=773e6, position_bytes=512, query_key=3584,
    windows=(0,) * 24, linear_arithmetic="bf16", head_arithmetic="bf16", other_arithmetic="bf16",
)  # fmt: skip


def outside(name: str) -> ModuleType:
    path = SHARED / f"{name}.py"
    if not path.exists():
        pytest.skip("../shared/bench is not here")
    spec = importlib.util.spec_from_file_location(f"shared_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- workloads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.01])
def test_tokens_are_those_that_peers_are_given(name: str, scale: float) -> None:
    theirs = outside("workloads").make(name, 32000, "shuffled", scale)
    ours = make(name, 32000, scale)
    found = [{"id": row.name, "prompt": row.prompt.tolist(), "max_tokens": row.answer} for row in ours.rows]
    assert found == theirs["requests"]
    assert (ours.prompt_tokens, ours.answer_tokens) == (
        theirs["stats"]["prompt_tokens"], theirs["stats"]["output_tokens"],
    )  # fmt: skip


@pytest.mark.parametrize("name", WORKLOADS)
def test_requests_come_in_plan_order_with_their_future(name: str, tmp_path: Path) -> None:
    workload = make(name, 1000, 0.25)
    requests, bound = plan_requests(workload, tmp_path)
    assert [request.index for request in requests] == list(range(len(workload.rows)))
    assert sorted(request.id for request in requests) == sorted(row.name for row in workload.rows)
    groups = [request.id.split("r")[0] for request in requests]
    assert groups == sorted(groups, key=groups.index)  # those of a group follow each other
    distinct = {row.prompt[:n].tobytes() for row in workload.rows for n in range(1, len(row.prompt) + 1)}
    assert bound == len(distinct)
    assert any(request.future for request in requests) == (name in ("W1", "W4"))


def test_unknown_workloads_and_small_vocabularies_are_refused() -> None:
    with pytest.raises(UsageError, match="W9"):
        make("W9", 32000)
    with pytest.raises(UsageError, match="W9"):
        BenchOptions(what=("W9",))
    with pytest.raises(UsageError, match="too small"):
        make("W1", 300)


# -- the floor ---------------------------------------------------------------------------------------


def test_the_floor_is_that_of_the_study() -> None:
    """Less what the study did not know: of the last layer most prompt positions need keys and values alone."""
    study = [18.9, 17.3, 9.1, 13.8]
    whole = [floor(make(name, 32000), replace(QWEN, last=0), LIMITS) for name in WORKLOADS]
    assert [each.seconds for each in whole] == pytest.approx(study, abs=0.1)
    found = [floor(make(name, 32000), QWEN, LIMITS).seconds for name in WORKLOADS]
    for ours, theirs in zip(found, whole, strict=True):
        assert theirs.seconds - theirs.prefill / 24 < ours < theirs.seconds


def test_costs_count_what_a_checkpoint_holds() -> None:
    model = read_config(EMBEDDED)
    assert model.num_kv_heads and costs(model, "fp32").weight_bytes == 4 * (
        costs(model, "fp32").linear + costs(model, "fp32").head
    )
    assert costs(model, "bf16").weight_bytes == costs(model, "fp32").weight_bytes / 2
    assert costs(model, "int4").linear_arithmetic == "int8"
    head = costs(model, "int4").weight_bytes - costs(model, "int4+head").weight_bytes
    assert head == costs(model, "bf16").head  # of two bytes each one is left


rows_of_tokens = st.lists(
    st.tuples(st.lists(st.integers(300, 302), min_size=1, max_size=12), st.integers(1, 9)), min_size=1, max_size=8
)


def workload_of(rows: list[tuple[list[int], int]]) -> Workload:
    from array import array

    return Workload("W", 1.0, 400, tuple(Row(str(n), array("i", p), a) for n, (p, a) in enumerate(rows)))


@settings(max_examples=60, deadline=None)
@given(rows_of_tokens)
def test_the_floor_counts_distinct_positions_once(rows: list[tuple[list[int], int]]) -> None:
    """Where reading is all that costs, a step takes its weights, the distinct prompt positions of the rows still
    alive, and what each of these has produced."""
    reading = replace(LIMITS, peak=dict.fromkeys(LIMITS.peak, 1e30), bandwidth=1.0)
    small = replace(QWEN, weight_bytes=1000, position_bytes=1, windows=(0,))
    expected = 0
    for step in range(1, max(answer for _, answer in rows)):
        live = [prompt for prompt, answer in rows if answer > step]
        distinct = {tuple(prompt[:n]) for prompt in live for n in range(1, len(prompt) + 1)}
        expected += 1000 + len(distinct) + step * len(live)
    found = floor(workload_of(rows), small, reading)
    assert found.decode == pytest.approx(expected)
    assert found.prompt_tokens == len({tuple(p[:n]) for p, _ in rows for n in range(1, len(p) + 1)})


@settings(max_examples=30, deadline=None)
@given(rows_of_tokens, st.sampled_from([0, 3]))
def test_a_window_never_raises_the_floor(rows: list[tuple[list[int], int]], window: int) -> None:
    workload, seeing = workload_of(rows), replace(QWEN, windows=(window, 0))
    assert floor(workload, seeing, LIMITS).seconds <= floor(workload, replace(QWEN, windows=(0, 0)), LIMITS).seconds


# -- the machine -------------------------------------------------------------------------------------


def test_limits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BUFFER", 1 << 22)
    monkeypatch.setattr(limits, "_BURST", 1e-4)
    found = limits.measure(0.01)
    assert found.threads == torch.get_num_threads() and set(found.peak) == {"fp32", "bf16", "int8"}
    assert min(found.peak.values()) > 1e8 and found.bandwidth > 1e8
    assert found.rate("bf16") < found.peak["bf16"]


def test_every_instruction_set_has_its_limits() -> None:
    from shoal.kernels import _cpu

    for name in _cpu.names():
        table = _cpu.Table(name)
        for kind, products in ((_cpu.Kind.FP32, 16), (_cpu.Kind.BF16, 32), (_cpu.Kind.INT8, 64)):
            operations = table.peak(kind, 10)
            assert operations >= 10 * 2 * products and operations % (2 * products) == 0
        memory = torch.ones(1 << 16, dtype=torch.uint8)
        assert table.read(memory.data_ptr(), len(memory)) == len(memory)


def test_a_stopwatch_counts_this_process() -> None:
    stopwatch = machine.Stopwatch()
    total = sum(range(2_000_000))
    span = stopwatch.stop()
    assert total and 0 < span.wall and 0 <= span.cpu <= span.wall * 64 + 0.1
    assert span.others is None or span.others >= 0
    assert machine.peak_memory() is None or machine.peak_memory() > 1 << 20
    assert machine.describe()["processor"]


# -- where the time goes -----------------------------------------------------------------------------


def test_a_function_that_uses_another_is_counted_once_and_the_clocks_go_away() -> None:
    class Nested(RefKernels):
        def gated(self, x_TK: torch.Tensor, packed: object) -> torch.Tensor:
            return self.linear(x_TK, packed)

    kernels = Nested(torch.device("cpu"))
    packed, x = kernels.pack(torch.eye(8)), torch.ones(3, 8)
    with watched(kernels) as watch:
        kernels.linear(x, packed)
        kernels.gated(x, packed)
        kernels.pack(torch.eye(8))
    kernels.linear(x, packed)
    assert watch.calls == {"linear": 1, "gated": 1}
    parts = watch.parts(10.0)
    assert parts["linear"] == sum(watch.seconds.values()) and sum(parts.values()) == pytest.approx(10.0)
    assert not vars(kernels).keys() & {"linear", "gated"}


# -- single kernels and steps ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fp32", "bf16", "int8", "int4+head"])
def test_every_kernel_and_step_is_measured(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "measure", lambda: LIMITS)
    for name, value in {
        "ROWS": (1, 3, 300), "_SHAPES": (("qkv", 48, 32), ("gate up", 64, 32)), "WIDTH": 32, "VOCAB": 64,
        "_HEADS": ((4, 2, 16),), "_SEQUENCES": 4, "_SHARED": 64, "_OWN": 32, "_COLD": 1 << 14, "_TRY": 0.0,
    }.items():  # fmt: skip
        monkeypatch.setattr(single, name, value)
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    monkeypatch.setattr(steps, "QWEN", {**steps.QWEN, **small, "num_attention_heads": 4})
    monkeypatch.setattr(steps, "VOCAB", 64)
    monkeypatch.setattr(steps, "BATCHES", (1, 3))
    monkeypatch.setattr(steps, "_LARGE", (5, 300, 40))
    path = tmp_path / "kernels.json"
    assert command.run_bench(BenchOptions(what=("kernels",), weights=(mode,), threads=1, json=path)) == 0
    record = json.loads(path.read_text())
    assert [kernel["name"].split(",")[0] for kernel in record["kernels"]] == [
        *[f"{mode} linear qkv 48 x 32"] * 3, *[f"{mode} linear gate up 64 x 32"] * 3,
        "head 64 x 32", *["attention 4/2/16"] * 4, *["attention int8 4/2/16"] * (0 if mode == "fp32" else 4),
    ]  # fmt: skip
    assert all(kernel["seconds"] > 0 and kernel["share"] > 0 for kernel in record["kernels"])
    assert [(step["rows"], step["context"]) for step in record["steps"]] == [(1, 56), (3, 56), (5, 364)]
    for step in record["steps"]:
        assert sum(step["parts"].values()) == pytest.approx(1.0) and step["parts"]["attention"] > 0
    assert "decode step, 5 rows" in capsys.readouterr().out


# -- our own runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Iterator[tuple[Ours, list[Workload]]]:
    vocab_size = read_config(EMBEDDED).vocab_size
    workloads = [make("W3", vocab_size, 0.05), Workload("T", 1.0, vocab_size, make("W2", vocab_size, 0.03).rows)]
    workloads = [replace(each, rows=tuple(replace(row, answer=5) for row in each.rows)) for each in workloads]
    ours = Ours(EngineConfig(memory_bytes=64 << 20), workloads)
    yield ours, workloads
    ours.close()


def test_runs_remember_nothing_of_each_other(small: tuple[Ours, list[Workload]]) -> None:
    ours, workloads = small
    for workload in (*workloads, *workloads):
        run = ours.run(workload)
        assert run.prompt_computed == workload.prompt_tokens  # nothing is shared within these
        assert run.output_tokens == workload.answer_tokens
        assert run.span.wall > 0 and run.preemptions == 0


def test_a_watched_run_says_where_its_time_goes(small: tuple[Ours, list[Workload]]) -> None:
    ours, workloads = small
    run, watch = ours.watch(workloads[0])
    parts = watch.parts(run.span.wall)
    assert all(seconds > 0 for seconds in parts.values()) and sum(parts.values()) == pytest.approx(run.span.wall)


def test_a_row_of_another_length_is_an_error(small: tuple[Ours, list[Workload]]) -> None:
    ours, workloads = small
    requests = ours.plans["T"]
    ends = replace(requests[0].sampling, stop=frozenset(range(ours.built.facts.vocab_size)))
    with pytest.raises(WrongAnswers):
        ours._run([replace(requests[0], sampling=ends)])


def test_rows_beyond_the_context_are_refused() -> None:
    vocab_size = read_config(EMBEDDED).vocab_size
    too_long = make("W2", vocab_size, 0.02)
    rows = tuple(replace(row, answer=10**6) for row in too_long.rows)
    with pytest.raises(UsageError, match="context"):
        Ours(EngineConfig(memory_bytes=64 << 20), [replace(too_long, rows=rows)])


# -- peers -------------------------------------------------------------------------------------------

RUNNER = """
    import argparse, json, time
    parser = argparse.ArgumentParser()
    parser.add_argument("--w", nargs="+"); parser.add_argument("--runs", type=int)
    parser.add_argument("--model"); parser.add_argument("--threads"); parser.add_argument("--less", type=int, default=0)
    asked = parser.parse_args()
    print("LOADED 0.1", flush=True)
    for path in asked.w:
        work = json.load(open(path))
        count = sum(row["max_tokens"] for row in work["requests"]) - asked.less
        for run in range(asked.runs):
            print("  wall 0.50s own 1.00 cores, others 0.25 cores cpu 0.75s {} (waited 0s)", flush=True)
            print(work["name"], run, 0.5, count, flush=True)
            time.sleep(0.05)
        print("RESULT", json.dumps({"peer": "pretend", "version": "1", "load_s": 0.1, "peak_rss_gb": 2.0}), flush=True)
"""


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Workload]:
    (tmp_path / "run_ov.py").write_text(textwrap.dedent(RUNNER))
    monkeypatch.setenv("QUIET_WAIT", "0")
    monkeypatch.setenv("SHOAL_PEER_RUNNERS", str(tmp_path))
    monkeypatch.setenv("SHOAL_PEER_OPENVINO", sys.executable)
    monkeypatch.setenv("SHOAL_PEER_OPENVINO_MODEL", str(tmp_path))
    return [make("W3", 400, 0.05), make("W2", 400, 0.05)]


def state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_a_peer_sleeps_while_it_is_not_its_turn(pretend: list[Workload]) -> None:
    with peers.started(["openvino"], EMBEDDED, pretend, 2, 1) as (peer,):
        for _ in range(4):
            assert state(peer._process.pid) == "T"
            assert peer.run() == peers.PeerRun(0.5, 0.75, 0.25)
        about = peer.finish()
    assert about["peer"] == "pretend" and about["peak_rss_gb"] == 2.0 and len(about["results"]) == 2


def test_a_peer_with_other_lengths_is_refused_and_ended(pretend: list[Workload]) -> None:
    with (
        pytest.raises(peers.PeerFailed, match="tokens"),
        peers.started(["openvino:--less 1"], EMBEDDED, pretend, 2, 1) as (peer,),
    ):
        peer.run()
    assert peer._process.poll() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's rules for orphaned process groups")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_peer_outlives_us(pretend: list[Workload], number: signal.Signals) -> None:
    code = """
import sys, time
from pathlib import Path
from shoal.bench import peers
from shoal.bench.workloads import make
with peers.started(["openvino"], Path("."), [make("W3", 400, 0.05)], 2, 1) as (peer,):
    print(peer._process.pid, flush=True)
    time.sleep(60)
"""
    ours = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert ours.stdout is not None
    peer = int(ours.stdout.readline())
    assert state(peer) == "T"
    ours.send_signal(number)
    ours.wait()
    ours.stdout.close()
    end = time.monotonic() + 10
    while Path(f"/proc/{peer}").exists() and state(peer) != "Z":
        assert time.monotonic() < end, state(peer)
        time.sleep(0.01)


def test_a_peer_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_PEER_VLLM", raising=False)
    with pytest.raises(UsageError, match="SHOAL_PEER_VLLM"):
        peers.started(["vllm"], EMBEDDED, [], 1, 1).__enter__()
    with pytest.raises(UsageError, match="sglang"):
        BenchOptions(peers=("sglang",))


# -- the whole ---------------------------------------------------------------------------------------


def test_a_run_prints_and_writes_what_it_measured(
    pretend: list[Workload], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "measure", lambda: LIMITS)
    monkeypatch.setattr(command, "first_token_seconds", lambda *_: 1.0)
    path = tmp_path / "deep" / "bench.json"
    asked = {"what": ("W3",), "runs": 2, "threads": 1, "json": path, "memory": 64 << 20}
    options = BenchOptions(**asked, weights=("fp32", "int8"), peers=("openvino", "openvino:--threads 2"))
    monkeypatch.setattr(command, "make", lambda name, vocab, scale: pretend[0])
    assert command.run_bench(options) == 0
    record: dict[str, Any] = json.loads(path.read_text())
    found = record["workloads"]["W3"]
    assert found["over_floor"] == found["wall"] / found["floor"]["seconds"]
    assert sum(found["where"].values()) == pytest.approx(1.0)
    assert len(found["runs"]) == 2 and len(found["peers"]["openvino"]["runs"]) == 2
    assert [each["wall_over_ours"] for each in found["peers"].values()] == [0.5 / found["wall"]] * 2
    other = found["modes"]["int8"]
    assert found["modes"].keys() == {"int8"} and other["times_as_fast"] == found["wall"] / other["wall"]
    assert record["settings"]["weights"] == "fp32" and len(other["runs"]) == 2
    assert record["peers"]["openvino:--threads 2"]["peak_rss_gb"] == 2.0 and record["peak_memory"] > 0
    printed = capsys.readouterr().out
    assert "W3" in printed and "openvino: 0.50 s wall" in printed
