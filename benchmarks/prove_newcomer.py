"""Proof that README's two commands work for a newcomer: a fresh clone, a fresh environment, the words as they stand.

The first command ends in under 5 minutes, downloads apart, with every row of the example answered; then the commands
of the section on a first job print what it says; the second command of all passes.
Downloads are timed apart: the same wheels are fetched once, into a folder, before the clock starts.

    python -m benchmarks.prove_newcomer [--first-only]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import ROOT, write_result
from benchmarks.readme import FIRST_JOB, walk

LIMIT = 300.0  # seconds for the first command
BUILD_NEEDS = ("scikit-build-core", "nanobind", "ninja", "cmake")


def commands() -> tuple[str, str]:
    """The first two commands of the README's first block."""
    block = re.search(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block, "README.md has no block of commands"
    lines = [line.split("#")[0].strip() for line in block[1].splitlines() if line.strip()]
    assert len(lines) >= 2, lines
    return lines[0], lines[1]


def timed(command: str, folder: Path, environment: dict[str, str]) -> tuple[float, int, str]:
    """Run a shell command, its output shown and kept: seconds, exit code, output."""
    print(f"\n$ {command}", flush=True)
    began = time.monotonic()
    with subprocess.Popen(
        command, shell=True, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return time.monotonic() - began, process.returncode, "".join(lines)


def clean_environment(links: Path) -> dict[str, str]:
    """The environment of somebody with nothing set, but for the wheels already fetched."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VIRTUAL_ENV", "PYTHON", "SHOAL_", "MAKE"))
    }
    python = Path(sys.executable).parent
    kept["PATH"] = os.pathsep.join(p for p in kept["PATH"].split(os.pathsep) if Path(p) != python)
    return kept | {"PIP_FIND_LINKS": str(links), "PIP_NO_INDEX": "1"}


def fetch(clone: Path, links: Path) -> float:
    """Fetch every wheel that the two commands install; seconds."""
    dependencies = re.findall(r'^    "([\w>=.\[\]-]+)",$', (clone / "pyproject.toml").read_text(), re.MULTILINE)
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(links), "-c", "constraints.txt"]
        + [*dependencies, *BUILD_NEEDS],
        cwd=clone,
        check=True,
    )
    return time.monotonic() - began


def answered(clone: Path) -> tuple[int, int]:
    """Rows of the example, and lines of its answer."""
    rows = sum(bool(line.strip()) for line in (clone / "examples" / "reviews.jsonl").read_text("utf-8").splitlines())
    answers = (clone / "demo" / "answers.jsonl").read_text("utf-8").splitlines()
    return rows, sum(json.loads(line)["response"]["status_code"] == 200 for line in answers)


def first_job(clone: Path, environment: dict[str, str]) -> tuple[float, list[str], list[str]]:
    """Follow the section on a first job: seconds, each command with its exit code, and what did not come as it says."""
    began = time.monotonic()
    done, wrong = [], []
    for command, code, printed in walk(FIRST_JOB, clone, environment):
        print(f"\n$ {command}\n{printed}[{code}]", flush=True)
        (wrong if code == -1 else done).append(command if code == -1 else f"{command} [{code}]")
    return time.monotonic() - began, done, wrong


def main() -> int:
    """Do what the README says, and say how long it took; 1 when the claim does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--first-only", action="store_true", help="leave out the tests; writes no result")
    first_only = parser.parse_args().first_only
    first, second = commands()
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
        clone, links = Path(folder) / "shoal", Path(folder) / "wheels"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, check=True, capture_output=True, text=True)
        download_seconds = fetch(clone, links)
        environment = clean_environment(links)
        first_seconds, first_code, _ = timed(first, clone, environment)
        rows, answers = answered(clone) if first_code == 0 else (0, 0)
        again_seconds, again_code, _ = timed(first, clone, environment)
        job_seconds, job, wrong = first_job(clone, environment) if first_code == 0 else (0.0, [], ["not tried"])
        second_seconds, second_code, output = (0.0, 0, "") if first_only else timed(second, clone, environment)
    closing = re.findall(r"^.*\d+ passed.*$", output, re.MULTILINE)
    result = {
        "commit": head.stdout.strip(),  # what was cloned, whatever happened here meanwhile
        "first_command": first,
        "second_command": second,
        "download_seconds": round(download_seconds, 1),
        "first_seconds": round(first_seconds, 1),
        "first_again_seconds": round(again_seconds, 1),
        "first_job_seconds": round(job_seconds, 1),
        "first_job": job,
        "first_job_wrong": wrong,
        "second_seconds": round(second_seconds, 1),
        "rows": rows,
        "answered": answers,
        "tests": closing[-1].strip("= ") if closing else "",
        "limit_seconds": LIMIT,
    }
    holds = first_code == again_code == second_code == 0 and rows == answers > 0 and first_seconds < LIMIT and not wrong
    print("\n" + json.dumps(result, indent=1))
    print("holds" if holds else "DOES NOT HOLD")
    if not first_only:
        write_result("newcomer", result)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
