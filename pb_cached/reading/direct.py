"""Answers by PocketBase: it narrows, orders and counts where it can do so exactly; the predicate decides."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from parlant.core.persistence.common import SortDirection
from parlant.core.persistence.document_database import CollectionSort

from pb_cached.cache.predicate import Predicate, compile_where
from pb_cached.exact import Json
from pb_cached.pocketbase.codec import RecordCodec, Row
from pb_cached.pocketbase.dialect import Dialect
from pb_cached.pocketbase.filters import FilterWriter, is_unshared
from pb_cached.pocketbase.records import RecordReader
from pb_cached.pocketbase.schema import Kind
from pb_cached.reading.order import first_of, position

Document = dict[str, Json]


class Match(NamedTuple):
    """A document, and the record that holds it."""

    record: str
    document: Document


class Found(NamedTuple):
    """Documents in their order, and how many matches there are in all."""

    documents: Sequence[Document]
    total: int


class Reads(Protocol):
    """How a collection reads. Each raises `InvalidFilter` for what is no filter."""

    async def find(self, where: Mapping[str, Any], limit: int | None, descending: bool) -> Found:
        """The matches by `creation_utc` and `id`."""
        ...

    async def first(self, where: Mapping[str, Any]) -> Match | None:
        """The match that was inserted first."""
        ...

    async def first_sorted(self, where: Mapping[str, Any], sort: CollectionSort) -> Document | None:
        """The first match in the order of `sort`; of equal ones, the one inserted first."""
        ...


class DirectReads:
    """Reads of one collection that go to PocketBase. Immutable."""

    def __init__(self, codec: RecordCodec, reader: RecordReader, filters: FilterWriter, dialect: Dialect) -> None:
        self._codec = codec
        self._reader = reader
        self._filters = filters
        self._dialect = dialect

    async def find(self, where: Mapping[str, Any], limit: int | None, descending: bool) -> Found:
        predicate = compile_where(where)
        narrowed = self._filters.narrow(where)
        if narrowed is None:
            return Found((), 0)
        if limit is not None and self._filters.is_exact(where):
            page = await self._page(narrowed[0], limit, descending)
            if page is not None:
                return page
        found = [document async for _, document in self._matches(narrowed, predicate)]
        found.sort(key=position, reverse=descending)
        return Found(found if limit is None else found[:limit], len(found))

    async def first(self, where: Mapping[str, Any]) -> Match | None:
        predicate = compile_where(where)
        first: Match | None = None
        for filter_ in self._filters.narrow(where) or ():
            # Most filters say all there is to say, so the first record is the match: ask for few.
            page = await self._reader.page(filter_, "id", 2)
            async for match in self._among(page.rows, filter_, predicate):
                if first is None or match.record < first.record:
                    first = match
                break
        return first

    async def first_sorted(self, where: Mapping[str, Any], sort: CollectionSort) -> Document | None:
        predicate = compile_where(where)
        narrowed = self._filters.narrow(where)
        if narrowed is None:
            return None
        columns = [self._codec.columns.get(field) for field, _ in sort]
        if len(narrowed) == 1 and all(column and column.kind is not Kind.JSON for column in columns):
            order = ",".join(
                ("-" if direction == SortDirection.DESC else "") + column.name
                for column, (_, direction) in zip(columns, sort, strict=True)
                if column
            )
            rows = (await self._reader.page(narrowed[0], f"{order},id", 2)).rows
            if not rows:
                return None
            # Values that differ from their images may share them with the first one's, and stand before it.
            alone = len(rows) == 1 or all(
                is_unshared(self._codec.held(rows[0], column.field), column.kind) for column in columns if column
            )
            if alone and predicate(document := self._codec.document(rows[0])):
                return document
        found = [match async for match in self._matches(narrowed, predicate)]
        return first_of([document for _, document in sorted(found, key=lambda match: match.record)], sort)

    async def _page(self, filter_: str, limit: int, descending: bool) -> Found | None:
        """A limited result straight from PocketBase's own order and count. None where that order is not the
        documents': where it is made from images that are not their values."""
        order = [self._codec.columns.get(field) for field in ("creation_utc", "id")]
        if limit >= self._dialect.per_page or any(c is None or c.kind is not Kind.TEXT for c in order):
            return None
        sign = "-" if descending else ""
        sort = ",".join([*(sign + column.name for column in order if column), "id"])
        page = await self._reader.page(filter_, sort, limit + 1, total=True)
        documents = [self._codec.document(row) for row in page.rows]
        for row, document in zip(page.rows, documents, strict=True):
            if any(document.get(field) != self._codec.held(row, field) for field in ("creation_utc", "id")):
                return None
        # PocketBase counts beside its reading, not within: a page that is not full tells the total itself.
        total = len(documents) if len(documents) <= limit else max(page.total, len(documents))
        return Found(documents[:limit], total)

    async def _matches(self, narrowed: Sequence[str], predicate: Predicate) -> AsyncIterator[Match]:
        """Every match, once."""
        async for row in self._reader.all(narrowed):
            document = self._codec.document(row)
            if predicate(document):
                yield Match(row.id, document)

    async def _among(self, rows: Sequence[Row], filter_: str, predicate: Predicate) -> AsyncIterator[Match]:
        for row in rows:
            if predicate(document := self._codec.document(row)):
                yield Match(row.id, document)
        if len(rows) == 2:
            async for match in self._matches((filter_,), predicate):
                yield match
