"""The store of answers: what is put comes back, what is damaged does not, and any number of jobs may use it."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from array import array
from contextlib import closing
from pathlib import Path
from unittest import mock

import pytest

from shoal.core.errors import UsageError
from shoal.core.types import TokenScore
from shoal.jobs.answer import Sample
from shoal.jobs.cache import DAY, NAME, AnswerCache, Kept, look, pack, prune, unpack

ENGINE = "ab" * 32


def kept(number: int) -> Kept:
    """A sample that only its number decides."""
    luck = random.Random(number)
    tokens = array("i", (luck.randrange(150_000) for _ in range(luck.randrange(40))))
    scores = [
        TokenScore(t, -luck.random() * 9, luck.randrange(1, 9), ((t, -0.5), (t + 1, float("-inf")))) for t in tokens
    ]
    reason = luck.choice([None, "\n", 5])
    return Kept(
        Sample("é\x00" * luck.randrange(9), tokens, luck.choice(["stop", "length"]), reason, scores), scores[1:]
    )


def ask(number: int) -> bytes:
    return number.to_bytes(16, "little")


def fill(folder: Path, count: int, engine: str = ENGINE) -> None:
    with closing(AnswerCache(folder, engine)) as cache:
        for number in range(count):
            cache.put(ask(number), 0, kept(number), 0.0)


@pytest.mark.parametrize("number", range(20))
def test_a_sample_comes_back_as_it_was(number: int) -> None:
    assert unpack(pack(kept(number))) == kept(number)


def test_what_is_put_is_there_for_this_job_at_once_and_for_others_soon(tmp_path: Path) -> None:
    with closing(AnswerCache(tmp_path, ENGINE)) as mine, closing(AnswerCache(tmp_path, ENGINE)) as other:
        mine.put(ask(1), 0, kept(1), 0.0)
        assert mine.get(ask(1), 0) == kept(1) and other.get(ask(1), 0) is None
        mine.tick(0.4)
        assert other.get(ask(1), 0) is None
        mine.tick(0.6)
        assert other.get(ask(1), 0) == kept(1)


def test_an_entry_is_found_under_its_engine_its_request_and_its_sample_alone(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    with closing(AnswerCache(tmp_path, "cd" * 32)) as another:
        assert another.get(ask(1), 0) is None
    with closing(AnswerCache(tmp_path, ENGINE)) as same:
        assert same.get(ask(1), 0) == kept(1)
        assert same.get(ask(1), 1) is None and same.get(ask(7), 0) is None


def test_no_damaged_entry_is_served_and_it_is_put_anew(tmp_path: Path) -> None:
    fill(tmp_path, 60)
    luck = random.Random(3)
    with closing(sqlite3.connect(tmp_path / NAME)) as database, database:
        for (address,) in database.execute("SELECT address FROM entries").fetchall():
            (value,) = database.execute("SELECT value FROM entries WHERE address=?", (address,)).fetchone()
            place = luck.randrange(len(value))
            harm = [
                value[:place] + bytes([value[place] ^ 1 << luck.randrange(8)]) + value[place + 1 :],
                value[:place],
                value + b"\0",
                "text",
            ]
            database.execute("UPDATE entries SET value=? WHERE address=?", (luck.choice(harm), address))
    with closing(AnswerCache(tmp_path, ENGINE)) as cache:
        assert [cache.get(ask(number), 0) for number in range(60)] == [None] * 60
        assert cache.damaged == 60 and not cache.trouble
    assert look(tmp_path).entries == 0


def test_entries_that_changed_places_are_not_served(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    with closing(sqlite3.connect(tmp_path / NAME)) as database, database:
        (one, first), (two, second) = database.execute("SELECT address, value FROM entries").fetchall()
        database.executemany("UPDATE entries SET value=? WHERE address=?", [(second, one), (first, two)])
    with closing(AnswerCache(tmp_path, ENGINE)) as cache:
        assert cache.get(ask(0), 0) is None and cache.get(ask(1), 0) is None


@pytest.mark.parametrize("place", [0, 100, 5000])
def test_a_damaged_file_gives_no_wrong_answer_and_stops_no_job(tmp_path: Path, place: int) -> None:
    fill(tmp_path, 50)
    path = tmp_path / NAME
    data = bytearray(path.read_bytes())
    data[place : place + 3000] = bytes(3000)
    path.write_bytes(data)
    with closing(AnswerCache(tmp_path, ENGINE)) as cache:
        for number in range(50):
            assert cache.get(ask(number), 0) in (None, kept(number))
        cache.put(ask(99), 0, kept(99), 0.0)
        cache.flush()
    assert place or "the job goes on without it" in cache.trouble


def test_a_folder_that_cannot_be_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot use"):
        AnswerCache(tmp_path / "file" / "cache", ENGINE)
    for use in (look, lambda folder: prune(folder, 1)):
        with pytest.raises(UsageError, match="there is no cache"):
            use(tmp_path)


def test_many_jobs_may_write_and_read_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, test_cache as t; from pathlib import Path; from shoal.jobs.cache import AnswerCache\n"
        "cache = AnswerCache(Path(sys.argv[1]), t.ENGINE)\n"
        "for n in range(300):\n"
        "    cache.put(t.ask(n), 0, t.kept(n), 0.0); n % 7 or cache.flush()\n"
        "    found = cache.get(t.ask(299 - n), 0); assert found in (None, t.kept(299 - n))\n"
        "cache.close(); assert not cache.trouble, cache.trouble\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    jobs = [subprocess.Popen(command, cwd=Path(__file__).parent) for _ in range(3)]
    assert [job.wait() for job in jobs] == [0, 0, 0]
    assert look(tmp_path).entries == 300


def test_pruning_removes_what_was_not_used_for_longest(tmp_path: Path) -> None:
    for day, numbers in ((100, range(20)), (101, range(20, 40))):
        with mock.patch("time.time", lambda day=day: day * DAY + 5.0), closing(AnswerCache(tmp_path, ENGINE)) as cache:
            for number in numbers:
                cache.put(ask(number), 0, kept(number), 0.0)
    with mock.patch("time.time", lambda: 105 * DAY + 5.0):
        with closing(AnswerCache(tmp_path, ENGINE)) as cache:
            assert cache.get(ask(3), 0) == kept(3)
        facts = look(tmp_path)
        assert (facts.entries, facts.oldest) == (40, 5)
        lengths = {number: 16 + len(pack(kept(number))) for number in range(40)}
        assert facts.size == sum(lengths.values())
        room = lengths[3] + sum(lengths[number] for number in range(20, 40))
        assert prune(tmp_path, room).entries == 21
        with closing(AnswerCache(tmp_path, ENGINE)) as cache:
            assert [number for number in range(40) if cache.get(ask(number), 0)] == [3, *range(20, 40)]
        assert prune(tmp_path, 0).entries == 0
