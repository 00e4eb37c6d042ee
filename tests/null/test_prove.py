"""A result older than a change to what it proves counts as missing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import prove


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one proof of shoal/a.py."""
    for name in ("ROOT", "HERE", "RESULTS"):
        monkeypatch.setattr(prove, name, tmp_path / {"ROOT": "", "HERE": "benchmarks", "RESULTS": "results"}[name])
    for name in ("shoal/a.py", "shoal/b.py", "benchmarks/common.py"):
        write(tmp_path, name, "1")
    write(tmp_path, "benchmarks/prove_it.py", 'PROVES = ("shoal/a.py",)\n')
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text(text)


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@e"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(root: Path) -> str:
    git(root, "add", "-A")
    git(root, "commit", "-qm", "now", "--allow-empty")
    return git(root, "rev-parse", "HEAD")


def why(root: Path) -> str:
    return prove.why_again("it", prove.proofs()["it"])


def result(root: Path, **fields: object) -> None:
    write(root, "results/it.json", json.dumps(fields))


def test_a_proof_without_a_result_runs(repository: Path) -> None:
    assert why(repository) == "no result yet"


def test_a_result_holds_until_what_it_proves_changes(repository: Path) -> None:
    result(repository, commit=commit(repository))
    assert why(repository) == ""
    write(repository, "shoal/b.py", "2")
    commit(repository)
    assert why(repository) == ""
    write(repository, "shoal/a.py", "2")
    assert why(repository) == "shoal/a.py changed since"
    result(repository, commit=commit(repository))
    assert why(repository) == ""


@pytest.mark.parametrize("name", ["benchmarks/prove_it.py", "benchmarks/common.py"])
def test_a_result_is_also_its_script_s(repository: Path, name: str) -> None:
    result(repository, commit=commit(repository))
    write(repository, name, (repository / name).read_text() + "\n# changed")
    assert why(repository) == f"{name} changed since"


def test_a_result_of_no_known_commit_shows_nothing(repository: Path) -> None:
    head = commit(repository)
    result(repository, commit=head + "+")
    assert why(repository) == "measured with uncommitted changes"
    result(repository, commit="0" * 40)
    assert "unknown here" in why(repository)
    result(repository, commit=head, shown=False)
    assert why(repository) == "it was not shown last time"


def test_a_failed_proof_keeps_its_numbers_and_runs_again(repository: Path) -> None:
    result(repository, commit=commit(repository), number=1)
    prove.mark_not_shown(repository / "results" / "it.json")
    assert json.loads((repository / "results/it.json").read_text())["number"] == 1
    assert why(repository)


def test_a_proof_that_names_nothing_depends_on_the_whole_package(repository: Path) -> None:
    write(repository, "benchmarks/prove_all.py", "")
    assert "shoal" in prove.depends_on(repository / "benchmarks" / "prove_all.py")
