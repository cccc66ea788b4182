"""The log path when a process dies, or PocketBase is put back to an earlier state (design: section 9, rules 1 and
2)."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self, TypedDict

import httpx
import pytest
import pytest_asyncio
from parlant.core.agents import AgentId
from parlant.core.common import Version
from parlant.core.customers import CustomerId
from parlant.core.persistence.common import ObjectId
from parlant.core.persistence.document_database import identity_loader_for
from parlant.core.sessions import SessionId

from pb_cached import PocketBaseDocumentDatabase, PocketBaseServer, open_stores
from pb_cached.errors import CollectionNotFound, PBCachedError, SchemaError
from pb_cached.stores import Stores
from tests.appender import CALLERS, Appender, Way, append, config, is_whole
from tests.audit import require_whole_commits
from tests.faults import FaultProxy, Gate, cut_after

pytestmark = pytest.mark.soak


@pytest_asyncio.fixture
async def http(pocketbase: PocketBaseServer) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": pocketbase.connection_params["admin_token"]}
    async with httpx.AsyncClient(base_url=pocketbase.url, headers=headers, timeout=30) as opened:
        yield opened


async def begin(stores: Stores) -> SessionId:
    return (await stores.session_store.create_session(CustomerId("ida"), AgentId("robin"))).id


async def ids_by_offset(stores: Stores, session: SessionId, *, restored: bool = False) -> list[str]:
    """Fails where a number is missing, or is there twice, or an event is not whole.

    Args:
        restored: a backup was, under writers: an event that was on its way then has the number that followed
            before that, and leaves some out.
    """
    events = sorted(await stores.session_store.list_events(session), key=lambda event: event.offset)
    offsets = [event.offset for event in events]
    assert len(set(offsets)) == len(offsets) if restored else offsets == list(range(len(events)))
    assert all(map(is_whole, events))
    return [event.id for event in events]


@pytest.mark.parametrize("path", ["log", "batch"])
async def test_a_server_that_is_killed_loses_nothing_acknowledged_and_leaves_nothing_half(
    pocketbase: PocketBaseServer, http: httpx.AsyncClient, prefix: str, path: Way
) -> None:
    """Others go on meanwhile, and after."""
    deaths = 4
    async with (
        open_stores(config(prefix, path), connection_params=pocketbase.connection_params) as stores,
        AsyncExitStack() as stack,
    ):
        sessions = [await begin(stores) for _ in range(6)]
        survivor, *victims = await asyncio.gather(
            *(
                stack.enter_async_context(Appender.ready(pocketbase, prefix, *sessions, path=path))
                for _ in range(1 + deaths)
            )
        )
        survivor.begin()
        for victim in victims:
            victim.begin()
            await victim.until(random.randrange(1, 60))
            await victim.kill()
            await survivor.until(len(survivor.acknowledged) + 20)
        await survivor.end()
        found = {session: await ids_by_offset(stores, session) for session in sessions}
        acknowledged = [event for server in (survivor, *victims) for event in server.acknowledged]
        assert all(found[SessionId(session)][offset] == id_ for session, offset, id_ in acknowledged)
        unacknowledged = sum(map(len, found.values())) - len(acknowledged)
        assert unacknowledged <= deaths * len(sessions) * CALLERS, "each caller was waiting for one event"
        if path == "log":  # the other one's log does not say what it has done
            await require_whole_commits(http, prefix)
        for session in sessions:
            assert (await append(stores, session, 0)).offset == len(found[session])


# --- backups ---------------------------------------------------------------------------------------------------


class Backups:
    """PocketBase's own, of a PocketBase that nobody else uses: restoring one is felt by all."""

    def __init__(self, server: PocketBaseServer, http: httpx.AsyncClient) -> None:
        self.server = server
        self.http = http

    async def make(self, name: str) -> None:
        (await self.http.post("/api/backups", json={"name": f"{name}.zip"})).raise_for_status()

    async def restore(self, name: str) -> None:
        """Returns when PocketBase has begun anew: with what it has acknowledged from now on."""
        async with self.http.stream("GET", "/api/realtime") as stream:
            (await self.http.post(f"/api/backups/{name}.zip/restore")).raise_for_status()
            with contextlib.suppress(httpx.TransportError):
                async for _ in stream.aiter_bytes():  # ends when PocketBase does
                    pass
        while True:
            with contextlib.suppress(httpx.TransportError):
                (await self.http.get("/api/health")).raise_for_status()
                return
            await asyncio.sleep(0.01)


@pytest_asyncio.fixture
async def backups(folder: Path) -> AsyncIterator[Backups]:
    async with PocketBaseServer(folder) as server:
        headers = {"Authorization": server.connection_params["admin_token"]}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=30) as http:
            yield Backups(server, http)


class Callers:
    """They append to the same sessions for as long as the context lasts, and see no error meanwhile."""

    def __init__(self, stores: Stores, sessions: list[SessionId]) -> None:
        self._stores = stores
        self._sessions = sessions
        self._tasks: list[asyncio.Task[None]] = []
        self._ending = False
        self._more = asyncio.Condition()
        self.acknowledged: list[tuple[int, SessionId, str]] = []
        """The moment in which the write began, the session, and the event's id."""

    @property
    def now(self) -> int:
        return len(self.acknowledged)

    async def until(self, begun_and_acknowledged: int) -> None:
        """Return when so many events have been acknowledged whose writes have begun from now on."""
        since = self.now
        async with self._more:
            await self._more.wait_for(
                lambda: (
                    sum(begun >= since for begun, _, _ in self.acknowledged) >= begun_and_acknowledged
                    or any(task.done() for task in self._tasks)
                )
            )

    async def _append(self, session: SessionId, caller: int) -> None:
        while not self._ending:
            begun = self.now
            event = await append(self._stores, session, begun * 100 + caller)
            await self._stores.session_store.set_metadata(session, f"caller{caller}", begun)
            async with self._more:
                self.acknowledged.append((begun, session, event.id))
                self._more.notify_all()

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._append(session, caller)) for session in self._sessions for caller in range(3)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ending = True
        await asyncio.gather(*self._tasks)


async def test_a_restored_backup_holds_whole_commits_and_swallows_no_write(backups: Backups, prefix: str) -> None:
    """Under a database that stays open and at work, and for one that is opened then."""
    params = backups.server.connection_params
    async with open_stores(config(prefix), connection_params=params) as stores:
        sessions = [await begin(stores) for _ in range(4)]
        async with Callers(stores, sessions) as callers:
            await callers.until(50)
            backed_up_from = callers.now
            await backups.make("one")
            await callers.until(50)
            await backups.restore("one")
            restored = callers.now
            await callers.until(50)
        found = {id_ for session in sessions for id_ in await ids_by_offset(stores, session, restored=True)}
        acknowledged = callers.acknowledged
        assert all(id_ in found for _, _, id_ in acknowledged[:backed_up_from])
        assert all(id_ in found for begun, _, id_ in acknowledged if begun >= restored)
        assert not all(id_ in found for _, _, id_ in acknowledged), "nothing was restored"
        await require_whole_commits(backups.http, prefix)
        async with (
            httpx.AsyncClient(timeout=30) as http,
            open_stores(config(prefix), connection_params=params, http_client=http) as others,
            Callers(stores, sessions) as callers,
            Callers(others, sessions) as other_callers,
        ):
            await callers.until(20)
            await other_callers.until(20)
        later = {id_ for session in sessions for id_ in await ids_by_offset(stores, session, restored=True)}
        assert later == found | {id_ for _, _, id_ in (*callers.acknowledged, *other_callers.acknowledged)}
        await require_whole_commits(backups.http, prefix)


async def test_a_commit_in_doubt_is_applied_once_whatever_a_restored_backup_knows_of_it(
    backups: Backups, prefix: str
) -> None:
    """Its answer is lost, and the backup is from before it was applied, or from after that."""
    async with FaultProxy(backups.server.url) as proxy:
        params = {**backups.server.connection_params, "url": proxy.url}
        async with open_stores(config(prefix), connection_params=params) as stores:
            session = await begin(stores)
            for number, knows in enumerate([False, True]):
                await append(stores, session, 0)
                if not knows:
                    await backups.make(f"backup{number}")
                again = Gate()
                proxy.plan("POST", f"/api/collections/{prefix}_sessions", cut_after)
                proxy.plan("POST", f"/api/collections/{prefix}_sessions", again, at=(2,))
                writing = asyncio.create_task(append(stores, session, 1))
                await again.reached.wait()
                if knows:
                    await backups.make(f"backup{number}")
                await backups.restore(f"backup{number}")
                again.open()
                event = await writing
                assert event.offset == 2 * number + 1
                assert len(await ids_by_offset(stores, session)) == 2 * number + 2
                proxy.forget_plans()
            await require_whole_commits(backups.http, prefix)


async def test_what_a_restored_backup_does_not_have_is_said_to_be_missing_and_comes_back(
    backups: Backups, prefix: str
) -> None:
    """The backup is from before a collection was there, or from before there was anything."""
    params = backups.server.connection_params
    await backups.make("empty")
    async with open_stores(config(prefix), connection_params=params) as stores:
        await begin(stores)
        database = PocketBaseDocumentDatabase(
            None, params, collection_prefix=f"{prefix}_sessions", config=config(prefix)
        )
        async with database:
            await backups.make("without")
            notes = await database.get_or_create_collection("notes", Note, identity_loader_for(Note))
            await notes.insert_one(note("a"))
            await backups.restore("without")
            with pytest.raises(CollectionNotFound):
                await notes.insert_one(note("b"))
            session = await begin(stores)
            await append(stores, session, 0)
            await require_whole_commits(backups.http, prefix)
            await backups.restore("empty")
            with pytest.raises(SchemaError):
                await notes.insert_one(note("c"))
            with pytest.raises(PBCachedError):
                await begin(stores)
    async with open_stores(config(prefix), connection_params=params) as stores:
        session = await begin(stores)
        assert (await append(stores, session, 0)).offset == 0
        await require_whole_commits(backups.http, prefix)


class Note(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String


def note(id_: str) -> Note:
    return Note(id=ObjectId(id_), creation_utc="2026", version=Version.String("1.0.0"))
