"""A plan's files: bad rows are in it, it is made once, and a torn or damaged one is made again."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from byte_text import FIRST, row_encoder
from plan_jobs import FakeEncoder, FakeSource, Line, plan_of, random_lines

from shoal.core.errors import StateError
from shoal.jobs.plan import Plan, build_plan
from shoal.jobs.plan_store import ARENA, ARRAYS, ERRORS, SUMMARY
from shoal.jobs.read import Source


def test_bad_rows_are_rows_without_units(tmp_path: Path) -> None:
    lines = [
        Line(((1, 2),)),
        Line((), error="no model of that name: use another"),
        Line(((3,),)),
        Line((), error="é" * 99),
    ]
    plan = plan_of(lines, tmp_path)
    assert (plan.num_lines, plan.num_rows, plan.num_bad, plan.num_units) == (4, 4, 2, 2)
    bad = list(plan.bad_rows())
    assert [(number, row.line, str(row.error)) for number, row in bad] == [
        (1, 2, lines[1].error),
        (3, 4, lines[3].error),
    ]
    assert bad[0][1].error is not None and (bad[0][1].error.code, bad[0][1].error.param) == ("bad", "messages")
    assert plan.row(2).error is None and (plan.row(2).offset, plan.row(2).length, plan.row(2).prompts) == (20, 9, 1)


def test_second_uses_of_a_custom_id_are_errors_and_equal_hashes_are_not(tmp_path: Path) -> None:
    names = ["a", "b", "a", None, "cc", "a", "dd", "b"]  # all of one length have one key
    lines = [Line(((i, 1),), name=name) for i, name in enumerate(names)]
    plan = plan_of(lines, tmp_path)
    bad = {number: row.error for number, row in plan.bad_rows()}
    assert {number: str(error).split(":")[0][-6:] for number, error in bad.items()} == {
        2: "line 1",
        5: "line 1",
        7: "line 2",
    }
    assert all(error is not None and error.code == "duplicate_custom_id" for error in bad.values())
    assert sorted(unit.row for unit in plan.units_from()) == [0, 1, 3, 4, 6]
    assert plan.bound == 10


@pytest.mark.parametrize("order", ["prefix", "input"])
@pytest.mark.parametrize("lines", [[], [Line((), error="bad")]])
def test_a_job_without_work_has_a_plan(tmp_path: Path, lines: list[Line], order: str) -> None:
    plan = plan_of(lines, tmp_path, order)
    assert (plan.num_units, plan.bound, plan.prompt_tokens, plan.num_rows) == (0, 0, 0, len(lines))
    assert list(plan.units_from()) == []
    with pytest.raises(IndexError):
        plan.future(0)


def test_a_plan_is_made_once(tmp_path: Path) -> None:
    lines = random_lines(random.Random(9), 20)
    source, encoder = FakeSource(lines), FakeEncoder(lines)
    first = list(build_plan(source, encoder, tmp_path, key="k").units_from())
    assert list(build_plan(source, encoder, tmp_path, key="k").units_from()) == first and encoder.batches == 1
    assert list(Plan.load(tmp_path).units_from()) == first
    build_plan(source, encoder, tmp_path, key="other")
    build_plan(FakeSource(lines, "changed"), encoder, tmp_path, key="other")
    build_plan(FakeSource(lines, "changed"), encoder, tmp_path, "input", key="other")
    assert encoder.batches == 4


def test_a_half_made_plan_is_made_again(tmp_path: Path) -> None:
    lines = random_lines(random.Random(10), 20)
    first = list(plan_of(lines, tmp_path).units_from())
    (tmp_path / SUMMARY).unlink()
    (tmp_path / ARENA).write_bytes(b"half")
    with pytest.raises(StateError, match="no finished plan"):
        Plan.load(tmp_path)
    assert list(plan_of(lines, tmp_path).units_from()) == first


@pytest.mark.parametrize("name", [ARENA, ERRORS, *(f"{name}.npy" for name in ARRAYS), SUMMARY])
def test_a_damaged_plan_is_refused_and_made_again(tmp_path: Path, name: str) -> None:
    lines = [*random_lines(random.Random(11), 20), Line((), error="bad")]
    first = list(plan_of(lines, tmp_path).units_from())
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(StateError, match=name):
        Plan.load(tmp_path)
    assert list(plan_of(lines, tmp_path).units_from()) == first


def test_a_plan_of_another_format_is_made_again(tmp_path: Path) -> None:
    lines = random_lines(random.Random(12), 5)
    plan_of(lines, tmp_path)
    summary = json.loads((tmp_path / SUMMARY).read_text())
    (tmp_path / SUMMARY).write_text(json.dumps({**summary, "format": -1}))
    encoder = FakeEncoder(lines)
    build_plan(FakeSource(lines), encoder, tmp_path)
    assert encoder.batches == 1


def test_progress_is_told_in_rows_and_bytes(tmp_path: Path) -> None:
    lines = [Line(((i,),)) for i in range(5000)]
    told: list[tuple[int, int]] = []
    encoder = FakeEncoder(lines)
    build_plan(FakeSource(lines), encoder, tmp_path, progress=lambda rows, size: told.append((rows, size)))
    assert told[-1] == (5000, 49_999) and told == sorted(told) and len(told) == encoder.batches > 1


def chat_line(name: str, text: str, **body: object) -> str:
    request = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 4, **body}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": request})


def test_a_file_goes_to_its_plan(tmp_path: Path) -> None:
    rng = random.Random(13)
    words = "the a of river boat seven green stone house runs sleeps über 水 🙂".split()
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 40))) for _ in range(500)]
    lines = [chat_line(f"row {i}", text, n=1 + i % 2) for i, text in enumerate(texts)]
    lines[10] = ""
    lines[20] = "{not json"
    lines[30] = chat_line("row 3", "again")
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    encoder = row_encoder()
    source = Source(path)
    plan = build_plan(source, encoder, tmp_path / "plan", key=encoder.fingerprint)
    assert (plan.num_lines, plan.num_rows, plan.num_bad, plan.num_units) == (500, 499, 2, 497)
    assert [(row.line, row.error.code) for _, row in plan.bad_rows() if row.error] == [
        (21, "invalid_json_line"),
        (31, "duplicate_custom_id"),
    ]
    seen = 0
    for unit in plan.units_from():
        row = plan.row(unit.row)
        raw = source.read(row.offset, row.length)
        assert raw is not None and raw.decode() == lines[row.line - 1]
        assert bytes(token - FIRST for token in unit.tokens).decode() == f"user: {texts[row.line - 1]}\nassistant: "
        assert unit.samples == 1 + (row.line - 1) % 2
        seen += len(unit.tokens) * unit.samples
    assert seen == plan.prompt_tokens > plan.bound
    assert list(build_plan(source, encoder, tmp_path / "plan", key=encoder.fingerprint).units_from()) == list(
        plan.units_from()
    )
