"""What a row's body asks of the text of its answer, as one Constraint: OpenAI's field and vLLM's names, old and new.

It must not know how a constraint is kept, nor whether it can be.
"""

from __future__ import annotations

import msgspec

from shoal.core.errors import RowError
from shoal.core.types import Constraint
from shoal.jobs.body import Body, JsonFormat, ObjectFormat, StructuredOutputs
from shoal.text import constraint

ANY_OBJECT = {"type": "object"}


def wanted(body: Body) -> tuple[Constraint, str] | None:
    """The constraint of a body and the field that asks for it; None for a free answer. RowError for two, or nonsense.

    `strict` and a format's `name` and `description` change nothing: a schema is kept whole in any case.
    """
    asked = [(name, value) for name, value in _wishes(body) if value is not None and value is not False]
    if not asked:
        return None
    if len(asked) > 1:
        names = " and ".join(name for name, _ in asked)
        raise RowError(f"{names} exclude each other: keep one", "invalid_constraint", asked[1][0])
    name, value = asked[0]
    try:
        return _constraint(name.rpartition(".")[2].removeprefix("guided_"), value, body), name
    except RowError as error:
        raise RowError(f"{name}: {error}", error.code, name) from None


def _wishes(body: Body) -> list[tuple[str, object]]:
    """Every place of a body that can ask for a constraint, with what it says."""
    form = body.response_format
    outputs = body.structured_outputs or StructuredOutputs()
    return [
        ("response_format", True if isinstance(form, ObjectFormat) else None),
        ("response_format.json_schema", form.json_schema.schema if isinstance(form, JsonFormat) else None),
        ("structured_outputs.json", outputs.json),
        ("structured_outputs.json_object", outputs.json_object),
        ("structured_outputs.regex", outputs.regex),
        ("structured_outputs.choice", outputs.choice),
        ("structured_outputs.grammar", outputs.grammar),
        ("guided_json", body.guided_json),
        ("guided_regex", body.guided_regex),
        ("guided_choice", body.guided_choice),
        ("guided_grammar", body.guided_grammar),
    ]


def _constraint(kind: str, value: object, body: Body) -> Constraint:
    match kind, value:
        case "regex", str():
            return constraint.regex(value)
        case "choice", list():
            return constraint.choice(value)
        case "grammar", str():
            return constraint.grammar(value)
    schema = ANY_OBJECT if kind in ("response_format", "json_object") else value
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except msgspec.DecodeError as error:
            raise RowError(f"it is not JSON ({error}): correct it", "invalid_constraint") from None
    outputs = body.structured_outputs or StructuredOutputs()
    pattern = outputs.whitespace_pattern or body.guided_whitespace_pattern
    return constraint.json_schema(schema, bool(outputs.disable_any_whitespace), pattern)
