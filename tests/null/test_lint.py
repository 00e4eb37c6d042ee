"""lint's verdict on every line is a run's, and what it repairs a run answers."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from echo_job import EchoJob, chat, completion
from mutate import mutants, write_file
from rich.console import Console

from shoal.core.errors import UsageError
from shoal.jobs.options import JobOptions
from shoal.preview.command import SOME_FAIL, lint, run_lint
from shoal.preview.fix import _Repairing
from shoal.preview.lint import Lint, check
from shoal.preview.look import look

CONTEXT = 8192  # of the embedded model


def options(path: Path, **more: Any) -> JobOptions:
    return JobOptions(input=path, output=path.with_name("nothing"), **more)


def file(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def codes(found: Lint) -> dict[int, str]:
    return {fault.line: fault.code for fault in found.faults}


@pytest.mark.parametrize(("seed", "strict"), [(1, False), (2, False), (3, True)])
def test_its_verdict_on_every_line_is_that_of_a_run(tmp_path: Path, seed: int, strict: bool) -> None:
    path = tmp_path / "in.jsonl"
    write_file(path, mutants(400, seed, huge_lines=1))
    found = lint(options(path, strict=strict))
    job = EchoJob(tmp_path, [], options={"strict": False})
    if strict:  # a run refuses such a file as a whole, so the malformed lines are taken out first
        raw = path.read_bytes().split(b"\n")
        malformed = {"invalid_json_line", "line_too_long", "malformed_row", "missing_field"}
        raw = [b"" if codes(found).get(number) in malformed else line for number, line in enumerate(raw, 1)]
        path.write_bytes(b"\n".join(raw))
        found = lint(options(path, strict=True))
        job = EchoJob(tmp_path, [], options={"strict": True})
    job.run()
    failures = {each["x_shoal"]["line"]: each["response"]["body"]["error"] for each in job.failures()}
    assert codes(found) == {line: error["code"] for line, error in failures.items()}
    assert {fault.line: fault.message for fault in found.faults} == {n: e["message"] for n, e in failures.items()}
    assert found.rows == job.report.rows.total and len(found.faults) > 50


def test_what_it_repairs_runs_and_nothing_else_changes(tmp_path: Path) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "fixed.jsonl"
    write_file(path, mutants(500, seed=5, huge_lines=1))
    long = completion(10_000, "fish", max_tokens=CONTEXT * 2)
    with path.open("a") as end:
        end.write("\n \n" + long + "\n" + long + "\n")
    found = lint(options(path), out)
    again = lint(options(out))
    assert len(again.faults) == found.left < len(found.faults)
    assert again.blank == 0 and found.blank > 0
    assert "duplicate_custom_id" not in codes(again).values()
    changed = {repair.line for repair in found.repairs}
    raw = path.read_bytes().split(b"\n")
    kept = [line for number, line in enumerate(raw, 1) if line.strip() and number not in changed]
    fixed = out.read_bytes().split(b"\n")
    assert [line for line in fixed if line in set(kept)] == kept
    assert len(fixed) - 1 == found.rows == again.rows


def test_a_limit_is_clamped_to_the_rest_of_the_context(tmp_path: Path) -> None:
    path, out = file(tmp_path, completion(0, "fish and river", max_tokens=CONTEXT), chat(1)), tmp_path / "out.jsonl"
    found = lint(options(path), out)
    first = json.loads(out.read_text().splitlines()[0])
    tokens = len(JobTokens().encode("fish and river"))
    assert first["body"]["max_tokens"] == CONTEXT - tokens
    assert found.left == 0 and lint(options(out)).clean and not found.faults[1:]


class JobTokens:
    """The embedded model's tokenizer."""

    def __init__(self) -> None:
        from shoal.text.checkpoint import EMBEDDED
        from shoal.text.tokenizer import Tokenizer

        self.encode = Tokenizer.load(EMBEDDED).encode


def test_a_prompt_that_does_not_fit_is_left(tmp_path: Path) -> None:
    path = file(tmp_path, completion(0, "fish and river " * CONTEXT, max_tokens=1))
    found = lint(options(path), tmp_path / "out.jsonl")
    assert found.left == 1 and not found.repairs and not found.clean


def test_ids_are_numbered_past_those_that_are_taken(tmp_path: Path) -> None:
    rows = [chat(1), chat(1), chat(1).replace('"r1"', '"r1-2"'), chat(1)]
    out = tmp_path / "out.jsonl"
    found = lint(options(file(tmp_path, *rows)), out)
    assert [json.loads(line)["custom_id"] for line in out.read_text().splitlines()] == ["r1", "r1-3", "r1-2", "r1-4"]
    assert [repair.line for repair in found.repairs] == [2, 4]


def test_what_changes_no_answer_is_listed_and_what_might_is_an_error(tmp_path: Path) -> None:
    noted = json.loads(chat(0, user="me", model="other")) | {"note": 1}
    path = file(tmp_path, json.dumps(noted), chat(1, user="you"), chat(2, temprature=0))
    found = lint(options(path))
    assert codes(found) == {3: "unknown_field"}
    listed = {each.what.split(":")[0]: (each.lines, each.first) for each in found.unheeded}
    assert listed["'user' in body"] == (2, 1) and listed["'note' beside body"] == (1, 1)
    assert any(each.what.startswith("the model 'other'") for each in found.unheeded)


def test_a_schema_that_cannot_be_kept_is_found(tmp_path: Path) -> None:
    found = lint(options(file(tmp_path, chat(0, guided_regex="[0-9"), chat(1))))
    assert codes(found) == {1: "invalid_constraint"}


def test_the_exit_code_is_a_runs(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    good, bad = file(tmp_path, chat(0)), tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    assert run_lint(options(good), None, False, console) == 0
    assert run_lint(options(bad), None, False, console) == SOME_FAIL
    assert "invalid_json_line: 1" in console.file.getvalue()  # type: ignore[attr-defined]
    plain = Console(file=io.StringIO(), width=200)
    run_lint(options(bad), None, True, plain)
    assert json.loads(plain.file.getvalue())["faults"][0]["line"] == 1  # type: ignore[attr-defined]


def test_a_repaired_file_never_replaces_one(tmp_path: Path) -> None:
    path = file(tmp_path, chat(0))
    with pytest.raises(UsageError, match="exists"):
        lint(options(path), path)
    with pytest.raises(UsageError, match="rows of columns"):
        lint(options(path, prompt="{custom_id}"), tmp_path / "out.jsonl")


class Counting(set[str]):
    """A set that counts how often it is asked."""

    asked = 0

    def __contains__(self, key: object) -> bool:
        self.asked += 1
        return super().__contains__(key)


def test_equal_ids_are_numbered_without_trying_all_lower_numbers_again(tmp_path: Path) -> None:
    rows = 200
    with look(options(file(tmp_path, *[chat(1)] * rows))) as looked:
        work = _Repairing(looked, {fault.line: fault.code for fault in check(looked).faults})
        work._taken = taken = Counting(work._taken)
        work.write(io.BytesIO())
    assert work.left == 0 and len(taken) == rows == len(work.repairs) + 1
    assert taken.asked <= 2 * rows


def spaced(line: str, luck: Random) -> str:
    """The same JSON in another hand: space, an escape, numbers, a second use of a name."""
    gap = luck.choice([" ", "", "\t", "   "])
    line = re.sub(r'([:,{])(?= ?")', lambda sign: sign[1] + gap, line).replace("custom_id", "custom\\u005fid")
    return f'{gap}{{"custom_id": "x",{gap}"note": [1.50e3, 0.10, "\\ud83d\\udc1f é"],{line.lstrip()[1:-1]}{gap}}}'


@pytest.mark.parametrize(("end", "last", "mark"), [(b"\r\n", b"", b"\xef\xbb\xbf"), (b"\n", b"\n", b"")])
def test_a_repair_changes_the_value_that_it_names_and_no_other_byte(
    tmp_path: Path, end: bytes, last: bytes, mark: bytes
) -> None:
    luck, path, out = Random(8), tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [completion(i, "fish", max_tokens=luck.choice([3, CONTEXT])) for i in range(40)]
    lines += [chat(i, max_tokens=None, max_completion_tokens=CONTEXT) for i in range(40, 50)] + [chat(3), chat(3)]
    raw = [spaced(line, luck).encode() for line in lines]
    path.write_bytes(mark + end.join(raw) + last)
    found = lint(options(path), out)
    assert found.left == 0 and lint(options(out)).clean and len(found.repairs) > 15
    expected = list(raw)
    for repair in found.repairs:
        for what in repair.what.split("; "):
            name, was, now = re.match(r"(\w+) (.*?) ?is now (.*)", what).groups()  # type: ignore[union-attr]
            old, new = (f"{was}", now) if was else ('"r3"', json.dumps(now.strip("'")))
            before, after = expected[repair.line - 1].decode().rsplit(old, 1)
            expected[repair.line - 1] = f"{before}{new}{after}".encode()
    assert out.read_bytes() == mark + end.join(expected) + last


def test_a_limit_that_the_command_gave_is_put_into_the_line(tmp_path: Path) -> None:
    line = '{"custom_id": "a", "url": "/v1/completions", "method": "POST", "body": { "prompt": "fish" } }'
    out = tmp_path / "out.jsonl"
    lint(options(file(tmp_path, line), body={"max_tokens": CONTEXT}), out)
    tokens = CONTEXT - len(JobTokens().encode("fish"))
    assert out.read_text() == line.replace('"fish" }', f'"fish", "max_tokens": {tokens} }}') + "\n"
