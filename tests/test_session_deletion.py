"""A session is deleted with all of its events, or not at all: whoever is killed, and at what moment (design:
sections 7 and 10)."""

from __future__ import annotations

import asyncio
import logging
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import pytest_asyncio
from parlant.core.agents import AgentId
from parlant.core.common import ItemNotFoundError, generate_id
from parlant.core.customers import CustomerId
from parlant.core.persistence.common import ObjectId, Where
from parlant.core.sessions import Event, EventId, EventKind, EventSource, Session, SessionId

from pb_cached import Config, PocketBaseServer, open_stores
from pb_cached.collection import DELETED_TOGETHER
from pb_cached.config import CoherenceSettings, StoreSettings, WriteSettings
from pb_cached.errors import OutcomeUnknown, PocketBaseUnavailable
from pb_cached.stores import Stores, deletions
from tests.conftest import EXCLUSIVE
from tests.faults import EVERY, Exchange, FaultProxy, Gate, cut_before

pytestmark = pytest.mark.slow  # each opens stores of its own

EVENTS: Final = 2 * DELETED_TOGETHER + 50
PATIENCE: Final = 30.0
EVERYTHING: Final[Where] = {"version": {"$ne": ""}}
OFF: Final = CoherenceSettings(mode="off")
COHERENCE: Final = pytest.mark.parametrize("coherence", [OFF, EXCLUSIVE], ids=["no cache", "cache"])

OpenServer = Callable[..., AbstractAsyncContextManager[Stores]]


class Listening(logging.Handler):
    """Hears what a store logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._news = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self._news.set()

    def has_heard(self, *parts: str) -> bool:
        return any(all(part in line for part in parts) for line in self.lines)

    async def hear(self, *parts: str) -> None:
        """Return when a line with all of these was logged."""
        async with asyncio.timeout(PATIENCE):
            while not self.has_heard(*parts):
                await self._news.wait()
                self._news.clear()


@pytest.fixture
def listening() -> Listening:
    return Listening()


@pytest.fixture
def logger(listening: Listening, request: pytest.FixtureRequest) -> logging.Logger:
    logger = logging.Logger(request.node.name, logging.INFO)
    logger.addHandler(listening)
    return logger


@pytest.fixture
def prefix() -> str:
    """All tests share the collections, as making them takes seconds; each begins without notes."""
    return "deletion"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes are looked at often."""
    monkeypatch.setattr(deletions, "SWEEP_SECONDS", 0.05)


@pytest_asyncio.fixture
async def open_server(
    pocketbase: PocketBaseServer, logger: logging.Logger, prefix: str
) -> AsyncIterator[OpenServer]:
    """Opens the stores as one more server does: with a connection, a queue and a cache of its own."""
    async with AsyncExitStack() as stack:

        def open_them(url: str = pocketbase.url, **sections: Any) -> AbstractAsyncContextManager[Stores]:
            http = httpx.AsyncClient(timeout=30, trust_env=False)
            stack.push_async_callback(http.aclose)
            sections.setdefault("coherence", OFF)
            return open_stores(
                Config(stores=prefixes(prefix), **sections),
                logger=logger,
                connection_params=pocketbase.connection_params | {"url": url},
                http_client=http,
            )

        async with open_them() as stores:
            await stores.session_store._deletions._notes.delete_many(EVERYTHING)
        yield open_them


def prefixes(prefix: str) -> StoreSettings:
    return StoreSettings(f"{prefix}_sessions", f"{prefix}_customers", f"{prefix}_variables")


async def begin(stores: Stores) -> Session:
    return await stores.session_store.create_session(CustomerId("ida"), AgentId("robin"))


async def say(stores: Stores, session: SessionId, data: Any = "hello") -> None:
    await stores.session_store.create_event(session, EventSource.CUSTOMER, EventKind.MESSAGE, "trace", data)


async def a_long_session(stores: Stores, events: int = EVENTS) -> SessionId:
    """Its events are written together."""
    session = await begin(stores)
    store = stores.session_store
    said = [
        Event(
            EventId(generate_id()),
            EventSource.CUSTOMER,
            EventKind.MESSAGE,
            datetime.now(UTC),
            offset,
            "trace",
            {"message": "hello"},
            {},
            deleted=False,
        )
        for offset in range(events)
    ]
    inserts = (store._event_collection.insert_one(store._serialize_event(event, session.id)) for event in said)
    await asyncio.gather(*inserts)
    return session.id


async def left_of(stores: Stores, session: SessionId) -> int:
    """How many events lie in the collection, also where the store would not look."""
    return (await stores.session_store._event_collection.find({"session_id": {"$eq": session}})).total_count


async def notes_of(stores: Stores, session: SessionId) -> list[Any]:
    return list(await stores.session_store._deletions._notes.find({"session_id": {"$eq": session}}))


async def is_there(stores: Stores, session: SessionId) -> bool:
    try:
        await stores.session_store.read_session(session)
    except ItemNotFoundError:
        return False
    return True


async def all_is_finished(stores: Stores) -> None:
    """Return when the store has nothing more to do about deletions."""
    task = stores.session_store._deletions._task
    assert task is not None
    async with asyncio.timeout(PATIENCE):
        await asyncio.shield(task)


def no_longer_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nobody counts on an event that another server may be writing."""
    monkeypatch.setattr(deletions, "LATE_SECONDS", 0.0)


def is_commit(exchange: Exchange) -> bool:
    is_beat = b'"layout":"beat"' in exchange.body
    by_path = "_log/records" in exchange.path or exchange.path == "/api/batch"
    return exchange.method == "POST" and by_path and not is_beat


def held_from(number: int, gate: Gate) -> Callable[[Exchange], Awaitable[None]]:
    """A plan that holds the commit of this number at the gate, and all until the next one."""
    commits = 0

    async def hold(exchange: Exchange) -> None:
        nonlocal commits
        commits += is_commit(exchange)
        await (gate if commits == number else Exchange.forward)(exchange)

    return hold


class Deathbed:
    """Holds the n-th commit since `armed` was set, and tells that it is reached: before PocketBase learns of it or
    when it has made it."""

    def __init__(self, at: int, made: bool) -> None:
        self.armed = False
        self.reached = asyncio.Event()
        self._at = at
        self._made = made
        self._seen = 0

    async def __call__(self, exchange: Exchange) -> None:
        self._seen += self.armed and is_commit(exchange)
        if not (self.armed and self._seen == self._at):
            await exchange.forward()
            return
        if self._made:
            await exchange.ask_in_vain()
        self.reached.set()
        await asyncio.Event().wait()


VICTIM = textwrap.dedent("""
    import asyncio, sys
    import msgspec
    from pb_cached import Config, open_stores
    from pb_cached.config import StoreSettings

    async def main(url, token, prefix):
        settings = StoreSettings(f"{prefix}_sessions", f"{prefix}_customers", f"{prefix}_variables")
        config = Config(stores=settings)
        async with open_stores(config, connection_params={"url": url, "admin_token": token}) as stores:
            print("open", flush=True)
            session = (await asyncio.to_thread(sys.stdin.readline)).strip()
            await stores.session_store.delete_session(session)
            print("deleted", flush=True)

    asyncio.run(main(*sys.argv[1:]))
""")


async def kill_while_it_deletes(
    pocketbase: PocketBaseServer, proxy: FaultProxy, prefix: str, session: SessionId, deathbed: Deathbed
) -> None:
    proxy.plan("POST", "/api/", deathbed, at=EVERY)
    victim = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", VICTIM, proxy.url, pocketbase.connection_params["admin_token"], prefix),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=Path(__file__).parent.parent,
    )
    assert victim.stdout is not None and victim.stdin is not None
    async with asyncio.timeout(PATIENCE):
        assert await victim.stdout.readline() == b"open\n"
        deathbed.armed = True
        victim.stdin.write(f"{session}\n".encode())
        await deathbed.reached.wait()
        victim.kill()
        rest, _ = await victim.communicate()
    assert rest == b"", "it was to be killed before it had deleted the session"


@pytest.mark.parametrize(
    ("commit", "made", "deleted"),
    [
        pytest.param(1, False, False, id="before its note is written", marks=pytest.mark.slow),
        pytest.param(1, True, False, id="with its note written", marks=pytest.mark.slow),
        pytest.param(2, False, False, id="before the session is deleted", marks=pytest.mark.slow),
        pytest.param(2, True, True, id="with the session deleted, and none of its events"),
        pytest.param(3, True, True, id="with some events deleted", marks=pytest.mark.slow),
        pytest.param(5, True, True, id="with all events deleted", marks=pytest.mark.slow),
    ],
)
async def test_a_deletion_whose_process_is_killed_is_finished_by_the_next_opening_or_has_not_happened(
    pocketbase: PocketBaseServer,
    proxy: FaultProxy,
    open_server: OpenServer,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    commit: int,
    made: bool,
    deleted: bool,
) -> None:
    async with open_server() as stores:
        session = await a_long_session(stores)
    await kill_while_it_deletes(pocketbase, proxy, prefix, session, Deathbed(commit, made))
    no_longer_late(monkeypatch)
    async with open_server() as stores:
        assert await is_there(stores, session) is not deleted
        await all_is_finished(stores)
        assert await is_there(stores, session) is not deleted
        assert await left_of(stores, session) == (0 if deleted else EVENTS)
        if deleted:
            assert await notes_of(stores, session) == []
            return
        # Whatever note there is of it stays without effect, until the session is deleted after all.
        await say(stores, session, "and on")
        assert len(await stores.session_store.list_events(session)) == EVENTS + 1
        await stores.session_store.delete_session(session)
        await all_is_finished(stores)
        assert await left_of(stores, session) == 0
        assert await notes_of(stores, session) == []


@COHERENCE
async def test_a_deletion_that_pocketbase_left_alone_is_finished_by_the_same_store_when_it_is_back(
    proxy: FaultProxy,
    open_server: OpenServer,
    listening: Listening,
    monkeypatch: pytest.MonkeyPatch,
    coherence: CoherenceSettings,
) -> None:
    gate = Gate()
    impatient = WriteSettings(deadline=0.5)
    async with open_server(proxy.url, writes=impatient, coherence=coherence) as stores:
        session = await a_long_session(stores)
        proxy.plan("POST", "/api/", held_from(3, gate), at=EVERY)
        deletion = asyncio.create_task(stores.session_store.delete_session(session))
        await gate.reached.wait()
        async with proxy.down():
            proxy.forget_plans()
            await deletion
            assert listening.has_heard("events are deleted later", session)
        no_longer_late(monkeypatch)
        await all_is_finished(stores)
        assert not await is_there(stores, session)
        assert await left_of(stores, session) == 0
        assert await notes_of(stores, session) == []


async def test_a_session_that_pocketbase_did_not_delete_is_not_deleted_later(
    proxy: FaultProxy, open_server: OpenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller was told that it failed, and goes on with the session."""
    no_longer_late(monkeypatch)
    async with open_server(proxy.url, writes=WriteSettings(deadline=0.5)) as stores:
        session = await a_long_session(stores, 3)
        proxy.plan("POST", "/api/", cut_before, at=range(2, 1000))
        with pytest.raises((PocketBaseUnavailable, OutcomeUnknown)):
            await stores.session_store.delete_session(session)
        proxy.forget_plans()
        assert len(await notes_of(stores, session)) == 1
        await all_is_finished(stores)
        await say(stores, session)
        assert len(await stores.session_store.list_events(session)) == 4


async def test_many_servers_that_finish_the_same_deletion_do_not_disturb_each_other(
    pocketbase: PocketBaseServer, proxy: FaultProxy, open_server: OpenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_server() as stores:
        session = await a_long_session(stores)
        await leave_to_others(stores, session)
    no_longer_late(monkeypatch)
    async with AsyncExitStack() as stack:
        servers = await asyncio.gather(*(stack.enter_async_context(open_server()) for _ in range(4)))
        await asyncio.gather(*map(all_is_finished, servers))
        for stores in servers:
            assert await left_of(stores, session) == 0
            assert await notes_of(stores, session) == []


async def leave_to_others(stores: Stores, session: SessionId) -> None:
    """As a server does that is killed when it has deleted the session."""
    store = stores.session_store
    note: Any = {
        "id": ObjectId(generate_id()),
        "creation_utc": "2026-01-01T00:00:00+00:00",
        "version": deletions.Deletions.VERSION.to_string(),
        "session_id": session,
    }
    await store._deletions._notes.insert_one(note)
    await store._session_collection.delete_one({"id": {"$eq": ObjectId(session)}})


async def test_an_event_that_another_server_writes_late_is_deleted_too(
    proxy: FaultProxy, open_server: OpenServer, listening: Listening, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    """It has seen the session a moment before it was deleted."""
    gate, looked_again = Gate(), asyncio.Event()

    async def tell(exchange: Exchange) -> None:
        looked_again.set()
        await exchange.forward()

    async with open_server(proxy.url) as one, open_server(proxy.url) as other:
        session = await a_long_session(one, 3)
        proxy.plan("POST", "/api/", gate)
        late = asyncio.create_task(say(other, session, "late"))
        await gate.reached.wait()
        await one.session_store.delete_session(session)
        assert await left_of(one, session) == 0
        # By the fifth request the notes have been looked at, and what they say has been done, once at least.
        proxy.plan("GET", f"/api/collections/{prefix}_sessions_deletions/records", tell, at=(5,))
        async with asyncio.timeout(PATIENCE):
            await looked_again.wait()
        gate.open()
        await late
        await listening.hear("are deleted", session)
        assert await left_of(one, session) == 0
        assert len(await notes_of(one, session)) == 1, "it may not have been the last"
        no_longer_late(monkeypatch)
        await all_is_finished(one)
        assert await notes_of(one, session) == []


@COHERENCE
async def test_while_events_are_being_deleted_nobody_finds_the_session_or_any_of_them(
    proxy: FaultProxy, open_server: OpenServer, coherence: CoherenceSettings
) -> None:
    async with open_server(proxy.url, coherence=coherence) as stores:
        session = await a_long_session(stores)
        (first, *_) = await stores.session_store.list_events(session)
        gate = Gate()
        proxy.plan("POST", "/api/", held_from(4, gate), at=EVERY)
        deletion = asyncio.create_task(stores.session_store.delete_session(session))
        await gate.reached.wait()
        store = stores.session_store
        too_late = asyncio.create_task(say(stores, session, "too late"))  # waits for its turn
        reads: list[Callable[[], Awaitable[Any]]] = [
            lambda: store.read_session(session),
            lambda: store.list_events(session),
            lambda: store.read_event(session, first.id),
        ]
        for read in reads:
            with pytest.raises(ItemNotFoundError):
                await read()
        assert session not in {found.id for found in (await store.list_sessions()).items}
        gate.open()
        await deletion
        with pytest.raises(ItemNotFoundError):
            await too_late
        assert await left_of(stores, session) == 0


async def test_a_reader_never_gets_a_part_of_a_sessions_events_while_it_is_deleted(
    proxy: FaultProxy, open_server: OpenServer, prefix: str
) -> None:
    async with open_server(proxy.url) as stores:
        session = await a_long_session(stores, 20)
        gate = Gate()
        proxy.plan("GET", f"/api/collections/{prefix}_sessions_events/records", gate)
        reader = asyncio.create_task(stores.session_store.list_events(session))
        await gate.reached.wait()  # it has seen the session
        await stores.session_store.delete_session(session)
        gate.open()
        with pytest.raises(ItemNotFoundError):
            await reader


async def test_a_caller_who_leaves_does_not_stop_the_deletion(open_server: OpenServer) -> None:
    async with open_server() as stores:
        session = await a_long_session(stores, 20)
        caller = asyncio.create_task(stores.session_store.delete_session(session))
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait([caller])
    async with open_server() as stores:
        assert not await is_there(stores, session)
        assert await left_of(stores, session) == 0


async def test_closing_leaves_what_others_began_to_the_next_opening(
    proxy: FaultProxy, open_server: OpenServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_server() as stores:
        session = await a_long_session(stores)
        await leave_to_others(stores, session)
    gate = Gate()

    async def hold_the_events(exchange: Exchange) -> None:
        await (gate if "session_id" in exchange.path else Exchange.forward)(exchange)

    proxy.plan("GET", f"/api/collections/{prefix}_sessions_events/records", hold_the_events, at=EVERY)
    async with asyncio.timeout(PATIENCE), open_server(proxy.url) as stores:
        await gate.reached.wait()
    assert not gate.is_open
    no_longer_late(monkeypatch)
    async with open_server() as stores:
        await all_is_finished(stores)
        assert await left_of(stores, session) == 0


async def test_many_events_are_deleted_by_few_requests_none_of_which_is_large(
    proxy: FaultProxy, open_server: OpenServer, prefix: str
) -> None:
    async with open_server(proxy.url, coherence=EXCLUSIVE) as stores:
        session = await a_long_session(stores, 1000)
        before = len(proxy.exchanges)
        await stores.session_store.delete_session(session)
        after = len(proxy.exchanges)
        asked = [e for e in proxy.exchanges[before:after] if f"{prefix}_sessions_events/" in e.path]
        commits = sum(map(is_commit, proxy.exchanges[before:after]))
        largest = stores.stats().sessions.writes.commit_records_max
        assert await left_of(stores, session) == 0
    pages = 1000 / DELETED_TOGETHER + 2
    assert len(asked) <= pages
    assert commits <= 2 + pages
    assert largest <= DELETED_TOGETHER
    assert all(f"perPage={size}" in e.path for e, size in zip(asked, [100, 200, 200, 200, 200, 200], strict=True))


async def test_opening_looks_for_notes_and_for_nothing_else(
    proxy: FaultProxy, open_server: OpenServer, prefix: str
) -> None:
    """However much is stored, and whatever of it was deleted long ago."""

    async def requests_to_open() -> list[str]:
        async with open_server(proxy.url) as stores:
            await all_is_finished(stores)
            return [e.path for e in proxy.exchanges if f"{prefix}_sessions_" in e.path]

    async with open_server() as stores:
        await a_long_session(stores, 1)
    proxy.exchanges.clear()
    before = await requests_to_open()
    async with open_server() as stores:
        for _ in range(5):
            await a_long_session(stores, 20)
    proxy.exchanges.clear()
    after = await requests_to_open()
    assert len(after) == len(before)
    assert not [path for path in after if "session_id" in path]
