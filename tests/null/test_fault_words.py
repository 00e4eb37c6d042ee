"""Every failure says whose it is: one table has all codes, and the documents say the same."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from shoal.core.errors import FAULTS, fault_of

ROOT = Path(__file__).resolve().parents[2]


def codes_in(path: Path) -> set[str]:
    """The codes that a module gives to RowError by name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "RowError":
            given = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "code")]
            found |= {one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str)}
    return found


def test_every_code_that_is_raised_has_its_fault() -> None:
    raised = set().union(*(codes_in(path) for path in (ROOT / "shoal").rglob("*.py")))
    assert len(raised) > 15 and raised <= FAULTS.keys()


def test_the_document_says_the_same_of_every_code() -> None:
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (yours|ours|transient) \| ((?:`\w+` ?)+) \|", text, re.MULTILINE)
    assert {code: fault for fault, codes in rows for code in re.findall(r"`(\w+)`", codes)} == FAULTS


def test_a_code_that_nobody_knows_is_ours() -> None:
    assert fault_of("no_such_code") == "ours"
