"""Traces that others have published, as rows or as programs: what came when, how long it was, how long its answer.

It knows their files by what is in them; it must not know how a workload is made of them. Texts have no tokenizer here:
four characters are a token.
"""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shoal.core.errors import UsageError
from shoal.sim.program import Piece, Program, Turn

HASHED = 512  # tokens of a Mooncake block
WINDOW, PERIOD = 600.0, 21600  # seconds for which a ServeGen client keeps a rate, and its lengths
LETTERS = 4  # of a token
THINKS = (8.0, 0.6)  # seconds until a person answers: median and sigma of a lognormal law, ours
TOOLS: tuple[tuple[tuple[str, ...], tuple[float, float]], ...] = (  # by the beginning of its name; laws, ours too
    (("ls", "cat", "cd", "grep", "find", "str_replace", "view", "head", "sed", "think", "calculate"), (0.03, 0.5)),
    (("pytest", "python", "pip", "make", "tox", "execute", "bash"), (5.0, 1.2)),
    (("search", "web"), (1.0, 0.8)),
    (("",), (0.3, 0.8)),
)


class Row(NamedTuple):
    """One request. Tokens; seconds from the trace's beginning."""

    at: float
    prompt: int
    answer: int
    hashes: tuple[int, ...] = ()  # of its prompt's blocks, where the trace says which are the same
    group: str = ""


def pieces_of(row: Row, number: int) -> tuple[Piece, ...]:
    """The prompt of a row: blocks that others may share, or a text of its own."""
    if not row.hashes:
        return ((own(number), row.prompt),)
    blocks = [(name, HASHED) for name in row.hashes]
    last = row.prompt - HASHED * (len(blocks) - 1)
    return (*blocks[:-1], (row.hashes[-1], last))


def own(number: int) -> int:
    """The name of a text that only one request has: no hash of a trace is as high."""
    return (1 << 62) + number


# -- files -------------------------------------------------------------------------------------------


def read_trace(path: Path) -> list[Row] | Mapping[str, Any] | list[dict[str, Any]]:
    """Rows; or the clients of ServeGen as they are; or the histories of programs as they are. By what is in it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the trace {path}: {error}") from error
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
        return _parsed(text)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no trace that is known ({type(error).__name__}: {error}): give a CSV of Azure "
            "(TIMESTAMP,ContextTokens,GeneratedTokens) or Vidur (num_prefill_tokens,num_decode_tokens), JSONL of "
            "Mooncake, JSON of ServeGen, or JSON histories of tau-bench or SWE-agent"
        ) from error


def _parsed(text: str) -> list[Row] | Mapping[str, Any] | list[dict[str, Any]]:
    head = text[: text.find("\n")]
    if head.startswith("TIMESTAMP,"):
        rows = list(csv.DictReader(io.StringIO(text)))
        times = np.array([row["TIMESTAMP"][:26] for row in rows], dtype="datetime64[us]")
        seconds = (times - times.min()) / np.timedelta64(1, "s")
        found = [
            Row(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for at, row in zip(seconds.tolist(), rows, strict=True)
        ]
        return [row for row in found if row.prompt > 0 and row.answer > 0]
    if "num_prefill_tokens" in head:
        table = csv.DictReader(io.StringIO(text))
        return [Row(0.0, int(row["num_prefill_tokens"]), int(row["num_decode_tokens"])) for row in table]
    if '"hash_ids"' in head:
        lines = [json.loads(line) for line in text.splitlines()]
        return [
            Row(line["timestamp"] / 1000, line["input_length"], max(line["output_length"], 1), tuple(line["hash_ids"]))
            for line in lines
        ]
    whole = json.loads(text)
    if isinstance(whole, dict) and all("trace_csv" in client for client in whole.values()):
        return whole
    if isinstance(whole, list) and all("traj" in entry or "messages" in entry for entry in whole):
        return whole
    raise ValueError("its JSON has neither clients nor histories")


# -- ServeGen ----------------------------------------------------------------------------------------


def clients(data: Mapping[str, Any], seconds: float, seed: int, begin: float = 0.0) -> list[Row]:
    """Requests of all clients in so many seconds from `begin` on [s of the trace], each with its own law of gaps and
    lengths; input and output lengths are drawn apart, as the trace has them."""
    rows: list[Row] = []
    for name in sorted(data):
        luck = np.random.default_rng([seed, int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "big")])
        try:
            rows += _client(name, data[name], begin, begin + seconds, luck)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise UsageError(
                f"client {name!r} cannot be read ({type(error).__name__}: {error}): it needs a trace_csv of "
                "time,rate,cv,law,parameters and a dataset of token counts"
            ) from error
    return sorted(rows)


def _client(name: str, client: Mapping[str, Any], begin: float, end: float, luck: np.random.Generator) -> list[Row]:
    rows: list[Row] = []
    windows = [line.split(",") for line in client["trace_csv"].splitlines()]
    times = [
        at
        for start, rate, _, law, *more in windows
        if float(rate) > 0 and begin - WINDOW < float(start) < end
        for at in _gaps(float(start), float(rate), law, [float(each) for each in more], luck)
    ]
    times = [at for at in times if begin <= at < end]
    for period, some in groupby(times, key=lambda at: int(at // PERIOD) * PERIOD):
        inside = list(some)
        lengths = client["dataset"].get(str(period)) or next(iter(client["dataset"].values()))
        given = lengths.get("input_tokens") or lengths["text_tokens"]
        prompts, answers = _drawn(given, len(inside), luck), _drawn(lengths["output_tokens"], len(inside), luck)
        rows += [Row(at - begin, p, a, (), name) for at, p, a in zip(inside, prompts, answers, strict=True)]
    return rows


def _gaps(start: float, rate: float, law: str, parameters: list[float], luck: np.random.Generator) -> Iterator[float]:
    """Times of one client in one window: a renewal process of its own law, at its own rate."""
    at = start
    many = int(rate * WINDOW * 2 + 50)
    if law == "Gamma":
        gaps = luck.gamma(parameters[0], 1.0, many) / parameters[0]
    elif law == "Weibull":
        gaps = luck.weibull(parameters[0], many)
        gaps = gaps / gaps.mean()
    else:
        gaps = luck.exponential(1.0, many)
    for gap in gaps:
        at += float(gap) / rate
        if at >= start + WINDOW:
            return
        yield at


def _drawn(histogram: str, count: int, luck: np.random.Generator) -> list[int]:
    shares: dict[int, float] = ast.literal_eval(histogram)
    weights = np.array(list(shares.values()))
    found = luck.choice(np.array(list(shares)), count, p=weights / weights.sum())
    return [max(int(each), 1) for each in found]


# -- programs ----------------------------------------------------------------------------------------


def histories(entries: list[dict[str, Any]], limit: int, seed: int) -> list[Program]:
    """A program for each history: a turn for each message of the assistant, after what came before it. How long tools
    and people take is drawn: no history says."""
    found = []
    for number, entry in enumerate(entries):
        luck = np.random.default_rng([seed, number])
        try:
            messages = entry.get("traj") or entry["messages"]
            messages = json.loads(messages) if isinstance(messages, str) else messages
            turns = tuple(_turns(messages, limit, luck))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise UsageError(
                f"history {number + 1} cannot be read ({type(error).__name__}: {error}): it needs a list of messages, "
                "each with a role and a content"
            ) from error
        if turns:
            found.append(Program(f"p{number}", 0.0, turns, group="agents"))
    return found


def _turns(messages: list[dict[str, Any]], limit: int, luck: np.random.Generator) -> Iterator[Turn]:
    heard: list[str] = []
    pause = 0.0  # before the next message of the assistant
    for message in messages:
        if message["role"] != "assistant":
            heard.append(_text(message))
            continue
        pieces = tuple((_name(text), tokens(text)) for text in heard)
        tool = _tool(message)
        yield Turn(pieces, min(tokens(_text(message)), limit), limit, pause, tool)
        heard = []
        median, sigma = law_of(tool) if tool else THINKS
        pause = float(luck.lognormal(np.log(median), sigma))


def law_of(tool: str) -> tuple[float, float]:
    """The lognormal law of a tool's seconds: median and sigma."""
    return next(law for names, law in TOOLS if tool.startswith(names))


def tokens(text: str) -> int:
    """About as many as a tokenizer would find."""
    return max(-(-len(text) // LETTERS), 1)


def _name(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    calls = "".join(json.dumps(call.get("function", call)) for call in message.get("tool_calls") or ())
    return str(content) + calls


def _tool(message: Mapping[str, Any]) -> str:
    """What an assistant's message calls: the function's name, or the first word of a command."""
    action = message.get("action")
    if isinstance(action, str) and action.strip():
        return action.split()[0]
    calls = message.get("tool_calls") or ()
    return str(calls[0].get("function", {}).get("name", "tool")) if calls else ""
