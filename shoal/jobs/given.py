"""What a row is about: its prompts or inputs one by one, its pairs of texts, and what may not stand beside them.

It must not know a tokenizer or a model.
"""

from __future__ import annotations

from shoal.core.errors import RowError
from shoal.jobs.body import ClassifyBody, PairBody, RerankBody, Texts, VectorBody

NAMES = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))
_ALL = sorted({name for pair in NAMES for name in pair})


def check_fields(body: VectorBody) -> None:
    """Refuse what means nothing in this kind of body."""
    for name in body.__struct_fields__:
        if not body.has(name) and getattr(body, name) is not None:
            raise RowError(f"{name!r} is not a field of this url: remove it", "unknown_field", name)
    if not isinstance(body, ClassifyBody):
        return
    if (body.input is None) == (body.messages is None):
        problem = "'input' is missing: add it, or messages" if body.input is None else "input and messages: keep one"
        raise RowError(f"body: {problem}", "missing_field" if body.input is None else "invalid_request", "input")
    for name in ("chat_template_kwargs", "add_generation_prompt", "continue_final_message"):
        if body.messages is None and getattr(body, name) is not None:
            raise RowError(f"{name} is for messages, and the row has an input: remove it", param=name)


def prompt_list(prompt: str | list[str | int | list[int]], param: str = "prompt") -> list[str | list[int]]:
    """Prompts (or inputs) one by one. Raises RowError for an empty list and for a mixture of kinds."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [prompt]  # type: ignore[list-item]  # all of it is ints
    if kinds == {str} or kinds == {list}:
        return prompt  # type: ignore[return-value]  # no ints in it
    problem = "mixes texts and token ids" if kinds else "is empty"
    raise RowError(f"{param} {problem}: give a text, texts, token ids, or lists of token ids", param=param)


def pairs_of(body: PairBody) -> tuple[list[str], list[str]]:
    """The first texts, one or as many as there are second ones, and the second ones. RowError for anything else."""
    if isinstance(body, RerankBody):
        if body.documents is None:
            raise RowError("body: 'documents' is missing: add it", "missing_field", "documents")
        return [body.query], _listed(body.documents, "documents")
    given = tuple(name for name in _ALL if getattr(body, name) is not None)
    names = next((pair for pair in NAMES if set(pair) == set(given)), None)
    if names is None:
        known = "; ".join(" and ".join(pair) for pair in NAMES)
        if len(given) > 1:
            raise RowError(f"body: {', '.join(given)} do not belong together: give one of: {known}", param=given[-1])
        raise RowError(f"body: two texts to compare are missing: give one of: {known}", "missing_field", "queries")
    first, second = (_listed(getattr(body, name), name) for name in names)
    if len(first) not in (1, len(second)):
        raise RowError(
            f"{names[0]} has {len(first)} texts and {names[1]} {len(second)}: give one first text, or one for each"
            " second",
            param=names[0],
        )
    return first, second


def _listed(texts: Texts, name: str) -> list[str]:
    found = [texts] if isinstance(texts, str) else texts
    if not found:
        raise RowError(f"{name} is empty: give at least one text", param=name)
    return found
