"""A sample of rows, run before the others, tells how long answers are; what is known is not asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from echo_job import chat, completion, echo_backend
from test_explain import PRETEND, file, options, rows

from shoal.core.errors import UsageError
from shoal.jobs.options import JobOptions
from shoal.jobs.run import run_job
from shoal.preview import command, facts
from shoal.preview.command import explain
from shoal.preview.look import look
from shoal.preview.sample import Sampled, choose, sample
from shoal.preview.words import lines


class Watched:
    """Runs jobs over an engine that hashes, and keeps what they were asked and what they answered."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.answers: list[dict[str, Any]] = []
        self.code: int | None = None

    def __call__(self, options: JobOptions) -> int:
        self.asked = [json.loads(line) for line in options.input.read_text().splitlines()]
        code = run_job(options, echo_backend())
        self.answers = [json.loads(line) for line in options.output.read_text().splitlines()]
        return code if self.code is None else self.code


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setattr(facts, "measured", lambda *_: PRETEND)
    watched = Watched()
    monkeypatch.setattr(command, "run_job", watched)
    return watched


def open_rows(count: int, most: int = 40) -> list[str]:
    return [chat(i, max_tokens=most, temperature=0) for i in range(count)]


def test_rows_are_spread_over_the_plan_and_run_as_they_are(tmp_path: Path, run: Watched) -> None:
    lines = open_rows(60)
    with look(options(file(tmp_path, lines)).job) as looked:
        for count in (1, 7, 60, 99):
            chosen = choose(looked, count)
            served = list(dict.fromkeys(looked.units["row"][looked.order].tolist()))
            places = sorted(served.index(row) for row in chosen.tolist())
            assert len(places) == len(set(places)) == min(count, 60)
            gaps = np.diff([-places[0] - 1, *places, 2 * 60 - 1 - places[-1]])
            assert gaps.max() - gaps.min() <= 60 / count + 1
        assert sample(looked, options(tmp_path / "in.jsonl").job, 7, run) is not None
    wanted = [json.loads(line) for line in lines]
    assert len(run.asked) == 7 and all(line in wanted for line in run.asked)


def test_the_forecast_takes_the_lengths_that_the_sample_had(tmp_path: Path, run: Watched) -> None:
    path = file(tmp_path, open_rows(60))
    unknown, found = explain(options(path)), explain(options(path, sample=30))
    had = [each["response"]["body"]["usage"]["completion_tokens"] for each in run.answers]
    assert len(had) == 30 and len(set(had)) > 3, "the sample's answers must differ"
    assert found.sampled is not None and (found.sampled.least, found.sampled.most) == (min(had), max(had))
    assert unknown.sampled is None and unknown.time is not None and unknown.time.likely is None
    assert found.time is not None and found.time.likely is not None
    assert found.time.least.answer_tokens < found.time.likely.answer_tokens <= found.time.most.answer_tokens
    assert found.time.likely.answer_tokens == pytest.approx(2 * sum(had), rel=0.1)
    assert any("of rows that were run" in words for _, words in lines(found))


def test_every_answer_has_its_share_of_the_samples_lengths(tmp_path: Path) -> None:
    with look(options(file(tmp_path, open_rows(400, most=30))).job) as looked:
        found = Sampled(5, (3, 3, 3, 20, 30), (False, False, False, False, True)).lengths(looked)
        shares = {length: (found == length).mean() for length in (3, 20, 30)}
        assert shares[3] == pytest.approx(0.6, abs=0.02) and shares[20] == pytest.approx(0.2, abs=0.02)
        assert shares[30] == pytest.approx(0.2, abs=0.02), "what ran into its limit is longer"


def test_where_all_lengths_are_known_nothing_is_run(tmp_path: Path, run: Watched) -> None:
    found = explain(options(file(tmp_path, rows(1)), sample=5))
    assert run.asked == [] and found.sampled is None and found.time is not None and found.time.likely is not None


def test_rows_with_several_answers_and_rows_of_columns_are_sampled_too(tmp_path: Path, run: Watched) -> None:
    with look(options(file(tmp_path, [completion(i, f"a {i}", n=3, max_tokens=20) for i in range(9)])).job) as looked:
        found = sample(looked, options(tmp_path / "in.jsonl").job, 4, run)
    assert found is not None and found.rows == 4 and len(found.ended) == 12 and max(found.ended) <= 20
    path = tmp_path / "in.csv"
    path.write_text('text\none\n"two, three"\nfour\n')
    job = JobOptions(path, tmp_path / "no", prompt="Say {text}", body={"max_tokens": 9})
    with look(job) as looked:
        found = sample(looked, job, 3, run)
    assert (
        found is not None and found.rows == 3 and {line["text"] for line in run.asked} == {"one", "two, three", "four"}
    )


def test_what_cannot_be_sampled_says_so(tmp_path: Path, run: Watched) -> None:
    path = file(tmp_path, open_rows(4))
    run.code = 5
    with pytest.raises(UsageError, match="exit code 5"):
        explain(options(path, sample=2))
    with pytest.raises(UsageError, match="at least 1"):
        options(path, sample=0)
    with pytest.raises(UsageError, match="leave one"):
        options(path, sample=1, answer_tokens=1)
