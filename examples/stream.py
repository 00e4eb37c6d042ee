"""Rows that a program makes, answered as they come: the first fifty sums of a stream that never ends.

.venv/bin/python examples/stream.py
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

import shoal


def questions() -> Iterator[dict[str, object]]:
    """Rows without end; one is made when there is room for it."""
    for number in count(1):
        yield {"first": number, "second": number * 7 % 50}


with shoal.run(
    questions(), prompt="Add {first} and {second}.", chat=True, body={"max_tokens": 8, "temperature": 0}, window=64
) as results:
    for result in islice(results, 50):
        print(f"row {result.number}: {result.row} -> {result.text!r}" if result.ok else result.error)
    print(results.counts)
