"""Print the first answers of the example beside their questions, and how many of all are right.

It knows the OpenAI batch shape; it must not know how the answers came about.

    python tools/show_answers.py QUESTIONS.jsonl EXPECTED.jsonl ANSWERS.jsonl
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

NUMBER = 4


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """All lines of a file by custom_id."""
    with path.open(encoding="utf-8") as lines:
        return {row["custom_id"]: row for row in map(json.loads, lines)}


def answer(row: dict[str, Any]) -> str:
    """What came back."""
    return str(row["response"]["body"]["choices"][0]["message"]["content"])


def same(text: str, expected: str) -> bool:
    """Whether an answer is the expected one: as JSON where it is JSON, else as text."""
    try:
        return bool(json.loads(text) == json.loads(expected))
    except ValueError:
        return text.strip() == expected.strip()


def main(asked: Path, expected: Path, answered: Path) -> None:
    """Print a few pairs of question and answer, then the score."""
    questions, right, answers = rows_of(asked), rows_of(expected), rows_of(answered)
    print(f"\nSome answers, from {answered}:")
    for custom_id, row in islice(answers.items(), NUMBER):
        question = questions[custom_id]["body"]["messages"][-1]["content"]
        print(f"\n  {question.replace(chr(10), chr(10) + '  ')}\n    -> {answer(row)}")
    score = sum(same(answer(row), right[custom_id]["answer"]) for custom_id, row in answers.items())
    print(f"\n{score} of {len(answers)} answers are right; the embedded model is small and knows a few tasks.")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
