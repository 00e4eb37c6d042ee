"""A server of our own: nobody else is taken for it, and what it says while it ends is no row's fault."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.core.errors import ShoalError
from shoal.remote import own
from tests.null.bad_server import serving
from tests.null.echo_job import EchoJob, chat, job
from tests.null.test_endpoint import check_answers, run

__all__ = ["job"]

Make = Callable[..., EchoJob]


def test_what_a_server_of_ours_says_while_it_ends_costs_no_row_a_try(job: Make) -> None:
    rows = [chat(i, f"Question {i}") for i in range(4)]  # as many as are asked at once
    this = job(rows)
    with serving(lambda prompt: ["500"]) as server:

        def life() -> int:
            return 1 if len(server.asked) < len(rows) else 2  # it ends when all were asked

        assert run(this, server, tries=1, life=life) == 0
        assert set(server.answered.values()) == {1} and len(server.asked) == 2 * len(rows)
    check_answers(this, rows)


@pytest.mark.parametrize("others", [False, True])
def test_a_fault_of_a_server_of_ours_that_lives_on_is_its_rows(
    job: Make, others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.remote.backend.SETTLED", 0.1)
    monkeypatch.setattr("shoal.remote.backend.DYING", 60.0 if others else 0.3)
    rows = [chat(i, f"Question {i}") for i in range(30 if others else 1)]
    this = job(rows)
    with serving(lambda prompt: ["500"] * 9 if prompt.endswith("n 0") else ()) as server:
        server.seconds = 0.2
        assert run(this, server, tries=1, life=lambda: 1) == 3
    assert this.codes() == ["server_error"] and len(this.answers()) == len(rows) - 1


def test_whoever_else_answers_at_its_port_is_not_taken_for_it(tmp_path: Path) -> None:
    def start(*words: str) -> own.OwnServer:
        return own.OwnServer("it", lambda port, key: own.Command(words, dict(os.environ)), tmp_path / "log", "minnow")

    lives_on, has_ended = start("sleep", "600"), start("false")
    try:
        with serving(port=int(lives_on.url.split(":")[2].partition("/")[0])) as stranger:
            stranger.models = ["gpt"]
            assert not lives_on.ready(0.5)
            stranger.models = ["gpt", "minnow"]
            assert lives_on.ready(5.0)
        with serving(port=int(has_ended.url.split(":")[2].partition("/")[0])) as stranger:
            stranger.models = ["minnow"]
            time.sleep(0.5)
            with pytest.raises(ShoalError, match="exit code 1"):
                while not has_ended.ready(0.5):
                    stranger.models = []
    finally:
        lives_on.close()
        has_ended.close()
