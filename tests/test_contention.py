"""Stores under contention: writes take turns with those that they rest on and with no others, in one server by
locks and among several by unique indexes (design: sections 6 and 7)."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, Final, Literal

import httpx
import msgspec
import pytest
import pytest_asyncio
from parlant.core.agents import AgentId
from parlant.core.async_utils import Timeout
from parlant.core.context_variables import ContextVariableDocumentStore
from parlant.core.customers import CustomerId
from parlant.core.persistence.common import ObjectId
from parlant.core.persistence.document_database import identity_loader_for
from parlant.core.persistence.document_database_helper import MetadataDocument, load_metadata_document
from parlant.core.sessions import EventKind, EventSource, Session, _EventDocument
from parlant.core.tags import TagId

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer, open_stores
from pb_cached.config import CoherenceSettings, PocketBaseSettings, StoreSettings
from pb_cached.errors import OutcomeUnknown, RecordNotFound, UniqueViolation
from pb_cached.stores import Stores, appends
from tests import appender
from tests.appender import Appender
from tests.audit import require_whole_commits
from tests.conftest import EXCLUSIVE
from tests.faults import EVERY, FaultProxy, Gate, Valve, answer

pytestmark = pytest.mark.slow  # each opens stores of its own

OFF: Final = CoherenceSettings(mode="off")
REALTIME: Final = CoherenceSettings(mode="realtime")
EVERY_READ: Final = Config(coherence=OFF)


def commits(proxy: FaultProxy) -> int:
    """How many there were, over all logs."""
    return sum("_log/records?commit" in exchange.path for exchange in proxy.matching("POST", "/api/collections/"))


OpenServer = Callable[..., AbstractAsyncContextManager[Stores]]


def prefixes(prefix: str) -> StoreSettings:
    return StoreSettings(f"{prefix}_sessions", f"{prefix}_customers", f"{prefix}_variables")


@pytest_asyncio.fixture
async def open_server(proxy: FaultProxy, pocketbase: PocketBaseServer, prefix: str) -> AsyncIterator[OpenServer]:
    """Opens the stores as one more server does: with a connection, a queue and a cache of its own."""
    async with AsyncExitStack() as stack:

        def open_them(
            coherence: CoherenceSettings = EXCLUSIVE, **sections: Any
        ) -> AbstractAsyncContextManager[Stores]:
            http = httpx.AsyncClient(timeout=30)
            stack.push_async_callback(http.aclose)
            return open_stores(
                Config(stores=prefixes(prefix), coherence=coherence, **sections),
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
    proxy.plan("POST", f"/api/collections/{prefix}_sessions_events_log/records?commit", gate)
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


@pytest.mark.soak
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


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["off", "realtime"])
async def test_what_servers_add_to_one_column_at_once_is_all_there(
    open_server: OpenServer, mode: Literal["off", "realtime"]
) -> None:
    """Parlant reads the column, and writes all of it."""
    of = CoherenceSettings(mode=mode)
    async with open_server(of) as one, open_server(of) as other, open_server(OFF) as reader:
        session = await begin(one)
        customer = await one.customer_store.create_customer("ida")
        for server in (one, other):  # both have it in their caches
            await server.session_store.read_session(session.id)
            await server.customer_store.read_customer(customer.id)
        names = [f"{at}{n}" for n in range(5) for at in "ab"]
        servers = dict(zip(names, itertools.cycle((one, other)), strict=False))
        await asyncio.gather(
            *(server.session_store.set_metadata(session.id, name, name) for name, server in servers.items()),
            *(server.session_store.upsert_labels(session.id, {name}) for name, server in servers.items()),
            *(server.customer_store.upsert_extra(customer.id, {name: name}) for name, server in servers.items()),
        )
        written = await reader.session_store.read_session(session.id)
        assert sorted(written.metadata) == sorted(written.labels) == sorted(names)
        assert sorted((await reader.customer_store.read_customer(customer.id)).extra) == sorted(names)
        await asyncio.gather(
            *(server.session_store.unset_metadata(session.id, name) for name, server in servers.items()),
            *(server.session_store.remove_labels(session.id, {name}) for name, server in servers.items()),
            *(server.customer_store.remove_extra(customer.id, [name]) for name, server in servers.items()),
        )
        written = await reader.session_store.read_session(session.id)
        assert not written.metadata
        assert not written.labels
        assert not (await reader.customer_store.read_customer(customer.id)).extra


async def test_what_a_person_changes_between_a_methods_reading_and_its_commit_is_kept(
    open_server: OpenServer, pocketbase: PocketBaseServer, proxy: FaultProxy, prefix: str
) -> None:
    collection = f"/api/collections/{prefix}_sessions_sessions/records"
    token = {"Authorization": pocketbase.connection_params["admin_token"]}
    async with (
        open_server() as stores,
        httpx.AsyncClient(base_url=pocketbase.url, headers=token, timeout=30) as dashboard,
    ):
        session = await begin(stores)
        await stores.session_store.set_metadata(session.id, "first", 1)
        (record,) = (await dashboard.get(collection)).json()["items"]
        gate = Gate()
        proxy.plan("POST", f"/api/collections/{prefix}_sessions_sessions_log/records?commit", gate)
        setting = asyncio.create_task(stores.session_store.set_metadata(session.id, "ours", 2))
        await gate.reached.wait()
        edited = record | {"metadata": record["metadata"].replace("1", "1000")}
        (await dashboard.patch(f"{collection}/{record['id']}", json=edited)).raise_for_status()
        gate.open()
        assert dict((await setting).metadata) == {"first": 1000, "ours": 2}


async def test_whole_values_that_servers_set_at_once_do_not_fail_and_one_of_them_is_last(
    open_server: OpenServer,
) -> None:
    async with open_server(OFF) as one, open_server(OFF) as other:
        session = await begin(one)
        await asyncio.gather(
            *(
                server.session_store.update_session(session.id, {"title": f"{n}", "metadata": {"n": n}})
                for n in range(5)
                for server in (one, other)
            )
        )
        last = await one.session_store.read_session(session.id)
        assert last.metadata == {"n": int(last.title or "")}


async def test_without_comparison_an_update_still_contains_what_was_acknowledged_before_it(
    open_server: OpenServer, proxy: FaultProxy
) -> None:
    """Also where the cache has not heard of it yet."""
    by_batch = PocketBaseSettings(commit="batch")
    async with open_server(OFF, pocketbase=by_batch) as other:
        session = await begin(other)
        valve = Valve()
        proxy.plan("GET", "/api/realtime", valve, at=EVERY)
        async with open_server(CoherenceSettings(mode="realtime"), pocketbase=by_batch) as server:
            await server.session_store.read_session(session.id)
            valve.is_shut = True
            await other.session_store.set_metadata(session.id, "other", 1)
            assert not (await server.session_store.read_session(session.id)).metadata, "the cache has heard of it"
            written = await server.session_store.set_metadata(session.id, "own", 2)
            assert dict(written.metadata) == {"other": 1, "own": 2}


@pytest.mark.soak
@pytest.mark.parametrize("commit", ["log", "batch"])
async def test_servers_that_open_a_fresh_store_at_once_tell_its_version_once(
    open_server: OpenServer, pocketbase: PocketBaseServer, prefix: str, commit: Literal["log", "batch"]
) -> None:
    async def serve() -> None:
        async with open_server(OFF, pocketbase=PocketBaseSettings(commit=commit)):
            pass

    await asyncio.gather(*(serve() for _ in range(3)))
    for store in ("sessions", "customers", "variables"):
        async with PocketBaseDocumentDatabase(
            None, pocketbase.connection_params, collection_prefix=f"{prefix}_{store}", config=EVERY_READ
        ) as database:
            metadata = await database.get_or_create_collection(
                "metadata", MetadataDocument, load_metadata_document
            )
            assert (await metadata.find({})).total_count == 1


async def test_several_metadata_documents_that_are_there_already_are_no_reason_to_stop(
    open_server: OpenServer,
    pocketbase: PocketBaseServer,
    prefix: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As servers of an older version left them."""
    async with PocketBaseDocumentDatabase(
        None, pocketbase.connection_params, collection_prefix=f"{prefix}_variables", config=EVERY_READ
    ) as database:
        metadata = await database.get_or_create_collection("metadata", MetadataDocument, load_metadata_document)
        version = ContextVariableDocumentStore.VERSION.to_string()
        for id_ in ("a", "b"):
            await metadata.insert_one({"id": ObjectId(id_), "creation_utc": "2026", "version": version})
    async with open_server() as stores:
        assert (await stores.variable_store.create_variable("plan")).name == "plan"
    assert "several metadata documents" in capsys.readouterr().err


@pytest.mark.soak
async def test_a_variable_that_servers_define_at_once_is_one_variable_with_each_tag_once(
    open_server: OpenServer,
) -> None:
    async with open_server(OFF) as one, open_server(OFF) as other:
        for n in range(3):
            defined = await asyncio.gather(
                *(
                    server.variable_store.create_variable(f"plan {n}", tags=[TagId("vip"), TagId("new")])
                    for server in (one, other)
                )
            )
            assert defined[0].id == defined[1].id
        variables = await one.variable_store.list_variables()
        assert sorted(variable.name for variable in variables) == ["plan 0", "plan 1", "plan 2"]
        assert all(sorted(variable.tags) == ["new", "vip"] for variable in variables)


@pytest.mark.soak
async def test_of_servers_that_write_to_one_hot_session_none_stands_still(open_server: OpenServer) -> None:
    async with open_server(REALTIME) as one, open_server(REALTIME) as other:
        session = await begin(one)
        total = 4500
        # Both know the session: who comes to it anew reads it first.
        by_offset = {await say(server, session): number for number, server in enumerate((one, other))}

        async def write(server: Stores, number: int) -> None:
            while len(by_offset) < total:
                by_offset[await say(server, session)] = number

        async with asyncio.timeout(60):
            await asyncio.gather(
                *(write(server, number) for number, server in enumerate((one, other)) for _ in range(30))
            )
        assert sorted(by_offset) == list(range(len(by_offset)))
        writers = [by_offset[offset] for offset in range(len(by_offset))]
        runs = [len(list(run)) for _, run in itertools.groupby(writers)]
        assert min(writers.count(0), writers.count(1)) >= total / 3
        assert max(runs) <= total / 10, f"one wrote {max(runs)} events while the other one waited"
        refused = [server.stats().sessions.writes.refused for server in (one, other)]
        assert sum(refused) <= 10, "who is too late once leaves the numbers to PocketBase"


# --- offsets that PocketBase gives -----------------------------------------------------------------------------


@pytest.fixture
def long_contention(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is."""
    monkeypatch.setattr(appends, "CONTENDED_SECONDS", 600.0)


@pytest_asyncio.fixture
async def contended(
    open_server: OpenServer, long_contention: None
) -> AsyncIterator[tuple[Stores, Stores, Session]]:
    """Two servers, and a session that the first one knows to be written to by the other one too."""
    async with open_server() as believer, open_server(REALTIME) as other:
        session = await begin(believer)
        assert await say(believer, session, "a") == 0
        assert await say(other, session, "b") == 1
        assert await say(believer, session, "c") == 2  # refused at first
        assert believer.stats().sessions.writes.refused == 1
        yield believer, other, session


async def test_who_was_too_late_leaves_the_numbers_to_pocketbase_and_is_not_too_late_again(
    contended: tuple[Stores, Stores, Session],
) -> None:
    believer, other, session = contended
    for number in range(5):
        assert await say(other, session) == 3 + 4 * number
        told = await asyncio.gather(*(say(believer, session, n) for n in range(3)))
        assert told == [4 + 4 * number + place for place in range(3)], "in the order of the calls"
    assert believer.stats().sessions.writes.refused == 1
    for server in (believer, other):
        events = await server.session_store.list_events(session.id)
        assert [event.offset for event in events] == list(range(23))
    assert await say(believer, session) == 23


async def test_a_session_that_others_leave_alone_is_numbered_here_again(
    contended: tuple[Stores, Stores, Session], proxy: FaultProxy, prefix: str
) -> None:
    believer, other, session = contended

    async def reads_of(saying: Awaitable[int]) -> int:
        before = proxy.count("GET", f"/api/collections/{prefix}_sessions_events/records?filter=id")
        await saying
        return proxy.count("GET", f"/api/collections/{prefix}_sessions_events/records?filter=id") - before

    contention = believer.session_store._appends._contended
    until = contention[session.id].until
    assert await reads_of(say(believer, session)) == 1, "its number"
    assert contention[session.id].until == until, "nobody else has written since"
    await say(other, session)
    assert await reads_of(say(believer, session)) == 1
    assert contention[session.id].until > until
    contention[session.id].until = 0.0  # that much time has passed
    await offsets(believer, session)
    assert await reads_of(say(believer, session)) == 0
    assert await offsets(believer, session) == list(range(7))


async def test_events_that_pocketbase_has_numbered_are_shown_by_those_who_follow(
    contended: tuple[Stores, Stores, Session],
) -> None:
    believer, other, session = contended
    await other.session_store.list_events(session.id)  # it is cached there from now on
    events_of_other = other.session_store._events
    read = events_of_other.stats()
    for number in range(3, 10):
        waiting = asyncio.create_task(
            other.session_listener.wait_for_more_events(session.id, min_offset=number, timeout=Timeout(20))
        )
        await asyncio.sleep(0.01)
        assert await say(believer, session, number) == number
        assert await waiting
        events = await other.session_store.list_events(session.id, min_offset=number)
        assert [(event.offset, event.data) for event in events] == [(number, number)]
    now = events_of_other.stats()
    assert read is not None
    assert now is not None
    assert now.through == read.through, "out of the cache"


async def test_an_event_that_is_deleted_before_its_number_is_known_is_said_to_be_gone(
    contended: tuple[Stores, Stores, Session], proxy: FaultProxy, prefix: str
) -> None:
    believer, other, session = contended
    gate = Gate()
    proxy.plan("GET", f"/api/collections/{prefix}_sessions_events/records?filter=id", gate)
    saying = asyncio.create_task(say(believer, session))
    await gate.reached.wait()
    await other.session_store.delete_session(session.id)
    gate.open()
    with pytest.raises(RecordNotFound, match="deleted as soon as it was there"):
        await saying
    assert await other.session_store.list_sessions() == await believer.session_store.list_sessions()


async def test_a_number_that_cannot_be_read_leaves_the_outcome_unknown_and_the_event_there(
    open_server: OpenServer, proxy: FaultProxy, prefix: str, long_contention: None
) -> None:
    impatient = PocketBaseSettings(retry_for=0.5)
    async with open_server(pocketbase=impatient) as believer, open_server(OFF) as other:
        session, innocent = await begin(believer), await begin(believer)
        await say(believer, innocent)
        for server in (believer, other, believer):
            await say(server, session)
        proxy.plan("GET", f"/api/collections/{prefix}_sessions_events/records?filter=id", answer(503), at=EVERY)
        told = await asyncio.gather(say(believer, session), say(believer, innocent), return_exceptions=True)
        assert isinstance(told[0], OutcomeUnknown)
        assert "it was committed, but what PocketBase made of it could not be read" in str(told[0])
        assert told[1] == 1, "what shares its commit is none the worse"
        proxy.forget_plans()
        assert await offsets(believer, session) == await offsets(other, session) == [0, 1, 2, 3]
        assert await say(believer, session) == 4


async def test_what_pocketbase_numbers_is_not_blamed_for_what_else_is_in_its_commit(
    open_server: OpenServer, pocketbase: PocketBaseServer, prefix: str
) -> None:
    async with open_server() as stores:
        session, other = await begin(stores), await begin(stores)
        for number in range(2):
            assert await say(stores, session) == number
            assert await say(stores, other) == number
        events = stores.session_store._events

        def document(of: Session, offset: int) -> dict[str, Any]:
            return {
                "id": f"{of.id} {offset}", "version": "0.9.0", "creation_utc": "2026-11-26T00:00:00+00:00",
                "session_id": of.id,
                "source": "customer", "kind": "message", "offset": offset, "trace_id": "", "data": offset,
                "metadata": {}, "deleted": False,
            }  # fmt: skip

        told: list[Any] = await asyncio.gather(
            events.commit([events.codec.append(document(session, n), "offset", n) for n in (1, 2)]),
            events.commit([events.codec.insert(document(other, 1))]),
            events.commit([events.codec.append(document(await begin(stores), 0), "offset", 1)]),
            return_exceptions=True,
        )
        appended, taken, fresh = told
        assert isinstance(taken, UniqueViolation)
        assert [msgspec.json.decode(reply.record or b"")["offset"] for reply in (*appended, *fresh)] == [2, 3, 0]
        assert await offsets(stores, session) == [0, 1, 2, 3]
        assert await say(stores, session) == 4


# --- what was there before -------------------------------------------------------------------------------------


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


@pytest.mark.soak
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
