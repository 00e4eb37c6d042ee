"""Proof: explain tells a job before it runs: its prompt tokens exactly, its time within 15 %; 100,000 rows in seconds.

Whole jobs through the engine process over files of four kinds: GSM8K, BBH, MMLU (5-shot, by subject), questions about
shared paragraphs. It must not know how a time is predicted. With answers of fixed lengths the time is a point: a job
runs several times, and the middle of the ratios counts. With answers that may end anywhere it is a range, given
before, that must hold the time; and when 5 % of the rows have ended the job itself says how long it will take.

Usage: python -m benchmarks.prove_explain [--model FOLDER|embedded] [--kinds gsm8k,bbh,mmlu,paragraphs]
       [--part fixed,free,large] [--turns 5] [--rows N] [--keep FILE [--minutes N]]
With --keep every turn is added to FILE as it ends, and what FILE has is not done again: run the same command until it
says that nothing is left; with --minutes it begins nothing after so many. The result is written when all is there.
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
from dataclasses import asdict
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import psutil  # type: ignore[import-untyped]

import shoal
from benchmarks import workloads
from benchmarks.common import write_result

PROVES = ("shoal",)

SEED = 5
WITHIN, SECONDS, BYTES = 0.15, 30.0, 10**9
HELD = 0.8  # share of the files of open lengths whose range must hold the time
GIVEN = "build/bench-models/qwen05b"
LARGE = 100_000
FILES = {"gsm8k": workloads.gsm8k, "bbh": workloads.bbh, "mmlu": workloads.mmlu, "paragraphs": workloads.paragraphs}
SIZES = {  # rows, and the answers' tokens from … to
    "embedded": {"gsm8k": (800, 64, 256), "bbh": (1000, 32, 192), "mmlu": (1500, 4, 48), "paragraphs": (1500, 16, 96)},
    "given": {"gsm8k": (80, 16, 64), "bbh": (24, 16, 48), "mmlu": (48, 2, 16), "paragraphs": (96, 8, 32)},
}
FREE = ("gsm8k", "bbh", "mmlu", "paragraphs", "stories")  # files whose answers end anywhere


def prompts(kind: str, rows: int) -> list[str]:
    """Neighbours of the file's own order, in no order: what shares a beginning is among them together."""
    if kind == "stories":
        names = "Tom Lily Max Anna Ben Sue Tim Mia Sam Zoe".split()
        things = (
            "dog kite ball tree boat cake hat frog bell shoe drum fish coat lamp nest ring seed star coin leaf".split()
        )
        found = [f"One day {a} and {b} found a {c}." for a in names for b in names for c in things][:rows]
    else:
        found = FILES[kind]()
        groups = 6
        each, step = rows // groups, len(found) // groups
        found = [text for first in range(0, groups * step, step) for text in found[first : first + each]]
    Random(SEED).shuffle(found)
    return found


def write_file(path: Path, kind: str, sizes: tuple[int, int, int], fixed: bool) -> Path:
    """A batch file of one kind."""
    rows, low, high = sizes
    luck = Random(SEED)
    more = {} if fixed else {"ignore_eos": False}
    made = [(text, luck.randint(low, high) if fixed else high) for text in prompts(kind, rows)]
    return workloads.write_rows(path, made, **more)


PACE = """
import sys, threading, time
took, over = [], threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
while not over.wait(0.2):
    began, seen = time.thread_time(), {}
    for number in range(10_000):
        seen[number % 997] = seen.get(number % 991, 0) + number
    took.append(time.thread_time() - began)
print(sum(took) / max(len(took), 1))
"""


class Others:
    """What a time owes to others while inside: the share of the machine that they took, and `pace`, the processor
    seconds of one piece of work again and again, which vary twofold where a virtual machine has neighbours."""

    def __enter__(self) -> Others:
        self._began = self._now()
        self.share = self.pace = 0.0
        pipe = subprocess.PIPE
        self._pace = subprocess.Popen([sys.executable, "-c", PACE], stdin=pipe, stdout=pipe, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.pace = float(self._pace.communicate()[0])
        busy, own, at = (now - then for now, then in zip(self._now(), self._began, strict=True))
        self.share = round(max(busy - own, 0.0) / (at * len(os.sched_getaffinity(0))), 3)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: of all processors at work, of this process and its children that have ended, of the clock."""
        cpu, own = psutil.cpu_times(), os.times()
        busy = sum(getattr(cpu, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
        return busy, sum(own[:4]), own.elapsed


def explain(source: Path, model: str, *flags: str) -> dict[str, Any]:
    """What the command says."""
    command = [sys.executable, "-m", "shoal", "explain", str(source), "--json", *flags]
    done = subprocess.run(
        [*command, *(["--model", model] if model else [])], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def run(source: Path, model: str) -> tuple[float, shoal.call.Report]:
    """One run: seconds on the clock, and its report."""
    began = time.monotonic()
    report = shoal.run(source, source.with_suffix(".out"), model=model, restart=True, overwrite=True)
    return time.monotonic() - began, report


def fixed(source: Path, model: str, earlier: dict[str, Any]) -> dict[str, Any]:
    """Predicted and actual once more; the machine is measured anew each time, and the middle of all turns counts."""
    with Others() as before:
        said = explain(source, model, "--calibrate")
    assert said["time"], said["no_time"]
    predicted = (said["time"]["low"] + said["time"]["high"]) / 2
    with Others() as beside:
        seconds, report = run(source, model)
    again = report.predicted
    exact = said["bound"] == report.tokens.prompt_computed and said["prompt_tokens"] == report.tokens.prompt
    exact &= again is not None and again.prompt_tokens == report.tokens.prompt_computed
    assert again is not None and again.seconds is not None, again
    turn = {
        "predicted": predicted, "actual": seconds, "ratio": predicted / seconds,
        "at_like_pace": predicted / seconds * beside.pace / before.pace,  # shown, and no claim
        "others": [before.share, beside.share], "pace": [before.pace, beside.pace],
        "by_the_run": sum(again.seconds) / 2, "wall": report.seconds.wall, "at_5_percent": again.soon,
        "peak_kv": [again.kv_bytes, report.peak_kv_bytes],
    }  # fmt: skip
    print({name: value if isinstance(value, list) else round(value or 0, 3) for name, value in turn.items()})
    runs = [*earlier.get("runs", []), turn]
    ratio, like = (median(one[name] for one in runs) for name in ("ratio", "at_like_pace"))
    soon = median((one["at_5_percent"] or 0.0) / one["wall"] for one in runs)
    print(f"{source.stem:12} predicted/actual {ratio:.3f} ({like:.3f} at like pace), at 5 % {soon:.3f}", flush=True)
    exact &= earlier.get("prompt_tokens_exact", True)
    return {
        "runs": runs, "ratio": ratio, "at_like_pace": like, "ratio_at_5_percent": soon, "prompt_tokens_exact": exact,
    }  # fmt: skip


def free(source: Path, model: str) -> dict[str, Any]:
    """A range, and whether the time was in it; the estimate at 5 % of the rows."""
    explain(source, model, "--calibrate")
    with Others() as beside:
        _, report = run(source, model)
    said, wall = report.predicted, report.seconds.wall
    assert said is not None and said.seconds is not None, said
    low, high = said.seconds
    found = {
        "range": said.seconds, "actual": wall, "others": beside.share, "held": low <= wall <= high,
        "at_5_percent": said.soon, "span_at_5_percent": said.soon_span,
        "ratio_at_5_percent": None if said.soon is None else said.soon / wall, "output_tokens": report.tokens.output,
        "prompt_tokens": [said.prompt_tokens, report.tokens.prompt_computed], "again": asdict(report.again),
    }  # fmt: skip
    print(f"{source.stem:12} {found}", flush=True)
    return found


def large(folder: Path, rows: int) -> dict[str, float]:
    """Seconds and bytes to explain a large file, with the machine's measurement at hand."""
    luck = Random(SEED)
    words = (
        "river lake fish school of the small water under green stone light boat harbour wind north sees many".split()
    )
    heads = [" ".join(luck.choices(words, k=60)) for _ in range(max(rows // 500, 1))]
    made = ((f"{luck.choice(heads)} {' '.join(luck.choices(words, k=40))}", luck.randint(32, 256)) for _ in range(rows))
    source = workloads.write_rows(folder / "large.jsonl", made)
    explain(source, "")
    began = time.monotonic()
    explain(source, "")
    seconds = time.monotonic() - began
    return {"rows": rows, "seconds": seconds, "bytes": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}


def claims(found: dict[str, Any]) -> dict[str, bool]:
    """What must hold, of what was found so far."""
    jobs = [job for name, job in found.items() if name.endswith(" fixed")]
    opened = [job for name, job in found.items() if name.endswith(" free")]
    soon = [job["ratio_at_5_percent"] for job in jobs + opened]
    return {
        "prompt_tokens_are_exact": all(job["prompt_tokens_exact"] for job in jobs),
        "prompt_tokens_are_exact_where_lengths_are_open": all(
            job["prompt_tokens"][0] == job["prompt_tokens"][1] for job in opened
        ),
        "time_is_within_15_percent": all(abs(job["ratio"] - 1) <= WITHIN for job in jobs),
        "a_range_holds_the_time": sum(job["held"] for job in opened) >= HELD * len(opened),
        "estimated_anew_within_15_percent": all(one is not None and abs(one - 1) <= WITHIN for one in soon),
        "estimated_anew_where_lengths_are_fixed": all(abs(job["ratio_at_5_percent"] - 1) <= WITHIN for job in jobs),
        "a_large_file_takes_seconds": "large" not in found
        or (found["large"]["seconds"] < SECONDS and found["large"]["bytes"] < BYTES),
    }


Part = tuple[str, str, str, str]  # name, model's folder, kind of file, fixed or free


def parts_of(wanted: argparse.Namespace) -> list[Part]:
    """What there is to do, the large file apart."""
    found = []
    for model in [wanted.model] if wanted.model else ["embedded", GIVEN]:
        label, folder = ("embedded", "") if model == "embedded" else ("given", model)
        if folder and not Path(folder).is_dir():
            print(f"{folder} is not there: left out")
            continue
        for kind in wanted.kinds.split(","):
            for part in ("fixed", "free"):
                apart = (part == "fixed" and kind not in FILES) or (folder and part == "free")
                if part in wanted.part.split(",") and not apart:
                    found.append((f"{label} {kind} {part}", folder, kind, part))
    return found


def once(part: Part, folder: Path, earlier: dict[str, Any]) -> dict[str, Any]:
    """One turn of a part, added to earlier ones."""
    name, model, kind, how = part
    rows, low, high = SIZES[name.split()[0]].get(kind, (600, 16, 96))
    sizes = (rows if how == "fixed" else rows // 2, low, high)
    path = write_file(folder / f"{kind}.jsonl", kind, sizes, how == "fixed")
    return fixed(path, model, earlier) if how == "fixed" else free(path, model)


def work(wanted: argparse.Namespace, found: dict[str, Any], folder: Path) -> list[str]:
    """Do what is not found yet, and keep it turn by turn; what is left when the minutes are over."""
    end = time.monotonic() + 60 * wanted.minutes
    if "large" in wanted.part.split(",") and "large" not in found:
        found["large"] = large(folder, wanted.rows)  # first: nothing larger has run yet
        print(found["large"], flush=True)
        keep(wanted.keep, found)
    left = []
    for part in parts_of(wanted):
        turns = wanted.turns if part[3] == "fixed" else 1
        while (had := _turns(found.get(part[0]))) < turns:
            if time.monotonic() > end:
                left.append(f"{part[0]} ({turns - had} turns)")
                break
            print(part[0], flush=True)
            found[part[0]] = once(part, folder, found.get(part[0], {}))
            keep(wanted.keep, found)
    return left


def _turns(job: dict[str, Any] | None) -> int:
    return 0 if job is None else len(job.get("runs", [job]))


def keep(path: Path | None, found: dict[str, Any]) -> None:
    """Write down what was found so far."""
    if path is not None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(path)


def main() -> int:
    """Run the parts asked for; 1 when a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="", help=f"embedded, or a real model's folder as {GIVEN}; both by default")
    parser.add_argument("--kinds", default=",".join(FREE))
    parser.add_argument("--part", default="large,fixed,free")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", type=int, default=LARGE, help="of the large file")
    parser.add_argument("--keep", type=Path, help="what has been found, and is added to turn by turn")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which nothing more is begun")
    wanted = parser.parse_args()
    found: dict[str, Any] = json.loads(wanted.keep.read_text()) if wanted.keep and wanted.keep.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = name
        left = work(wanted, found, Path(name))
    for claim, holds in (judged := claims(found)).items():
        print(f"{claim}: {'holds' if holds else 'DOES NOT HOLD'}")
    whole = {f"embedded {kind} {part}" for part in ("fixed", "free") for kind in FILES}
    whole |= {"large", "embedded stories free", *(f"given {kind} fixed" for kind in FILES if Path(GIVEN).is_dir())}
    if whole <= set(found) and all(_turns(found[name]) >= 5 for name in whole if name.endswith("fixed")):
        write_result("explain", {"found": found, "claims": judged}, SEED)
        print("nothing is left: the result is written")
    elif left:
        print(f"left: {', '.join(left)}")
    return 0 if all(judged.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
