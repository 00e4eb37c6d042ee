"""With real arithmetic: rows that share an answer have the bytes that computing each of them gives."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from unittest import mock

import shoal
from shoal.jobs.report import Report

TASKS = ("Is it good? Answer yes or no.", "Sort: 3 1 2", "Add 17 and 25.", "Copy: the quick brown fox")


def rows(path: Path, count: int) -> Path:
    """Rows of which most ask for what an earlier one asks for."""
    luck = Random(4)
    with path.open("w") as file:
        for number in range(count):
            body = {
                "messages": [{"role": "user", "content": luck.choice(TASKS)}],
                "max_tokens": 12,
                "user": str(number),
            }
            body |= luck.choice(
                [
                    {"temperature": 0},
                    {"temperature": 0, "logprobs": True, "top_logprobs": 3, "stop": ["e"]},
                    {"temperature": 1.0, "seed": 5, "n": 2, "top_p": 0.9},
                    {"temperature": 1.0},
                    {"temperature": 0.7, "seed": 6, "presence_penalty": 0.5, "prompt_logprobs": 1},
                ]
            )
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def test_copies_and_cached_rows_are_what_computing_them_gives(tmp_path: Path) -> None:
    source = rows(tmp_path / "in.jsonl", 60)

    def answer(name: str, **options: object) -> tuple[bytes, Report]:
        out = tmp_path / f"{name}.jsonl"
        report = shoal.run(source, out, threads=1, **options)
        assert report.exit_code == report.status == 0 and report.problems() == []
        return out.read_bytes(), report

    with mock.patch("shoal.jobs.keys.RequestKeys.of", lambda *_: []):
        apart, every = answer("apart")
    assert every.reused.duplicates == 0
    once, first = answer("once", cache=tmp_path / "cache", verify=0.2)
    again, second = answer("again", cache=tmp_path / "cache", verify=1.0)
    assert once == again == apart
    assert first.reused.duplicates > 25 and first.reused.cached == 0
    assert first.tokens.prompt_computed == first.tokens.prompt_bound <= every.tokens.prompt_bound
    assert second.reused.duplicates + second.reused.cached == 60 == second.verified.rows
    assert second.tokens.prompt_computed == 0 and second.verified.differ == []
