"""What one server's cache makes of what others commit, of gaps, of a stream that fails, and of foreign hands
(design: section 8). Databases with HTTP clients of their own stand for servers."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Literal, TypedDict, cast

import httpx
import msgspec
import pytest
import pytest_asyncio
from parlant.core.common import Version
from parlant.core.persistence.common import ObjectId
from parlant.core.persistence.document_database import identity_loader_for

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer
from pb_cached.cache import collection as cached
from pb_cached.coherence import Follower, feed, logs
from pb_cached.coherence import follower as following
from pb_cached.coherence.entries import Entry, Gap
from pb_cached.coherence.feed import Feed, now
from pb_cached.coherence.stats import CoherenceStats
from pb_cached.collection import PocketBaseDocumentCollection
from pb_cached.config import CoherenceSettings, CollectionSettings, PocketBaseSettings, WriteSettings
from pb_cached.errors import AuthenticationFailed, OutcomeUnknown, SchemaError
from pb_cached.pocketbase.realtime import RealtimeStream, Timing
from tests.faults import EVERY, Buffer, Exchange, Fault, FaultProxy, Gate, Valve, Withheld, answer, delay
from tests.test_client import PASSWORD, Account

pytestmark = pytest.mark.slow

MAX_STALENESS = 1.0
HEARTBEAT = 0.2
SOON = 20.0
BRIEF = 0.2
NOTES = {"notes": CollectionSettings(partition_by="topic", sequence="number", log=True)}
"""A log of its own, beside the one by which beats go."""


class Note(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String
    topic: str
    number: int
    text: str


class NewerNote(Note, total=False):
    """Another version of the application's."""

    title: str | None


_ids = itertools.count()


def note(topic: str, number: int, text: str = "", **fields: Any) -> Any:
    made = {"id": f"{topic}-{number}-{next(_ids)}", "creation_utc": f"{number:04}", "version": "1.0.0"}
    return {**made, "topic": topic, "number": number, "text": text or f"text {number}", **fields}


class Tap:
    """Between a server's stream and what follows it. `lost` tells what does not get through, and is kept."""

    def __init__(self, follower: Follower) -> None:
        self.lost: Callable[[str, dict[str, Any]], bool] = lambda topic, record: False
        self.kept: list[tuple[str, bytes]] = []
        self.passed: list[tuple[str, bytes]] = []
        self._received = follower.received
        follower.received = self  # type: ignore[method-assign]

    def __call__(self, topic: str, data: bytes) -> None:
        if self.lost(topic, msgspec.json.decode(data)["record"]):
            self.kept.append((topic, data))
        else:
            self.passed.append((topic, data))
            self._received(topic, data)

    def lose_commits(self) -> None:
        self.lost = lambda topic, record: record.get("n", 0) > 0

    def let_through(self, *messages: tuple[str, bytes]) -> None:
        self.lost = lambda topic, record: False
        for topic, data in messages or self.kept:
            self._received(topic, data)


class Server:
    """One that shares notes with others."""

    def __init__(
        self, database: PocketBaseDocumentDatabase, notes: Any, proxy: FaultProxy, lines: list[logging.LogRecord]
    ) -> None:
        connection = database._connection
        assert connection is not None and connection.follower is not None
        self.database = database
        self.notes = cast(PocketBaseDocumentCollection[Any], notes)
        self.proxy = proxy
        self.follower = connection.follower
        self.id = connection.follower.server
        self.tap = Tap(self.follower)
        self._lines = lines
        self._collection = self.notes.codec.collection

    @property
    def log(self) -> str:
        return f"{self._collection}_log"

    @property
    def coherence(self) -> CoherenceStats:
        stats = self.database.stats().coherence
        assert stats is not None
        return stats

    @property
    def reads(self) -> int:
        """Of the notes, that went to PocketBase."""
        return self.proxy.count("GET", f"/api/collections/{self._collection}/records")

    async def texts(self, topic: str) -> list[str]:
        return [document["text"] for document in (await self.notes.find({"topic": {"$eq": topic}})).items]

    async def shows(self, topic: str, *texts: str) -> None:
        """Return when it does."""
        shown: list[str] = []

        async def does() -> bool:
            shown[:] = await self.texts(topic)
            return shown == list(texts)

        await until(does, lambda: f"{shown}, not {texts}")

    async def follows(self) -> None:
        """Return when its caches answer."""
        await until(lambda: self.coherence.state == "following", lambda: self.coherence)

    def said(self, words: str, level: int = logging.WARNING) -> int:
        """How often it has said that, so gravely."""
        return sum(words in line.getMessage() and line.levelno >= level for line in self._lines)

    async def knows(self, other: Server) -> None:
        """Return when it has heard of the other's numbers."""
        servers = self.follower._logs[self.log].feed._servers
        await until(lambda: other.id in servers, lambda: f"nothing of {other.id}")

    async def caches(self, topic: str) -> None:
        """Have it answer from its cache."""
        await self.follows()
        await self.texts(topic)
        before = self.reads
        await self.texts(topic)
        assert self.reads == before


async def until(condition: Callable[[], Any], what: Callable[[], Any]) -> None:
    try:
        async with asyncio.timeout(SOON):
            while True:
                met = condition()
                if await met if asyncio.iscoroutine(met) else met:
                    return
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {SOON:g} s: {what()}") from None


OpenServer = Callable[..., Any]


@pytest_asyncio.fixture
async def open_server(pocketbase: PocketBaseServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OpenServer]:
    # While two streams overlap everything comes twice.
    monkeypatch.setattr(following, "RealtimeStream", partial(RealtimeStream, timing=Timing(overlap=0.1)))
    async with AsyncExitStack() as stack:

        async def open_one(
            prefix: str = "follower",
            schema: type[Any] = Note,
            deadline: float = 30.0,
            stream: Fault | None = None,
            subscription: Fault | None = None,
            commit: Literal["auto", "batch"] = "auto",
            token: str = "",
        ) -> Server:
            proxy = await stack.enter_async_context(FaultProxy(pocketbase.url))
            for method, fault in (("GET", stream), ("POST", subscription)):
                if fault is not None:
                    proxy.plan(method, "/api/realtime", fault, at=EVERY)
            http = await stack.enter_async_context(httpx.AsyncClient(timeout=10))
            lines: list[logging.LogRecord] = []
            logger = logging.Logger(f"server {len(lines)}", logging.DEBUG)
            logger.addHandler(_Keeping(lines))
            config = Config(
                coherence=CoherenceSettings("realtime", MAX_STALENESS, HEARTBEAT, audit_interval=0),
                collections=NOTES,
                writes=WriteSettings(deadline=deadline),
                pocketbase=PocketBaseSettings(commit=commit),
            )
            params = pocketbase.connection_params | {"url": proxy.url}
            if token:
                params["admin_token"] = token
            database = await stack.enter_async_context(
                PocketBaseDocumentDatabase(
                    logger, params, collection_prefix=prefix, http_client=http, config=config
                )
            )
            notes = await database.get_or_create_collection("notes", schema, identity_loader_for(schema))
            server = Server(database, notes, proxy, lines)
            if stream is subscription is None:
                await server.follows()
            return server

        yield open_one


class _Keeping(logging.Handler):
    def __init__(self, lines: list[logging.LogRecord]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record)


@pytest_asyncio.fixture
async def one(open_server: OpenServer) -> Server:
    return cast(Server, await open_server())


@pytest_asyncio.fixture
async def other(open_server: OpenServer) -> Server:
    return cast(Server, await open_server())


@pytest.fixture
def topic(prefix: str) -> str:
    """One that no other test writes about."""
    return f"about {prefix}"


@pytest_asyncio.fixture
async def hand(pocketbase: PocketBaseServer) -> AsyncIterator[httpx.AsyncClient]:
    """Writes to PocketBase as everybody may."""
    headers = {"Authorization": pocketbase.connection_params["admin_token"]}
    async with httpx.AsyncClient(base_url=pocketbase.url, headers=headers, timeout=10) as http:
        yield http


async def record_of(hand: httpx.AsyncClient, server: Server, document: Any) -> Any:
    path = f"/api/collections/{server._collection}/records"
    found = await hand.get(path, params={"filter": f"doc_id='{document['id']}'"})
    (record,) = found.raise_for_status().json()["items"]
    return record


async def edit(hand: httpx.AsyncClient, server: Server, document: Any, **columns: str) -> None:
    record = await record_of(hand, server, document)
    answered = await hand.patch(f"/api/collections/{server._collection}/records/{record['id']}", json=columns)
    answered.raise_for_status()


async def sql(hand: httpx.AsyncClient, statement: str) -> None:
    (await hand.post("/api/sql", json={"query": statement})).raise_for_status()


# commits, in any order


async def test_what_another_server_commits_is_shown_without_a_read(one: Server, other: Server, topic: str) -> None:
    await other.caches(topic)
    before = other.reads
    first, second = note(topic, 0), note(topic, 1)
    await one.notes.insert_one(first)
    await one.notes.insert_one(second)
    await other.shows(topic, "text 0", "text 1")
    await one.notes.update_one({"id": {"$eq": second["id"]}}, {"text": "new"})
    await other.shows(topic, "text 0", "new")
    await one.notes.delete_one({"id": {"$eq": first["id"]}})
    await other.shows(topic, "new")
    assert other.reads == before


async def test_a_number_that_is_missing_is_looked_up_in_the_log(one: Server, other: Server, topic: str) -> None:
    await other.knows(one)
    await other.caches(topic)
    before = other.reads
    other.tap.lost = lambda _, record: record.get("n", 0) > 0 and f"{topic}-0" in record["payload"]
    await one.notes.insert_one(note(topic, 0))
    await one.notes.insert_one(note(topic, 1))
    await other.shows(topic, "text 0", "text 1")
    assert (other.coherence.gaps, other.reads) == (1, before)


async def test_a_beat_tells_of_a_commit_that_nothing_follows(one: Server, other: Server, topic: str) -> None:
    await other.knows(one)
    await other.caches(topic)
    other.tap.lose_commits()
    await one.notes.insert_one(note(topic, 0))
    await other.shows(topic, "text 0")
    assert other.coherence.gaps == 1


async def test_what_has_one_time_is_read_once_though_pages_end_within_it(
    open_server: OpenServer, hand: httpx.AsyncClient, topic: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "PAGE", 2)
    one = await open_server(prefix)
    for number in range(7):
        await one.notes.insert_one(note(topic, number))
    stamp = "2026-01-01 00:00:00.000Z"
    await sql(hand, f"UPDATE `{one.log}` SET created='{stamp}' WHERE n>=2 AND n<=6 AND server='{one.id}'")
    reader = one.follower._pocketbase
    for began in ("2025-12-01 00:00:00.000Z", stamp):
        read = [entry.n async for entry in reader.numbered(one.log, Gap(one.id, 1, 7), (began, 0.0))]
        assert read == [2, 3, 4, 5, 6, 1, 7]
    assert [entry.n async for entry in reader.numbered(one.log, Gap(one.id, 3, 4), (stamp, 0.0))] == [3, 4]


@pytest.mark.parametrize("is_followed", [True, False], ids=["by another number", "by a beat"])
async def test_where_a_batch_has_not_come_neither_may_have_what_it_changed(
    open_server: OpenServer, topic: str, prefix: str, is_followed: bool
) -> None:
    one, other = await open_server(prefix, commit="batch"), await open_server(prefix, commit="batch")
    await one.notes.insert_one(note(topic, 0))
    await other.knows(one)
    await other.shows(topic, "text 0")
    await other.caches(topic)
    other.tap.lost = lambda _, record: bool(
        record.get("n") or record.get("topic")
    )  # a commit, and what it changed
    await one.notes.update_one({"topic": {"$eq": topic}}, {"text": "new"})
    if is_followed:
        await until(lambda: len(other.tap.kept) >= 2, lambda: other.tap.kept)
        other.tap.lost = lambda _, record: False
        await one.notes.insert_one(note(f"{topic} too", 0))
    await other.shows(topic, "new")
    assert other.coherence.gaps > 0
    await other.caches(topic)


@pytest.mark.parametrize("is_followed", [True, False], ids=["by another number", "by a beat"])
async def test_the_first_numbers_of_a_server_that_has_just_begun_are_missed(
    open_server: OpenServer, topic: str, prefix: str, is_followed: bool
) -> None:
    other = await open_server(prefix)
    await other.caches(topic)
    # Also the beats, until there is something to tell.
    other.tap.lost = lambda _, record: record.get("server") != other.id and record.get("n") != 3
    one = await open_server(prefix)
    for number in range(2 + is_followed):
        await one.notes.insert_one(note(topic, number))
    if not is_followed:
        other.tap.lost = lambda _, record: record.get("n", 0) > 0
    await other.shows(topic, *(f"text {number}" for number in range(2 + is_followed)))
    assert other.coherence.gaps > 0
    await other.caches(topic)


async def test_of_an_old_server_only_what_it_commits_now_is_looked_up(
    one: Server, open_server: OpenServer, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "OVERLAP", 0.0)
    for number in range(20):
        await one.notes.insert_one(note(topic, number))
    await asyncio.sleep(0.1)
    other = await open_server()
    read = list[int]()
    arrived = other.follower._arrived

    def arriving(feed: Feed, entry: Entry) -> None:
        read.append(entry.n)
        arrived(feed, entry)

    monkeypatch.setattr(other.follower, "_arrived", arriving)
    other.tap.lose_commits()
    await one.notes.insert_one(note(topic, 20))
    await one.notes.insert_one(note(topic, 21))
    servers = other.follower._logs[other.log].feed._servers
    await until(lambda: one.id in servers and servers[one.id].expected == 23, lambda: servers)
    assert {n for n in read if n > 0} == {21, 22}


async def test_all_numbers_of_a_long_gap_are_looked_up(
    one: Server, other: Server, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "PAGE", 2)
    await other.knows(one)
    await other.caches(topic)
    before = other.reads
    other.tap.lose_commits()
    for number in range(7):
        await one.notes.insert_one(note(topic, number))
    await other.shows(topic, *(f"text {number}" for number in range(7)))
    assert other.reads == before


async def test_commits_that_come_again_or_late_change_nothing(one: Server, other: Server, topic: str) -> None:
    await other.caches(topic)
    changed, deleted = note(topic, 0), note(topic, 1)
    await one.notes.insert_one(changed)
    await one.notes.insert_one(deleted)
    for text in ("second", "third"):
        await one.notes.update_one({"id": {"$eq": changed["id"]}}, {"text": text})
    await one.notes.delete_one({"id": {"$eq": deleted["id"]}})
    await other.shows(topic, "third")
    before = other.reads
    for message in reversed(list(other.tap.passed)):
        other.tap.let_through(message)
    assert await other.texts(topic) == ["third"]
    assert other.reads == before


async def test_who_was_told_that_a_record_is_gone_does_not_find_it_cached(
    one: Server, other: Server, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = note(topic, 0)
    await one.notes.insert_one(document)
    await other.caches(topic)
    monkeypatch.setattr(feed, "PATIENCE", SOON)
    other.tap.lose_commits()
    await one.notes.delete_one({"id": {"$eq": document["id"]}})
    assert other.notes._cached is not None
    with monkeypatch.context() as moment:
        moment.setattr(other.notes._cached, "_may_answer", lambda: False)
        assert await other.texts(topic) == []
    assert await other.texts(topic) == []


async def test_an_update_that_overtakes_the_creation_by_another_server_holds(
    open_server: OpenServer, one: Server, other: Server, topic: str
) -> None:
    third = await open_server()
    await third.caches(topic)
    third.tap.lost = lambda _, record: record.get("server") == one.id and record["n"] > 0
    document = note(topic, 0)
    await one.notes.insert_one(document)
    await other.shows(topic, "text 0")
    await other.notes.update_one({"id": {"$eq": document["id"]}}, {"text": "new"})
    await until(lambda: third.tap.kept, lambda: "kept")
    third.tap.let_through()
    assert await third.texts(topic) == ["new"]


@pytest.mark.parametrize("text", ["a lone surrogate \udfff", "x"])
async def test_what_a_commit_does_not_tell_is_read(one: Server, other: Server, topic: str, text: str) -> None:
    document = note(topic, 0)
    await one.notes.insert_one(document)
    await other.caches(topic)
    await one.notes.update_one({"id": {"$eq": document["id"]}}, {"text": text, "number": 2**60})
    await other.shows(topic, text)
    assert (await other.notes.find({"topic": {"$eq": topic}})).items[0]["number"] == 2**60


async def test_what_a_commit_does_not_tell_is_as_old_as_the_commit_may_be_until_it_is_read(
    open_server: OpenServer, topic: str, prefix: str
) -> None:
    other, newer = await open_server(prefix), await open_server(prefix, NewerNote)
    await other.caches(topic)
    gate = Gate()
    other.proxy.plan("GET", f"/api/collections/{other._collection}/records", gate, at=EVERY)
    committed = now()
    await newer.notes.insert_one(note(topic, 0, title="a title"))
    of_notes = other.follower._logs[other.log].feed
    async with asyncio.timeout(SOON):
        await gate.reached.wait()
    assert of_notes._doubtful is not None and of_notes._doubtful < committed
    assert of_notes.good_until < committed + MAX_STALENESS
    gate.open()
    await other.shows(topic, "text 0")


async def test_another_version_of_the_application_is_understood(
    one: Server, open_server: OpenServer, topic: str
) -> None:
    kept, deleted = note(topic, 0), note(topic, 1)
    await one.notes.insert_one(kept)
    await one.notes.insert_one(deleted)
    await one.caches(topic)
    newer = await open_server(schema=NewerNote)
    await newer.notes.insert_one(note(topic, 2, title="a title"))
    await one.shows(topic, "text 0", "text 1", "text 2")
    await newer.notes.update_one({"id": {"$eq": kept["id"]}}, {"text": "new"})
    await newer.notes.delete_one({"id": {"$eq": deleted["id"]}})
    await one.shows(topic, "new", "text 2")
    await one.notes.update_one({"id": {"$eq": kept["id"]}}, {"text": "newest"})
    await newer.shows(topic, "newest", "text 2")
    await one.follows()


async def test_what_another_version_moves_comes_to_where_it_is_moved(
    one: Server, open_server: OpenServer, topic: str
) -> None:
    newer = await open_server(schema=NewerNote)
    document = note(f"{topic} too", 0, title=None)
    await newer.notes.insert_one(document)
    await one.caches(topic)
    await newer.notes.update_one({"id": {"$eq": document["id"]}}, {"topic": topic})
    await one.shows(topic, "text 0")


# our own commits, whose answers do not come


async def given_up(server: Server, topic: str) -> Gate:
    """Have a server give up a write that is on its way, and return what holds that up. The server caches the topic
    again, which holds `text 0`; the write is to make it `late`."""
    document = note(topic, 0)
    await server.notes.insert_one(document)
    await server.caches(topic)
    gate = Gate()
    server.proxy.plan("POST", f"/api/collections/{server.log}/records?", gate, at=EVERY)
    with pytest.raises(OutcomeUnknown):
        await server.notes.update_one({"id": {"$eq": document["id"]}}, {"text": "late"})
    server.proxy.forget_plans()
    await asyncio.sleep(BRIEF)  # how long what may yet change is not cached
    await server.caches(topic)
    return gate


@pytest.fixture
def avoids_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "AVOIDED_SECONDS", BRIEF)


@pytest.mark.usefixtures("avoids_briefly")
async def test_a_commit_of_ours_that_arrives_when_it_was_given_up_is_shown(
    open_server: OpenServer, topic: str
) -> None:
    one = await open_server(deadline=0.3)
    gate = await given_up(one, topic)
    before = one.reads
    gate.open()
    await one.shows(topic, "late")
    assert one.reads == before


@pytest.mark.usefixtures("avoids_briefly")
async def test_a_commit_of_ours_that_arrives_in_a_gap_is_read_back(
    open_server: OpenServer, topic: str, prefix: str
) -> None:
    one, other = await open_server(prefix, deadline=0.3), await open_server(prefix)
    gate = await given_up(one, topic)
    before = one.reads
    async with one.proxy.down():
        await until(lambda: one.coherence.state == "lost", lambda: one.coherence)
        gate.open()
        await other.shows(topic, "late")
    await one.follows()
    assert await one.texts(topic) == ["late"]
    assert one.reads == before


async def test_what_is_committed_is_shown_though_its_answer_does_not_come(one: Server, topic: str) -> None:
    await one.notes.insert_one(note(topic, 0))
    await one.caches(topic)
    before, withheld = one.reads, Withheld()
    one.proxy.plan("POST", f"/api/collections/{one.log}/records?", withheld)
    writing = asyncio.create_task(one.notes.update_one({"topic": {"$eq": topic}}, {"text": "new"}))
    await one.shows(topic, "new")
    assert not writing.done()
    withheld.open()
    await writing
    assert await one.texts(topic) == ["new"]
    assert one.reads == before


async def test_our_commits_are_applied_once_where_their_answers_come(one: Server, topic: str) -> None:
    before = one.coherence.commits
    for number in range(20):
        await one.notes.insert_one(note(topic, number))
    await asyncio.sleep(2 * feed.PATIENCE)
    assert one.coherence.commits == before


# a stream that fails


async def test_a_stream_that_dies_silently_ends_cached_answers_and_is_said_once(
    one: Server, other: Server, topic: str
) -> None:
    valve = Valve()
    other.proxy.plan("GET", "/api/realtime", valve, at=EVERY)
    async with other.proxy.down():
        pass
    await until(lambda: other.coherence.losses == 1, lambda: other.coherence)
    await other.caches(topic)
    valve.is_shut = True
    shut = now()
    await until(lambda: other.coherence.state != "following", lambda: other.coherence)
    assert now() - shut < MAX_STALENESS + HEARTBEAT
    await one.notes.insert_one(note(topic, 0))
    assert await other.texts(topic) == ["text 0"]
    await until(lambda: other.coherence.losses >= 4, lambda: other.coherence)
    assert other.said("realtime stream is dead") == 1
    assert other.said("reads go to PocketBase") == 1
    valve.is_shut = False
    await other.caches(topic)
    await until(lambda: other.said("caches answer again", logging.INFO) == 1, lambda: other.coherence)


async def test_after_a_gap_the_log_is_read_and_not_the_collections(
    open_server: OpenServer, topic: str, prefix: str
) -> None:
    one, other = await open_server(prefix), await open_server(prefix)
    deleted, kept = note(topic, 0), note(topic, 1)
    await one.notes.insert_one(deleted)
    await one.notes.insert_one(kept)
    await other.caches(topic)
    before, catch_ups = other.reads, other.coherence.catch_ups
    async with other.proxy.down():
        await until(lambda: other.coherence.state == "lost", lambda: other.coherence)
        await one.notes.update_one({"id": {"$eq": kept["id"]}}, {"text": "new"})
        await one.notes.delete_one({"id": {"$eq": deleted["id"]}})
        await one.notes.insert_one(note(topic, 2))
    await other.follows()
    assert await other.texts(topic) == ["new", "text 2"]
    assert other.reads == before
    assert other.proxy.count("GET", f"/api/collections/{other.log}/records") > 0
    assert other.coherence.catch_ups >= catch_ups + 2  # of both logs
    assert other.coherence.epochs == 0


async def test_what_waited_for_others_to_commit_is_read_back_though_its_time_is_from_before_the_gap(
    open_server: OpenServer, hand: httpx.AsyncClient, topic: str, prefix: str
) -> None:
    one, other = await open_server(prefix), await open_server(prefix)
    await one.notes.insert_one(note(topic, 0))
    await other.caches(topic)
    before, gaps = other.reads, other.coherence.gaps
    async with other.proxy.down():
        await until(lambda: other.coherence.state == "lost", lambda: other.coherence)
        newest = datetime.fromisoformat(other.follower._logs[other.log].feed.newest)
        await one.notes.insert_one(note(topic, 1))
        began = (newest - timedelta(seconds=5)).strftime("%Y-%m-%d %H:%M:%S.000Z")
        await sql(hand, f"UPDATE `{one.log}` SET created='{began}' WHERE payload LIKE '%{topic}-1%'")
    await other.follows()
    assert await other.texts(topic) == ["text 0", "text 1"]
    assert (other.reads, other.coherence.gaps) == (before, gaps)


async def test_a_gap_loads_nothing_that_has_not_changed(open_server: OpenServer, topic: str, prefix: str) -> None:
    one, other = await open_server(prefix), await open_server(prefix)
    topics = [f"{topic} {number}" for number in range(100)]
    await asyncio.gather(*(one.notes.insert_one(note(each, 0)) for each in topics))
    await other.follows()
    await asyncio.gather(*map(other.texts, topics))
    before, requests = other.reads, len(other.proxy.exchanges)
    async with other.proxy.down():
        await until(lambda: other.coherence.state == "lost", lambda: other.coherence)
        await one.notes.insert_one(note(topics[0], 1))
    await other.follows()
    shown = await asyncio.gather(*map(other.texts, topics * 3))
    assert shown[:2] == [["text 0", "text 1"], ["text 0"]]
    assert other.reads == before
    assert len(other.proxy.exchanges) - requests < 50


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="its clock goes on while it sleeps")
async def test_a_machine_that_has_slept_answers_nothing_from_before_unchecked(
    one: Server, other: Server, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its clocks, only one has gone on, and no timer of the event loop is due."""
    slept = 0.0

    class Clocks:
        monotonic = time.monotonic

        @staticmethod
        def clock_gettime(clock: int) -> float:
            return time.clock_gettime(clock) + (slept if clock == time.CLOCK_BOOTTIME else 0.0)

    monkeypatch.setattr(feed, "time", Clocks)
    valve = Valve()
    other.proxy.plan("GET", "/api/realtime", valve, at=EVERY)
    async with other.proxy.down():
        pass
    await until(lambda: other.coherence.losses == 1, lambda: other.coherence)
    await other.caches(topic)
    valve.is_shut = True  # the connection did not outlive the night
    await one.notes.insert_one(note(topic, 0))
    assert await other.texts(topic) == []
    slept = 600.0
    assert await other.texts(topic) == ["text 0"]
    valve.is_shut = False
    await other.caches(topic)
    assert other.coherence.epochs == 0


# streams that never bring anything


async def buffers(exchange: Exchange) -> None:
    """What stands before PocketBase passes on nothing until it has much."""
    await Buffer(1)(exchange)


STREAMS: Mapping[str, dict[str, Fault]] = {
    "a proxy that buffers": {"stream": buffers},
    "subscribed in vain": {"stream": Valve(is_shut=True)},
    "no stream": {"stream": answer(404)},
    "a subscription refused by an IP rule": {"subscription": answer(403)},
    "a stream of another address": {"subscription": answer(400)},
}


@pytest.mark.parametrize("faults", STREAMS.values(), ids=STREAMS)
async def test_where_no_stream_comes_every_read_asks_pocketbase_and_that_is_said_once(
    one: Server, open_server: OpenServer, topic: str, faults: dict[str, Fault]
) -> None:
    other = await open_server(**faults)
    await one.notes.insert_one(note(topic, 0))
    assert await other.texts(topic) == ["text 0"]
    opened = now()
    await until(lambda: other.said("reads go to PocketBase"), lambda: "not said")
    assert now() - opened < MAX_STALENESS + SOON / 4
    await one.notes.insert_one(note(topic, 1))
    before = other.reads
    for _ in range(3):
        assert await other.texts(topic) == ["text 0", "text 1"]
    assert other.reads == before + 3
    assert other.coherence.state != "following"
    await asyncio.sleep(2 * MAX_STALENESS)
    assert other.said("reads go to PocketBase") == 1
    other.proxy.forget_plans()
    async with other.proxy.down():
        pass
    await other.caches(topic)


async def test_a_token_that_dies_ends_cached_answers_within_the_bound_and_never_looks_like_nothing(
    one: Server, open_server: OpenServer, hand: httpx.AsyncClient, topic: str, prefix: str
) -> None:
    account = Account(hand, "", hand.headers["Authorization"], f"{prefix}@example.org")
    await account.create()
    signed_in = await hand.post(
        "/api/collections/_superusers/auth-with-password",
        json={"identity": account.email, "password": PASSWORD},
    )
    other = await open_server(token=signed_in.json()["token"])
    await one.notes.insert_one(note(topic, 0))
    await other.shows(topic, "text 0")
    await other.caches(topic)
    await account.kill_tokens()
    dead = now()
    with pytest.raises(AuthenticationFailed):
        while True:
            asked = now()
            assert await other.texts(topic) == ["text 0"]
            assert asked < dead + MAX_STALENESS, "is still answered"
            await asyncio.sleep(0.01)
    await until(lambda: other.said("reads go to PocketBase"), lambda: "not said")
    with pytest.raises(AuthenticationFailed):
        await other.texts(topic)
    await asyncio.sleep(2 * MAX_STALENESS)
    assert other.said("reads go to PocketBase") == 1
    assert other.said("no realtime stream") <= 2


@pytest.mark.parametrize("fault", [answer(403), answer(400)], ids=["403", "400"])
async def test_a_subscription_that_is_refused_later_ends_cached_answers_at_once(
    one: Server, other: Server, topic: str, fault: Fault
) -> None:
    await other.caches(topic)
    other.proxy.plan("POST", "/api/realtime", fault, at=EVERY)
    async with other.proxy.down():
        await until(lambda: other.coherence.state == "lost", lambda: other.coherence)
        await one.notes.insert_one(note(topic, 0))
    assert await other.texts(topic) == ["text 0"]
    await until(lambda: other.said("reads go to PocketBase"), lambda: "not said")
    assert other.said("no realtime stream") <= 2  # that it was cut, and that it is refused
    other.proxy.forget_plans()
    await other.caches(topic)


async def test_a_gap_of_which_the_log_is_forgotten_drops_the_cache(one: Server, other: Server, topic: str) -> None:
    for name, log in other.follower._logs.items():
        other.follower._logs[name] = msgspec.structs.replace(log, retained=0.5)
    await one.notes.insert_one(note(topic, 0))
    await other.caches(topic)
    before = other.reads
    async with other.proxy.down():
        await until(lambda: other.coherence.state == "lost", lambda: other.coherence)
        await asyncio.sleep(0.6)
        await one.notes.insert_one(note(topic, 1))
    await other.follows()
    assert await other.texts(topic) == ["text 0", "text 1"]
    assert other.coherence.epochs == 2 and other.reads > before


async def test_a_failing_beat_after_a_gap_is_made_up_for(other: Server, topic: str) -> None:
    other.proxy.plan("POST", f"/api/collections/{other.log}/records", answer(400))
    async with other.proxy.down():
        await until(lambda: other.coherence.state == "lost", lambda: other.coherence)
    await other.caches(topic)


async def test_beats_that_are_forgotten_in_a_log_are_no_reason_to_drop_the_cache(
    open_server: OpenServer, hand: httpx.AsyncClient, topic: str, prefix: str
) -> None:
    other = await open_server(prefix)
    await other.caches(topic)

    def is_by_another_log() -> bool:
        receipt = other.follower._receipts[other.log]
        return bool(receipt != last and receipt[0] != other.log)

    for _ in range(2):  # one by its own may be under way at the same time, and be answered later
        last = other.follower._receipts[other.log]
        await until(is_by_another_log, lambda: other.follower._receipts)
    await sql(hand, f"DELETE FROM `{other.log}` WHERE layout='beat'")
    before = other.reads
    async with other.proxy.down():
        await until(lambda: other.coherence.state == "lost", lambda: other.coherence)
    await other.caches(topic)
    assert (other.coherence.epochs, other.reads) == (0, before)


async def test_a_database_out_of_a_backup_drops_the_cache(
    one: Server, open_server: OpenServer, hand: httpx.AsyncClient, topic: str, prefix: str
) -> None:
    other = await open_server(prefix)
    document = note(topic, 0)
    await other.notes.insert_one(document)
    await other.notes.update_one({"id": {"$eq": document["id"]}}, {"text": "new"})
    deleted = note(topic, 1)
    await other.notes.insert_one(deleted)
    record = (await record_of(hand, other, document))["id"]
    await other.caches(topic)
    async with other.proxy.down():
        await until(lambda: other.coherence.state == "lost", lambda: other.coherence)
        # what a backup does: the logs and the records are what they were, by no commit and by no foreign hand
        await sql(hand, f"UPDATE pb_cached_logs SET applying=1 WHERE log='{other.log}'")
        await sql(hand, f"UPDATE `{other._collection}` SET text='old', rev=1 WHERE id='{record}'")
        await sql(hand, f"DELETE FROM `{other._collection}` WHERE doc_id='{deleted['id']}'")
        await sql(hand, f"UPDATE pb_cached_logs SET applying=0 WHERE log='{other.log}'")
        for log in (other.log, f"{prefix}_log"):
            await sql(hand, f"DELETE FROM `{log}` WHERE layout='beat'")
    await other.follows()
    assert await other.texts(topic) == ["old"]
    assert other.coherence.epochs == 2


async def test_a_collection_that_was_made_anew_is_another_one(
    open_server: OpenServer, topic: str, prefix: str
) -> None:
    one, other = await open_server(prefix), await open_server(prefix)
    await one.notes.insert_one(note(topic, 0))
    await other.caches(topic)
    await one.database.delete_collection("notes")
    anew = await one.database.get_or_create_collection("notes", Note, identity_loader_for(Note))
    await anew.insert_one(note(topic, 0, "another"))
    await other.shows(topic, "another")
    await until(lambda: other.coherence.epochs >= 1, lambda: other.coherence)


@pytest_asyncio.fixture
async def watched(open_server: OpenServer, hand: httpx.AsyncClient, prefix: str) -> Server:
    """A server whose collection has a person's attention, and nobody commits to it."""
    server = cast(Server, await open_server(prefix))
    await until(lambda: server._collection in server.follower._as_seen, lambda: server.follower._as_seen)
    return server


async def watches(hand: httpx.AsyncClient, server: Server) -> list[str]:
    """The triggers that look after its collection."""
    query = f"SELECT name FROM sqlite_master WHERE type='trigger' AND tbl_name='{server._collection}'"
    answered = await hand.post("/api/sql", json={"query": query})
    return [name for (name,) in answered.raise_for_status().json()["rows"]]


async def test_a_collection_that_a_hand_has_made_anew_is_looked_after_again(
    watched: Server, hand: httpx.AsyncClient, topic: str
) -> None:
    before = sorted(await watches(hand, watched))
    path = f"/api/collections/{watched._collection}"
    made = (await hand.get(path)).raise_for_status().json()
    (await hand.delete(path)).raise_for_status()
    anew = {key: made[key] for key in ("name", "type", "fields", "indexes")}
    (await hand.post("/api/collections", json=anew)).raise_for_status()

    async def has_them() -> bool:
        return sorted(await watches(hand, watched)) == before

    await until(has_them, lambda: "no triggers")
    document = note(topic, 0)
    await watched.notes.insert_one(document)
    await edit(hand, watched, document, text="by hand")
    assert (await record_of(hand, watched, document))["rev"] == 2
    assert watched.said("lost its triggers") == 1


async def test_what_was_changed_while_nothing_looked_after_a_collection_is_shown(
    watched: Server, hand: httpx.AsyncClient, topic: str
) -> None:
    await watched.notes.insert_one(note(topic, 0))
    await watched.caches(topic)
    lost = await watches(hand, watched)
    for name in lost:
        await sql(hand, f"DROP TRIGGER {name}")
    await sql(hand, f"UPDATE `{watched._collection}` SET text='by hand'")  # which raises no event
    await watched.shows(topic, "by hand")
    assert sorted(await watches(hand, watched)) == sorted(lost)
    await watched.caches(topic)


async def test_triggers_that_do_not_come_back_are_not_made_again_and_again(
    watched: Server, hand: httpx.AsyncClient, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await watched.notes.insert_one(note(topic, 0))

    async def does_not() -> bool:
        raise SchemaError("PocketBase does not let us")

    logs_ = watched.follower._logs
    monkeypatch.setitem(logs_, watched.log, msgspec.structs.replace(logs_[watched.log], repair=does_not))
    for name in await watches(hand, watched):
        await sql(hand, f"DROP TRIGGER {name}")
    seen = watched.follower._as_seen
    await until(lambda: seen[watched._collection].triggers == 0, lambda: seen)
    said = watched.said("the triggers are not there")
    assert said >= 1
    await asyncio.sleep(3 * HEARTBEAT)
    await watched.caches(topic)
    assert watched.said("the triggers are not there") == watched.said("lost its triggers") == said


async def test_a_log_that_was_made_anew_is_followed(
    open_server: OpenServer, hand: httpx.AsyncClient, topic: str, prefix: str
) -> None:
    one, other = await open_server(prefix), await open_server(prefix)
    await one.notes.insert_one(note(topic, 0))
    await other.caches(topic)
    (await hand.delete(f"/api/collections/{other.log}")).raise_for_status()
    third = await open_server(prefix)
    await third.notes.insert_one(note(topic, 1))
    await other.shows(topic, "text 0", "text 1")
    await until(lambda: other.coherence.epochs >= 1, lambda: other.coherence)
    await other.caches(topic)
    await third.notes.insert_one(note(topic, 2))
    await other.shows(topic, "text 0", "text 1", "text 2")


# foreign hands


@pytest.mark.parametrize("is_told", [True, False], ids=["told of by the stream", "found by looking"])
async def test_a_foreign_edit_shows_everywhere_within_a_heartbeat(
    one: Server, other: Server, hand: httpx.AsyncClient, topic: str, is_told: bool
) -> None:
    document = note(topic, 0)
    await one.notes.insert_one(document)
    for server in (one, other):
        await server.caches(topic)
        server.tap.lost = lambda topic, _: not is_told and topic == f"{one._collection}/*"
    await edit(hand, one, document, text="by hand")
    edited = now()
    for server in (one, other):
        await server.shows(topic, "by hand")
    assert now() - edited < HEARTBEAT + MAX_STALENESS
    if is_told:
        assert other.coherence.edits >= 1


async def test_what_a_foreign_hand_adds_and_deletes_in_a_gap_is_found(
    one: Server, other: Server, hand: httpx.AsyncClient, topic: str
) -> None:
    deleted, edited = note(topic, 0), note(topic, 1)
    for document in (deleted, edited):
        await one.notes.insert_one(document)
    await other.caches(topic)
    async with other.proxy.down():
        await until(lambda: other.coherence.state == "lost", lambda: other.coherence)
        record = await record_of(hand, one, deleted)
        path = f"/api/collections/{one._collection}/records"
        (await hand.delete(f"{path}/{record['id']}")).raise_for_status()
        await edit(hand, one, edited, text="by hand")
        added = {key: value for key, value in record.items() if key != "id"} | {
            "doc_id": f"{topic}-2",
            "number": 2,
        }
        (await hand.post(path, json={**added, "text": "added", "creation_utc": "0002"})).raise_for_status()
    await other.shows(topic, "by hand", "added")
    await other.caches(topic)


async def test_a_record_that_a_hand_has_broken_harms_no_other(
    one: Server, other: Server, hand: httpx.AsyncClient, topic: str
) -> None:
    broken = note(f"{topic} too", 0)
    for document in (broken, note(topic, 0)):
        await one.notes.insert_one(document)
    await other.caches(topic)
    await edit(hand, one, broken, extra="no JSON")
    async with asyncio.timeout(SOON):
        with pytest.raises(SchemaError):
            while True:
                await other.texts(f"{topic} too")
                await asyncio.sleep(0.01)
    await asyncio.sleep(MAX_STALENESS)
    await other.caches(topic)
    await edit(hand, one, broken, extra="")
    await other.shows(f"{topic} too", "text 0")


async def test_edits_that_never_end_do_not_end_cached_answers(
    one: Server, other: Server, hand: httpx.AsyncClient, topic: str
) -> None:
    document = note(f"{topic} too", 0)
    for each in (document, note(topic, 0)):
        await one.notes.insert_one(each)
    await other.caches(topic)
    # so that more are always found before those before are read
    other.proxy.plan("GET", f"/api/collections/{one._collection}/records", delay(1.5 * HEARTBEAT), at=EVERY)
    end = now() + 3 * MAX_STALENESS
    number = 0
    while now() < end:
        number += 1
        with suppress(httpx.HTTPStatusError):
            await edit(hand, one, document, text=f"edit {number}")
        assert other.coherence.state == "following"
    assert number > 10


async def test_a_log_that_cannot_be_read_holds_up_no_other(
    open_server: OpenServer, hand: httpx.AsyncClient, topic: str, prefix: str
) -> None:
    other = await open_server(prefix)
    beside = PocketBaseDocumentDatabase(
        None,
        {"url": other.proxy.url, "admin_token": hand.headers["Authorization"]},
        collection_prefix=f"{prefix}_beside",
        http_client=other.database._http,
        config=other.database._config,
    )
    async with beside:
        notes = await beside.get_or_create_collection("notes", Note, identity_loader_for(Note))
        assert beside._connection is other.database._connection
        where, path = {"topic": {"$eq": topic}}, f"/api/collections/{prefix}_beside_notes/records"
        await other.follows()
        await notes.find(cast(Any, where))
        before = other.proxy.count("GET", path)
        async with other.proxy.down():
            await until(lambda: other.coherence.state == "lost", lambda: other.coherence)
            other.proxy.plan("GET", f"/api/collections/{other.log}/records", answer(500), at=EVERY)
        follows = other.follower._logs[f"{prefix}_beside_notes_log"].feed
        await until(lambda: follows.is_proven, lambda: "the other log is not followed")
        await notes.find(cast(Any, where))
        assert other.proxy.count("GET", path) == before
        assert other.coherence.state != "following"
