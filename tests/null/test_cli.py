"""Flags, environment and file become one JobOptions; every way to end has its exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cache import fill
from typer.core import TyperOption

import shoal.cli
import shoal.preview.command
from shoal.cli import build_command
from shoal.core.config import parse_bytes
from shoal.core.errors import EngineDied, ModelError, StateError, UsageError
from shoal.jobs.files import DiskFiles
from shoal.jobs.options import FailureBudget, JobOptions, Order
from shoal.jobs.report import Failures, Report, Rows, write_report
from shoal.jobs.state import folder_of


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        build_command()(list(arguments), prog_name="shoal")
    code = end.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[JobOptions]:
    """The jobs that would have run; they end with 3."""
    jobs: list[JobOptions] = []

    def answer(options: JobOptions) -> int:
        jobs.append(options)
        return 3

    monkeypatch.setattr(shoal.cli, "answer", answer)
    return jobs


def test_two_flags_are_enough(asked: list[JobOptions]) -> None:
    assert call("run", "-i", "a.jsonl", "-o", "b.jsonl") == 3
    assert asked == [JobOptions(input=Path("a.jsonl"), output=Path("b.jsonl"))]


FLAGS = {
    "model": ("m", "m"),
    "adapter": ("a=b/c", {"a": "b/c"}),
    "prompt": ("P: {x}", "P: {x}"),
    "chat": (True, True),
    "body": ('{"max_tokens": 4}', {"max_tokens": 4}),
    "order": ("finish", Order.FINISH),
    "memory": ("2GiB", 2**31),
    "step_tokens": (64, 64),
    "device": ("cuda:1", "cuda:1"),
    "endpoint": ("http://a/v1,https://b:8000", "http://a/v1,https://b:8000/v1"),
    "engine": ("vllm", "vllm"),
    "weights": ("int8", "int8"),
    "kv": ("int8", "int8"),
    "threads": (2, 2),
    "seed": (7, 7),
    "max_failures": ("1%", FailureBudget(share=0.01)),
    "strict": (True, True),
    "restart": (True, True),
    "overwrite": (True, True),
    "openai": (True, True),
    "cache": ("answers", Path("answers")),
    "verify": ("0.5%", 0.005),
    "quiet": (True, True),
}
FIELDS = {"endpoint": "device", "engine": "device"}  # of flags whose options have another name


def test_every_flag_of_run_is_tried_here() -> None:
    names = {p.name for p in build_command().commands["run"].params if isinstance(p, TyperOption)}
    assert names == set(FLAGS) | {"input", "output", "config"}


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_a_flag_may_come_from_anywhere(
    name: str, asked: list[JobOptions], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given_value, wanted = FLAGS[name]
    flag = "--" + name.replace("_", "-")
    base = ["run", "-i", "a", "-o", "b"]
    text = str(given_value)
    assert call(*base, *([flag] if given_value is True else [flag, text])) == 3
    config = tmp_path / "shoal.yaml"
    config.write_text(f"{name}: {text.lower() if given_value is True else repr(given_value)}\n")
    assert call(*base, "--config", str(config)) == 3
    monkeypatch.setenv("SHOAL_" + name.upper(), text)
    assert call(*base) == 3
    assert [getattr(options, FIELDS.get(name, name)) for options in asked] == [wanted] * 3
    assert asked[0] == asked[1] == asked[2]


@pytest.mark.parametrize("text", ["adapter: {a: x, b: y}", "adapter: [a=x, b=y]"])
def test_adapters_may_be_a_list_or_names_with_folders(text: str, asked: list[JobOptions], tmp_path: Path) -> None:
    (tmp_path / "shoal.yaml").write_text(text + "\n")
    base = ["run", "-i", "a", "-o", "b"]
    assert call(*base, "--config", str(tmp_path / "shoal.yaml")) == 3
    assert call(*base, "--adapter", "a=x", "--adapter", "b=y") == 3
    assert call(*base, "--adapter", "a") == 2
    assert [options.adapter for options in asked] == [{"a": "x", "b": "y"}] * 2


def test_a_cache_says_what_it_holds_and_can_be_made_smaller(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, 8)
    assert call("cache", str(tmp_path)) == 0 and capsys.readouterr().out.startswith("8 answers, ")
    assert call("cache", str(tmp_path), "--keep", "0") == 0 and capsys.readouterr().out.startswith("0 answers, 0 B")
    assert call("cache", str(tmp_path / "none")) == 2 and "there is no cache" in capsys.readouterr().err
    assert call("run", "-i", "a", "-o", "b", "--verify", "one") == 2 and "write 1%" in capsys.readouterr().err


def test_an_address_that_is_none_or_beside_a_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["run", "-i", "a", "-o", "b", "--endpoint"]
    assert call(*base, "localhost:8000") == 2 and "write http://localhost:8000/v1" in capsys.readouterr().err
    assert call(*base, "http://a", "--device", "cuda") == 2 and "--device cuda" in capsys.readouterr().err
    assert call(*base, "http://a", "--engine", "vllm") == 2 and "--engine vllm" in capsys.readouterr().err
    assert call(*base, "http://a", "--threads", "2") == 2 and "--threads" in capsys.readouterr().err


def test_the_command_line_wins(asked: list[JobOptions], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "shoal.yaml"
    config.write_text("seed: 1\ninput: from-file\noutput: o\n")
    assert call("run", "--config", str(config)) == 3
    monkeypatch.setenv("SHOAL_SEED", "2")
    assert call("run", "--config", str(config)) == 3
    assert call("run", "--config", str(config), "--seed", "3") == 3
    assert [(options.seed, options.input) for options in asked] == [(seed, Path("from-file")) for seed in (1, 2, 3)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sede: 1\n", "did you mean seed"),
        ("- 1\n", "flag_name: value"),
        ("a: [\n", "cannot read"),
        ("config: x\n", "unk"),
    ],
)
def test_a_wrong_config_file_is_a_usage_error(
    text: str, words: str, asked: list[JobOptions], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    assert call("run", "-i", "a", "-o", "b", "--config", str(config)) == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not asked


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",),
        ("run", "-i", "a"),
        ("run", "-i", "a", "-o", "b", "--order", "random"),
        ("run", "-i", "a", "-o", "b", "--memory", "lots"),
        ("run", "-i", "a", "-o", "b", "--memory", "0"),
        ("run", "-i", "a", "-o", "b", "--max-failures", "101%"),
        ("run", "-i", "a", "-o", "b", "--body", "[1]"),
        ("run", "-i", "a", "-o", "b", "--body", "{"),
        ("run", "-i", "a", "-o", "b", "--step-tokens", "0"),
        ("run", "-i", "a", "-o", "b", "--threads", "-1"),
        ("run", "-i", "a", "-o", "b", "--device", "abacus"),
        ("run", "-i", "a", "-o", "b", "--weights", "int3"),
        ("swim",),
    ],
)
def test_wrong_usage_is_two(arguments: tuple[str, ...], asked: list[JobOptions]) -> None:
    assert call(*arguments) == 2
    assert not asked


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("u"), 2),
        (ModelError("m"), 2),
        (StateError("s"), 2),
        (EngineDied("e"), 1),
        (KeyboardInterrupt(), 5),
    ],
)
def test_errors_have_their_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(options: JobOptions) -> int:
        raise error

    monkeypatch.setattr(shoal.cli, "answer", answer)
    assert call("run", "-i", "a", "-o", "b") == code
    assert capsys.readouterr().err.startswith("shoal: " + str(error))


@pytest.mark.parametrize("wrong", [{"order": "input"}, {"max_failures": "1%"}, {"input": "a"}, {"threads": "2"}])
def test_options_of_another_kind_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        JobOptions(**{"input": Path("a"), "output": Path("b"), **wrong})


def test_run_batch_is_strict_and_writes_one_file(asked: list[JobOptions]) -> None:
    assert call("run-batch", "-i", "a", "-o", "b", "--model", "m") == 3
    assert asked == [JobOptions(input=Path("a"), output=Path("b"), model="m", strict=True, one_file=True)]
    assert call("run-batch", "--input-file", "a", "--output-file", "b", "--model", "m") == 3
    assert asked[1] == asked[0]


def test_report_shows_what_the_job_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "o.jsonl"
    assert call("report", str(output)) == 2
    folder_of(output).mkdir()
    rows = Rows(total=3, ok=2, failed=1)
    write_report(Report(rows, errors={"x": Failures(1, 3, "why")}, exit_code=3), folder_of(output), DiskFiles())
    assert call("report", str(output)) == 0
    assert "3 rows: 2 ok, 1 failed" in capsys.readouterr().out
    assert call("report", str(output), "--json") == 0
    assert '"problems": []' in capsys.readouterr().out
    write_report(Report(Rows(total=3)), folder_of(output), DiskFiles())
    assert call("report", str(output)) == 1


def test_the_version_is_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"shoal {shoal.__version__}\n"


@given(st.integers(1, 10**4), st.sampled_from(["", "B", "k", "KB", "KiB", "MB", "MiB", "g", "GB", "GiB", "TB"]))
def test_sizes_are_read_with_their_unit(number: int, unit: str) -> None:
    factor = 1024 if "i" in unit else 1000
    assert parse_bytes(f"{number}{unit}") == number * factor ** " kmgt".index(unit.lower()[:1].replace("b", "") or " ")


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_a_failure_budget_is_a_count_or_a_share(failed: int, total: int) -> None:
    assert FailureBudget.parse("10").exceeded(failed, total) == (failed > 10)
    assert FailureBudget.parse("10%").exceeded(failed, total) == (failed > 0.1 * total)
    assert not FailureBudget().exceeded(failed, total)


@pytest.mark.parametrize("command", ["explain", "lint"])
def test_rows_may_be_named_as_run_has_them_or_by_their_place(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Path] = []

    def take(options: Any, *_: object) -> int:
        seen.append(getattr(options, "job", options).input)
        return 0

    monkeypatch.setattr(shoal.preview.command, f"run_{command}", take)
    (tmp_path / "shoal.yaml").write_text("input: c\n")
    for words in (["a"], ["-i", "a"], ["--input", "a"], ["a", "--config", str(tmp_path / "shoal.yaml")]):
        assert call(command, *words) == 0
    assert call(command, "--config", str(tmp_path / "shoal.yaml")) == 0
    monkeypatch.setenv("SHOAL_INPUT", "d")
    assert call(command) == call(command, "a") == 0
    assert [str(path) for path in seen] == ["a", "a", "a", "a", "c", "d", "a"]
    assert call(command, "a", "-i", "b") == 2 and "leave one of them out" in capsys.readouterr().err
    monkeypatch.delenv("SHOAL_INPUT")
    assert call(command) == 2 and "nothing to read" in capsys.readouterr().err
    (tmp_path / "shoal.yaml").write_text("file: c\n")
    assert call(command, "--config", str(tmp_path / "shoal.yaml")) == 2 and len(seen) == 7
