"""README's section for a first job, word for word in an empty folder: it prints what the section says."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.readme import FIRST_JOB, missing, walk

KILLED, CLEAN, SOME_FAIL = 137, 0, 3


def test_the_first_job_goes_as_the_readme_says(tmp_path: Path) -> None:
    program = tmp_path / ".venv" / "bin" / "shoal"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m shoal "$@"\n')
    program.chmod(0o755)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "demo").mkdir()  # as `make run` has
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = list(walk(FIRST_JOB, tmp_path, environment))
    assert not [(command, printed) for command, code, printed in done if code == -1]
    codes = {command: code for command, code, _ in done}
    assert all(code in (CLEAN, SOME_FAIL, KILLED) for code in codes.values()), done
    named = [command.split("shoal ")[1].split()[0] for command in codes if "bin/shoal" in command]
    assert {"lint", "explain", "run", "report", "retry"} <= set(named)
    assert any("KILL" in command for command in codes)
    with (tmp_path / "examples" / "first.csv").open() as file:
        asked = sum(1 for _ in file) - 1
    for name in ("labels.csv", "again.csv"):
        with (tmp_path / "demo" / name).open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["id"] for row in rows] == [str(number) for number in range(1, asked + 1)]
        assert {json.loads(row["answer"])["label"] for row in rows} <= {"positive", "negative"}


def test_a_line_that_is_not_printed_is_found() -> None:
    printed = "rows   240 rows: 239 ok,\n       1 failed\ntime   3 s"
    assert missing(["rows  240 rows: 239 ok, 1 failed", "time … s"], printed) == []
    assert missing(["240 rows: 240 ok", "time … min"], printed) == ["240 rows: 240 ok", "time … min"]
