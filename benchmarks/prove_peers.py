"""Faster than the peers, by turns in one run, on W1 to W4 at full size with the random 387M-parameter model.

It knows what has to hold; it must not know how anything is measured (`shoal bench` does). A peer is another engine in
an environment of its own, named by SHOAL_PEER_VLLM and the like; without one there is nothing to compare.

    SHOAL_PEER_VLLM=/path/to/python python -m benchmarks.prove_peers [--runs 5] [--peer vllm]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import write_result
from benchmarks.prove_planning import model
from shoal.bench.command import run_bench
from shoal.bench.options import BenchOptions

PROVES = ("shoal/kernels", "shoal/nn", "shoal/runtime", "shoal/sched", "shoal/kv", "shoal/bench", "CMakeLists.txt")
WALL = {"vllm": {"W1": 1.25, "W2": 1.25, "W3": 1.25, "W4": 1.2}}  # times our wall that a peer takes at the least
CPU = {"vllm": 1.4}  # times our CPU seconds, of all its processes


def judged(record: dict[str, Any], peer: str) -> dict[str, bool]:
    """What holds against one peer."""
    holds = {}
    for name, found in record["workloads"].items():
        theirs = found["peers"][peer]
        least = WALL.get(peer, {}).get(name, 1.0)
        holds[f"{peer} takes {least} x our wall on {name}"] = theirs["wall_over_ours"] >= least
        if theirs["cpu_over_ours"] is not None and peer in CPU:
            holds[f"{peer} takes {CPU[peer]} x our CPU seconds on {name}"] = theirs["cpu_over_ours"] >= CPU[peer]
    return holds


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
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer", default="vllm")
    asked = parser.parse_args()
    if f"SHOAL_PEER_{asked.peer.upper()}" not in os.environ:
        print(f"SHOAL_PEER_{asked.peer.upper()} is not set: no other engine to compare with")
        return 0
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "bench.json"
        run_bench(BenchOptions(model=str(model()), runs=asked.runs, peers=(asked.peer,), json=path))
        record = without_places(json.loads(path.read_text()))
    holds = judged(record, asked.peer)
    for name, held in holds.items():
        print(f"{name}: {'holds' if held else 'DOES NOT HOLD'}")
    write_result(
        "peers" if asked.peer == "vllm" else f"peer_{asked.peer}",
        {**record, "holds": holds, "shown": all(holds.values())},
    )
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
