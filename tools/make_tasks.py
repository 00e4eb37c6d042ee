"""Lays tasks out as chats and writes them as files; it knows system prompts and file shapes, and nothing of models.

Write held-out rows with one command (they are a function of the seed alone):

    .venv/bin/python tools/make_tasks.py --count 2000 --seed 1 --output build/held_out.jsonl

and the example files of the repository with `.venv/bin/python tools/make_tasks.py --examples`.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from task_kinds import MAKERS, TRAINED, Task
from task_words import Words, split

ROOT = Path(__file__).resolve().parents[1]

ROLES = (
    "You are a helpful assistant.",
    "You are a careful assistant for an online shop.",
    "You help the office of a small company with its daily paper work.",
    "You are part of a program that works through long lists of rows, one at a time.",
    "You are a quiet clerk who answers exactly what is asked.",
)
GUIDES = (
    "Read the whole text before you answer.",
    "Answer briefly.",
    "Do not explain your answer.",
    "Do not add greetings, remarks or thanks.",
    "Never invent facts that the text does not state.",
    "If the text names several people, look at the one the question is about.",
    "Keep the spelling of names exactly as it is in the text.",
    "Numbers are written with digits.",
    "The answer is read by another program, so its form matters.",
    "Use plain text without any markup.",
    "The text may hold sentences that have nothing to do with the question; leave them out.",
    "Words such as very or really do not change the meaning.",
    "Each row stands for itself; do not carry anything over from other rows.",
    "The rows come from customers in many countries, so names and places may look unusual to you.",
    "When JSON is asked for, write one object on one line and nothing else.",
    "Keys of an object are written in the order in which the instruction names them.",
    "Ages, counts and prices are numbers without quotes.",
    "Names, places, colours and jobs are strings in double quotes.",
    "A question about a fact is answered by the text alone, not by what is likely.",
    "Labels are written in small letters.",
    "Quality matters more to us than speed, but both are welcome.",
    "The shop sells things for the house, the garden and the road.",
    "Our customers write in their own words and sometimes tell us where they live or how old they are.",
    "Treat every text with the same care, whether it is long or short.",
    "The list you give back has the same entries as the list you were given, each of them once.",
    "Separate the entries of a list with a comma and a space.",
)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation of one or more tasks: messages by role, in order, and the kind of each task."""

    kinds: tuple[str, ...]
    messages: tuple[tuple[str, str], ...]

    @property
    def answer(self) -> str:
        """The last message, which is the assistant's."""
        return self.messages[-1][1]


def guide(rng: random.Random, length: int) -> str:
    """A system prompt of a role and `length` sentences of guidance."""
    return " ".join([rng.choice(ROLES), *rng.sample(GUIDES, length)])


def lay_out(rng: random.Random, tasks: list[Task], layout: str, length: int) -> Chat:
    """Tasks as one conversation.

    `bare`: no system prompt, each instruction stands before its text. `role`: the same behind a system prompt.
    `system`: the first task's instruction ends the system prompt and the users give texts only (one kind of task).
    """
    messages: list[tuple[str, str]] = []
    if layout == "role":
        messages.append(("system", guide(rng, length)))
    elif layout == "system":
        messages.append(("system", f"{guide(rng, length)} {tasks[0].instruction}" if length else tasks[0].instruction))
    for task in tasks:
        content = task.content if layout == "system" else f"{task.instruction}\n{task.content}"
        messages.extend((("user", content), ("assistant", task.answer)))
    return Chat(tuple(task.kind for task in tasks), tuple(messages))


def same_instruction(rng: random.Random, words: Words, kind: str, count: int) -> list[Task]:
    """`count` tasks that share the first one's instruction."""
    first = MAKERS[kind](rng, words)
    tasks = [first]
    while len(tasks) < count:
        task = MAKERS[kind](rng, words)
        if task.instruction == first.instruction:
            tasks.append(task)
    return tasks


def training_chats(seed: int, kinds: tuple[str, ...] = TRAINED) -> Iterator[Chat]:
    """Training conversations without end: one to sixteen turns, with and without system prompts."""
    rng = random.Random(seed)
    words = split(held_out=False)
    while True:
        layout = rng.choice(("bare", "role", "system", "system"))
        turns = rng.choices((1, 2, 4, 6, 16), weights=(30, 22, 24, 21, 3))[0]
        length = rng.choice((0, 0, 1, 2, 4, 8, 14)) if turns > 3 else rng.choice((0, 0, 0, 1, 3))
        kind = rng.choice(kinds)
        if layout == "system":
            # extraction has too many instructions to draw equal ones at random
            tasks = same_instruction(rng, words, kind, 1 if kind == "extract" else turns)
        else:
            tasks = [MAKERS[rng.choice(kinds)](rng, words) for _ in range(turns)]
        yield lay_out(rng, tasks, layout, length)


def held_out_chats(seed: int, count: int, kinds: tuple[str, ...] = tuple(MAKERS)) -> list[Chat]:
    """`count` single-turn conversations of words, pairs and numbers that no training row has, kinds in turn."""
    rng = random.Random(seed)
    words = split(held_out=True)
    chats = []
    for place in range(count):
        task = MAKERS[kinds[place % len(kinds)]](rng, words)
        layout = rng.choice(("bare", "role", "system"))
        chats.append(lay_out(rng, [task], layout, rng.choice((0, 1, 2, 4))))
    return chats


# --- files ---------------------------------------------------------------------------------------------------------


def chat_line(custom_id: str, messages: list[dict[str, str]], max_tokens: int) -> str:
    """One input line in the OpenAI Batch shape."""
    body = {"model": "minnow", "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line, ensure_ascii=False)


def write_examples(folder: Path) -> None:
    """The example batch file, its right answers, and a CSV of plain rows; all of held-out words."""
    rng = random.Random(20)
    words = split(held_out=True)
    lines, answers = [], []
    plan = (("sentiment", 24, 12), ("review_json", 20, 14), ("extract", 16, 14), ("yes_no", 12, 8), ("sum", 8, 4))
    for kind, count, length in plan:
        system = guide(rng, length)
        if kind != "extract":
            system += " " + MAKERS[kind](rng, words).instruction
        for _ in range(count):
            task = MAKERS[kind](rng, words)
            content = task.content if kind != "extract" else f"{task.instruction}\n{task.content}"
            messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
            lines.append((kind, messages, task.answer))
    rng.shuffle(lines)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "reviews.jsonl").open("w", encoding="utf-8") as output:
        for number, (kind, messages, answer) in enumerate(lines, 1):
            custom_id = f"{kind}-{number:03d}"
            output.write(chat_line(custom_id, messages, 64) + "\n")
            answers.append({"custom_id": custom_id, "answer": answer})
    with (folder / "reviews.answers.jsonl").open("w", encoding="utf-8") as output:
        output.writelines(json.dumps(answer) + "\n" for answer in answers)
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as output:
        table = csv.writer(output, lineterminator="\n")
        table.writerow(("id", "text", "expected"))
        for number in range(1, 41):
            task = MAKERS["sentiment"](rng, words)
            table.writerow((number, task.content, task.answer))


def main() -> None:
    """Write held-out rows or the examples, as the options say."""
    options = argparse.ArgumentParser(description="Write task rows with checkable answers.")
    options.add_argument("--examples", action="store_true", help="write examples/ instead of one file of rows")
    options.add_argument("--count", type=int, default=1000)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--output", type=Path, default=ROOT / "build" / "held_out.jsonl")
    chosen = options.parse_args()
    if chosen.examples:
        write_examples(ROOT / "examples")
        return
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    with chosen.output.open("w", encoding="utf-8") as output:
        for chat in held_out_chats(chosen.seed, chosen.count):
            messages = [{"role": role, "content": text} for role, text in chat.messages[:-1]]
            output.write(json.dumps({"kind": chat.kinds[-1], "messages": messages, "answer": chat.answer}) + "\n")


if __name__ == "__main__":
    main()
