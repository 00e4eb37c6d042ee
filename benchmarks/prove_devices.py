"""Proof: two engines of one thread each, on cores of their own, leave the bytes of one engine, compute at most the
shared path more, and are done sooner than one of them.

Whole jobs as a user runs them: a quarter of W1 with the 387M-parameter random model of ../shared/bench, and the first
rows of BBH with the embedded model; each with one engine of one thread, with two such, and with one of two threads.
The last stands beside it: both cores with one memory. It must not know how a plan is dealt.

Usage: python -m benchmarks.prove_devices [--rows 1500] [--only W1|BBH]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import shoal
from benchmarks import workloads
from benchmarks.common import write_result
from benchmarks.prove_planning import model
from shoal.bench.workloads import make

SEED = 101  # of W1
ROWS = 1500
SCALE = 0.25
SOONER = 0.75  # of the time that one of the engines takes alone
HOW: dict[str, dict[str, Any]] = {
    "one": {"device": "cpu", "threads": 1},
    "two": {"device": "0,1", "threads": 1},
    "wide": {"device": "cpu", "threads": 2},
}


def w1(path: Path) -> str:
    """A quarter of W1; its model."""
    folder = model()
    vocabulary = int(json.loads((folder / "config.json").read_text())["vocab_size"])
    with path.open("w", encoding="utf-8") as file:
        for row in make("W1", vocabulary, SCALE).rows:
            write(file, row.name, row.prompt.tolist(), row.answer)
    return str(folder)


def bbh(path: Path, rows: int) -> str:
    """The first rows of BBH, six tasks at 1,500; the embedded model."""
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(workloads.bbh()[:rows]):
            write(file, f"bbh{number}", text, 16)
    return ""


def write(file: Any, name: str, prompt: str | list[int], answer: int) -> None:
    body = {"model": "any", "prompt": prompt, "max_tokens": answer, "ignore_eos": True, "temperature": 0}
    file.write(json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}) + "\n")


def answer(source: Path, name: str, checkpoint: str) -> tuple[bytes, dict[str, Any]]:
    """One job: its bytes and what it cost."""
    output = source.with_name(f"{name}.out.jsonl")
    report = shoal.run(source, output, model=checkpoint, **HOW[name])
    assert report.status == 0 and not report.problems(), report
    tokens, seconds = report.tokens, report.seconds
    cost = {
        "seconds": round(seconds.wall, 2),
        "at_work": round(seconds.wall - seconds.load - seconds.plan, 2),
        "prompt_bound": tokens.prompt_bound,
        "prompt_computed": tokens.prompt_computed,
        "apart": report.again.apart,
        "other": report.again.other,
        "preempted": report.again.preempted,
        "engines": [
            {"rows": one.rows, "prompt": one.prompt_computed, "output": one.output, "busy": round(one.seconds, 2)}
            for one in report.engines
        ],
    }
    print(f"{source.stem:4} {name:5}", "  ".join(f"{key} {value}" for key, value in cost.items()), flush=True)
    return output.read_bytes(), cost


def compare(source: Path, checkpoint: str) -> tuple[dict[str, Any], dict[str, bool]]:
    """One file in the three ways."""
    found = {name: answer(source, name, checkpoint) for name in HOW}
    costs = {name: cost for name, (_, cost) in found.items()}
    two = costs["two"]
    ratios = {
        name: round(two["at_work"] / costs[name]["at_work"], 3) for name in ("one", "wide") if costs[name]["at_work"]
    }
    print(
        f"{source.stem:4} two engines take {ratios['one']} of one's time, {ratios['wide']} of a wide one's", flush=True
    )
    claims = {
        "the_bytes_are_the_same": len({text for text, _ in found.values()}) == 1,
        "one_engine_meets_the_bound": all(
            costs[name]["prompt_computed"] == costs[name]["prompt_bound"] for name in ("one", "wide")
        ),
        "two_compute_at_most_the_shared_path_more": two["prompt_computed"] <= two["prompt_bound"] + two["apart"]
        and two["apart"] <= longest_shared(source),
        "two_are_sooner_than_one": ratios["one"] <= SOONER,
    }
    return {"jobs": costs, "two_to_one": ratios["one"], "two_to_wide": ratios["wide"]}, claims


def longest_shared(source: Path) -> int:
    """What two rows may share: tokens where prompts are tokens, else characters, of which a token has one at least."""
    prompts = [json.loads(line)["body"]["prompt"] for line in source.read_text().splitlines()]
    ordered = sorted(prompts)
    most = 0
    for one, other in zip(ordered, ordered[1:], strict=False):
        same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        most = max(most, same)
    return most


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--only", choices=("W1", "BBH"))
    options = parser.parse_args()
    results, claims = {}, {}
    with tempfile.TemporaryDirectory() as name:
        for file in ("W1", "BBH"):
            if options.only in (None, file):
                folder = Path(name) / file
                folder.mkdir()
                source = folder / f"{file}.jsonl"
                checkpoint = w1(source) if file == "W1" else bbh(source, options.rows)
                results[file], found = compare(source, checkpoint)
                claims |= {f"{file}_{claim}": holds for claim, holds in found.items()}
    for claim, holds in claims.items():
        print(f"{claim}: {'holds' if holds else 'DOES NOT HOLD'}")
    if options.only is None and options.rows >= ROWS:
        write_result("devices", {**results, "claims": claims, "shown": all(claims.values())}, SEED)
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
