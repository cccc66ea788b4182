"""Answers by PocketBase: it narrows, orders and counts where it can do so exactly; the predicate decides.

A limited result takes one page of PocketBase's own order, whatever the number of matches. That order and its count
are right for plain records. The exceptional ones, most often few or none, are all read and put in their places.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from parlant.core.persistence.common import SortDirection
from parlant.core.persistence.document_database import CollectionSort

from pb_cached.cache.predicate import Predicate, compile_where
from pb_cached.exact import Json
from pb_cached.pocketbase.codec import RecordCodec, Row
from pb_cached.pocketbase.dialect import Dialect
from pb_cached.pocketbase.filters import FilterWriter, is_unshared
from pb_cached.pocketbase.records import RecordReader
from pb_cached.pocketbase.schema import IS_EXCEPTIONAL, Kind
from pb_cached.reading.order import Position, beyond, first_of, is_beyond, position

Document = dict[str, Json]


class Match(NamedTuple):
    """A document, and the record and the revision that hold it."""

    record: str
    document: Document
    rev: int


class Found(NamedTuple):
    """Documents in their order, and how many matches there are in all."""

    documents: Sequence[Document]
    total: int


class Reads(Protocol):
    """How a collection reads. Each raises `InvalidFilter` for what is no filter."""

    async def find(
        self, where: Mapping[str, Any], limit: int | None, descending: bool, at: Position | None
    ) -> Found:
        """The matches by `creation_utc` and `id`; where `at` is given, those after it."""
        ...

    async def first(self, where: Mapping[str, Any]) -> Match | None:
        """The match that was inserted first."""
        ...

    async def first_sorted(self, where: Mapping[str, Any], sort: CollectionSort) -> Document | None:
        """The first match in the order of `sort`; of equal ones, the one inserted first."""
        ...

    async def exists(self, where: Mapping[str, Any]) -> bool:
        """Is there a match?"""
        ...

    async def greatest(self, where: Mapping[str, Any], field: str) -> Json:
        """The greatest value of a field among the matches; None where there is none."""
        ...


class DirectReads:
    """Reads of one collection that go to PocketBase. Immutable."""

    def __init__(self, codec: RecordCodec, reader: RecordReader, filters: FilterWriter, dialect: Dialect) -> None:
        self._codec = codec
        self._reader = reader
        self._filters = filters
        self._dialect = dialect

    async def find(
        self, where: Mapping[str, Any], limit: int | None, descending: bool, at: Position | None
    ) -> Found:
        predicate, asked = compile_where(where), where
        if at is not None:
            predicate = _both(predicate, is_beyond(at, descending))
            if self._is_text("creation_utc"):
                asked = beyond(where, at, descending)
        narrowed = self._filters.narrow(asked)
        if narrowed is None:
            return Found((), 0)
        if limit is not None and self._filters.is_exact(asked):
            page = await self._page(narrowed[0], predicate, limit, descending)
            if page is not None:
                return page
        found = [match.document async for match in self._matches(narrowed, predicate)]
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
        return first_of([match.document for match in sorted(found, key=lambda match: match.record)], sort)

    async def exists(self, where: Mapping[str, Any]) -> bool:
        return await self.first(where) is not None

    async def greatest(self, where: Mapping[str, Any], field: str) -> Json:
        document = await self.first_sorted(where, ((field, SortDirection.DESC),))
        return document.get(field) if document else None

    async def _page(self, filter_: str, predicate: Predicate, limit: int, descending: bool) -> Found | None:
        """A limited result by PocketBase's own order and count. The filter is exact for plain records. None where
        that cannot be done, or not in two pages.

        Both requests see exceptional records, so one that becomes plain, or ceases to be, between them is not
        lost: (1) the page is read; (2) the record turns plain; (3) the exceptional ones are read, without it.
        """
        order = ("creation_utc", "id")
        if limit >= self._dialect.per_page or not all(map(self._is_text, order)):
            return None
        sign = "-" if descending else ""
        sort = ",".join([*(sign + self._codec.columns[field].name for field in order), "id"])
        page, exceptional = await asyncio.gather(
            self._reader.page(filter_, sort, limit + 1, total=True), self._exceptional(filter_)
        )
        size = limit + 1
        if len(page.rows) == size and any(row.extra for row in page.rows):
            # They may match or not, or belong elsewhere: see to it that as many plain ones are there.
            size += len(exceptional)
            if size > self._dialect.per_page:
                return None
            page = await self._reader.page(filter_, sort, size, total=True)
        if len(page.rows) < size:  # it has all there is, and tells the total itself: PocketBase counts beside it
            found = self._ordered(page.rows, predicate, descending)
            return Found(found[:limit], len(found))
        if sum(not row.extra and predicate(self._codec.document(row)) for row in page.rows) <= limit:
            return None  # or a foreign hand has written what no filter can foresee
        newest: dict[str, Row] = {}
        for row in (*page.rows, *exceptional):
            if row.id not in newest or row.rev > newest[row.id].rev:
                newest[row.id] = row
        found = self._ordered(newest.values(), predicate, descending)
        refused = sum(not predicate(self._codec.document(row)) for row in exceptional)
        return Found(found[:limit], max(page.total - refused, len(found)))

    def _is_text(self, field: str) -> bool:
        """Has the field a column of its own that orders records as documents are ordered?"""
        column = self._codec.columns.get(field)
        return column is not None and column.kind is Kind.TEXT

    async def _exceptional(self, filter_: str) -> Sequence[Row]:
        """The records that are not plain, all that the filter lets through."""
        return [row async for row in self._reader.all((" && ".join(filter(None, (filter_, IS_EXCEPTIONAL))),))]

    def _ordered(self, rows: Iterable[Row], predicate: Predicate, descending: bool) -> list[Document]:
        """The matches in the order of `find`; of equal ones, the one inserted first."""
        documents = [self._codec.document(row) for row in sorted(rows, key=lambda row: row.id)]
        return sorted(filter(predicate, documents), key=position, reverse=descending)

    async def _matches(self, narrowed: Sequence[str], predicate: Predicate) -> AsyncIterator[Match]:
        """Every match, once."""
        async for row in self._reader.all(narrowed):
            document = self._codec.document(row)
            if predicate(document):
                yield Match(row.id, document, row.rev)

    async def _among(self, rows: Sequence[Row], filter_: str, predicate: Predicate) -> AsyncIterator[Match]:
        for row in rows:
            if predicate(document := self._codec.document(row)):
                yield Match(row.id, document, row.rev)
        if len(rows) == 2:
            async for match in self._matches((filter_,), predicate):
                yield match


def _both(one: Predicate, other: Predicate) -> Predicate:
    return lambda document: one(document) and other(document)
