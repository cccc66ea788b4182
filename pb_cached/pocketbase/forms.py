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

    def insert(self, record_id: str, columns: Mapping[str, Json]) -> Json: ...

    def update(self, record_id: str, rev: int, columns: Mapping[str, Json]) -> Json: ...

    def delete(self, record_id: str, rev: int) -> Json: ...


class RecordForm:
    """Objects, as PocketBase's own records are: for requests that name one record each."""

    layout: Final = ""

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

    def insert(self, record_id: str, columns: Mapping[str, Json]) -> Json:
        return [record_id, *map(columns.get, self._order)]

    def update(self, record_id: str, rev: int, columns: Mapping[str, Json]) -> Json:
        named = [columns.get(name) for name in self._order]
        while named and named[-1] is None:
            named.pop()
        return [record_id, rev, *named]

    def delete(self, record_id: str, rev: int) -> Json:
        return [record_id, rev]


def commit_layout(log: str, collection: str, columns: Sequence[Column]) -> CommitLayout:
    """How commits order a collection's columns."""
    slots = [Slot(column.name, _DEFAULTS.get(column.kind, "''")) for column in columns]
    return CommitLayout(log, collection, (*slots, Slot("extra", "''")))
