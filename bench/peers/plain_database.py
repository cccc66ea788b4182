"""A document database for Parlant on PocketBase's API, with neither cache nor batches.

It does what PocketBase's documentation suggests: a column for each field with the indexes that the stores ask for,
list requests with filters, a request for each call; a look-up before an update or a deletion. Connections are kept
alive, and nothing is counted that nobody asks for.

A value in a `json` column comes back as PocketBase keeps it, which is not always as it was written.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Generic, cast, get_type_hints

import httpx
from parlant.core.persistence.common import Cursor, ObjectId, SortDirection, Where, ensure_is_total
from parlant.core.persistence.document_database import (
    BaseDocument,
    CollectionIndex,
    CollectionSort,
    DeleteResult,
    DocumentCollection,
    DocumentDatabase,
    FindResult,
    InsertResult,
    TDocument,
    UpdateResult,
)
from typing_extensions import override

PAGE: Final = 1000
"""The most records that PocketBase lists at once."""
_TEXT: Final = {"type": "text", "max": 1_000_000}
_JSON: Final = {"type": "json", "maxSize": 20_000_000}
_OPERATORS: Final = {"$eq": "=", "$ne": "!=", "$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
_Record = dict[str, Any]


class PlainDatabase(DocumentDatabase):
    """
    Args:
        http: signed in as a superuser.
        prefix: of the names of its collections.
    """

    def __init__(self, http: httpx.AsyncClient, prefix: str) -> None:
        self._http = http
        self._prefix = prefix

    @override
    async def create_collection(self, name: str, schema: type[TDocument]) -> PlainCollection[TDocument]:
        columns = get_type_hints(schema)
        body = {
            "name": self._table(name),
            "type": "base",
            "fields": [{"name": _column(field), **_kind(annotation)} for field, annotation in columns.items()],
        }
        (await self._http.post("/api/collections", json=body)).raise_for_status()
        created = PlainCollection(self._http, self._table(name), schema)
        await created.ensure_indexes([CollectionIndex((("id", SortDirection.ASC),))])
        return created

    @override
    async def get_collection(
        self,
        name: str,
        schema: type[TDocument],
        document_loader: Callable[[BaseDocument], Awaitable[TDocument | None]],
    ) -> PlainCollection[TDocument]:
        """The loader is not asked: there are no documents of older versions here."""
        found = await self._http.get(f"/api/collections/{self._table(name)}")
        if found.status_code == httpx.codes.NOT_FOUND:
            raise ValueError(f'Collection "{name}" does not exist')
        found.raise_for_status()
        return PlainCollection(self._http, self._table(name), schema)

    @override
    async def get_or_create_collection(
        self,
        name: str,
        schema: type[TDocument],
        document_loader: Callable[[BaseDocument], Awaitable[TDocument | None]],
    ) -> PlainCollection[TDocument]:
        try:
            return await self.get_collection(name, schema, document_loader)
        except ValueError:
            return await self.create_collection(name, schema)

    @override
    async def delete_collection(self, name: str) -> None:
        deleted = await self._http.delete(f"/api/collections/{self._table(name)}")
        if deleted.status_code == httpx.codes.NOT_FOUND:
            raise ValueError(f'Collection "{name}" does not exist')
        deleted.raise_for_status()

    def _table(self, name: str) -> str:
        return f"{self._prefix}_{name}"


class PlainCollection(DocumentCollection[TDocument], Generic[TDocument]):
    def __init__(self, http: httpx.AsyncClient, table: str, schema: type[TDocument]) -> None:
        self._http = http
        self._table = table
        self._schema = schema
        self._fields = list(get_type_hints(schema))
        self._records = f"/api/collections/{table}/records"

    @override
    async def find(
        self,
        filters: Where,
        limit: int | None = None,
        cursor: Cursor | None = None,
        sort_direction: SortDirection | None = None,
    ) -> FindResult[TDocument]:
        direction = sort_direction or SortDirection.ASC
        expressions = [_expression(filters), _after(cursor, direction)]
        params = {
            "filter": " && ".join(f"({each})" for each in expressions if each),
            "sort": _order((("creation_utc", direction), ("id", direction))),
        }
        if limit is None:
            items = [self._document(record) for record in await self._all(params)]
            return FindResult(items, len(items), has_more=False)
        page = await self._list(**params, perPage=max(1, min(limit, PAGE)))
        total, records = int(page["totalItems"]), page["items"][:limit]
        while len(records) < min(limit, total):
            number = len(records) // PAGE + 1
            more = (await self._list(**params, perPage=PAGE, page=number, skipTotal=1))["items"]
            if not more:
                break
            records += more[: limit - len(records)]
        items = [self._document(record) for record in records]
        next_cursor = None
        if total > limit and items:
            next_cursor = Cursor(items[-1]["creation_utc"], ObjectId(items[-1]["id"]))
        return FindResult(items, total, has_more=total > limit, next_cursor=next_cursor)

    async def _all(self, params: Mapping[str, str]) -> list[_Record]:
        records: list[_Record] = []
        while True:
            number = len(records) // PAGE + 1
            page = (await self._list(**params, perPage=PAGE, page=number, skipTotal=1))["items"]
            records += page
            if len(page) < PAGE:
                return records

    @override
    async def find_one(self, filters: Where, sort: CollectionSort | None = None) -> TDocument | None:
        record = await self._first(filters, sort)
        return None if record is None else self._document(record)

    @override
    async def ensure_indexes(self, indexes: Sequence[CollectionIndex]) -> None:
        path = f"/api/collections/{self._table}"
        there = list((await self._http.get(path)).raise_for_status().json()["indexes"])
        wanted = there + [sql for sql in map(self._index, indexes) if sql not in there]
        if len(wanted) > len(there):
            (await self._http.patch(path, json={"indexes": wanted})).raise_for_status()

    @override
    async def insert_one(self, document: TDocument) -> InsertResult:
        await self._insert(document)
        return InsertResult(acknowledged=True)

    @override
    async def update_one(self, filters: Where, params: TDocument, upsert: bool = False) -> UpdateResult[TDocument]:
        found = await self._first(filters)
        if found is None:
            if upsert:
                await self._insert(params)
            return UpdateResult(True, 0, 0, params if upsert else None)
        changed = await self._http.patch(f"{self._records}/{found['id']}", json=_record(params))
        return UpdateResult(True, 1, 1, self._document(changed.raise_for_status().json()))

    @override
    async def delete_one(self, filters: Where) -> DeleteResult[TDocument]:
        found = await self._first(filters)
        if found is None:
            return DeleteResult(True, 0, None)
        (await self._http.delete(f"{self._records}/{found['id']}")).raise_for_status()
        return DeleteResult(True, 1, self._document(found))

    async def _insert(self, document: TDocument) -> None:
        ensure_is_total(document, self._schema)
        (await self._http.post(self._records, json=_record(document))).raise_for_status()

    async def _first(self, filters: Where, sort: CollectionSort | None = None) -> _Record | None:
        """Where no order is asked for, the one that PocketBase comes upon first: by an equal value in an indexed
        column that is the first inserted."""
        params = {"filter": _expression(filters), "sort": _order(sort) if sort else ""}
        page = await self._list(**params, perPage=1, skipTotal=1)
        return cast(_Record, page["items"][0]) if page["items"] else None

    async def _list(self, **params: str | int) -> _Record:
        given = {name: value for name, value in params.items() if value != ""}
        return cast(_Record, (await self._http.get(self._records, params=given)).raise_for_status().json())

    def _document(self, record: Mapping[str, Any]) -> TDocument:
        return cast(TDocument, {field: record[_column(field)] for field in self._fields})

    def _index(self, index: CollectionIndex) -> str:
        columns = [(_column(field), direction) for field, direction in index.fields]
        name = "_".join(("idx", self._table, *(column for column, _ in columns)))
        terms = ", ".join(f"`{column}`{'' if _rises(direction) else ' DESC'}" for column, direction in columns)
        return f"CREATE {'UNIQUE ' if index.unique else ''}INDEX `{name}` ON `{self._table}` ({terms})"


def _column(field: str) -> str:
    """PocketBase's `id` is its own, and unique; Parlant's ids are not."""
    return "doc_id" if field == "id" else field


def _kind(annotation: object) -> Mapping[str, Any]:
    plain = annotation
    while hasattr(plain, "__supertype__"):
        plain = plain.__supertype__
    if plain is str:
        return _TEXT
    if plain is bool:
        return {"type": "bool"}
    return {"type": "number"} if plain in (int, float) else _JSON


def _record(document: Mapping[str, Any]) -> _Record:
    return {_column(field): value for field, value in document.items()}


def _rises(direction: SortDirection) -> bool:
    return direction is not SortDirection.DESC


def _order(sort: CollectionSort) -> str:
    return ",".join(("" if _rises(direction) else "-") + _column(field) for field, direction in sort)


def _after(cursor: Cursor | None, direction: SortDirection) -> str:
    if cursor is None:
        return ""
    beyond = ">" if _rises(direction) else "<"
    moment, id_ = _literal(cursor.creation_utc), _literal(cursor.id)
    return f"creation_utc {beyond} {moment} || (creation_utc = {moment} && doc_id {beyond} {id_})"


def _expression(filters: Where) -> str:
    """The filter by PocketBase's grammar; empty where all documents match."""
    terms = []
    for name, operand in cast(Mapping[str, Any], filters).items():
        if name in ("$and", "$or"):
            joint, none = (" && ", "1 = 1") if name == "$and" else (" || ", "1 = 2")
            parts = [f"({_expression(part) or '1 = 1'})" for part in operand]
            terms.append(joint.join(parts) or none)
            continue
        for operator, value in operand.items():
            terms.append(_comparison(_column(name), operator, value))
    return terms[0] if len(terms) == 1 else " && ".join(f"({term})" for term in terms)


def _comparison(column: str, operator: str, value: Any) -> str:
    if operator == "$in":
        return " || ".join(f"{column} = {_literal(each)}" for each in value) or "1 = 2"
    if operator == "$nin":
        return " && ".join(f"{column} != {_literal(each)}" for each in value) or "1 = 1"
    return f"{column} {_OPERATORS[operator]} {_literal(value)}"


def _literal(value: Any) -> str:
    """As it stands in a filter. PocketBase's strings escape their quotation mark alone."""
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'"
    return json.dumps(value)
