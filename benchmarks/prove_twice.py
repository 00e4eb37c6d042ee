"""Proof: nothing is computed twice. Equal rows run once, a cache spares what an earlier job computed, no byte tells.

Whole jobs through the engine process with the embedded model. It must not know how answers are kept or shared.
Claims: a file whose rows occur several times costs what one of each costs; after an edit of one row in a hundred a file
costs about one hundredth, in tokens; the bytes are those of a job in which every row was computed; rows computed again
are the same to the byte. Seconds are told beside it, for a model that costs almost nothing.

Usage: python -m benchmarks.prove_twice [--rows 6000] [--times 4]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import shoal
from benchmarks.common import write_result
from shoal.jobs.report import Report

PROVES = ("shoal",)

SEED = 7
EDITED = 100  # one row in so many
MOST = 1.25  # "about": the edited rows are drawn, and the longest answers may be among them
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "stop": ["\n"], "logprobs": True, "top_logprobs": 2},
    {"temperature": 0.9, "seed": 11, "n": 2},
    {"temperature": 0.9},
)


def bodies(count: int) -> list[dict[str, Any]]:
    """Different questions in every way of sampling, behind a few shared prefixes."""
    luck = Random(SEED)
    found = []
    for number in range(count):
        messages = [
            {"role": "system", "content": f"You are clerk number {number % 5}. Answer in few words, and be polite."},
            {"role": "user", "content": f"Add {number} and {luck.randrange(1000)}."},
        ]
        found.append({"messages": messages, "max_tokens": luck.choice([8, 16, 24]), **luck.choice(KINDS)})
    return found


def write_rows(path: Path, asked: list[dict[str, Any]]) -> Path:
    with path.open("w") as file:
        for number, body in enumerate(asked):
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def answer(folder: Path, name: str, source: Path, **options: Any) -> tuple[bytes, Report, dict[str, Any]]:
    """One job; its bytes, its report, and what it cost."""
    began = time.monotonic()
    report = shoal.run(source, folder / f"{name}.out.jsonl", **options)
    seconds = time.monotonic() - began
    assert report.status == 0, report
    cost = {
        "rows": report.rows.total, "seconds": round(seconds, 2), "prompt_computed": report.tokens.prompt_computed,
        "prompt_bound": report.tokens.prompt_bound,
        "output_computed": report.tokens.output - report.reused.output_tokens, "duplicates": report.reused.duplicates,
        "cached": report.reused.cached, "verified": report.verified.rows, "differ": report.verified.differ,
    }  # fmt: skip
    print(f"{name:11}", "  ".join(f"{key} {value}" for key, value in cost.items()), flush=True)
    return (folder / f"{name}.out.jsonl").read_bytes(), report, cost


def run(folder: Path, rows: int, times: int) -> tuple[dict[str, Any], dict[str, bool]]:
    """All jobs; what each cost, and which claims hold."""
    asked, luck = bodies(rows), Random(SEED + 1)
    cache = folder / "cache"
    source = write_rows(folder / "in.jsonl", asked)
    cold_bytes, _, cold = answer(folder, "cold", source, cache=cache)
    warm_bytes, _, warm = answer(folder, "warm", source, cache=cache)
    edited = set(luck.sample(range(rows), rows // EDITED))
    changed = [body | {"max_tokens": body["max_tokens"] + 1} if i in edited else body for i, body in enumerate(asked)]
    source = write_rows(folder / "edited.jsonl", changed)
    edit_bytes, _, edit = answer(folder, "edited", source, cache=cache, verify=0.01)
    alone = write_rows(folder / "alone.jsonl", [changed[i] for i in sorted(edited)])
    _, _, least = answer(folder, "edited rows", alone)
    with mock.patch("shoal.jobs.keys.RequestKeys.of", lambda *_: []):
        plain_bytes, _, plain = answer(folder, "all edited", source)
    repeated = [asked[i % (rows // times)] for i in range(rows // times * times)]
    luck.shuffle(repeated)
    source = write_rows(folder / "repeated.jsonl", repeated)
    with mock.patch("shoal.jobs.keys.RequestKeys.of", lambda *_: []):
        every_bytes, _, every = answer(folder, "every", source)
    once_bytes, _, once = answer(folder, "once", source, verify=0.01)
    keyed = [body for body in repeated if "seed" in body or not body["temperature"]]
    distinct = len({json.dumps(body, sort_keys=True) for body in keyed}) + len(repeated) - len(keyed)
    output = {name: one["prompt_computed"] + one["output_computed"] for name, one in (("cold", cold), ("edit", edit))}
    claims = {
        "the_same_file_costs_nothing": warm["prompt_computed"] == warm["output_computed"] == 0,
        "an_edit_of_1_percent_costs_about_1_percent": output["edit"] <= MOST * output["cold"] / EDITED,
        "an_edit_costs_the_bound_of_the_edited_rows": edit["prompt_computed"] == least["prompt_bound"],
        "equal_rows_run_once": once["rows"] - once["duplicates"] == distinct,
        "equal_rows_cost_their_bound": once["prompt_computed"] == once["prompt_bound"],
        "the_bytes_are_those_of_computing_all": (cold_bytes, edit_bytes, once_bytes)
        == (warm_bytes, plain_bytes, every_bytes),
        "rows_computed_again_are_the_same": min(edit["verified"], once["verified"]) > 0
        and not edit["differ"] + once["differ"],
    }
    jobs = {"cold": cold, "warm": warm, "edited": edit, "edited_rows_alone": least, "edited_all_computed": plain}
    shares = {"tokens_after_an_edit_to_cold": output["edit"] / output["cold"], "kept_bytes": size(cache)}
    return {"jobs": {**jobs, "repeated_every": every, "repeated_once": once}, **shares}, claims


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--times", type=int, default=4, help="how often each row of the second file occurs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        data, claims = run(Path(name), options.rows, options.times)
    for claim, holds in claims.items():
        print(f"{claim}: {'holds' if holds else 'DOES NOT HOLD'}")
    if options.rows >= 6000:
        write_result("twice", {**data, "claims": claims}, SEED)
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
