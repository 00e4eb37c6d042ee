"""Stop the main job anywhere, run it again: the finished files are byte-equal to an unbroken run's.

Three parts: processes killed at random moments; the machine stopped between any two system calls of the writer and
journal, forgetting what was not synced; no space and broken disks at each of these. It knows the command line and the
state folder's journal; it must not know how a job is carried out.

    python -m benchmarks.prove_kill [--kills 100] [--rows 160] [--fault-rows 40] [--seed 1]
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import psutil

from benchmarks.common import ROOT, write_result

PROVES = (
    "shoal/jobs",
    "shoal/client.py",
    "shoal/host.py",
    "shoal/core",
    "tests/null/syscall_faults.py",
    "tests/null/syscall_faults.c",
    "tests/null/faulty.py",
    "tests/null/durable_job.py",
    "tests/null/whole_job.py",
)

EXIT_FAILED_LINES = 3
RESUMABLE = (1, -9)  # an engine that dies before it is ready ends the run; a killed run ends by signal 9
ORPHAN_SECONDS = 2.0  # in which an engine must end that has lost its parent
VICTIMS = ("parent", "engine", "both")
TASKS = ("Is it good? Answer yes or no.", "Sort: 3 1 2", "Add 17 and 25.", "Copy: the quick brown fox", "Who is it?")


def write_rows(path: Path, rows: int, seed: int) -> None:
    """A file with greedy and sampled rows, several samples, stop strings, rows that ask for what an earlier one asks
    for, and some lines that cannot be run."""
    random = Random(seed)
    asked: list[dict[str, Any]] = []
    with path.open("w") as file:
        for number in range(rows):
            if number % 13 == 5:
                file.write('{"custom_id": "broken\n')
                continue
            if number % 29 == 7:
                file.write("\n")
            body: dict[str, Any] = {
                "messages": [
                    {"role": "system", "content": f"You are clerk number {number % 3}. Answer in few words."},
                    {"role": "user", "content": f"{random.choice(TASKS)} ({random.randrange(1000)})"},
                ],
                "max_tokens": random.choice([4, 16, 48]),
                "ignore_eos": number % 2 == 0,
            }
            if number % 3 == 0:
                body |= {"temperature": 0.9, "seed": number, "n": 1 + number % 2}
            if number % 7 == 0:
                body["stop"] = ["e "]
            if number % 3 == 1 and asked:
                body = random.choice(asked)
            asked.append(body)
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")


class Job:
    """The job of one trial: its files, the log of what its runs did, and the runs themselves."""

    def __init__(self, folder: Path, source: Path) -> None:
        folder.mkdir()
        self.out, self.errors = folder / "o.jsonl", folder / "o.errors.jsonl"
        self.log = folder / "log"
        self.log.touch()
        self.messages = folder / "messages"
        self._source = source

    @contextmanager
    def life(self) -> Iterator[psutil.Popen]:
        """Start `shoal run` with an observer inside; it is gone at the end, whatever happens."""
        command = [sys.executable, "-m", "benchmarks.prove_kill", "observed", str(self.log), *self.arguments()]
        with self.messages.open("ab") as messages:
            process = psutil.Popen(command, cwd=ROOT, stdout=messages, stderr=messages)
        try:
            yield process
        finally:
            for one in [*family(process), process]:
                end(one)
            process.wait()

    def arguments(self) -> list[str]:
        cache = str(self.out.parent / "cache")  # of this job alone: it knows what a killed run has computed
        return ["run", "-i", str(self._source), "-o", str(self.out), "--quiet", "--threads", "1", "--cache", cache]

    def files(self) -> tuple[bytes, bytes]:
        return tuple(path.read_bytes() if path.exists() else b"" for path in (self.out, self.errors))  # type: ignore[return-value]

    def journalled(self) -> set[int]:
        """The lines whose results are in the journal, read past the job's own code."""
        path = Path(f"{self.out}.shoal") / "journal.db"
        if not path.exists():
            return set()
        with closing(sqlite3.connect(path)) as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name='results'").fetchone():
                return set()
            return {int(line) for (line,) in database.execute("SELECT line FROM results")}

    def note_journalled(self) -> None:
        """Log what the journal has, so that nothing of it may be generated from here on."""
        with self.log.open("a") as log:
            log.writelines(f"C {line}\n" for line in sorted(self.journalled()))

    def generated_again(self) -> list[int]:
        """Lines that were handed to an engine after their result was journalled."""
        kept: set[str] = set()
        again = []
        for event in self.log.read_text().splitlines():
            kind, line = event.split()
            if kind == "C":
                kept.add(line)
            elif kind == "F":
                kept.discard(line)
            elif kind == "S" and line in kept:
                again.append(int(line))
        return again


def family(process: psutil.Process) -> list[psutil.Process]:
    """The engines of a run."""
    try:
        return [child for child in process.children() if "shoal.host" in child.cmdline()]
    except psutil.Error:
        return []


def end(process: psutil.Process) -> None:
    """Kill a process, unless it has ended."""
    with suppress(psutil.NoSuchProcess):
        process.kill()


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that nobody has collected yet does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def observed(log: str, arguments: list[str]) -> None:
    """Be `shoal` with these arguments, and write down which lines are handed to an engine, which are committed, and
    that a file has been put into its place."""
    from shoal.cli import main as shoal
    from shoal.client import EngineProcess
    from shoal.jobs.files import DiskFiles
    from shoal.jobs.journal import Journal, Written

    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(kind: str, lines: Iterable[object]) -> None:
        os.write(descriptor, "".join(f"{kind} {line}\n" for line in lines).encode())

    submit: Callable[..., None] = EngineProcess.submit
    commit: Callable[..., None] = Journal.commit
    replace: Callable[..., None] = DiskFiles.replace

    def noted_submit(self: EngineProcess, requests: Iterable[Any], *rest: Any) -> None:
        requests = tuple(requests)
        note("S", dict.fromkeys(request.id.split(".")[0] for request in requests))
        submit(self, requests, *rest)

    def noted_commit(self: Journal, written: Written | None = None) -> None:
        lines = list(self._pending)
        commit(self, written)
        note("C", lines)

    def noted_replace(self: DiskFiles, source: Path, target: Path) -> None:
        replace(self, source, target)
        note("R", [0])

    EngineProcess.submit, Journal.commit = noted_submit, noted_commit  # type: ignore[method-assign, assignment]
    DiskFiles.replace = noted_replace  # type: ignore[method-assign]
    sys.argv = ["shoal", *arguments]
    shoal()


def wait_for(job: Job, process: psutil.Popen, size: int | None, seconds: float) -> bool:
    """Wait until the log has grown to `size`, or so many seconds have passed. False when the run ended before."""
    end = time.monotonic() + seconds
    while process.poll() is None:
        if job.log.stat().st_size >= size if size is not None else time.monotonic() >= end:
            return True
        time.sleep(0.001)
    return False


def kill(process: psutil.Popen, victim: str) -> float | None:
    """Kill the victim now; return the seconds the engine outlived its parent. None when there was nothing to kill."""
    engines = family(process)
    if victim == "engine" and not engines:
        return None
    if victim in ("parent", "both"):
        end(process)
    if victim in ("engine", "both"):
        for engine in engines:
            end(engine)
    if victim != "parent":
        return 0.0
    process.wait()
    began = time.monotonic()
    while any(alive(engine) for engine in engines) and time.monotonic() - began < 30:
        time.sleep(0.01)
    return time.monotonic() - began


def victims_of(rng: Random) -> list[str]:
    """One to three kills for one job."""
    chosen: list[str] = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        victim = rng.choice(VICTIMS)
        # A row that runs alone when the engine dies twice is given up by design, so an engine is killed once at most.
        chosen.append("parent" if victim == "engine" and "engine" in chosen else victim)
    return chosen


def survive(
    job: Job, rng: Random, scale: tuple[int, float], victims: list[str], look: Callable[[int], list[str]]
) -> dict[str, Any]:
    """Run the job to its end, killed at random moments. `scale`: log size and seconds of an unbroken run.

    With no seconds to choose from, the moments are places in the log. `look` says after each life what is wrong.
    """
    victims, kills, lives, orphans = list(victims), list[str](), 0, [0.0]
    wrong: list[str] = []
    while True:
        lives += 1
        with job.life() as process:
            start = job.log.stat().st_size
            while victims and process.poll() is None:
                by_log = not scale[1] or rng.random() < 0.75
                size = start + rng.randrange(scale[0]) if by_log else None
                if not wait_for(job, process, size, rng.random() * scale[1]):
                    break
                survived = kill(process, victims[0])
                if survived is not None:
                    kills.append(victims.pop(0))
                    orphans.append(survived)
            code = process.wait()
        job.note_journalled()
        wrong += look(lives)
        if code not in RESUMABLE:
            break
        if lives > 8:
            wrong.append("it does not end")
            break
    if code != EXIT_FAILED_LINES:
        wrong.append(f"it ended with {code}: {job.messages.read_text()[-500:]}")
    if again := job.generated_again():
        wrong.append(f"generated again after they were journalled: lines {again[:10]}")
    if max(orphans) > ORPHAN_SECONDS:
        wrong.append(f"an engine outlived its parent by {max(orphans):.1f} s")
    return {"kills": kills, "lives": lives, "orphan_seconds": max(orphans), "wrong": wrong}


def trial(
    folder: Path, source: Path, wanted: tuple[bytes, bytes], rng: Random, scale: tuple[int, float], victims: list[str]
) -> dict[str, Any]:
    """One job, killed at random moments and run to its end; `scale` as in `survive`."""
    job = Job(folder, source)

    def look(life: int) -> list[str]:
        return [
            f"after life {life} the {name} file is no prefix of the unbroken run's"
            for name, now, whole in zip(("output", "errors"), job.files(), wanted, strict=True)
            if not whole.startswith(now)
        ]

    found = survive(job, rng, scale, victims, look)
    if job.files() != wanted:
        found["wrong"].append("the finished files differ")
    return found


def second_run_is_refused(job: Job, first: psutil.Popen) -> list[str]:
    """Start another run of a job that is under way: it must exit 2 and say who is there. Returns what is wrong."""
    command = [sys.executable, "-m", "shoal", *job.arguments()]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = " ".join((second.stdout + second.stderr).split())
    good = second.returncode == 2 and f"process {first.pid}" in said
    return [] if good else [f"a second run ended with {second.returncode}: {said[-300:]}"]


def killed(folder: Path, rows: int, kills: int, seed: int) -> dict[str, Any]:
    """Kill processes at `kills` random moments."""
    source = folder / "in.jsonl"
    write_rows(source, rows, seed)
    unbroken = Job(folder / "unbroken", source)
    began = time.monotonic()
    with unbroken.life() as process:
        code = process.wait()
    seconds, wanted = time.monotonic() - began, unbroken.files()
    wrong = [] if code == EXIT_FAILED_LINES else [f"unbroken: exit {code}: {unbroken.messages.read_text()[-500:]}"]
    held = Job(folder / "held", source)
    with held.life() as process:
        wait_for(held, process, 1, 0.0)
        process.suspend()  # it holds the job for as long as the second run may take
        wrong += second_run_is_refused(held, process)
    found: Counter[str] = Counter()
    lives, trials, orphan = 0, 0, 0.0
    while found.total() < kills and not wrong:
        rng, scale = Random(f"{seed} {trials}"), (unbroken.log.stat().st_size, seconds)
        one = trial(folder / f"trial{trials}", source, wanted, rng, scale, victims_of(rng))
        found.update(one["kills"])
        trials, lives, orphan = trials + 1, lives + one["lives"], max(orphan, one["orphan_seconds"])
        wrong += [f"trial {trials - 1}: {text}" for text in one["wrong"]]
        print(
            f"{found.total()} of {kills} kills ({dict(found)}), {trials} jobs, {lives} runs {wrong or ''}", flush=True
        )
    return {
        "rows": rows, "output_lines": wanted[0].count(b"\n"), "error_lines": wanted[1].count(b"\n"),
        "kills": dict(found), "jobs": trials, "runs": lives, "orphan_seconds_max": round(orphan, 3), "wrong": wrong,
    }  # fmt: skip


def faulted(folder: Path, rows: int) -> dict[str, Any]:
    """Stop the machine, or refuse, at every system call of the writer and journal."""
    sys.path.insert(0, str(ROOT / "tests" / "null"))
    import syscall_faults

    import shoal.jobs.journal as journal

    library, found = syscall_faults.build(folder), dict[str, Any]()
    local = journal.read_mounts
    settings = {
        "write_ahead_log": syscall_faults.Setting(rows),
        "rollback_journal": syscall_faults.Setting(rows, network=True),
        "main_job": syscall_faults.Setting(rows // 2, whole=True),
    }
    for name, setting in settings.items():
        journal.read_mounts = (lambda: syscall_faults.NETWORK) if setting.network else local
        place = folder / name
        place.mkdir()
        operations = syscall_faults.record(library, place, setting)
        restarts = syscall_faults.replay(operations, place, setting)
        found[name] = {"operations": len(operations), "restarts": restarts}
        print(f"{name}: stopped after each of {len(operations)} system calls, {restarts} restarts", flush=True)
        for error in (errno.ENOSPC, errno.EIO):
            for sticky in (True, False):
                key = f"{errno.errorcode[error]} {'from then on' if sticky else 'once'}"
                within = place / key
                within.mkdir()
                found[name][key] = syscall_faults.refuse(library, within, setting, error, sticky)
                print(f"{name}: {key}: {found[name][key]}", flush=True)
    journal.read_mounts = local
    return found


def main() -> int:
    if sys.argv[1:2] == ["observed"]:
        observed(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--fault-rows", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        try:
            faults = faulted(Path(name), options.fault_rows)
        except AssertionError as error:
            faults = {"wrong": str(error)}
            wrong.append(f"fault points: {error}")
    with tempfile.TemporaryDirectory() as name:
        kills = killed(Path(name), options.rows, options.kills, options.seed)
    wrong += kills["wrong"]
    path = write_result("kill", {"killed": kills, "faults": faults, "wrong": wrong}, options.seed)
    print(f"{'FAILED: ' + '; '.join(wrong) if wrong else 'the same bytes every time'}: {path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
