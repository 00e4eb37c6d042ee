"""The kernels for ARM, built for it as CMakeLists.txt says and run by an emulator, against plain loops (tests/arm)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "shoal/kernels/csrc"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in (COMPILER, EMULATOR) if not shutil.which(tool)]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")


def cmake_list(pattern: str) -> list[str]:
    """The words of the one thing in CMakeLists.txt that the pattern finds."""
    (found,) = re.findall(pattern, (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    return str(found).split()


def sets_of_flags() -> dict[str, list[str]]:
    """The sets of an ARM machine, each with its own flags."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    (branch,) = re.findall(r"MATCHES \"aarch64[^\n]*\n(.*?)\nelse", text, re.DOTALL)
    return {words[0]: words[1:] for words in map(str.split, re.findall(r"add_kernels\(([^)]*)\)", branch))}


def compile_all(folder: Path) -> Path:
    """The checks and the kernels of every set, in one program. With less optimisation than a wheel: it is emulated."""
    kernels = [Path(name).name for name in cmake_list(r"OBJECT ([^)]*)\)")]
    common = ["-O2" if flag == "-O3" else flag for flag in cmake_list(r"set\(KERNEL_FLAGS ([^)]*)\)")]
    jobs = [
        (folder / f"{name}-{file}.o", [*common, "-fPIC", *flags, f"-DSHOAL_SET={name}", str(CSRC / file)])
        for name, flags in sets_of_flags().items()
        for file in kernels
    ]
    plain = [CSRC / f"{name}.cpp" for name in ("sets", "plan", "threads")] + sorted((ROOT / "tests/arm").glob("*.cpp"))
    jobs += [(folder / f"{path.name}.o", ["-O2", "-ffp-contract=off", f"-I{CSRC}", str(path)]) for path in plain]

    def build(job: tuple[Path, list[str]]) -> None:
        run([COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", *job[1], "-c", "-o", str(job[0])])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, sorted(jobs, key=lambda job: "attention" not in job[0].name)))
    run([COMPILER, "-static", "-pthread", "-o", str(folder / "check"), *(str(target) for target, _ in jobs)])
    return folder / "check"


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def test_each_machine_runs_its_own_sets_and_all_agree_with_plain_loops(tmp_path: Path) -> None:
    """Sums, norms, attention, draws; a row alone and among others. The second machine multiplies no pairs of bf16, and
    would stop at an instruction that does."""
    program = compile_all(tmp_path)
    for machine, sets in (("max", "neon_bf16 neon scalar"), ("cortex-a72", "neon scalar")):
        lines = run([EMULATOR, "-cpu", machine, str(program)]).splitlines()
        assert lines[0] == f"sets: {sets}"
        held = re.fullmatch(r"held: (\d+) failed: 0", lines[-1])
        assert held and int(held[1]) > 10_000 * len(sets.split())
