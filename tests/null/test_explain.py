"""What explain says of a file is what a run of it does."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
from echo_job import EchoJob, chat, completion
from encoder_folder import write_encoder, write_pooling
from rich.console import Console
from test_embeddings import embedding

import shoal
from shoal.core.config import WEIGHTS, EngineConfig
from shoal.jobs.options import JobOptions
from shoal.preview import facts, machine
from shoal.preview.command import explain, run_explain
from shoal.preview.facts import lengths
from shoal.preview.forecast import in_bulk, simulate, work_of
from shoal.preview.look import Looked, look
from shoal.preview.machine import ERROR, Measured, Unmeasured
from shoal.preview.options import ExplainOptions
from shoal.preview.sizes import Sizes
from shoal.preview.words import measured_words
from shoal.show.prefixes import MOST, Forest, largest
from shoal.text.checkpoint import EMBEDDED

ROOT = Path(__file__).resolve().parents[2]
PRETEND = Measured(
    layers=((1, 0.01), (64, 0.012), (1024, 0.2)), answers=((1, 0.001), (256, 0.02)), pair=1e-8, read=1e-8,
    draw=1e-4, begin=1e-4, score=1e-5, block=32,
    threads=2, start=1.0, build=0.1, measured_bytes=10**7, at=1.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that nobody measures."""
    monkeypatch.setattr(facts, "measured", lambda *_: PRETEND)


def rows(seed: int, groups: int = 5, each: int = 12, fixed: bool = True) -> list[str]:
    """Prompts in groups that share their beginnings, some of them the same, in no order."""
    luck = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(luck.choice(("fish", "river", "stone", "wind", "small")) for _ in range(count))

    found = []
    for _ in range(groups):
        shared = words(luck.randrange(1, 80))
        for _ in range(each):
            text = f"{shared} {words(luck.randrange(1, 30))}"
            body = {
                "max_tokens": luck.randrange(1, 40),
                "ignore_eos": fixed,
                "temperature": 0,
                "n": luck.choice((1, 1, 2)),
            }
            found.append((text, body))
    found += found[:4]
    luck.shuffle(found)
    return [completion(number, text, **body) for number, (text, body) in enumerate(found)]


def file(folder: Path, lines: list[str]) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def forest(looked: Looked, most: int = MOST) -> Forest:
    return largest(looked.prompts, looked.reach, looked.words.tokenizer, most)


def options(path: Path, **more: Any) -> ExplainOptions:
    return ExplainOptions(JobOptions(input=path, output=path.with_name("nothing")), **more)


@pytest.mark.parametrize("seed", range(4))
def test_prompt_tokens_are_exactly_those_that_a_run_computes(tmp_path: Path, seed: int) -> None:
    job = EchoJob(tmp_path, [*rows(seed), chat(900, logprobs=True), "{", completion(901, "x", prompt_logprobs=1)])
    assert job.run() == 3
    found, tokens = explain(options(tmp_path / "in.jsonl")), job.report.tokens
    assert (found.prompt_tokens, found.bound) == (tokens.prompt, tokens.prompt_bound)
    assert found.bound == tokens.prompt_computed
    assert found.rows.equal == job.report.reused.duplicates >= 4
    assert found.rows.run + found.rows.equal + found.rows.bad == found.rows.total == job.report.rows.total
    with look(options(tmp_path / "in.jsonl").job) as looked:
        assert int(looked.cost.sum()) == looked.plan.bound


def test_bad_rows_come_by_kind_with_their_lines(tmp_path: Path) -> None:
    long = completion(7, "fish " * 9000)
    found = explain(options(file(tmp_path, ["{", chat(0), long, *["nul"] * 8])))
    assert [(bad.code, bad.count, bad.lines) for bad in found.bad] == [
        ("invalid_json_line", 9, (1, 4, 5, 6, 7)), ("context_length_exceeded", 1, (3,)),
    ]  # fmt: skip
    assert found.rows.overflow == 1 and found.rows.bad == 10 and found.advice[0].flag.startswith("shoal lint")


def test_a_prefix_is_shared_by_as_many_prompts_as_it_says(tmp_path: Path) -> None:
    with look(options(file(tmp_path, rows(9))).job) as looked:
        prompts, found = looked.prompts, forest(looked).prefixes
        texts = [prompts.padded[o : o + n].tolist() for o, n in zip(prompts.offset, prompts.length, strict=True)]
        ranked = sorted(texts)
        assert len(found) > 5
        for prefix in found:
            whole = ranked[prefix.left][: prefix.end]
            assert sum(text[: prefix.end] == whole for text in texts) == prefix.uses > 1
            assert prefix.begin == (found[prefix.above].end if prefix.above >= 0 else 0)
            assert prefix.saved == (prefix.uses - 1) * (prefix.end - prefix.begin) > 0


@pytest.mark.parametrize("values", [[5], [1, 2, 3], list(range(100, 300)), [1, 5000, 7, 80], [0, 0, 9000], [99, 100]])
def test_a_histogram_has_every_value_in_its_bar(values: list[int]) -> None:
    found = lengths(np.array(values, dtype=np.int64))
    for bar in found.bars:
        assert bar.count == sum(bar.low <= value <= bar.high for value in values)
    assert sum(bar.count for bar in found.bars) == len(values) and len(found.bars) <= 16
    assert (found.least, found.most, found.total) == (min(values), max(values), sum(values))


@pytest.mark.parametrize("blocks", [4000, 60])
@pytest.mark.parametrize("shape", [(1, 300), (30, 10), (6, 40)])
def test_steps_in_bulk_take_the_time_of_the_schedulers_own(tmp_path: Path, shape: tuple[int, int], blocks: int) -> None:
    config = EngineConfig(step_tokens=512, max_sequences=64)
    with look(options(file(tmp_path, rows(3, *shape))).job) as looked:
        one = simulate(looked, looked.limits, PRETEND.cost(), config, blocks)
        bulk = in_bulk(work_of(looked, looked.limits), PRETEND.cost(), config, blocks)
    near = 0.05 if blocks == 4000 else 0.1  # short of memory the scheduler foresees ends that are not seen here
    assert bulk.seconds == pytest.approx(one.seconds, rel=near)
    assert bulk.steps == pytest.approx(one.steps, rel=near)
    assert bulk.prompt == one.prompt or blocks == 60
    if blocks == 4000:
        assert bulk.waited == 0


def test_the_time_is_a_point_where_lengths_are_known_and_a_range_where_not(tmp_path: Path) -> None:
    known = explain(options(file(tmp_path, rows(1)))).time
    assert known is not None and known.likely == known.least == known.most
    before = max(known.load, known.plan)
    assert (known.high - before) / (known.low - before) == pytest.approx((1 + ERROR) / (1 - ERROR))
    unknown = explain(options(file(tmp_path, rows(1, fixed=False)))).time
    assert unknown is not None and unknown.likely is None
    assert unknown.least.seconds < unknown.most.seconds
    expected = explain(options(file(tmp_path, rows(1, fixed=False)), answer_tokens=9)).time
    assert expected is not None and expected.likely is not None
    assert unknown.low < expected.low < expected.high < unknown.high


def test_a_machine_whose_speed_varied_gives_a_wider_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path, rows(1))
    steady = explain(options(path)).time
    monkeypatch.setattr(facts, "measured", lambda *_: msgspec.structs.replace(PRETEND, unsteady=0.3))
    unsteady = explain(options(path)).time
    assert steady is not None and unsteady is not None
    assert unsteady.low < steady.low < steady.high < unsteady.high
    assert "varied by 30 %" in measured_words(unsteady) and "varied" not in measured_words(steady)


def test_tokens_that_are_drawn_cost_more(tmp_path: Path) -> None:
    greedy, drawn = (
        explain(
            options(file(tmp_path, [completion(i, f"fish {i}", ignore_eos=True, temperature=t) for i in range(50)]))
        )
        for t in (0, 1)
    )
    assert greedy.time is not None and drawn.time is not None
    steps = [found.time.most.seconds * (1 - found.time.most.job) for found in (greedy, drawn)]  # type: ignore[union-attr]
    assert steps[1] - steps[0] == pytest.approx(PRETEND.draw * 50 * 5, rel=0.05)


def test_memory_that_is_short_is_named_and_costs_time(tmp_path: Path) -> None:
    path = file(tmp_path, rows(1, 40, 5))
    job = JobOptions(input=path, output=path.with_name("nothing"), memory=2_000_000)
    short, enough = explain(ExplainOptions(job)), explain(options(path))
    assert short.memory is not None and enough.memory is not None
    assert short.memory.have_tokens < short.memory.need_tokens <= enough.memory.have_tokens
    assert short.time is not None and enough.time is not None
    assert short.time.most.waited > 0.5 and short.time.limit == "memory" and enough.time.most.waited == 0
    assert short.time.most.seconds > enough.time.most.seconds
    assert any(advice.flag.startswith("--memory") for advice in short.advice)


def test_cost_and_energy_are_those_of_the_time(tmp_path: Path) -> None:
    found = explain(options(file(tmp_path, rows(1)), price=3600.0, watts=1000.0))
    assert found.time is not None
    assert found.bill.cost == pytest.approx((found.time.low, found.time.high))
    assert found.bill.kilowatt_hours == pytest.approx((found.time.low / 3600, found.time.high / 3600))


def test_the_page_is_well_formed_whole_and_silent(tmp_path: Path) -> None:
    lines = [*rows(1), "{", completion(99, "<script>alert('&')</script>\x01" * 9, max_tokens=3)]
    lines += [completion(100 + i, f"<b>&amp;\x02 {'<i>' * 30} {i}") for i in range(3)]
    console, path = Console(file=io.StringIO(), width=200), tmp_path / "page.html"
    run_explain(options(file(tmp_path, lines), html=path), False, console)
    text = path.read_text(encoding="utf-8")
    tree = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))
    assert {"svg", "table", "style", "title"} <= {element.tag for element in tree.iter()}
    assert "script" not in {element.tag for element in tree.iter()}
    assert not re.search(r"(?:src|href|url)\s*[=(]|@import|https?:", re.sub(r"&lt;.*?&gt;", "", text))
    icicle = next(e for e in tree.iter("svg") if e.get("class") == "icicle")
    assert all(float(box.get("x", "").rstrip("%")) + float(box.get("width", "").rstrip("%")) < 100.1 for box in icicle)


def test_json_has_every_number(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    run_explain(options(file(tmp_path, rows(1))), True, console)
    found = json.loads(console.file.getvalue())  # type: ignore[attr-defined]
    assert found["rows"]["total"] == 64 and found["forest"]["prefixes"] and found["time"]["most"]["steps"] > 0


def test_it_needs_neither_weights_nor_torch(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED, model, ignore=shutil.ignore_patterns("*.safetensors"))
    path = file(tmp_path, rows(1))
    code = (
        "import sys\nfrom shoal.preview import facts\nfrom test_explain import PRETEND\n"
        "facts.measured = lambda *_: PRETEND\n"
        f"sys.argv = ['shoal', 'explain', {str(path)!r}, '--model', {str(model)!r}]\n"
        "from shoal.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    folder = {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "prompt tokens" in done.stdout, done.stderr


def test_where_nothing_can_be_measured_all_but_the_time_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Measured:
        raise Unmeasured("no kernels")

    monkeypatch.setattr(facts, "measured", refuse)
    found = explain(options(file(tmp_path, rows(1))))
    assert found.time is None and found.no_time == "no kernels" and found.bound > 0
    assert found.memory is not None and found.memory.have_tokens > 0


def test_a_measurement_is_kept_for_what_it_was_made_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def measure(folder: Path, weights: str, kv: str, threads: int | None) -> Measured:
        made.append(weights)
        return PRETEND

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "_measure", measure)
    sizes = Sizes.load(EMBEDDED)

    def ask(weights: str = "bf16", threads: int | None = None, again: bool = False) -> Measured:
        return machine.measured(EMBEDDED, sizes, weights, "bf16", threads, again)

    first = ask()
    assert ask() == first and len(made) == 1
    ask("int8")
    ask(threads=7)
    assert len(made) == 3
    ask(again=True)
    assert len(made) == 4
    monkeypatch.setattr(machine, "_processor", lambda: ["another"])
    ask()
    assert len(made) == 5
    for path in machine.cache_folder().iterdir():
        path.write_bytes(b"{")
    ask()
    assert len(made) == 6


@pytest.mark.parametrize("mode", WEIGHTS)
def test_every_kind_of_weights_can_be_asked_for(tmp_path: Path, mode: str) -> None:
    path = file(tmp_path, rows(1))
    job = JobOptions(input=path, output=path.with_name("nothing"), weights=mode)
    found = explain(ExplainOptions(job))
    assert found.time is not None and found.memory is not None and not found.memory.problem
    plain = Sizes.load(EMBEDDED).weight_bytes("bf16")
    assert found.memory.weight_bytes < plain if "int" in mode else found.memory.weight_bytes >= plain


def odd_rows(seed: int) -> list[str]:
    """Rows that share beginnings, some of them scored, without an answer, or under a salt of their own."""
    luck, found = random.Random(seed), []
    for number, line in enumerate(rows(seed, groups=4, each=16)):
        row = json.loads(line)
        kind: dict[str, Any] = luck.choice([
            {}, {"echo": True, "logprobs": 1, "max_tokens": 0, "n": 1}, {"prompt_logprobs": 1},
            {"prompt_logprobs": 0, "score_from": luck.randrange(1, 90)}, {"cache_salt": luck.choice("ab")},
        ])  # fmt: skip
        if "score_from" in kind:
            row["body"]["prompt"] = row["body"]["prompt"] + " far" * 90
        row["body"] |= kind | {"seed": number}
        found.append(json.dumps(row))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_scheduler_computes_no_more_in_pretend_time_than_the_plan_says(tmp_path: Path, seed: int) -> None:
    path = file(tmp_path, odd_rows(seed))
    with look(options(path).job) as looked:
        config = EngineConfig(step_tokens=512, max_sequences=64)
        one = simulate(looked, looked.limits, PRETEND.cost(), config, 4000)
        assert looked.plan.num_bad == 0 and one.prompt == looked.plan.bound + looked.plan.last_again
    found = explain(options(path))
    assert found.time is not None and found.time.most.answer_tokens > 0


def test_rows_without_answers_take_time_too(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    write_pooling(folder, "last")
    scored = [completion(i, f"fish {i}", echo=True, max_tokens=0, logprobs=1) for i in range(9)]
    made = [embedding(i, [f"a river {i}", "a stone"]) for i in range(9)]
    for lines in (scored, made):
        path = file(tmp_path, lines)
        found = explain(ExplainOptions(JobOptions(input=path, output=tmp_path / "nothing", model=str(folder))))
        assert found.rows.bad == 0 and found.time is not None
        assert found.time.most.seconds > 0 and found.time.most.answer_tokens == 0


@pytest.mark.parametrize("seed", range(2))
def test_every_likelihood_that_is_wanted_is_paid_for(tmp_path: Path, seed: int) -> None:
    dear = msgspec.structs.replace(PRETEND, score=1e-3)
    config = EngineConfig(step_tokens=512, max_sequences=64)
    with look(options(file(tmp_path, odd_rows(seed))).job) as looked:
        work = work_of(looked, looked.limits)
        wanted = 1e-3 * int(work.scored.sum())
        assert wanted > 0
        for time in (
            lambda cost: simulate(looked, looked.limits, cost, config, 4000),
            lambda cost: in_bulk(work, cost, config, 4000),
        ):
            more = time(dear.cost()).seconds - time(msgspec.structs.replace(PRETEND, score=0.0).cost()).seconds
            assert more == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("seed", range(4))
def test_prefixes_save_together_what_the_plan_saves(tmp_path: Path, seed: int) -> None:
    with look(options(file(tmp_path, odd_rows(seed))).job) as looked:
        saved = [forest(looked, most).saved for most in (0, 1, 7, 40, 10**6)]
        assert len(set(saved)) == 1 and saved[0] == int(looked.units["goal"].sum() - looked.cost.sum()) > 0


def test_prompts_that_are_scored_from_their_beginning_save_nothing(tmp_path: Path) -> None:
    path = file(tmp_path, [completion(i, "a river and a fish " * 9 + str(i), prompt_logprobs=0) for i in range(5)])
    with look(options(path).job) as looked:
        assert forest(looked).prefixes == () and looked.plan.bound == looked.plan.prompt_tokens


def test_an_encoder_is_explained_as_it_runs(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "model")
    path = file(tmp_path, [embedding(i, "one two three " + "four " * (i % 7) + "five") for i in range(40)])
    job = JobOptions(input=path, output=tmp_path / "nothing", model=str(folder))
    with look(job) as looked:
        assert looked.plan.order == "length" and forest(looked).prefixes == ()
        served = looked.units["length"][looked.order].tolist()
        assert served == sorted(served, reverse=True) and int(looked.cost.sum()) == sum(served)
    found = explain(ExplainOptions(job))
    assert found.memory is None and found.time is None and "encoder" in found.no_time
    assert found.rows.equal == 33 and found.rows.bad == 0 and not found.advice
    console, html = Console(file=io.StringIO(), width=200), tmp_path / "page.html"
    run_explain(ExplainOptions(job, html=html), False, console)
    assert "memory" not in console.file.getvalue() and "Memory" not in html.read_text()  # type: ignore[attr-defined]


def test_the_prefixes_whose_own_part_saves_most_come_first(tmp_path: Path) -> None:
    system, task = list(range(300, 330)), list(range(400, 420))
    lines = [completion(i, [*system, *task, 500 + i]) for i in range(5)]
    lines += [completion(5 + i, [*system, 600 + i]) for i in range(5)]
    with look(options(file(tmp_path, lines)).job) as looked:
        shown = [[(each.end, each.uses) for each in forest(looked, most).prefixes] for most in (1, 2, 9)]
    assert shown == [[(30, 10)], [(30, 10), (50, 5)], [(30, 10), (50, 5)]]


def test_as_a_call_it_says_what_the_command_says_and_shows_itself_in_a_notebook(tmp_path: Path) -> None:
    path = file(tmp_path, rows(3))
    found, console = shoal.explain(path), Console(file=io.StringIO(), width=400)
    run_explain(options(path), True, console)
    mine, command = json.loads(found.json), json.loads(console.file.getvalue())  # type: ignore[attr-defined]
    for each in (mine, command):
        assert each["time"]["high"] > 0
        del each["seconds"], each["time"], each["advice"]  # the time it took to look is in these
    assert mine == command and f"rows      {len(rows(3))}" in repr(found)
    frame = ElementTree.fromstring(found._repr_html_())
    srcdoc = found.html.replace("\n", " ")  # ends of lines are spaces to XML
    assert frame.tag == "iframe" and frame.attrib["srcdoc"] == srcdoc
    with pytest.raises(shoal.ShoalError, match="standard input"):
        shoal.explain("-")
