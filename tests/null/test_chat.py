"""Chats become the prompts that the checkpoint's own template makes of them, and no template can do harm."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import some_tokenizers
from some_templates import CONVERSATIONS, TEMPLATES, TOOLS, VARIABLES

from shoal.core.errors import ModelError, RowError
from shoal.text.chat import DATE, ChatTemplate

HELLO = [{"role": "user", "content": "Hello there"}]
PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


@cache
def one(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, VARIABLES)


@pytest.fixture(scope="module")
def judge() -> Callable[..., str]:
    """transformers' own rendering, with its clock stopped at our date."""
    module = pytest.importorskip("transformers.utils.chat_template_utils")

    class Stopped(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Stopped:
            return cls(DATE.year, DATE.month, DATE.day, tzinfo=tz)

    def render(source: str, messages: list[dict[str, Any]], **names: Any) -> str:
        # apply_chat_template drops nulls before it renders
        chat = [{key: value for key, value in m.items() if value is not None} for m in messages]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "datetime", Stopped)
            return str(module.render_jinja_template([chat], chat_template=source, **{**VARIABLES, **names})[0][0])

    return render


def _outcome(render: Callable[[], str]) -> str | None:
    try:
        return render()
    except Exception:  # the template's own refusal: jinja2's errors there, RowError here
        return None


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_a_prompt_is_what_transformers_makes(judge: Callable[..., str], name: str, number: int) -> None:
    template, messages = one(TEMPLATES[name]), CONVERSATIONS[number]
    for opening in (True, False):
        for tools in (None, TOOLS):
            for extra in ({}, {"enable_thinking": False, "documents": [{"title": "t", "text": "x"}]}):

                def wanted(opening: bool = opening, tools: Any = tools, extra: dict[str, Any] = extra) -> str:
                    names = {"documents": None, **extra}
                    return judge(TEMPLATES[name], messages, add_generation_prompt=opening, tools=tools, **names)

                def found(opening: bool = opening, tools: Any = tools, extra: dict[str, Any] = extra) -> str:
                    return template.render(messages, opening, tools=tools, template_kwargs=extra)

                assert _outcome(found) == _outcome(wanted)


def test_most_templates_take_most_conversations() -> None:
    rendered = sum(
        _outcome(lambda t=t, m=m: one(t).render(m)) is not None for t in TEMPLATES.values() for m in CONVERSATIONS
    )
    assert rendered > len(TEMPLATES) * len(CONVERSATIONS) * 0.7


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("ending", ["The answer is", "The answer is  ", " \n", "is is", ""])
def test_a_last_message_is_continued_as_transformers_does(judge: Callable[..., str], name: str, ending: str) -> None:
    messages = [*HELLO, {"role": "assistant", "content": ending}]

    def found() -> str:
        return one(TEMPLATES[name]).render(messages, add_generation_prompt=False, continue_final_message=True)

    def wanted() -> str:
        return judge(TEMPLATES[name], messages, continue_final_message=True)

    assert _outcome(found) == _outcome(wanted)
    if ending.strip() and name != "odd":
        assert found().rstrip().endswith(ending.strip())


def test_a_row_is_refused_with_its_reason() -> None:
    template = one(PLAIN)
    for messages, arguments, says in (
        ([], {}, "messages is empty"),
        (["hi"], {}, r"messages\[0\] is not an object"),
        ([{"role": "user", "content": 3}], {}, r"messages\[0\].content is neither"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            {},
            "'image_url'.*text parts",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, r"content\[0\].text is not a text"),
        ([{"role": "user", "content": [{"type": ["text"]}]}], {}, "text parts only"),
        ([{"role": "assistant", "content": "x", "tool_calls": 3}], {}, "tool_calls is not a list"),
        ([{"role": "a", "tool_calls": [{"function": {"arguments": "{"}}]}], {}, "not JSON"),
        (HELLO, {"continue_final_message": True}, "exclude each other"),
        ([{"role": "user"}], {"continue_final_message": True, "add_generation_prompt": False}, "text in content"),
        ([{"role": "user", "content": "\ud800"}], {}, "lone surrogate"),
    ):
        with pytest.raises(RowError, match=says):
            template.render(messages, **arguments)  # type: ignore[arg-type]
    with pytest.raises(RowError, match="must alternate"):
        one(TEMPLATES["gemma"]).render([{"role": "assistant", "content": "I first"}])
    with pytest.raises(RowError, match="no chat template: add chat_template.jinja"):
        ChatTemplate({}, {}).render(HELLO)


def test_parts_of_text_become_one_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}, "three"]
    assert one(PLAIN).render([{"role": "user", "content": parts}]) == "[user] one\ntwo\nthree\n"
    assert one(PLAIN).render([{"role": "user", "content": []}]) == "[user] \n"


def test_tool_arguments_may_come_as_json_text() -> None:
    call = {"id": "1", "function": {"name": "weather", "arguments": '{"city": "Rome", "n": 1}'}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    parsed = [
        *HELLO,
        {
            "role": "assistant",
            "tool_calls": [{"function": {**call["function"], "arguments": {"city": "Rome", "n": 1}}}],
        },
    ]  # type: ignore[dict-item]
    template = one(TEMPLATES["qwen2.5"])
    assert template.render(messages) == template.render(parsed)
    assert '"arguments": {"city": "Rome", "n": 1}' in template.render(messages)
    assert call["function"]["arguments"].startswith("{")  # type: ignore[index]  # the caller's message is as it was


def test_a_prompt_does_not_depend_on_the_day() -> None:
    source = "{{ strftime_now('%d %b %Y %H:%M') }}"
    assert one(source).render(HELLO) == "26 Jul 2024 00:00"
    other = ChatTemplate({"default": source}, VARIABLES, date=datetime.date(2025, 1, 2))
    assert other.render(HELLO) == "02 Jan 2025 00:00"
    assert other.hash != one(source).hash


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(9999) recursive %}{{ loop.index }}{% endfor %}{% endfor %}",
        "{% macro a() %}{{ a() }}{{ a() }}{% endmacro %}{{ a() }}",
        "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(50) }}",
        "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{{ range(10 ** 10) }}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 10 ** 10 * 'x' }}",
        "{{ [1] * 10 ** 10 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
        "{% set n = namespace(s=3) %}{% for i in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}{{ n.s }}",
        "{% set n = namespace(s='xx') %}{% for i in range(40) %}{% set n.s = n.s|replace('x', 'xx') %}{% endfor %}",
        "{% set n = namespace(s='xx') %}{% for i in range(40) %}{% set n.s = n.s.replace('x', 'xx') %}{% endfor %}",
        "{% set n = namespace(s='xx') %}{% for i in range(40) %}{% set n.s = [n.s, n.s]|join %}{% endfor %}",
        "{% set n = namespace(s='xx') %}{% for i in range(40) %}{% set n.s = n.s.join([n.s, n.s]) %}{% endfor %}",
        "{% set n = namespace(s='xx') %}{% for i in range(40) %}{% set n.s = '%s%s' % (n.s, n.s) %}{% endfor %}",
        "{% set n = namespace(s='xx') %}{% for i in range(40) %}{% set n.s = '{0}{0}'.format(n.s) %}{% endfor %}",
        "{{ 'x'|center(10 ** 10) }}",
        "{{ 'x'.ljust(10 ** 10) }}",
        "{{ 'x'.ljust(width=10 ** 10) }}",
        "{{ 'x\ny'|indent(10 ** 10) }}",
        "{{ [[1]]|tojson(indent=10 ** 10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10 ** 10, 1) }}",
        "{{ '%10000000000d'|format(1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=10 ** 10) }}",
        "{{ 'x'.translate({120: 'y' * 1000000}) }}",
        "{{ [[1], [2]]|sum(start=[]) }}",
        "{{ lipsum(n=10 ** 9) }}",
        "{% for i in range(90000) %}{{ 'xxxxxxxxxx' * 1000 }}{% endfor %}",
        "{% set s %}{% for i in range(90000) %}{{ 'xxxxxxxxxx' * 1000 }}{% endfor %}{% endset %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ namespace(__init__=1) }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ strftime_now.__globals__.x }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include 'x' %}",
        "{{ nothing.x.y }}",
    ],
)
def test_a_template_can_do_no_harm(source: str) -> None:
    with pytest.raises((RowError, ModelError)):
        one(source).render(HELLO)
    assert HELLO == [{"role": "user", "content": "Hello there"}]


def test_templates_are_found_where_checkpoints_keep_them(tmp_path: Path) -> None:
    assert "no chat template" in str(_refusal(ChatTemplate.load(tmp_path)))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json {{ bos_token is defined }}"}))
    assert ChatTemplate.load(tmp_path).render(HELLO) == "json False"
    named = [{"name": "default", "template": "first {{ bos_token }}"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": named}))
    loaded = ChatTemplate.load(tmp_path)
    assert (loaded.render(HELLO), loaded.render(HELLO, tools=TOOLS)) == ("first <s>", "tools")
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    again = ChatTemplate.load(tmp_path)
    assert again.render(HELLO, tools=TOOLS) == "file <s>"
    assert again.hash != loaded.hash
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    assert ChatTemplate.load(tmp_path).render(HELLO, tools=TOOLS) == "more"
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ModelError, match="not valid jinja2"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="UTF-8"):
        ChatTemplate.load(tmp_path)


def _refusal(template: ChatTemplate) -> RowError:
    with pytest.raises(RowError) as caught:
        template.render(HELLO)
    return caught.value


def test_the_embedded_model_has_a_template() -> None:
    text = ChatTemplate.load(some_tokenizers.MINNOW).render(HELLO)
    assert text == "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = some_tokenizers.load("minnow")
    assert tokenizer.decode(tokenizer.encode(text, special=False), skip_special=False) == text
