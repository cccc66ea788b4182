"""Reading records: pages in a given order, or all that a filter lets through.

Whatever the number of matches, they are read in pages by key, never by page number: a page that shifts under
concurrent inserts or deletes would skip or repeat records.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from pb_cached.pocketbase.client import PocketBaseClient
from pb_cached.pocketbase.codec import RecordCodec, Row
from pb_cached.pocketbase.dialect import Dialect

FIRST_PAGE: Final = 100
"""Records asked for before their size is known."""
PAGE_BYTES: Final = 8 * 1024 * 1024
"""About how much one page may bring."""


class Page(Struct, frozen=True):
    rows: Sequence[Row]
    total: int
    """Matches of the filter in all; -1 where it was not asked for."""


class _Listing(Struct, rename="camel"):
    items: msgspec.Raw
    total_items: int = -1


_listing: Final = msgspec.json.Decoder(_Listing)


class RecordReader:
    """Reads one collection. Immutable."""

    def __init__(
        self,
        client: PocketBaseClient,
        dialect: Dialect,
        codec: RecordCodec,
        seen: Callable[[Sequence[Row]], None] = lambda rows: None,
    ) -> None:
        """
        Args:
            seen: is told of all rows that are read, before anybody else.
        """
        self._seen = seen
        self._client = client
        self._dialect = dialect
        self._codec = codec
        self._path = f"/api/collections/{codec.collection}/records"

    async def page(self, filter_: str, sort: str, limit: int, *, total: bool = False) -> Page:
        """The first `limit` records in the order of `sort`, and how many there are in all where asked."""
        page, _ = await self._page(filter_, sort, min(limit, self._dialect.per_page), total)
        return page

    async def all(self, filters: Sequence[str]) -> AsyncIterator[Row]:
        """Every record that one of the filters lets through, once; by id, and so in the order of insertion,
        within each filter."""
        seen: set[str] = set()
        for filter_ in filters:
            async for row in self._each(filter_):
                if len(filters) == 1:
                    yield row
                elif row.id not in seen:
                    seen.add(row.id)
                    yield row

    async def by_ids(self, ids: Sequence[str]) -> dict[str, Row]:
        """The records with these ids, those that exist."""
        found: dict[str, Row] = {}
        per_filter = min(100, self._dialect.filter_bytes // 25)
        for start in range(0, len(ids), per_filter):
            filter_ = " || ".join(f"id = '{id_}'" for id_ in ids[start : start + per_filter])
            found |= {row.id: row for row in (await self.page(filter_, "id", per_filter)).rows}
        return found

    async def newest_first(self) -> AsyncIterator[Sequence[Row]]:
        """Every record, page by page, those inserted last first."""
        limit, last = FIRST_PAGE, ""
        while True:
            key = f"id < '{last}'" if last else ""
            page, size = await self._page(key, "-id", limit, total=False)
            yield page.rows
            if len(page.rows) < limit:
                return
            last, limit = page.rows[-1].id, self._next_limit(limit, size)

    async def pages(self, filter_: str, most: int) -> AsyncIterator[Sequence[Row]]:
        """Every record that the filter lets through, by id, in pages of at most so many records and about as many
        bytes as a page may take. Each is asked for when the one before has been dealt with."""
        most = min(most, self._dialect.per_page)
        limit, last = min(most, FIRST_PAGE), ""
        while True:
            key = f"id > '{last}'" if last else ""
            page, size = await self._page(" && ".join(filter(None, (filter_, key))), "id", limit, total=False)
            yield page.rows
            if len(page.rows) < limit:
                return
            last, limit = page.rows[-1].id, min(most, self._next_limit(limit, size))

    async def _each(self, filter_: str) -> AsyncIterator[Row]:
        async for rows in self.pages(filter_, self._dialect.per_page):
            for row in rows:
                yield row

    def _next_limit(self, limit: int, size: int) -> int:
        """So many records that the next page takes about as many bytes as a page may."""
        return max(1, min(self._dialect.per_page, PAGE_BYTES * limit // max(1, size)))

    async def _page(self, filter_: str, sort: str, limit: int, total: bool) -> tuple[Page, int]:
        params: dict[str, str | int] = {"perPage": limit, "sort": sort}
        if filter_:
            params["filter"] = filter_
        if not total:
            params["skipTotal"] = 1
        content = await self._client.call("GET", self._path, params=params)
        listing = _listing.decode(content)
        page = Page(self._codec.rows(listing.items), listing.total_items)
        self._seen(page.rows)
        return page, len(content)
