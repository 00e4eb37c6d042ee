"""Proof: explain tells a job before it runs: its prompt tokens exactly, its time within 15 %; 100,000 rows in seconds.

Whole jobs through the engine process, and `shoal explain` as a command. It must not know how a time is predicted.
Every answer has the length that its row asks for, so that the time is a point and not a range; a job and its prediction
follow each other, several times, and the middle of the ratios counts.

Usage: python -m benchmarks.prove_explain [--model FOLDER] [--turns 3] [--rows 100000]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import shoal
from benchmarks.common import write_result

PROVES = ("shoal",)

SEED = 5
WITHIN, SECONDS, BYTES = 0.15, 30.0, 10**9
WORDS = "river lake fish school of the small water under green stone light boat harbour wind north sees many".split()
SHAPES = {  # groups of rows that share a beginning, rows of each, words shared, words of their own, answers' tokens
    "embedded": {"shared": (20, 100, 300, 60, (32, 128)), "long answers": (1, 2000, 100, 20, (200, 200))},
    "given": {"shared": (4, 24, 200, 40, (16, 64)), "one prefix": (1, 128, 100, 10, (48, 48))},
}


def write_rows(path: Path, shape: tuple[int, int, int, int, tuple[int, int]]) -> Path:
    """Rows in no order."""
    groups, each, shared, own, answers = shape
    luck, found = Random(SEED), []
    for _ in range(groups):
        first = " ".join(luck.choices(WORDS, k=shared))
        for _ in range(each):
            prompt = f"{first} {' '.join(luck.choices(WORDS, k=own))}"
            found.append({"prompt": prompt, "max_tokens": luck.randint(*answers), "ignore_eos": True, "temperature": 0})
    luck.shuffle(found)
    with path.open("w") as file:
        for number, body in enumerate(found):
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def explain(source: Path, model: str, *flags: str) -> dict[str, Any]:
    """What the command says."""
    command = [sys.executable, "-m", "shoal", "explain", str(source), "--json", *flags]
    done = subprocess.run(
        [*command, *(["--model", model] if model else [])], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def compare(folder: Path, name: str, source: Path, model: str, turns: int) -> dict[str, Any]:
    """Predicted and actual, several times; the machine is measured anew each time."""
    seconds, exact = [], True
    for turn in range(turns):
        said = explain(source, model, "--calibrate")
        began = time.monotonic()
        report = shoal.run(source, folder / f"{turn}.out.jsonl", model=model, restart=True)
        actual = time.monotonic() - began
        predicted = (said["time"]["low"] + said["time"]["high"]) / 2
        seconds.append((predicted, actual))
        exact &= said["bound"] == report.tokens.prompt_computed and said["prompt_tokens"] == report.tokens.prompt
        print(f"{name:24} predicted {predicted:6.2f} s, actual {actual:6.2f} s: {predicted / actual:.3f}", flush=True)
    ratio = median(predicted / actual for predicted, actual in seconds)
    return {"seconds": seconds, "ratio": ratio, "prompt_tokens_exact": exact}


def large(folder: Path, rows: int) -> dict[str, float]:
    """Seconds and bytes to explain a large file, with the machine's measurement at hand."""
    source = write_rows(folder / "large.jsonl", (rows // 500, 500, 60, 40, (32, 256)))
    explain(source, "")
    began = time.monotonic()
    explain(source, "")
    seconds = time.monotonic() - began
    return {"rows": rows, "seconds": seconds, "bytes": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}


def main() -> int:
    """Run it all; 1 when a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="build/bench-models/qwen05b", help="a real model, left out where it is not")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=100_000)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = name
        found = large(folder, wanted.rows)  # first: nothing larger has run yet
        print(found, flush=True)
        jobs = {}
        for kind, model in (("embedded", ""), ("given", wanted.model)):
            for shape, sizes in SHAPES[kind].items() if not model or Path(model).is_dir() else ():
                source = write_rows(folder / "in.jsonl", sizes)
                jobs[f"{kind}, {shape}"] = compare(folder, f"{kind}, {shape}", source, model, wanted.turns)
    claims = {
        "prompt_tokens_are_exact": all(job["prompt_tokens_exact"] for job in jobs.values()),
        "time_is_within_15_percent": all(abs(job["ratio"] - 1) <= WITHIN for job in jobs.values()),
        "a_large_file_takes_seconds": found["seconds"] < SECONDS and found["bytes"] < BYTES,
    }
    for claim, holds in claims.items():
        print(f"{claim}: {'holds' if holds else 'DOES NOT HOLD'}")
    if wanted.turns >= 3 and wanted.rows >= 100_000:
        write_result("explain", {"large": found, "jobs": jobs, "claims": claims}, SEED)
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
