"""Stores under contention: writes take turns with those that they rest on and with no others, in one server by
locks and among several by unique indexes (design: sections 6 and 7)."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

import httpx
import pytest
import pytest_asyncio
from parlant.core.agents import AgentId
from parlant.core.customers import CustomerId
from parlant.core.persistence.document_database import identity_loader_for
from parlant.core.sessions import EventKind, EventSource, Session, _EventDocument

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer, open_stores
from pb_cached.config import CoherenceSettings, StoreSettings
from pb_cached.stores import Stores
from tests import appender
from tests.appender import Appender
from tests.audit import require_whole_commits
from tests.conftest import EXCLUSIVE
from tests.faults import FaultProxy, Gate


def commits(proxy: FaultProxy) -> int:
    """How many there were, over all logs."""
    return sum("_log/records?fields" in exchange.path for exchange in proxy.matching("POST", "/api/collections/"))


OpenServer = Callable[..., AbstractAsyncContextManager[Stores]]


def prefixes(prefix: str) -> StoreSettings:
    return StoreSettings(f"{prefix}_sessions", f"{prefix}_customers", f"{prefix}_variables")


@pytest_asyncio.fixture
async def open_server(proxy: FaultProxy, pocketbase: PocketBaseServer, prefix: str) -> AsyncIterator[OpenServer]:
    """Opens the stores as one more server does: with a connection, a queue and a cache of its own."""
    async with AsyncExitStack() as stack:

        def open_them(coherence: CoherenceSettings = EXCLUSIVE) -> AbstractAsyncContextManager[Stores]:
            http = httpx.AsyncClient(timeout=30)
            stack.push_async_callback(http.aclose)
            return open_stores(
                Config(stores=prefixes(prefix), coherence=coherence),
                connection_params=pocketbase.connection_params | {"url": proxy.url},
                http_client=http,
            )

        yield open_them


@pytest_asyncio.fixture
async def stores(open_server: OpenServer) -> AsyncIterator[Stores]:
    async with open_server() as opened:
        yield opened


async def begin(stores: Stores) -> Session:
    return await stores.session_store.create_session(CustomerId("ida"), AgentId("robin"))


async def say(stores: Stores, session: Session, data: Any = "hello") -> int:
    event = await stores.session_store.create_event(
        session.id, EventSource.CUSTOMER, EventKind.MESSAGE, "trace", data
    )
    return event.offset


async def offsets(stores: Stores, session: Session) -> list[int]:
    """In the order of their numbers; a session lists its events by the clocks of the servers that made them."""
    return sorted(event.offset for event in await stores.session_store.list_events(session.id))


# --- one server ------------------------------------------------------------------------------------------------


async def test_sessions_share_commits(stores: Stores, proxy: FaultProxy) -> None:
    sessions = [await begin(stores) for _ in range(60)]
    await asyncio.gather(*(say(stores, session) for session in sessions))
    before = commits(proxy)
    await asyncio.gather(*(say(stores, session) for session in sessions for _ in range(3)))
    assert commits(proxy) - before <= 8, "180 events of 60 sessions: about 3 commits"
    for session in sessions:
        assert await offsets(stores, session) == [0, 1, 2, 3]


async def test_customers_and_values_share_commits(stores: Stores, proxy: FaultProxy) -> None:
    customers = [await stores.customer_store.create_customer(f"customer {n}") for n in range(40)]
    variable = await stores.variable_store.create_variable("plan")
    before = commits(proxy)
    await asyncio.gather(
        *(stores.customer_store.upsert_extra(customer.id, {"city": "Lindau"}) for customer in customers),
        *(stores.variable_store.update_value(variable.id, customer.id, {"seat": 61}) for customer in customers),
    )
    assert commits(proxy) - before <= 8
    assert len(await stores.variable_store.list_values(variable.id)) == 40


async def test_reads_do_not_wait_for_writes(stores: Stores, proxy: FaultProxy, prefix: str) -> None:
    session, other = await begin(stores), await begin(stores)
    await say(stores, session), await say(stores, other)
    gate = Gate()
    proxy.plan("POST", f"/api/collections/{prefix}_sessions_events_log/records?fields", gate)
    writing = asyncio.create_task(say(stores, session))
    await gate.reached.wait()
    async with asyncio.timeout(1):
        assert await offsets(stores, other) == await offsets(stores, session) == [0]
        assert (await stores.session_store.read_session(session.id)).id == session.id
    gate.open()
    assert await writing == 1


async def test_locks_are_kept_for_no_longer_than_they_are_needed(stores: Stores) -> None:
    for _ in range(20):
        await say(stores, await begin(stores))
    gc.collect()
    assert len(stores.session_store._turns) == 0


# --- several servers -------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_servers_that_write_to_the_same_sessions_leave_offsets_dense_and_unique(
    open_server: OpenServer,
) -> None:
    off = CoherenceSettings(mode="off")
    async with open_server(off) as one, open_server(off) as other:
        sessions = [await begin(one) for _ in range(4)]
        written = await asyncio.gather(
            *(say(server, session, n) for n in range(15) for session in sessions for server in (one, other))
        )
        for number, session in enumerate(sessions):
            assert await offsets(one, session) == list(range(30))
            mine = [offset for at, offset in enumerate(written) if at // 2 % len(sessions) == number]
            assert sorted(mine) == list(range(30)), "each writer was told the offset that its event has"


async def test_a_server_that_is_not_as_alone_as_it_believes_catches_up_when_it_clashes(
    open_server: OpenServer,
) -> None:
    async with open_server() as believer, open_server() as other:
        session = await begin(believer)
        assert await say(believer, session) == 0
        assert await say(other, session) == 1
        assert await say(believer, session) == 2
        assert await offsets(believer, session) == [0, 1, 2]


async def test_a_value_that_two_servers_set_at_once_is_one_value(open_server: OpenServer) -> None:
    off = CoherenceSettings(mode="off")
    async with open_server(off) as one, open_server(off) as other:
        variable = await one.variable_store.create_variable("plan")
        await asyncio.gather(
            *(
                server.variable_store.update_value(variable.id, "ida", n)
                for n in range(5)
                for server in (one, other)
            )
        )
        ((key, _),) = await one.variable_store.list_values(variable.id)
        assert key == "ida"


async def test_events_that_share_an_offset_already_are_no_reason_to_stop(
    open_server: OpenServer, pocketbase: PocketBaseServer, prefix: str
) -> None:
    """As an adapter without a unique index left them."""
    async with PocketBaseDocumentDatabase(
        None, pocketbase.connection_params, collection_prefix=f"{prefix}_sessions", config=Config()
    ) as database:
        loader = identity_loader_for(_EventDocument)
        events = await database.get_or_create_collection("events", _EventDocument, loader)
        for id_ in ("a", "b"):
            document = {
                "id": id_, "version": "0.9.0", "creation_utc": "2026", "session_id": "s", "source": "customer",
                "kind": "message", "offset": 0, "trace_id": "", "data": id_, "metadata": None, "deleted": False,
            }  # fmt: skip
            await events.insert_one(document)  # type: ignore[arg-type]
    async with open_server() as stores:
        session = await begin(stores)
        assert [await say(stores, session), await say(stores, session)] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["log", "batch"])
async def test_three_processes_at_full_speed_lose_nothing_share_no_offset_and_none_of_them_starves(
    pocketbase: PocketBaseServer, prefix: str, path: appender.Way
) -> None:
    """Some sessions are everybody's, some a process's own."""
    params = pocketbase.connection_params
    async with (
        open_stores(appender.config(prefix, path), connection_params=params) as stores,
        AsyncExitStack() as stack,
        httpx.AsyncClient(
            base_url=pocketbase.url, headers={"Authorization": params["admin_token"]}, timeout=30
        ) as http,
    ):
        shared, *own = [[(await begin(stores)).id for _ in range(3)] for _ in range(4)]
        processes = await asyncio.gather(
            *(
                stack.enter_async_context(Appender.ready(pocketbase, prefix, *shared, *sessions, path=path))
                for sessions in own
            )
        )
        for process in processes:
            process.begin()
        await asyncio.gather(*(process.during(2.0) for process in processes))
        await asyncio.gather(*(process.end() for process in processes))
        written = [len(process.acknowledged) for process in processes]
        for session in (*shared, *itertools.chain.from_iterable(own)):
            events = await stores.session_store.list_events(session)
            assert all(map(appender.is_whole, events))
            told = [
                (offset, id_) for process in processes for of, offset, id_ in process.acknowledged if of == session
            ]
            assert sorted(told) == sorted((event.offset, event.id) for event in events)
            assert sorted(offset for offset, _ in told) == list(range(len(told)))
        assert min(written) >= sum(written) / 9, f"a third of a fair share is the least: {written}"
        for process in processes:
            of_shared = sum(of in shared for of, _, _ in process.acknowledged)
            assert of_shared >= 3, "one who is too late again and again has its turn all the same"
        if path == "log":  # the other one's log does not say what it has done
            await require_whole_commits(http, prefix)
