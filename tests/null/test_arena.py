"""The arena gives back what was put in, and a torn or damaged file is refused."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

import pytest

from shoal.core.errors import StateError
from shoal.jobs.arena import PAD, SENTINEL, Arena, ArenaWriter


def write(path: Path, prompts: list[array[int]]) -> list[int]:
    with ArenaWriter(path) as writer:
        return [writer.append(prompt) for prompt in prompts]


def test_prompts_come_back_as_they_went_in(tmp_path: Path) -> None:
    rng = random.Random(1)
    prompts = [array("i", [rng.randrange(1 << 20) for _ in range(rng.randrange(50))]) for _ in range(200)]
    offsets = write(tmp_path / "a", prompts)
    arena = Arena(tmp_path / "a", verify=True)
    assert [arena.slice(offset, len(prompt)) for offset, prompt in zip(offsets, prompts, strict=True)] == prompts
    assert arena.tokens == sum(map(len, prompts))
    assert (arena.padded[arena.tokens :] == SENTINEL).all() and len(arena.padded) == arena.tokens + PAD


def test_an_empty_arena_is_valid(tmp_path: Path) -> None:
    write(tmp_path / "a", [])
    assert Arena(tmp_path / "a", verify=True).tokens == 0


def test_a_slice_outside_the_arena_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a", [array("i", [1, 2, 3])])
    arena = Arena(tmp_path / "a")
    for offset, length in ((0, 4), (-1, 1), (3, 1), (0, -1)):
        with pytest.raises(IndexError):
            arena.slice(offset, length)


def test_a_slice_is_a_copy_that_outlives_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a", [array("i", [1, 2, 3])])
    prompt = Arena(tmp_path / "a").slice(0, 3)
    (tmp_path / "a").unlink()
    assert prompt == array("i", [1, 2, 3]) and prompt.typecode == "i"


@pytest.mark.parametrize("cut", [0, 1, 4, 100, PAD * 4, PAD * 4 + 60])
def test_every_torn_length_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a"
    write(path, [array("i", range(100))])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - cut] if cut else data + b"x")
    with pytest.raises(StateError, match="torn"):
        Arena(path)


def test_a_writer_left_by_an_error_leaves_a_torn_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ArenaWriter(tmp_path / "a") as writer:
        writer.append(array("i", [1]))
        _ = 1 // 0
    with pytest.raises(StateError, match="torn"):
        Arena(tmp_path / "a")


def test_a_changed_token_is_found_when_the_content_is_verified(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, [array("i", range(100))])
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(data)
    Arena(path)
    with pytest.raises(StateError, match="damaged"):
        Arena(path, verify=True)


def test_a_missing_arena_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="Run again"):
        Arena(tmp_path / "none")
