"""What a time costs in money and energy, where somebody says what an hour takes. It must not know whose time it is."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from shoal.core.errors import UsageError

Range = tuple[float, float]


class Bill(msgspec.Struct, frozen=True):
    """What a time comes to, from the least to the most; None where nobody gave a price or a power."""

    cost: Range | None = None
    tokens: Range | None = None  # by the prices of a server, no discount for what its cache had
    kilowatt_hours: Range | None = None


def check_rates(price: float | None, watts: float | None) -> None:
    """Refuse what no hour can cost, and no machine take."""
    for name, value in (("--price-per-hour", price), ("--watts", watts)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{name} is {value}: give a number that is not negative")


class Prices(msgspec.Struct, frozen=True):
    """What a million tokens cost at a server."""

    prompt: float
    output: float

    def cost(self, prompt: Range, output: Range) -> Range:
        """Of so many tokens, from the least to the most."""
        low, high = ((p * self.prompt + o * self.output) / 1e6 for p, o in zip(prompt, output, strict=True))
        return low, high


def parse_prices(text: str | None) -> Prices | None:
    """From "0.15,0.60"; a UsageError for anything else."""
    if text is None:
        return None
    try:
        prompt, output = map(float, text.split(","))
    except ValueError:
        prompt = output = -1.0
    if not (math.isfinite(prompt + output) and prompt >= 0 and output >= 0):
        raise UsageError(f"--price-per-million {text!r} is not two prices: write 0.15,0.60 for prompts and answers")
    return Prices(prompt, output)


def bill(low: float, high: float, price: float | None, watts: float | None) -> Bill:
    """The bill of low to high seconds on a machine with this price of an hour and this power."""
    hours = low / 3600, high / 3600
    cost = None if price is None else (hours[0] * price, hours[1] * price)
    energy = None if watts is None else (hours[0] * watts / 1000, hours[1] * watts / 1000)
    return Bill(cost, None, energy)


def bill_words(found: Bill) -> Iterator[tuple[str, str]]:
    """Names and numbers of what is known."""
    if found.cost is not None:
        yield "cost", f"{_span(found.cost, '.4g')}, in the currency of --price-per-hour"
    if found.tokens is not None:
        yield "tokens' cost", f"{_span(found.tokens, '.4g')}, in the currency of --price-per-million"
    if found.kilowatt_hours is not None:
        yield "energy", f"{_span(found.kilowatt_hours, '.3g')} kWh"


def _span(found: Range, form: str) -> str:
    low, high = (format(number, form) for number in found)
    return low if low == high else f"{low} to {high}"
