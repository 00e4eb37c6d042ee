"""An output line is a function of its input line: the same bytes whatever policy, memory, chunks, overlap and order.

Every two levels of any two factors meet in some run of the whole job with the embedded model; each run's lines are
compared with those of a calm run. It knows jobs and engines; it must not know how lines are made.

    python -m benchmarks.prove_itself [--sets 3] [--seed 1] [--model DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.common import write_result
from benchmarks.pairwise import covering, unmet
from shoal.build import build_engine
from shoal.client import InProcess, News
from shoal.core.config import EngineConfig
from shoal.core.sequence import Sequence as Row
from shoal.core.types import Request
from shoal.engine import Engine
from shoal.host import settle_interpreter
from shoal.jobs.ending import SOME_FAILED
from shoal.jobs.options import JobOptions
from shoal.jobs.run import run_job
from shoal.kernels import set_threads
from shoal.kv.tree import Node
from shoal.sched.policy import Budget, Policy, Reach, View

# -- policies: two that are merely other, three adversaries -------------------------------------------


class Shortest(Policy):
    """The row that has produced least goes first."""

    def rank(self, seq: Row, view: View) -> float:
        return float(seq.produced)


class Reverse(Policy):
    """Adversarial: later rows first, so that everybody is preempted by those who come after."""

    def rank(self, seq: Row, view: View) -> float:
        return float(-seq.number)


class Thief(Policy):
    """Adversarial: odd chunks, and whoever is last loses its memory, also to rows that only wait."""

    def chunk(self, seq: Row, room: int, view: View) -> int:
        return min(5 + seq.number % 3, seq.pending, room)

    def victim(self, seq: Row, others: Sequence[Row], view: View) -> Row | None:
        return others[-1] if others else None


class Chaos(Policy):
    """Adversarial: rolls dice for every answer."""

    def __init__(self, limit: Budget | None = None) -> None:
        super().__init__(limit)
        self.dice = Random(5)

    def budget(self, view: View) -> Budget:
        return Budget(self.dice.randrange(0, self.limit.tokens + 1), self.dice.randrange(0, 20))

    def admit(self, seq: Row, reach: Reach, view: View) -> float:
        return self.dice.choice([-math.inf, -math.inf, view.now + 0.001, math.inf])

    def rank(self, seq: Row, view: View) -> float:
        return self.dice.random()

    def chunk(self, seq: Row, room: int, view: View) -> int:
        return self.dice.choice([seq.pending, self.dice.randrange(-2, 2 * room + 1)])

    def victim(self, seq: Row, others: Sequence[Row], view: View) -> Row | None:
        return self.dice.choice([None, seq, *others])

    def worth(self, node: Node) -> float:
        return self.dice.random()


# -- factors ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """How one run is done."""

    policy: str
    memory: float  # of what the largest row needs; 0: all that is useful
    tokens: int  # in a step
    file: str  # as written, shuffled, or in two halves
    overlap: bool
    reuse: bool
    threads: int
    block: int  # tokens
    weights: str  # and behind a + how keys and values are kept; lines are compared among runs of the same


FACTORS: Mapping[str, Sequence[Any]] = {
    "policy": (
        "auto",
        "shoal.sched.policy:Policy",
        *(f"benchmarks.prove_itself:{name}" for name in ("Shortest", "Reverse", "Thief", "Chaos")),
    ),
    "memory": (1.0, 3.0, 0.0),
    "tokens": (32, 100, 2048),
    "file": ("whole", "shuffled", "halves"),
    "overlap": (True, False),
    "reuse": (True, False),
    "threads": (1, 2),
    "block": (16, 32),
    "weights": ("bf16", "fp32", "int8", "int4", "int4-a16", "int4+head", "bf16/int8"),
}
"""What must not change a line, the weights apart."""

WISHES: Mapping[str, Sequence[Any]] = {
    "prompt": ("chat", "long chat", "text", "tokens", "texts"),
    "sampling": (
        {"temperature": 0},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 12},
    ),
    "penalty": (
        {},
        {"presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.9, "frequency_penalty": -0.3},
    ),
    "length": (
        {"max_tokens": 12},
        {"max_tokens": 40, "ignore_eos": True},
        {"max_tokens": 25, "stop": ["e ", "!"]},
        {"max_tokens": 17, "ignore_eos": True, "stop_token_ids": [260, 261]},
    ),
    "scores": ({}, {"logprobs": 2}, {"logprobs": 1, "echo": True}, {"prompt_logprobs": 1}),
    "bias": ({}, {"logit_bias": {"260": 4.0, "300": -100}}, {"bad_words": ["the"]}),
    "least": ({}, {"min_tokens": 10}),
    "n": ({}, {"n": 2}),
}
"""What a row may ask for. Every run has all rows, so that these meet the factors above too."""

CALM = Setting("shoal.sched.policy:Policy", 0.0, 2048, "whole", False, False, 1, 16, "bf16")
SHOWN_RESUMED = ("temperature", "seed", "presence_penalty", "repetition_penalty", "min_tokens", "logit_bias", "n")


# -- the file -----------------------------------------------------------------------------------------

TASKS = ("Is it good? Answer yes or no.", "Sort: 3 1 2", "Add 17 and 25.", "Copy: the quick brown fox", "Who is it?")
STORY = "Once upon a time there was a little clerk who could not stop counting. "
STUCK = 1000  # calls without a step, after which there will be none
URLS = {True: "/v1/chat/completions", False: "/v1/completions"}


def lines(sets: int, seed: int) -> dict[str, str]:
    """Lines by custom_id: in each set, all pairs of wishes, and a few rows of interest to a cache."""
    random, bodies = Random(seed), []
    shared = [random.randrange(5, 4000) for _ in range(64)]  # block borders fall inside and at its ends
    for _ in range(sets):
        for number, wishes in enumerate(covering(WISHES)):
            body: dict[str, Any] = {}
            for wish in (value for name, value in wishes.items() if name != "prompt"):
                body |= wish
            bodies.append(body | prompt(wishes["prompt"], number, shared, random, body))
        same = {"prompt": shared, "max_tokens": 20, "ignore_eos": True}  # whole prompts that are found computed
        bodies += [same | {"temperature": 0}, same | {"n": 2}, same | {"presence_penalty": 1.0, "seed": 5}]
        bodies.append({"prompt": shared[:33], "max_tokens": 0, "echo": True, "logprobs": 2})
        bodies.append({"prompt": shared[:9], "max_tokens": 4, "temperature": -1})
        bodies.append({"prompt": shared[:9], "max_tokens": 4, "allowed_token_ids": [300, 301], "min_tokens": 4})
    made = {}
    for number, body in enumerate(bodies):
        name, url = f"r{number:05}", URLS["messages" in body]
        made[name] = json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body})
    return made


def prompt(kind: str, number: int, shared: list[int], random: Random, body: dict[str, Any]) -> dict[str, Any]:
    """The prompt's fields. A chat's fields for scores have other names, and `body` loses those it may not have."""
    text = f"{random.choice(TASKS)} ({random.randrange(1000)})"
    if kind.endswith("chat"):
        system = f"You are clerk number {number % 3}. " + "Answer in few words. " * (number % 3)
        system += STORY * (18 if kind == "long chat" else 0)
        scored = {"top_logprobs": body["logprobs"], "logprobs": True} if "logprobs" in body else {}
        body.pop("echo", None)
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        return {"messages": messages, **scored}
    if kind == "tokens":
        return {"prompt": shared[: 17 + 5 * (number % 8)] + [random.randrange(5, 4000) for _ in range(1 + number % 4)]}
    return {"prompt": STORY + text if kind == "text" else [STORY, STORY + text]}


class Watched(InProcess):
    """An engine that notes which requests start again with tokens they have produced, and that nothing moves."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.resumed: Counter[str] = Counter()  # times, by request id
        self.longest = 0  # tokens of KV memory that a request can fill
        self.waited = 0  # steps in which requests waited
        self._idle = 0  # calls since the last step

    def submit(self, requests: Iterable[Request], watched: frozenset[str] = frozenset()) -> None:
        """Hand in requests, and note the largest."""
        requests = list(requests)
        self.longest = max([self.longest, *(len(each.prompt) + each.sampling.max_tokens for each in requests)])
        super().submit(requests, watched)

    def outputs(self, timeout: float = 0.0) -> News | None:
        """Look at each step once. Work that waits for nothing and is never planned is an AssertionError."""
        before = self.engine.last
        news = super().outputs(timeout)
        step = self.engine.last
        if step is not None and step is not before:
            self._idle = 0
            self.waited += bool(self.engine.scheduler.waiting)
            self.resumed.update(start.request.id for start in step.starts if start.produced)
        elif self.engine.wait_until is None:
            self._idle += 1
            stuck = [seq.request.id for seq in self.engine.scheduler.live()]
            assert self._idle < STUCK or not stuck, f"the engine plans no more steps, but {stuck} have not ended"
        return news


@dataclass(slots=True)
class Outcome:
    """What came of a run."""

    lines: dict[str, Any] = field(default_factory=dict)  # answered ones as bytes, failed ones as objects, by custom_id
    resumed: Counter[str] = field(default_factory=Counter)  # custom_id of rows that went on after a preemption
    counted: Counter[str] = field(default_factory=Counter)
    longest: int = 0  # tokens


def run(setting: Setting, made: Mapping[str, str], folder: Path, model: str, longest: int, seed: int = 0) -> Outcome:
    """One run of the whole job, or two of a half each; `longest` is the largest row's tokens."""
    folder.mkdir()
    names = list(made)
    if setting.file == "shuffled":
        Random(4).shuffle(names)
    middle = len(names) // 2 if setting.file == "halves" else len(names)
    outcome, (weights, _, kv) = Outcome(), setting.weights.partition("/")
    for number, part in enumerate(part for part in (names[:middle], names[middle:]) if part):
        source, out = folder / f"i{number}.jsonl", folder / f"o{number}.jsonl"
        source.write_text("".join(made[name] + "\n" for name in part))
        options = JobOptions(source, out, model=model, weights=weights, kv=kv or "auto", seed=seed, quiet=True)
        built = build_engine(engine_config(setting, model, longest), useful_tokens=200_000)
        backend = Watched(built.engine)
        try:
            code = run_job(options, backend)
        finally:
            built.close()
        assert code in (0, SOME_FAILED), code
        for id, times in backend.resumed.items():
            outcome.resumed[part[int(id.split(".")[0]) - 1]] += times
        outcome.longest = max(outcome.longest, backend.longest)
        outcome.counted["waited"] += backend.waited
        for name in ("steps", "preemptions", "cached", "output_preempted"):
            outcome.counted[name] += getattr(built.engine.scheduler.counters, name)
        found = collect(out)
        assert found.keys() == set(part), f"lines are missing or too many in {out}"
        outcome.lines |= found
    return outcome


def engine_config(setting: Setting, model: str, longest: int) -> EngineConfig:
    weights, _, kv = setting.weights.partition("/")
    config = EngineConfig(
        model=model, block_size=setting.block, step_tokens=setting.tokens, overlap=setting.overlap,
        reuse=setting.reuse, policy=setting.policy, threads=setting.threads, weights=weights,
        kv=kv or "auto",
    )  # fmt: skip
    if not setting.memory:
        return config
    built = build_engine(config, useful_tokens=1)  # only to learn the size of a block
    built.close()
    blocks = -(-longest // setting.block)
    return replace(config, memory_bytes=built.facts.memory.block * math.ceil(blocks * setting.memory))


def collect(out: Path) -> dict[str, Any]:
    """Lines by custom_id. Where a failed line stood in its file is left out."""
    found: dict[str, Any] = {}
    errors = out.with_name(out.stem + ".errors.jsonl")
    for path in (out, errors):
        for line in path.read_bytes().splitlines() if path.exists() else ():
            record = json.loads(line)
            assert record["custom_id"] not in found, f"{record['custom_id']} was answered twice"
            if path is errors:
                del record["x_shoal"]["line"]
            found[record["custom_id"]] = line if path is out else record
    return found


def answers(line: Any) -> Any:
    """The part of a line that is not a name."""
    record = json.loads(line) if isinstance(line, bytes) else line
    return record["response"]["body"].get("choices")


def prove(sets: int, seed: int, model: str, settings: Sequence[Setting]) -> dict[str, Any]:
    """Run every setting and say which lines differ from the calm run's."""
    threads = torch.get_num_threads()
    settle_interpreter()  # as in an engine process: adversaries plan for long, and the kernels' thread would wait
    made, runs = lines(sets, seed), []
    bodies = {name: json.loads(line)["body"] for name, line in made.items()}
    resumed: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        calm = {
            weights: run(replace(CALM, weights=weights), made, Path(place) / weights, model, 0)
            for weights in sorted({each.weights for each in settings})
        }
        longest = max(each.longest for each in calm.values())
        expected = {weights: each.lines for weights, each in calm.items()}
        control = run_control(made, bodies, Path(place) / "control", model, settings[0].weights, expected)
        for number, setting in enumerate(settings, 1):
            began = time.monotonic()
            got = run(setting, made, Path(place) / str(number), model, longest)
            wanted = expected[setting.weights]
            different = sorted(name for name in made if wanted[name] != got.lines[name])
            for name, times in got.resumed.items():
                resumed.update(dict.fromkeys(bodies[name], times))
                resumed["greedy"] += times * (bodies[name].get("temperature") == 0)
            runs.append(
                {**asdict(setting), **got.counted, "resumed": got.resumed.total(), "different": different,
                 "seconds": round(time.monotonic() - began, 2)}
            )  # fmt: skip
            told = ", ".join(f"{name} {value}" for name, value in runs[-1].items() if name != "different")
            print(f"{number}/{len(settings)}: {told}: {len(different)} of {len(made)} lines differ", flush=True)
    set_threads(threads)
    failed = sum(isinstance(line, dict) for line in next(iter(expected.values())).values())
    return {
        "rows": len(made), "failed": failed, "longest": longest, "control": control, "runs": runs,
        "preemptions": sum(each["preemptions"] for each in runs), "resumed": dict(sorted(resumed.items())),
        "shown": holds(runs, resumed) and control["different"] > 0 and not control["wrong"],
    }  # fmt: skip


def run_control(
    made: Mapping[str, str], bodies: Mapping[str, Any], folder: Path, model: str, weights: str, expected: Any
) -> dict[str, Any]:
    """Another seed of the job must show in rows that draw and bring no seed of their own, and in no others."""
    other = run(replace(CALM, weights=weights), made, folder, model, 0, seed=1).lines
    drawn = {name for name, body in bodies.items() if body.get("temperature", 1) > 0 and "seed" not in body}
    changed = {name for name in made if answers(other[name]) != answers(expected[weights][name])}
    print(f"control: another job seed changes {len(changed)} answers, of {len(drawn)} that are drawn by it", flush=True)
    return {"drawn": len(drawn), "different": len(changed), "wrong": sorted(changed - drawn)}


def holds(runs: Sequence[Mapping[str, Any]], resumed: Mapping[str, int]) -> bool:
    """No line differs, and what was to trouble the rows did: with the least memory all policies preempt but the batch
    policy, which lets rows wait."""
    return (
        not any(each["different"] for each in runs)
        and any(each["cached"] for each in runs)
        and all(each["preemptions"] > 0 for each in runs if each["memory"] == 1 and each["policy"] != "auto")
        and all(resumed.get(wish, 0) > 0 for wish in (*SHOWN_RESUMED, "greedy"))
    )


def main() -> int:
    """Prove at the size asked for; exit code 1 when a line differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=3, help="of rows with all pairs of wishes, about 30 each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="")
    wanted = parser.parse_args()
    counts = {}
    for name, factors in (("settings", FACTORS), ("rows", WISHES)):
        chosen = covering(factors)
        pairs, missing = unmet(factors, chosen)
        counts[name] = {"combinations": len(chosen), "pairs": pairs, "unmet": missing}
        print(f"{name}: {len(chosen)} combinations of {len(factors)} factors; {pairs - missing} of {pairs} pairs meet")
    data = prove(wanted.sets, wanted.seed, wanted.model, [Setting(**each) for each in covering(FACTORS)])
    different = sum(len(each["different"]) for each in data["runs"])
    print(f"{len(data['runs'])} runs of {data['rows']} rows, {data['failed']} of them bad: {different} lines differ")
    print(f"{data['preemptions']} preemptions; rows that went on after one with tokens produced: {data['resumed']}")
    data["shown"] = data["shown"] and not any(each["unmet"] for each in counts.values())
    write_result("itself", {"coverage": counts, **data}, wanted.seed)
    return 0 if data["shown"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
