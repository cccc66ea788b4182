"""The form in which a commit path takes the columns of an operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from pb_cached.exact import Json
from pb_cached.pocketbase.commit.triggers import CommitLayout, Slot
from pb_cached.pocketbase.schema import Column, Kind

_DEFAULTS: Final[Mapping[Kind, str]] = {Kind.NUMBER: "0", Kind.BOOL: "FALSE"}


class Form(Protocol):
    """Makes what stands in an operation's body. Columns are by name."""

    @property
    def layout(self) -> str:
        """What the commit path knows the order of the columns by; empty where they go by their names."""
        ...

    def may_leave_open(self, column: str) -> bool:
        """May an insert leave the number in this column to PocketBase? See `Slot.within`."""
        ...

    def insert(self, record_id: str, columns: Mapping[str, Json]) -> Json: ...

    def update(self, record_id: str, rev: int, columns: Mapping[str, Json]) -> Json: ...

    def delete(self, record_id: str, rev: int) -> Json: ...


class RecordForm:
    """Objects, as PocketBase's own records are: for requests that name one record each."""

    layout: Final = ""

    def may_leave_open(self, column: str) -> bool:
        return False

    def insert(self, record_id: str, columns: Mapping[str, Json]) -> Json:
        return {"id": record_id, **columns, "rev": 1}

    def update(self, record_id: str, rev: int, columns: Mapping[str, Json]) -> Json:
        return {**columns, "rev+": 1}

    def delete(self, record_id: str, rev: int) -> Json:
        return None


class ArrayForm:
    """Arrays, as the log path's triggers take them: half the bytes, and no names to look for."""

    def __init__(self, commit_layout: CommitLayout) -> None:
        self.layout = commit_layout.key
        self._order = [slot.column for slot in commit_layout.slots]
        self._numbered = {slot.column for slot in commit_layout.slots if slot.within is not None}

    def insert(self, record_id: str, columns: Mapping[str, Json]) -> Json:
        return [record_id, *map(columns.get, self._order)]

    def may_leave_open(self, column: str) -> bool:
        return column in self._numbered

    def update(self, record_id: str, rev: int, columns: Mapping[str, Json]) -> Json:
        named = [columns.get(name) for name in self._order]
        while named and named[-1] is None:
            named.pop()
        return [record_id, rev, *named]

    def delete(self, record_id: str, rev: int) -> Json:
        return [record_id, rev]


def commit_layout(
    log: str, collection: str, columns: Sequence[Column], sequence: str | None = None, within: Sequence[str] = ()
) -> CommitLayout:
    """How commits order a collection's columns.

    Args:
        sequence: the field that numbers the documents which have the same values in the fields `within`, if any.
    """
    of = {column.field: column for column in columns}
    numbered = of.get(sequence or "")
    groups = [of[field] for field in within]
    # Only what columns hold exactly can be counted by what they hold.
    is_countable = (
        numbered is not None and numbered.kind is Kind.NUMBER and all(c.kind is Kind.TEXT for c in groups)
    )
    slots = [
        Slot(
            column.name,
            _DEFAULTS.get(column.kind, "''"),
            tuple(group.name for group in groups) if is_countable and column is numbered else None,
        )
        for column in columns
    ]
    return CommitLayout(log, collection, (*slots, Slot("extra", "''")))
