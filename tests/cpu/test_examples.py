"""The programs in examples/ run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if path.name == "stream.py":
        numbers = [int(number) for number in re.findall(r"^row (\d+): ", done.stdout, re.MULTILINE)]
        assert len(numbers) == len(set(numbers)) == 50 and max(numbers) <= 50 + 64
        assert done.stdout.splitlines()[-1].startswith(tuple(f"{n} rows answered" for n in range(50, 115)))
