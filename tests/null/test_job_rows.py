"""The rows of a main job over the real scheduler, without a model: what fails alone, stop strings, counts, forms."""

from __future__ import annotations

import csv
import io
import json
from array import array
from pathlib import Path
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
from byte_text import VOCAB_SIZE, ByteTokenizer, row_encoder
from echo_job import ROWS, Watched, chat, completion, echo_backend, interrupt

from shoal.core.errors import RowError, StateError
from shoal.jobs.options import Order
from shoal.text.tokenizer import Tokenizer

MINNOW = Path(__file__).parents[2] / "shoal" / "models" / "minnow"


def test_a_row_that_no_memory_can_hold_is_refused_with_three_numbers(job) -> None:
    one = job([chat(0), chat(1, "word " * 300), chat(2, max_tokens=900, ignore_eos=True), chat(3)])
    assert one.run(echo_backend(num_blocks=12)) == 3
    assert one.codes() == ["kv_exhausted", "kv_exhausted"]
    for failure in one.failures():
        message = failure["response"]["body"]["error"]["message"]
        assert "needs" in message and "192 are available" in message and "--memory" in message
    assert [line["custom_id"] for line in one.answers()] == ["r0", "r3"]


def test_one_prompt_that_fails_fails_its_row_and_no_other(job) -> None:
    one = job([completion(0, ["short", "word " * 300, "brief"], n=2, temperature=1.0), chat(1)])
    assert one.run(echo_backend(num_blocks=12)) == 3
    assert one.codes() == ["kv_exhausted"] and [line["custom_id"] for line in one.answers()] == ["r1"]


def test_a_row_longer_than_the_context_fails_before_it_runs(job) -> None:
    one = job([chat(0, "word " * 9000), chat(1, max_tokens=8192), chat(2)])
    backend = Watched(echo_backend(), lambda rounds: None)
    assert one.run(backend) == 3
    assert one.codes() == ["context_length_exceeded"] * 2
    assert [request.id for request in backend.submitted] == ["3.0.0"]


def test_a_word_without_a_row_in_the_embedding_fails_its_line() -> None:
    class Larger(ByteTokenizer):
        def encode(self, text: str, special: bool = True) -> array:
            return super().encode(text, special) + array("i", [VOCAB_SIZE] * (text == "odd"))

    encoder = row_encoder()
    encoder.tokenizer = Larger()
    good, bad = encoder.encode([completion(0, "even").encode(), completion(1, "odd").encode()])
    assert not isinstance(good, RowError)
    assert isinstance(bad, RowError) and bad.code == "invalid_token"


def test_a_stop_string_gives_the_text_and_the_tokens_that_no_streaming_would(job) -> None:
    tokenizer = Tokenizer.load(MINNOW)
    plain = [chat(i, max_tokens=60, ignore_eos=bool(i % 2), return_token_ids=True) for i in range(24)]
    free = job(plain)
    free.run()
    rows, wanted = [], []
    for number, line in enumerate(free.answers()):
        choice = line["response"]["body"]["choices"][0]
        text, tokens = choice["message"]["content"], choice["token_ids"]
        place = number % max(len(text) - 3, 1)
        stop, keep = text[place : place + 1 + number % 3] or "none", number % 3 == 0
        rows.append(json.loads(plain[number]))
        rows[-1]["body"] |= {"stop": [stop, "\x00never"], "include_stop_str_in_output": keep}
        if (found := text.find(stop)) >= 0:
            used = next(n for n in range(len(tokens) + 1) if stop in tokenizer.decode(tokens[:n], True))
            wanted.append((text[: found + keep * len(stop)], tokens[:used], "stop", stop))
        else:
            wanted.append((text, tokens, choice["finish_reason"], None))
    for ahead in (0, 1):
        stopped = job([json.dumps(row) for row in rows])
        backend = Watched(echo_backend(ahead=ahead), lambda rounds: None)
        assert stopped.run(backend) == 0
        found = [line["response"]["body"] for line in stopped.answers()]
        choices = [body["choices"][0] for body in found]
        assert [(c["message"]["content"], c["token_ids"], c["finish_reason"], c["stop_reason"]) for c in choices] == [
            *wanted
        ]
        assert [body["usage"]["completion_tokens"] for body in found] == [len(tokens) for _, tokens, _, _ in wanted]
        assert backend.cancelled, "some were ended before their limit"


def test_the_window_is_bounded_whatever_a_row_asks_for(job) -> None:
    one = job([chat(i, n=64, temperature=1.0, max_tokens=1) for i in range(12)])
    backend = Watched(echo_backend(), lambda rounds: None)
    with mock.patch("shoal.jobs.supply.WINDOW", 100):
        assert one.run(backend) == 0
    assert len(backend.submitted) == 12 * 64 and backend.most_waiting < 100 + 64


def test_a_line_that_alone_holds_back_half_the_file_is_moved_up(job) -> None:
    sure = {"ignore_eos": True, "max_tokens": 4}  # lengths that the plan knows go first
    rows = [
        chat(0, "zzz the only one of its kind"),
        *(chat(i, "again and again", seed=i, temperature=1, **sure) for i in range(1, 400)),
    ]
    mixed = [chat(i, f"{'odd' if i % 2 else 'even'} {i}", **(sure if i % 2 else {})) for i in range(400)]
    submitted = []
    with mock.patch("shoal.jobs.supply.WINDOW", 32):
        for one in (job(rows), job(mixed)):
            backend = Watched(echo_backend(sequences=16), lambda rounds: None)
            assert one.run(backend) == 0
            assert one.report.tokens.prompt_recomputed < 40
            submitted.append(backend.submitted)
    alone, together = submitted
    place = next(at for at, request in enumerate(alone) if request.id == "1.0.0")
    assert 200 < place < 300 and alone[place].index == -1
    assert len({request.id for request in alone}) == len(alone) == 400
    assert all(request.index >= 0 for request in together), "moving all of them up would undo the plan"


# -- counts ----------------------------------------------------------------------------------------


def mixed(count: int) -> list[str]:
    """Equal rows, samples, several prompts, scored prompts and salts."""
    start = "Once upon a time in a small town by the sea there lived a clerk"
    rows = []
    for i in range(count):
        rows.append(
            [
                chat(i, "The same text"),
                chat(i, n=3, temperature=1.0),
                completion(i, [f"{start} who", start, f"{start} and"], n=2, temperature=0.5),
                completion(i, f"{start} {i}", echo=True, prompt_logprobs=0),
                chat(i, "The same text", cache_salt=f"s{i % 4}"),
                completion(i, start),
            ][i % 6]
        )
    return rows


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_bound_is_what_is_computed(job, ahead: int) -> None:
    one = job(mixed(90))
    assert one.run(echo_backend(ahead=ahead)) == 0
    tokens = one.report.tokens
    assert tokens.prompt_computed == tokens.prompt_bound < tokens.prompt and tokens.prompt_recomputed == 0


# -- other forms -----------------------------------------------------------------------------------


class Piped:
    """Standard input that holds these bytes."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


def test_standard_input_is_kept_so_that_the_job_goes_on(job, unbroken) -> None:
    data = "".join(row + "\n" for row in ROWS).encode()
    one = job(ROWS, input=Path("-"))
    with mock.patch("sys.stdin", Piped(data)):
        assert one.run(Watched(echo_backend(), interrupt(9))) == 5
    with mock.patch("sys.stdin", Piped(b"another\n")), pytest.raises(StateError, match="standard input is not what"):
        one.run()
    with mock.patch("sys.stdin", Piped(b"")):
        assert one.run() == 0
    assert one.final() == unbroken


COLUMNS = ["id", "text", "answer", "finish_reason", "prompt_tokens", "completion_tokens"]


def test_csv_comes_back_as_csv(job) -> None:
    one = job([], name="out.csv", input="in.csv", prompt="Say: {text}", body={"max_tokens": 4})
    with (one.root / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([i, f'"{i}",\nand'] for i in range(20)), [1, 2, 3]])
    assert one.run(Watched(echo_backend(), interrupt(3))) == 5 and not one.out.exists()
    assert one.run() == 3 and one.run() == 3
    with one.out.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == COLUMNS and [row[:2] for row in rows] == [[str(i), f'"{i}",\nand'] for i in range(20)]
    assert one.codes() == ["malformed_row"]


def test_parquet_comes_back_as_parquet(job) -> None:
    one = job([], name="out.parquet", input="in.parquet", prompt="Say: {text}", body={"max_tokens": 4})
    table = pyarrow.table({"id": list(range(20)), "text": [f"t{i}" for i in range(20)]})
    pyarrow.parquet.write_table(table, one.root / "in.parquet")
    assert one.run() == 0 and one.run() == 0
    found = pyarrow.parquet.read_table(one.out)
    assert found.schema.names == COLUMNS and found.column("id").to_pylist() == list(range(20))


def test_plain_rows_come_back_plain_or_in_envelopes(job) -> None:
    rows = [*(json.dumps({"id": i, "text": f"t{i}"}) for i in range(9)), '{"id": 9}']
    plain = job(rows, prompt="Say: {text}", body={"max_tokens": 4})
    assert plain.run() == 3
    assert [list(line) for line in plain.answers()] == [COLUMNS] * 9
    wrapped = job(rows, prompt="Say: {text}", body={"max_tokens": 4}, openai=True)
    assert wrapped.run() == 3
    texts = [line["response"]["body"]["choices"][0]["text"] for line in wrapped.answers()]
    assert texts == [line["answer"] for line in plain.answers()]


def test_the_order_of_lines_is_as_asked(job, unbroken) -> None:
    rows = [*ROWS[:60], "broken"]
    files = {}
    for order in Order:
        one = job(rows, order=order)
        assert one.run(Watched(echo_backend(sequences=8), interrupt(9))) == 5
        assert one.run(echo_backend(sequences=8)) == 3
        ids = [line["custom_id"] for line in one.answers()]
        files[order] = {line["custom_id"]: line["response"]["body"]["choices"] for line in one.answers()}
        assert (ids == [f"r{i}" for i in range(60)]) == (order is not Order.FINISH)
    assert files[Order.PLAN] == files[Order.INPUT] == files[Order.FINISH]


def test_one_file_takes_the_failed_lines_too(job) -> None:
    one = job(["broken", *ROWS[:3], '{"custom_id": "x"}'], one_file=True)
    assert one.run() == 3 and one.run() == 3
    assert [line.get("custom_id") for line in one.answers()] == [None, "r0", "r1", "r2", "x"]
    assert not one.errors.exists() and one.report.files == {str(one.out): 5}


def test_failed_lines_are_an_input_that_works(job) -> None:
    """What failed for want of memory is run again from the errors file, with more of it."""
    rows = [chat(i, "word " * 300 if i % 2 else None) for i in range(6)]
    one, whole = job(rows), job(rows)
    assert (one.run(echo_backend(num_blocks=12)), whole.run()) == (3, 0)
    again = job([])
    assert again.run(input=one.errors) == 0
    assert again.out.read_bytes().splitlines() == whole.out.read_bytes().splitlines()[1::2]
