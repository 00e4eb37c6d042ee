"""The command: limits first, then every workload in turn, ours and the peers' by turns, then the table and the JSON.

It knows in which order things are measured; it must not know how. Numbers are written as they come, so that a run cut
short still leaves what it has measured.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from shoal.bench import floor as floors
from shoal.bench import machine, single, steps
from shoal.bench.floor import ARITHMETIC
from shoal.bench.limits import Limits, measure
from shoal.bench.options import KERNELS, WORKLOADS, BenchOptions
from shoal.bench.ours import Ours, Run, first_token_seconds
from shoal.bench.peers import Peer, PeerRun, started
from shoal.bench.watch import Watch
from shoal.bench.workloads import Workload, make
from shoal.core.config import EngineConfig
from shoal.core.errors import UsageError
from shoal.kernels import set_threads
from shoal.nn.arch import read_config
from shoal.text.checkpoint import resolve_model, weight_mode

Record = dict[str, Any]


def run_bench(options: BenchOptions) -> int:
    """Measure what is asked for; the exit code. Errors are ShoalErrors."""
    set_threads(options.cores)
    limits = measure()
    record: Record = {"machine": machine.describe(), "limits": asdict(limits), "workloads": {}}
    print(_limits_line(limits, record["machine"]), flush=True)
    if options.what == (KERNELS,):
        _kernels(options, limits, record)
        return 0
    machine.forget_peak()  # the buffer of the bandwidth is not the engine's
    _workloads(options, limits, record)
    return 0


def _kernels(options: BenchOptions, limits: Limits, record: Record) -> None:
    (mode,) = ("bf16",) if options.weights == ("auto",) else options.weights
    if mode not in ARITHMETIC:
        raise UsageError(f"weights is {mode!r}; it must be one of {', '.join(ARITHMETIC)}")
    record["settings"], record["kernels"], record["steps"] = {"weights": mode}, [], []
    for kernel in single.run(limits, mode):
        record["kernels"].append(asdict(kernel))
        print(kernel.line(), flush=True)
        _write(options.json, record)
    for step in steps.run(limits, mode):
        record["steps"].append(asdict(step))
        print(step.line(), flush=True)
        _write(options.json, record)


def _workloads(options: BenchOptions, limits: Limits, record: Record) -> None:
    config = _config(options)
    folder = resolve_model(config.model)
    model = read_config(folder)
    modes = [weight_mode(each, folder) for each in options.weights]
    if len(set(modes)) < len(modes):
        raise UsageError(f"weights {', '.join(options.weights)} are {', '.join(modes)}: name each mode once")
    workloads = [make(name, model.vocab_size, options.scale) for name in options.what or WORKLOADS]
    record["settings"] = {**config.to_mapping(), "weights": modes[0], "scale": options.scale, "runs": options.runs}
    seconds = [first_token_seconds(config, workloads[0].prompt_tokens) for _ in range(3)]
    record["start_to_first_token"] = seconds
    print(f"start to first token: {median(seconds):.2f} s", flush=True)
    with ExitStack() as stack:
        engines: dict[str, Ours] = {}
        for mode in modes:
            engines[mode] = Ours(replace(config, weights=mode), workloads)
            stack.callback(engines[mode].close)
        facts = engines[modes[0]].built.facts
        record["load_seconds"], record["kernels"] = facts.load_seconds, facts.kernels
        peers = stack.enter_context(started(options.peers, folder, workloads, options.runs, options.cores))
        print(_HEADER, flush=True)
        for workload in workloads:
            least = {mode: floors.floor(workload, floors.costs(model, mode), limits) for mode in modes}
            record["workloads"][workload.name] = found = _by_turns(workload, options.runs, least, engines, peers)
            record["peak_memory"] = machine.peak_memory()  # of all the modes together
            print(_lines(workload.name, found), flush=True)
            _write(options.json, record)
        record["peers"] = {peer.name: peer.finish() for peer in peers}
    print(f"peak memory {(record['peak_memory'] or 0) / 2**30:.2f} GiB", flush=True)
    after = measure()  # shows whether the machine has changed meanwhile
    record["limits_after"] = asdict(after)
    print("afterwards: " + _limits_line(after, machine.describe()), flush=True)
    _write(options.json, record)


def _by_turns(
    workload: Workload, rounds: int, least: dict[str, floors.Floor], engines: dict[str, Ours], peers: list[Peer]
) -> Record:
    """Each round one run of ours in every mode and one of every peer; then a watched one of ours in every mode.

    The record is the first mode's; the others and the peers are in it, each with how it compares."""
    runs: dict[str, list[Run]] = {mode: [] for mode in engines}
    theirs: dict[str, list[PeerRun]] = {peer.name: [] for peer in peers}
    for _ in range(rounds):
        if peers:
            machine.wait_quiet()  # as the peers' runners do
        for mode, ours in engines.items():
            runs[mode].append(ours.run(workload))
        for peer in peers:
            theirs[peer.name].append(peer.run())
    each_mode = [
        _ours_record(workload, least[mode], runs[mode], ours.watch(workload)) for mode, ours in engines.items()
    ]
    found = each_mode[0]
    found["modes"] = {
        mode: {**each, "times_as_fast": found["wall"] / each["wall"]}
        for mode, each in zip(engines, each_mode, strict=True)
        if each is not found
    }
    found["peers"] = {name: _peer_record(found, each) for name, each in theirs.items()}
    return found


def _config(options: BenchOptions) -> EngineConfig:
    given = {
        "model": options.model, "weights": options.weights[0], "threads": options.cores, "memory_bytes": options.memory,
        "step_tokens": options.step_tokens,
    }  # fmt: skip
    return EngineConfig.from_mapping({name: value for name, value in given.items() if value is not None})


def _ours_record(workload: Workload, least: floors.Floor, runs: list[Run], watched: tuple[Run, Watch]) -> Record:
    wall = median(run.span.wall for run in runs)
    seen, watch = watched
    parts = watch.parts(seen.span.wall)
    return {
        "rows": len(workload.rows),
        "prompt_tokens": workload.prompt_tokens,
        "output_tokens": workload.answer_tokens,
        "wall": wall,
        "cpu": median(run.span.cpu for run in runs),
        "tokens_in_per_second": workload.prompt_tokens / wall,
        "tokens_out_per_second": workload.answer_tokens / wall,
        "floor": {"seconds": least.seconds, **asdict(least)},
        "over_floor": wall / least.seconds,
        "where": {name: seconds / seen.span.wall for name, seconds in parts.items()},
        "watched": {"wall": seen.span.wall, "seconds": watch.seconds, "calls": watch.calls},
        "runs": [asdict(run) for run in runs],
    }


def _peer_record(ours: Record, runs: list[PeerRun]) -> Record:
    wall, cpus = median(run.wall for run in runs), [run.cpu for run in runs if run.cpu is not None]
    cpu = median(cpus) if cpus else None
    return {
        "wall": wall,
        "cpu": cpu,
        "wall_over_ours": wall / ours["wall"],
        "cpu_over_ours": cpu / ours["cpu"] if cpu is not None else None,
        "runs": [asdict(run) for run in runs],
    }


def _limits_line(limits: Limits, about: Record) -> str:
    peak = {name: rate / 1e9 for name, rate in limits.peak.items()}
    return (
        f"{about['processor']}, {limits.threads} threads, {limits.instruction_set}: register peak "
        f"{peak['bf16']:.0f} GF/s bf16, {peak['int8']:.0f} Gop/s int8, {peak['fp32']:.0f} GF/s fp32; "
        f"read {limits.bandwidth / 1e9:.1f} GB/s; load {about['load']:.1f}"
    )


_HEADER = "     wall s   cpu s  tok/s in     out  floor s  over  linear  head  attention  rest  python  others"


def _lines(name: str, found: Record) -> str:
    lines = [_line(name, found)]
    for mode, each in found["modes"].items():
        lines += [_line("  ", each), f"   {mode}: {each['times_as_fast']:.2f} x as fast"]
    for peer, theirs in found["peers"].items():
        cpu = f"{theirs['cpu']:.2f}" if theirs["cpu"] is not None else "?"
        over = f"{theirs['cpu_over_ours']:.2f}" if theirs["cpu_over_ours"] is not None else "?"
        lines.append(
            f"   {peer}: {theirs['wall']:.2f} s wall, {cpu} s cpu; "
            f"{theirs['wall_over_ours']:.2f} x our wall, {over} x our cpu"
        )
    return "\n".join(lines)


def _line(name: str, found: Record) -> str:
    where = {part: f"{100 * share:.1f}%" for part, share in found["where"].items()}
    others = [run["span"]["others"] for run in found["runs"] if run["span"]["others"] is not None]
    busy = f"{median(others):.2f}" if others else "?"
    return (
        f"{name} {found['wall']:9.2f} {found['cpu']:7.2f} {found['tokens_in_per_second']:9.0f} "
        f"{found['tokens_out_per_second']:7.0f} {found['floor']['seconds']:8.2f} {found['over_floor']:5.2f} "
        f"{where['linear']:>7} {where['head']:>5} {where['attention']:>10} {where['rest']:>5} {where['python']:>7} "
        f"{busy:>7}"
    )


def _write(path: Path | None, record: Record) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
