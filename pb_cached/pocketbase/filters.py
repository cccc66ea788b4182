r"""`Where` translated into PocketBase filters that may let too much through, but never too little.

The predicate decides; the filter only narrows what is sent. It speaks of columns, which hold images of values
(see codec). A record whose `extra` is empty is *plain*: its columns are its document. For plain records nearly
every condition can be said exactly. For the others it is translated to what their images must satisfy:

* `$eq v`: the column equals v's image, or the column's default where it cannot hold v;
* `$gt`, `$gte`, `$lt`, `$lte`: beyond v's image, or equal to it where images may coincide;
* `$ne v`: unequal v's image, where only v itself has that image and it is not the default; else nothing.

Where the two differ, the filter says both, the second with `extra > ''`. What a filter's string cannot say (a
NUL; a last backslash, before 0.39.9) becomes the range around it.

`exact` is true where the filter lets through just those plain records that match.
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
from pb_cached.pocketbase.schema import IS_EXCEPTIONAL, Column, Kind


class Narrowing(Struct, frozen=True):
    """A filter text. Empty lets everything through; `None` lets nothing through."""

    text: str | None
    exact: bool = True
    expressions: int = 1
    alternatives: tuple[Narrowing, ...] = ()
    """The parts of an `$or` at the top, which can be asked for one after another."""


EVERYTHING: Final = Narrowing("", expressions=0)
UNKNOWN: Final = Narrowing("", exact=False, expressions=0)
NOTHING: Final = Narrowing(None, expressions=0)
EXCEPTIONAL: Final = Narrowing(IS_EXCEPTIONAL)
"""The records that are not plain."""
_SIGNS: Final = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}


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
        """Is there one filter for `where`, and are all plain records that it lets through matches?"""
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
        if name == "$in":
            return _or([self._equal(column, choice) for choice in value])
        if name == "$nin":
            return self._and([self._unequal(column, choice) for choice in value])
        if name == "$eq":
            return self._equal(column, value)
        if name == "$ne":
            return self._unequal(column, value)
        return self._ordered(column, _SIGNS[name], value)

    def _equal(self, column: Column | None, value: Any) -> Narrowing:
        if column is None:  # in a plain record it is missing
            return EXCEPTIONAL
        if column.kind is Kind.JSON:
            return self._equal_json(column, value)
        held, same = _image(column, value)
        weak = self._is(column, held)
        return weak if same else self._either(NOTHING, weak)

    def _equal_json(self, column: Column, value: Any) -> Narrowing:
        # Numbers have several texts (1, 1.0, true), and so have objects (order of keys).
        if not (value is None or isinstance(value, str)):
            return UNKNOWN
        # A document that is older than the column has the value in `extra`.
        return self._either(self._is(column, image(value, Kind.JSON)[0]), _compared(column, "=", "''"))

    def _unequal(self, column: Column | None, value: Any) -> Narrowing:
        if column is None:
            return EVERYTHING
        if column.kind is Kind.JSON:
            if not (value is None or isinstance(value, str)):
                return UNKNOWN
            held, alone = image(value, Kind.JSON)[0], True
        else:
            held, same = _image(column, value)
            if not same:  # what no plain record can hold, each is unequal to
                return EVERYTHING
            alone = is_unshared(held, column.kind)
        operand = self._operand(held)
        if operand is None:
            return UNKNOWN
        plain = _compared(column, "!=", operand)
        return plain if alone else self._either(plain, EVERYTHING)

    def _ordered(self, column: Column | None, sign: str, value: Any) -> Narrowing:
        if column is None:
            return EXCEPTIONAL
        if column.kind not in (Kind.TEXT, Kind.NUMBER):
            return UNKNOWN
        if not isinstance(value, str if column.kind is Kind.TEXT else int | float):
            # What can be compared with it, if anything, the column cannot hold.
            return self._either(NOTHING, self._is(column, column.kind.default))
        if column.kind is Kind.NUMBER and not _is_finite(value):
            return UNKNOWN
        held = image(value, column.kind)[0]
        operand = self._operand(held)
        if held == value and operand is not None:
            plain = _compared(column, sign, operand)
            return (
                self._either(plain, _compared(column, sign[0] + "=", operand)) if _may_be_rounded(held) else plain
            )
        if isinstance(held, str):
            below, above = _sayable(held, self._dialect.escapes)
            operand = self.quoted(below if sign[0] == ">" else above)
        return _compared(column, sign[0] + "=", operand, exact=False) if operand is not None else UNKNOWN

    def _either(self, plain: Narrowing, weak: Narrowing) -> Narrowing:
        """Of plain records the ones, of exceptional records the others."""
        exceptional = _joined([weak, EXCEPTIONAL], exact=True) if weak.text else EXCEPTIONAL
        return _or((plain, exceptional)) if plain != weak else plain

    def _is(self, column: Column, held: Json) -> Narrowing:
        """The column holds this; where a filter cannot say it, its neighbours too."""
        operand = self._operand(held)
        if operand is not None:
            return _compared(column, "=", operand)
        below, above = _sayable(held, self._dialect.escapes)
        low, high = self.quoted(below), self.quoted(above)
        if low is None or high is None:
            return UNKNOWN
        return Narrowing(f"({column.name} >= {low} && {column.name} <= {high})", exact=False, expressions=2)

    def holding(self, column: Column, text: str) -> str:
        """The records whose column holds just this text, which of a JSON column is JSON; where a filter cannot say
        it, its neighbours too."""
        return self._is(column, text).text or ""

    def beyond(self, column: Column, text: str) -> str:
        """The records whose column holds a greater text; where a filter cannot say the text, one greater than all
        its neighbours."""
        quoted = self.quoted(text)
        if quoted is not None:
            return f"{column.name} > {quoted}"
        return f"{column.name} >= {self.quoted(_sayable(text, self._dialect.escapes)[1])}"

    def _operand(self, held: Json) -> str | None:
        """What a column holds, as a filter says it."""
        return self.quoted(held) if isinstance(held, str) else _number(held)

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
    if unbounded := [part for part in possible if not part.text]:
        return EVERYTHING if any(part.exact for part in unbounded) else UNKNOWN
    exact = all(part.exact for part in possible)
    # Said once, however many parts have it in common.
    alternatives = {each.text or "": each for part in possible for each in part.alternatives or (part,)}
    said = tuple(alternatives.values())
    if len(said) == 1:
        return _joined(said, exact)
    return Narrowing("(" + " || ".join(alternatives) + ")", exact, sum(each.expressions for each in said), said)


def _joined(parts: Sequence[Narrowing], exact: bool) -> Narrowing:
    if len(parts) == 1:
        return Narrowing(parts[0].text, exact, parts[0].expressions, parts[0].alternatives)
    return Narrowing(
        "(" + " && ".join(part.text or "" for part in parts) + ")", exact, sum(part.expressions for part in parts)
    )


def _compared(column: Column, sign: str, operand: str, *, exact: bool = True) -> Narrowing:
    return Narrowing(f"{column.name} {sign} {operand}", exact)


def _number(held: Json) -> str:
    if isinstance(held, bool):
        return "true" if held else "false"
    return format(Decimal(repr(held)), "f")  # filters know no exponents


def _is_finite(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _image(column: Column, value: Any) -> tuple[Json, bool]:
    """The image that values equal to a filter's have, and whether a plain record can hold one of them."""
    if column.kind is Kind.TEXT:
        held = image(value, Kind.TEXT)[0]
        return held, isinstance(value, str) and held == value
    if not _is_finite(value):
        return column.kind.default, False
    held = image(value, column.kind)[0]
    return held, bool(held == value)


def is_unshared(held: Json, kind: Kind) -> bool:
    """Does just one value have this image? The default stands for whatever a column cannot hold."""
    return bool(held != kind.default) and not _may_be_rounded(held)


def _may_be_rounded(held: Json) -> bool:
    """Is it the image of several strings, or of several numbers?"""
    return "\ue000" in held if isinstance(held, str) else abs(held) >= SAFE_INTEGER


def _sayable(text: str, escapes: bool) -> tuple[str, str]:
    """The nearest strings at or below, and above, that a filter can say."""
    cut = text.find("\x00")
    head = text if cut < 0 else text[:cut]
    ceiling = head + "\x01" if cut >= 0 else head
    if not escapes and head.endswith("\\"):
        head = head.rstrip("\\")
        ceiling = head + "]"  # the character after the backslash
    return head, ceiling
