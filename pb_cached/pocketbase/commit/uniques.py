"""Which operations a unique index stands against, where PocketBase has refused a commit without saying so."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from pb_cached.errors import UniqueViolation
from pb_cached.pocketbase.client import PocketBaseClient
from pb_cached.pocketbase.commit.interface import Operation, Refusal
from pb_cached.pocketbase.commit.triggers import CommitLayout
from pb_cached.pocketbase.sql import MOST_CHARACTERS, Sql, joined

_UNIQUE: Final = re.compile(r"CREATE\s+UNIQUE\s+INDEX\b.*\((?P<columns>[^()]*)\)\s*\Z", re.IGNORECASE | re.DOTALL)
_COLUMN: Final = re.compile(r"[`\"\[]?(?P<name>\w+)[`\"\]]?(?:\s+(?:ASC|DESC))?\Z", re.IGNORECASE)

Key = tuple[Any, ...]
Columns = tuple[str, ...]


class _Collection(Struct):
    indexes: list[str] = []


async def violations(
    client: PocketBaseClient, operations: Sequence[Operation], layouts: Mapping[str, CommitLayout]
) -> dict[int, Refusal]:
    """The operations that would leave two records with what must be unique: those that find it taken, and of the
    others all whose key one before them has that is not to blame itself.

    Updates that name but a part of an index's columns are not looked at.
    """
    blamed: dict[int, Refusal] = {}
    deleted = {operation.record_id for operation in operations if operation.method == "DELETE"}
    claims: list[tuple[str, Columns, dict[int, Key]]] = []
    for collection in dict.fromkeys(operation.collection for operation in operations):
        for columns in await _unique_indexes(client, collection):
            wanted = {
                index: key
                for index, operation in enumerate(operations)
                if operation.collection == collection
                and (key := _key(operation, layouts[operation.layout], columns)) is not None
            }
            claims.append((collection, columns, wanted))
            for index in await _taken(client, collection, columns, wanted, operations, deleted):
                blamed[index] = _violation(operations[index], columns)
    granted: set[tuple[str, Columns, Key]] = set()
    for index, operation in enumerate(operations):
        if index in blamed:
            continue
        own = [(collection, columns, wanted[index]) for collection, columns, wanted in claims if index in wanted]
        clash = next((columns for collection, columns, key in own if (collection, columns, key) in granted), None)
        if clash is None:
            granted.update(own)
        else:
            blamed[index] = _violation(operation, clash)
    return blamed


async def _unique_indexes(client: PocketBaseClient, collection: str) -> list[Columns]:
    """The columns of each unique index that covers all records."""
    answer = await client.send("GET", f"/api/collections/{collection}")
    if not answer.ok:
        return []
    found = []
    for sql in msgspec.json.decode(answer.content, type=_Collection).indexes:
        index = _UNIQUE.match(sql.strip())
        columns = [_COLUMN.match(part.strip()) for part in index["columns"].split(",")] if index else []
        if columns and all(columns):
            found.append(tuple(column["name"] for column in columns if column))
    return found


def _key(operation: Operation, layout: CommitLayout, columns: Sequence[str]) -> Key | None:
    """What an operation wants these columns to hold; None where it does not say."""
    if operation.method == "DELETE":
        return None
    body = msgspec.json.decode(operation.body)
    values = body[1 if operation.method == "POST" else 2 :]
    places = {slot.column: place for place, slot in enumerate(layout.slots)}
    key = []
    for column in columns:
        place = places.get(column)
        value = values[place] if place is not None and place < len(values) else None
        if value is None:
            return None
        key.append(value)
    return tuple(key)


async def _taken(
    client: PocketBaseClient,
    collection: str,
    columns: Sequence[str],
    wanted: Mapping[int, Key],
    operations: Sequence[Operation],
    deleted: set[str],
) -> list[int]:
    """Those of the operations whose key another record has."""
    taken = []
    names = ",".join(f"k{n}" for n in range(len(columns)))
    same = " AND ".join(f"c.`{column}`=v.k{n}" for n, column in enumerate(columns))
    head = f"WITH v(i,r,{names}) AS (VALUES "
    tail = f") SELECT v.i, c.id FROM v JOIN `{collection}` c ON {same} AND c.id<>v.r"
    rows = [
        f"({index},'{operations[index].record_id}',{','.join(literals)})"
        for index, key in wanted.items()
        if (literals := _literals(key)) is not None
    ]
    most = MOST_CHARACTERS - len(head) - len(tail)
    for some in joined((row for row in rows if len(row) < most), ",", most):
        found = await Sql(client).select(head + some + tail)
        taken += [int(index) for index, record in found if record not in deleted]
    return taken


def _literals(key: Key) -> list[str] | None:
    """SQL literals; None where SQL has none for a value."""
    literals = []
    for value in key:
        if isinstance(value, str):
            if "\0" in value:
                return None
            literals.append("'" + value.replace("'", "''") + "'")
        else:
            literals.append(str(int(value)) if isinstance(value, bool) else repr(value))
    return literals


def _violation(operation: Operation, columns: Sequence[str]) -> UniqueViolation:
    return UniqueViolation(
        f"{operation.what}: another record has the same {', '.join(columns)}, which must be unique",
        status=400,
        codes=dict.fromkeys(columns, "validation_not_unique"),
    )
