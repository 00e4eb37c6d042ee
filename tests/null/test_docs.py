"""What the documents say exists, and the README's table of flags is the command's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.core import TyperOption

from shoal.cli import build_command

ROOT = Path(__file__).resolve().parents[2]
PATHS = re.compile(r"`((?:shoal|tests|benchmarks|docs|tools|examples|\.ci)/[\w./*-]*)`")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/map.md", "docs/invariants.md"])
def test_every_path_a_document_names_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = PATHS.findall(text) + re.findall(r"\]\(([\w./-]+)\)", text)
    base = ROOT / document
    missing = [p for p in named if not list(ROOT.glob(p.rstrip("/"))) and not (base.parent / p).exists()]
    assert named and not missing


def test_the_map_has_every_package() -> None:
    text = (ROOT / "docs/map.md").read_text(encoding="utf-8")
    packages = {path.parent.name for path in (ROOT / "shoal").glob("*/__init__.py")}
    assert not {name for name in packages if f"shoal/{name}/" not in text}


def test_the_map_has_every_proof() -> None:
    text = (ROOT / "docs/map.md").read_text(encoding="utf-8")
    assert not {
        path.name for path in (ROOT / "benchmarks").glob("prove_*.py") if f"`benchmarks/{path.name}`" not in text
    }


def test_the_readme_has_every_flag_of_run() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = {flag for row in re.findall(r"^\| `-[^|]*\|", text, re.MULTILINE) for flag in re.findall(r"--[\w-]+", row)}
    options = [p for p in build_command().commands["run"].params if isinstance(p, TyperOption)]
    assert table == {name for option in options for name in option.opts if name.startswith("--")}
    assert build_command().commands.keys() <= set(re.findall(r"`shoal ([\w-]+)", text))


def test_the_readme_has_every_exit_code() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\d) \|", text, re.MULTILINE) == list("012345")


def test_the_first_block_of_the_readme_is_the_two_commands() -> None:
    block = re.search(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block and [line.split("#")[0].split() for line in block[1].splitlines()] == [
        ["make", "run"],
        ["make", "test"],
    ]
