"""What a job says once for all its rows. It must not know where the words came from (flags, environment, file)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from shoal.core.errors import RowError, UsageError
from shoal.jobs.body import FIELDS, GIVEN, KINDS, Body, VectorBody
from shoal.jobs.loops import rule_of
from shoal.jobs.passing import Passing
from shoal.jobs.prompt import PromptTemplate

B = TypeVar("B", bound=Body)
OWN = GIVEN | {"model"}  # what only a row itself can say


@dataclass(frozen=True, slots=True)
class Defaults:
    """Body fields for silent rows. The kinds of body differ in a few types, so each has its own."""

    kinds: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()  # by the name of the body's class

    def of(self, body: Body) -> tuple[tuple[str, Any], ...]:
        """Those for a body of this kind."""
        return next((fields for name, fields in self.kinds if name == type(body).__name__), ())


@dataclass(frozen=True, slots=True)
class JobSettings:
    """What the lines of a file are, and what holds for rows that do not say it themselves.

    A row's own field wins over `defaults`; these win over the model's generation_config.json.
    """

    model: str = "shoal"  # the name in answers to rows that name none
    served: tuple[str, ...] = ()  # with `strict`: the only names a row may give; empty means `model` alone
    strict: bool = False  # whether a row's model name must be one of `served`
    adapters: tuple[str, ...] = ()  # names of adapters; where there are any, a row may name no other model
    seed: int = 0  # with a row's custom_id (or line) it makes the seed of rows without one
    prompt: PromptTemplate | None = None  # plain rows: how a row's columns become its prompt
    chat: bool = False  # plain rows: the prompt is a user's message
    defaults: Defaults = Defaults()  # body fields for rows that are silent about them, from `parse_defaults`
    passing: Passing | None = None  # how rows are read that a server answers; they have its fields, not ours

    @property
    def plain(self) -> bool:
        """Whether lines are rows of columns; otherwise they are requests in the OpenAI Batch shape."""
        return self.prompt is not None or self.chat

    @property
    def names(self) -> tuple[str, ...]:
        """The model names that a job serves where it looks at them, adapters' last."""
        return (self.served or (self.model,)) + self.adapters

    def adapter(self, body: Body) -> str:
        """The adapter that a row names; '' for the model itself."""
        return body.model if body.model in self.adapters and body.model is not None else ""

    def complete(self, body: B) -> B:
        """The body with the job's defaults where it is silent."""
        silent = {name: value for name, value in self.defaults.of(body) if getattr(body, name) is None}
        return msgspec.structs.replace(body, **silent) if silent else body


def parse_defaults(fields: Mapping[str, Any], adapters: Collection[str] = ()) -> Defaults:
    """Body fields for all rows, checked as a row's own would be. Raises UsageError naming the field that is wrong.

    An adapter may be the model of all rows that name none: plain rows have no other way to name one.
    """
    given = {("max_tokens" if name == "max_completion_tokens" else name): value for name, value in fields.items()}
    for name in given:
        if name not in FIELDS or (name in OWN and not (name == "model" and given[name] in adapters)):
            raise UsageError(f"{name!r} cannot be a default for all rows: remove it, or correct its name")
    found: dict[type[Body], dict[str, Any]] = {kind: {} for kind in KINDS}
    for name, value in given.items():
        complaints = []
        for kind, values in found.items():
            means = kind.has(name) if issubclass(kind, VectorBody) else name in kind.__struct_fields__
            if means and value is not None:
                try:
                    values[name] = getattr(msgspec.convert({**_least(kind), name: value}, kind), name)
                except msgspec.ValidationError as error:
                    complaints.append(str(error))
        if complaints and not any(name in values for values in found.values()):
            raise UsageError(f"the default {name}={value!r} cannot be: {complaints[0]}")
    try:
        rule_of(next((v["repetition_detection"] for v in found.values() if "repetition_detection" in v), None))
    except RowError as error:
        raise UsageError(f"a default for all rows cannot be: {error}") from error
    return Defaults(tuple((kind.__name__, tuple(sorted(values.items()))) for kind, values in found.items() if values))


def _least(kind: type[Body]) -> dict[str, Any]:
    """What a body of this kind needs in any case."""
    needed = {field.name for field in msgspec.structs.fields(kind) if field.required}
    return {name: [{"role": "user", "content": ""}] if name == "messages" else "" for name in needed}
