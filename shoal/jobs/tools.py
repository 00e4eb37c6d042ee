"""What a chat's body says of tools: which a row may call, whether it has to, and messages as templates read them.

It must not know how a model writes a call, nor what a template makes of a tool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from shoal.core.errors import RowError
from shoal.core.types import Constraint
from shoal.jobs.body import ChatBody, Function, Message, NamedChoice
from shoal.text import constraint
from shoal.text.tools import Style

ANY_ARGUMENTS = {"type": "object"}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a row that may be called."""

    functions: tuple[Function, ...]
    must: bool  # whether one has to be called
    several: bool  # whether more than one call may come
    chosen: str | None = None  # the one function that has to be called

    @property
    def names(self) -> frozenset[str]:
        """Of all functions."""
        return frozenset(each.name for each in self.functions)


def tool_use(body: object) -> ToolUse | None:
    """The tools of a body; None where it has none, or wants none called. RowError for what cannot be meant."""
    if not isinstance(body, ChatBody):
        return None
    choice, functions = body.tool_choice, tuple(each.function for each in body.tools or ())
    if not functions:
        if choice in (None, "none", "auto"):
            return None
        raise RowError("tool_choice asks for a call, and the row has no tools: add tools", param="tool_choice")
    names = set[str]()
    for each in functions:
        if each.name in names:
            raise RowError(f"two tools are named {each.name!r}: give each function a name of its own", param="tools")
        names.add(each.name)
    if choice == "none":
        return None
    chosen = choice.function.name if isinstance(choice, NamedChoice) else None
    if chosen is not None and chosen not in names:
        raise RowError(
            f"tool_choice names {chosen!r}; the tools are {', '.join(f.name for f in functions)}", param="tool_choice"
        )
    must = choice == "required" or chosen is not None
    return ToolUse(functions, must, body.parallel_tool_calls is not False, chosen)


def shown_tools(body: ChatBody, style: Style | None) -> list[dict[str, Any]] | None:
    """The tools as templates read them. RowError for a model whose calls could not be read back."""
    use = tool_use(body)
    if use is None:
        return None
    if style is None:
        raise RowError(
            "this model's chat template shows no tools that could be read back: leave tools out, or use a model whose"
            " template writes calls as those of Hermes, Qwen, Llama 3 or Mistral do",
            "not_supported",
            "tools",
        )
    found = []
    for each in use.functions:
        said = {"name": each.name, "description": each.description, "parameters": each.parameters}
        function = {name: value for name, value in said.items() if value is not None}
        found.append({"type": "function", "function": function})
    return found


def wanted_call(body: object, style: Style | None) -> tuple[Constraint, str] | None:
    """What the text has to be where a function has to be called, and the field that asks for it. RowError for a
    function that cannot be called so."""
    use = tool_use(body)
    if use is None or style is None or not use.must:
        return None
    asked = [each for each in use.functions if use.chosen in (None, each.name)]
    kinds = [(each.name, ANY_ARGUMENTS if each.parameters is None else each.parameters) for each in asked]
    try:
        return constraint.calls(style, kinds, use.several and use.chosen is None), "tools"
    except RowError as error:
        raise RowError(f"tools: {error}", error.code, "tools") from None


def check_messages(messages: Sequence[Message]) -> None:
    """RowError for a message without content that needs one, and for one with what only another role has."""
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if message.content is None and not message.tool_calls:
            raise RowError(f"body.{where}: 'content' is missing: add it", "missing_field", "content")
        if message.tool_calls and message.role != "assistant":
            raise RowError(f"{where}: only an assistant's message has tool_calls", param=f"{where}.tool_calls")
        if message.tool_call_id is not None and message.role != "tool":
            raise RowError(f"{where}: only a tool's message has tool_call_id", param=f"{where}.tool_call_id")


def turn_of(message: Message) -> Mapping[str, Any]:
    """A message as templates read it; parts of text are joined by line ends, as in vLLM."""
    content = message.content
    turn: dict[str, Any] = {
        "role": message.role,
        "content": "\n".join(part.text for part in content) if isinstance(content, list) else content,
    }
    for name in ("name", "reasoning", "reasoning_content", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            turn[name] = value
    if message.tool_calls:
        turn["tool_calls"] = [msgspec.to_builtins(each) for each in message.tool_calls]
    return turn
