"""Numbers as people read them. It must not know what is counted."""

from __future__ import annotations

import math


def count(number: float) -> str:
    """1234567 as 1,234,567."""
    return f"{number:,.0f}"


def percent(part: float, whole: float) -> str:
    """A share with one digit below ten percent; "0 %" of nothing."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.1f} %" if 0 < share < 10 else f"{share:.0f} %"


def size(number: float) -> str:
    """Bytes in powers of 1,000: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.0f} {unit}" if unit == "B" or number >= 99.5 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def duration(seconds: float) -> str:
    """A span of time in its two largest units; "?" for one that nobody knows."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    for unit, below, length in (("d", "h", 86400), ("h", "min", 3600), ("min", "s", 60)):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length * (24 if unit == 'd' else 60) // length} {below}"
    return f"{whole} s"
