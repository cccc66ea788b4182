"""Events of one session that come all at once: whatever becomes of some of them, no reader finds an event whose
predecessor is missing, or may still come; and what waits for its turn waits within bounds, and is waited for by
`flush` and when a store closes (design: section 6)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, Literal, cast

import httpx
import pytest
import pytest_asyncio
from parlant.core.sessions import EventKind

from pb_cached import Config, PocketBaseServer, open_stores
from pb_cached.config import PocketBaseSettings, WriteSettings
from pb_cached.errors import (
    DocumentTooLarge,
    NotCommitted,
    OutcomeUnknown,
    PBCachedError,
    PocketBaseUnavailable,
    QueueFull,
)
from pb_cached.stores import Stores
from tests.conftest import EXCLUSIVE
from tests.faults import EVERY, Exchange, FaultProxy, Gate, at_most
from tests.test_contention import begin, offsets, prefixes, say

pytestmark = pytest.mark.slow  # each opens stores of its own

TOO_LARGE = b'{"data":{},"message":"too large","status":413}'

OpenServer = Callable[..., AbstractAsyncContextManager[Stores]]


@pytest_asyncio.fixture
async def open_server(proxy: FaultProxy, pocketbase: PocketBaseServer, prefix: str) -> AsyncIterator[OpenServer]:
    """Opens the stores behind the proxy."""
    async with AsyncExitStack() as stack:

        def open_them(
            commit: Literal["log", "batch"] = "log", **writes: Any
        ) -> AbstractAsyncContextManager[Stores]:
            http = httpx.AsyncClient(timeout=30)
            stack.push_async_callback(http.aclose)
            return open_stores(
                Config(
                    stores=prefixes(prefix),
                    coherence=EXCLUSIVE,
                    pocketbase=PocketBaseSettings(commit=commit),
                    writes=WriteSettings(**writes),
                ),
                connection_params=pocketbase.connection_params | {"url": proxy.url},
                http_client=http,
            )

        yield open_them


@pytest.fixture
def commits(prefix: str) -> str:
    """Where the log path commits events."""
    return f"/api/collections/{prefix}_sessions_events_log/records?commit"


class LateGate(Gate):
    """`passed` is set when PocketBase has answered a request that was held."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = asyncio.Event()

    async def __call__(self, exchange: Exchange) -> None:
        self.reached.set()
        await self._opened.wait()
        async for _ in exchange.ask():
            pass
        self.passed.set()


async def until_done(calls: list[asyncio.Task[Any]]) -> list[Any]:
    async with asyncio.timeout(30):
        return await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.parametrize("commit", ["log", "batch"])
async def test_a_refused_event_fails_alone_and_leaves_no_hole(
    open_server: OpenServer, proxy: FaultProxy, commit: Literal["log", "batch"]
) -> None:
    async with open_server(commit) as stores:
        session = await begin(stores)
        assert await say(stores, session) == 0
        proxy.plan("POST", "/api/", at_most(20_000, TOO_LARGE), at=EVERY)
        written = ["a", "x" * 30_000, "b", object(), "c", "y" * 30_000, *map(str, range(10))]
        told = await asyncio.gather(*(say(stores, session, data) for data in written), return_exceptions=True)
        refused = {n: error for n, error in enumerate(told) if isinstance(error, PBCachedError)}
        assert sorted(refused) == [1, 3, 5]
        assert isinstance(refused[1], DocumentTooLarge)
        assert isinstance(refused[5], DocumentTooLarge)
        assert [offset for offset in told if isinstance(offset, int)] == list(range(1, 14))
        assert await offsets(stores, session) == list(range(14))
        events = await stores.session_store.list_events(session.id)
        assert [event.data for event in events][1:] == [data for n, data in enumerate(written) if n not in refused]


async def test_what_follows_a_commit_of_unknown_outcome_is_never_there_before_it(
    open_server: OpenServer, proxy: FaultProxy, commits: str
) -> None:
    async with open_server(max_commit_records=3, deadline=1.0) as stores:
        session = await begin(stores)
        before, gate = Gate(), LateGate()
        proxy.plan("POST", commits, before)
        first = asyncio.create_task(say(stores, session))
        await before.reached.wait()
        calls = [asyncio.create_task(say(stores, session)) for _ in range(9)]
        await asyncio.sleep(0)  # they wait for their turn, together
        proxy.plan("POST", commits, gate, at=EVERY)
        before.open()
        assert await first == 0
        told = await until_done(calls)
        assert {type(error) for error in told[:3]} == {OutcomeUnknown}
        assert {type(error) for error in told[3:]} == {PocketBaseUnavailable}
        assert await offsets(stores, session) == [0]
        proxy.forget_plans()
        gate.open()  # and the commit arrives after all
        await gate.passed.wait()
        assert await offsets(stores, session) == [0, 1, 2, 3]
        assert await say(stores, session) == 4


async def test_an_event_that_comes_while_an_outcome_is_unknown_takes_its_place_or_follows_it(
    open_server: OpenServer, proxy: FaultProxy, commits: str
) -> None:
    async with open_server(deadline=1.0) as stores:
        session = await begin(stores)
        assert await say(stores, session) == 0
        gate = Gate()
        proxy.plan("POST", commits, gate, at=EVERY)
        with pytest.raises(OutcomeUnknown):
            await say(stores, session, "lost")
        proxy.forget_plans()
        following = asyncio.create_task(say(stores, session, "following"))
        gate.open()
        (offset,) = await until_done([following])
        found = await offsets(stores, session)
        assert found == list(range(offset + 1))


async def test_an_event_that_could_be_written_at_once_does_not_overtake_one_that_waits(
    open_server: OpenServer,
) -> None:
    async with open_server() as stores:
        session = await begin(stores)
        assert await say(stores, session) == 0
        appends = stores.session_store._appends
        appends._contend(session.id)  # so the first one waits for its turn
        first = asyncio.create_task(say(stores, session, "first"))
        asyncio.get_running_loop().call_soon(appends._contended.clear)
        second = asyncio.create_task(say(stores, session, "second"))
        assert [await first, await second] == [1, 2]
        events = await stores.session_store.list_events(session.id, min_offset=1)
        assert [event.data for event in events] == ["first", "second"]


async def test_more_than_a_commit_takes_is_written_in_its_order(open_server: OpenServer) -> None:
    async with open_server(max_commit_records=20) as stores:
        session = await begin(stores)
        calls = [asyncio.create_task(say(stores, session, n)) for n in range(150)]
        assert await until_done(calls) == list(range(150))
        events = await stores.session_store.list_events(session.id)
        assert {event.offset: event.data for event in events} == {n: n for n in range(150)}


# --- bounds ----------------------------------------------------------------------------------------------------


async def test_waiting_for_a_turn_counts_against_the_deadline(
    open_server: OpenServer, proxy: FaultProxy, prefix: str, commits: str
) -> None:
    async with open_server(deadline=1.0) as stores:
        session = await begin(stores)
        assert await say(stores, session) == 0
        proxy.plan("POST", f"/api/collections/{prefix}_sessions_sessions_log", Gate(), at=EVERY)
        proxy.plan("POST", commits, Gate(), at=EVERY)
        setting = [
            asyncio.create_task(stores.session_store.set_metadata(session.id, f"{n}", n)) for n in range(12)
        ]
        began = time.monotonic()
        told = await until_done(setting)
        saying = [asyncio.create_task(say(stores, session)) for _ in range(300)]
        told += await until_done(saying)
        took = time.monotonic() - began
        assert {type(error) for error in told} <= {QueueFull, OutcomeUnknown, PocketBaseUnavailable}
        assert sum(isinstance(error, QueueFull) for error in told) >= 10
        assert took < 8, "each waits for its turn and for its commit, however many there are: 12 s one by one"
        proxy.forget_plans()


async def test_events_that_wait_for_their_turn_count_as_queued(
    open_server: OpenServer, proxy: FaultProxy, commits: str
) -> None:
    async with open_server(max_queued_bytes=100_000) as stores:
        session = await begin(stores)
        assert await say(stores, session) == 0
        gate = Gate()
        proxy.plan("POST", commits, gate)
        calls = [asyncio.create_task(say(stores, session, "x" * 30_000)) for _ in range(40)]
        await gate.reached.wait()
        assert stores.stats().sessions.writes.queued_bytes < 300_000
        assert sum(
            draft.size for drafts in stores.session_store._appends._waiting.values() for draft in drafts
        ) < (150_000)
        gate.open()
        assert sorted(await until_done(calls)) == list(range(1, 41))
        assert stores.session_store._room.records == stores.session_store._room.bytes == 0


@pytest.mark.parametrize("is_contended", [False, True])
async def test_an_event_that_no_event_can_be_made_of_fails_alone_and_holds_nothing_up(
    open_server: OpenServer, is_contended: bool
) -> None:
    async with open_server(deadline=2.0) as stores:
        session, store = await begin(stores), stores.session_store
        assert await say(stores, session) == 0
        if is_contended:
            store._appends._contend(session.id)
        told = await asyncio.gather(
            say(stores, session, "before"),
            store.create_event(session.id, cast(Any, "customer"), EventKind.MESSAGE, "trace", "no source"),
            say(stores, session, "after"),
            return_exceptions=True,
        )
        assert isinstance(told[1], AttributeError)
        assert (told[0], told[2]) == (1, 2)
        await stores.session_store.flush()
        assert (store._room.records, store._calls.under_way, len(store._turns)) == (0, 0, 0)


async def test_flush_waits_for_an_event_that_waited_for_room_when_it_was_called(
    open_server: OpenServer, proxy: FaultProxy, commits: str
) -> None:
    async with open_server(max_queued_records=1) as stores:
        session = await begin(stores)
        assert await say(stores, session) == 0
        gates = [Gate(), Gate()]
        for time_, gate in enumerate(gates, 1):
            proxy.plan("POST", commits, gate, at=(time_,))
        calls = [asyncio.create_task(say(stores, session)) for _ in range(2)]
        await gates[0].reached.wait()
        flushing = asyncio.create_task(stores.session_store.flush())
        gates[0].open()
        await gates[1].reached.wait()
        done, _ = await asyncio.wait([flushing], timeout=0.2)
        assert not done
        gates[1].open()
        await flushing
        assert await until_done(calls) == [1, 2]


async def test_who_finds_no_room_for_an_event_until_the_deadline_is_told_and_nothing_is_written(
    open_server: OpenServer, proxy: FaultProxy, commits: str
) -> None:
    async with open_server(max_queued_records=5, deadline=1.0) as stores:
        session = await begin(stores)
        assert await say(stores, session) == 0
        gate = Gate()
        proxy.plan("POST", commits, gate)
        calls = [asyncio.create_task(say(stores, session, n)) for n in range(30)]
        told = await until_done(calls)
        assert sum(isinstance(error, QueueFull) for error in told) >= 20
        gate.open()
        proxy.forget_plans()
        last = await say(stores, session, "last")
        assert await offsets(stores, session) == list(range(last + 1))
        assert stores.session_store._room.records == 0


# --- flush and closing -----------------------------------------------------------------------------------------


async def test_flush_waits_for_what_waits_for_its_turn(
    open_server: OpenServer, proxy: FaultProxy, commits: str
) -> None:
    async with open_server() as stores:
        session = await begin(stores)
        customer = await stores.customer_store.create_customer("ida")
        variable = await stores.variable_store.create_variable("plan")
        assert await say(stores, session) == 0
        gate = Gate()
        proxy.plan("POST", commits, gate)
        first = asyncio.create_task(say(stores, session))
        await gate.reached.wait()
        calls = [
            *(asyncio.create_task(say(stores, session)) for _ in range(3)),
            asyncio.create_task(stores.session_store.set_metadata(session.id, "a", 1)),
            asyncio.create_task(stores.session_store.set_metadata(session.id, "b", 1)),
        ]
        await asyncio.sleep(0)  # they have begun
        flush = asyncio.create_task(stores.session_store._home.flush())
        await asyncio.sleep(0)
        gate.open()
        await flush
        assert all(call.done() for call in (first, *calls))
        extras = [
            asyncio.create_task(stores.customer_store.upsert_extra(customer.id, {f"{n}": ""})) for n in range(5)
        ]
        values = [asyncio.create_task(stores.variable_store.update_value(variable.id, "ida", n)) for n in range(5)]
        await asyncio.sleep(0)
        for database in stores._databases:
            await database.flush()
        assert all(call.done() for call in (*extras, *values))


async def test_closing_the_stores_takes_no_longer_than_its_timeout_and_says_that_something_was_left(
    open_server: OpenServer, proxy: FaultProxy, prefix: str
) -> None:
    stack = AsyncExitStack()
    stores = await stack.enter_async_context(open_server(close_timeout=1.0))
    session = await begin(stores)
    await stores.session_store.read_session(session.id)
    proxy.plan("POST", f"/api/collections/{prefix}_sessions_sessions_log", Gate(), at=EVERY)
    calls = [asyncio.create_task(stores.session_store.set_metadata(session.id, f"{n}", n)) for n in range(5)]
    await asyncio.sleep(0)
    began = time.monotonic()
    with pytest.raises(NotCommitted, match=r"longer than 1 s.*unknown.*_sessions_sessions"):
        await stack.aclose()
    assert 1.0 <= time.monotonic() - began < 4.0, "each write has a deadline of half a minute"
    assert all(isinstance(error, PBCachedError) for error in await until_done(calls))
