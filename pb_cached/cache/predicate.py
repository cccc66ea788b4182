"""`Where` compiled once into a closure: the one judge of whether a document matches.

Semantics are those of Parlant's in-memory database, with its crashes made answers: a missing field matches
nothing but `$ne` and `$nin`, values that cannot be compared do not match, and a condition beside `$and` or
`$or` counts (facts: parlant, section 5).

Compiling is a part of every read, so it is kept short: one closure for each condition, and one that joins them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from pb_cached.errors import InvalidFilter

Predicate = Callable[[Mapping[str, Any]], bool]


class _Missing:
    def __repr__(self) -> str:
        return "<missing>"


_MISSING: Final = _Missing()


def compile_where(where: Mapping[str, Any]) -> Predicate:
    """A function that tells whether a document matches.

    Raises:
        InvalidFilter: an unknown operator, or a filter that is not of `Where`'s form; names the field.
    """
    if not isinstance(where, dict | Mapping):
        raise InvalidFilter(f"a filter must be a mapping such as {{'id': {{'$eq': ...}}}}, not {where!r:.60}")
    parts: list[Predicate] = []
    for key, condition in where.items():
        if key in ("$and", "$or"):
            if not isinstance(condition, Sequence) or isinstance(condition, str):
                raise InvalidFilter(f"{key} must be a list of filters, not {condition!r:.60}")
            join = _all_of if key == "$and" else _any_of
            parts.append(join([compile_where(part) for part in condition]))
            continue
        if not isinstance(key, str):
            raise InvalidFilter(f"a field's name must be a string, not {key!r:.60}")
        if key.startswith("$"):
            raise InvalidFilter(f"unknown operator '{key}'; expected one of {', '.join(OPERATORS)}")
        if not isinstance(condition, dict | Mapping):
            raise InvalidFilter(
                f"field '{key}': expected an operator such as {{'$eq': value}}, got {condition!r:.60}"
            )
        for name, value in condition.items():
            make = _CONDITIONS.get(name)
            if make is None:
                raise InvalidFilter(
                    f"field '{key}': unknown operator '{name}'; expected one of {', '.join(OPERATORS)}"
                )
            parts.append(make(key, value))
    return parts[0] if len(parts) == 1 else _all_of(parts)


def _all_of(parts: list[Predicate]) -> Predicate:
    if len(parts) == 2:
        one, other = parts
        return lambda document: one(document) and other(document)
    if len(parts) == 3:
        first, second, third = parts
        return lambda document: first(document) and second(document) and third(document)

    def test(document: Mapping[str, Any]) -> bool:
        for part in parts:  # noqa: SIM110 - a generator costs more than what it asks
            if not part(document):
                return False
        return True

    return test


def _any_of(parts: list[Predicate]) -> Predicate:
    def test(document: Mapping[str, Any]) -> bool:
        for part in parts:  # noqa: SIM110
            if part(document):
                return True
        return False

    return test


# --- conditions on a field: what is missing equals nothing -------------------------------------------------


def _equal(field: str, value: Any) -> Predicate:
    return lambda document: bool(document.get(field, _MISSING) == value)


def _unequal(field: str, value: Any) -> Predicate:
    return lambda document: bool(document.get(field, _MISSING) != value)


def _within(field: str, value: Any) -> Predicate:
    choices = _choices(field, "$in", value)
    return lambda document: document.get(field, _MISSING) in choices


def _without(field: str, value: Any) -> Predicate:
    choices = _choices(field, "$nin", value)
    return lambda document: document.get(field, _MISSING) not in choices


def _choices(field: str, name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Sequence | set | frozenset) or isinstance(value, str | bytes):
        raise InvalidFilter(f"field '{field}': {name} needs a list, not {value!r:.60}")
    return tuple(value)


def _ordered(compare: Callable[[Any, Any], Any]) -> Callable[[str, Any], Predicate]:
    def condition(field: str, value: Any) -> Predicate:
        def test(document: Mapping[str, Any]) -> bool:
            held = document.get(field, _MISSING)
            try:
                return held is not _MISSING and bool(compare(held, value))
            except TypeError:  # a string and a number, or None and anything
                return False

        return test

    return condition


_CONDITIONS: Final[Mapping[str, Callable[[str, Any], Predicate]]] = {
    "$eq": _equal,
    "$ne": _unequal,
    "$gt": _ordered(operator.gt),
    "$gte": _ordered(operator.ge),
    "$lt": _ordered(operator.lt),
    "$lte": _ordered(operator.le),
    "$in": _within,
    "$nin": _without,
}
OPERATORS: Final = (*_CONDITIONS, "$and", "$or")
