"""Stop the main job and then its retry anywhere, with all that it can do switched on: the same bytes, no row twice.

The job has a cache that an earlier job has filled in part, rows that ask for the same, rows whose answers are kept to a
schema, an expression or a choice, lines that cannot be answered, and rows that need more memory than it may have, which
`shoal retry` answers with more. It shares the killing with `prove_kill`; it must not know how a job is carried out.

    python -m benchmarks.prove_kill_everything [--kills 100] [--rows 120] [--seed 1] [--folder DIR --seconds 80]

With --folder it keeps what it has found, stops after so many seconds, and goes on when it is run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

from benchmarks import prove_kill
from benchmarks.common import commit, write_result
from benchmarks.prove_kill import EXIT_FAILED_LINES, TASKS, survive, victims_of

PROVES = (*prove_kill.PROVES, "shoal/text", "shoal/nn/masks.py", "benchmarks/prove_kill.py")

SMALL, AMPLE = "1MB", "64MB"  # memory of the job, too little for its long rows, and of the retry
LONG_WORDS = 700
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "good": {"type": "boolean"}},
    "required": ["name", "good"],
    "additionalProperties": False,
}
CONSTRAINTS: tuple[dict[str, Any], ...] = (
    {"structured_outputs": {"choice": ["positive", "negative"]}},
    {"structured_outputs": {"regex": "[0-9]{2,5}( [0-9]{2}){2}"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}},
    {"guided_grammar": 'root ::= ("yes" | "no") " " [a-z]+'},
)
HOPELESS: tuple[dict[str, Any], ...] = (
    {"structured_outputs": {"regex": "(?=ahead)"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "no such type"}}}},
    {"max_tokens": -1},
    {"no_such_field": True},
)


def write_rows(path: Path, rows: int, seed: int) -> None:
    """Rows of every kind, mixed."""
    random = Random(seed)
    asked: list[dict[str, Any]] = []
    with path.open("w") as file:
        for number in range(rows):
            if number % 17 == 5:
                file.write(random.choice(['{"custom_id": "broken\n', "[]\n", "\n"]))
            name = f"r{number - 1 if number % 31 == 30 else number}"  # a name that another row has
            body = make_body(number, random)
            if number % 3 == 1 and asked:
                body = random.choice(asked)
            asked.append(body)
            line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def make_body(number: int, random: Random) -> dict[str, Any]:
    """What one row asks for."""
    words = " ".join(str(random.randrange(10)) for _ in range(LONG_WORDS)) if number % 12 == 3 else ""
    body: dict[str, Any] = {
        "messages": [
            {"role": "system", "content": f"You are clerk number {number % 3}. Answer in few words. {words}"},
            {"role": "user", "content": f"{random.choice(TASKS)} ({random.randrange(1000)})"},
        ],
        "max_tokens": random.choice([4, 16, 48]),
        "temperature": 0,
    }
    if number % 4 == 0:
        body |= {"temperature": 0.9, "seed": number, "n": 1 + number % 8 // 4}
    if number % 5 == 4:
        body |= {"temperature": 1.2}  # its numbers follow from its name
    if number % 14 == 13:
        body |= random.choice(HOPELESS)
    elif number % 2 == 0:
        body |= {"max_tokens": 48} | CONSTRAINTS[number // 2 % len(CONSTRAINTS)]
    else:
        body["ignore_eos"] = number % 4 == 1
    return body


class Job(prove_kill.Job):
    """The job of one trial, and its retry."""

    def __init__(self, folder: Path, source: Path, cache: Path | None, memory: str) -> None:
        """With a copy of this cache, or with none."""
        super().__init__(folder, source)
        self._memory = memory
        self._retry: list[str] = []  # how the rows that failed run again, once they do
        if cache is not None:
            shutil.copytree(cache, folder / "cache")

    def arguments(self) -> list[str]:
        return [*(self._retry or [*super().arguments(), "--memory", self._memory]), "--quiet"]

    def begin_retry(self, every: bool) -> None:
        """From here on the job's command is a retry: what failed for want of memory may be generated once more."""
        found = self._failed_for_want_of_memory()
        with self.log.open("a") as log:
            log.writelines(f"F {line}\n" for line in sorted(found))
        self._retry = ["retry", str(self.out), "--memory", AMPLE, *(["--all"] if every else [])]

    def journalled(self) -> set[int]:
        return super().journalled() - (self._failed_for_want_of_memory() if self._retry else set())

    def _failed_for_want_of_memory(self) -> set[int]:
        with closing(sqlite3.connect(Path(f"{self.out}.shoal") / "journal.db")) as database:
            rows = database.execute("SELECT line, stats FROM results WHERE status='failed'").fetchall()
        return {line for line, stats in rows if json.loads(stats)["code"] == "kv_exhausted"}

    def generated(self, start: int = 0) -> set[int]:
        """Every line that was handed to an engine since the log had `start` bytes."""
        events = (event.split() for event in self.log.read_text()[start:].splitlines())
        return {int(line) for kind, line in events if kind == "S"}

    def codes(self) -> Counter[str]:
        """How many lines of the errors file have each code."""
        lines = [json.loads(line) for line in self.files()[1].splitlines()]
        return Counter(line["response"]["body"]["error"]["code"] for line in lines)


def unaccounted(source: Path, files: tuple[bytes, bytes]) -> list[str]:
    """Lines of the source that do not stand in exactly one of the two files, once."""
    found: Counter[int] = Counter(json.loads(line)["x_shoal"]["line"] for line in files[1].splitlines())
    numbers: dict[str, int] = {}
    wanted = []
    for number, line in enumerate(source.read_bytes().splitlines(), 1):
        if line.strip():
            wanted.append(number)
            if line.startswith(b'{"custom_id": "r'):
                numbers.setdefault(json.loads(line)["custom_id"], number)
    found.update(numbers[json.loads(line)["custom_id"]] for line in files[0].splitlines())
    return [f"line {n} stands {found[n]} times in the files" for n in {*wanted, *found} if found[n] != 1]


class Unbroken:
    """What nobody disturbs: the files after the job and after its retry, and what each has cost."""

    def __init__(self, folder: Path, rows: int, seed: int) -> None:
        self.source, self.cache = folder / "in.jsonl", folder / "earlier" / "cache"
        write_rows(self.source, rows, seed)
        (folder / "part.jsonl").write_bytes(b"".join(self.source.read_bytes().splitlines(True)[: rows // 4]))
        earlier = Job(folder / "earlier", folder / "part.jsonl", None, AMPLE)
        self.wrong: list[str] = []
        self._live(earlier)
        whole = Job(folder / "whole", self.source, None, AMPLE)  # nothing known, and room for all
        self._live(whole)
        job = Job(folder / "unbroken", self.source, self.cache, SMALL)
        self.run_scale, self.run_files, self.run_codes = self._live(job), job.files(), job.codes()
        self.run_lines = job.generated()
        self.report = json.loads((Path(f"{job.out}.shoal") / "report.json").read_text())
        start = job.log.stat().st_size
        job.begin_retry(every=False)
        self.retry_scale, self.retry_files, self.retry_codes = self._live(job), job.files(), job.codes()
        self.retry_lines = job.generated(start)
        if self.retry_files != whole.files():
            self.wrong.append("with a cache, little memory and a retry the files differ from those of one plain run")
        self.wrong += unaccounted(self.source, self.run_files) + unaccounted(self.source, self.retry_files)
        if not self.run_codes["kv_exhausted"] or self.retry_codes["kv_exhausted"]:
            self.wrong.append(f"memory decides nothing: {self.run_codes}, then {self.retry_codes}")
        if not all(self.report["reused"][kind] for kind in ("duplicates", "cached")):
            self.wrong.append(f"nothing is reused: {self.report['reused']}")

    def _live(self, job: Job) -> tuple[int, float]:
        """Run the job to its end; by how much its log grew, and seconds."""
        start, began = job.log.stat().st_size, time.monotonic()
        with job.life() as process:
            code = process.wait()
        if code != EXIT_FAILED_LINES:
            self.wrong.append(f"{job.out.parent.name}: exit {code}: {job.messages.read_text()[-500:]}")
        return job.log.stat().st_size - start, time.monotonic() - began

    def facts(self) -> dict[str, Any]:
        """What the job has in it."""
        kinds: Counter[str] = Counter()
        for line in self.run_files[0].splitlines():
            number = int(json.loads(line)["custom_id"][1:])
            kinds["structured" if number % 2 == 0 and number % 3 != 1 else "other"] += 1
        return {
            "rows": self.report["rows"], "answered_first": dict(kinds), "failed_first": dict(self.run_codes),
            "failed_after_retry": dict(self.retry_codes), "reused": self.report["reused"],
            "lines_generated": len(self.run_lines), "lines_generated_by_retry": len(self.retry_lines),
        }  # fmt: skip


def trial(folder: Path, unbroken: Unbroken, rng: Random) -> list[dict[str, Any]]:
    """One job and its retry, each killed at random moments and run to its end."""
    job = Job(folder, unbroken.source, unbroken.cache, SMALL)
    old, new = unbroken.run_files, unbroken.retry_files

    def run_look(life: int) -> list[str]:
        good = all(whole.startswith(now) for now, whole in zip(job.files(), old, strict=True))
        return [] if good else [f"after life {life} a file is no prefix of the unbroken run's"]

    def retry_look(life: int) -> list[str]:
        good = job.files() in (old, (new[0], old[1]), new)
        return [] if good else [f"after life {life} of the retry the files are neither those of before nor the new"]

    found = [survive(job, rng, unbroken.run_scale, victims_of(rng), run_look)]
    if job.files() != old:
        found[0]["wrong"].append("the finished files differ")
    if more := job.generated() - unbroken.run_lines:
        found[0]["wrong"].append(f"generated, and an unbroken run need not: lines {sorted(more)[:10]}")
    if found[0]["wrong"]:
        return found
    start = job.log.stat().st_size
    job.begin_retry(every=rng.random() < 0.3)
    found.append(survive(job, rng, unbroken.retry_scale, victims_of(rng), retry_look))
    if job.files() != new:
        found[1]["wrong"].append("the files of the finished retry differ")
    if more := job.generated(start) - unbroken.retry_lines:
        found[1]["wrong"].append(f"generated, and an unbroken retry need not: lines {sorted(more)[:10]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keeps what was found, so that the next call goes on")
    parser.add_argument("--seconds", type=float, default=1e9, help="begins no trial after so long")
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(exist_ok=True)
        return prove(options, options.folder)
    with tempfile.TemporaryDirectory() as name:
        return prove(options, Path(name))


def prove(options: argparse.Namespace, folder: Path) -> int:
    """Go on with the trials; the result is written when there were kills enough."""
    began = time.monotonic()
    notes, same = folder / "notes.json", {"commit": commit(), "rows": options.rows, "seed": options.seed}
    noted = json.loads(notes.read_text()) if notes.exists() else {**same, "trials": [], "wrong": []}
    if any(noted[name] != value for name, value in same.items()):
        print(f"{notes} is of another commit, seed or number of rows: remove {folder}")
        return 2
    with tempfile.TemporaryDirectory() as name:
        unbroken = Unbroken(Path(name), options.rows, options.seed)
        wrong = unbroken.wrong + noted["wrong"]
        while sum(len(one["kills"]) for one in noted["trials"]) < options.kills and not wrong:
            if time.monotonic() - began > options.seconds:
                print("more to do: run the same command again", flush=True)
                return 0
            number = len(noted["trials"])
            found = trial(Path(name) / f"trial{number}", unbroken, Random(f"{options.seed} {number}"))
            one = {
                "kills": [*(f"run: {kill}" for kill in found[0]["kills"])]
                + [f"retry: {kill}" for each in found[1:] for kill in each["kills"]],
                "lives": sum(each["lives"] for each in found),
                "orphan_seconds": max(each["orphan_seconds"] for each in found),
            }  # fmt: skip
            wrong += [f"trial {number}: {text}" for each in found for text in each["wrong"]]
            noted = {**noted, "trials": [*noted["trials"], one], "wrong": wrong}
            notes.write_text(json.dumps(noted))
            print(f"trial {number}: {one['kills']}, {one['lives']} lives {wrong or ''}", flush=True)
        facts = unbroken.facts()
    trials = noted["trials"]
    data = {
        "job": facts,
        "kills": Counter(kill for one in trials for kill in one["kills"]),
        "jobs": len(trials),
        "runs": sum(one["lives"] for one in trials),
        "orphan_seconds_max": round(max((one["orphan_seconds"] for one in trials), default=0.0), 3),
        "wrong": wrong,
    }
    path = write_result("kill_everything", data, options.seed)
    print(f"{'FAILED: ' + '; '.join(wrong) if wrong else 'the same bytes every time'}: {path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
