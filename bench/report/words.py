"""Numbers as a reader sees them, the same in the terminal, on the page and in the pictures."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from typing import Final

NOTHING: Final = "-"
"""Stands where nothing was measured."""


def number(value: float) -> str:
    """Three digits that count, thousands apart."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    rounded = float(f"{value:.2e}")
    digits = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{value:,.{digits}f}"


def median(values: Sequence[float]) -> str:
    return number(statistics.median(values)) if values else NOTHING


def spread(values: Sequence[float]) -> str:
    """The median, and the lowest and the highest of all where there are several."""
    if len(values) < 2:
        return median(values)
    return f"{median(values)} ({number(min(values))} to {number(max(values))})"


def duration(milliseconds: float) -> str:
    """In the unit that keeps it short."""
    if milliseconds < 1:
        return f"{number(milliseconds * 1000)} µs"
    if milliseconds < 1000:
        return f"{number(milliseconds)} ms"
    return f"{number(milliseconds / 1000)} s"


def megabytes(count: float) -> str:
    return f"{number(count / 1e6)} MB"


def change(before: float, after: float) -> str:
    """In percent, or as a factor where a percentage would be hard to read."""
    if before == after:
        return "0 %"
    if before <= 0 or after <= 0:
        return NOTHING
    ratio = after / before
    return f"{ratio:.3g}x" if ratio >= 3 or ratio <= 1 / 3 else f"{100 * (ratio - 1):+.1f} %"


def several(count: int, what: str) -> str:
    """So many of something whose plural ends in s."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def slug(text: str) -> str:
    """As part of a file's name or of an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"
