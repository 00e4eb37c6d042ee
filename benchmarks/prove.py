"""Run the proofs, `prove_*.py`, one after the other, leaving out those whose results still hold.

A result holds when it was measured on a clean commit and nothing it depends on has changed since. What a proof depends
on is its own file, `common.py` and the paths in its constant PROVES (the whole package when it has none). It must not
know what any proof measures.

    python -m benchmarks.prove [--list] [--again] [NAME …]
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import RESULTS, ROOT

HERE = Path(__file__).resolve().parent
WHOLE_PACKAGE = ("shoal", "pyproject.toml", "constraints.txt", "CMakeLists.txt")


def proofs() -> dict[str, Path]:
    """All proofs by name."""
    return {path.stem.removeprefix("prove_"): path for path in sorted(HERE.glob("prove_*.py"))}


def depends_on(path: Path) -> list[str]:
    """The paths a proof's result depends on, relative to the repository."""
    found: tuple[str, ...] = WHOLE_PACKAGE
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["PROVES"]:
            found = tuple(ast.literal_eval(node.value))
    return [*found, str(path.relative_to(ROOT)), "benchmarks/common.py"]


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def why_again(name: str, path: Path) -> str:
    """Why the proof has to run; nothing when its result still holds."""
    result = RESULTS / f"{name}.json"
    if not result.exists():
        return "no result yet"
    record = json.loads(result.read_text())
    if not record.get("shown", True):
        return "it was not shown last time"
    commit = str(record.get("commit", ""))
    if commit.endswith("+"):
        return "measured with uncommitted changes"
    compared = git("diff", "--name-only", commit, "--", *depends_on(path))
    if compared.returncode:
        return f"its commit {commit or '(none)'} is unknown here"
    changed = compared.stdout.split()
    return f"{changed[0]} changed since" if changed else ""


def mark_not_shown(result: Path) -> None:
    """Keep the numbers of a proof that failed, with a word that they show nothing."""
    if result.exists():
        record = json.loads(result.read_text()) | {"shown": False}
        result.write_text(json.dumps(record, indent=1) + "\n")


def main() -> int:
    """Run what has to run; 1 when a proof fails or a name is unknown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", help="only these proofs")
    parser.add_argument("--again", action="store_true", help="run them even where their results hold")
    parser.add_argument("--list", action="store_true", help="say what would run, and why")
    wanted = parser.parse_args()
    known = proofs()
    if unknown := set(wanted.names) - set(known):
        print(f"no proof is named {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return 1
    failed = []
    for name, path in known.items():
        if wanted.names and name not in wanted.names:
            continue
        reason = "asked for" if wanted.again else why_again(name, path)
        print(f"{name}: {f'runs ({reason})' if reason else 'holds'}", flush=True)
        if not reason or wanted.list:
            continue
        began = time.monotonic()
        # The repository is on the path, so that a proof finds the package's own tests and common.py by either name.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        code = subprocess.run([sys.executable, str(path)], cwd=ROOT, env=environment, check=False).returncode
        print(
            f"{name}: {'shown' if code == 0 else f'NOT SHOWN (exit {code})'}, {time.monotonic() - began:.0f} s",
            flush=True,
        )
        if code:
            failed.append(name)
            mark_not_shown(RESULTS / f"{name}.json")
    if not wanted.list:
        print(f"not shown: {', '.join(failed)}" if failed else "every proof holds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
