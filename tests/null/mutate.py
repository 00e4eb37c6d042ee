"""Batch files gone wrong: good lines, and the many ways in which people and programs break them. Seeded.

A good line asks for little work, and no mutation makes it ask for much: the files are run through real models too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HUGE_LINE = 10 << 20  # bytes
WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    1.5,
    "",
    "x",
    [],
    [1],
    [None],
    {},
    {"a": 1},
    [[]],
    10**30,
    "\x00",
    -(2**63) - 1,
)
NUMBERS = ("99" * 3000, "1e999", "-1e999", "1E400", "18446744073709551616", "-0", "1e-999", "0x10", "NaN", "Infinity")
NUMERIC = ("temperature", "top_p", "top_k", "min_p", "seed", "n", "min_tokens", "max_tokens", "frequency_penalty")
REFUSED: tuple[dict[str, Any], ...] = (
    {"stream": True},
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"format": "topic"}}}},
    {"guided_regex": "[0-9"},
    {"structured_outputs": {"json": {"uniqueItems": True}}},
    {"best_of": 4},
    {"use_beam_search": True},
    {"chat_template": "{{ messages }}"},
    {"functions": [{"name": "f"}]},
)


@dataclass(frozen=True)
class Mutant:
    """One line. `good` is whether it must be answered; None where the mutation decides by chance."""

    kind: str
    raw: bytes  # without its end; may be blank
    good: bool | None


def good_request(rng: Random, number: int) -> dict[str, Any]:
    """A request of a handful of tokens."""
    text = " ".join(rng.choice(("one", "two", "fish", "school", "river", "Größe", "水", "🐟")) for _ in range(5))
    body: dict[str, Any] = {"model": "m", "max_tokens": 2, "temperature": rng.choice((0, 0.7))}
    if rng.random() < 0.5:
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = text
    url = CHAT if "messages" in body else COMPLETIONS
    return {"custom_id": f"row-{number}", "method": "POST", "url": url, "body": body}


def _dump(request: Any, ascii_only: bool = False) -> bytes:
    return json.dumps(request, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


def _good(rng: Random, number: int) -> Mutant:
    request = good_request(rng, number)
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "stream": False, "seed": 7}
    for name in rng.sample(sorted(harmless), rng.randrange(3)):
        request["body"][name] = harmless[name]
    return Mutant("good", _dump(request, rng.random() < 0.5) + rng.choice((b"", b"\r", b" ")), True)


def _cut(rng: Random, number: int) -> Mutant:
    raw = _dump(good_request(rng, number))
    return Mutant("cut", raw[: rng.randrange(1, len(raw))], False)


def _flipped(rng: Random, number: int) -> Mutant:
    raw = bytearray(_dump(good_request(rng, number)))
    for _ in range(rng.randrange(1, 4)):
        raw[rng.randrange(len(raw))] = rng.choice((*range(1, 10), *range(14, 256)))
    return Mutant("flipped bytes", bytes(raw), None)


def _nul(rng: Random, number: int) -> Mutant:
    raw = _dump(good_request(rng, number))
    place = rng.randrange(len(raw))
    return Mutant("NUL byte", raw[:place] + b"\0" * rng.randrange(1, 4) + raw[place:], False)


def _wrong_type(rng: Random, number: int) -> Mutant:
    request = good_request(rng, number)
    where = rng.choice((request, request["body"]))
    where[rng.choice([name for name in where if name != "max_tokens"])] = rng.choice(WRONG)
    return Mutant("wrong type", _dump(request), None)


def _wrong_message(rng: Random, number: int) -> Mutant:
    wrong = rng.choice(WRONG)
    message: Any = rng.choice(({"role": wrong, "content": "x"}, {"role": "user", "content": [wrong]}, wrong))
    body = {"messages": [message], "max_tokens": 2}
    return Mutant(
        "wrong message", _dump({"custom_id": f"row-{number}", "method": "POST", "url": CHAT, "body": body}), False
    )


def _huge_number(rng: Random, number: int) -> Mutant:
    request = good_request(rng, number)
    name = rng.choice(NUMERIC)
    request["body"].pop(name, None)
    raw = _dump(request).replace(b'"model": "m"', f'"{name}": {rng.choice(NUMBERS)}'.encode())
    return Mutant("huge number", raw, None)


def _long_prompt(rng: Random, number: int) -> Mutant:
    request = good_request(rng, number)
    body = request["body"]
    text = "fish and river " * rng.randrange(3000, 9000)
    body.update({"prompt": text} if "prompt" in body else {"messages": [{"role": "user", "content": text}]})
    return Mutant("over-long prompt", _dump(request), False)


def _unknown(rng: Random, number: int) -> Mutant:
    request = good_request(rng, number)
    name = rng.choice(("temprature", "max_token", "top-p", "Prompt", "\x00", "", "x" * 500, "🐟", "__class__"))
    request["body"][name] = rng.choice(WRONG)
    return Mutant("unknown field", _dump(request, True), False)


def _beside(rng: Random, number: int) -> Mutant:
    request = good_request(rng, number)
    request[rng.choice(("note", "row", "tags"))] = rng.choice(WRONG)
    return Mutant("note beside the body", _dump(request, True), True)


def _misplaced(rng: Random, number: int) -> Mutant:
    request = good_request(rng, number)
    request["temperature"] = 0
    return Mutant("misplaced field", _dump(request), False)


def _surrogate(rng: Random, number: int) -> Mutant:
    request = good_request(rng, number)
    request["custom_id"] = f"row-{number}" + rng.choice(("", "\ud83d"))
    body = request["body"]
    text = "half " + rng.choice(("\ud800", "\udfff", "\ude00\ud83d")) + " fish"
    body.update({"prompt": text} if "prompt" in body else {"messages": [{"role": "user", "content": text}]})
    return Mutant("lone surrogate", _dump(request, rng.random() < 0.7), False)


def _encoding(rng: Random, number: int) -> Mutant:
    request = good_request(rng, number)
    text = "Größe Übung naïve"
    request["body"].update({"prompt": text} if "prompt" in request["body"] else {})
    raw = json.dumps(request, ensure_ascii=False)
    if "prompt" not in request["body"]:
        raw = raw.replace("user", "usér")
    encoding = rng.choice(("latin-1", "cp1252", "utf-16-le", "utf-16-be", "utf-32"))
    return Mutant("wrong encoding", raw.encode(encoding, "ignore").replace(b"\n", b" "), False)


def _deep(rng: Random, number: int) -> Mutant:
    depth = rng.choice((1000, 10_000, 100_000))
    left, right = rng.choice((("[", "]"), ('{"a":', "}")))
    nest = left * depth + "1" + right * depth
    inside = rng.choice(("prompt", "metadata", "stop", "logit_bias", "messages"))
    start = f'{{"custom_id":"row-{number}","method":"POST","url":"{COMPLETIONS}","body":{{"max_tokens":2,'
    raw = f'{start}"{inside}":{nest}}}}}'
    return Mutant("deep nesting", rng.choice((raw, nest)).encode(), False)


def _missing(rng: Random, number: int) -> Mutant:
    request = good_request(rng, number)
    where = rng.choice((request, request["body"]))
    name = rng.choice([n for n in where if n not in ("max_tokens", "temperature", "model")])
    del where[name]
    return Mutant("missing field", _dump(request), False)


def _refused(rng: Random, number: int) -> Mutant:
    request = good_request(rng, number)
    request["body"].update(rng.choice(REFUSED))
    return Mutant("refused feature", _dump(request), False)


def _other_url(rng: Random, number: int) -> Mutant:
    request = good_request(rng, number)
    request["url"] = rng.choice(
        ("/v1/embeddings", "/v1/responses", "/scores", "v1/completions", "/v1/completions/", "🐟")
    )
    return Mutant("other url", _dump(request), False)


def _scalar(rng: Random, number: int) -> Mutant:
    choices = (
        b"null",
        b"[]",
        b"1",
        b'"text"',
        b"{}",
        b"[{}]",
        b"true",
        b"nul",
        b"'single'",
        b"{",
        b"}",
        b"//",
        b"\xff",
        b"-",
    )
    return Mutant("not an object", rng.choice(choices), False)


def _not_quite_json(rng: Random, number: int) -> Mutant:
    raw = _dump(good_request(rng, number)).decode()
    change: Callable[[str], str] = rng.choice(
        (
            lambda s: s.replace('"', "'"),
            lambda s: s[:-1] + ",}",
            lambda s: s + s,
            lambda s: s.replace(": ", ":: ", 1),
            lambda s: "\ufeff" + s,
            lambda s: s.replace('"POST"', "POST"),
            lambda s: s.replace("true", "True") + "]",
            lambda s: "data: " + s,
            lambda s: s.replace("fish", "fi\tsh") + "\x0b,",
        )
    )
    return Mutant("not quite JSON", change(raw).encode(), False)


def _bad_tokens(rng: Random, number: int) -> Mutant:
    prompt = rng.choice(
        ([-1], [2**31], [10**9], [[1], []], [], [[]], ["a", 1], [[1], "a"], [1.0], [True], [10**40], [None])
    )
    body = {"prompt": prompt, "max_tokens": 2}
    request = {"custom_id": f"row-{number}", "method": "POST", "url": COMPLETIONS, "body": body}
    return Mutant("bad token ids", _dump(request), None if prompt == [[1], []] else False)


def _bad_words(rng: Random, number: int) -> Mutant:
    request = good_request(rng, number)
    request["body"].update(
        rng.choice(
            (
                {"logit_bias": {"x": 1}},
                {"logit_bias": {str(10**9): 1}},
                {"logit_bias": {"5": 101}},
                {"stop": [""]},
                {"stop": ["a"] * 17},
                {"stop_token_ids": [-1]},
                {"allowed_token_ids": []},
                {"allowed_token_ids": [10**9]},
                {"bad_words": [""]},
                {"min_tokens": 3},
                {"truncate_prompt_tokens": 0},
                {"n": 129},
                {"prompt_logprobs": 21},
            )
        )
    )
    return Mutant("values out of range", _dump(request), False)


def _result_line(rng: Random, number: int) -> Mutant:
    """A line of another run's error file, with or without its request."""
    request = good_request(rng, number)
    failed = {"status_code": 400, "request_id": "r", "body": {"error": {"message": "m", "code": "c"}}}
    line: dict[str, Any] = {"id": "batch_req_1", "custom_id": f"row-{number}", "response": failed, "error": None}
    kind = rng.randrange(4)
    if kind == 0:
        line["x_shoal"] = {"line": number + 1, "request": request}
    elif kind == 1:
        line["x_shoal"] = {"line": number + 1, "request": rng.choice((None, "{", 5, [], '{"a":'))}
    elif kind == 2:
        line["x_shoal"] = rng.choice(WRONG)
    else:
        line["error"] = {"error": {"message": "The model does not exist.", "type": "NotFoundError", "code": 404}}
    return Mutant("result line", _dump(line), kind == 0)


def _blank(rng: Random, number: int) -> Mutant:
    return Mutant("blank", rng.choice((b"", b" ", b"\t\t", b"\r", b" \r")), None)


KINDS: tuple[Callable[[Random, int], Mutant], ...] = (
    _cut, _flipped, _nul, _wrong_type, _wrong_message, _huge_number, _long_prompt, _unknown, _beside, _misplaced,
    _surrogate, _encoding, _deep, _missing, _refused, _other_url, _scalar, _not_quite_json, _bad_tokens, _bad_words,
    _result_line, _blank,
)  # fmt: skip


def _duplicate(rng: Random, number: int, custom_id: str) -> Mutant:
    return Mutant("duplicate custom_id", _dump(good_request(rng, number) | {"custom_id": custom_id}), False)


def _huge_line(rng: Random, number: int) -> Mutant:
    request = good_request(rng, number)
    request["body"]["user"] = "x" * HUGE_LINE
    return Mutant("10 MB line", _dump(request), False)


def mutants(count: int, seed: int, huge_lines: int = 0) -> Iterator[Mutant]:
    """`count` lines: about a third good, the others of every kind in turn, `huge_lines` too long for any reader."""
    rng = Random(seed)
    huge = set(rng.sample(range(count), huge_lines))
    used = [number for number in range(count) if rng.random() < 0.05 and number not in huge]
    once, again = set(used[::2]), dict(zip(used[1::2], used[::2], strict=False))
    for number in range(count):
        if number in huge:
            yield _huge_line(rng, number)
        elif number in again:
            yield _duplicate(rng, number, f"row-{again[number]}")
        elif number in once or rng.random() < 0.3:
            yield _good(rng, number)
        else:
            yield KINDS[number % len(KINDS)](rng, number)


def write_file(path: Path, lines: Iterator[Mutant]) -> dict[str, int]:
    """Write a file of mutants, one in memory at a time; how many there are of each kind."""
    kinds: dict[str, int] = {}
    with path.open("wb") as file:
        for mutant in lines:
            kinds[mutant.kind] = kinds.get(mutant.kind, 0) + 1
            file.write(mutant.raw + b"\n")
    return kinds
