"""Lists, page by page: the sessions of a customer, the customers with their tags, the events of a long session.

Parlant's own ways show: customers cost a look-up of tags each, its second page of customers is all the rest, so
that only the first is measured; and events have a first offset but no last one. Ours keeps no lists of sessions:
it asks PocketBase for each page, and beside it for the documents that PocketBase's columns cannot hold exactly.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from parlant.core.customers import CustomerStore
from parlant.core.persistence.common import Cursor

from bench.peers import Peer
from bench.peers.contents import Contents
from bench.peers.memory import memory
from bench.peers.ours import ours
from bench.peers.plain import plain
from bench.rounds import Contender
from bench.run import Run
from bench.samples import EVENTS_OF_A_SESSION, LONG_SESSION, TAG, customer_id, customer_of, stored_session
from bench.workloads.turns import Maker, opened

PAGE: Final = 50
LONG: Final = 500
"""Events of the long session."""
MOST_PAGES: Final = 200
"""Of a contender's round."""
LARGEST_WHOLE: Final = 1_000
"""Customers up to which their whole list is compared: the memory takes a look at all tags for each of them."""


@dataclass
class Lists:
    """One peer's lists."""

    peer: Peer
    contents: Contents
    _cursor: Cursor | None = None
    _offset: int = 0

    async def read_sessions(self) -> list[str]:
        """The next page of the first customer's sessions; after the last the first again."""
        page = await self.peer.session_store.list_sessions(
            customer_id=customer_id(0), limit=PAGE, cursor=self._cursor
        )
        self._cursor = page.next_cursor
        assert page.items, f"{self.peer.name}: an empty page of sessions"
        return [session.id for session in page.items]

    async def read_customers(self) -> list[str]:
        """The first page: the guest, and the others with their tags."""
        page = await self.peer.customer_store.list_customers(limit=PAGE)
        assert len(page.items) == PAGE, f"{self.peer.name}: a page of {len(page.items)} customers"
        return [customer.id for customer in page.items]

    async def read_events(self) -> Sequence[object]:
        """What is left of the long session, from a page further on each time; after the last page all of it."""
        offset, self._offset = self._offset, (self._offset + PAGE) % LONG
        found = await self.peer.session_store.list_events(LONG_SESSION, min_offset=offset)
        assert len(found) == LONG - offset, f"{self.peer.name}: {len(found)} events from {offset} on"
        return found

    async def check(self) -> None:
        """Put all pages together, and compare them with what is stored.

        Raises:
            AssertionError: they differ.
        """
        name, stored = self.peer.name, self.contents
        self._cursor = None
        sessions = await self.read_sessions()
        while self._cursor is not None:
            sessions += await self.read_sessions()
        numbers = range(stored.sessions)
        mine = [stored_session(each) for each in numbers if customer_of(each, stored.customers) == customer_id(0)]
        assert sessions == mine, f"{name}: the pages hold {len(sessions)} sessions, not {len(mine)}, or others"
        for offset in range(0, LONG, PAGE):
            await self._check_events(offset)
        if stored.customers <= LARGEST_WHOLE:
            await self._check_customers()

    async def _check_events(self, offset: int) -> None:
        events = await self.peer.session_store.list_events(LONG_SESSION, min_offset=offset)
        found = [event.offset for event in events]
        assert found == list(range(offset, LONG)), f"{self.peer.name}: from {offset} on there are {found}"

    async def _check_customers(self) -> None:
        store, stored = self.peer.customer_store, self.contents.customers
        page = await store.list_customers(limit=PAGE)
        customers = list(page.items)
        while page.has_more:
            page = await store.list_customers(limit=PAGE, cursor=page.next_cursor)
            customers += page.items
        expected = [CustomerStore.GUEST_ID, *map(customer_id, range(stored))]
        assert [each.id for each in customers] == expected, f"{self.peer.name}: {len(customers)} customers"
        assert all(list(each.tags) == [TAG] for each in customers[1:]), f"{self.peer.name}: tags are lost"


Read = Callable[[Lists], Awaitable[object]]


async def measure(run: Run) -> None:
    for events in run.sizes((2_000, 20_000, 200_000), (2_000,)):
        sessions = events // EVENTS_OF_A_SESSION
        contents = Contents(events, customers=sessions, long=LONG)
        makers: list[Maker] = [memory(contents), plain(contents), ours(contents, mode="realtime", commit="log")]
        async with opened(run, makers, events) as peers:
            lists = [Lists(peer, contents) for peer in peers]
            for each in lists:
                await each.check()
            await _measure_pages(run, "listing sessions", "sessions stored", sessions, lists, Lists.read_sessions)
            await _measure_pages(
                run, "listing customers", "customers stored", sessions, lists, Lists.read_customers
            )
            pages = LONG // PAGE
            await _measure_pages(
                run, "listing events", "sessions stored", sessions, lists, Lists.read_events, pages
            )
            for each in lists:
                await each.check()


async def _measure_pages(
    run: Run, workload: str, of: str, size: int, lists: Sequence[Lists], read: Read, least: int = 1
) -> None:
    """
    Args:
        least: a round has so many pages, or a multiple of it.
    """
    seconds = run.scaled(300, 100) / 1000
    contenders = []
    for each in lists:
        started = time.perf_counter()
        await read(each)
        pages = min(MOST_PAGES, int(seconds / (time.perf_counter() - started)))
        pages = max(1, pages // least) * least
        contenders.append(Contender(each.peer.name, _reader(each, read), pages, each.peer.servers))
    await run.take_turns(workload, contenders, of=of, size=size, unit="page")


def _reader(lists: Lists, read: Read) -> Callable[[int], Awaitable[list[float]]]:
    async def work(pages: int) -> list[float]:
        waits = []
        for _ in range(pages):
            started = time.perf_counter()
            await read(lists)
            waits.append(time.perf_counter() - started)
        return waits

    return work
