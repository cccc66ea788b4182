"""The orders that documents are found in (facts: parlant, section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

from parlant.core.persistence.common import Cursor, SortDirection, Where
from parlant.core.persistence.document_database import CollectionSort

from pb_cached.exact import Json


def position(document: Mapping[str, Json]) -> tuple[str, str]:
    """`find` returns documents by `creation_utc`, then `id`."""
    return str(document.get("creation_utc") or ""), str(document.get("id") or "")


def after(filters: Where, cursor: Cursor | None, descending: bool) -> dict[str, Any]:
    """The filter, and beyond the cursor. Said so that an index on `creation_utc` serves as a range."""
    if cursor is None:
        return cast(dict[str, Any], filters)
    strictly, within = ("$lt", "$lte") if descending else ("$gt", "$gte")
    at, id_ = str(cursor.creation_utc), str(cursor.id)
    if not at and not descending:  # what has no time comes first, and no comparison of times finds it
        return {"$and": [filters, {"$or": [{"creation_utc": {"$gt": ""}}, {"id": {"$gt": id_}}]}]}
    return {
        "$and": [
            filters,
            {"creation_utc": {within: at}},
            {"$or": [{"creation_utc": {strictly: at}}, {"id": {strictly: id_}}]},
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
