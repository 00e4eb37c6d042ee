"""An output line is a function of its input line: the same bytes whatever policy, memory, chunks, overlap and order.

Every two levels of any two of these factors meet in some run of the whole job, with greedy, seeded and penalised rows;
each run's lines are compared with those of a calm run. It knows jobs and engines; it must not know how lines are made.

    python -m benchmarks.prove_itself [--rows 160] [--seed 1] [--model DIR]
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.common import write_result
from shoal.build import build_engine
from shoal.client import InProcess
from shoal.core.config import EngineConfig
from shoal.core.sequence import Sequence
from shoal.jobs.options import JobOptions
from shoal.jobs.run import run_job
from shoal.sched.policy import Policy, View

BLOCK = 16  # tokens
TASKS = ("Is it good? Answer yes or no.", "Sort: 3 1 2", "Add 17 and 25.", "Copy: the quick brown fox", "Who is it?")
WISHES: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1.0, "n": 3},
    {"temperature": 0, "repetition_penalty": 1.3, "min_tokens": 12},
    {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.7, "frequency_penalty": 0.4, "seed": 11, "min_tokens": 9},
    {"temperature": 0.9, "top_k": 30, "min_p": 0.02, "logit_bias": {"260": 4.0, "300": -100}, "seed": 12},
    {"temperature": 0, "bad_words": ["the"], "ignore_eos": True},
    {"temperature": 1.2, "stop": ["e ", "!"], "seed": 13, "repetition_penalty": 0.95},
)


class Reverse(Policy):
    """Adversarial: later rows first, so that everybody is preempted by those who come after."""

    def rank(self, seq: Sequence, view: View) -> float:
        return float(-seq.number)


class Thief(Policy):
    """Adversarial: odd chunks, and whoever is last loses its memory, also to rows that only wait."""

    def chunk(self, seq: Sequence, room: int, view: View) -> int:
        return min(5 + seq.number % 3, seq.pending, room)

    def victim(self, seq: Sequence, others: Any, view: View) -> Sequence | None:
        return others[-1] if others else None


class Shortest(Policy):
    """The row that has produced least goes first."""

    def rank(self, seq: Sequence, view: View) -> float:
        return float(seq.produced)


@dataclass(frozen=True, slots=True)
class Setting:
    """How one run is done."""

    policy: str
    memory: float  # of what the largest row needs; 0: all that is useful
    tokens: int  # in a step
    overlap: bool
    reuse: bool
    file: str  # as written, shuffled, or in two halves


LEVELS: Mapping[str, list[Any]] = {
    "policy": [
        "auto",
        "shoal.sched.policy:Policy",
        *(f"benchmarks.prove_itself:{name}" for name in ("Shortest", "Reverse", "Thief")),
    ],
    "memory": [1.0, 3.0, 0.0],
    "tokens": [17, 256, 2048],
    "overlap": [True, False],
    "reuse": [True, False],
    "file": ["whole", "shuffled", "halves"],
}
CALM = Setting("shoal.sched.policy:Policy", 0.0, 2048, False, False, "whole")


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


def lines(rows: int, seed: int) -> list[str]:
    """Chats and completions behind common beginnings, some scored, some that cannot be run."""
    random, made = Random(seed), []
    for number in range(rows):
        body: dict[str, Any] = {"max_tokens": random.choice([8, 16, 40]), **WISHES[number % len(WISHES)]}
        text = f"{random.choice(TASKS)} ({random.randrange(1000)})"
        chat = number % 4 != 3
        if chat:
            system = f"You are clerk number {number % 3}. " + "Answer in few words. " * (number % 3)
            body["messages"] = [{"role": "system", "content": system}, {"role": "user", "content": text}]
            if number % 5 == 0:
                body |= {"logprobs": True, "top_logprobs": 2}
        else:
            body["prompt"] = "Once upon a time there was a little clerk. " + text
            if number % 16 == 3:
                body |= {"logprobs": 1, "echo": True}
        if number % 23 == 9:
            body["temperature"] = -1
        url = "/v1/chat/completions" if chat else "/v1/completions"
        made.append(json.dumps({"custom_id": f"r{number:05}", "method": "POST", "url": url, "body": body}))
    return made


def run(
    setting: Setting, made: list[str], folder: Path, model: str, longest: int, seed: int = 0
) -> tuple[dict[str, Any], dict[str, int]]:
    """Lines by custom_id, and what the scheduler counted."""
    folder.mkdir()
    todo = list(made)
    if setting.file != "whole":
        Random(4).shuffle(todo)
    half = len(todo) // 2
    parts = [todo] if setting.file != "halves" else [todo[:half], todo[half:]]
    found: dict[str, Any] = {}
    counted: dict[str, int] = {}
    for number, part in enumerate(parts):
        source, out = folder / f"i{number}.jsonl", folder / f"o{number}.jsonl"
        source.write_text("".join(line + "\n" for line in part))
        config = EngineConfig(
            model=model, block_size=BLOCK, step_tokens=setting.tokens, overlap=setting.overlap, reuse=setting.reuse,
            policy=setting.policy,
        )  # fmt: skip
        if setting.memory:
            config = replace(config, memory_bytes=int(longest * setting.memory))
        built = build_engine(config, useful_tokens=200_000)
        run_job(JobOptions(source, out, model=model, seed=seed, quiet=True), InProcess(built.engine))
        built.close()
        counters = built.engine.scheduler.counters
        for name in ("steps", "preemptions", "cached"):
            counted[name] = counted.get(name, 0) + getattr(counters, name)
        found |= collect(out)
    return found, counted


def collect(out: Path) -> dict[str, Any]:
    """Answered lines as bytes and failed ones as objects, by custom_id. Where a failed line stood is left out."""
    found: dict[str, Any] = {}
    for line in out.read_bytes().splitlines():
        found[json.loads(line)["custom_id"]] = line
    errors = out.with_name(out.stem + ".errors.jsonl")
    for line in errors.read_bytes().splitlines() if errors.exists() else ():
        record = json.loads(line)
        del record["x_shoal"]["line"]
        found[record["custom_id"]] = record
    return found


def row_bytes(model: str, tokens: int) -> int:
    """KV memory of a row of so many tokens, a block to spare."""
    built = build_engine(EngineConfig(model=model, block_size=BLOCK), useful_tokens=1)
    built.close()
    return built.facts.memory.block * (-(-tokens // BLOCK) + 1)


def prove(rows: int, seed: int, model: str, settings: list[Setting]) -> dict[str, Any]:
    """Run every setting and say which lines differ from the calm run's."""
    made, longest = lines(rows, seed), row_bytes(model, 160)
    runs = []
    with tempfile.TemporaryDirectory() as place:
        expected, _ = run(CALM, made, Path(place) / "calm", model, longest)
        control, _ = run(CALM, made, Path(place) / "control", model, longest, seed=1)
        for number, setting in enumerate(settings):
            began = time.monotonic()
            got, counted = run(setting, made, Path(place) / str(number), model, longest)
            wrong = sorted(id for id in expected.keys() | got.keys() if expected.get(id) != got.get(id))
            runs.append({**asdict(setting), **counted, "different": wrong, "seconds": time.monotonic() - began})
            print(
                f"{number + 1}/{len(settings)} {setting}: {len(wrong)} of {len(expected)} lines differ; {counted}",
                flush=True,
            )
    other = sum(expected[id] != control[id] for id in expected)
    print(f"control: with another --seed {other} lines differ")
    failed = sum(isinstance(line, dict) for line in expected.values())
    return {
        "rows": rows, "lines": len(expected), "failed": failed, "control_different": other, "runs": runs,
        "shown": len(expected) == rows and other > 0 and not any(each["different"] for each in runs)
        and any(each["preemptions"] for each in runs) and any(each["cached"] for each in runs),
    }  # fmt: skip


def main() -> int:
    """Prove at the size asked for; exit code 1 when a line differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="")
    wanted = parser.parse_args()
    data = prove(wanted.rows, wanted.seed, wanted.model, pairwise())
    different = sum(len(each["different"]) for each in data["runs"])
    print(f"{len(data['runs'])} runs of {data['rows']} rows, {data['failed']} of them bad: {different} lines differ")
    write_result("itself", data, wanted.seed)
    return 0 if data["shown"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
