"""A bad file as a whole, without an engine: every line ends in exactly one result line, and the check sees others."""

from __future__ import annotations

import json
import re
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
from byte_text import FIRST, ByteTokenizer, row_encoder
from mutate import mutants, write_file

from shoal.jobs.answer import AnswerWriter, PromptAnswers, Sample
from shoal.jobs.plan import build_plan
from shoal.jobs.read import Source

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from prove_bad_file import EXIT_SOME_FAILED, check

LINES = 2500


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The files of a job whose every answer is one token."""
    folder = tmp_path_factory.mktemp("job")
    source_path, output, errors = folder / "in.jsonl", folder / "out.jsonl", folder / "out.errors.jsonl"
    write_file(source_path, mutants(LINES, seed=4, huge_lines=1))
    writer, encoder = AnswerWriter(ByteTokenizer(), "f" * 64, "m"), row_encoder(context=2048)
    answer = Sample("a", array("i", [FIRST + 97]), "length")
    with Source(source_path) as source, output.open("wb") as good, errors.open("wb") as bad:
        plan = build_plan(source, encoder, folder / "plan")
        for number in range(plan.num_rows):
            row = plan.row(number)
            raw = source.read(row.offset, row.length)
            if row.error is not None:
                bad.write(writer.failure(row.line, raw, row.error) + b"\n")
                continue
            spec = encoder.parse(raw)
            answers = [PromptAnswers(array("i", [FIRST]), [answer] * spec.n)] * row.prompts
            good.write(writer.answer(spec, answers) + b"\n")
    counts = {"total": plan.num_rows, "ok": plan.num_rows - plan.num_bad, "failed": plan.num_bad}
    return {
        "source": source_path,
        "output": output,
        "errors": errors,
        "report": {"rows": counts},
        "exit_code": EXIT_SOME_FAILED,
    }


def test_every_line_ends_exactly_once(job: dict[str, Any]) -> None:
    found = check(**job)
    assert found["wrong"] == []
    assert found["counts"]["ok"] > LINES // 4 and found["counts"]["failed"] > LINES // 4
    assert found["error_codes"]["duplicate_custom_id"] >= LINES // 50
    assert found["error_codes"]["line_too_long"] == 1


def test_the_check_sees_a_lost_a_doubled_and_a_moved_line(job: dict[str, Any], tmp_path: Path) -> None:
    for name in ("output", "errors"):
        lines = job[name].read_bytes().splitlines(keepends=True)
        for spoiled in (lines[:5] + lines[6:], lines[:5] + lines[4:], [*lines[:5], lines[6], lines[5], *lines[7:]]):
            path = tmp_path / name
            path.write_bytes(b"".join(spoiled))
            assert check(**job | {name: path})["wrong"]
    assert check(**job | {"exit_code": 0})["wrong"]
    counts = dict(job["report"]["rows"])
    assert check(**job | {"report": {"rows": counts | {"ok": counts["ok"] + 1}}})["wrong"]


def test_results_are_json_for_every_reader(job: dict[str, Any]) -> None:
    for name in ("output", "errors"):
        for line in job[name].read_bytes().splitlines():
            json.loads(line.decode("utf-8"))


def test_every_code_of_an_error_is_in_the_document(job: dict[str, Any]) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    assert not set(check(**job)["error_codes"]) - set(re.findall(r"`(\w+)`", text))
