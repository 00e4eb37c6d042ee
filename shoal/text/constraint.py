"""What an answer's text may have to be, in one canonical form, and whether that can be kept.

Knows JSON schemas, regular expressions, choices and grammars as the grammar library reads them; it must not know
tokens, requests' fields or rows. The library is imported when the first constraint is looked at, not before.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from shoal.core.errors import RowError
from shoal.core.types import Constraint
from shoal.text.tools import Style, calls_lark, calls_text

WHITESPACE = r"[ \t\r\n]{1,64}"  # between the words of JSON: a model that likes spaces must not write them for ever
LIMIT = 4 << 20  # characters of a constraint: a larger one takes the library seconds
CHECKED = 4096  # verdicts remembered, and
CHECKED_TEXT = 64 << 20  # characters of what they are about, about

_OLD_DRAFTS = ("/draft-03/", "/draft-04/", "/draft-06/", "/draft-07/")
# Beside $ref these say nothing in drafts up to 7; other names may be what a $ref points into, and stay.
_SILENT = frozenset(
    "type enum const multipleOf maximum exclusiveMaximum minimum exclusiveMinimum maxLength minLength pattern items"
    " additionalItems maxItems minItems uniqueItems contains maxProperties minProperties required properties"
    " patternProperties additionalProperties dependencies propertyNames if then else allOf anyOf oneOf not"
    " format".split()
)
_VALUES = frozenset(("enum", "const", "default", "examples"))  # what stands in them is no schema


def json_schema(schema: Any, compact: bool = False, whitespace: str | None = None) -> Constraint:
    """JSON that a schema describes, between its words nothing when `compact`, or what the pattern `whitespace` matches.

    Objects have their properties in the order of the schema, so that order is part of what is asked. RowError for
    what is no schema.
    """
    if schema is not True and not isinstance(schema, dict):
        raise _refused("a JSON schema must be an object (or true)")
    found: dict[str, Any] = dict(schema) if isinstance(schema, dict) else {}
    if any(draft in str(found.get("$schema", "")) for draft in _OLD_DRAFTS):
        found = _without_silent(found)
    if compact or whitespace is not None:
        own = found.get("x-guidance")
        between = {"whitespace_flexible": not compact, "whitespace_pattern": None if compact else whitespace}
        found = {**found, "x-guidance": {**(own if isinstance(own, dict) else {}), **between}}
    return _limited("json", msgspec.json.encode(found).decode())


def regex(pattern: str) -> Constraint:
    """A text that matches as a whole."""
    return _limited("regex", pattern)


def choice(texts: Sequence[str]) -> Constraint:
    """One of several texts. RowError for none."""
    if not texts:
        raise _refused("a choice of nothing: give at least one text")
    return _limited("choice", msgspec.json.encode(list(dict.fromkeys(texts))).decode())


def grammar(text: str) -> Constraint:
    """A text that a context-free grammar makes, written in GBNF or Lark."""
    return _limited("grammar", text)


def calls(style: Style, functions: Sequence[tuple[str, Mapping[str, Any]]], several: bool) -> Constraint:
    """Calls of these functions, by name and JSON schema of their arguments, which are an object whatever the schema
    leaves open. RowError for one that wants anything else."""
    for name, schema in functions:
        kind = schema.get("type", "object")
        if "object" not in (kind if isinstance(kind, list) else [kind]):
            raise _refused(f"the parameters of {name!r} have the type {kind!r}; those of a call have 'object'")
    objects = [(name, {**schema, "type": "object"}) for name, schema in functions]
    return _limited("calls", calls_text(style, objects, several))


def _limited(kind: str, text: str) -> Constraint:
    if len(text) > LIMIT:
        raise _refused(f"it is longer than {LIMIT >> 20} MiB")
    return Constraint(kind, text)


def _without_silent(schema: Any) -> Any:
    """A schema of an old draft without the keywords that a $ref beside them switches off."""
    if isinstance(schema, list):
        return [_without_silent(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    silent = _SILENT if isinstance(schema.get("$ref"), str) else frozenset()
    return {
        name: value if name in _VALUES else _without_silent(value)
        for name, value in schema.items()
        if name not in silent
    }


def library_grammar(constraint: Constraint) -> str:
    """The constraint in the library's own form. RowError where that much can be seen to be wrong."""
    from llguidance import LLMatcher, grammar_from

    text = constraint.text
    try:
        match constraint.kind:
            case "json":
                # A keyword that cannot be kept is an error, whatever the schema itself says about that.
                rules: Any = {"lenient": False, "coerce_one_of": False}
                return LLMatcher.grammar_from_json_schema(text, {"whitespace_pattern": WHITESPACE}, rules)
            case "regex":
                return LLMatcher.grammar_from_regex(text)
            case "choice":
                words = " | ".join(json.dumps(word, ensure_ascii=False) for word in json.loads(text))
                return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {words}")
            case "grammar":
                return grammar_from("grammar", text)
            case "calls":
                found = calls_lark(text, {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False})
                return LLMatcher.grammar_from_lark(found)
    except ValueError as error:
        raise _refused(str(error)) from None
    raise _refused(f"the kind {constraint.kind!r} is not known")


def refusal(kind: str, reason: str) -> RowError:
    """Why a constraint cannot be kept, in the library's words: the keyword it stumbled over is among them."""
    lines = [line.strip() for line in reason.splitlines() if line.strip() and not line.startswith("<")]
    return _refused(f"this {_NAMES.get(kind, kind)} cannot be kept: {' '.join(lines)[:400]}")


_NAMES = {"json": "JSON schema", "calls": "schema of arguments", "regex": "regular expression", "choice": "choice"}


def _refused(reason: str) -> RowError:
    return RowError(
        f"{reason}: correct it (the row is not answered, rather than answered freely)", "invalid_constraint"
    )


class Checker:
    """Says whether constraints can be kept, without a model's vocabulary. Remembers what it said. One thread."""

    def __init__(self) -> None:
        self._seen: OrderedDict[Constraint, tuple[Constraint, str | None]] = OrderedDict()
        self._bytes: Any = None  # the library's tokenizer of single bytes

    def check(self, constraint: Constraint) -> Constraint:
        """The constraint, the first seen of equal ones; RowError with the reason why it cannot be kept."""
        known, problem = self._seen.get(constraint) or (constraint, None)
        if problem is None:
            problem = self._look(constraint)
            self._seen[constraint] = known, problem
            size = sum(len(each.text) for each in self._seen) if len(self._seen) % 64 == 0 else 0
            while len(self._seen) > 1 and (len(self._seen) > CHECKED or size > CHECKED_TEXT):
                size -= len(self._seen.popitem(last=False)[0].text)
        self._seen.move_to_end(constraint)
        if problem:
            raise refusal(constraint.kind, problem)
        return known

    def _look(self, constraint: Constraint) -> str:
        from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

        if self._bytes is None:
            self._bytes = LLTokenizer(TokenizerWrapper(_Bytes()), eos_token=256)
        matcher = LLMatcher(self._bytes, library_grammar(constraint), log_level=0, limits=limits())
        if not matcher.is_error():
            matcher.compute_bitmask()  # some grammars are seen to have no text only now
        return str(matcher.get_error())


def limits() -> Any:
    """What a grammar may cost: the library's own limits but one, which deep JSON without a schema meets, and errors
    without the state it was in."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_items_in_row=20_000, verbose_errors=False)


class _Bytes:
    """A vocabulary of single bytes and an end, in the library's form."""

    tokens = [*(bytes([byte]) for byte in range(256)), b"\xff<end>"]
    special_token_ids = [256]
    eos_token_id = 256
    bos_token_id = None

    def __call__(self, text: bytes) -> list[int]:
        return list(text)
