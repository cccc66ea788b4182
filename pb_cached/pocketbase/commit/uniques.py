"""Which operations a unique index stands against, where PocketBase has refused a commit without saying so."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from pb_cached.errors import UniqueViolation
from pb_cached.pocketbase.client import PocketBaseClient
from pb_cached.pocketbase.commit.interface import Operation, Refusal
from pb_cached.pocketbase.commit.looks import multi_gets
from pb_cached.pocketbase.commit.triggers import CommitLayout
from pb_cached.pocketbase.sql import MOST_CHARACTERS, Sql, joined

_UNIQUE: Final = re.compile(r"CREATE\s+UNIQUE\s+INDEX\b.*\((?P<columns>[^()]*)\)\s*\Z", re.IGNORECASE | re.DOTALL)
_COLUMN: Final = re.compile(r"[`\"\[]?(?P<name>\w+)[`\"\]]?(?:\s+(?:ASC|DESC))?\Z", re.IGNORECASE)

_DEFAULTS: Final[Mapping[str, Any]] = {"''": "", "0": 0, "FALSE": False}
"""What the literals of a layout's slots stand for."""

Key = tuple[Any, ...]
Columns = tuple[str, ...]
Values = Mapping[str, Any]
"""By columns."""


class _Collection(Struct):
    indexes: list[str] = []


class _Records(Struct):
    items: list[dict[str, Any]]


async def violations(
    client: PocketBaseClient, operations: Sequence[Operation], layouts: Mapping[str, CommitLayout]
) -> dict[int, Refusal]:
    """The operations that would leave two records with what must be unique: those that find it taken, and of the
    others all whose key one before them has that is not to blame itself.

    Where an update names but a part of an index's columns, the others are in its record.
    """
    blamed: dict[int, Refusal] = {}
    deleted = {operation.record_id for operation in operations if operation.method == "DELETE"}
    claims: list[tuple[str, Columns, dict[int, Key]]] = []
    for collection in dict.fromkeys(operation.collection for operation in operations):
        named = {
            index: _named(operation, layouts[operation.layout])
            for index, operation in enumerate(operations)
            if operation.collection == collection and operation.method != "DELETE"
        }
        for columns in await _unique_indexes(client, collection):
            concerned = {index: values for index, values in named.items() if not values.keys().isdisjoint(columns)}
            part = [operations[index] for index, values in concerned.items() if not values.keys() >= set(columns)]
            stored = await _stored(client, collection, part, columns)
            wanted = {
                index: key
                for index, values in concerned.items()
                if (key := _key({**stored.get(operations[index].record_id, {}), **values}, columns)) is not None
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


def _named(operation: Operation, layout: CommitLayout) -> Values:
    """What an operation wants columns to hold: those that it names, and of an insert the others too."""
    body = msgspec.json.decode(operation.body)
    if operation.method == "POST":
        return {
            slot.column: _DEFAULTS.get(slot.default) if value is None else value
            for slot, value in zip(layout.slots, body[1:], strict=True)
            # What PocketBase numbers clashes with nothing.
            if slot.within is None or not isinstance(value, str)
        }
    return {slot.column: value for slot, value in zip(layout.slots, body[2:], strict=False) if value is not None}


async def _stored(
    client: PocketBaseClient, collection: str, updates: Sequence[Operation], columns: Sequence[str]
) -> dict[str, Values]:
    """What these columns of the updates' records hold, by record. Of a record that has been changed since the
    update was built nothing is told, as it is not for that that it was refused."""
    revs = {operation.record_id: operation.rev for operation in updates if operation.method == "PATCH"}
    found: dict[str, Values] = {}
    for content in await multi_gets(client, collection, list(revs), ("id", "rev", *columns)):
        for record in msgspec.json.decode(content, type=_Records).items:
            if record["rev"] == revs[record["id"]]:
                found[record["id"]] = record
    return found


def _key(values: Values, columns: Iterable[str]) -> Key | None:
    """What these columns are to hold; None where that is not known of all."""
    key = tuple(values.get(column) for column in columns)
    return None if None in key else key


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
