"""The kinds of task: instruction, text and the one right answer; it must not know how they are laid out as chats."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from task_words import Words, invent, kept_out


@dataclass(frozen=True, slots=True)
class Task:
    """One question: the instruction, the text it is about, and the only right answer."""

    kind: str
    instruction: str
    content: str
    answer: str


def matches(answer: str, reply: str) -> bool:
    """Whether a reply is right: equal to the answer, or the same JSON value where the answer is an object."""
    if not answer.startswith("{"):
        return reply.strip() == answer
    try:
        return bool(json.loads(reply) == json.loads(answer))
    except ValueError:
        return False


# --- words and sentences -------------------------------------------------------------------------------------------


def person(rng: random.Random, words: Words) -> str:
    """A known first name, or half of the time an invented one, so that names must be read and not remembered."""
    return rng.choice(words.names) if rng.random() < 0.5 else invent(rng, words.held_out).capitalize()


def town(rng: random.Random, words: Words) -> str:
    """A known city, or sometimes an invented one."""
    return rng.choice(words.cities) if rng.random() < 0.6 else invent(rng, words.held_out).capitalize()


def phrase(rng: random.Random, words: Words, length: int) -> str:
    """Words in no order: known, invented, numbers and codes."""
    out = []
    for _ in range(length):
        dice = rng.random()
        if dice < 0.55:
            out.append(rng.choice(words.plain))
        elif dice < 0.8:
            out.append(invent(rng, words.held_out))
        elif dice < 0.9:
            out.append(str(rng.randrange(1000)))
        else:
            out.append("".join(rng.choices("ABCDEFGHJKLMNPRSTUVWXYZ", k=2)) + "-" + str(rng.randrange(10, 999)))
    return " ".join(out)


# --- the tasks -----------------------------------------------------------------------------------------------------

COPY = (
    "Repeat the text exactly.",
    "Copy the text word for word.",
    "Write the same text again, without any change.",
    "Return the text unchanged.",
    "Echo the text.",
)


def copy(rng: random.Random, words: Words) -> Task:
    """Copying: of words in no order, or of a sentence."""
    length = rng.choice((3, 5, 8, 12, 16, 24)) if rng.random() < 0.95 else rng.randrange(40, 90)
    if rng.random() < 0.7:
        text = phrase(rng, words, rng.randrange(2, length + 1))
    else:
        text = " ".join(rng.choice((extract, yes_no, sentiment))(rng, words).content for _ in range(1 + length // 12))
    return Task("copy", rng.choice(COPY), text.replace("\n", " "), text.replace("\n", " "))


PEOPLE = (
    "{name} is {age} years old and lives in {city}, working as a {job}.",
    "{name}, a {job} from {city}, is {age} years old.",
    "At {age}, {name} works as a {job} in {city}.",
    "The {job} {name} ({age}) comes from {city}.",
    "My neighbour {name} moved to {city} as a {job} and turned {age} last week.",
    "In {city} there is a {job} called {name}, who is {age}.",
    "We met {name} in {city}; {name} is a {job} and {age} years of age.",
    "Name: {name}. Age: {age}. Job: {job}. City: {city}.",
)
ORDERS = (
    "{name} ordered {count} {colour} {item}s for {price} dollars.",
    "Order from {name}: {count} x {item}, {colour}, {price} dollars in all.",
    "{count} {colour} {item}s were sent to {name}, who paid {price} dollars.",
    "For {price} dollars {name} bought {count} {item}s in {colour}.",
    "We sold {name} {count} {colour} {item}s. The bill was {price} dollars.",
    "The customer {name} asks for {count} {item}s, colour {colour}, at {price} dollars.",
)
UNSEEN_PEOPLE = ("A {job} aged {age}, {name} has a house in {city}.", "{city} is home to {name}, {age}, a {job}.")
UNSEEN_ORDERS = ("{name} paid {price} dollars and got {count} {colour} {item}s.",)
EXTRACT = (
    "Extract {keys} as JSON.",
    "Return a JSON object with the keys {keys}.",
    "Read the text and answer with JSON: {keys}.",
    "Find {keys} in the text. Answer with a JSON object only.",
)


def listed(entries: list[str]) -> str:
    """`a, b and c`."""
    return entries[0] if len(entries) == 1 else ", ".join(entries[:-1]) + " and " + entries[-1]


def extract(rng: random.Random, words: Words, unseen: bool = False) -> Task:
    """Extraction of two to four fields to JSON, keys in the order the instruction names them."""
    fields: dict[str, str | int]
    if rng.random() < 0.6:
        fields = {
            "name": person(rng, words),
            "age": rng.randrange(18, 90),
            "city": town(rng, words),
            "job": rng.choice(words.jobs),
        }
        sentence = rng.choice(UNSEEN_PEOPLE if unseen else PEOPLE).format(**fields)
    else:
        fields = {
            "name": person(rng, words),
            "item": rng.choice(words.items),
            "count": rng.randrange(2, 100),
            "colour": rng.choice(words.colours),
            "price": rng.randrange(5, 1000),
        }
        sentence = rng.choice(UNSEEN_ORDERS if unseen else ORDERS).format(**fields)
    keys = rng.sample(list(fields), rng.choice((2, 3, 3, 4)))
    if rng.random() < 0.25:
        sentence = f"{rng.choice(words.neutral)} {sentence}"
    answer = json.dumps({key: fields[key] for key in keys})
    return Task("extract", rng.choice(EXTRACT).format(keys=listed(keys)), sentence, answer)


def extract_unseen(rng: random.Random, words: Words) -> Task:
    """Extraction from sentences of a shape that no training row has."""
    task = extract(rng, words, unseen=True)
    return Task("extract_unseen_template", task.instruction, task.content, task.answer)


FACTS = (
    ("{who} has a {colour} {item}.", "Does {who} have a {colour} {item}?", "colour"),
    ("{who} bought a {item} in {city}.", "Did {who} buy a {item} in {city}?", "item"),
    ("{who} lives in {city}.", "Does {who} live in {city}?", "city"),
    ("{who} works as a {job}.", "Is {who} a {job}?", "job"),
    ("{who} is {age} years old.", "Is {who} {age} years old?", "age"),
    ("The {item} is {colour}.", "Is the {item} {colour}?", "colour"),
    ("The {item} costs {age} dollars.", "Does the {item} cost {age} dollars?", "age"),
)
YES_NO = (
    "Answer yes or no.",
    "Answer the question with yes or no.",
    "Is it true according to the text? Reply yes or no.",
    "Reply with one word, yes or no.",
)


def yes_no(rng: random.Random, words: Words) -> Task:
    """A question about one of one to four stated facts; half of them change the fact's value."""
    pools: dict[str, Callable[[], str]] = {
        "colour": lambda: rng.choice(words.colours),
        "item": lambda: rng.choice(words.items),
        "city": lambda: town(rng, words),
        "job": lambda: rng.choice(words.jobs),
        "age": lambda: str(rng.randrange(18, 90)),
    }
    facts = []
    values: dict[str, str] = {}
    question, changed = "", ""
    asked = rng.randrange(count := rng.choice((1, 1, 2, 3, 4)))
    for place in range(count):
        statement, form, key = rng.choice(FACTS)
        fact = {"who": person(rng, words)} | {name: draw() for name, draw in pools.items()}
        facts.append(statement.format(**fact))
        if place == asked:
            values, question, changed = fact, form, key
    answer = rng.choice(("yes", "no"))
    if answer == "no":
        old = values[changed]
        while values[changed] == old:
            values[changed] = pools[changed]()
    return Task("yes_no", rng.choice(YES_NO), f"{' '.join(facts)}\n{question.format(**values)}", answer)


SUM = ("Add the numbers.", "Give the sum.", "Work out the sum. Answer with the number only.", "Calculate.")


def sums(rng: random.Random, words: Words) -> Task:
    """The sum of two numbers below 50; the pairs of the two sides of the split do not overlap."""
    while True:
        top = rng.choice((10, 20, 50, 50))
        one, two = rng.randrange(top), rng.randrange(top)
        if kept_out(f"{min(one, two)}+{max(one, two)}") == words.held_out:
            break
    content = rng.choice(("{} + {}", "{} + {} = ?", "What is {} + {}?", "{} and {}", "{} plus {}")).format(one, two)
    return Task("sum", rng.choice(SUM), content, str(one + two))


UPWARDS = ("Sort the numbers from smallest to largest.", "Put the numbers in ascending order.", "Sort the numbers.")
DOWNWARDS = ("Sort the numbers from largest to smallest.", "Put the numbers in descending order.")
ALPHABET = ("Sort the words alphabetically.", "Put the words in alphabetical order.", "Sort the words from A to Z.")


def sort_numbers(rng: random.Random, words: Words) -> Task:
    """Three to five different numbers below 100, upwards or downwards."""
    while True:
        numbers = rng.sample(range(100), rng.randrange(3, 6))
        if kept_out(str(sorted(numbers))) == words.held_out:
            break
    down = rng.random() < 0.3
    text = ", ".join(str(number) for number in numbers)
    answer = ", ".join(str(number) for number in sorted(numbers, reverse=down))
    return Task("sort_numbers", rng.choice(DOWNWARDS if down else UPWARDS), text, answer)


def sort_words(rng: random.Random, words: Words) -> Task:
    """Three to five different words with different first letters."""
    while True:
        count = rng.randrange(3, 6)
        chosen = [rng.choice(words.plain) if rng.random() < 0.6 else invent(rng, words.held_out) for _ in range(count)]
        if len({word[0] for word in chosen}) == count:
            break
    return Task("sort_words", rng.choice(ALPHABET), ", ".join(chosen), ", ".join(sorted(chosen)))


VIEWS = (
    "The {item} is {view}.",
    "What {article} {view} {item}!",
    "This {colour} {item} turned out to be {view}.",
    "I find the {item} {view}.",
    "A {colour} {item}, and it is {view}.",
    "My new {item} is simply {view}.",
    "The {item} from {city} looks {view} and feels {second}.",
    "Honestly, the {item} is {view} and {second}.",
    "They said the {item} would be {other}, but it is {view}.",
)
SENTIMENT = (
    "Is the review positive or negative?",
    "Classify the sentiment of the review as positive or negative.",
    "Decide whether the customer is happy. Answer positive or negative.",
    "Label the review: positive or negative.",
)
REVIEW = (
    "Return a JSON object with the keys product and sentiment.",
    "Read the review and answer with JSON: product and sentiment.",
    "Extract product and sentiment as JSON. The sentiment is positive or negative.",
)


def review(rng: random.Random, words: Words, unseen: bool = False) -> tuple[str, str, str]:
    """One to four sentences about a product: (text, product, positive or negative)."""
    label = rng.choice(("positive", "negative"))
    views, closing = (words.good, words.praise) if label == "positive" else (words.bad, words.blame)
    if unseen:
        views = words.unseen_good if label == "positive" else words.unseen_bad
        closing = words.unseen_praise if label == "positive" else words.unseen_blame
    view, second = rng.sample(views, 2)
    sentence = rng.choice(VIEWS).format(
        item=(item := rng.choice(words.items)),
        view=view,
        second=second,
        other=rng.choice(words.bad if label == "positive" else words.good),
        article="an" if view[0] in "aeiou" else "a",
        colour=rng.choice(words.colours),
        city=town(rng, words),
    )
    sentences = [sentence]
    if rng.random() < 0.5:
        sentences.append(rng.choice(closing))
    for _ in range(rng.choice((0, 0, 1, 2))):
        sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(words.neutral))
    return " ".join(sentences), item, label


def sentiment(rng: random.Random, words: Words) -> Task:
    """Positive or negative, over a templated review."""
    text, _, label = review(rng, words)
    return Task("sentiment", rng.choice(SENTIMENT), text, label)


def sentiment_unseen(rng: random.Random, words: Words) -> Task:
    """Positive or negative, from words of praise and blame that no training row has."""
    text, _, label = review(rng, words, unseen=True)
    return Task("sentiment_unseen_words", rng.choice(SENTIMENT), text, label)


def review_json(rng: random.Random, words: Words) -> Task:
    """Product and sentiment of a templated review, as JSON."""
    text, item, label = review(rng, words)
    return Task("review_json", rng.choice(REVIEW), text, json.dumps({"product": item, "sentiment": label}))


LOOKUP = ("Answer with the value only.", "Find the entry in the list.", "Look it up in the list and give the value.")


def lookup(rng: random.Random, words: Words) -> Task:
    """The value of one key in a list of three to twenty-four entries."""
    keys: dict[str, str] = {}
    for _ in range(rng.choice((3, 5, 8, 12, 24))):
        keys[person(rng, words)] = rng.choice((town(rng, words), str(rng.randrange(10, 1000)), rng.choice(words.plain)))
    key = rng.choice(list(keys))
    lines = "\n".join(f"{name}: {value}" for name, value in keys.items())
    return Task("lookup", rng.choice(LOOKUP), f"{lines}\nWhat is the entry of {key}?", keys[key])


MAKERS: dict[str, Callable[[random.Random, Words], Task]] = {
    "copy": copy,
    "extract": extract,
    "extract_unseen_template": extract_unseen,
    "yes_no": yes_no,
    "sum": sums,
    "sort_numbers": sort_numbers,
    "sort_words": sort_words,
    "sentiment": sentiment,
    "sentiment_unseen_words": sentiment_unseen,
    "review_json": review_json,
    "lookup": lookup,
}
TRAINED = tuple(kind for kind in MAKERS if "_unseen_" not in kind)
