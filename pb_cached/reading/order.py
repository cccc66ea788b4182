"""The orders that documents are found in (facts: parlant, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from parlant.core.persistence.common import SortDirection
from parlant.core.persistence.document_database import CollectionSort

from pb_cached.exact import Json

Position = tuple[str, str]


def position(document: Mapping[str, Json]) -> Position:
    """`find` returns documents by `creation_utc`, then `id`. What has no time, or another thing than a text in its
    place, comes first."""
    time = document.get("creation_utc")
    return time if isinstance(time, str) else "", str(document.get("id") or "")


def is_beyond(at: Position, descending: bool) -> Callable[[Mapping[str, Json]], bool]:
    """Which documents come after this position."""
    if descending:
        return lambda document: position(document) < at
    return lambda document: position(document) > at


def beyond(filters: Mapping[str, Any], at: Position, descending: bool) -> dict[str, Any]:
    """The filter, and after this position, for records whose column tells their time. Said so that an index on
    `creation_utc` serves as a range; no comparison of values finds what has no time, but its column is empty."""
    strictly, within = ("$lt", "$lte") if descending else ("$gt", "$gte")
    time, id_ = at
    if not time and not descending:
        return {"$and": [filters, {"$or": [{"creation_utc": {"$gt": ""}}, {"id": {"$gt": id_}}]}]}
    return {
        "$and": [
            filters,
            {"creation_utc": {within: time}},
            {"$or": [{"creation_utc": {strictly: time}}, {"id": {strictly: id_}}]},
        ]
    }


def sort_documents(documents: list[dict[str, Json]], sort: CollectionSort) -> None:
    """In place, and stable: what is equal stays as it was."""
    for field, direction in reversed(sort):
        documents.sort(key=partial(_sort_key, field), reverse=direction == SortDirection.DESC)


def first_of(documents: Sequence[dict[str, Json]], sort: CollectionSort) -> dict[str, Json] | None:
    """The first in the order of `sort`; of equal ones, the first given."""
    ordered = list(documents)
    sort_documents(ordered, sort)
    return ordered[0] if ordered else None


def _sort_key(field: str, document: Mapping[str, Json]) -> tuple[int, Any]:
    """Missing and None first, then numbers, strings, and everything else by its text."""
    value = document.get(field)
    if value is None:
        return 0, 0
    if isinstance(value, int | float):
        return 1, value
    return (2, value) if isinstance(value, str) else (3, str(value))
