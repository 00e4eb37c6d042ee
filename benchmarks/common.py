"""What every benchmark and proof shares: one JSON result that says on what it was measured.

It knows the repository and the machine's public facts; it must not know what any benchmark measures.
Nothing here imports torch, so that proofs of the torch-free half stay torch-free.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHARED = ROOT.parent / "shared"  # data and reference runners that are not part of the package; may be absent

PACKAGES = ("shoal", "torch", "transformers", "tokenizers", "numpy", "msgspec", "safetensors", "pyarrow")


def write_result(name: str, data: dict[str, Any], seed: int | None = None) -> Path:
    """Write benchmarks/results/<name>.json: where and when it was measured, then `data`. Returns the path."""
    record = {
        "name": name,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processor": processor_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": versions(),
        "seed": seed,
        **data,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def commit() -> str:
    """The commit measured, with `+` when tracked files differ from it; 'unknown' outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def processor_model() -> str:
    """The processor's own name for itself."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Python and the installed versions of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def memory_now(pid: int | str = "self") -> dict[str, int]:
    """Bytes of a process from /proc: anonymous, file-mapped, resident, and the peak of resident."""
    keys = {
        "RssAnon": "anonymous",
        "RssFile": "file_mapped",
        "RssShmem": "shared",
        "VmRSS": "resident",
        "VmHWM": "peak",
    }
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in keys:
            found[keys[key]] = int(value.split()[0]) * 1024
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
