"""Print the first answers of an output file beside their questions. It knows the OpenAI batch shape and plain rows."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any


def question(line: dict[str, Any]) -> str:
    """The last thing a row says or asks."""
    body = line.get("body", line)
    messages = body.get("messages") or [{"content": body.get("prompt", "")}]
    return str(messages[-1]["content"])


def answer(line: dict[str, Any]) -> str:
    """What came back."""
    choice = line["response"]["body"]["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """All lines of a file by custom_id."""
    with path.open(encoding="utf-8") as lines:
        return {row["custom_id"]: row for row in map(json.loads, lines)}


def main(asked: Path, answered: Path, number: int) -> None:
    """Print `number` pairs."""
    questions = rows_of(asked)
    print(f"\nSome answers, from {answered}:")
    for custom_id, row in islice(rows_of(answered).items(), number):
        print(f"\n{custom_id}  {question(questions[custom_id])}\n{'':>{len(custom_id)}}  -> {answer(row)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), 4)
