"""Constraints: what can be kept is kept token by token, and leads to an end; what cannot be is refused by name."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schema_order import writings

from shoal.core.errors import ModelError, RowError
from shoal.core.types import Constraint
from shoal.text import constraint, grammar
from shoal.text.checkpoint import EMBEDDED
from shoal.text.constraint import Checker
from shoal.text.decoding import Kind
from shoal.text.grammar import Grammars, Matching
from shoal.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = ROOT.parent / "shared" / "data" / "json_schema"
TOKENIZER = Tokenizer.load(EMBEDDED)
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.vocab_size)
STOP = TOKENIZER.eos
SILENT = TOKENIZER.special_ids | STOP | {i for i in range(TOKENIZER.vocab_size) if not TOKENIZER.token_bytes(i)}

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0},
        "friends": {"type": "array", "items": {"$ref": "#"}},
        "kind": {"enum": ["cat", "dog", "élan"]},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}
SMALL: list[Any] = [
    PERSON,
    {"type": "array", "items": {"type": "number"}, "minItems": 1},
    {"anyOf": [{"type": "string", "pattern": "^[a-z]+-[0-9]{2}$"}, {"type": "null"}]},
    {"type": "object", "additionalProperties": {"type": "boolean"}},
    {"type": "object", "properties": {"when": {"type": "string", "format": "date-time"}}, "required": ["when"]},
    True,
]


def begin(
    wanted: Constraint, limit: int = 1 << 20, produced: Sequence[int] = (), stop: frozenset[int] = STOP,
    jumps: bool = False,
) -> Matching:  # fmt: skip
    row = GRAMMARS.begin(wanted, stop, limit, produced, jumps)
    assert not row.problem, row.problem
    return row


def allowed(row: Matching) -> list[int]:
    assert row.bits is not None
    return [int(i) for i in np.flatnonzero(np.unpackbits(row.bits.view(np.uint8), bitorder="little"))]


def accepts(wanted: Constraint, text: str) -> bool:
    """Whether every token of the text may come, and then the end."""
    row = begin(wanted)
    for token in TOKENIZER.encode(text, special=False):
        if token not in allowed(row):
            return False
        GRAMMARS.advance([(row, token)])
    return bool(STOP.intersection(allowed(row)))


def walk(wanted: Constraint, limit: int, seed: int, stop: frozenset[int] = STOP) -> Matching:
    """A row to its end, each token drawn from those that may come."""
    row, draw = begin(wanted, limit, stop=stop), random.Random(seed)
    while row.bits is not None:
        GRAMMARS.advance([(row, draw.choice(allowed(row)))])
        assert not row.problem, row.problem
    return row


def at_random(row: Matching, seed: int) -> int:
    """One of the tokens that may come next: decided by how many have come, whichever way."""
    may = allowed(row)
    return may[random.Random(seed * 1000 + len(row.tokens)).randrange(len(may))]


def text_of(row: Matching) -> str:
    return GRAMMARS.vocabulary.text([token for token in row.tokens if token not in STOP]).decode()


# -- what can be kept -------------------------------------------------------------------------------


def test_schemas_of_the_world_accept_what_is_valid_and_reject_what_is_not_token_by_token() -> None:
    place = SCHEMAS / "maskbench_sample.jsonl.gz"
    if not place.exists():
        pytest.skip("the shared folder with MaskBench's schemas is not beside the repository")
    kept = total = 0
    for line in gzip.open(place, "rt").readlines()[:200]:
        row = json.loads(line)
        total += 1
        wanted = constraint.json_schema(row["schema"])
        try:
            Checker().check(wanted)
        except RowError as refused:
            assert refused.code == "invalid_constraint"
            assert any(word in str(refused) for word in ("oneOf", "Unimplemented keys: [", "format: ", "Properties"))
            continue
        kept += 1
        for test in row["tests"]:
            for texts in writings(test["data"], row["schema"]):
                assert any(accepts(wanted, text) for text in texts) is test["valid"], (row["id"], texts)
    assert total == 200 and kept >= 173  # the library's own share


@pytest.mark.parametrize("limit", [40, 64, 100, 257])
@pytest.mark.parametrize("which", range(len(SMALL)))
def test_whatever_is_drawn_ends_before_the_limit_and_is_valid(limit: int, which: int) -> None:
    for seed in range(12):
        row = walk(constraint.json_schema(SMALL[which]), limit, seed)
        assert len(row.tokens) <= limit
        assert row.tokens[-1] in STOP, text_of(row)
        jsonschema.validate(json.loads(text_of(row)), SMALL[which])


@given(
    which=st.integers(0, len(SMALL) - 1),
    seed=st.integers(0, 10**6),
    limit=st.integers(30, 120),
    cut=st.integers(0, 120),
)
@settings(max_examples=100, deadline=None)
def test_a_row_that_begins_again_goes_on_as_if_nothing_had_been(which: int, seed: int, limit: int, cut: int) -> None:
    wanted = constraint.json_schema(SMALL[which])
    whole = walk(wanted, limit, seed)
    cut = min(cut, len(whole.tokens) - 1)
    first = begin(wanted, limit)
    for token in whole.tokens[:cut]:
        GRAMMARS.advance([(first, token)])
    again = begin(wanted, limit, whole.tokens[:cut])
    for token in whole.tokens[cut:]:
        assert allowed(first) == allowed(again) and token in allowed(again)
        GRAMMARS.advance([(first, token), (again, token)])
    assert first.bits is None and again.bits is None


@given(which=st.integers(0, len(SMALL) - 1), seed=st.integers(0, 99), limit=st.integers(8, 120))
@settings(max_examples=60, deadline=None)
def test_a_row_that_jumps_takes_the_tokens_that_it_would_have_been_given(which: int, seed: int, limit: int) -> None:
    wanted = constraint.json_schema(SMALL[which])
    slow, fast, given = begin(wanted, limit), begin(wanted, limit, jumps=True), list[int]()
    while fast.bits is not None:
        given += fast.forced
        fast.forced = []
        for token in given[len(slow.tokens) :]:
            assert allowed(slow) == [token]
            GRAMMARS.advance([(slow, token)])
        assert allowed(fast) == allowed(slow) and (len(allowed(fast)) > 1)
        token = at_random(slow, seed)
        GRAMMARS.advance([(slow, token), (fast, token)])
        given.append(token)
        assert begin(wanted, limit, given, jumps=True).forced == fast.forced
    for token in [*given, *fast.forced][len(slow.tokens) :]:
        assert allowed(slow) == [token]
        GRAMMARS.advance([(slow, token)])
    assert slow.bits is None and fast.tokens == slow.tokens


@given(
    which=st.integers(0, len(SMALL) - 1),
    seed=st.integers(0, 10**6),
    limit=st.integers(8, 120),
    patience=st.sampled_from((1, grammar.PATIENCE)),
    ends=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_a_row_may_take_by_trial_what_its_mask_would_let_it_take(
    which: int, seed: int, limit: int, patience: int, ends: bool
) -> None:
    GRAMMARS._patience = patience
    wanted, stop, draw = constraint.json_schema(SMALL[which]), STOP if ends else frozenset[int](), random.Random(seed)
    masked = begin(wanted, limit, stop=stop)
    tried = GRAMMARS.begin(wanted, stop, limit, (), True, True)
    while masked.bits is not None:
        for token in tried.forced:
            assert allowed(masked) == [token]
            GRAMMARS.advance([(masked, token)])
        tried.forced = []
        if masked.bits is None:
            break
        may = allowed(masked)
        if tried.open:
            wish = draw.choice(may) if draw.random() < 0.8 else draw.randrange(-1, TOKENIZER.vocab_size)
            (took,) = GRAMMARS.accept([(tried, wish)])
            assert took is (wish in may and wish not in SILENT), (wish, text_of(masked))
            if took:
                GRAMMARS.advance([(masked, wish)])
                continue
        assert allowed(tried) == may
        token = draw.choice(may)
        GRAMMARS.advance([(masked, token), (tried, token)])
    assert tried.bits is None and not tried.open and tried.tokens == masked.tokens


def test_names_and_values_that_have_no_choice_come_at_once() -> None:
    row = begin(constraint.json_schema({"const": {"description": "always the same"}}, compact=True), jumps=True)
    assert TOKENIZER.decode(row.forced) == '{"description":"always the same"}' and len(allowed(row)) == len(STOP)


def test_rows_of_one_constraint_do_not_touch_each_other() -> None:
    wanted = constraint.json_schema(PERSON)
    alone = [walk(wanted, 80, seed).tokens for seed in range(8)]
    rows, draws = [begin(wanted, 80) for _ in range(8)], [random.Random(seed) for seed in range(8)]
    while any(row.bits is not None for row in rows):
        going = [(row, draw) for row, draw in zip(rows, draws, strict=True) if row.bits is not None]
        GRAMMARS.advance([(row, draw.choice(allowed(row))) for row, draw in going])
    assert [row.tokens for row in rows] == alone


def test_choices_expressions_and_grammars_are_kept() -> None:
    words = ["yes", "no", 'say "x"\n', "back\\slash", "é😀", "yesterday", "a|b", "/"]
    for word in words:
        assert accepts(constraint.choice(words), word)
        assert not accepts(constraint.choice(words), word + "!")
    assert not accepts(constraint.choice(words), "ye")
    assert accepts(constraint.regex(r"\d{3}-[a-z]+"), "123-abc")
    assert not accepts(constraint.regex(r"\d{3}-[a-z]+"), "12-abc")
    assert accepts(constraint.regex("^abc$"), "abc")
    gbnf = constraint.grammar('root ::= "(" root ")" | "x"')
    lark = constraint.grammar('start: "(" start ")" | "x"')
    for wanted in (gbnf, lark):
        assert accepts(wanted, "((x))") and not accepts(wanted, "((x)")


@pytest.mark.parametrize("text", [r"(?s:.*)", "[a-z]{40,}", r"[a-z]+@[a-z]+\.com", "(ab|cd)*ef"])
def test_expressions_are_led_to_their_end_too(text: str) -> None:
    for seed in range(5):
        assert walk(constraint.regex(text), 60, seed).tokens[-1] in STOP


def test_space_between_the_words_of_json_is_free_and_bounded() -> None:
    wanted = constraint.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}})
    for text in ('{"a":1}', '{"a": 1}', '{\n  "a": 1\n}'):
        assert accepts(wanted, text)
    assert not accepts(wanted, "{" + " " * 100 + '"a":1}')
    tight = constraint.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}}, compact=True)
    assert accepts(tight, '{"a":1}') and not accepts(tight, '{"a": 1}')
    single = constraint.json_schema({"type": "array"}, whitespace=" ")
    assert accepts(single, "[ 1, 2 ]") and not accepts(single, "[  1]")


def test_special_tokens_are_no_text() -> None:
    special = TOKENIZER.special_ids
    row = begin(constraint.regex("(?s:.*)"))
    assert special.intersection(allowed(row)) == special & STOP  # the text may end here
    row = begin(constraint.regex(r"<\|im_start\|>"))
    assert not special.intersection(allowed(row))
    assert not special.intersection(walk(constraint.regex(r"<\|im_start\|>"), 40, 0).tokens[:-1])


def test_a_row_that_ignores_the_end_goes_on_while_it_can_and_then_repeats_it() -> None:
    row = walk(constraint.regex("a{1,6}"), 60, 3, stop=frozenset())
    assert len(row.tokens) == 60
    assert set(row.tokens[7:]) <= STOP and text_of(row) == "aaaaaa"


def test_a_stop_token_ends_a_row_wherever_the_text_is() -> None:
    (brace,) = TOKENIZER.encode("{", special=False)
    row = begin(constraint.json_schema(PERSON), stop=STOP | {brace})
    GRAMMARS.advance([(row, brace)])
    assert row.bits is None and not row.problem


# -- what cannot be kept ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schema, named",
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"minimum": 1}, {"maximum": 5}]}, "oneOf"),
        ({"type": "string", "format": "topic"}, "topic"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
        ({"$ref": "http://example.org/a.json"}, "http://example.org/a.json"),
        ({"$ref": "#"}, "NoExtension"),
        ({"enum": []}, "Unsatisfiable"),
        ({"if": {}, "then": {}}, "then"),
        (False, "object"),
        ([1], "object"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_with_the_keyword(schema: object, named: str) -> None:
    with pytest.raises(RowError, match=named) as refused:
        Checker().check(constraint.json_schema(schema))
    assert refused.value.code == "invalid_constraint"


@pytest.mark.parametrize("text", ["[", "a(?=b)", r"\bfoo\b"])
def test_an_expression_that_cannot_be_kept_is_refused(text: str) -> None:
    with pytest.raises(RowError):
        Checker().check(constraint.regex(text))


def test_grammars_that_cannot_be_read_are_refused() -> None:
    for text in ("root ::= foo [", 'start: "yes" | foo', ""):
        with pytest.raises(RowError):
            Checker().check(constraint.grammar(text))
    with pytest.raises(RowError, match="nothing"):
        constraint.choice([])


def test_what_the_check_passes_the_engine_can_compile_and_the_other_way_round() -> None:
    for each in (*SMALL, {"$ref": "#"}, {"format": "topic"}, {"type": "object", "properties": {"n": {"$ref": "#"}}}):
        wanted = constraint.json_schema(each)
        row = GRAMMARS.begin(wanted, STOP, 100, ())
        try:
            Checker().check(wanted)
        except RowError:
            assert row.problem and row.bits is None
        else:
            assert not row.problem and row.bits is not None


def test_a_schema_of_hundreds_of_kilobytes_is_kept() -> None:
    names = [f"property_number_{i}" for i in range(1500)]
    schema = {"type": "object", "properties": {n: {"enum": [f"{n}_{j}" for j in range(4)]} for n in names}}
    wanted = constraint.json_schema(schema)
    assert len(wanted.text) > 190_000
    assert walk(wanted, 60, 1).tokens[-1] in STOP


def test_a_tokenizer_that_hides_its_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = Tokenizer.load(EMBEDDED)
    monkeypatch.setattr(odd.decoding, "kind", Kind.LIBRARY)
    with pytest.raises(ModelError, match="bytes"):
        Grammars(odd, odd.vocab_size)


# -- equal, old and many ------------------------------------------------------------------------------


def test_equal_constraints_have_equal_texts_and_the_order_of_keys_counts() -> None:
    one, two = json.loads('{"a": 1.0, "b": [true]}'), json.loads('{ "a":1.0,"b":[ true ] }')
    assert constraint.json_schema(one) == constraint.json_schema(two)
    assert constraint.json_schema({"x": 1, "y": 2}) != constraint.json_schema({"y": 2, "x": 1})
    assert constraint.choice(["a", "b", "a"]) == constraint.choice(["a", "b"])
    checker = Checker()
    first = checker.check(constraint.json_schema(PERSON))
    assert checker.check(constraint.json_schema(json.loads(json.dumps(PERSON)))) is first


def test_old_drafts_mean_by_a_reference_what_they_meant() -> None:
    target = {"required": ["b"], "properties": {"b": {"type": "integer"}}, "type": "object"}
    schema = {"properties": {"a": {"$ref": "#/kept", "type": "string"}}, "kept": target, "enum_like": {"$ref": "#"}}
    old = {"$schema": "http://json-schema.org/draft-04/schema#", "type": "object", **schema}
    assert accepts(constraint.json_schema(old), '{"a": {"b": 1}}')
    with pytest.raises(RowError):
        Checker().check(constraint.json_schema({"type": "object", "required": ["a"], **schema}))


def many(count: int) -> Iterator[Constraint]:
    for i in range(count):
        yield constraint.json_schema({"type": "object", "properties": {f"name{i}": {"type": "string"}}})


def test_a_thousand_schemas_are_compiled_one_by_one_and_few_are_kept() -> None:
    grammars = Grammars(TOKENIZER, TOKENIZER.vocab_size)
    for each in many(1000):
        assert not grammars.begin(each, STOP, 50, ()).problem
    assert len(grammars._compiled) == grammar.KEPT


def test_long_constraints_push_others_out() -> None:
    grammars = Grammars(TOKENIZER, TOKENIZER.vocab_size)
    for i in range(12):
        words = constraint.choice([f"{i}-{j}-{'x' * 90}" for j in range(2000)])
        assert not grammars.begin(words, STOP, 200, ()).problem
    assert sum(len(each.text) for each in grammars._compiled) <= grammar.KEPT_TEXT
    assert 1 <= len(grammars._compiled) < 12


def test_the_library_is_not_loaded_before_a_row_asks() -> None:
    code = (
        "import sys, shoal.jobs.run, shoal.jobs.encode, shoal.text.grammar, shoal.text.constraint\n"
        "assert 'llguidance' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
