"""Messages to one prompt text, by the checkpoint's own chat template, as transformers' apply_chat_template does it.

Knows template files and the shape of chat messages; it must not know tokens, jobs or which model it is.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from shoal.core.errors import ModelError, RowError
from shoal.text.files import TokenizerFiles, read_json
from shoal.text.sandbox import MAX_CHARACTERS, ChatEnvironment, TooMuch
from shoal.text.tools import Style, style_of
from shoal.text.unicode import check

DATE = datetime.date(2024, 7, 26)
"""What `strftime_now` shows unless told otherwise: a prompt is a function of its row, not of the day it runs.
It is the date that Llama 3's own template falls back to."""

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field; templates read the first or second
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "

Message = Mapping[str, Any]


class ChatTemplate:
    """The compiled templates of a checkpoint. `hash` stands for everything a rendering depends on but its row."""

    def __init__(
        self, sources: Mapping[str, str], variables: Mapping[str, str], date: datetime.date = DATE, where: str = ""
    ) -> None:
        """`sources` by name ("default", "tool_use", …), `variables` such as bos_token. ModelError: not valid jinja2."""
        self.sources = dict(sources)
        self.variables = dict(variables)
        self.where = where
        self.environment = ChatEnvironment(date)
        self.templates = {}
        for name, source in self.sources.items():
            try:
                self.templates[name] = self.environment.from_string(source)
            except (jinja2.TemplateError, RecursionError) as error:
                raise ModelError(
                    f"the chat template {name!r} of {where or 'the model'} is not valid jinja2: {error}. "
                    "Correct chat_template.jinja (or chat_template in tokenizer_config.json)"
                ) from error
        self.globals = dict(self.environment.globals)  # jinja2 would copy its own layered mapping for every rendering
        content = json.dumps([self.sources, self.variables, date.isoformat()], sort_keys=True)
        self.hash = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    @classmethod
    def load(cls, folder: Path | str, date: datetime.date = DATE) -> ChatTemplate:
        """The templates of a checkpoint folder. A folder without any loads; then every rendering is refused."""
        files = TokenizerFiles.read(Path(folder))
        variables = {name: token.content for name, token in files.named_tokens().items()}
        return cls(_sources(files), variables, date, str(folder))

    @property
    def style(self) -> Style | None:
        """How the model writes calls of tools, by the template that shows it how; None where none does."""
        return style_of(self.sources.get("tool_use") or self.sources.get("default") or "")

    @property
    def pairs(self) -> bool:
        """Whether it shows a query and a document, as templates of rerankers do."""
        return all(re.search(f"[\"']{role}[\"']", self.sources.get("default", "")) for role in ("query", "document"))

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a chat; begin and end tokens are in it, so encode it without special tokens.

        `template_kwargs` are further names for the template (`enable_thinking`, `documents`, …).
        `continue_final_message` ends the prompt inside the last message. RowError says why a chat cannot be rendered.
        """
        source = self._choose(tools)
        if not messages:
            raise RowError("messages is empty: give at least one message", param="messages")
        if continue_final_message and add_generation_prompt:
            raise RowError(
                "continue_final_message and add_generation_prompt exclude each other: set add_generation_prompt to "
                "false to continue the last message",
                param="continue_final_message",
            )
        chat = [_plain(message, index) for index, message in enumerate(messages)]
        final = self._mark_final(chat, self.sources[source]) if continue_final_message else ""
        names: dict[str, Any] = {
            "messages": chat,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        names.update(self.variables)
        if template_kwargs:
            names.update(template_kwargs)
        text = self._run(self.templates[source], names)
        return _cut_at_mark(text, final) if continue_final_message else text

    def _choose(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        if tools is not None and "tool_use" in self.templates:
            return "tool_use"
        if "default" in self.templates:
            return "default"
        if self.templates:
            raise RowError(
                f"{self.where} has chat templates named {', '.join(sorted(self.templates))} but none named default",
                code="no_chat_template",
            )
        raise RowError(
            f"{self.where or 'the model'} has no chat template: add chat_template.jinja to its folder, or send "
            "completions (a prompt) instead of messages",
            code="no_chat_template",
            param="messages",
        )

    def _run(self, template: jinja2.Template, names: dict[str, Any]) -> str:
        parts = []
        size = 0
        self.environment.reset()
        try:
            for part in template.root_render_func(template.new_context({**self.globals, **names}, shared=True)):
                size += len(part)
                if size > MAX_CHARACTERS:
                    raise TooMuch(f"the template makes a prompt of more than {MAX_CHARACTERS:,} characters")
                parts.append(part)
        except (RecursionError, MemoryError) as error:
            raise _refusal(f"it needs too much {'depth' if isinstance(error, RecursionError) else 'memory'}") from error
        except Exception as error:  # a template can raise anything; whatever it is, only this row is at fault
            raise _refusal(str(error) or type(error).__name__) from error
        text = "".join(parts)
        check(text)
        return text

    @staticmethod
    def _mark_final(chat: list[dict[str, Any]], source: str) -> str:
        """Put a mark behind the last message's content; returns the content."""
        final = chat[-1].get("content")
        if not isinstance(final, str):
            raise RowError("continue_final_message needs a last message with text in content", param="messages")
        if "content" not in source:
            raise RowError("the chat template shows no content to continue", param="continue_final_message")
        chat[-1] = {**chat[-1], "content": final + _MARK}
        return final


def _refusal(reason: str) -> RowError:
    return RowError(f"the chat template refuses these messages: {reason}", code="chat_template", param="messages")


def _cut_at_mark(text: str, final: str) -> str:
    """The rendering up to the end of the last message; transformers' rule, trimmed where the template trims."""
    bare = _MARK.strip()
    if final.strip() not in text or bare not in text:
        raise RowError(
            "the chat template does not show the last message whole, so it cannot be continued",
            param="continue_final_message",
        )
    place = text.rindex(bare)
    return text[:place] if text[place : place + len(_MARK)] == _MARK else text[:place].rstrip()


def _plain(message: Message, index: int) -> dict[str, Any]:
    """One message as templates expect it: no nulls, text parts as one text, tool arguments as objects."""
    if not isinstance(message, dict):
        raise RowError(f"messages[{index}] is not an object with role and content", param=f"messages[{index}]")
    content = message.get("content")
    if len(message) == 2 and type(content) is str and message.get("role") is not None:
        return message
    plain = {key: value for key, value in message.items() if value is not None}
    if isinstance(content, list):
        plain["content"] = _join_parts(content, index)
    elif content is not None and not isinstance(content, str):
        raise RowError(
            f"messages[{index}].content is neither a text nor a list of parts", param=f"messages[{index}].content"
        )
    if "tool_calls" in plain:
        plain["tool_calls"] = [_plain_call(call, index) for call in _as_list(plain["tool_calls"], index)]
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _join_parts(parts: list[Any], index: int) -> str:
    """The texts of a list of parts, a line break between them."""
    texts = []
    for number, part in enumerate(parts):
        where = f"messages[{index}].content[{number}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else None
        name = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
        if name is None:
            raise RowError(
                f"{where} is of type {kind!r}: this model takes text parts only",
                code="unsupported_content",
                param=where,
            )
        if not isinstance(part.get(name), str):
            raise RowError(f"{where}.{name} is not a text", param=f"{where}.{name}")
        texts.append(part[name])
    return "\n".join(texts)


def _as_list(value: Any, index: int) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(f"messages[{index}].tool_calls is not a list", param=f"messages[{index}].tool_calls")
    return value


def _plain_call(call: Any, index: int) -> Any:
    """A tool call whose arguments are an object: clients send them as JSON text, templates expect them parsed."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    arguments: str = function["arguments"]
    try:
        parsed = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError) as error:
        where = f"messages[{index}].tool_calls"
        raise RowError(f"{where} has arguments that are not JSON: {error}", param=where) from error
    return {**call, "function": {**function, "arguments": parsed}}


def _sources(files: TokenizerFiles) -> dict[str, str]:
    """The templates of a folder by name: the .jinja files, else what the configuration holds."""
    folder = files.folder
    found = {}
    single = folder / "chat_template.jinja"
    if single.is_file():
        found["default"] = _read_text(single)
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = _read_text(path)
    if found:
        return found
    value = files.config.get("chat_template")
    if value is None:
        value = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    if value is None:
        return {}
    named = {"default": value} if isinstance(value, str) else value
    if isinstance(named, dict) and all(isinstance(t, str) for pair in named.items() for t in pair):
        return dict(named)
    raise ModelError(f"{folder}: chat_template is neither a text nor a list of named texts")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 text: {error}") from error
