"""A batch file of 10,000 mutated lines: no crash, one result line for each, counts that add up, bounded memory.

It knows the mutations of the tests and the files a job leaves; it must not know how a job is carried out.
A second, small file of good lines is the control for memory.

    python benchmarks/prove_bad_file.py [--lines 10000] [--model DIR] [--seed 1]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil
from common import ROOT, memory_now, write_result

sys.path.insert(0, str(ROOT / "tests" / "null"))

from mutate import good_request, mutants, write_file

HUGE_LINES = 5
SLACK = 512 << 20  # bytes that broken lines may cost beyond what good lines cost: a few chunks of lines at the limit,
# and what the memory allocator keeps of them for each of the tokenizer's threads
LEVEL = 128 << 20  # bytes by which reading twice as many broken lines may differ: half of what the first half costs
READ_LINES = 30_000
EXIT_SOME_FAILED = 3


def rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, content) of every line that is not blank, one in memory at a time."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.rstrip(b"\n")


def custom_id(raw: bytes) -> str:
    """The custom_id that an answered line must carry."""
    found = json.loads(raw)
    if "x_shoal" in found and found["x_shoal"] is not None:
        found = found["x_shoal"]["request"]
    return str(found["custom_id"])


def check(source: Path, output: Path, errors: Path, report: dict[str, Any], exit_code: int) -> dict[str, Any]:
    """What is wrong with the end of a job, in words, and the counts. No words: every line ended exactly once."""
    wrong: list[str] = []
    failed = [json.loads(line) for line in errors.read_bytes().splitlines()] if errors.exists() else []
    answered = [json.loads(line) for line in output.read_bytes().splitlines()]
    failed_lines = [line["x_shoal"]["line"] for line in failed]
    if failed_lines != sorted(set(failed_lines)):
        wrong.append("error lines are not in input order, or one came twice")
    failing = set(failed_lines)
    total, next_answer = 0, iter(answered)
    for number, raw in rows(source):
        total += 1
        if number in failing:
            failing.discard(number)
            continue
        answer = next(next_answer, None)
        if answer is None or answer["custom_id"] != custom_id(raw):
            wrong.append(f"line {number} is neither the next line of the output nor among the errors")
            break
    if failing or next(next_answer, None) is not None:
        wrong.append("there are more results than lines")
    counts = {"total": total, "ok": len(answered), "failed": len(failed)}
    for name, value in counts.items():
        if report["rows"][name] != value:
            wrong.append(f"the report says {name} {report['rows'][name]}, the files {value}")
    if counts["ok"] + counts["failed"] != total:
        wrong.append("output and error lines do not add up to the input's")
    if exit_code != (EXIT_SOME_FAILED if failed else 0):
        wrong.append(f"exit code {exit_code}")
    for line in failed:
        if set(line) != {"id", "custom_id", "response", "error", "x_shoal"}:
            wrong.append(f"the error line of line {line['x_shoal']['line']} has another shape")
            break
    codes: dict[str, int] = {}
    for line in failed:
        code = line["response"]["body"]["error"]["code"]
        codes[code] = codes.get(code, 0) + 1
    return {"wrong": wrong, "counts": counts, "error_codes": dict(sorted(codes.items()))}


def run(source: Path, output: Path, model: str) -> dict[str, Any]:
    """Run a job to its end; its exit code, seconds, messages and the peak memory of its reading process."""
    command = [sys.executable, "-m", "shoal", "run", "-i", str(source), "-o", str(output), "--quiet"]
    command += ["--model", model] if model else []
    began, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as messages:
        process = psutil.Popen(command, cwd=ROOT, stdout=messages, stderr=subprocess.STDOUT)
        while process.poll() is None:
            try:
                peak = max(peak, process.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.02)
        code = process.wait()
        messages.seek(0)
        text = messages.read()[-2000:].decode("utf-8", "replace")
    return {"exit_code": code, "seconds": time.monotonic() - began, "peak_bytes": peak, "messages": text}


def read_only(lines: int, model: str, seed: int) -> int:
    """Read, check and tokenize mutated lines in batches as a job does; this process's peak memory in bytes."""
    from shoal.jobs.encode import RowEncoder
    from shoal.jobs.settings import JobSettings
    from shoal.text.chat import ChatTemplate
    from shoal.text.checkpoint import ModelInfo, resolve_model
    from shoal.text.tokenizer import Tokenizer

    folder = resolve_model(model)
    tokenizer = Tokenizer.load(folder)
    encoder = RowEncoder(tokenizer, ChatTemplate.load(folder), ModelInfo.load(folder, tokenizer), JobSettings())
    batch: list[bytes | None] = []
    size = 0
    for mutant in mutants(lines, seed):
        batch.append(mutant.raw)
        size += len(mutant.raw)
        if len(batch) >= 2048 or size >= 8 << 20:
            encoder.encode(batch)
            batch, size = [], 0
    encoder.encode(batch)
    return memory_now()["peak"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--model", default="", help="a checkpoint with a chat template; the embedded one if left out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--read-only", type=int, help="only read so many lines, and print the peak memory")
    options = parser.parse_args()
    if options.read_only is not None:
        print(read_only(options.read_only, options.model, options.seed))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good, bad = folder / "good.jsonl", folder / "bad.jsonl"
        kinds = write_file(bad, mutants(options.lines, options.seed, HUGE_LINES))
        write_good(good, 100, options.seed)
        control = run(good, folder / "good.out.jsonl", options.model)
        result = run(bad, folder / "bad.out.jsonl", options.model)
        report = folder / "bad.out.jsonl.shoal" / "report.json"
        found: dict[str, Any] = {"wrong": [f"no report: {result['messages']}"]}
        if report.exists():
            values = json.loads(report.read_text())
            found = check(bad, folder / "bad.out.jsonl", folder / "bad.out.errors.jsonl", values, result["exit_code"])
    if control["exit_code"] != 0:
        found["wrong"].append(f"the control ended with {control['exit_code']}: {control['messages']}")
    if result["peak_bytes"] > control["peak_bytes"] + SLACK:
        found["wrong"].append("the broken lines cost more memory than a few lines at the limit")
    peaks = {str(n): read_in_process(n, options.model, options.seed) for n in (READ_LINES, 2 * READ_LINES)}
    if peaks[str(2 * READ_LINES)] > peaks[str(READ_LINES)] + LEVEL:
        found["wrong"].append("memory grows with the number of lines")
    data = {"lines": options.lines, "kinds": kinds, "run": result, "control": control, "read_only": peaks, **found}
    print(json.dumps(data, indent=1))
    path = write_result("bad_file", data, options.seed)
    print(f"{'FAILED: ' + '; '.join(found['wrong']) if found['wrong'] else 'every line ended exactly once'}: {path}")
    return 1 if found["wrong"] else 0


def read_in_process(lines: int, model: str, seed: int) -> int:
    """`read_only` in a fresh process."""
    command = [sys.executable, __file__, "--read-only", str(lines), "--model", model, "--seed", str(seed)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def write_good(path: Path, count: int, seed: int) -> None:
    """A file of good lines only."""
    rng = Random(seed)
    path.write_text("".join(json.dumps(good_request(rng, number)) + "\n" for number in range(count)))


if __name__ == "__main__":
    sys.exit(main())
