"""Sizes that a reader can hold: lines, functions, flags, fields, and excepts that catch everything."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from typer.core import TyperOption

from shoal.cli import build_command
from shoal.core.config import EngineConfig
from shoal.jobs.options import JobOptions

ROOT = Path(__file__).resolve().parents[2]
FILE_LINES, FUNCTION_LINES = 400, 60
CPP_FILE_LINES, CPP_FUNCTION_LINES = 600, 120
FLAGS, ENGINE_FIELDS, JOB_FIELDS = 24, 40, 24
BROAD_EXCEPTS = 3  # in the package, each with its reason beside it: tokenizers, templates and forecasts raise anything
VARIABLES = {"SHOAL_ISA", "SHOAL_PEER_"}  # read from the environment besides flags; the latter begins several


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def everything() -> list[Path]:
    return python_files("shoal", "tests", "benchmarks", "tools")


def cpp_files() -> list[Path]:
    return sorted(path for path in (ROOT / "shoal").rglob("*") if path.suffix in {".cpp", ".h"})


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def cpp_functions(text: str) -> Iterator[tuple[str, int]]:
    """Blocks that open after a parenthesis, outermost first; namespaces, classes and tables are looked through."""
    depth, inside, begin, head = 0, -1, 0, ""
    for number, line in enumerate(text.splitlines(), start=1):
        code = re.sub(r'//.*|"(\\.|[^"\\])*"', "", line)
        for sign in code:
            if sign == "{":
                if inside < 0 and ")" in code.split("{")[0]:
                    inside, begin, head = depth, number, line.strip()
                depth += 1
            elif sign == "}":
                depth -= 1
                if depth == inside:
                    yield head, number - begin + 1
                    inside = -1


def test_python_files_fit_in_a_head() -> None:
    long = {name(p): n for p in everything() if (n := num_lines(p)) > FILE_LINES}
    assert not long


def test_python_functions_fit_on_a_screen() -> None:
    long = {f"{name(p)}: {f}": n for p in everything() for f, n in functions(p) if n > FUNCTION_LINES}
    assert not long


def test_cpp_files_and_functions_keep_their_budget() -> None:
    assert not {name(p): n for p in cpp_files() if (n := num_lines(p)) > CPP_FILE_LINES}
    long = {
        f"{name(p)}: {f}": n
        for p in cpp_files()
        for f, n in cpp_functions(p.read_text(encoding="utf-8"))
        if n > CPP_FUNCTION_LINES
    }
    assert not long


def test_cpp_functions_are_seen() -> None:
    text = "namespace a {\nclass B {\n  int f(int x) {\n    if (x) {\n    }\n    return x;\n  }\n};\n}\n"
    assert list(cpp_functions(text)) == [("int f(int x) {", 5)]


def test_every_module_says_what_it_knows() -> None:
    silent = [name(p) for p in python_files("shoal") if not ast.get_docstring(ast.parse(p.read_text("utf-8")))]
    assert not silent


def is_broad(handler: ast.ExceptHandler) -> bool:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(c is None or (isinstance(c, ast.Name) and c.id in {"Exception", "BaseException"}) for c in caught)


def test_broad_excepts_are_counted_and_explained() -> None:
    found, silent = [], []
    for path in python_files("shoal"):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler) and is_broad(node):
                place = f"{name(path)}:{node.lineno}"
                found.append(place)
                if not any("#" in line for line in lines[node.lineno - 2 : node.lineno + 1]):
                    silent.append(place)
    assert not silent
    assert len(found) == BROAD_EXCEPTS, found


def test_nothing_is_left_for_later() -> None:
    left = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")
    assert not [name(p) for p in [*everything(), *cpp_files()] if left.search(p.read_text(encoding="utf-8"))]


def test_commands_have_few_flags() -> None:
    commands = build_command().commands
    flags = {name: [p for p in command.params if isinstance(p, TyperOption)] for name, command in commands.items()}
    counts = {name: sum(not p.required for p in found) for name, found in flags.items()}  # required ones are arguments
    assert counts and max(counts.values()) <= FLAGS, counts


def test_configurations_have_few_fields() -> None:
    assert len(dataclasses.fields(EngineConfig)) <= ENGINE_FIELDS
    assert len(dataclasses.fields(JobOptions)) <= JOB_FIELDS


def test_the_environment_is_read_for_flags_and_little_else() -> None:
    seen = {
        found
        for path in python_files("shoal")
        for found in re.findall(r"""["'](SHOAL_[A-Z][A-Z_]*)["']""", path.read_text(encoding="utf-8"))
    }
    assert seen <= VARIABLES
