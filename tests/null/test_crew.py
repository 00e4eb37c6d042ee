"""Several processes encode a file exactly as one does, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from some_tokenizers import MINNOW

from shoal.core.errors import RowError, ShoalError
from shoal.jobs.crew import LARGE, Crew, on_all_cores
from shoal.jobs.encode import Encoded, RowEncoder
from shoal.jobs.settings import JobSettings
from shoal.text.chat import ChatTemplate
from shoal.text.checkpoint import ModelInfo
from shoal.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(MINNOW)
MODEL = ModelInfo.load(MINNOW, TOKENIZER)
ENCODER = RowEncoder(TOKENIZER, ChatTemplate.load(MINNOW), MODEL, JobSettings())


def batches(count: int, size: int = 20) -> list[list[bytes | None]]:
    """Batches of rows of which some are wrong and one was too long to read."""
    found: list[list[bytes | None]] = []
    for batch in range(count):
        raws: list[bytes | None] = []
        for i in range(size):
            body = {"messages": [{"role": "user", "content": f"number {batch} {i} " * (i + 1)}], "n": 1 + i % 3}
            line = {"custom_id": f"{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            raws.append(json.dumps(line).encode() if i % 7 else b"{")
        found.append([*raws, None])
    return found


def children() -> set[int]:
    """Processes that this one has started and that still run."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {int(pid) for pid in found}


def plain(results: list[Encoded | RowError]) -> list[object]:
    """Results that can be compared; keys are compared apart, each process hashes in its own way."""
    return [
        (str(one), one.code, one.param)
        if isinstance(one, RowError)
        else (one.prompts, one.samples, one.max_tokens, one.expect, one.root, one.score_from)
        for one in results
    ]


def test_a_crew_answers_as_one_encoder_does_in_order() -> None:
    rows = batches(11)
    found = list(Crew(ENCODER, MODEL, 2).stream(iter(rows)))
    assert [plain(results) for results in found] == [plain(ENCODER.encode(raws)) for raws in rows]
    for one in zip(*found, strict=True):  # equal custom_ids have equal keys, whichever process read them
        assert len({result.key for result in one if isinstance(result, Encoded)}) <= 1


def test_a_crew_is_gone_when_its_stream_is_left() -> None:
    before = children()
    stream = Crew(ENCODER, MODEL, 2).stream(iter(batches(30, 5)))
    next(stream)
    assert len(children() - before) == 2
    assert isinstance(stream, Iterator)
    stream.close()  # type: ignore[attr-defined]
    assert children() == before


def test_a_dead_process_ends_the_job_with_a_reason() -> None:
    before = children()
    stream = Crew(ENCODER, MODEL, 2).stream(iter(batches(30, 5)))
    next(stream)
    for pid in children() - before:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(ShoalError, match="run the same command again"):
        list(stream)
    assert children() == before


def test_a_small_input_is_encoded_here() -> None:
    assert on_all_cores(ENCODER, MODEL, LARGE - 1) is ENCODER
