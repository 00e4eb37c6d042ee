"""README's commands and what it says they print, so that both can be tried as they stand.

It knows the document's blocks; it must not know what any command does. In a section a block of `sh` holds commands, and
the block of `text` after it lines that they print: in any width, with … for what is another at each time.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.common import ROOT

FIRST_JOB = "Your first real job"


def steps(section: str) -> Iterator[tuple[list[str], list[str]]]:
    """The commands of each block of a section, and the lines they are said to print."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(section)}\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    assert found, f"README.md has no section {section!r}"
    blocks = re.findall(r"^```(sh|text)\n(.*?)^```", found[1], re.DOTALL | re.MULTILINE)
    for number, (kind, inside) in enumerate(blocks):
        if kind == "sh":
            said = blocks[number + 1][1] if blocks[number + 1 : number + 2] and blocks[number + 1][0] == "text" else ""
            yield inside.splitlines(), said.splitlines()


def missing(said: list[str], output: str) -> list[str]:
    """Lines that are said to be printed, and were not."""
    words = " ".join(output.split())
    return [line for line in said if not re.search(pattern(line), words)]


def pattern(line: str) -> str:
    """A line as an expression: … stands for anything."""
    return ".*?".join(re.escape(" ".join(part.split())) for part in line.split("…"))


def walk(section: str, folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[tuple[str, int, str]]:
    """Do what a section says, in this folder: of each command its exit code and what it printed, or the lines of the
    README that were not printed, as a command of their own that fails."""
    for commands, said in steps(section):
        printed = ""
        for command in commands:
            done = subprocess.run(
                command, shell=True, cwd=folder, env=environment, text=True, encoding="utf-8", errors="replace",
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
            printed += done.stdout
            yield command, done.returncode, done.stdout
        for line in missing(said, printed):
            yield f"README says: {line}", -1, printed
