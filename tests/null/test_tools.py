"""Tools: calls are read as each family writes them, a call that must come always parses, a bad tool fails its row."""

from __future__ import annotations

import json
import random
from array import array
from functools import lru_cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from byte_text import EOS, FIRST, ByteTokenizer, PlainTemplate, model_info
from some_templates import TEMPLATES

from shoal.core.errors import RowError
from shoal.core.types import Constraint
from shoal.jobs.answer import AnswerWriter, PromptAnswers, Sample
from shoal.jobs.encode import RowEncoder
from shoal.jobs.schema import parse_line
from shoal.jobs.settings import JobSettings
from shoal.text.checkpoint import EMBEDDED
from shoal.text.constraint import LIMIT, Checker, calls
from shoal.text.grammar import Grammars
from shoal.text.tokenizer import Tokenizer
from shoal.text.tools import HERMES, LLAMA, MISTRAL, Style, read_calls, style_of

HI = [{"role": "user", "content": "hi"}]
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Rome", "Oslo"]}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "stop"}},
]
NAMES = {"weather", "stop"}
ROME = {"city": "Rome", "days": 2}


class Taught(PlainTemplate):
    """A template that shows tools, and messages whole."""

    def __init__(self, style: Style) -> None:
        self.style = style

    def render(self, messages: Any, *rest: Any, **more: Any) -> str:
        tools = more.get("tools", rest[2] if len(rest) > 2 else None)
        return json.dumps([tools, list(messages)])


def line(**body: Any) -> bytes:
    body = {"messages": HI, **body}
    return json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}).encode()


def encoder(style: Style | None = HERMES) -> RowEncoder:
    template = PlainTemplate() if style is None else Taught(style)
    return RowEncoder(ByteTokenizer(), template, model_info(4096), JobSettings())


def refusal(raw: bytes, style: Style | None = HERMES) -> RowError:
    (error,) = encoder(style).encode([raw])
    assert isinstance(error, RowError)
    return error


def asked(style: Style = HERMES, **body: Any) -> Constraint | None:
    """What the row's text has to be."""
    encoding, raw = encoder(style), line(tools=TOOLS, **body)
    (found,) = encoding.encode([raw])
    assert not isinstance(found, RowError), found
    return encoding.requests(1, encoding.parse(raw), 0, found.prompts[0])[0].constraint


def message(text: str, style: Style = HERMES, finish: Any = "stop", **body: Any) -> tuple[dict[str, Any], str]:
    """What the answer says when the model has written that text."""
    writer = AnswerWriter(ByteTokenizer(), "f" * 64, "m", style=style)
    tokens = array("i", [*(FIRST + byte for byte in text.encode()), EOS])
    row = parse_line(line(tools=TOOLS, **body), JobSettings())
    answers = [PromptAnswers(array("i", [5]), [Sample(text, tokens, finish)])]
    choice = json.loads(writer.answer(row, answers))["response"]["body"]["choices"][0]
    return choice["message"], choice["finish_reason"]


# -- reading ----------------------------------------------------------------------------------------


def test_a_template_tells_how_its_model_writes_calls() -> None:
    assert style_of(TEMPLATES["qwen2.5"]) is HERMES
    assert style_of("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]") is MISTRAL
    assert style_of("{% if tools %}<|python_tag|>") is LLAMA
    assert style_of(TEMPLATES["gemma"]) is None and style_of("{{ tools }}") is None


@pytest.mark.parametrize(
    ("style", "text", "before"),
    [
        (HERMES, '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>', ""),
        (HERMES, 'Let me see.\n<tool_call>{"name": "weather", "arguments": %s}</tool_call><|im_end|>', "Let me see."),
        (HERMES, '<tool_call>\n{"name": "weather", "arguments": %s}', ""),
        (LLAMA, '{"name": "weather", "parameters": %s}', ""),
        (LLAMA, '<|python_tag|>{"name": "weather", "parameters": %s}<|eom_id|>', ""),
        (MISTRAL, '[TOOL_CALLS] [{"name": "weather", "arguments": %s}]</s>', ""),
        (MISTRAL, '[{"name": "weather", "arguments": %s}]', ""),
        (MISTRAL, "Well.[TOOL_CALLS]weather[CALL_ID]a1B2c3D4e[ARGS]%s</s>", "Well."),
        (MISTRAL, "[TOOL_CALLS]weather%s", ""),
    ],
)
def test_calls_are_read_as_each_family_writes_them(style: Style, text: str, before: str) -> None:
    said, calls = read_calls(style, text % json.dumps(ROME), NAMES, ends=("<|im_end|>", "<|eom_id|>", "</s>"))
    assert said == before and [(call.name, call.arguments) for call in calls] == [("weather", ROME)]


@pytest.mark.parametrize(
    ("style", "text"),
    [
        (
            HERMES,
            '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
            '<tool_call>{"name": "stop", "arguments": {}}</tool_call>',
        ),
        (LLAMA, '{"name": "weather", "parameters": {}}; {"name": "stop", "parameters": {}}'),
        (MISTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": {}}, {"name": "stop", "arguments": {}}]'),
        (MISTRAL, "[TOOL_CALLS]weather[ARGS]{}[TOOL_CALLS]stop[ARGS]{}"),
    ],
)  # fmt: skip
def test_several_calls_are_read_in_their_order(style: Style, text: str) -> None:
    assert [call.name for call in read_calls(style, text, NAMES)[1]] == ["weather", "stop"]


@pytest.mark.parametrize("style", [HERMES, LLAMA, MISTRAL])
@pytest.mark.parametrize(
    "text",
    [
        "It rains.", "", "{", "[", "[]", "<tool_call>", '<tool_call>{"name": 5}</tool_call>', "[TOOL_CALLS]",
        '{"name": "other", "parameters": {}}', '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '[TOOL_CALLS][{"name": "weather"}]', '{"name": "weather", "parameters": 5}', "[TOOL_CALLS]weather[ARGS]{",
        "[1]", '{"name": "weather", "arguments": "{"}', "[TOOL_CALLS]" + "[" * 5000,
        '<tool_call>{"name": "stop", "arguments": {}} <tool_call>{"name": "stop", "arguments": {}}</tool_call>',
    ],
)  # fmt: skip
def test_what_is_no_call_stays_a_text(style: Style, text: str) -> None:
    assert read_calls(style, text, NAMES) == (text, [])


WRITTEN = [
    (HERMES, '<tool_call>{"name": "stop", "arguments": %s}</tool_call>'),
    (LLAMA, '{"name": "stop", "parameters": %s}'),
    (MISTRAL, '[{"name": "stop", "arguments": %s}]'),
    (MISTRAL, '[TOOL_CALLS][{"name": "stop", "arguments": %s}]'),
    (MISTRAL, "[TOOL_CALLS]stop[ARGS]%s"),
]


@pytest.mark.parametrize(("style", "text"), WRITTEN)
@pytest.mark.parametrize("mark", ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "]", "};", '"'])
def test_marks_in_the_strings_of_a_call_are_no_marks(style: Style, text: str, mark: str) -> None:
    (call,) = read_calls(style, text % json.dumps({"s": mark, mark: [mark]}), NAMES)[1]
    assert call.arguments == {"s": mark, mark: [mark]}


@pytest.mark.parametrize(("style", "text"), WRITTEN)
@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", r'"\ud83d"', r'{"\ude00": 1}'])
def test_what_no_json_can_hold_is_no_call_and_the_answer_still_has_a_line(style: Style, text: str, value: str) -> None:
    text %= '{"s": [%s]}' % value  # noqa: UP031
    shown, finish = message(text, style)
    assert shown == {"role": "assistant", "content": text} and finish == "stop"
    assert read_calls(style, text.replace(value, json.dumps(value)), NAMES)[1]


@pytest.mark.parametrize(("style", "text"), WRITTEN)
def test_words_behind_the_calls_are_not_lost(style: Style, text: str) -> None:
    text %= "{}"
    assert message(f"{text}\n", style)[1] == "tool_calls"
    for more in ("And now?", "<tool_call", "]", "<|im_end|>"):
        assert message(text + more, style) == ({"role": "assistant", "content": text + more}, "stop")
    assert read_calls(style, f"{text} <|im_end|>\n<|im_end|>", NAMES, ends={"<|im_end|>"})[1]


def test_words_between_two_calls_stay_with_those_before_them() -> None:
    call = '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
    before, calls = read_calls(HERMES, f"First.\n{call} Then. {call}\n{call}", NAMES)
    assert before == "First.\nThen." and len(calls) == 3


def test_only_a_call_of_an_answer_that_stopped_by_itself_may_lack_its_closing_mark() -> None:
    call = '<tool_call>{"name": "stop", "arguments": {}}'
    assert message(call)[1] == "tool_calls" and message(call + "\n</tool_call>", finish="length")[0]["tool_calls"]
    for cut in (call, call + "\n</tool", f"{call}</tool_call>\n{call}"):
        assert message(cut, finish="length") == ({"role": "assistant", "content": cut}, "length")


def test_what_the_row_wants_answers_to_end_with_may_stand_behind_a_call() -> None:
    text = '{"name": "stop", "parameters": {}}'
    tokens = array("i", [FIRST + byte for byte in (text + "###").encode()])
    writer = AnswerWriter(ByteTokenizer(), "f" * 64, "m", style=LLAMA)
    row = parse_line(line(tools=TOOLS, stop=["###"]), JobSettings())
    for reason, called in (("###", True), (FIRST + ord("#"), True), (None, False)):
        answers = [PromptAnswers(array("i", [5]), [Sample(text, tokens, "stop", reason)])]
        shown = json.loads(writer.answer(row, answers))["response"]["body"]["choices"][0]["message"]
        assert ("tool_calls" in shown) == called


def test_an_answer_with_calls_says_so() -> None:
    text = 'Sure. <tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    shown, finish = message(text)
    (call,) = shown["tool_calls"]
    assert finish == "tool_calls" and shown["content"] == "Sure." and call["type"] == "function"
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'} and len(call["id"]) == 9
    assert message(text, tool_choice="none")[0] == {"role": "assistant", "content": text}
    assert message("It rains.") == ({"role": "assistant", "content": "It rains."}, "stop")
    twice, _ = message(text + text)
    assert len({call["id"] for call in twice["tool_calls"]}) == 2
    once, _ = message(text + text, parallel_tool_calls=False)
    assert len(once["tool_calls"]) == 1


# -- calls that have to come -------------------------------------------------------------------------


@pytest.mark.parametrize("style", [HERMES, LLAMA, MISTRAL])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_come_always_parses_and_fits_its_schema(style: Style, choice: Any) -> None:
    tokenizer = Tokenizer.load(EMBEDDED)
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    wanted = asked(style, tool_choice=choice)
    assert wanted is not None
    seen = set()
    for seed in range(12):
        row, draw = grammars.begin(wanted, tokenizer.eos, 160, ()), random.Random(seed)
        while row.bits is not None:
            may = np.flatnonzero(np.unpackbits(row.bits.view(np.uint8), bitorder="little"))
            grammars.advance([(row, int(draw.choice(may)))])
            assert not row.problem, row.problem
        assert row.tokens[-1] in tokenizer.eos
        _, calls = read_calls(style, tokenizer.decode(row.tokens[:-1]), NAMES)
        assert calls and (style is not LLAMA and choice == "required" or len(calls) == 1)
        for call in calls:
            seen.add(call.name)
            jsonschema.validate(call.arguments, WEATHER if call.name == "weather" else {"type": "object"})
    assert seen == NAMES if choice == "required" else seen == {"weather"}


def test_only_a_call_that_must_come_is_a_constraint_and_parallel_calls_can_be_forbidden() -> None:
    assert asked() is None and asked(tool_choice="auto") is None and asked(tool_choice="none") is None
    several, one = asked(tool_choice="required"), asked(tool_choice="required", parallel_tool_calls=False)
    assert several is not None and one is not None and several != one
    assert json.loads(several.text)["between"] and not json.loads(one.text)["between"]


@lru_cache(1)
def embedded() -> tuple[Tokenizer, Grammars]:
    tokenizer = Tokenizer.load(EMBEDDED)
    return tokenizer, Grammars(tokenizer, tokenizer.vocab_size)


def accepts(wanted: Constraint, text: str) -> bool:
    """Whether a text may be written under a constraint, to its end."""
    tokenizer, grammars = embedded()
    row = grammars.begin(Checker().check(wanted), tokenizer.eos, 999, ())
    for token in [*tokenizer.encode(text, special=False), min(tokenizer.eos)]:
        if row.bits is None or not row.bits.view(np.uint32)[token >> 5] >> (token & 31) & 1:
            return False
        grammars.advance([(row, token)])
    return True


@pytest.mark.parametrize(
    "reference", [{"$defs": {"x": {}}, "$ref": "#/$defs/x"}, {"$defs": {"x": {"$anchor": "q"}}, "$ref": "#q"}]
)
@pytest.mark.parametrize("more", [{}, {"$id": "https://example.com/a"}])
def test_functions_whose_schemas_use_the_same_names_do_not_touch(reference: Any, more: Any) -> None:
    kinds = []
    for name in ("a", "b"):
        inner = {"x": {**reference["$defs"]["x"], "const": {name: 1}}}
        kinds.append((name, {**reference, **more, "$defs": inner}))
    wanted = calls(LLAMA, kinds, False)
    assert accepts(wanted, '{"name": "a", "parameters": {"a": 1}}')
    assert accepts(wanted, '{"name": "b", "parameters": {"b": 1}}')
    assert not accepts(wanted, '{"name": "a", "parameters": {"b": 1}}')


@pytest.mark.parametrize("name", ["default", "const", "enum", "examples", "$ref", "$id", "properties"])
def test_properties_may_be_named_as_keywords_are(name: str) -> None:
    schema = {
        "type": "object", "$defs": {"x": {"const": 5}}, "properties": {name: {"$ref": "#/$defs/x"}},
        "required": [name], "additionalProperties": False,
    }  # fmt: skip
    wanted = calls(LLAMA, [("f", schema), ("g", {"type": "object"})], False)
    assert accepts(wanted, '{"name": "f", "parameters": {"%s": 5}}' % name)  # noqa: UP031
    assert not accepts(wanted, '{"name": "f", "parameters": {"%s": 6}}' % name)  # noqa: UP031


@pytest.mark.parametrize("open", [{}, {"properties": {"a": {}}}, {"type": ["null", "object"]}, {"minProperties": 0}])
@pytest.mark.parametrize("style", [HERMES, LLAMA, MISTRAL])
def test_arguments_that_must_come_are_an_object_whatever_their_schema_leaves_open(style: Style, open: Any) -> None:
    wanted = calls(style, [("f", open)], False)
    for arguments, may in (('{"a": 5}', True), ("[]", False), ("5", False), ("null", False), ('"{}"', False)):
        text = f'{style.first}{style.begin}{{"name": "f", "{style.arguments}": {arguments}}}{style.end}{style.last}'
        assert accepts(wanted, text) == may


def test_calls_may_not_be_longer_than_other_constraints() -> None:
    half = [(name, {"description": "a" * (LIMIT // 2)}) for name in ("f", "g")]
    assert calls(LLAMA, half[:1], False)
    with pytest.raises(RowError, match="4 MiB"):
        calls(LLAMA, half, False)


def test_a_schema_may_point_at_itself() -> None:
    schema = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}
    wanted = calls(LLAMA, [("f", schema), ("g", {"type": "object"})], False)
    assert accepts(wanted, '{"name": "f", "parameters": {"next": {"next": {}}}}')
    assert not accepts(wanted, '{"name": "f", "parameters": {"next": {"name": "f"}}}')


# -- prompts and refusals ----------------------------------------------------------------------------


def test_templates_see_tools_calls_and_their_results() -> None:
    called = {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    talk = [
        *HI, {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "a1", "content": "sunny"},
    ]  # fmt: skip
    (found,) = encoder().encode([line(messages=talk, tools=TOOLS)])
    assert not isinstance(found, RowError), found
    tools, messages = json.loads(ByteTokenizer().decode(found.prompts[0]))
    assert tools == TOOLS and messages[1]["tool_calls"][0]["function"] == called["function"]
    assert messages[2] == {"role": "tool", "content": "sunny", "tool_call_id": "a1"}
    (free,) = encoder().encode([line(tools=TOOLS, tool_choice="none")])
    assert not isinstance(free, RowError) and json.loads(ByteTokenizer().decode(free.prompts[0]))[0] is None


def bad_tool(**function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **function}}]


@pytest.mark.parametrize(
    ("body", "code", "advice"),
    [
        ({"tools": bad_tool(name="no blanks")}, "invalid_request", "letters"),
        ({"tools": bad_tool(parameters=5)}, "invalid_request", "object"),
        ({"tools": bad_tool(parameter={})}, "unknown_field", "remove"),
        ({"tools": [{"type": "function"}]}, "missing_field", "add it"),
        ({"tools": [{"type": "web_search"}]}, "invalid_request", "function"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "invalid_request", "name of its own"),
        ({"tool_choice": "required"}, "invalid_request", "add tools"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "invalid_request", "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}},
            "invalid_request",
            "weather, stop",
        ),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "invalid_request", "exclude each other"),
        (
            {"tools": bad_tool(parameters={"properties": {"a": {"type": "array", "uniqueItems": True}}}),
             "tool_choice": "required"},
            "invalid_constraint",
            "uniqueItems",
        ),
        *(
            ({"tools": bad_tool(parameters={"type": a}), "tool_choice": "required"}, "invalid_constraint", "'object'")
            for a in ("array", ["string", "null"], "objects", {"object": 1}, None, 5)
        ),
        ({"tools": bad_tool() * 129}, "invalid_request", "128"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [
            {"function": {"name": "f", "arguments": "{}"}}]}]}, "invalid_request", "assistant"),
        ({"messages": [{"role": "user", "content": "a", "tool_call_id": "x"}]}, "invalid_request", "tool's message"),
    ],
)  # fmt: skip
def test_a_bad_tool_fails_its_own_row_with_advice(body: dict[str, Any], code: str, advice: str) -> None:
    error = refusal(line(**body))
    assert error.code == code and advice in str(error), str(error)


def test_a_model_that_was_taught_no_tools_refuses_them() -> None:
    error = refusal(line(tools=TOOLS), style=None)
    assert error.code == "not_supported" and error.param == "tools" and "Qwen" in str(error)
    assert not isinstance(encoder(None).encode([line(tools=TOOLS, tool_choice="none")])[0], RowError)
