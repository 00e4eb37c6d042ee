"""JSON as a schema would have it written: its keys in the order in which the schema has them.

It must not know constraints or tokens.
"""

from __future__ import annotations

import json
from typing import Any


def pointed(root: Any, reference: str) -> Any:
    """What a reference within a schema means."""
    for name in reference[2:].split("/"):
        root = root.get(name, {}) if isinstance(root, dict) else {}
    return root


def in_schema_order(value: Any, schema: Any, root: Any, last: bool = False) -> Any:
    """Keys in the order in which the schema has its properties: that order is part of what is asked. Of alternatives
    with different orders the first or the last counts."""
    while isinstance(schema, dict) and isinstance(value, list) and str(schema.get("$ref", "")).startswith("#/"):
        schema = pointed(root, schema["$ref"])
    if isinstance(value, list):
        items = schema.get("items", {}) if isinstance(schema, dict) else {}
        return [in_schema_order(each, items, root, last) for each in value]
    if not isinstance(value, dict) or not isinstance(schema, dict):
        return value
    found: dict[str, Any] = {}
    stack, seen = [schema], 0
    while stack and seen < 200:
        part, seen = stack.pop(0), seen + 1
        reference = part.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/"):
            stack.append(pointed(root, reference))
        own = part.get("properties", {})
        found = {**own, **found, **own} if last else {**found, **{n: each for n, each in own.items() if n not in found}}
        stack += [each for word in ("allOf", "anyOf", "oneOf") for each in part.get(word, ()) if isinstance(each, dict)]
    names = [name for name in found if name in value] + [name for name in value if name not in found]
    return {name: in_schema_order(value[name], found.get(name, {}), root, last) for name in names}


def writings(value: Any, schema: Any) -> list[list[str]]:
    """Texts of the value, with spaces between its words and without: as it is, and in the orders of its schema."""
    orders = [value, *(in_schema_order(value, schema, schema, last) for last in (False, True))]
    return [
        [json.dumps(each, ensure_ascii=False, separators=between) for each in orders]
        for between in ((", ", ": "), (",", ":"))
    ]
