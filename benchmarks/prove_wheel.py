"""Proof that the wheel runs elsewhere than where it was built: on emulated processors without AVX-512 and AVX2, with no
compiler in reach, it gives the tokens that the same instruction set gives here.

It knows pip, and the emulator qemu-x86_64 (Debian's qemu-user), whose processors stop a program at the first
instruction they lack; it must not know how the kernels choose. An emulated process cannot start another emulated one,
so the engine runs in the process itself.

    python -m benchmarks.prove_wheel [--tokens 8]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, write_result

PROVES = ("shoal/kernels", "CMakeLists.txt", "pyproject.toml")
BUILD_SECONDS = 60.0  # for `pip install .`, its dependencies apart
PROCESSORS = {"Haswell": "avx2", "Nehalem": "scalar"}  # qemu's name: the instruction set that has to be chosen
MODES = ("fp32", "bf16", "int8", "int4")
EMULATOR = "qemu-x86_64"


def build(folder: Path) -> float:
    """Install the package alone, as a user's machine would build it; seconds."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, "-m", "pip", "--quiet", "install", ".", "--no-deps", "--target", str(folder)]
    began = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return time.monotonic() - began


def inside(tokens: int) -> dict[str, Any]:
    """Answer a prompt in each mode of weights with the package's own model; what chose the kernels, and the answers."""
    from array import array

    import shoal
    from shoal.build import build_engine
    from shoal.client import InProcess
    from shoal.core.config import EngineConfig
    from shoal.core.types import TOKEN, Request, Sampling

    compilers = [name for name in ("cc", "gcc", "g++", "clang", "clang++", "cmake", "ninja") if shutil.which(name)]
    answers, chosen = {}, set()
    for mode in MODES:
        built = build_engine(EngineConfig(weights=mode, threads=1, memory_bytes=8 << 20))
        chosen.add(built.facts.kernels)
        backend = InProcess(built.engine)
        prompts = [array(TOKEN, range(300, 300 + length)) for length in (5, 40)]
        backend.submit([Request(str(row), prompt, Sampling(max_tokens=tokens)) for row, prompt in enumerate(prompts)])
        found = {}
        while built.engine.busy:
            news = backend.outputs()
            found.update({output.id: list(output.tokens) for output in news.outputs} if news else {})
        built.close()
        answers[mode] = found
    package = str(Path(shoal.__file__).parent)
    return {"package": package, "kernels": sorted(chosen), "compilers": compilers, "answers": answers}


def run(command: list[str], package: Path, tokens: int, **variables: str) -> dict[str, Any]:
    """`inside` in a process that has the installed package, and no program but its own interpreter in reach."""
    script = package.parent / "inside.py"
    shutil.copy(__file__, script)
    # -S: a checkout installed as editable would be found before PYTHONPATH.
    places = [str(package), str(ROOT), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    environment = {"PATH": str(package.parent / "nothing"), "PYTHONPATH": ":".join(places), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(
        [*command, sys.executable, "-S", str(script), "--inside", "--tokens", str(tokens)], cwd=package.parent,
        env={**environment, **variables}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert Path(found.pop("package")).is_relative_to(package), "another installation of the package was loaded"
    return {**found, "seconds": time.monotonic() - began}


def main() -> int:
    """Print what each processor gave; 1 when one gave anything else than this machine."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        print(json.dumps(inside(asked.tokens)))
        return 0
    emulator = shutil.which(EMULATOR)
    if emulator is None:
        print(f"{EMULATOR} is not here (Debian: qemu-user): nothing is shown")
        return 1
    with tempfile.TemporaryDirectory() as name:
        package = Path(name) / "package"
        seconds = build(package)
        print(f"pip install .: {seconds:.0f} s", flush=True)
        holds, found = {f"built in under {BUILD_SECONDS:.0f} s": seconds < BUILD_SECONDS}, {}
        for processor, kernels in PROCESSORS.items():
            here = run([], package, asked.tokens, SHOAL_ISA=kernels)
            there = run([emulator, "-cpu", processor], package, asked.tokens)
            found[processor] = {"here": here, "there": there}
            chosen, same = there["kernels"] == here["kernels"] == [kernels], there["answers"] == here["answers"]
            holds[f"{processor}: {kernels} chosen, the same tokens, no compiler"] = (
                chosen and same and not there["compilers"]
            )
            print(f"{processor}: {there['kernels']} in {there['seconds']:.0f} s, same tokens: {same}", flush=True)
    for claim, held in holds.items():
        print(f"{claim}: {'holds' if held else 'DOES NOT HOLD'}")
    write_result("wheel", {"build_seconds": seconds, "processors": found, "holds": holds, "shown": all(holds.values())})
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
