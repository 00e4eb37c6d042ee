"""A row that runs for longer than it may ends with what it had, and no other row with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
from echo_job import EchoJob, chat, completion, echo_backend
from test_retry import CutOff, Stumbles, retry
from whole_job import SteppingClock

from shoal.client import InProcess, News
from shoal.jobs.look import View
from shoal.jobs.note import read_note
from shoal.jobs.watches import Watches

Jobs = Callable[..., EchoJob]


def run(one: EchoJob, **more: object) -> int:
    """On a clock that goes on by a quarter of a second at every look."""
    with mock.patch("shoal.jobs.run.WallClock", SteppingClock):
        return one.run(**more)  # type: ignore[arg-type]


def test_a_late_row_ends_with_what_it_had_and_no_other(job: Jobs) -> None:
    rows = [chat(i, max_tokens=6, temperature=0) for i in range(8)]
    slow = chat(8, max_tokens=900, ignore_eos=True, temperature=0, timeout=60, n=2)
    whole, one = job([*rows, chat(8, max_tokens=900, ignore_eos=True, temperature=0, n=2)]), job([*rows, slow])
    assert run(whole) == 0 and run(one) == 3
    assert one.codes() == ["row_timeout"]
    (failure,) = one.failures()
    assert failure["x_shoal"]["fault"] == "yours" and "60 s" in failure["response"]["body"]["error"]["message"]
    texts = [choice["message"]["content"] for choice in whole.answers()[8]["response"]["body"]["choices"]]
    had = failure["x_shoal"]["answers"]
    assert len(had) == 2 and all(text and full.startswith(text[:-4]) for text, full in zip(had, texts, strict=True))
    assert all(len(text) < len(full) for text, full in zip(had, texts, strict=True))
    assert one.answers() == whole.answers()[:8]


def test_a_limit_for_all_rows_is_a_body_field_and_a_row_s_own_wins(job: Jobs) -> None:
    one = job([chat(1, max_tokens=900, ignore_eos=True, timeout=10**6), chat(2, max_tokens=900)], body={"timeout": 30})
    assert run(one) == 3
    assert [line["x_shoal"]["line"] for line in one.failures()] == [2]


def test_a_row_of_many_prompts_is_given_up_whole(job: Jobs) -> None:
    prompts = [f"prompt {i}" for i in range(3000)]
    one = job([completion(1, prompts, max_tokens=400, ignore_eos=True, timeout=20), *(chat(i) for i in range(2, 9))])
    backend = echo_backend(sequences=8)
    assert run(one, backend=backend) == 3
    assert one.codes() == ["row_timeout"] and len(one.answers()) == 7
    assert not backend.engine.busy and one.report.tokens.prompt_computed < one.report.tokens.prompt_bound / 2


def test_the_limit_is_no_part_of_what_a_job_is_so_a_retry_may_have_more_time(job: Jobs) -> None:
    one = job([chat(1), chat(2, max_tokens=900, ignore_eos=True, temperature=0)], body={"timeout": 30})
    assert run(one) == 3 and one.codes() == ["row_timeout"]
    assert retry(one) == 3, "it is the line's own failure"
    assert retry(one, timeout=10**6) == 0 and len(one.answers()) == 2


def test_another_retry_takes_what_a_retry_that_was_cut_off_did_not(job: Jobs) -> None:
    slow = chat(2, max_tokens=900, ignore_eos=True, temperature=0)
    one, whole = (job([chat(1), slow, chat(3)], body={"timeout": limit}) for limit in (30, 10**6))
    assert run(whole) == 0 and run(one, backend=Stumbles({1})) == 3 and one.codes() == ["internal", "row_timeout"]
    with pytest.raises(KeyboardInterrupt):
        retry(one, CutOff(set()))
    assert retry(one, timeout=10**6) == 0 and one.out.read_bytes() == whole.out.read_bytes()
    with View(one.out) as view:
        assert read_note(view).options.body == {"timeout": 30}, "the next retry has the options that the job had"


def test_equal_rows_do_not_all_fail_for_want_of_one_s_time(job: Jobs) -> None:
    same = [
        chat(i, "the same", max_tokens=900, ignore_eos=True, temperature=0, **({"timeout": 20} if i == 0 else {}))
        for i in range(5)
    ]
    one = job(same)
    assert run(one) == 3
    assert one.codes() == ["row_timeout"] and len(one.answers()) == 4


def test_a_row_without_a_limit_does_not_fail_for_want_of_another_s_time(job: Jobs) -> None:
    limits: list[dict[str, int]] = [{"timeout": 20}] * 4 + [{}]
    one = job([chat(i, "the same", max_tokens=900, ignore_eos=True, temperature=0, **m) for i, m in enumerate(limits)])
    assert run(one) == 3
    assert one.codes() == ["row_timeout"] * 3 and len(one.answers()) == 2, "three have tried, and the last one may"


def test_equal_rows_that_fail_with_another_have_what_it_had(job: Jobs) -> None:
    one = job([chat(i, "the same", max_tokens=900, ignore_eos=True, temperature=0, timeout=20) for i in range(5)])
    assert run(one) == 3 and one.codes() == ["row_timeout"] * 5
    assert all(line["x_shoal"]["answers"][0] for line in one.failures())


def test_the_time_is_counted_from_the_first_of_a_row_s_requests(job: Jobs) -> None:
    """Each takes less than a fifth of it."""
    prompts = [f"prompt {i}" for i in range(40)]
    one = job([completion(1, prompts, max_tokens=10, ignore_eos=True, timeout=100), chat(2)])
    assert run(one, backend=echo_backend(sequences=1)) == 3 and one.codes() == ["row_timeout"]
    alone = job([completion(1, prompts[:1], max_tokens=10, ignore_eos=True, timeout=20)])
    assert run(alone, backend=echo_backend(sequences=1)) == 0


class Reminds(InProcess):
    """Names every request again and again, as one that goes on after it was put off."""

    def __init__(self) -> None:
        super().__init__(echo_backend(sequences=2).engine)
        self.named: tuple[str, ...] = ()

    def outputs(self, timeout: float = 0.0) -> News | None:
        news = super().outputs(timeout)
        self.named += news.started if news is not None else ()
        return None if news is None else replace(news, started=self.named)


def test_a_row_that_goes_on_after_it_was_put_off_has_not_waited_for_longer(job: Jobs) -> None:
    def queues(backend: InProcess) -> list[float]:
        one = job([chat(i, max_tokens=20) for i in range(8)])
        assert run(one, backend=backend) == 0
        return [json.loads(line)["queue_seconds"] for line in (one.state / "rows.jsonl").read_text().splitlines()]

    assert queues(Reminds()) == queues(echo_backend(sequences=2))


@pytest.mark.parametrize("wrong", [0, -1, "soon"])
def test_a_limit_that_is_no_time_fails_its_row(job: Jobs, wrong: object) -> None:
    one = job([chat(1), chat(2, timeout=wrong)])
    assert one.run() == 3 and one.codes() == ["invalid_request"]


def test_watches_name_each_late_request_once_and_forget_the_ended() -> None:
    watches = Watches()
    watches.start("a", 0.0, 5.0)
    watches.start("b", 1.0, 1.0)
    watches.start("c", 2.0, None)
    assert watches.late(1.9) == [] and watches.late(2.0) == ["b"] and watches.late(3.0) == []
    watches.stop("a")
    assert watches.late(9.0) == [] and watches.oldest(9.0) == ("b", 8.0)


def test_what_ran_out_of_time_is_a_request_that_can_be_run_as_it_is(job: Jobs) -> None:
    one = job([chat(1), chat(2, max_tokens=900, ignore_eos=True, temperature=0, timeout=30)])
    run(one)
    again = job([json.dumps(line) for line in one.failures()])
    assert again.run() == 0 and again.answers()[0]["custom_id"] == "r2"


def test_a_row_that_runs_much_longer_than_others_is_named_while_it_does(job: Jobs) -> None:
    rows = [chat(i, max_tokens=2, temperature=0) for i in range(8)]
    even, one = job(rows), job([*rows, chat(8, max_tokens=900, ignore_eos=True)])
    assert run(even) == 0 and "has run for" not in even.said
    assert run(one) == 0
    named = [line for line in one.said.splitlines() if "has run for" in line]
    assert len(named) > 2 and all("line 9 has run for" in line for line in named)
    assert named[-1].endswith("of it with nothing left to start")
