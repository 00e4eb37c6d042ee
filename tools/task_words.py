"""The words the generated tasks are made of; it must not know how a task is put together.

Every list is split once, by position: each sixth entry is kept for the held-out rows and never seen in training rows.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

NAMES = """Alice Bruno Clara Dmitri Elena Farid Grace Hugo Irene Jonas Karim Laura Marco Nadia Oscar Paula
Quentin Rosa Samuel Tara Umar Vera Walter Xenia Yusuf Zoe Anton Beatrix Carlos Diana Edgar Fiona Gustav
Hannah Ivan Julia Kenji Leila Martin Nora Otto Priya Rafael Sofia Tomas Ursula Victor Wendy Ximena Yara Adam
Bella Cedric Dora Emil Flora George Helga Igor Jana Kurt Linda Mira Nils Olga Pedro Ruth Simon Thea Ulrich
Viola Wanda Amira Boris Celia David Esther Felix Gloria Henry Ines Jakob Katya Lucas Maria Noel Opal Peter
Rita Stefan Tina Uma Vincent Willa Aaron Bianca Colin Daphne Ewan Frida Gavin Hilda Ismael Joanna Keith
Lydia Mabel Nathan Odile Philip Ramona Sven Trudy Vikram Winston Agnes Basil Cora Dennis Elsa Frank Greta
Howard Ida James Kira Leon Monica Neville Oliver Phoebe Roland Sylvia Theo Vivian""".split()

CITIES = """London Paris Madrid Oslo Vienna Prague Lisbon Dublin Athens Warsaw Berlin Rome Cairo Delhi Tokyo
Lima Quito Boston Denver Austin Seattle Chicago Toronto Montreal Havana Bogota Nairobi Lagos Accra Tunis
Dakar Hanoi Manila Seoul Osaka Kyoto Sydney Perth Auckland Leeds York Bristol Glasgow Cardiff Lyon Nice
Bordeaux Milan Turin Naples Geneva Basel Zurich Munich Hamburg Cologne Bremen Leipzig Dresden Krakow Riga
Vilnius Tallinn Helsinki Turku Bergen Malmo Aarhus Ghent Utrecht Porto Seville Valencia Bilbao Granada
Zagreb Split Belgrade Sofia Varna Ankara Izmir Amman Muscat""".split()

JOBS = """teacher nurse baker farmer lawyer plumber painter doctor driver tailor pilot chemist librarian
carpenter gardener waiter journalist reporter dentist sailor mechanic musician butcher clerk builder
fisherman cook barber miner potter judge translator""".split()

ITEMS = """kettle lamp chair table bicycle backpack camera blender toaster jacket parasol clock pillow
mattress radio guitar keyboard phone laptop headset printer vacuum heater fan mirror carpet curtain sofa
desk shelf mug teapot pan knife grill scarf hat boots sandals watch necklace wallet suitcase tent torch
drill hammer ladder mower hose notebook pen brush bottle basket bucket rug blanket cushion vase candle drum
flute violin helmet scooter skateboard kayak""".split()

COLOURS = """red blue green yellow black white brown grey purple navy pink silver golden crimson violet
beige teal maroon""".split()

PLAIN = """apple river stone cloud forest garden window bridge candle silver mountain market ocean paper
pencil rabbit school summer winter thunder village yellow anchor basket circle dinner engine feather glass
harbour island jungle kitchen lemon mirror needle orchard pepper quarry ribbon saddle tunnel uncle valley
wagon yard zebra autumn butter castle desert eagle fountain ginger honey insect jacket kingdom ladder meadow
napkin onion palace queen rocket shadow temple umbrella velvet whistle acorn bottle copper dragon elbow
falcon goat hammer ivory jewel kettle lantern monkey nest oyster parrot quilt raven spider tiger urchin
violin walnut yarn almond beetle camel donkey ember flame grape horse iron jelly knight leaf marble nickel
olive pebble quail rose sugar tulip vine wolf""".split()

GOOD = """excellent wonderful sturdy reliable superb delightful brilliant comfortable fantastic perfect
lovely great marvellous solid impressive charming amazing outstanding pleasant flawless beautiful splendid
handy elegant""".split()

BAD = """terrible awful flimsy useless broken dreadful disappointing uncomfortable horrible faulty poor ugly
shoddy weak annoying worthless defective unpleasant noisy cheap miserable clumsy rotten dull""".split()

PRAISE = """I love it.|I would buy it again.|It works every single day.|My family is very happy with
it.|Worth every penny.|I recommend it to everyone.|It exceeded my hopes.|It arrived early and in perfect
shape.|Best purchase of the year.|Five stars from me.|It makes me smile.|I could not be happier.|My friends
all want one now.|I use it with joy.|We are delighted with it.|Thank you for this gem.|A real pleasure to
own.|I am glad I chose this one.|It does everything I hoped for.|You will not regret it.|It made my day.|A
treasure in our house.|It was a very good choice.|I will keep it for years."""

BLAME = """I hate it.|I want my money back.|It stopped working after two days.|My family is very unhappy
with it.|A waste of money.|I warn everyone about it.|It fell short of my hopes.|It arrived late and in
pieces.|Worst purchase of the year.|One star from me.|It makes me angry.|I sent it back at once.|My friends
laugh at it.|I use it with dread.|We are let down by it.|Shame on the maker of this junk.|A real pain to
own.|I am sorry I chose this one.|It does nothing I hoped for.|You will regret it.|It ruined my day.|A
disgrace in our house.|It was a very bad choice.|I will throw it away soon."""

NEUTRAL = """I bought it last month.|It came in a brown box.|The parcel weighed two kilos.|I use it in the
kitchen.|It was a gift for my sister.|The shop is near my house.|I ordered it on a Monday.|It replaces an
older one.|There are three buttons on the side.|The manual has ten pages.|The post office is closed on
Sundays.|My brother has the same one in another colour.|I paid with a card.|It stands next to the door.|We
have three cats.|The weather was mild that day.|I read about it in a paper.|It has a label on the back.|My
uncle told me about the shop.|The box is still in the cellar.|We moved house in spring.|I live on the second
floor.|The delivery man rang twice.|It runs on two batteries."""


@dataclass(frozen=True, slots=True)
class Words:
    """One side of the split: the lists that training rows use, or those kept for held-out rows.

    What praise and blame sound like is a lexicon to be learnt, so both sides share `good` to `blame`; the `unseen`
    ones occur in no training row and are scored as a kind of their own.
    """

    names: tuple[str, ...]
    cities: tuple[str, ...]
    jobs: tuple[str, ...]
    items: tuple[str, ...]
    colours: tuple[str, ...]
    plain: tuple[str, ...]
    good: tuple[str, ...]
    bad: tuple[str, ...]
    praise: tuple[str, ...]
    blame: tuple[str, ...]
    unseen_good: tuple[str, ...]
    unseen_bad: tuple[str, ...]
    unseen_praise: tuple[str, ...]
    unseen_blame: tuple[str, ...]
    neutral: tuple[str, ...]
    held_out: bool


def split(held_out: bool) -> Words:
    """The lists of one side of the split."""

    def side(entries: list[str], held_out: bool = held_out) -> tuple[str, ...]:
        trained = [entry for place, entry in enumerate(entries) if place % 6 != 5]
        kept = [entry for entry in entries[5::6] if entry not in trained]
        return tuple(kept if held_out else trained)

    def sentences(text: str) -> list[str]:
        return text.replace("\n", " ").split("|")

    return Words(
        names=side(NAMES),
        cities=side(CITIES),
        jobs=side(JOBS),
        items=side(ITEMS),
        colours=side(COLOURS),
        plain=side(PLAIN),
        good=side(GOOD, False),
        unseen_good=side(GOOD, True),
        bad=side(BAD, False),
        unseen_bad=side(BAD, True),
        praise=side(sentences(PRAISE), False),
        unseen_praise=side(sentences(PRAISE), True),
        blame=side(sentences(BLAME), False),
        unseen_blame=side(sentences(BLAME), True),
        neutral=side(sentences(NEUTRAL)),
        held_out=held_out,
    )


def kept_out(key: str) -> bool:
    """Whether a generated thing (an invented word, a pair of numbers) belongs to the held-out side: one in six."""
    return zlib.crc32(key.encode()) % 6 == 0


def invent(rng: random.Random, held_out: bool) -> str:
    """A made-up word of two to four syllables from the asked side of the split."""
    while True:
        count = rng.choice((1, 2, 2, 3))
        word = "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(count))
        word += rng.choice(("n", "r", "s", "l", "t", "m", "x", "ck", "rd", "nd"))
        if kept_out(word) == held_out:
            return word
