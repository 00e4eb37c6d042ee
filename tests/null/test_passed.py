"""explain and lint of jobs over servers: a run's own verdict on every line, and no number that nobody can know."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.cli import build_command
from shoal.client import News
from shoal.core.errors import UsageError
from shoal.core.types import Finish, Output, Request
from shoal.jobs.bill import Prices
from shoal.jobs.options import JobOptions
from shoal.preview.command import lint
from shoal.preview.options import ExplainOptions
from shoal.preview.passed import BYTES, Foreseen, foresee
from shoal.remote.backend import Servers
from shoal.remote.words import Reply
from tests.null.bad_server import serving
from tests.null.echo_job import EchoJob, chat, completion
from tests.null.mutate import mutants, write_file

NOWHERE = "http://127.0.0.1:9/v1"  # nobody is asked


def options(path: Path, **more: Any) -> JobOptions:
    return JobOptions(input=path, output=path.with_name("nothing"), **{"device": NOWHERE, **more})


def file(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def look(path: Path, **more: Any) -> Foreseen:
    job = options(path)
    return foresee(ExplainOptions(job, answer_tokens=more.pop("answer_tokens", None)), more.pop("prices", None))


class Refusing:
    """A backend that refuses every call: what a line asks for may be anything."""

    def __init__(self) -> None:
        self.ends: list[Output] = []

    def submit(self, requests: Iterable[Request], watched: frozenset[str] = frozenset()) -> None:
        self.ends += [Reply(one.id, finish=Finish.ERROR, error="refused", code="server_error") for one in requests]

    def cancel(self, ids: Iterable[str]) -> None:
        """All have ended."""

    def outputs(self, timeout: float) -> News | None:
        ends, self.ends = self.ends, []
        return News(tuple(ends))

    def close(self) -> None:
        """Nothing to end."""


def test_lints_verdict_on_every_line_is_that_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    write_file(path, mutants(300, 1))
    found = lint(options(path))
    job = EchoJob(tmp_path, [])
    assert job.run(Refusing(), device=NOWHERE) == 3
    errors = {one["x_shoal"]["line"]: one["response"]["body"]["error"]["code"] for one in job.failures()}
    ours = {line: code for line, code in errors.items() if code != "server_error"}
    assert {fault.line: fault.code for fault in found.faults} == ours and 20 < len(ours) < len(errors)
    assert found.rows == job.report.rows.total


def backend_of(url: str) -> Servers:
    """One server; it ends with the process."""
    return Servers([url])


def test_fields_and_models_of_a_server_are_not_called_unheeded(tmp_path: Path) -> None:
    row = json.dumps(json.loads(chat(1, store=True, made_up=1)) | {"note": "mine"})
    found = lint(options(file(tmp_path, row, chat(2, stream=True))))
    assert [each.what for each in found.unheeded] == ["'note' beside body: a note of yours"]
    assert [fault.line for fault in found.faults] == [2]
    with pytest.raises(UsageError, match="--fix"):
        lint(options(file(tmp_path, row)), tmp_path / "fixed.jsonl")


def test_what_is_said_is_what_will_be_sent(tmp_path: Path) -> None:
    families = [chat(i, f"{'a long text ' * 20}{i % 3} {i}", temperature=0, model=f"m{i % 2}") for i in range(30)]
    rows = [*families, families[0].replace('"r0"', '"again"'), completion(99, "é", n=2, max_tokens=7), "{"]
    found = look(file(tmp_path, *rows))
    assert (found.rows.total, found.rows.run, found.rows.equal, found.rows.bad) == (33, 31, 1, 1)
    assert found.calls.models == {"m0": 15, "m1": 15, "any": 1}
    assert found.calls.answers == 30 + 2 and found.calls.limit == 30 * 5 + 2 * 7 and found.calls.open == 0
    assert found.shared > 0.9 * found.texts.total and any("a long text" in one.text for one in found.forest.prefixes)
    with serving() as server:
        job = EchoJob(tmp_path, [])
        assert job.run(backend_of(server.url), device=server.url) == 3
        assert len(server.asked) == found.rows.run
    sent = sum(len(prompt.encode()) for prompt in server.asked)
    assert abs(found.texts.total - sent) < 0.1 * sent  # roles, and an even number of bytes


def test_a_number_that_nobody_knows_is_a_range_or_is_left_out(tmp_path: Path) -> None:
    open_row = completion(1, "x" * 600)
    body = json.loads(open_row)
    del body["body"]["max_tokens"]
    path = file(tmp_path, json.dumps(body), completion(2, "y" * 600))
    found = look(path, prices=Prices(10.0, 1000.0))
    assert found.calls.open == 1 and found.output_tokens is None and found.cost is None
    assert found.prompt_tokens == (1200 / BYTES[1], 1200 / BYTES[0])
    known = look(path, prices=Prices(10.0, 1000.0), answer_tokens=95)
    assert known.output_tokens == (2, 100)
    assert known.cost == ((200 * 10 + 2 * 1000) / 1e6, (600 * 10 + 100 * 1000) / 1e6)
    assert any("tokens" in words for words in found.unknown)


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code of a command, and what it printed."""
    with pytest.raises(SystemExit) as end:
        build_command()(list(arguments), prog_name="shoal")
    return int(end.value.code or 0), capsys.readouterr().out


def test_the_commands_take_an_endpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(file(tmp_path, chat(1), chat(2, "longer")))
    asked = ["explain", path, "--endpoint", NOWHERE, "--price-per-million", "0.15,0.60"]
    code, words = called(capsys, *asked)
    assert code == 0 and "in the currency of --price-per-million" in words and "unknown" in words
    told = json.loads(called(capsys, *asked, "--json")[1])
    assert told["rows"]["run"] == 2 and told["cost"][0] < told["cost"][1]
    assert called(capsys, "lint", path, "--endpoint", NOWHERE)[0] == 0
    for wrong in (["--price-per-million", "1"], ["--html", "x.html"], ["--memory", "1GB"]):
        assert called(capsys, "explain", path, "--endpoint", NOWHERE, *wrong)[0] == 2
    assert called(capsys, "explain", path, "--price-per-million", "1,2")[0] == 2
    in_python = shoal.explain(path, endpoint=NOWHERE)
    assert f"servers   {NOWHERE}" in repr(in_python) and in_python._repr_html_() is None


def test_what_a_job_has_cost_is_by_what_servers_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [chat(i, "same", temperature=0) for i in range(4)] + [chat(9, "other")]
    job = EchoJob(tmp_path, rows)
    with serving() as server:
        assert job.run(backend_of(server.url), device=server.url) == 0
    asked = ["report", str(job.out), "--price-per-million", "1000,10000"]
    told = json.loads(called(capsys, *asked, "--json")[1])
    paid = (len("same") + len("other")) * 1000 + 2 * 3 * 10000  # two calls: the others are copies
    assert told["bill"]["tokens"] == [paid / 1e6, paid / 1e6]
    assert "in the currency of --price-per-million" in called(capsys, *asked)[1]
