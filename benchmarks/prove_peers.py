"""Faster than the peers, by turns in one run, on W1 to W4 at full size with the random 387M-parameter model.

It knows what has to hold; it must not know how anything is measured (`shoal bench` does). A peer is another engine in
an environment of its own, named by SHOAL_PEER_VLLM and the like; without one there is nothing to compare. vLLM runs
twice: with its defaults, and with the best of the settings that were tried (docs/log.md lists them).

    SHOAL_PEER_VLLM=/path/to/python python -m benchmarks.prove_peers [W1 W2 ...] [--runs 5] [--peer vllm]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import write_result
from benchmarks.prove_planning import model
from shoal.bench.command import run_bench
from shoal.bench.options import WORKLOADS, BenchOptions

PROVES = ("shoal/kernels", "shoal/nn", "shoal/runtime", "shoal/sched", "shoal/kv", "shoal/bench", "CMakeLists.txt")
TUNED = "vllm:--inproc --mnbt 2048 --block 128"  # the best of five settings by its sum of walls
WALL = {  # times our wall that a peer takes at the least
    "vllm": {"W1": 1.25, "W2": 1.25, "W3": 1.25, "W4": 1.2},
    TUNED: dict.fromkeys(WORKLOADS, 1.12),
    "openvino": {"W1": 2.0, "W2": 1.25, "W3": 1.25, "W4": 2.0},  # as it comes, which shares no prefix of its own
}
CPU = {"vllm": 1.4}  # times our CPU seconds, of all its processes
OVER_FLOOR = 1.15
INT8 = {"W2": 1.6, "W3": 1.6}  # times as fast as bf16
INT8_AGAINST_PEER = {"W1": 2.0, "W2": 2.0, "W3": 2.0}
FIRST_TOKEN = 3.0  # seconds from nothing


def judged(record: dict[str, Any]) -> dict[str, bool]:
    """What holds and what does not."""
    holds = {"start to first token under 3 s": median(record["start_to_first_token"]) < FIRST_TOKEN}
    for name, found in record["workloads"].items():
        holds[f"at most {OVER_FLOOR} x the floor on {name}"] = found["over_floor"] <= OVER_FLOOR
        int8 = found["modes"].get("int8")
        if int8 and name in INT8:
            holds[f"int8 {INT8[name]} x as fast as bf16 on {name}"] = int8["times_as_fast"] >= INT8[name]
        for peer, theirs in found["peers"].items():
            holds.update(_against(peer, name, theirs, int8))
    for peer, about in record["peers"].items():
        holds[f"less memory than {peer}"] = record["peak_memory"] < about["peak_rss_gb"] * 2**30
    return holds


def _against(peer: str, name: str, theirs: dict[str, Any], int8: dict[str, Any] | None) -> Iterator[tuple[str, bool]]:
    least = WALL.get(peer, {}).get(name, 1.0)
    yield f"{peer} takes {least} x our wall on {name}", theirs["wall_over_ours"] >= least
    if peer in CPU and theirs["cpu_over_ours"] is not None:
        yield f"{peer} takes {CPU[peer]} x our CPU seconds on {name}", theirs["cpu_over_ours"] >= CPU[peer]
    if peer == "vllm" and int8 and name in INT8_AGAINST_PEER:
        least = INT8_AGAINST_PEER[name]
        yield f"{peer} takes {least} x our int8's wall on {name}", theirs["wall"] / int8["wall"] >= least


def without_places(value: Any) -> Any:
    """The record with the names of files where it has their paths: those are this machine's."""
    if isinstance(value, dict):
        return {key: without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    if isinstance(value, str):
        return ":".join(part.rsplit("/", 1)[-1] for part in value.split(":"))
    return value


def main() -> int:
    """Print what holds; 1 when something does not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="*", default=WORKLOADS)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer", default=f"vllm,{TUNED}")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--scale", type=float, default=1.0)
    asked = parser.parse_args()
    peers = tuple(asked.peer.split(","))
    missing = {f"SHOAL_PEER_{peer.partition(':')[0].upper()}" for peer in peers} - set(os.environ)
    if missing:
        print(f"{', '.join(sorted(missing))} is not set: no other engine to compare with")
        return 0
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "bench.json"
        run_bench(
            BenchOptions(
                what=tuple(asked.what), model=str(model()), weights=("bf16", "int8"), scale=asked.scale,
                threads=asked.threads, runs=asked.runs, peers=peers, json=path,
            )
        )  # fmt: skip
        record = without_places(json.loads(path.read_text()))
    holds = judged(record)
    for name, held in holds.items():
        print(f"{name}: {'holds' if held else 'DOES NOT HOLD'}")
    named = [] if "vllm" in peers else [peers[0].partition(":")[0]]
    named += [] if asked.threads is None else [f"{asked.threads}_threads"]
    write_result("_".join(["peers", *named]), {**record, "holds": holds, "shown": all(holds.values())})
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
