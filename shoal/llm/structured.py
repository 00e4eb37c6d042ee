"""vLLM's parameters for structured outputs, and the constraint they ask for.

It must not know prompts, tokens or how a constraint is kept.
"""

from __future__ import annotations

import json as json_text
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from shoal.core.errors import RowError, UsageError
from shoal.core.types import Constraint
from shoal.text import constraint


@dataclass(slots=True)
class StructuredOutputsParams:
    """What the text of an answer must be: one of the first five. Names and meanings are vLLM's."""

    json: str | Mapping[str, object] | None = None  # a JSON schema, or its text
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None  # GBNF or Lark
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    disable_fallback: bool = False  # for vLLM's callers: there is nothing to fall back to
    disable_additional_properties: bool = False  # not available
    structural_tag: str | None = None  # not available

    def constraint(self) -> Constraint:
        """The engine's form. UsageError when it asks for nothing, for two things, or for what is not available."""
        for name in ("structural_tag", "disable_additional_properties"):
            if getattr(self, name):
                raise UsageError(f"structured_outputs: {name} is not available in this engine; leave it out")
        asked = [name for name in ("json", "regex", "choice", "grammar", "json_object") if _says(getattr(self, name))]
        if len(asked) != 1:
            raise UsageError(
                f"structured_outputs asks for {' and '.join(asked) or 'nothing'}; it must ask for one thing"
            )
        try:
            return self._constraint()
        except (RowError, ValueError) as error:
            raise UsageError(f"structured_outputs: {asked[0]}: {error}") from error

    def _constraint(self) -> Constraint:
        if self.regex is not None:
            return constraint.regex(self.regex)
        if self.choice is not None:
            return constraint.choice(list(self.choice))
        if self.grammar is not None:
            return constraint.grammar(self.grammar)
        schema = json_text.loads(self.json) if isinstance(self.json, str) else self.json
        wanted = {"type": "object"} if schema is None else schema
        return constraint.json_schema(wanted, self.disable_any_whitespace, self.whitespace_pattern)


def constraint_of(value: object) -> Constraint | None:
    """The constraint of SamplingParams.structured_outputs, which may be a mapping, or vLLM's own object."""
    if value is None:
        return None
    if isinstance(value, StructuredOutputsParams):
        return value.constraint()
    names = {each.name for each in fields(StructuredOutputsParams)}
    if isinstance(value, Mapping):
        unknown = sorted(set(value) - names)
        if unknown:
            raise UsageError(f"structured_outputs: {unknown[0]!r} is not known; leave it out")
        return StructuredOutputsParams(**value).constraint()
    said = {name: getattr(value, name) for name in names if getattr(value, name, None) is not None}
    return StructuredOutputsParams(**said).constraint()


def _says(value: object) -> bool:
    return value is not None and value is not False
