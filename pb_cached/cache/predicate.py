"""`Where` compiled once into a closure: the one judge of whether a document matches.

Semantics are those of Parlant's in-memory database, with its crashes made answers: a missing field matches
nothing but `$ne` and `$nin`, values that cannot be compared do not match, and a condition beside `$and` or
`$or` counts (facts: parlant, section 5).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from pb_cached.errors import InvalidFilter

Predicate = Callable[[Mapping[str, Any]], bool]
Test = Callable[[Any], bool]


class _Missing:
    def __repr__(self) -> str:
        return "<missing>"


_MISSING: Final = _Missing()

_ORDERED: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}
OPERATORS: Final = ("$eq", "$ne", *_ORDERED, "$in", "$nin", "$and", "$or")


def compile_where(where: Mapping[str, Any]) -> Predicate:
    """A function that tells whether a document matches.

    Raises:
        InvalidFilter: an unknown operator, or a filter that is not of `Where`'s form; names the field.
    """
    parts = tuple(part for key, condition in _items(where) for part in _compiled(key, condition))
    if not parts:
        return _everything
    return parts[0] if len(parts) == 1 else _all_of(parts)


def _everything(_document: Mapping[str, Any]) -> bool:
    return True


def _items(where: Any) -> Sequence[tuple[str, Any]]:
    if not isinstance(where, Mapping):
        raise InvalidFilter(f"a filter must be a mapping such as {{'id': {{'$eq': ...}}}}, not {where!r:.60}")
    return tuple(where.items())


def _compiled(key: str, condition: Any) -> Sequence[Predicate]:
    if key in ("$and", "$or"):
        if not isinstance(condition, Sequence) or isinstance(condition, str):
            raise InvalidFilter(f"{key} must be a list of filters, not {condition!r:.60}")
        parts = tuple(compile_where(part) for part in condition)
        return (_all_of(parts) if key == "$and" else _any_of(parts),)
    if key.startswith("$"):
        raise InvalidFilter(f"unknown operator '{key}'; expected one of {', '.join(OPERATORS)}")
    if not isinstance(condition, Mapping):
        raise InvalidFilter(f"field '{key}': expected an operator such as {{'$eq': value}}, got {condition!r:.60}")
    return tuple(_on_field(key, _test(key, name, value)) for name, value in condition.items())


def _test(field: str, name: str, value: Any) -> Test:
    if name == "$eq":
        return lambda held: held is not _MISSING and bool(held == value)
    if name == "$ne":
        return lambda held: held is _MISSING or bool(held != value)
    if name in ("$in", "$nin"):
        if not isinstance(value, Sequence | set | frozenset) or isinstance(value, str | bytes):
            raise InvalidFilter(f"field '{field}': {name} needs a list, not {value!r:.60}")
        choices = tuple(value)
        if name == "$in":
            return lambda held: held is not _MISSING and any(held == choice for choice in choices)
        return lambda held: held is _MISSING or not any(held == choice for choice in choices)
    if name in _ORDERED:
        return _ordered(_ORDERED[name], value)
    raise InvalidFilter(f"field '{field}': unknown operator '{name}'; expected one of {', '.join(OPERATORS)}")


def _ordered(compare: Callable[[Any, Any], bool], value: Any) -> Test:
    def test(held: Any) -> bool:
        try:
            return held is not _MISSING and bool(compare(held, value))
        except TypeError:  # a string and a number, or None and anything
            return False

    return test


def _on_field(field: str, test: Test) -> Predicate:
    return lambda document: test(document.get(field, _MISSING))


def _all_of(parts: Sequence[Predicate]) -> Predicate:
    return lambda document: all(part(document) for part in parts)


def _any_of(parts: Sequence[Predicate]) -> Predicate:
    return lambda document: any(part(document) for part in parts)
