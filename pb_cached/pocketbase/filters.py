r"""`Where` translated into PocketBase filters that may let too much through, but never too little.

The predicate decides; the filter only narrows what is sent. It speaks of columns, which hold images of values
(see codec), so each condition is translated to what its documents' images must satisfy:

* `$eq v`: the column equals v's image, or the column's default where it cannot hold v;
* `$gt`, `$gte`, `$lt`, `$lte`: at least, or at most, v's image: never strictly, as images may coincide;
* `$ne v`: unequal v's image, where only v itself has that image and it is not the default; else nothing;
* what a filter's string cannot say (a NUL; a last backslash, before 0.39.9) becomes the range around it.

`exact` is true where the filter lets through just the documents that match, so that PocketBase may count them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

from msgspec import Struct

from pb_cached.exact import Json
from pb_cached.pocketbase.codec import SAFE_INTEGER, image
from pb_cached.pocketbase.dialect import Dialect
from pb_cached.pocketbase.schema import Column, Kind


class Narrowing(Struct, frozen=True):
    """A filter text. Empty lets everything through; `None` lets nothing through."""

    text: str | None
    exact: bool
    expressions: int = 1
    alternatives: tuple[Narrowing, ...] = ()
    """The parts of an `$or` at the top, which can be asked for one after another."""


EVERYTHING: Final = Narrowing("", exact=True, expressions=0)
UNKNOWN: Final = Narrowing("", exact=False, expressions=0)
NOTHING: Final = Narrowing(None, exact=True, expressions=0)


class FilterWriter:
    """Writes filters over the columns of one collection in the dialect of one PocketBase. Immutable."""

    def __init__(self, columns: Mapping[str, Column], dialect: Dialect) -> None:
        self._columns = columns
        self._dialect = dialect

    def narrow(self, where: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Filters that together let every match through: several where one would be too long. None: no match
        is possible. `("",)`: everything must be looked at."""
        narrowing = self._where(where)
        if narrowing.text is None:
            return None
        if self._fits(narrowing):
            return (narrowing.text,)
        return self._packed(narrowing.alternatives) or ("",)

    def is_exact(self, where: Mapping[str, Any]) -> bool:
        """Does the one filter for `where` let through its matches and no other document?"""
        narrowing = self._where(where)
        return narrowing.exact and self._fits(narrowing)

    def _fits(self, narrowing: Narrowing) -> bool:
        return (
            len((narrowing.text or "").encode()) <= self._dialect.filter_bytes
            and narrowing.expressions <= self._dialect.filter_expressions
        )

    def _packed(self, alternatives: Sequence[Narrowing]) -> tuple[str, ...]:
        """As many alternatives to a filter as fit; empty where one alone is too long."""
        filters: list[str] = []
        current = NOTHING
        for alternative in alternatives:
            if not self._fits(alternative):
                return ()
            joined = _or((current, alternative))
            if not self._fits(joined):
                filters.append(current.text or "")
                joined = alternative
            current = joined
        return (*filters, current.text or "")

    def _where(self, where: Mapping[str, Any]) -> Narrowing:
        parts: list[Narrowing] = []
        for key, condition in where.items():
            if key == "$and":
                parts += [self._where(part) for part in condition]
            elif key == "$or":
                parts.append(_or([self._where(part) for part in condition]))
            else:
                parts += [self._condition(key, name, value) for name, value in condition.items()]
        return self._and(parts)

    def _and(self, parts: Sequence[Narrowing]) -> Narrowing:
        if any(part.text is None for part in parts):
            return NOTHING
        said = [part for part in parts if part.text]
        exact = all(part.exact for part in parts)
        if len(said) == 1:
            return Narrowing(said[0].text, exact, said[0].expressions, said[0].alternatives)
        kept: list[Narrowing] = []
        for part in sorted(said, key=lambda part: part.expressions):
            joined = _joined([*kept, part], exact)
            if self._fits(joined):
                kept.append(part)
            else:
                exact = False  # left unsaid: the predicate decides
        return _joined(kept, exact) if kept else UNKNOWN if said else Narrowing("", exact, 0)

    def _condition(self, field: str, name: str, value: Any) -> Narrowing:
        column = self._columns.get(field)
        if column is None:  # its values are in `extra`
            return UNKNOWN
        if name == "$in":
            return _or([self._equal(column, choice) for choice in value])
        if name == "$nin":
            return self._and([self._unequal(column, choice) for choice in value]) if value else EVERYTHING
        if name == "$eq":
            return self._equal(column, value)
        if name == "$ne":
            return self._unequal(column, value)
        return self._ordered(column, ">=" if name in ("$gt", "$gte") else "<=", value, name in ("$gte", "$lte"))

    def _equal(self, column: Column, value: Any) -> Narrowing:
        if column.kind is Kind.JSON:
            # Numbers have several texts (1, 1.0, true), and so have objects (order of keys).
            if not (value is None or isinstance(value, str)):
                return UNKNOWN
            return self._text(column, image(value, Kind.JSON)[0], exact=True)
        if column.kind is Kind.BOOL:
            return (
                _compared(column, "=", _number(bool(value)), exact=value in (True,)) if _is_bit(value) else UNKNOWN
            )
        held, same = self._image(column, value)
        exact = same and is_unshared(held, column.kind)
        if column.kind is Kind.TEXT:
            return self._text(column, held, exact=exact)
        return _compared(column, "=", _number(held), exact=exact)

    def _unequal(self, column: Column, value: Any) -> Narrowing:
        if column.kind is Kind.BOOL:
            return _compared(column, "!=", "true", exact=True) if value in (True,) else UNKNOWN
        held, same = self._image(column, value)
        if column.kind is Kind.JSON or not same or not is_unshared(held, column.kind):
            return UNKNOWN
        if column.kind is Kind.NUMBER:
            return _compared(column, "!=", _number(held), exact=True)
        quoted = self.quoted(held)
        return _compared(column, "!=", quoted, exact=True) if quoted else UNKNOWN

    def _ordered(self, column: Column, sign: str, value: Any, inclusive: bool) -> Narrowing:
        if column.kind is Kind.TEXT and isinstance(value, str):
            held = image(value, Kind.TEXT)[0]
            below, above = _sayable(held, self._dialect.escapes)
            quoted = self.quoted(below if sign == ">=" else above)
            clean = inclusive and below == held and quoted is not None
            # The default may stand for a value that cannot be compared at all.
            exact = clean and sign == ">=" and held != "" and not _touches_surrogates(held)
            return _compared(column, sign, quoted, exact=exact) if quoted else UNKNOWN
        if column.kind is Kind.NUMBER and _is_finite(value):
            held = image(value, Kind.NUMBER)[0]
            in_doubt = not inclusive or abs(held) >= SAFE_INTEGER or (held <= 0 if sign == ">=" else held >= 0)
            return _compared(column, sign, _number(held), exact=not in_doubt)
        return UNKNOWN

    def _image(self, column: Column, value: Any) -> tuple[Json, bool]:
        """The image of a filter's value, and whether every value with this image equals it."""
        if column.kind is Kind.JSON or (column.kind is Kind.NUMBER and not _is_finite(value)):
            return column.kind.default, False
        held, _ = image(value, column.kind)
        fits = isinstance(value, str) if column.kind is Kind.TEXT else isinstance(value, int | float)
        return held, fits and held == value

    def _text(self, column: Column, held: str, *, exact: bool) -> Narrowing:
        quoted = self.quoted(held)
        if quoted is not None:
            return _compared(column, "=", quoted, exact=exact)
        below, above = _sayable(held, self._dialect.escapes)
        low, high = self.quoted(below), self.quoted(above)
        if low is None or high is None:
            return UNKNOWN
        return Narrowing(f"({column.name} >= {low} && {column.name} <= {high})", exact=False, expressions=2)

    def holding(self, column: Column, text: str) -> str:
        """The records whose text column holds just this; where a filter cannot say it, its neighbours too."""
        return self._text(column, text, exact=True).text or ""

    def beyond(self, column: Column, text: str) -> str:
        """The records whose text column holds something greater; where a filter cannot say the text, something
        greater than all its neighbours."""
        quoted = self.quoted(text)
        if quoted is not None:
            return f"{column.name} > {quoted}"
        return f"{column.name} >= {self.quoted(_sayable(text, self._dialect.escapes)[1])}"

    def quoted(self, text: str) -> str | None:
        """The string as a filter says it, or None where it cannot."""
        if "\x00" in text or (not self._dialect.escapes and text.endswith("\\")):
            return None
        if self._dialect.escapes:
            text = text.replace("\\", "\\\\")
        return "'" + text.replace("'", "\\'") + "'"


def _or(parts: Sequence[Narrowing]) -> Narrowing:
    possible = [part for part in parts if part.text is not None]
    if not possible:
        return NOTHING
    exact = all(part.exact for part in possible)
    if unbounded := [part for part in possible if not part.text]:
        return EVERYTHING if any(part.exact for part in unbounded) else UNKNOWN
    if len(possible) == 1:
        return possible[0]
    return Narrowing(
        "(" + " || ".join(part.text or "" for part in possible) + ")",
        exact,
        sum(part.expressions for part in possible),
        tuple(possible),
    )


def _joined(parts: Sequence[Narrowing], exact: bool) -> Narrowing:
    if len(parts) == 1:
        return Narrowing(parts[0].text, exact, parts[0].expressions, parts[0].alternatives)
    return Narrowing(
        "(" + " && ".join(part.text or "" for part in parts) + ")", exact, sum(part.expressions for part in parts)
    )


def _compared(column: Column, sign: str, operand: str, *, exact: bool) -> Narrowing:
    return Narrowing(f"{column.name} {sign} {operand}", exact)


def _number(held: Json) -> str:
    if isinstance(held, bool):
        return "true" if held else "false"
    return format(Decimal(repr(held)), "f")  # filters know no exponents


def _is_finite(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _is_bit(value: Any) -> bool:
    return isinstance(value, int | float) and value in (0, 1)


def is_unshared(held: Json, kind: Kind) -> bool:
    """Does just one value have this image? The default stands for whatever a column cannot hold."""
    if kind is Kind.TEXT:
        return held != "" and not _touches_surrogates(held)
    return bool(held != 0 and abs(held) < SAFE_INTEGER)


def _touches_surrogates(held: str) -> bool:
    return "\ue000" in held


def _sayable(text: str, escapes: bool) -> tuple[str, str]:
    """The nearest strings at or below, and above, that a filter can say."""
    cut = text.find("\x00")
    head = text if cut < 0 else text[:cut]
    ceiling = head + "\x01" if cut >= 0 else head
    if not escapes and head.endswith("\\"):
        head = head.rstrip("\\")
        ceiling = head + "]"  # the character after the backslash
    return head, ceiling
