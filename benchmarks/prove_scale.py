"""Proof of scale: a million chat rows from file to plan, checks, template and tokenizer included.

It knows what the planning half needs and nothing of models' weights; torch must not be loaded, and is looked for.
Claims: at most 90 s and 1.5 GB above the idle process for 1,000,000 rows of about 40 tokens; five times as many rows
take at most 5.5 times as long. Each size runs in a process of its own. The rows' text is drawn from public-domain
prose; about 40 tokens are the user's own words, and the template adds its constant part to them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.common import ROOT, SHARED, memory_now, write_result

SECONDS = 90.0
MEMORY = 1_500_000_000
RATIO = 5.5
SEED = 11
WORDS = 31  # words of prose in a row: about 40 tokens

PROVES = ("shoal/core", "shoal/jobs", "shoal/text", "constraints.txt")


def write_rows(path: Path, rows: int) -> None:
    """Chat rows of the OpenAI Batch shape; every text is another piece of prose."""
    rng = random.Random(SEED)
    books = sorted((SHARED / "data" / "corpora" / "novels").glob("*.gz"))
    words = [word for book in books for word in gzip.decompress(book.read_bytes()).decode("utf-8", "replace").split()]
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            start, length = rng.randrange(len(words) - 2 * WORDS), rng.randrange(WORDS // 2, WORDS * 3 // 2 + 1)
            body = {
                "model": "m",
                "messages": [{"role": "user", "content": " ".join(words[start : start + length])}],
                "max_tokens": 16,
                "temperature": 0,
            }
            line = {"custom_id": f"row-{i:08d}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def measure(path: Path, folder: Path) -> dict[str, float]:
    """Plan the rows of `path` in this process; seconds and bytes."""
    from shoal.jobs.crew import on_all_cores
    from shoal.jobs.encode import RowEncoder
    from shoal.jobs.plan import build_plan
    from shoal.jobs.read import Source
    from shoal.jobs.settings import JobSettings
    from shoal.text.chat import ChatTemplate
    from shoal.text.checkpoint import ModelInfo
    from shoal.text.tokenizer import Tokenizer

    idle = memory_now()
    model = SHARED / "data" / "tokenizers" / "qwen2"
    watch = Watch()
    started, cpu_started = time.perf_counter(), cpu_seconds()
    tokenizer = Tokenizer.load(model)
    info = ModelInfo.load(model, tokenizer)
    encoder = RowEncoder(tokenizer, ChatTemplate.load(model), info, JobSettings())
    source = Source(path)
    loaded = time.perf_counter()
    marks: list[float] = []
    plan = build_plan(
        source,
        on_all_cores(encoder, info, source.size),
        folder,
        progress=lambda rows, size: marks.append(time.perf_counter()),
    )
    ended = time.perf_counter()
    peak = watch.stop()
    assert "torch" not in sys.modules, "planning must not load torch"
    return {
        "rows": plan.num_rows,
        "bad": plan.num_bad,
        "seconds": ended - started,
        "cpu_seconds": cpu_seconds() - cpu_started,
        "seconds_load": loaded - started,
        "seconds_encode": marks[-1] - loaded,
        "seconds_order": ended - marks[-1],
        "input_bytes": path.stat().st_size,
        "prompt_tokens": plan.prompt_tokens,
        "tokens_per_row": plan.prompt_tokens / plan.num_rows,
        "bound": plan.bound,
        "idle_bytes": idle["resident"],
        "peak_bytes_above_idle": peak["resident"] - idle["resident"],  # file-mapped pages of the arena included
        "peak_anonymous_bytes_above_idle": peak["anonymous"] - idle["anonymous"],
        "peak_file_mapped_bytes_above_idle": peak["file_mapped"] - idle["file_mapped"],
        "most_processes": peak["processes"],
    }


def cpu_seconds() -> float:
    """Processor seconds of this process and of those it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def family_memory() -> dict[str, int]:
    """Memory of this process and its children added up: pages that they share are counted in each."""
    total = memory_now() | {"processes": 1}
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        try:
            more = memory_now(child)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        total = {key: value + more.get(key, 1) for key, value in total.items()}
    return total


class Watch:
    """Samples the memory of this process and its children twenty times a second, and keeps the peaks."""

    def __init__(self) -> None:
        self.peak = family_memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.05):
            self.peak = {key: max(value, self.peak[key]) for key, value in family_memory().items()}

    def stop(self) -> dict[str, int]:
        self._ended.set()
        self._thread.join()
        return self.peak


def run(rows: int, scratch: Path) -> dict[str, float]:
    """One size in a process of its own."""
    path = scratch / f"{rows}.jsonl"
    write_rows(path, rows)
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        command = [sys.executable, "-m", "benchmarks.prove_scale", "--measure", str(path), "--folder", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    path.unlink()
    found: dict[str, float] = json.loads(done.stdout)
    found["load_average_before"] = busy
    print(
        f"{rows:>9,} rows of {found['tokens_per_row']:.1f} tokens: {found['seconds']:.1f} s "
        f"({found['cpu_seconds']:.1f} s of processor; {found['seconds_encode']:.1f} encode, "
        f"{found['seconds_order']:.1f} order), {found['peak_bytes_above_idle'] / 1e9:.2f} GB above idle "
        f"({found['peak_anonymous_bytes_above_idle'] / 1e9:.2f} anonymous) in {found['most_processes']} processes",
        flush=True,
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="the size of the first claim")
    parser.add_argument("--times", type=int, default=5, help="how many times larger the linear run is; 0: none")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help="folder for the rows, some hundred bytes each")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.folder)))
        return 0
    if not SHARED.exists():
        print(f"needs {SHARED}: the tokenizer and the prose")
        return 2
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        sizes = [arguments.rows, arguments.rows * arguments.times] if arguments.times else [arguments.rows]
        runs = [run(rows, Path(scratch)) for rows in sizes]
    scale = arguments.rows / 1_000_000
    claims = {
        "within_90_s": runs[0]["seconds"] <= SECONDS * scale,
        "within_1.5_GB": runs[0]["peak_bytes_above_idle"] <= MEMORY,
        "no_row_refused": all(found["bad"] == 0 for found in runs),
    }
    data: dict[str, object] = {"runs": runs, "claims": claims}
    if len(runs) == 2:
        data["time_ratio"] = runs[1]["seconds"] / runs[0]["seconds"]
        data["processor_ratio"] = runs[1]["cpu_seconds"] / runs[0]["cpu_seconds"]
        claims["linear"] = runs[1]["seconds"] <= RATIO * runs[0]["seconds"] * arguments.times / 5
    for claim, holds in claims.items():
        print(f"{claim}: {'holds' if holds else 'DOES NOT HOLD'}")
    if scale == 1 and len(runs) == 2:
        write_result("scale", data, SEED)
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
